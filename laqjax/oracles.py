"""A loss on a pytree of parameters becomes `(loss, grad)` of one worker on a flat vector [p]; minibatches; local steps.

The only file that knows pytrees of parameters. The shard is read in tiles, each once: a tile is cast and scaled by the
loss while it is in cache, and the forward and the backward product run on it before the next one comes. The tile is cut
straight out of the [M, N, ...] arrays: a slice per worker first would copy every shard once more per round.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax._core import cpu_layouts
from laqjax._core.validation import check_number, check_type, oracle_dtype, suggest
from laqjax.samplers import RowSelection
from laqjax.types import Oracle, Shards, register_dataclass, static_field

__all__ = ["LocalSgdOracle", "PytreeLayout", "TiledOracle", "from_loss", "with_local_steps"]


# of one tile in the parameters' dtype, on the CPU: in the second-level caches of two cores together, above that in the third
_CPU_TILE_BYTES = 4 * 2**20
# of the tiles of all workers, elsewhere: whole shards, mostly, so that a round is a handful of kernels
_ACCELERATOR_TILE_BYTES = 2**30


@dataclass(frozen=True)
class PytreeLayout:
    """How a pytree of arrays of one dtype lies in a vector. Equal layouts are equal, so they are one compiled program."""

    tree: Any  # structure
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(map(math.prod, self.shapes))

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector; a vector as it is.

        Raises:
            ValueError: it has another structure, or other shapes or dtypes.
        """
        leaves, tree = jax.tree.flatten(params)
        arrays = all(hasattr(leaf, "dtype") for leaf in leaves)
        same = arrays and all(leaf.dtype == self.dtype for leaf in leaves)
        if same and len(leaves) == 1 and np.shape(leaves[0]) == (self.size,):
            return jnp.asarray(leaves[0])
        if not same or tree != self.tree or tuple(np.shape(leaf) for leaf in leaves) != self.shapes:
            given = ", ".join(f"{leaf.dtype}{list(np.shape(leaf))}" for leaf in leaves) if arrays else str(type(params))
            tree_given = "" if jax.tree_util.treedef_is_leaf(tree) or not arrays else f" in {tree}"
            wanted = ", ".join(f"{self.dtype}{list(shape)}" for shape in self.shapes)
            raise ValueError(
                f"params = {given}{tree_given}: expected {self.dtype}[{self.size}], a vector from oracle.ravel(params), or the "
                f"pytree {wanted} in {self.tree}"
            )
        # in two dimensions: XLA on the CPU would fuse a concatenation of vectors into what reads it, a branch per element
        return jnp.concatenate([jnp.reshape(jnp.asarray(leaf), (1, -1)) for leaf in leaves], axis=1)[0]

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """The vector as the pytree."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(params, ends[:-1])
        return jax.tree.unflatten(self.tree, [a.reshape(shape) for a, shape in zip(parts, self.shapes, strict=True)])


@register_dataclass
@dataclass(frozen=True)
class TiledOracle:
    """`oracle(params, shards, worker) -> (loss, grad)`; build it with `from_loss`."""

    l2: Float[Array, ""]
    loss_fn: Callable[..., Array] = static_field()
    layout: PytreeLayout = static_field()
    reduction: str = static_field()
    tile: int | None = static_field()
    precision: str = static_field()

    @property
    def size(self) -> int:
        """The number of parameters p."""
        return self.layout.size

    @property
    def dtype(self) -> np.dtype:
        """Of parameters, gradients and losses."""
        return self.layout.dtype

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector; `unravel` is the inverse. ValueError for a pytree of another shape."""
        return self.layout.ravel(params)

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """The vector as the pytree."""
        return self.layout.unravel(params)

    def rows_per_tile(self, shards: Shards) -> int:
        """The tile asked for, or equal tiles of about `_CPU_TILE_BYTES` on the CPU, larger ones elsewhere; at most a shard."""
        workers, rows = shards.weight.shape
        size = _CPU_TILE_BYTES if jax.default_backend() == "cpu" else _ACCELERATOR_TILE_BYTES // workers
        numbers = sum(math.prod(a.shape[2:]) for a in jax.tree.leaves(shards.x))
        tiles = -(-rows * numbers * self.dtype.itemsize // size)
        return min(self.tile or -(-rows // max(tiles, 1)), rows)

    def __call__(
        self, params: Float[Array, " p"], shards: Shards, worker: Int[Array, ""], rows: RowSelection | None = None
    ) -> tuple[Float[Array, ""], Float[Array, " p"]]:
        """Loss and gradient of worker `worker` at `params`: reduction over its rows + (l2 / 2) ||params||^2.

        `rows`: an estimate of both from these rows alone.
        """
        tree = self.unravel(params)
        size = rows.size if rows else shards.weight.shape[1]
        tile = min(self.rows_per_tile(shards), size)

        def part(start: Any, count: int) -> tuple[Array, Array, Any]:
            x, y, weight = jax.tree.map(lambda a: _slice_rows(a, worker, rows, start, count), shards)
            weight = weight.astype(self.dtype)
            value_and_grad = jax.value_and_grad(lambda tree, x, y: jnp.vdot(self._losses(tree, x, y), weight))
            if jax.default_backend() == "cpu":
                loss, grad = cpu_layouts.with_canonical_layouts(value_and_grad, tree, x, y)
            else:
                loss, grad = value_and_grad(tree, x, y)
            return loss, jnp.sum(weight), grad

        with jax.default_matmul_precision(self.precision):
            loss, weight, grad = _sum_over_tiles(part, size, tile)
        grad = self.ravel(grad)
        if self.reduction == "mean" or rows:
            loss, grad = loss / weight, grad / weight
        if self.reduction == "sum" and rows:  # an estimate of the whole sum, beside which l2 keeps its share
            whole_shard = jnp.sum(shards.weight[worker]).astype(self.dtype)
            loss, grad = loss * whole_shard, grad * whole_shard
        return loss + self.l2 / 2 * jnp.sum(params * params), grad + self.l2 * params

    def validate(self, shards: Shards) -> None:
        """Raise ValueError unless the loss takes these shards and gives one loss per example (traced only).

        A loss that is an object with a method `check_shards`, as a `laqjax.problems.Problem`, says itself what it takes.
        """
        check_type(shards)
        own = getattr(self.loss_fn, "check_shards", None)
        if callable(own):
            own(shards)
        jax.eval_shape(self._losses, self._params_struct(), *_example_structs(shards, 2))

    def _losses(self, tree: Any, x: Any, y: Any) -> Array:
        """Return the losses of n examples. ValueError unless they are [n] and of the parameters' dtype."""
        losses, n = self.loss_fn(tree, x, y), len(jax.tree.leaves(x)[0])
        if getattr(losses, "shape", None) != (n,):
            got = jax.eval_shape(lambda: losses)
            raise ValueError(
                f"loss_fn(params, x, y) gave {got} for {n} examples: expected per-example losses of shape [{n}]; do not "
                "average inside the loss, the oracle does it by the weights"
            )
        if losses.dtype != self.dtype:
            raise ValueError(
                f"loss_fn gave {losses.dtype} losses for {self.dtype} params: expected {self.dtype}; cast x inside the loss"
            )
        return losses

    def activation_bytes(self, shards: Shards) -> int:
        """Bytes that the forward pass of one tile keeps for the backward pass (traced only)."""
        x, y = _example_structs(shards, self.rows_per_tile(shards))

        def forward(tree: Any, x: Any, y: Any) -> Any:
            return jax.vjp(lambda tree: self._losses(tree, x, y), tree)[1]

        kept = jax.eval_shape(forward, self._params_struct(), x, y)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    def prefers_sequential(self, shards: Shards) -> bool:
        """Whether the points of a sweep run one after another: convolutions with many kernels are slow on the CPU."""
        if jax.default_backend() != "cpu":
            return False
        loss = jax.make_jaxpr(self._losses)(self._params_struct(), *_example_structs(shards, 2))
        return cpu_layouts.contains_primitive(loss.jaxpr, jax.lax.conv_general_dilated_p)

    def _params_struct(self) -> Any:
        return jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))


def _example_structs(shards: Shards, count: int) -> Any:
    """Shapes and dtypes of x and y of `count` examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[2:]), a.dtype), (shards.x, shards.y))


def _slice_rows(a: Any, worker: Any, rows: RowSelection | None, start: Any, count: int) -> Array:
    """`count` rows from `start` on, of the worker's shard or of `rows` of it."""
    if rows and rows.index is not None:
        return a[worker, jax.lax.dynamic_slice(rows.index, (start,), (count,))]
    first = start if rows is None else start + rows.start
    at = [jnp.asarray(i, jnp.int32) for i in (worker, first, *(0,) * (a.ndim - 2))]
    return jax.lax.dynamic_slice(a, at, (1, count, *a.shape[2:]))[0]


def _sum_over_tiles(part: Callable[[Any, int], Any], size: int, tile: int) -> Any:
    """Sum of `part(start, count)` over the tiles of `size` rows; one tile needs no loop."""
    # summed as a pytree and made flat once: slices of the flat vector inside the loop cost half of the speed
    whole = size - size % tile
    if whole == tile:
        total = part(np.int32(0), tile)
    else:
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda: part(np.int32(0), tile)))
        starts = np.arange(0, whole, tile, dtype=np.int32)
        total, _ = jax.lax.scan(lambda sum, start: (jax.tree.map(jnp.add, sum, part(start, tile)), None), zeros, starts)
    return total if whole == size else jax.tree.map(jnp.add, total, part(np.int32(whole), size - whole))


def from_loss(
    loss_fn: Callable[..., Array],
    params: Any,
    *,
    l2: float = 0.0,
    reduction: str = "mean",
    tile: int | None = None,
    precision: str = "highest",
) -> TiledOracle:
    """An oracle for a loss per example.

    Args:
        loss_fn: (params, x, y) -> losses [n], x and y being n rows of a shard as stored; it casts and scales them itself.
        params: any pytree of floating arrays of one dtype; their values do not matter here.
        l2: adds (l2 / 2) ||params||^2 per worker.
        reduction: "mean" or "sum" over a worker's shard, by its weights.
        tile: rows read at a time (None: about 4 MiB of them on the CPU; on GPU and TPU 1 GiB, those of all workers together).
        precision: of the matrix products; "highest" is true float32 on every device, anything less changes trajectories
            on GPU and TPU.

    Returns:
        `oracle(params [p], shards, worker) -> (loss, gradient [p])`, with `ravel` and `unravel`.

    Raises:
        ValueError: another reduction, l2 < 0, tile < 1, parameters of mixed or non-floating dtypes.

    Example:
        >>> import jax.numpy as jnp, laqjax
        >>> oracle = laqjax.oracles.from_loss(lambda w, x, y: (x @ w - y) ** 2 / 2, jnp.zeros(3))
        >>> oracle.size
        3
    """
    leaves, tree = jax.tree.flatten(params)
    dtypes = {np.dtype(getattr(leaf, "dtype", type(leaf))) for leaf in leaves}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        raise ValueError(f"params: expected arrays of one floating dtype, got {sorted(map(str, dtypes))}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: expected 'mean' or 'sum'{suggest(reduction, ('mean', 'sum'))}")
    layout = PytreeLayout(tree, tuple(np.shape(leaf) for leaf in leaves), dtypes.pop())
    strength = check_number("l2", l2, layout.dtype, minimum=0)
    tile = None if tile is None else int(check_number("tile", tile, np.int32, minimum=1))
    return TiledOracle(strength, loss_fn, layout, reduction, tile, precision)


# ---- local steps ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class LocalSgdOracle:
    """The "gradient" is (params - params after `num_local_steps` local gradient steps of size lr) / (steps lr); see `with_local_steps`."""

    oracle: Oracle
    lr: Float[Array, ""]
    num_local_steps: int = static_field()

    @property
    def size(self) -> int:
        """The number of parameters p."""
        return self.oracle.size

    @property
    def dtype(self) -> np.dtype:
        """Of parameters, gradients and losses."""
        return self.oracle.dtype

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector."""
        return self.oracle.ravel(params)

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """The vector as the pytree."""
        return self.oracle.unravel(params)

    def validate(self, shards: Shards) -> None:
        """Raise ValueError where the loss does not fit the data."""
        self.oracle.validate(shards)

    def activation_bytes(self, shards: Shards) -> int:
        """Memory of one of its gradients."""
        return self.oracle.activation_bytes(shards)

    def prefers_sequential(self, shards: Shards) -> bool:
        """Whether the points of a sweep run one after another."""
        return self.oracle.prefers_sequential(shards)

    def __call__(
        self, params: Float[Array, " p"], shards: Shards, worker: Int[Array, ""], rows: RowSelection | None = None
    ) -> tuple[Float[Array, ""], Float[Array, " p"]]:
        """The loss at `params` (on the rows of the first local step), and the mean of the local gradients."""
        if rows and rows.size % self.num_local_steps:
            raise ValueError(
                f"minibatches of {rows.size} rows for num_local_steps = {self.num_local_steps}: expected a multiple, every local step uses its own part"
            )

        def gradient(t: Any, local: Any) -> Any:
            part = rows.slice(t, rows.size // self.num_local_steps) if rows else None
            return self.oracle(local, shards, worker, part)

        def local_step(local: Any, t: Any) -> Any:
            return local - self.lr * gradient(t, local)[1], None

        loss, grad = gradient(jnp.int32(0), params)
        first = params - self.lr * grad
        last, _ = jax.lax.scan(local_step, first, jnp.arange(1, self.num_local_steps, dtype=jnp.int32))
        return loss, grad if self.num_local_steps == 1 else (params - last) / (self.num_local_steps * self.lr)


def with_local_steps(oracle: Oracle, num_local_steps: int, lr: float) -> LocalSgdOracle:
    """`oracle`, but its gradient is that of `num_local_steps` local steps: FedAvg is `gd` on it, FedPAQ `qsgd`, lazy FedAvg `laq`.

    Args:
        oracle: of the local steps.
        num_local_steps: local gradient steps a round; a minibatch (a sampler's size) is cut into as many parts, one a step.
        lr: the local step size.

    Raises:
        ValueError: num_local_steps < 1 or lr <= 0.
    """
    return LocalSgdOracle(
        oracle,
        check_number("local_lr", lr, oracle_dtype(oracle), above=0),
        int(check_number("num_local_steps", num_local_steps, np.int32, minimum=1)),
    )
