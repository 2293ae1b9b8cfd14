"""Lazily aggregated quantized gradients for a training loop of one's own, as an optax transformation inside `jax.shard_map`.

What DDP communication hooks are to PyTorch: each device gives its own gradient in, and gets the same direction out, made of
what the devices chose to send. It is `Algorithm.step`, whose oracle hands over the gradient and whose server keeps the
direction for the transformations behind it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from laqjax import exchange as exchanges
from laqjax.algorithms import laq
from laqjax.checks import number
from laqjax.compressors import blockwise
from laqjax.mesh import WORKERS
from laqjax.step import Algorithm
from laqjax.types import Shards, State, count_bits, register_dataclass, static


class LazyState(NamedTuple):
    """The state of `lazy_aggregate`: what the algorithm remembers, and what the last update sent."""

    laq: State  # its workers [M, ...] are spread over the axis, all else is the same on every device; no params, no optimizer
    sent: Bool[Array | np.ndarray, " M"]
    bytes_up: Int[Array | np.ndarray, " M"]  # of each device's message, as a server would receive it; 0 without one
    bytes: Int[Array, ""]  # that the exchange moved to each device; 0 where nobody sent
    uploads: Int[Array, ""]  # messages so far

    @property
    def bits_up(self) -> Int[np.ndarray, " M"]:
        """Return the bits of each device's message in int64, on the host; see `laqjax.Info`."""
        return count_bits("bits_up", self.bytes_up)


@register_dataclass
@dataclass(frozen=True)
class Given:
    """An oracle whose data is the gradient: `shards.x` [m, p], and `shards.y`, the model it belongs to."""

    size: int = static()
    dtype: np.dtype = static()

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector, whatever floating dtypes its leaves have."""
        leaves = jax.tree.leaves(params)
        return jnp.concatenate([jnp.reshape(leaf, (1, -1)).astype(self.dtype) for leaf in leaves], axis=1)[0]

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """The vector itself."""
        return params

    def check(self, shards: Shards) -> None:
        """Any gradient is right."""

    def working_bytes(self, shards: Shards) -> int:
        """It computes nothing."""
        return 0

    def one_by_one(self, shards: Shards) -> bool:
        """No convolutions here."""
        return False

    def __call__(self, params: Any, shards: Shards, worker: Any, rows: Any = None) -> tuple[Array, Array]:
        """(0, the gradient given). ValueError at another model than the one it was computed at."""
        if params is not shards.y:
            raise ValueError(
                "lazy_aggregate with a method that asks for gradients at other models (MARINA on minibatches, LASG, CADA): "
                "expected one that lives on the gradients it is given, such as laq, lag_wk, ef21, diana"
            )
        return jnp.zeros((), self.dtype), shards.x[worker]


# the server's optimizer: it moves nothing and hands over the direction, in its state, for what stands behind
HAND_OVER = optax.GradientTransformation(
    lambda params: (),
    lambda direction, state, params=None: (jnp.zeros_like(direction), direction),  # pyright: ignore[reportArgumentType]
)


def lazy_aggregate(
    axis: str,
    num_workers: int,
    method: Callable[..., Algorithm] = laq,
    *,
    blocks: str | Sequence[int] | None = None,
    exchange: str = "messages",
    mean: bool = True,
    seed: int = 0,
    **settings: Any,
) -> optax.GradientTransformation:
    """A gradient transformation that replaces `lax.pmean` of gradients over a mesh axis.

    Args:
        axis: of the `jax.shard_map` in which `update` is called, with `check_vma=False` (else JAX adds up the gradients of
            replicated parameters by itself).
        num_workers: M, the devices along that axis: one worker each.
        method: of `laqjax.algorithms`, one that needs no other gradients than those it is given.
        blocks: None: one radius for the whole message; "leaf": one for each leaf of the parameters; or the sizes of
            consecutive blocks, which add up to p.
        exchange: "messages", "chunked" or "sums", see `laqjax.exchange`.
        mean: the direction is the mean over the devices; else the sum, as in the papers.
        seed: of the draws of random compressors.
        **settings: arguments of `method`, such as bits, xi, window, limit. Its lr and optimizer are not to be given: the
            lazy rules compare with the direction, whatever makes steps of it (`rules.History`).

    Returns:
        `init(params)`, outside of the `shard_map`: a `LazyState` with rows for all M workers, to be spread by `specs`.
        `update(gradients, state, params)`, inside: pytrees of any floating dtypes; the direction has the same. The
        algorithm's numbers are kept in float32, or float64 where there is a leaf of it.

    Raises:
        ValueError: a number is out of its range, the method needs other gradients, or the axis has another size.

    Example:
        >>> import jax.numpy as jnp, optax, laqjax
        >>> tx = optax.chain(laqjax.lazy_aggregate("data", 4, bits=4), optax.adam(1e-3))
        >>> state = tx.init({"w": jnp.zeros((3, 2))})
        >>> laqjax.lazy.specs(state, "data")[0].laq.workers.memory
        P('data',)
    """
    number("num_workers", num_workers, np.int32, least=1)

    def algorithm(params: Any) -> Algorithm:
        leaves = jax.tree.leaves(params)
        dtype = np.dtype(np.float64 if any(leaf.dtype == np.float64 for leaf in leaves) else np.float32)
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        alg = method(Given(sum(sizes), dtype), lr=1.0, num_workers=num_workers, optimizer=HAND_OVER, **settings)
        if blocks is None:
            return alg
        return dataclasses.replace(alg, compressor=blockwise(alg.compressor, sizes if blocks == "leaf" else blocks))  # pyright: ignore[reportArgumentType]

    def init(params: Any) -> LazyState:
        alg = algorithm(params)
        state = alg.init(params)
        nothing = jnp.zeros((num_workers,), jnp.int32)
        return LazyState(state._replace(params=None), nothing > 0, nothing, jnp.int32(0), jnp.int32(0))

    def update(gradients: Any, state: LazyState, params: Any = None) -> tuple[Any, LazyState]:
        if params is None:
            raise ValueError("lazy_aggregate: update(gradients, state) without params: expected the parameters too")
        if jax.lax.axis_size(axis) != num_workers:
            raise ValueError(
                f"lazy_aggregate of num_workers = {num_workers} on the axis '{axis}' of {jax.lax.axis_size(axis)} devices: "
                "expected one worker a device"
            )
        alg = algorithm(params)
        here, how = alg.oracle.ravel(params), exchanges.named(exchange, alg, axis)
        shards = Shards(alg.oracle.ravel(gradients)[None], here, jnp.ones((1, 1), alg.oracle.dtype))
        after, info = alg.step(
            state.laq._replace(params=here), shards, jax.random.key(seed), workers_at_once=1, exchange=how
        )
        direction = after.optimizer / num_workers if mean else after.optimizer
        received = jnp.where(jnp.any(info.sent), how.received(alg, num_workers), 0).astype(jnp.int32)
        uploads = state.uploads + jnp.sum(info.sent, dtype=jnp.int32)
        rest = after._replace(params=None, optimizer=())
        kept = LazyState(rest, info.sent, info.bytes_up, received, uploads)
        return like(direction, gradients), kept

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def like(vector: Float[Array, " p"], tree: Any) -> Any:
    """A vector as a pytree with the shapes and dtypes of another."""
    leaves, structure = jax.tree.flatten(tree)
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def specs(state: Any, axis: str = WORKERS) -> Any:
    """How an optimizer's state with a `LazyState` in it lies on the mesh: for the specs of `shard_map`, and to place it."""

    def one(node: Any) -> Any:
        if not isinstance(node, LazyState):
            return P()
        whole = jax.tree.map(lambda leaf: P(), node)
        workers = jax.tree.map(lambda leaf: P(axis), node.laq.workers)
        return whole._replace(laq=whole.laq._replace(workers=workers))

    return jax.tree.map(one, state, is_leaf=lambda node: isinstance(node, LazyState))
