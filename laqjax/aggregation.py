"""Lazily aggregated quantized gradients for your own training loop, as an optax transformation inside `jax.shard_map`.

It corresponds to the DDP communication hooks of PyTorch. Each device passes its own gradient and gets the same
direction, computed from the messages that the devices uploaded. The transformation runs `Algorithm.step` with an oracle
that returns the given gradient, and a server that passes the direction on to the next transformation.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from laqjax._core.round import Algorithm, worker_step
from laqjax._core.validation import check_number, suggest
from laqjax._engine import collectives
from laqjax.algorithms import _shared, laq
from laqjax.compressors import blockwise
from laqjax.types import AlgorithmState, OracleResult, RoundKeys, Shards, _count_bits, register_dataclass, static_field

__all__ = ["LazyAggregateState", "lazy_aggregate", "partition_specs"]


class LazyAggregateState(NamedTuple):
    """State of `lazy_aggregate`: the state of the algorithm, and what the last update sent.

    Attributes:
        algorithm_state: state of the algorithm, without params and optimizer. Its workers [M, ...] are spread over the
            axis; all else is the same on every device.
        sent: [M], whether each device sent a message in the last update.
        bytes_up: [M], bytes of each device's message as a server would receive it; 0 without a message.
        bytes_received: bytes that the collective moved to each device; 0 in an update without a message.
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

    def __call__(self, params: Any, shards: Shards, worker: Any, examples: Any = None) -> OracleResult:
        """Return a loss of 0 and the given gradient."""
        return OracleResult(jnp.zeros((), self.dtype), shards.x[worker])


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
    collective: str = "all_gather",
    mean: bool = True,
    seed: int = 0,
    **settings: Any,
) -> optax.GradientTransformation:
    """Create a gradient transformation that replaces `lax.pmean` of gradients over a mesh axis.

    Args:
        axis: mesh axis of the `jax.shard_map(..., check_vma=False)` in which `update` is called. With `check_vma=True`,
            JAX sums the gradients of replicated parameters before `update`. The mesh may have further axes over which
            the compiler splits the parameters (`axis_names={axis}`); messages are then packed in silent rounds too.
        num_workers: number of devices M along that axis, one worker each.
        algorithm: function of `laqjax.algorithms` whose method needs no gradients other than those it is given.
        quantizer_blocks: None: one radius for the whole message. "leaf": one radius for each leaf of the parameters.
            Sequence of sizes: one radius for each of these consecutive blocks, which add up to p.
        collective: "all_gather", "all_to_all" or "all_reduce", see `laqjax.sharding`.
        mean: True: the direction is the mean over the devices. False: the sum, as in the papers.
        seed: seed of random compressors.
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
            the state is not placed by `partition_specs`; or the method may deadlock beside an axis of the compiler.

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

    def build(sizes: list[int], dtype: Any) -> Algorithm:
        server: Any = {"lr": 1.0, "num_workers": num_workers, "optimizer": _PASS_DIRECTION}
        alg = algorithm(_PrecomputedGradient(sum(sizes), dtype), **server, **settings)
        if quantizer_blocks is None:
            return alg
        blocks: Any = sizes if quantizer_blocks == "leaf" else quantizer_blocks
        return dataclasses.replace(alg, compressor=blockwise(alg.compressor, blocks))

    # report wrong settings in this call, not in `init`; p is large, since a method may derive k from p
    build([10**6], np.dtype(np.float32))

    def make_algorithm(params: Any) -> Algorithm:
        leaves = jax.tree.leaves(params)
        dtype = np.dtype(np.float64 if any(leaf.dtype == np.float64 for leaf in leaves) else np.float32)
        return build([math.prod(leaf.shape) for leaf in leaves], dtype)

    def init(params: Any) -> LazyAggregateState:
        alg = make_algorithm(params)
        state = alg.init(params)
        nothing = jnp.zeros((num_workers,), jnp.int32)
        return LazyAggregateState(state._replace(params=None), nothing > 0, nothing, jnp.int32(0), jnp.int32(0))

    def update(gradients: Any, state: LazyAggregateState, params: Any = None) -> tuple[Any, LazyAggregateState]:
        if params is None:
            raise ValueError("lazy_aggregate's update with params = None: must be the parameters")
        _check_axis(axis, num_workers)
        _check_state(state, jax.eval_shape(init, params))
        alg = make_algorithm(params)
        here, how = alg.oracle.ravel(params), collectives.resolve_collective(collective, alg, axis)
        shards = Shards(alg.oracle.ravel(gradients)[None], None, jnp.ones((1, 1), alg.oracle.dtype))
        before, key = state.algorithm_state._replace(params=here), jax.random.key(seed)
        _check_branches(alg, before, shards, key)
        after, info = alg.step(before, shards, key, worker_batch_size=1, collective=how)
        direction = after.optimizer_state / num_workers if mean else after.optimizer_state
        received = jnp.where(jnp.any(info.sent), how.bytes_received(alg, num_workers), 0).astype(jnp.int32)
        uploads = state.total_uploads + jnp.sum(info.sent, dtype=jnp.int32)
        rest = after._replace(params=None, optimizer_state=())
        kept = LazyAggregateState(rest, info.sent, info.bytes_up, received, uploads)
        return _unravel_like(direction, gradients), kept

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


def _unshard(leaf: Any) -> Any:
    """Reshard an array so that no explicit axis of the mesh splits it.

    Automatic axes, which the compiler controls, may still split it.
    """
    sharding = jax.typeof(leaf).sharding
    return jax.sharding.reshard(leaf, NamedSharding(sharding.mesh, P())) if any(sharding.spec) else leaf


def _unravel_like(vector: Float[Array, " p"], tree: Any) -> Any:
    """Convert a vector to a pytree with the shapes and dtypes of another."""
    leaves, structure = jax.tree.flatten(tree)
    parts = jnp.split(vector, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        structure, [part.reshape(leaf.shape).astype(leaf.dtype) for part, leaf in zip(parts, leaves, strict=True)]
    )


def partition_specs(state: Any, axis: str) -> Any:
    """Return the partition specs of an optimizer state that contains a `LazyAggregateState`.

    Args:
        state: state from `tx.init(params)`, or its shapes from `jax.eval_shape`.
        axis: mesh axis that `lazy_aggregate` was given.

    Returns:
        The specs for `in_specs` and `out_specs` of `jax.shard_map`, and for placing a restored state on the mesh. The
        states of the workers are split over the axis; all else is the same on every device.
    """

    def make_specs(node: Any) -> Any:
        if not isinstance(node, LazyAggregateState):
            return P()
        whole = jax.tree.map(lambda leaf: P(), node)
        workers = jax.tree.map(lambda leaf: P(axis), node.algorithm_state.workers)
        return whole._replace(algorithm_state=whole.algorithm_state._replace(workers=workers))

    return jax.tree.map(make_specs, state, is_leaf=lambda node: isinstance(node, LazyAggregateState))


# ---- checks of arguments ------------------------------------------------------------------------------------------


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
    others = [known for known in names if known not in own | {"num_workers"}]
    unknown = [given for given in settings if given not in names]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
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


def _check_axis(axis: Any, num_workers: int) -> None:
    """Raise ValueError unless the caller is in `jax.shard_map(..., check_vma=False)` over this axis of this size."""
    try:
        devices = jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"lazy_aggregate on the axis '{axis}', which is not bound here: must be called inside "
            f"jax.shard_map(..., axis_names={{'{axis}'}}, check_vma=False), on a mesh with this axis"
        ) from None
    if devices != num_workers:
        raise ValueError(
            f"lazy_aggregate of num_workers = {num_workers} on the axis '{axis}' of {devices} devices: must be one "
            "worker for each device"
        )
    kind = jax.typeof(jax.lax.axis_index(axis))
    varying = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # JAX 0.8 | 0.10
    if varying:
        raise ValueError(
            "lazy_aggregate inside jax.shard_map with check_vma=True, its default: must be check_vma=False, since JAX otherwise "
            "sums the gradients of replicated parameters, and every device gets the same gradient"
        )


def _check_state(state: LazyAggregateState, expected: LazyAggregateState) -> None:
    """Raise ValueError unless each device holds the state of one worker, with the shapes that `init` gives."""
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
                f"{list(needed.shape)}: must be the state of init with the same parameters, whole on every device; use "
                "axis_names={axis} of jax.shard_map, and leave the axes that split the parameters to the compiler"
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
