"""What travels, what stays, and what the parts of an algorithm promise each other.

An algorithm is a pytree: its numbers are leaves (traced: new values do not recompile, and a sweep is a `vmap` over them),
its structure is metadata (compiled in). Parts own what they remember, as an optax transformation owns its state: `init`
makes it, a round takes it in and gives it back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

__all__ = [
    "AlgorithmState",
    "Collective",
    "Compressor",
    "Downlink",
    "Memory",
    "Oracle",
    "RoundContext",
    "RoundInfo",
    "RoundKeys",
    "Sampler",
    "ServerStep",
    "Shards",
    "UploadContext",
    "UploadRule",
    "WireField",
    "WorkerState",
    "WorkerUpload",
    "register_dataclass",
    "shared_bernoulli",
    "squared_norm",
    "static_field",
]


_T = TypeVar("_T")


def static_field(**kwargs: Any) -> Any:
    """A dataclass field that is structure: compared and hashed by `jax.jit`, never traced."""
    return field(metadata={"static": True}, **kwargs)


def register_dataclass(cls: type[_T]) -> type[_T]:
    """A frozen dataclass as a pytree: fields are children, `static_field` ones are structure, and so is the class itself.

    `jax.tree_util.register_dataclass` forgets the class where it compares structures (seen in JAX 0.10.2): two parts with
    fields of one shape are then equal to `jax.jit`, which runs the program of one for the other when their hashes meet.
    """
    children = [f.name for f in fields(cls) if not f.metadata.get("static")]  # pyright: ignore[reportArgumentType]
    structure = [f.name for f in fields(cls) if f.metadata.get("static")]  # pyright: ignore[reportArgumentType]

    def aux(part: Any) -> tuple[Any, ...]:
        return cls, *(getattr(part, name) for name in structure)

    def flatten(part: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(part, name) for name in children), aux(part)

    def flatten_with_keys(part: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(part, name)) for name in children), aux(part)

    def unflatten(aux: tuple[Any, ...], values: Any) -> Any:
        part = object.__new__(cls)  # not through the constructor: values may be shapes, axes or placeholders here
        for name, value in [*zip(children, values, strict=True), *zip(structure, aux[1:], strict=True)]:
            object.__setattr__(part, name, value)
        return part

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def squared_norm(v: Float[Array, " p"]) -> Float[Array, ""]:
    """||v||^2."""
    return jnp.sum(v * v)


def _count_bits(name: str, size: Any) -> np.ndarray:
    """Return 8 times a number of bytes in int64, on the host.

    Raises:
        TypeError: `size` is traced, and int32 may not hold its bits.
    """
    if isinstance(size, Tracer):
        raise TypeError(
            f"{name} inside a function that JAX traces: only bytes are counted there, since bits may exceed int32; read "
            f"{name.replace('bits', 'bytes')}, or read {name} from what the function returns"
        )
    return 8 * np.asarray(size, np.int64)


# ---- what travels and what stays --------------------------------------------------------------------------------


class Shards(NamedTuple):
    """The data of M workers, padded to N rows each. Padding stands at the end of a shard: minibatches rely on it."""

    x: Any  # any pytree of arrays [M, N, ...] in their storage dtypes (uint8 for images)
    y: Any  # likewise
    weight: Any  # [M, N] >= 0; 0 marks padding, which comes after all rows that count


class RoundKeys(NamedTuple):
    """The draws of one worker in one round: the same on every engine."""

    worker_key: PRNGKeyArray  # fold_in(fold_in(run, round), worker)
    shared_key: PRNGKeyArray  # fold_in(fold_in(run, round), M), the same for all workers
    run_key: PRNGKeyArray
    round: Int[Array, ""]
    worker: Int[Array, ""]  # M for the draws of the server
    shard_index: Any = None  # where its shard lies in the data at hand; None: at its number

    @property
    def shard(self) -> Int[Array, ""]:
        """The row of `Shards` that is this worker's: on a mesh, a device holds some shards only."""
        return self.worker if self.shard_index is None else self.shard_index


def shared_bernoulli(keys: RoundKeys, probability: Float[Array | np.ndarray, ""]) -> Bool[Array, ""]:
    """The coin of the round, the same for all workers; it always falls in round 0."""
    return (keys.round == 0) | (jax.random.uniform(keys.shared_key, (), jnp.float32) < probability)


@dataclass(frozen=True)
class RoundContext:
    """What a worker knows before its gradient; the server, which decides whom to ask, knows the same."""

    params: Float[Array, " p"]
    keys: RoundKeys  # with the numbers of the round and of the worker
    lr: Float[Array, ""]
    num_workers: int
    # (params, full=False, when=True) -> gradient [p] at another model on the same rows, or on the full shard. Computed
    # and counted only where it is called, and only in the rounds in which `when` is true (zeros otherwise)
    gradient_at: Callable[..., Float[Array, " p"]]


@dataclass(frozen=True)
class UploadContext(RoundContext):
    """What an upload rule decides on. Squares are squared Euclidean norms."""

    grad: Float[Array, " p"]
    target: Float[Array, " p"]  # what was compressed
    decoded: Float[Array, " p"]  # what the server would receive
    target_sq: Float[Array, ""]
    innovation_sq: Float[Array, ""]  # of `decoded`
    error_sq: Float[Array, ""]  # of target - decoded


class ServerStep(NamedTuple):
    """What the server did in a round: what a rule's shared history may be made of."""

    before: Float[Array, " p"]  # the model that the workers had
    after: Float[Array, " p"]  # the model that they get
    direction_sq: Float[Array, ""]  # of what the optimizer got
    step_sq: Float[Array, ""]  # of after - before
    round: Int[Array, ""]


class WorkerState(NamedTuple):
    """What a worker keeps; a state stacks M of them."""

    memory: Any  # the memory's own
    rule: Any  # the rule's own


class AlgorithmState(NamedTuple):
    """All that the next round needs. A plain pytree; edit it freely between runs."""

    params: Float[Array, " p"]  # the model that the workers have; `alg.params(state)` is the pytree
    round: Int[Array, ""]
    aggregate: Any  # [p], the server's sum of all memories; None where the memory keeps nothing from round to round
    optimizer: Any  # of optax
    rule: Any  # what the rule shares with all workers: a history, a snapshot
    downlink: Any  # what the server remembers of what it sent down
    workers: WorkerState  # [M, ...]


class WorkerUpload(NamedTuple):
    """What a worker hands to the exchange: `payload` and `decoded` count only where `sent`."""

    payload: Any  # of the compressor
    decoded: Any  # [p], what it stands for
    sent: Bool[Array, ""]
    selected: Bool[Array, ""]  # whether the worker took part in this round
    bytes: Int[Array, ""]  # of the message


class RoundInfo(NamedTuple):
    """Raw facts of a round, or of K rounds, one row a round. Row k belongs to the model *before* step k.

    `loss` is the mean over all M workers of the loss that each worker's oracle computed at that model, on the rows of the
    round: the whole shard, or the sampler's minibatch. Three consequences:

    - Workers that did not take part in the round (partial participation, rules in which the server selects) are included.
    - With local steps and a sampler it is the loss on the rows of the first local step.
    - VR-MARINA reports the loss of the minibatch also in a round whose message is a full gradient.

    Messages are counted in bytes (int32), since the bits of 2^26 float32 numbers exceed int32. `bits_up` and `downlink_bits`
    are 8 times that, in int64 on the host. Inside a program that JAX traces there are only bytes.
    """

    loss: Float[Array | np.ndarray, "*K"]
    sent: Bool[Array | np.ndarray, "*K M"]
    bytes_up: Int[Array | np.ndarray, "*K M"]  # of each worker's message, 0 where nothing was sent
    bytes_down: Int[Array | np.ndarray, "*K"]
    extra: dict[str, Any]  # what `record` named, [*K, ...]

    @property
    def bits_up(self) -> Int[np.ndarray, "*K M"]:
        """Return the bits of each worker's message in int64, 0 where nothing was sent.

        Raises:
            TypeError: it is read inside a traced function; `bytes_up` is there.
        """
        return _count_bits("bits_up", self.bytes_up)

    @property
    def bits_down(self) -> Int[np.ndarray, "*K"]:
        """Return the bits that the server sent in a round, in int64.

        Raises:
            TypeError: it is read inside a traced function; `bytes_down` is there.
        """
        return _count_bits("bits_down", self.bytes_down)


class WireField(NamedTuple):
    """A piece of a message: the entry `name` of `payload`, with `bits` for each number; see `laqjax.compressors`."""

    payload: dict[str, Any]
    name: str
    like: Any  # shape and dtype of the entry
    bits: Any  # 0: not there. Floats of their full width travel as they are, everything else as whole numbers
    mask: Any = None  # a mask: only these


# ---- parts (checkable at run time: the tests check every annotation) -------------------------------------------------


@runtime_checkable
class Oracle(Protocol):
    """Loss and gradient of one worker on the flat vector; see `laqjax.oracles`."""

    @property
    def size(self) -> int:
        """The number of parameters p."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of parameters, gradients and losses."""
        ...

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """The pytree as one vector."""
        ...

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """The vector as the pytree."""
        ...

    def validate(self, shards: Shards) -> None:
        """Raise ValueError where the loss does not fit the data."""
        ...

    def activation_bytes(self, shards: Shards) -> int:
        """Memory that one gradient needs beside parameters and gradient."""
        ...

    def prefers_sequential(self, shards: Shards) -> bool:
        """Whether the points of a sweep run one after another, where that is faster than side by side."""
        ...

    def __call__(self, params: Any, shards: Shards, worker: Any, rows: Any = None) -> tuple[Array, Array]:
        """(loss, gradient [p]) of worker `worker` at `params` [p], on its shard or on `rows` of it."""
        ...


@runtime_checkable
class Collective(Protocol):
    """How the messages of workers that are spread over devices become one sum on each; see `laqjax.sharding`.

    accumulates_locally: messages are added where they were made; else they are stacked for `reduce`.
    """

    @property
    def accumulates_locally(self) -> bool: ...

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        """(number of the first, how many) of the workers whose shards are at hand; num_workers and above are padding."""
        ...

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> Any:
        """What one worker contributes."""
        ...

    def gather_metrics(self, facts: Any, num_workers: int) -> Any:
        """[m, ...] of the workers at hand as [M, ...] of all."""
        ...

    def reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """The sum of the messages of all senders."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """Which rows of a shard a round uses; see `laqjax.oracles`."""

    @property
    def size(self) -> int:
        """Rows a round."""
        ...

    def __call__(self, keys: RoundKeys, shards: Shards) -> Any:
        """The `samplers.RowSelection` of the worker and round of `keys`."""
        ...


@runtime_checkable
class Compressor(Protocol):
    """A scheme; see `laqjax.compressors`."""

    def encode(self, target: Float[Array, " p"], keys: RoundKeys) -> dict[str, Any]:
        """The payload of a message."""
        ...

    def decode(self, payload: dict[str, Any], like: Any) -> Float[Array, " p"]:
        """What the receiver takes it for; `like` has the shape and dtype of the target."""
        ...

    def wire_fields(self, payload: dict[str, Any], like: Any) -> Iterable[WireField]:
        """The fields that travel, in order; see `laqjax.compressors`."""
        ...


@runtime_checkable
class UploadRule(Protocol):
    """When a worker sends; see `laqjax.rules`, whose `UploadRule` has all of this but `should_send`.

    can_skip: an asked worker may stay silent, and its silence means that the server's memory of it still stands.
    server_selects: the server asks some workers only; the others neither get the model nor compute.
    renews_in_silence: a worker that was asked and stays silent may change its state, apart from a count of silent rounds.
    """

    @property
    def can_skip(self) -> bool: ...

    @property
    def server_selects(self) -> bool: ...

    @property
    def renews_in_silence(self) -> bool: ...

    def init(self, params: Float[Array, " p"]) -> tuple[Any, Any]:
        """(what the rule shares with all, what each worker keeps of it) before round 0."""
        ...

    def is_selected(self, shared_state: Any, worker_state: Any, context: RoundContext) -> Bool[Array, ""]:
        """Whether the server asks this worker."""
        ...

    def should_send(
        self, shared_state: Any, worker_state: Any, context: UploadContext
    ) -> tuple[Bool[Array, ""], Any, Any]:
        """(whether a worker that was asked sends, what it keeps if it sends, what it keeps if not)."""
        ...

    def update(self, shared_state: Any, step: ServerStep) -> Any:
        """What is shared after the server's step."""
        ...


@runtime_checkable
class Memory(Protocol):
    """What is compressed, what a worker remembers, and whether the server's aggregate persists; see `laqjax.memories`."""

    @property
    def is_persistent(self) -> bool:
        """Whether the server's aggregate holds what silent workers sent before."""
        ...

    def init(self, params: Float[Array, " p"]) -> Any:
        """What a worker remembers before round 0."""
        ...

    def compression_target(
        self, worker_state: Any, grad: Float[Array, " p"], context: RoundContext
    ) -> tuple[Float[Array, " p"], Any]:
        """(what is compressed, what the worker remembers if it then stays silent)."""
        ...

    def update(self, worker_state: Any, grad: Any, target: Any, decoded: Float[Array, " p"]) -> Any:
        """What the worker remembers if it sends; `worker_state` is what `compression_target` gave."""
        ...

    def update_aggregate(self, aggregate: Any, total: Float[Array, " p"]) -> tuple[Float[Array, " p"], Any]:
        """(direction for the optimizer, aggregate) after the sum `total` of the messages."""
        ...


@runtime_checkable
class Downlink(Protocol):
    """How the model reaches the workers; see `laqjax.memories`."""

    def init(self, params: Float[Array, " p"]) -> Any:
        """What the server remembers of it."""
        ...

    def broadcast(
        self,
        server_state: Any,
        params: Float[Array, " p"],
        direction: Float[Array, " p"],
        optimize: Callable[..., Any],
        keys: RoundKeys,
    ) -> tuple[Float[Array, " p"], Any, Any, Int[Array, ""]]:
        """(the workers' next model, own, optimizer state, bytes sent); `optimize(direction, params) -> (step, optimizer state)`."""
        ...
