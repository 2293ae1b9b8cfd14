"""Algorithm 1 on one page: the types, the memories, the step of ONE worker and the step of the server.

    grad = oracle(params)            target = memory.target(grad)          message = compressor.encode(target)
    sent = trigger(Evidence)         total = sum of decode(message) over the senders       (the engine does the sum)
    direction, aggregate = memory.aggregate(aggregate, total)              params += optimizer(direction)

Source: Sun, Chen, Giannakis, Yang, "Communication-efficient distributed learning via lazily aggregated quantized
gradients", NeurIPS 2019, Algorithm 2 (LAQ). An algorithm is a pytree: its numbers are leaves (traced: new values do not
recompile, and a sweep is a `vmap` over them), its structure is metadata (compiled in).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray


def static(**kwargs: Any) -> Any:
    """A dataclass field that is structure: compared and hashed by `jax.jit`, never traced."""
    return field(metadata={"static": True}, **kwargs)


# ---- what travels and what stays --------------------------------------------------------------------------------


class Shards(NamedTuple):
    """The data of M workers, padded to N rows each. Padding stands at the end of a shard: minibatches rely on it."""

    x: Num[Array | np.ndarray, "M N ..."]  # in its storage dtype (uint8 for images)
    y: Num[Array | np.ndarray, "M N ..."]
    weight: Num[Array | np.ndarray, "M N"]  # 0 marks padding, which comes after all rows that count


class Keys(NamedTuple):
    """The draws of one worker in one round: the same on every engine."""

    own: PRNGKeyArray  # fold_in(fold_in(run, round), worker)
    shared: PRNGKeyArray  # fold_in(fold_in(run, round), M), the same for all workers
    run: PRNGKeyArray
    round: Int[Array, ""]


class Field(NamedTuple):
    """A piece of a message: the entry `name` of `payload`, with `bits` for each number; see `laqjax.compressors`."""

    payload: dict[str, Any]
    name: str
    like: Any  # shape and dtype of the entry
    bits: Any  # 0: not there. Floats of their full width travel as they are, everything else as whole numbers
    kept: Any = None  # a mask: only these


def bill(fields: Iterable[Field]) -> Int[Array, ""]:
    """Bits of a message on the wire: its fields, rounded up to whole bytes once."""
    total = jnp.int32(0)
    for piece in fields:
        count = piece.like.size if piece.kept is None else jnp.sum(piece.kept, dtype=jnp.int32)
        total += jnp.asarray(count, jnp.int32) * jnp.asarray(piece.bits, jnp.int32)
    return (total + 7) // 8 * 8


class Broadcast(NamedTuple):
    """What every worker reads in a round."""

    params: Float[Array, " p"]
    motion: Float[Array, " window"]  # ring buffer: ||params^{k+1} - params^k||^2 stands at k mod window
    round: Int[Array, ""]
    snapshot: Float[Array, " p"] | None = None  # the model of the last round that is a multiple of the period


class Server(NamedTuple):
    """What the server keeps. `aggregate` is None where the memory keeps nothing from round to round."""

    broadcast: Broadcast
    aggregate: Float[Array, " p"] | None
    optimizer: Any


class Worker(NamedTuple):
    """What a worker keeps (the engine stacks M of them). What the algorithm does not need is None."""

    memory: Any  # [p], what the memory says
    last_error_sq: Float[Array, ""]  # squared quantization error at the last upload
    silence: Int[Array, ""]  # rounds since the last upload
    stale_params: Any = None  # [p], the model of the last upload
    last_grad: Any = None  # [p], of the round before
    last_drift: Any = None  # [p], gradient minus gradient of the snapshot, at the last upload


class State(NamedTuple):
    """All that the next round needs: O(M p + window) numbers. A plain pytree; edit it freely between runs."""

    server: Server
    workers: Worker


class Upload(NamedTuple):
    """What a worker hands to the exchange: `decoded` counts only where `sent`."""

    decoded: Float[Array, " p"]
    sent: Bool[Array, ""]
    bits: Int[Array, ""]


@register_dataclass
@dataclass(frozen=True)
class Evidence:
    """The one record an upload rule decides on. Squares are squared Euclidean norms.

    The optional ones are computed only for rules that name them in `needs`.
    """

    target_sq: Float[Array, ""]
    innovation_sq: Float[Array, ""]  # of the decoded message
    error_sq: Float[Array, ""]  # of target - decoded
    last_error_sq: Float[Array, ""]
    motion: Float[Array, " window"]  # squared model steps, newest first
    silence: Int[Array, ""]
    round: Int[Array, ""]
    worker: Int[Array, ""]
    lr: Float[Array, ""]
    shared: PRNGKeyArray  # for draws that all workers share
    num_workers: int = static()
    stale_sq: Float[Array, ""] | None = None  # gradient - gradient of the last upload's model on the same sample
    drift_sq: Float[Array, ""] | None = None  # model - model of the last upload
    progress_sq: Float[Array, ""] | None = None  # gradient - gradient of the round before
    variance_sq: Float[Array, ""] | None = None  # (gradient - gradient of the snapshot) - the same at the last upload

    def __getitem__(self, name: str) -> Float[Array, ""]:
        """A field that has to be there; ValueError saying what to do when it is not."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(
                f"the rule reads {name}, which this algorithm does not compute: put {name!r} into the rule's `needs`"
            )
        return value


# ---- parts ------------------------------------------------------------------------------------------------------


@runtime_checkable
class Oracle(Protocol):
    """Loss and gradient of one worker on the flat vector; see `laqjax.oracle`."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __call__(self, params: Any, shards: Shards, worker: Any, rows: Any = None) -> tuple[Array, Array]: ...


@runtime_checkable
class Sampler(Protocol):
    """Which rows of a shard a round uses; see `laqjax.oracle`."""

    def __call__(self, keys: Keys, shards: Shards, worker: Any, round: Any) -> Any: ...


@runtime_checkable
class Compressor(Protocol):
    """A scheme; see `laqjax.compressors`."""

    def encode(self, target: Float[Array, " p"], keys: Keys) -> dict[str, Any]: ...

    def decode(self, payload: dict[str, Any], like: Any) -> Float[Array, " p"]: ...

    def wire(self, payload: dict[str, Any], like: Any) -> Iterable[Field]: ...


@runtime_checkable
class Trigger(Protocol):
    """An upload rule: a stateless function of the evidence.

    skips: False for the rule that always sends. asks: the server decides, and sends the model to those it asks only.
    needs: the optional evidence that it reads.
    """

    @property
    def skips(self) -> bool: ...

    @property
    def asks(self) -> bool: ...

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]: ...


@runtime_checkable
class Memory(Protocol):
    """What is compressed, what a worker remembers, and whether the server's aggregate persists."""

    @property
    def persists(self) -> bool: ...

    def init(self, params: Float[Array, " p"]) -> Any: ...

    def target(self, memory: Any, grad: Float[Array, " p"], keys: Keys) -> Float[Array, " p"]: ...

    def update(self, memory: Any, target: Any, decoded: Float[Array, " p"], grad: Float[Array, " p"]) -> Any: ...

    def aggregate(self, aggregate: Any, total: Float[Array, " p"]) -> tuple[Float[Array, " p"], Any]: ...


@register_dataclass
@dataclass(frozen=True)
class Fresh:
    """No memory: the gradient itself is compressed, the server uses this round's messages alone (GD, QSGD)."""

    persists = False

    def init(self, params):
        return None

    def target(self, memory, grad, keys):
        return grad

    def update(self, memory, target, decoded, grad):
        return None

    def aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class Innovation:
    """The change since the last upload is compressed; worker and server add it to equal memories (LAG, LAQ, EF21).

    `damping` < 1 moves the memories by that part only, while the direction takes the whole change (DIANA).
    """

    damping: Float[Array, ""]
    exact: bool = static(
        default=False
    )  # a coordinate that lost nothing is remembered as the gradient, not as memory + change
    persists = True

    @classmethod
    def undamped(cls, oracle: Oracle, exact: bool = False) -> "Innovation":
        """Memories that follow the gradients fully."""
        return cls(number("damping", 1, oracle.dtype), exact)

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, memory, grad, keys):
        return grad - memory

    def update(self, memory, target, decoded, grad):
        moved = memory + self.damping * decoded
        return jnp.where(decoded == target, grad, moved) if self.exact else moved

    def aggregate(self, aggregate, total):
        return aggregate + total, aggregate + self.damping * total


@register_dataclass
@dataclass(frozen=True)
class Estimate:
    """An estimate of the gradient that moves by compressed differences (MARINA, Gorbunov et al. 2021, Algorithm 1).

    target = grad - last grad, or grad - estimate in the rounds in which the shared coin sends everything, round 0 being
    one of them. A worker remembers (estimate, last grad).
    """

    probability: Float[Array, ""]
    persists = True

    def init(self, params):
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def target(self, memory, grad, keys):
        estimate, last = memory
        return grad - jnp.where(toss(keys, self.probability), estimate, last)

    def update(self, memory, target, decoded, grad):
        return memory[0] + decoded, grad

    def aggregate(self, aggregate, total):
        return aggregate + total, aggregate + total


@register_dataclass
@dataclass(frozen=True)
class ErrorFeedback:
    """What compression lost is added to the next gradient (Seide et al. 2014; Karimireddy et al. 2019)."""

    persists = False

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, memory, grad, keys):
        return memory + grad

    def update(self, memory, target, decoded, grad):
        return target - decoded

    def aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class Algorithm:
    """compressor x trigger x memory x server optimizer. Build it with a function of `laqjax.algorithms`."""

    oracle: Oracle
    compressor: Compressor
    trigger: Trigger
    memory: Memory
    lr: Float[Array, ""]
    initial_silence: Int[Array, ""]
    period: Int[Array, ""]  # rounds from one snapshot of the model to the next, where a rule needs one
    num_workers: int = static()
    max_window: int = static()
    optimizer: Callable[[Any], optax.GradientTransformation] = static()
    sampler: Sampler | None = None  # None: the whole shard
    downlink: Compressor | None = None  # of the model's step; None: the model is sent as it is


def assemble(
    oracle: Oracle,
    compressor: Compressor,
    trigger: Trigger,
    memory: Memory,
    *,
    lr: float,
    num_workers: int,
    initial_silence: int = 0,
    period: int = 1,
    max_window: int = 1,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd,
    sampler: Sampler | None = None,
    downlink: Compressor | None = None,
) -> Algorithm:
    """Put parts together; raises ValueError for numbers and combinations that cannot work."""
    if trigger.skips and not memory.persists:
        raise ValueError(
            f"trigger {type(trigger).__name__} lets workers stay silent, but memory {type(memory).__name__} does not "
            "persist: a silent worker's gradient would be dropped; use an Innovation memory or a trigger that always sends"
        )
    return Algorithm(
        oracle=oracle,
        compressor=compressor,
        trigger=trigger,
        memory=memory,
        lr=number("lr", lr, oracle.dtype, above=0.0),
        initial_silence=number("initial_silence", initial_silence, np.int32, least=0),
        period=number("period", period, np.int32, least=1),
        num_workers=int(number("num_workers", num_workers, np.int32, least=1)),
        max_window=int(number("max_window", max_window, np.int32, least=1)),
        optimizer=optimizer,
        sampler=sampler,
        downlink=downlink,
    )


def number(
    name: str, value: Any, dtype: Any, *, least: float = -np.inf, above: float = -np.inf, most: float = np.inf
) -> Any:
    """`value` as a NumPy scalar array of `dtype`, so that Python, NumPy and JAX numbers trace alike.

    Raises ValueError naming the argument, the value and what was expected.
    """
    whole = np.issubdtype(dtype, np.integer)
    bounds = (
        [f">= {least:g}"] * (least > -np.inf)
        + [f"> {above:g}"] * (above > -np.inf)
        + [f"<= {most:g}"] * (most < np.inf)
    )
    expected = " and ".join([f"one {'whole' if whole else 'finite'} number", *bounds])
    try:
        given = np.asarray(np.nan if isinstance(value, str | bytes) else value, np.float64)
    except (TypeError, ValueError):
        given = np.asarray(np.nan)
    valid = given.shape == () and np.isfinite(given) and least <= given <= most and given > above
    if not valid or isinstance(value, bool | np.bool_) or (whole and given != np.floor(given)):
        raise ValueError(f"{name} = {value!r}: expected {expected}")
    return np.asarray(given, dtype)


# ---- Algorithm 1 ------------------------------------------------------------------------------------------------


def init(alg: Algorithm, params: Float[Array, " p"]) -> State:
    """The state before round 0: zero memories, no motion, silence as the algorithm says."""
    needs, zeros = alg.trigger.needs, jnp.zeros_like(params)
    worker = Worker(
        memory=alg.memory.init(params),
        last_error_sq=jnp.zeros((), params.dtype),
        silence=jnp.asarray(alg.initial_silence),
        stale_params=params if needs & {"stale_sq", "drift_sq"} else None,
        last_grad=zeros if "progress_sq" in needs else None,
        last_drift=zeros if "variance_sq" in needs else None,
    )
    motion, round = jnp.zeros(alg.max_window, params.dtype), jnp.zeros((), jnp.int32)
    broadcast = Broadcast(params, motion, round, params if "variance_sq" in needs else None)
    aggregate = zeros if alg.memory.persists else None
    workers = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (alg.num_workers, *leaf.shape)), worker)
    return State(Server(broadcast, aggregate, alg.optimizer(alg.lr).init(params)), workers)


def worker_step(
    alg: Algorithm, worker: Worker, broadcast: Broadcast, shards: Shards, index: Int[Array, ""], keys: Keys
) -> tuple[Worker, Upload, dict[str, Array]]:
    """One round of worker `index`: gradient, message, decision, memory. Returns also this round's raw facts."""
    needs, params = alg.trigger.needs, broadcast.params
    rows = alg.sampler(keys, shards, index, broadcast.round) if alg.sampler else None
    loss, grad = alg.oracle(params, shards, index, rows)
    target = alg.memory.target(worker.memory, grad, keys)
    payload = alg.compressor.encode(target, keys)
    decoded = alg.compressor.decode(payload, target)
    error_sq = square(target - decoded)
    optional, drift = {}, None
    if "stale_sq" in needs:
        optional["stale_sq"] = square(grad - alg.oracle(worker.stale_params, shards, index, rows)[1])
    if "drift_sq" in needs:
        optional["drift_sq"] = square(params - worker.stale_params)
    if "progress_sq" in needs:
        optional["progress_sq"] = square(grad - worker.last_grad)
    if "variance_sq" in needs:
        drift = grad - alg.oracle(broadcast.snapshot, shards, index, rows)[1]
        optional["variance_sq"] = square(drift - worker.last_drift)
    evidence = Evidence(
        target_sq=square(target),
        innovation_sq=square(decoded),
        error_sq=error_sq,
        last_error_sq=worker.last_error_sq,
        motion=broadcast.motion[(broadcast.round - 1 - jnp.arange(alg.max_window, dtype=jnp.int32)) % alg.max_window],
        silence=worker.silence,
        round=broadcast.round,
        worker=index,
        lr=alg.lr,
        shared=keys.shared,
        num_workers=alg.num_workers,
        **optional,
    )
    sent = alg.trigger(evidence)
    after = Worker(
        memory=alg.memory.update(worker.memory, target, decoded, grad),
        last_error_sq=error_sq,
        silence=jnp.zeros_like(worker.silence),
        stale_params=None if worker.stale_params is None else params,
        last_grad=worker.last_grad,
        last_drift=drift,
    )
    silent = worker._replace(silence=worker.silence + 1)
    worker = jax.tree.map(lambda a, b: jnp.where(sent, a, b), after, silent)
    worker = worker._replace(last_grad=None if worker.last_grad is None else grad)
    computed = 1 + len(needs & {"stale_sq", "variance_sq"})
    facts = {name: getattr(evidence, name) for name in ("target_sq", "innovation_sq", "error_sq", *optional)}
    # a worker that the server does not ask computes nothing
    facts |= {"loss": loss, "grad": grad, "gradients": jnp.where(sent, computed, 0 if alg.trigger.asks else computed)}
    return worker, Upload(decoded, sent, bill(alg.compressor.wire(payload, target))), facts


def server_step(
    alg: Algorithm, server: Server, total: Float[Array, " p"], uploads: Int[Array, ""], keys: Keys
) -> tuple[Server, Int[Array, ""], dict[str, Array]]:
    """One round of the server: `total` is the sum of the `uploads` messages sent. Returns also the bits sent down."""
    direction, aggregate = alg.memory.aggregate(server.aggregate, total)
    params, motion, k, snapshot = server.broadcast
    updates: Any
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int
        updates, optimizer = alg.optimizer(alg.lr).update(direction, server.optimizer, params)
    down = jnp.int32(8 * params.dtype.itemsize * params.size)
    if alg.downlink:
        payload = alg.downlink.encode(updates, keys)
        updates, down = alg.downlink.decode(payload, updates), bill(alg.downlink.wire(payload, updates))
    moved: Any = optax.apply_updates(params, updates)
    # the step really taken, so that the rule holds for any optimizer
    step_sq = square(moved - params)
    if snapshot is not None:
        snapshot = jnp.where((k + 1) % alg.period == 0, moved, snapshot)
    broadcast = Broadcast(moved, motion.at[k % alg.max_window].set(step_sq), k + 1, snapshot)
    facts = {"direction_sq": square(direction), "step_sq": step_sq, "params": params}
    # one broadcast to all, or a message to each worker that was asked
    return Server(broadcast, aggregate, optimizer), down * (uploads if alg.trigger.asks else 1), facts


def square(v: Float[Array, " p"]) -> Float[Array, ""]:
    """||v||^2."""
    return jnp.sum(v * v)


def toss(keys: Keys, probability: Float[Array | np.ndarray, ""]) -> Bool[Array, ""]:
    """The coin of the round, the same for all workers; it always falls in round 0."""
    return (keys.round == 0) | (jax.random.uniform(keys.shared, (), jnp.float32) < probability)
