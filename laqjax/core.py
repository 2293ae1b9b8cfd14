"""Algorithm 1 on one page: the types, the memories, the step of ONE worker and the step of the server.

    grad = oracle(params)            target = memory.target(grad)          message = compressor.encode(target)
    sent = trigger(Evidence)         total = sum of decode(message) over the senders       (the engine does the sum)
    direction, aggregate = memory.aggregate(aggregate, total)              params += optimizer(direction)

Source: Sun, Chen, Giannakis, Yang, "Communication-efficient distributed learning via lazily aggregated quantized
gradients", NeurIPS 2019, Algorithm 2 (LAQ). An algorithm is a pytree: its numbers are leaves (traced: new values do not
recompile, and a sweep is a `vmap` over them), its structure is metadata (compiled in).
"""

from collections.abc import Callable
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
    """The data of M workers, padded to N rows each."""

    x: Num[Array | np.ndarray, "M N ..."]  # in its storage dtype (uint8 for images)
    y: Num[Array | np.ndarray, "M N ..."]
    weight: Num[Array | np.ndarray, "M N"]  # 0 marks padding


class Message(NamedTuple):
    """What a worker would send: the compressor's arrays, and their size on the wire in bits (whole bytes)."""

    payload: dict[str, Array]
    bits: Int[Array, ""]


class Broadcast(NamedTuple):
    """What every worker reads in a round."""

    params: Float[Array, " p"]
    motion: Float[Array, " window"]  # ring buffer: ||params^{k+1} - params^k||^2 stands at k mod window
    round: Int[Array, ""]


class Server(NamedTuple):
    """What the server keeps. `aggregate` is None where the memory keeps nothing from round to round."""

    broadcast: Broadcast
    aggregate: Float[Array, " p"] | None
    optimizer: Any


class Worker(NamedTuple):
    """What a worker keeps (the engine stacks M of them). `memory` is None where nothing is remembered."""

    memory: Float[Array, " p"] | None
    last_error_sq: Float[Array, ""]  # squared quantization error at the last upload
    silence: Int[Array, ""]  # rounds since the last upload


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
    """The one record an upload rule decides on. Squares are squared Euclidean norms."""

    target_sq: Float[Array, ""]
    innovation_sq: Float[Array, ""]  # of the decoded message
    error_sq: Float[Array, ""]  # of target - decoded
    last_error_sq: Float[Array, ""]
    motion: Float[Array, " window"]  # squared model steps, newest first
    silence: Int[Array, ""]
    round: Int[Array, ""]
    worker: Int[Array, ""]
    lr: Float[Array, ""]
    num_workers: int = static()


# ---- parts ------------------------------------------------------------------------------------------------------


@runtime_checkable
class Oracle(Protocol):
    """Loss and gradient of one worker on the flat vector; see `laqjax.oracle`."""

    @property
    def size(self) -> int: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __call__(self, params: Any, shards: Shards, worker: Any) -> tuple[Array, Array]: ...


@runtime_checkable
class Compressor(Protocol):
    """A scheme; see `laqjax.compressors`. `key` is the worker's key of this round."""

    def encode(self, target: Float[Array, " p"], key: PRNGKeyArray) -> Message: ...

    def decode(self, message: Message, like: Float[Array, " p"]) -> Float[Array, " p"]: ...


@runtime_checkable
class Trigger(Protocol):
    """An upload rule: a stateless function of the evidence. `skips` is False for the rule that always sends."""

    @property
    def skips(self) -> bool: ...

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]: ...


@runtime_checkable
class Memory(Protocol):
    """What is compressed, what a worker remembers, and whether the server's aggregate persists."""

    @property
    def persists(self) -> bool: ...

    def init(self, params: Float[Array, " p"]) -> Float[Array, " p"] | None: ...

    def target(self, memory: Any, grad: Float[Array, " p"]) -> Float[Array, " p"]: ...

    def update(self, memory: Any, target: Float[Array, " p"], decoded: Float[Array, " p"]) -> Any: ...

    def aggregate(self, aggregate: Any, total: Float[Array, " p"]) -> tuple[Float[Array, " p"], Any]: ...


@register_dataclass
@dataclass(frozen=True)
class Fresh:
    """No memory: the gradient itself is compressed, the server uses this round's messages alone (GD, QSGD)."""

    persists = False

    def init(self, params):
        return None

    def target(self, memory, grad):
        return grad

    def update(self, memory, target, decoded):
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
    persists = True

    @classmethod
    def undamped(cls, oracle: Oracle) -> "Innovation":
        """Memories that follow the gradients fully."""
        return cls(number("damping", 1, oracle.dtype))

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, memory, grad):
        return grad - memory

    def update(self, memory, target, decoded):
        return memory + self.damping * decoded

    def aggregate(self, aggregate, total):
        return aggregate + total, aggregate + self.damping * total


@register_dataclass
@dataclass(frozen=True)
class ErrorFeedback:
    """What compression lost is added to the next gradient (Seide et al. 2014; Karimireddy et al. 2019)."""

    persists = False

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, memory, grad):
        return memory + grad

    def update(self, memory, target, decoded):
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
    num_workers: int = static()
    max_window: int = static()
    optimizer: Callable[[Any], optax.GradientTransformation] = static()


def assemble(
    oracle: Oracle,
    compressor: Compressor,
    trigger: Trigger,
    memory: Memory,
    *,
    lr: float,
    num_workers: int,
    initial_silence: int = 0,
    max_window: int = 1,
    optimizer: Callable[[Any], optax.GradientTransformation] = optax.sgd,
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
        num_workers=int(number("num_workers", num_workers, np.int32, least=1)),
        max_window=int(number("max_window", max_window, np.int32, least=1)),
        optimizer=optimizer,
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
        given = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        given = np.asarray(np.nan)
    valid = given.shape == () and np.isfinite(given) and least <= given <= most and given > above
    if not valid or isinstance(value, bool) or (whole and given != np.floor(given)):
        raise ValueError(f"{name} = {value!r}: expected {expected}")
    return np.asarray(given, dtype)


# ---- Algorithm 1 ------------------------------------------------------------------------------------------------


def init(alg: Algorithm, params: Float[Array, " p"]) -> State:
    """The state before round 0: zero memories, no motion, silence as the algorithm says."""
    memory = alg.memory.init(params)
    worker = Worker(memory, jnp.zeros((), params.dtype), jnp.asarray(alg.initial_silence))
    broadcast = Broadcast(params, jnp.zeros(alg.max_window, params.dtype), jnp.zeros((), jnp.int32))
    aggregate = jnp.zeros_like(params) if alg.memory.persists else None
    workers = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (alg.num_workers, *leaf.shape)), worker)
    return State(Server(broadcast, aggregate, alg.optimizer(alg.lr).init(params)), workers)


def worker_step(
    alg: Algorithm, worker: Worker, broadcast: Broadcast, shards: Shards, index: Int[Array, ""], key: PRNGKeyArray
) -> tuple[Worker, Upload, dict[str, Array]]:
    """One round of worker `index`: gradient, message, decision, memory. Returns also this round's raw facts."""
    loss, grad = alg.oracle(broadcast.params, shards, index)
    target = alg.memory.target(worker.memory, grad)
    message = alg.compressor.encode(target, key)
    decoded = alg.compressor.decode(message, target)
    error_sq = square(target - decoded)
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
        num_workers=alg.num_workers,
    )
    sent = alg.trigger(evidence)
    after = Worker(
        memory=alg.memory.update(worker.memory, target, decoded),
        last_error_sq=error_sq,
        silence=jnp.zeros_like(worker.silence),
    )
    silent = worker._replace(silence=worker.silence + 1)
    worker = jax.tree.map(lambda a, b: jnp.where(sent, a, b), after, silent)
    facts = {"loss": loss, "grad": grad, "target_sq": evidence.target_sq}
    facts |= {"innovation_sq": evidence.innovation_sq, "error_sq": error_sq}
    return worker, Upload(decoded, sent, message.bits), facts


def server_step(alg: Algorithm, server: Server, total: Float[Array, " p"]) -> tuple[Server, dict[str, Array]]:
    """One round of the server: `total` is the sum of the decoded messages that were sent."""
    direction, aggregate = alg.memory.aggregate(server.aggregate, total)
    params, motion, k = server.broadcast
    updates, optimizer = alg.optimizer(alg.lr).update(direction, server.optimizer, params)
    moved: Any = optax.apply_updates(params, updates)
    # the step really taken, so that the rule holds for any optimizer
    step_sq = square(moved - params)
    broadcast = Broadcast(moved, motion.at[k % alg.max_window].set(step_sq), k + 1)
    facts = {"direction_sq": square(direction), "step_sq": step_sq, "params": params}
    return Server(broadcast, aggregate, optimizer), facts


def square(v: Float[Array, " p"]) -> Float[Array, ""]:
    """||v||^2."""
    return jnp.sum(v * v)
