"""Lazily aggregated quantized gradients for your own training loop, as an optax transformation inside `jax.shard_map`.

It corresponds to the DDP communication hooks of PyTorch. Each device passes its own gradient and gets the same
direction, computed from the messages that the devices uploaded. The transformation runs `Algorithm.step` with an oracle
that returns the given gradient, and a server that passes the direction on to the next transformation.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from laqjax import algorithms
from laqjax._core import cpu_layouts
from laqjax._core.norms import norms_over
from laqjax._core.round import Algorithm, worker_step
from laqjax._core.validation import check_number, suggest
from laqjax._engine import collectives
from laqjax._engine.split_parameters import (
    ParameterLayout,
    SplitVector,
    check_spec_tree,
    is_split_vector,
    join_specs,
    make_layout,
    make_specs,
    match_specs,
)
from laqjax.algorithms import _shared, laq
from laqjax.compressors import blockwise
from laqjax.memories import ErrorFeedback
from laqjax.rules import History
from laqjax.types import (
    AlgorithmState,
    Collective,
    OracleResult,
    RoundKeys,
    Shards,
    _count_bits,
    register_dataclass,
    static_field,
)

__all__ = ["LazyAggregateState", "lazy_aggregate", "partition_specs"]


class LazyAggregateState(NamedTuple):
    """State of `lazy_aggregate`: the state of the algorithm, and what the last update sent.

    Attributes:
        algorithm_state: state of the algorithm, without params and optimizer. Its workers [M, ...] are spread over the
            axis; all else is the same on every device. With `param_specs`, each vector is a tree like the parameters.
        sent: [M], whether each worker sent a message in the last update.
        bytes_up: [M], bytes of each worker's message as a server would receive it; 0 without a message. Leaves that
            `skip_small` averages are counted in every update.
        bytes_received: bytes that the collectives moved to each device; without a message, only those of the averages.
        total_uploads: number of messages since `init`.
    """

    algorithm_state: AlgorithmState
    sent: Bool[Array | np.ndarray, " M"]
    bytes_up: Int[Array | np.ndarray, " M"]
    bytes_received: Int[Array, ""]
    total_uploads: Int[Array, ""]

    @property
    def bits_up(self) -> Int[np.ndarray, " M"]:
        """Return the bits of each device's message in int64, on the host; see `laqjax.RoundInfo`."""
        return _count_bits("bits_up", self.bytes_up)

    def _make_specs(self, axis: str, lead: tuple[str, ...], param_specs: Any) -> "LazyAggregateState":
        """Return the partition specs of this state; see `partition_specs`."""

        def make(lead: tuple[str, ...], node: Any) -> Any:
            if not is_split_vector(node):
                return P(*lead)
            if not match_specs(param_specs, node.tree):
                raise ValueError(
                    f"param_specs = {param_specs!r} for a state of lazy_aggregate(param_specs=...): must be one "
                    "PartitionSpec for each leaf of the parameters, as lazy_aggregate was given"
                )
            return SplitVector(join_specs(lead, param_specs, node.tree))

        whole = jax.tree.map(partial(make, lead), self, is_leaf=is_split_vector)
        workers = jax.tree.map(partial(make, (*lead, axis)), self.algorithm_state.workers, is_leaf=is_split_vector)
        return whole._replace(algorithm_state=whole.algorithm_state._replace(workers=workers))


@register_dataclass
@dataclass(frozen=True)
class _PrecomputedGradient:
    """Oracle that returns given gradients: its data are the gradients in `shards.x` [m, p]."""

    size: int = static_field()
    dtype: np.dtype = static_field()
    evaluates_anywhere = False

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """Concatenate the leaves of a pytree, of any floating dtypes, into one vector."""
        leaves = [_unshard(leaf) for leaf in jax.tree.leaves(params)]
        return jnp.concatenate([jnp.reshape(leaf, (1, -1)).astype(self.dtype) for leaf in leaves], axis=1)[0]

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """Return the vector unchanged."""
        return params

    def validate(self, shards: Shards) -> None:
        """Accept all shards."""

    def __call__(self, params: Any, shards: Shards, shard: Any, examples: Any = None) -> OracleResult:
        """Return a loss of 0 and the given gradient."""
        return OracleResult(jnp.zeros((), self.dtype), shards.x[shard])


# optimizer of the server: it leaves the model unchanged and keeps the direction in its state, where `update` reads it
_PASS_DIRECTION = optax.GradientTransformation(
    lambda params: (),
    lambda direction, state, params=None: (jnp.zeros_like(direction), direction),  # pyright: ignore[reportArgumentType]
)


def lazy_aggregate(
    axis: str,
    num_workers: int,
    algorithm: Callable[..., Algorithm] = laq,
    *,
    quantizer_blocks: str | Sequence[int] | None = None,
    collective: str | Collective = "all_gather",
    mean: bool = True,
    seed: int = 0,
    param_specs: Any = None,
    skip_small: int = 0,
    memory_dtype: Any = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """Create a gradient transformation that replaces `lax.pmean` of gradients over a mesh axis.

    Args:
        axis: mesh axis of the `jax.shard_map(..., check_vma=False)` in which `update` is called. With `check_vma=True`,
            JAX sums the gradients of replicated parameters before `update`. The mesh may have further axes. The compiler
            splits the parameters over those that `axis_names` leaves out; messages are then packed in silent rounds too.
            Other axes are manual, and `param_specs` tells how they split the parameters.
        num_workers: number of devices M along that axis, one worker each.
        algorithm: function of `laqjax.algorithms` whose method needs no gradients other than those it is given.
        quantizer_blocks: None: one radius for the whole message. "leaf": one radius for each leaf of the parameters.
            Sequence of sizes: one radius for each of these consecutive blocks, which add up to p.
        collective: "all_gather", "all_to_all" or "all_reduce", or one of your own, see `laqjax.types.Collective`.
        mean: True: the direction is the mean over the devices. False: the sum, as in the papers.
        seed: seed of random compressors.
        param_specs: pytree of `PartitionSpec`, for parameters that further manual axes of the mesh split. The devices
            of a worker decide alike, from the norms of all its parts, and each one sends the message of its part along
            `axis`. A grid has one radius for all parts. Any other compressor takes the part of each device as a block,
            with draws of its own. Leaves that the same axes split form one block, and the gradient of a leaf must be
            the same on all devices along an axis that does not split it. None: parameters are whole on every device.
        skip_small: leaves of fewer numbers are averaged in full precision in every step, outside of rule and memory.
        memory_dtype: dtype in which the workers keep the error of error feedback, such as bfloat16; None: that of the
            algorithm. Other memories are refused, since a server holds the same numbers.
        **settings: arguments of `algorithm`, such as bits, xi, window, max_silence. `lr` and `optimizer` are not
            allowed: the lazy rules compare with the direction itself, not with the steps that later transformations
            make of it (see `rules.History`).

    Returns:
        A transformation with two functions. `init(params)` is called outside of the `shard_map`. It returns a
        `LazyAggregateState` with the states of all M workers, to be placed by `partition_specs`.
        `update(gradients, state, params)` is called inside. It takes pytrees of any floating dtypes, and its direction
        has the dtypes of the gradients. The algorithm computes in float32, or in float64 if a leaf is float64.

    Raises:
        ValueError: an argument is wrong. `update` raises it when it is traced in these cases: the method needs other
            gradients; the axis has another size or is not bound by an enclosing `jax.shard_map`; `check_vma` is True;
            the state is not placed by `partition_specs`; `param_specs` does not fit; or the method may deadlock beside
            an axis of the compiler.

    Example:
        >>> import jax.numpy as jnp, optax, laqjax
        >>> tx = optax.chain(laqjax.lazy_aggregate("data", 4, bits=4), optax.adam(1e-3))
        >>> state = tx.init({"w": jnp.zeros((3, 2))})
        >>> laqjax.aggregation.partition_specs(state, "data")[0].algorithm_state.workers.memory_state
        P('data',)
    """
    check_number("num_workers", num_workers, np.int32, minimum=1)
    _check_arguments(algorithm, settings, quantizer_blocks)
    collectives.check_collective(collective)
    skip_small = int(check_number("skip_small", skip_small, np.int32, minimum=0))
    if param_specs is not None:
        check_spec_tree(param_specs, axis)
        if quantizer_blocks not in (None, "leaf"):
            raise ValueError(f"quantizer_blocks = {quantizer_blocks!r} with param_specs: must be None or 'leaf'")

    settings = {"num_workers": num_workers, **settings}
    transformation = _LazyAggregation(
        axis,
        num_workers,
        algorithm,
        settings,
        quantizer_blocks,
        collective,
        mean,
        seed,
        param_specs,
        skip_small,
        memory_dtype,
    )
    # report wrong settings in this call, not in `init`; p is large, since a method may derive k from p
    example = transformation.build(10**6, np.dtype(np.float32))
    _check_memory_dtype(memory_dtype, example)
    _check_history(example)
    return optax.GradientTransformation(transformation.init, transformation.update)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class _LazyAggregation:
    """Functions of the transformation that `lazy_aggregate` returns; the fields are its checked arguments."""

    axis: str
    num_workers: int
    algorithm: Callable[..., Algorithm]
    settings: dict[str, Any]
    quantizer_blocks: Any
    collective: Any
    mean: bool
    seed: int
    param_specs: Any
    skip_small: int
    memory_dtype: Any

    def build(self, size: int, dtype: Any) -> Algorithm:
        """Build the algorithm for vectors of `size` numbers."""
        return self.algorithm(_PrecomputedGradient(size, dtype), lr=1.0, optimizer=_PASS_DIRECTION, **self.settings)

    def make_algorithm(self, params: Any, on_device: bool) -> tuple[Algorithm, ParameterLayout]:
        """Build the algorithm for these parameters, and their layout."""
        layout = make_layout(params, self.param_specs, self.skip_small, on_device=on_device)
        leaves = jax.tree.leaves(params)
        dtype = np.dtype(np.float64 if any(leaf.dtype == np.float64 for leaf in leaves) else np.float32)
        alg = self.build(sum(layout.sizes), dtype)
        if self.param_specs is not None:
            compressor = layout.split_compressor(alg.compressor, per_leaf=self.quantizer_blocks == "leaf")
        elif self.quantizer_blocks is not None:
            blocks: Any = layout.sizes if self.quantizer_blocks == "leaf" else self.quantizer_blocks
            compressor = blockwise(alg.compressor, blocks)
        else:
            return alg, layout
        return dataclasses.replace(alg, compressor=compressor), layout

    def store(self, alg: Algorithm, layout: ParameterLayout, state: AlgorithmState) -> AlgorithmState:
        """Convert a state of the algorithm to the form that is kept between updates."""
        if self.memory_dtype is not None:
            state = _cast_memory(state, self.memory_dtype)
        if self.param_specs is None:
            return state
        return jax.tree.map(lambda vector, a: layout.split(a) if vector else a, _find_vectors(alg, self.build), state)

    def load(self, alg: Algorithm, layout: ParameterLayout, state: AlgorithmState) -> AlgorithmState:
        """Convert a kept state back to one of the algorithm."""
        if self.param_specs is not None:
            state = jax.tree.map(
                lambda node: layout.join(node) if is_split_vector(node) else node, state, is_leaf=is_split_vector
            )
        return state if self.memory_dtype is None else _cast_memory(state, alg.oracle.dtype)

    def init(self, params: Any, on_device: bool = False) -> LazyAggregateState:
        """Create the states of all workers; with `on_device`, those of one device inside `jax.shard_map`."""
        alg, layout = self.make_algorithm(params, on_device)
        state = self.store(alg, layout, alg.init(layout.select(params, layout.compressed))._replace(params=None))
        nothing = jnp.zeros((self.num_workers,), jnp.int32)
        return LazyAggregateState(state, nothing > 0, nothing, jnp.int32(0), jnp.int32(0))

    def update(self, gradients: Any, state: LazyAggregateState, params: Any = None) -> tuple[Any, LazyAggregateState]:
        """Run one round with the gradients of this device; return the direction and the next state."""
        if params is None:
            raise ValueError("lazy_aggregate's update with params = None: must be the parameters")
        _check_axis("lazy_aggregate", self.axis, self.num_workers)
        alg, layout = self.make_algorithm(params, on_device=True)
        expected = jax.eval_shape(partial(self.init, on_device=True), params)
        _check_state(state, expected, self.param_specs is not None)
        how = collectives.resolve_collective(self.collective, alg, self.axis)
        given = layout.select(gradients, layout.compressed)
        shards = Shards(alg.oracle.ravel(given)[None], None, jnp.ones((1, 1), alg.oracle.dtype))
        here = alg.oracle.ravel(layout.select(params, layout.compressed))
        before = self.load(alg, layout, state.algorithm_state)._replace(params=here)
        key = jax.random.key(self.seed)
        with norms_over(layout.segments if layout.mesh_axes else None):
            _check_branches(alg, before, shards, key)
            after, info = alg.step(before, shards, key, worker_batch_size=1, collective=how)
        direction = after.optimizer_state / self.num_workers if self.mean else after.optimizer_state
        kept = LazyAggregateState(
            algorithm_state=self.store(alg, layout, after._replace(params=None, optimizer_state=())),
            sent=info.sent,
            bytes_up=jax.lax.psum(info.bytes_up, layout.mesh_axes) if layout.mesh_axes else info.bytes_up,
            bytes_received=jnp.where(jnp.any(info.sent), how.bytes_received(alg, self.num_workers), 0).astype(
                jnp.int32
            ),
            total_uploads=state.total_uploads + jnp.sum(info.sent, dtype=jnp.int32),
        )
        directions, averages = _unravel_like(direction, given), layout.select(gradients, layout.averaged)
        if averages:
            averages, kept = self.average(alg.oracle.ravel(averages), averages, layout, kept)
        return layout.merge(directions, averages), kept

    def average(self, vector: Array, leaves: Any, layout: ParameterLayout, kept: LazyAggregateState) -> Any:
        """Average the small leaves over the devices in full precision, and count their bytes."""
        averages = _unravel_like((jax.lax.pmean if self.mean else jax.lax.psum)(vector, self.axis), leaves)
        return averages, kept._replace(
            bytes_up=kept.bytes_up + layout.num_averaged * vector.dtype.itemsize,
            bytes_received=kept.bytes_received + collectives.ring_bytes(vector, self.num_workers),
        )


def _unshard(leaf: Any) -> Any:
    """Reshard an array so that no explicit axis of the mesh splits it.

    Automatic axes, which the compiler controls, may still split it.
    """
    sharding = jax.typeof(leaf).sharding
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, P())) if any(sharding.spec) else leaf


def _unravel_like(vector: Float[Array, " p"], leaves: list[Any]) -> list[Any]:
    """Convert a vector to arrays with the shapes and dtypes of others."""
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]


def _cast_memory(state: AlgorithmState, dtype: Any) -> AlgorithmState:
    """Return the state with the memories of the workers in another dtype."""
    memory = jax.tree.map(lambda a: a.astype(dtype), state.workers.memory_state)
    return state._replace(workers=state.workers._replace(memory_state=memory))


def _find_vectors(alg: Algorithm, build: Callable[[int, Any], Algorithm]) -> AlgorithmState:
    """Return which arrays of a state are vectors [..., p]: those whose last axis grows with p."""

    def init(size: int) -> AlgorithmState:
        one = build(size, alg.oracle.dtype)
        return one.init(jnp.zeros(size, alg.oracle.dtype))._replace(params=None, optimizer_state=())

    here, longer = (jax.eval_shape(lambda size=size: init(size)) for size in (alg.oracle.size, alg.oracle.size + 1))
    return jax.tree.map(lambda a, b: a.shape != b.shape, here, longer)


def partition_specs(state: Any, axis: str, param_specs: Any = None) -> Any:
    """Return the partition specs of an optimizer state that contains the state of `lazy_aggregate`.

    Args:
        state: state from `tx.init(params)`, or its shapes from `jax.eval_shape`.
        axis: mesh axis that `lazy_aggregate` or `diloco_optimizer` was given.
        param_specs: the argument of that name, if it was given. Other parts of the state with the structure of the
            parameters, such as the moments of Adam, get the same specs.

    Returns:
        The specs for `in_specs` and `out_specs` of `jax.shard_map`, and for placing a restored state on the mesh. The
        states of the workers are split over the axis; all else is the same on every device along it.

    Raises:
        ValueError: `diloco_optimizer` is not the last transformation of a chain, or another one is around it; or
            `optax.apply_if_finite` is around `lazy_aggregate`.
    """
    last = state
    while type(last) is tuple and last:  # the state of `optax.chain`
        last = last[-1]
    # the state of `diloco_optimizer` declares this attribute
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_must_be_last"))
    if any(hasattr(node, "_must_be_last") and node is not last for node in nodes):
        raise ValueError(
            "diloco_optimizer before or inside another transformation: must be the last one of optax.chain, with none "
            "around it, such as optax.apply_if_finite, since all devices must set the same parameters in the same step"
        )
    for node in _find(optax.ApplyIfFiniteState, state):
        if _find(LazyAggregateState, node):
            raise ValueError(
                "optax.apply_if_finite around lazy_aggregate: must be behind it in optax.chain, since a device that finds its "
                "own gradient not finite would skip the exchange, and the others would wait for it forever"
            )
    return make_specs(state, axis, (), param_specs)


def _find(kind: type, tree: Any) -> list[Any]:
    """Return the nodes of a class."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


# ---- checks of arguments ------------------------------------------------------------------------------------------


def _check_history(alg: Algorithm) -> None:
    """Raise ValueError if the rule has a history of model steps, which are all zero in `lazy_aggregate`."""
    for history in _find(History, alg.rule):
        if history.kind != "direction":
            raise ValueError(
                f"lazy_aggregate with a history of kind {history.kind!r}, such as `c` gives it: must be of kind "
                "'direction', since later transformations make the steps of the model; use `xi`"
            )


def _check_arguments(algorithm: Any, settings: dict[str, Any], quantizer_blocks: Any) -> None:
    """Raise ValueError unless `algorithm` can be called with these settings and `quantizer_blocks` is valid."""
    if not callable(algorithm):
        name = algorithm if isinstance(algorithm, str) and callable(getattr(algorithms, algorithm, None)) else "laq"
        raise ValueError(f"algorithm = {algorithm!r}: must be a function, such as laqjax.algorithms.{name}")
    name = getattr(algorithm, "__name__", str(algorithm))
    _, *parameters = inspect.signature(algorithm).parameters.values()  # the first one is the oracle
    own = {"oracle", "lr", "optimizer"}
    for given in own & set(settings):
        raise ValueError(
            f"lazy_aggregate({given}=...): must not be given, since gradients are passed to `update` and the following "
            "transformations make the steps; use optax.chain(lazy_aggregate(...), optax.sgd(lr))"
        )
    names = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
    is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "optimizer" not in names and not is_open:
        raise ValueError(
            f"algorithm = {name}, which takes no optimizer: must be a method that takes one, such as laq, since the following "
            "transformations make the steps"
        )
    others = [known for known in names if known not in own | {"num_workers"}]
    unknown = [given for given in settings if given not in names]
    if unknown and not is_open:
        hint = suggest(unknown[0], [*others, "quantizer_blocks", "collective", "mean", "seed"])
        raise ValueError(f"lazy_aggregate({unknown[0]}=...) with {name}: must be one of {', '.join(others)}{hint}")
    for parameter in parameters:
        missing = parameter.name in others and parameter.name not in settings and parameter.default is parameter.empty
        if missing:
            example = _shared.EXAMPLE_ARGUMENTS.get(parameter.name, "...")
            raise ValueError(
                f"lazy_aggregate with {name} but without {parameter.name}: must be given, for example "
                f"{parameter.name}={example}"
            )
    if quantizer_blocks is None or (isinstance(quantizer_blocks, str) and quantizer_blocks == "leaf"):
        return
    sizes = [] if isinstance(quantizer_blocks, str) or not np.iterable(quantizer_blocks) else list(quantizer_blocks)
    if not sizes or any(isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1 for size in sizes):
        raise ValueError(
            f"quantizer_blocks = {quantizer_blocks!r}: must be None, 'leaf', or a sequence of whole sizes >= 1 that add up to p"
        )


def _check_axis(caller: str, axis: Any, num_workers: int) -> None:
    """Raise ValueError unless the caller is in `jax.shard_map(..., check_vma=False)` over this axis of this size."""
    try:
        devices = jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"{caller} on the axis '{axis}', which is not bound here: must be called inside "
            f"jax.shard_map(..., axis_names={{'{axis}'}}, check_vma=False), on a mesh with this axis"
        ) from None
    if devices != num_workers:
        raise ValueError(
            f"{caller} of num_workers = {num_workers} on the axis '{axis}' of {devices} devices: must be one "
            "worker for each device"
        )
    kind = jax.typeof(jax.lax.axis_index(axis))
    varying = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # JAX 0.8 | 0.10
    if varying:
        raise ValueError(
            f"{caller} inside jax.shard_map with check_vma=True, its default: must be check_vma=False, since JAX otherwise "
            "sums the gradients of replicated parameters, and every device gets the same gradient"
        )


def _check_memory_dtype(dtype: Any, alg: Algorithm) -> None:
    """Raise ValueError unless `dtype` is None, or a floating dtype for an algorithm with error feedback."""
    if dtype is None:
        return
    if not isinstance(alg.memory, ErrorFeedback):
        raise ValueError(
            f"memory_dtype = {dtype!r} with the memory {type(alg.memory).__name__}: must be None, since worker and server "
            "would no longer hold the same numbers; only error feedback (algorithms.topk_ef) may round its memory"
        )
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"memory_dtype = {dtype!r}: must be a floating dtype, such as jnp.bfloat16, or None")


def _check_state(state: LazyAggregateState, expected: LazyAggregateState, is_split: bool) -> None:
    """Raise ValueError unless each device holds the state of one worker, with the shapes that `init` gives."""
    how = (
        "split as param_specs says; pass param_specs to partition_specs, and the same specs as in_specs of the parameters"
        if is_split
        else "whole on every device; use axis_names={axis} of jax.shard_map and leave the axes that split the parameters to "
        "the compiler, or pass param_specs"
    )
    for leaf in jax.tree.leaves(state.algorithm_state.workers):
        if np.shape(leaf)[:1] != (1,):
            raise ValueError(
                f"lazy_aggregate with an array {list(np.shape(leaf))} of the workers' state on each device: must be one row "
                "[1, ...]; use laqjax.aggregation.partition_specs(state, axis), not P(), in in_specs and out_specs and to place a restored state"
            )
    one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype), expected.algorithm_state.workers
    )
    expected = expected._replace(algorithm_state=expected.algorithm_state._replace(workers=one))
    if jax.tree.structure(state) != jax.tree.structure(expected):
        raise ValueError(
            "lazy_aggregate with the state of another method or other settings: must be the state of its own init"
        )
    for leaf, needed in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if np.shape(leaf) != needed.shape:
            raise ValueError(
                f"lazy_aggregate with an array {list(np.shape(leaf))} in its state where these parameters need "
                f"{list(needed.shape)}: must be the state of init with the same parameters, {how}"
            )


def _check_branches(alg: Algorithm, state: AlgorithmState, shards: Shards, key: Any) -> None:
    """Raise ValueError if workers may take different branches on a mesh with axes of the compiler.

    The compiler may place collectives over these axes in a branch. They then wait forever for devices that took the
    other branch.
    """
    axes = collectives.automatic_axes()
    if not axes:
        return
    zero: Any = jnp.int32(0)

    def step(alg: Algorithm, worker: Any) -> Any:
        return worker_step(alg, worker, state, shards, RoundKeys(key, key, key, state.round, zero, zero))

    worker = jax.tree.map(lambda leaf: leaf[0], state.workers)
    if cpu_layouts.contains_primitive(jax.make_jaxpr(step)(alg, worker).jaxpr, jax.lax.cond_p, jax.lax.while_p):
        raise ValueError(
            f"lazy_aggregate on a mesh with the other axes {axes}: must be a method without lax.cond and "
            "lax.while_loop, which may deadlock there (compressors.optimal_sparsifier has one); use another method or "
            "compressor, or a mesh without them"
        )
