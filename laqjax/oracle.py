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
from jaxtyping import Array, Float, Int

from laqjax.core import Shards, number, static

TILE_BYTES = (
    4 * 2**20
)  # of one tile in the parameters' dtype: in the second-level cache of two cores, above it in the third


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
        self, params: Float[Array, " p"], shards: Shards, worker: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, " p"]]:
        """Loss and gradient of worker `worker` at `params`: reduction over its shard + (l2 / 2) ||params||^2."""
        tree = self.unravel(params)
        rows = shards.y.shape[1]
        tile = self.rows_per_tile(shards)

        def part(start: Any, size: int) -> tuple[Array, Any]:
            def cut(a: Any) -> Array:
                at = [jnp.asarray(i, jnp.int32) for i in (worker, start, *(0,) * (a.ndim - 2))]
                return jax.lax.dynamic_slice(a, at, (1, size, *a.shape[2:]))[0]

            x, y, weight = jax.tree.map(cut, shards)
            return jax.value_and_grad(lambda tree: jnp.vdot(self.loss_fn(tree, x, y), weight.astype(self.dtype)))(tree)

        def accumulate(carry: Any, start: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, part(start, tile)), None

        # summed as a pytree and made flat once: slices of the flat vector inside the loop cost half of the speed
        carry = (jnp.zeros((), self.dtype), jax.tree.map(jnp.zeros_like, tree))
        with jax.default_matmul_precision(self.precision):
            whole = rows - rows % tile
            carry, _ = jax.lax.scan(accumulate, carry, np.arange(0, whole, tile, dtype=np.int32))
            if whole < rows:
                carry = jax.tree.map(jnp.add, carry, part(np.int32(whole), rows - whole))
        loss, grad = carry[0], self.ravel(carry[1])
        if self.reduction == "mean":
            scale = 1 / jnp.sum(jax.lax.dynamic_index_in_dim(shards.weight, worker, keepdims=False), dtype=self.dtype)
            loss, grad = loss * scale, grad * scale
        return loss + self.l2 / 2 * jnp.sum(params * params), grad + self.l2 * params


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
