"""A loss on a pytree of parameters becomes `(loss, grad)` of one worker on a flat vector [p].

The only file that knows pytrees. The shard is read in tiles, each once: a tile is cast and scaled by the loss while it
is in cache, and the forward and the backward product run on it before the next one comes. The tile is cut straight out
of the [M, N, ...] array: a slice per worker first would copy every shard once more per round.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int, PRNGKeyArray

from laqjax.core import Keys, Shards, number, static

TILE_BYTES = (
    4 * 2**20
)  # of one tile in the parameters' dtype: in the second-level cache of two cores, above it in the third


@dataclass(frozen=True)
class Rows:
    """`size` rows of a shard: a run from `start`, or those of `index` [size]."""

    size: int
    start: Int[Array, ""] | None = None
    index: Int[Array, " size"] | None = None


@register_dataclass
@dataclass(frozen=True)
class TiledOracle:
    """`oracle(params, shards, worker) -> (loss, grad)`; build it with `from_loss`."""

    l2: Float[Array, ""]
    loss_fn: Callable[..., Array] = static()
    unravel: Callable[[Float[Array, " p"]], Any] = static()
    size: int = static()  # p
    dtype: np.dtype = static()
    reduction: str = static()
    tile: int | None = static()
    precision: str = static()

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector; `unravel` is the inverse."""
        return ravel_pytree(params)[0]

    def rows_per_tile(self, shards: Shards) -> int:
        """The tile asked for, or equal tiles of about TILE_BYTES; never more than a shard."""
        rows, shape = shards.y.shape[1], shards.x.shape[2:]
        tiles = -(-rows * int(np.prod(shape)) * self.dtype.itemsize // TILE_BYTES)
        return min(self.tile or -(-rows // max(tiles, 1)), rows)

    def __call__(
        self, params: Float[Array, " p"], shards: Shards, worker: Int[Array, ""], rows: Rows | None = None
    ) -> tuple[Float[Array, ""], Float[Array, " p"]]:
        """Loss and gradient of worker `worker` at `params`: reduction over its rows + (l2 / 2) ||params||^2.

        `rows`: an estimate of both from these rows alone.
        """
        tree = self.unravel(params)
        size = rows.size if rows else shards.y.shape[1]
        tile = min(self.rows_per_tile(shards), size)

        def part(start: Any, count: int) -> tuple[Array, Array, Any]:
            def cut(a: Any) -> Array:
                if rows and rows.index is not None:
                    return a[worker, jax.lax.dynamic_slice(rows.index, (start,), (count,))]
                first = start + rows.start if rows else start
                at = [jnp.asarray(i, jnp.int32) for i in (worker, first, *(0,) * (a.ndim - 2))]
                return jax.lax.dynamic_slice(a, at, (1, count, *a.shape[2:]))[0]

            x, y, weight = jax.tree.map(cut, shards)
            weight = weight.astype(self.dtype)
            loss, grad = jax.value_and_grad(lambda tree: jnp.vdot(self.loss_fn(tree, x, y), weight))(tree)
            return loss, jnp.sum(weight), grad

        def accumulate(carry: Any, start: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, part(start, tile)), None

        # summed as a pytree and made flat once: slices of the flat vector inside the loop cost half of the speed
        zero = jnp.zeros((), self.dtype)
        carry = (zero, zero, jax.tree.map(jnp.zeros_like, tree))
        with jax.default_matmul_precision(self.precision):
            whole = size - size % tile
            carry, _ = jax.lax.scan(accumulate, carry, np.arange(0, whole, tile, dtype=np.int32))
            if whole < size:
                carry = jax.tree.map(jnp.add, carry, part(np.int32(whole), size - whole))
        loss, weight, grad = carry[0], carry[1], self.ravel(carry[2])
        if self.reduction == "mean" or rows:
            loss, grad = loss / weight, grad / weight
        if self.reduction == "sum" and rows:  # an estimate of the whole sum, beside which l2 keeps its share
            whole_shard = jnp.sum(shards.weight[worker]).astype(self.dtype)
            loss, grad = loss * whole_shard, grad * whole_shard
        return loss + self.l2 / 2 * jnp.sum(params * params), grad + self.l2 * params


@register_dataclass
@dataclass(frozen=True)
class Blocks:
    """Minibatches as the authors draw them: one of the shard's fixed runs of `size` rows, at random, every round."""

    size: int = static()

    def __call__(self, keys: Keys, shards: Shards, worker: Any, round: Any) -> Rows:
        blocks = jnp.maximum(_rows(shards, worker) // self.size, 1)
        return Rows(self.size, start=self.size * jax.random.randint(_sample(keys.own), (), 0, blocks, jnp.int32))


@register_dataclass
@dataclass(frozen=True)
class Epochs:
    """Minibatches without replacement: the shard in a new random order each epoch, `size` rows a round."""

    size: int = static()

    def __call__(self, keys: Keys, shards: Shards, worker: Any, round: Any) -> Rows:
        rows = _rows(shards, worker)
        rounds = jnp.maximum(rows // self.size, 1)
        key = jax.random.fold_in(jax.random.fold_in(_sample(keys.run), round // rounds), worker)
        place = jnp.where(
            jnp.arange(shards.y.shape[1], dtype=jnp.int32) < rows,
            jax.random.uniform(key, shards.y.shape[1:2], jnp.float32),
            2,
        )
        order = jnp.argsort(place)  # padding comes last
        return Rows(self.size, index=jax.lax.dynamic_slice(order, (round % rounds * self.size,), (self.size,)))


def _rows(shards: Shards, worker: Any) -> Int[Array, ""]:
    """Rows of a worker that are not padding (which stands at the end)."""
    return jnp.sum(shards.weight[worker] > 0, dtype=jnp.int32)


def _sample(key: PRNGKeyArray) -> PRNGKeyArray:
    """The sample's own stream: the compressor draws from the key itself."""
    return jax.random.fold_in(key, 0xFFFF5A5A)  # no round and no worker has this number


def from_loss(
    loss_fn: Callable[..., Array],
    params: Any,
    *,
    l2: float = 0.0,
    reduction: str = "mean",
    tile: int | None = None,
    precision: str = "highest",
) -> TiledOracle:
    """An oracle for `loss_fn(params, x, y) -> per-example losses [n]`, `x` and `y` being a tile of a shard as stored.

    params: any pytree of floating arrays of one dtype (their values do not matter here).
    reduction: "mean" or "sum" over a worker's shard, by its weights. l2 adds (l2 / 2) ||params||^2 per worker.
    tile: rows read at a time (None: about 4 MiB of them). precision: of the matrix products; "highest" is true float32
    on every device, anything less changes trajectories on GPU and TPU.
    Raises ValueError for another reduction, l2 < 0, tile < 1, or parameters of mixed or non-floating dtypes.
    """
    leaves = jax.tree.leaves(params)
    dtypes = {np.dtype(getattr(leaf, "dtype", type(leaf))) for leaf in leaves}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        raise ValueError(f"params: expected arrays of one floating dtype, got {sorted(map(str, dtypes))}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: expected 'mean' or 'sum'")
    dtype = dtypes.pop()
    strength = number("l2", l2, dtype, least=0)
    tile = None if tile is None else int(number("tile", tile, np.int32, least=1))
    flat, unravel = ravel_pytree(params)
    return TiledOracle(strength, loss_fn, unravel, flat.size, dtype, reduction, tile, precision)


def check(oracle: TiledOracle, shards: Shards) -> None:
    """Raise ValueError unless `loss_fn` gives one loss per example on these shards (traced only, nothing computed)."""
    tile = (
        jax.ShapeDtypeStruct((2, *shards.x.shape[2:]), shards.x.dtype),
        jax.ShapeDtypeStruct((2, *shards.y.shape[2:]), shards.y.dtype),
    )
    tree = jax.eval_shape(oracle.unravel, jax.ShapeDtypeStruct((oracle.size,), oracle.dtype))
    got = jax.eval_shape(oracle.loss_fn, tree, *tile)
    if getattr(got, "shape", None) != (2,):
        raise ValueError(
            f"loss_fn(params, x, y) gave {got} for 2 examples: expected per-example losses of shape [2]; do not average "
            "inside the loss, the oracle does it by the weights"
        )
    if got.dtype != oracle.dtype:
        raise ValueError(
            f"loss_fn gave {got.dtype} losses for {oracle.dtype} params: expected {oracle.dtype}; cast x inside the loss"
        )


def activations(oracle: TiledOracle, shards: Shards) -> int:
    """Bytes that the forward pass of one tile keeps for the backward pass (traced only)."""
    rows = oracle.rows_per_tile(shards)
    x, y = (jax.ShapeDtypeStruct((rows, *a.shape[2:]), a.dtype) for a in (shards.x, shards.y))
    tree = jax.eval_shape(oracle.unravel, jax.ShapeDtypeStruct((oracle.size,), oracle.dtype))
    kept = jax.eval_shape(lambda tree, x, y: jax.vjp(lambda tree: oracle.loss_fn(tree, x, y), tree)[1], tree, x, y)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))
