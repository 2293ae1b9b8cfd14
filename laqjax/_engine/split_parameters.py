"""Parameters that further mesh axes split, for `laqjax.aggregation`.

Each device holds its part of the parameters, and the devices along the data axis exchange the messages of that part.
Leaves that the same axes split are neighbors in the vector of a device, a segment. A leaf that an axis does not split
is the same on all devices along it: it is compressed alike there, and counted once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from laqjax._core.norms import norms_over
from laqjax._core.validation import get_declaration
from laqjax.compressors import Grid, Identity
from laqjax.types import Compressor, CompressorTraits, register_dataclass, static_field

Segment = tuple[int, tuple[str, ...]]  # numbers on this device, and the mesh axes that split them


class SplitVector(NamedTuple):
    """Vector [..., p] of a state, as a tree of the shapes of the parameters.

    Attributes:
        tree: pytree of the parameters, with arrays [..., *shape]; None for a leaf that is not compressed.
    """

    tree: Any


@dataclass(frozen=True)
class ParameterLayout:
    """Division of a parameter tree into the vector that is compressed and the leaves that are averaged.

    Attributes:
        structure: structure of the tree.
        shapes: shapes of its leaves, on this device or outside of the mesh.
        axes: mesh axes that split each leaf, sorted.
        compressed: leaves of the vector, in its order.
        averaged: leaves that are too small to be compressed.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[str, ...], ...]
    compressed: tuple[int, ...]
    averaged: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Return the numbers of each compressed leaf."""
        return [math.prod(self.shapes[index]) for index in self.compressed]

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Return all axes that split a leaf."""
        return tuple(sorted({axis for axes in self.axes for axis in axes}))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return the segments of the vector."""
        sizes: dict[tuple[str, ...], int] = {}
        for index, size in zip(self.compressed, self.sizes, strict=True):
            sizes[self.axes[index]] = sizes.get(self.axes[index], 0) + size
        return tuple((size, axes) for axes, size in sizes.items())

    @property
    def num_averaged(self) -> int:
        """Return the numbers of the averaged leaves on all devices of a worker, inside `jax.shard_map`."""
        return sum(math.prod(self.shapes[i]) * math.prod(map(lax.axis_size, self.axes[i])) for i in self.averaged)

    def select(self, tree: Any, indices: Sequence[int]) -> list[Any]:
        """Return some leaves of a tree of the parameters."""
        leaves = jax.tree.leaves(tree)
        return [leaves[index] for index in indices]

    def merge(self, compressed: Sequence[Any], averaged: Sequence[Any]) -> Any:
        """Return the tree of the compressed and the averaged leaves."""
        leaves = dict(zip((*self.compressed, *self.averaged), (*compressed, *averaged), strict=True))
        return jax.tree.unflatten(self.structure, [leaves[index] for index in range(len(leaves))])

    def split(self, vector: Any) -> SplitVector:
        """Convert a vector [..., p] to arrays of the shapes of the leaves."""
        parts = jnp.split(vector, np.cumsum(self.sizes)[:-1], axis=-1)
        shapes = [(*vector.shape[:-1], *self.shapes[index]) for index in self.compressed]
        parts = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return SplitVector(self.merge(parts, [None] * len(self.averaged)))

    def join(self, split: SplitVector) -> Any:
        """Convert the arrays of `split` to a vector [..., p]."""
        leaves = self.structure.flatten_up_to(split.tree)
        parts = [(leaves[index], len(self.shapes[index])) for index in self.compressed]
        return jnp.concatenate([part.reshape(*part.shape[: part.ndim - ndim], -1) for part, ndim in parts], axis=-1)

    def split_compressor(self, compressor: Compressor, per_leaf: bool) -> "SplitCompressor":
        """Return a compressor of this device's part.

        A grid and the identity keep the blocks of whole parameters: all leaves, or each leaf. Any other compressor
        takes each segment or each leaf of this device as a block.
        """
        leaves = [(size, self.axes[index]) for index, size in zip(self.compressed, self.sizes, strict=True)]
        blocks = [(segment,) for segment in (leaves if per_leaf else self.segments)]
        if not per_leaf and isinstance(compressor, Grid | Identity):
            blocks = [self.segments]
        return SplitCompressor(compressor, tuple(blocks), self.mesh_axes)


@register_dataclass
@dataclass(frozen=True)
class SplitCompressor:
    """Compressor of one device's part of a vector, for use inside `jax.shard_map`.

    Attributes:
        compressor: compressor of each block. The radius of a `Grid` is that of the block on all devices.
        blocks: segments of each block.
        mesh_axes: mesh axes that split the vector.
    """

    compressor: Compressor
    blocks: tuple[tuple[Segment, ...], ...] = static_field()
    mesh_axes: tuple[str, ...] = static_field()

    @property
    def has_static_layout(self) -> bool:
        """Return whether the layout of a block's message is static."""
        return get_declaration(self.compressor, CompressorTraits, "has_static_layout")

    @property
    def is_coordinatewise(self) -> bool:
        """Return whether there is one block, of a compressor that is."""
        return len(self.blocks) == 1 and get_declaration(self.compressor, CompressorTraits, "is_coordinatewise")

    def encode(self, target: Any, keys: Any) -> dict[str, Any]:
        """Compress each block; random draws differ between the devices that hold different parts."""
        payload, own = {}, jax.random.split(keys.worker_key, len(self.blocks))
        for i, (block, segments) in enumerate(zip(self._split(target), self.blocks, strict=True)):
            axes = segments[0][1]
            key = jax.random.fold_in(own[i], lax.axis_index(axes)) if axes else own[i]
            with norms_over(segments if isinstance(self.compressor, Grid) else None):
                payload[str(i)] = self.compressor.encode(block, keys._replace(worker_key=key))
        return payload

    def decode(self, payload: dict[str, Any], like: Any) -> Any:
        """Decode each block."""
        blocks = enumerate(self._split(like))
        return jnp.concatenate([self.compressor.decode(payload[str(i)], block) for i, block in blocks])

    def wire_fields(self, payload: dict[str, Any], like: Any) -> Any:
        """List the fields of all blocks.

        Numbers that another device counts are masked. The exchange ignores the masks, and moves them on every device.
        """
        is_read = not payload  # a reader does not count
        for i, (block, segments) in enumerate(zip(self._split(like), self.blocks, strict=True)):
            for field in self.compressor.wire_fields(payload.setdefault(str(i), {}), block):
                yield field if is_read else field._replace(mask=self._count_mask(field, segments))

    def _split(self, vector: Any) -> list[Any]:
        """Return the blocks of an array, or their structs; one block takes a part of a vector too."""
        if len(self.blocks) == 1:
            return [vector]
        sizes = [sum(size for size, _ in segments) for segments in self.blocks]
        if isinstance(vector, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct((size,), vector.dtype) for size in sizes]
        return jnp.split(vector, np.cumsum(sizes)[:-1])

    def _count_mask(self, field: Any, segments: tuple[Segment, ...]) -> Bool[Array, "..."]:
        """Return which numbers of a field this device counts: the first one of the devices that hold them."""
        parts = segments
        if field.like.shape != (sum(size for size, _ in segments),):
            whole = isinstance(self.compressor, Grid)  # its radius is the same on all devices
            parts = ((math.prod(field.like.shape), () if whole else segments[0][1]),)
        own = [self._is_first(axes, (size,)) for size, axes in parts]
        mask = jnp.concatenate(own).reshape(field.like.shape)
        return mask if field.mask is None else mask & field.mask

    def _is_first(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Return whether this device is the first one along all axes that do not split a segment."""
        others = tuple(axis for axis in self.mesh_axes if axis not in axes)
        return jnp.full(shape, lax.axis_index(others) == 0 if others else True)


# ---- specs and checks ------------------------------------------------------------------------------------------------


def make_layout(params: Any, param_specs: Any, skip_small: int, *, on_device: bool) -> ParameterLayout:
    """Divide a parameter tree, or with `on_device` its part on this device, inside `jax.shard_map`.

    Leaves of fewer than `skip_small` numbers are averaged.

    Raises:
        ValueError: `param_specs` does not fit the parameters or the mesh, or all leaves are averaged.
    """
    leaves, structure = jax.tree.flatten(params)
    specs = [P()] * len(leaves) if param_specs is None else _check_specs(param_specs, params, on_device)
    axes = [spec_axes(spec) for spec in specs]
    parts = [math.prod(lax.axis_size(axis) for axis in own) if on_device else 1 for own in axes]
    small = [math.prod(leaf.shape) * part < skip_small for leaf, part in zip(leaves, parts, strict=True)]
    if all(small):
        raise ValueError(
            f"skip_small = {skip_small} with parameters of at most {max(map(np.size, leaves), default=0)} numbers in a "
            "leaf: must leave at least one leaf to be compressed"
        )
    order = sorted(range(len(leaves)), key=lambda index: axes[index])  # stable
    return ParameterLayout(
        structure,
        tuple(leaf.shape for leaf in leaves),
        tuple(axes),
        tuple(index for index in order if not small[index]),
        tuple(index for index in order if small[index]),
    )


def spec_axes(spec: P) -> tuple[str, ...]:
    """Return the mesh axes that a partition spec names, sorted."""
    entries = [entry if isinstance(entry, tuple) else (entry,) for entry in spec if entry is not None]
    return tuple(sorted(axis for entry in entries for axis in entry))


def is_split_vector(node: Any) -> bool:
    """Return whether a node is a `SplitVector`."""
    return isinstance(node, SplitVector)


def make_specs(tree: Any, axis: str, lead: tuple[str, ...], param_specs: Any) -> Any:
    """Return the partition specs of an optimizer state.

    Args:
        tree: state, or a part of it. A node with a method `_make_specs` returns its own specs.
        axis: mesh axis of the workers.
        lead: mesh axes that split the leading axes of all arrays.
        param_specs: specs of the parameters, for parts of the state with their structure. None: no leaf is split.
    """

    def follows_params(node: Any) -> bool:
        if param_specs is None or not match_specs(param_specs, node):
            return False
        pairs = zip(*(jax.tree.leaves(tree, is_leaf=_is_none) for tree in (node, param_specs)), strict=True)
        return all(a is None or np.ndim(a) >= len(lead) + len(spec or ()) for a, spec in pairs)

    def make(node: Any) -> Any:
        if hasattr(node, "_make_specs"):
            return node._make_specs(axis, lead, param_specs)
        return join_specs(lead, param_specs, node) if follows_params(node) else P(*lead)

    return jax.tree.map(make, tree, is_leaf=lambda node: hasattr(node, "_make_specs") or follows_params(node))


def match_specs(param_specs: Any, tree: Any) -> bool:
    """Return whether a tree has the structure of the specs; None may stand for any leaf."""
    return jax.tree.structure(tree, is_leaf=_is_none) == jax.tree.structure(param_specs, is_leaf=_is_none)


def join_specs(lead: tuple[str, ...], param_specs: Any, tree: Any) -> Any:
    """Return the specs with the axes `lead` before them, and None where a tree of this structure has None."""
    return jax.tree.map(
        lambda spec, leaf: None if leaf is None else P(*lead, *spec), param_specs, tree, is_leaf=_is_none
    )


def _is_none(node: Any) -> bool:
    return node is None


def check_spec_tree(param_specs: Any, axis: str) -> None:
    """Raise ValueError unless all leaves are partition specs, of mesh axes other than `axis`."""
    for spec in jax.tree.leaves(param_specs):
        if not isinstance(spec, P):
            raise ValueError(f"param_specs with a leaf {spec!r}: must be a pytree of jax.sharding.PartitionSpec")
        if axis in spec_axes(spec):
            raise ValueError(
                f"param_specs with {spec}: must not name '{axis}', the axis of the workers, which hold the same parameters"
            )


def _check_specs(param_specs: Any, params: Any, on_device: bool) -> list[P]:
    """Return the specs of the leaves; raise ValueError unless they fit the parameters and the mesh."""
    specs, structure = jax.tree.flatten(param_specs)
    if structure != jax.tree.structure(params):
        raise ValueError(
            f"param_specs of the structure {structure} for parameters of the structure {jax.tree.structure(params)}: "
            "must be one PartitionSpec for each leaf"
        )
    for spec, leaf in zip(specs, jax.tree.leaves(params), strict=True):
        if len(spec) > len(leaf.shape):
            raise ValueError(
                f"param_specs with {spec} for a leaf of shape {list(leaf.shape)}: must have at most {len(leaf.shape)} entries"
            )
        placed = None if on_device or isinstance(leaf, Tracer) else getattr(leaf, "sharding", None)
        if isinstance(placed, NamedSharding) and not placed.is_fully_replicated:
            expected = NamedSharding(placed.mesh, spec) if set(spec_axes(spec)) <= set(placed.mesh.axis_names) else None
            if expected is None or not placed.is_equivalent_to(expected, leaf.ndim):
                raise ValueError(
                    f"param_specs with {spec} for a leaf of shape {list(leaf.shape)} that is placed by {placed.spec}: must be "
                    "the specs by which the parameters are split"
                )
    for name in sorted({axis for spec in specs for axis in spec_axes(spec)}) if on_device else ():
        try:
            lax.axis_size(name)
        except NameError:
            raise ValueError(
                f"param_specs with the axis '{name}', which is not manual here: must be axes of axis_names of the enclosing "
                "jax.shard_map; leave param_specs out where the compiler splits the parameters"
            ) from None
    return specs
