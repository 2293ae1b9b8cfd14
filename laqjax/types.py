"""States, messages and protocols: the interfaces between the parts of an algorithm.

An algorithm consists of an oracle (loss and gradient), a memory, a compressor, an upload rule and a server optimizer
from optax. A sampler (minibatches) and a downlink (a compressed model broadcast) are optional. `laqjax.assemble` joins
the parts. One round calls them in the order below; `laqjax._core.round` is the implementation.

Each worker:

1. `sampler(keys, shards)` selects the examples of the minibatch. Without a sampler the whole shard is used.
2. `rule.is_selected(...)` decides whether the worker participates in the round.
3. `oracle(params, shards, shard, examples)` computes the loss and the gradient [p]. An oracle with a state for each
   worker has `evaluate` instead (`StatefulOracle`).
4. `memory.compression_target(...)` turns the gradient into the vector [p] that is compressed.
5. `compressor.encode(...)` builds the message; `compressor.decode(...)` is the vector [p] that the server will read
   from it.
6. `rule.should_send(...)` decides whether a selected worker sends its message.
7. `memory.update(...)` computes the new memory of a worker that sends.
8. `compressor.wire_fields(...)` lists the fields of the message, from which its bytes are counted.

The collective then adds up the messages that were sent, and the server continues:

9. `memory.update_aggregate(...)` turns their sum [p] into the direction [p] for the optimizer.
10. `downlink.broadcast(...)` calls the server optimizer and returns the next model [p] of the workers, with the message
    that brings it to them.
11. `rule.update(...)` updates the state that the rule shares with all workers.

The methods of a part are written for one worker, and `Algorithm.step` adds the worker axis. They must be pure functions
that JAX can trace. `Algorithm.step` evaluates steps 1 to 8 for every worker. It then masks the results of workers that
are not selected and of workers that do not send.

An algorithm is a pytree. Its numbers are leaves: they are traced, so new values do not recompile, and a sweep is a
`vmap` over them. Its structure is static metadata and part of the compiled program. Each part owns its state, as an
optax transformation does: `init` creates the state, and each round takes it and returns the new one.

Shapes: p parameters, M workers, m workers on the current device, N examples of a shard, K rounds.

Example:
    A new compressor, a new rule with a state and a new memory, assembled to an algorithm. docs/own.md shows the same
    example on MNIST.

    >>> from dataclasses import dataclass
    >>> import jax, jax.numpy as jnp, numpy as np
    >>> import laqjax
    >>> from laqjax import rules, types
    >>> @types.register_dataclass
    ... @dataclass(frozen=True)
    ... class Half:  # compressor: float16 values, 16 p bits
    ...     is_coordinatewise = True  # each coordinate has a code of its own
    ...     has_static_layout = True  # the widths of a message are known before it is encoded
    ...
    ...     def encode(self, target, keys):
    ...         return {"values": target.astype(jnp.float16)}
    ...
    ...     def decode(self, payload, like):
    ...         return payload["values"].astype(like.dtype)
    ...
    ...     def wire_fields(self, payload, like):
    ...         yield types.WireField(payload, "values", jax.ShapeDtypeStruct(like.shape, np.float16), 16)
    ...
    >>> @types.register_dataclass
    ... @dataclass(frozen=True)
    ... class Larger(rules.BaseUploadRule):  # rule: send if the change exceeds a share of the last change that was sent
    ...     share: jax.Array
    ...
    ...     def init(self, params):
    ...         return None, jnp.zeros((), params.dtype)  # no shared state; each worker keeps ||last change sent||^2
    ...
    ...     def should_send(self, shared_state, worker_state, context):
    ...         send = context.decoded_sq > self.share * worker_state
    ...         return types.Decision(send, if_sent=context.decoded_sq, if_silent=worker_state)
    ...
    >>> @types.register_dataclass
    ... @dataclass(frozen=True)
    ... class Difference:  # memory: compress g - h, where the server has h as well
    ...     is_persistent = True  # the server keeps the sum of all h, so a worker may stay silent
    ...
    ...     def init(self, params):
    ...         return jnp.zeros_like(params)  # h of one worker
    ...
    ...     def compression_target(self, memory_state, grad, context):
    ...         return grad - memory_state, memory_state  # the vector to compress, and h if the worker stays silent
    ...
    ...     def update(self, memory_state, grad, target, decoded):
    ...         return memory_state + decoded  # h if the worker sends
    ...
    ...     def update_aggregate(self, aggregate, total):
    ...         return aggregate + total, aggregate + total  # the direction of the optimizer, and the sum of all h
    ...
    >>> def lazy_half(oracle, share, **server):
    ...     return laqjax.assemble(oracle, Half(), Larger(np.float32(share)), Difference(), **server)
    ...
    >>> oracle = laqjax.oracles.from_loss(lambda w, x, y: (x @ w - y) ** 2 / 2, jnp.zeros(3))
    >>> ones = np.ones((2, 4), np.float32)
    >>> shards = laqjax.Shards(np.ones((2, 4, 3), np.float32), ones, ones)
    >>> alg = lazy_half(oracle, 0.5, lr=0.1, num_workers=2)
    >>> out = laqjax.run(alg, jnp.zeros(3), shards, rounds=3, key=jax.random.key(0))
    >>> out.info.bits_up
    array([[48, 48],
           [ 0,  0],
           [48, 48]])
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from laqjax._core.norms import max_abs, squared_norm

__all__ = [
    "AlgorithmState",
    "Broadcast",
    "Collective",
    "Compressor",
    "CompressorTraits",
    "Decision",
    "Downlink",
    "DownlinkTraits",
    "Memory",
    "Oracle",
    "OracleHints",
    "OracleResult",
    "RoundContext",
    "RoundInfo",
    "RoundKeys",
    "Sampler",
    "ServerResult",
    "ServerStep",
    "Shards",
    "StatefulOracle",
    "UploadContext",
    "UploadRule",
    "WireField",
    "WorkerState",
    "WorkerUpload",
    "max_abs",
    "register_dataclass",
    "shared_bernoulli",
    "squared_norm",
    "static_field",
]


_T = TypeVar("_T")


def static_field(**kwargs: Any) -> Any:
    """Declare a dataclass field that is structure: `jax.jit` compares and hashes it and never traces it.

    Args:
        **kwargs: arguments of `dataclasses.field`, such as `default`.

    Returns:
        The field, for the body of a dataclass that `register_dataclass` registers.
    """
    return field(metadata={"static": True}, **kwargs)


def register_dataclass(cls: type[_T]) -> type[_T]:
    """Register a frozen dataclass as a pytree. Use it as a decorator above `@dataclass(frozen=True)`.

    Fields become children (traced numbers or nested parts). Fields declared with `static_field` become structure, and
    so does the class itself. A declaration such as `is_persistent = True` has no annotation, else it were a field.

    `jax.tree_util.register_dataclass` ignores the class when it compares structures (seen in JAX 0.10.2). Two parts
    whose fields have the same shapes then compare equal in `jax.jit`. When their hashes collide too, it runs the
    program of the wrong part.

    Args:
        cls: the dataclass. JAX rebuilds its instances with tracers, shapes or axes in place of numbers. It does so
            without calling the constructor.

    Returns:
        `cls` itself.
    """
    children = [f.name for f in fields(cls) if not f.metadata.get("static")]  # pyright: ignore[reportArgumentType]
    structure = [f.name for f in fields(cls) if f.metadata.get("static")]  # pyright: ignore[reportArgumentType]

    def getter(*names: str) -> Callable[[Any], tuple[Any, ...]]:  # in C where it can: every call of jax.jit flattens
        return attrgetter(*names) if len(names) > 1 else lambda part: tuple(getattr(part, name) for name in names)

    get_children, aux = getter(*children), getter("__class__", *structure)

    def flatten(part: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return get_children(part), aux(part)

    def flatten_with_keys(part: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple((jax.tree_util.GetAttrKey(name), getattr(part, name)) for name in children), aux(part)

    def unflatten(aux: tuple[Any, ...], values: Any) -> Any:
        part = object.__new__(cls)  # skips the constructor, because values may be shapes, axes or placeholders here
        for name, value in [*zip(children, values, strict=True), *zip(structure, aux[1:], strict=True)]:
            object.__setattr__(part, name, value)
        return part

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _count_bits(name: str, size: Any) -> np.ndarray:
    """Convert a number of bytes to bits in int64, on the host.

    Args:
        name: name of the property, for the error message.
        size: number of bytes, a scalar or an array.

    Raises:
        TypeError: `size` is traced, and its bits may exceed int32.
    """
    if isinstance(size, Tracer):
        raise TypeError(
            f"{name} inside a function that JAX traces: only bytes are counted there, since bits may exceed int32; read "
            f"{name.replace('bits', 'bytes')}, or read {name} from what the function returns"
        )
    return 8 * np.asarray(size, np.int64)


# ---- states and messages ----------------------------------------------------------------------------------------


class Shards(NamedTuple):
    """Data of M workers, padded to N examples each.

    Padding comes at the end of a shard. Minibatches rely on it.

    Attributes:
        x: inputs, any pytree of arrays [M, N, ...] in their storage dtypes (uint8 for images).
        y: targets, any pytree of arrays [M, N, ...] in their storage dtypes.
        weight: weight of each example, [M, N] and >= 0. A weight of 0 marks padding, which comes after all examples.
    """

    x: Any
    y: Any
    weight: Any


class RoundKeys(NamedTuple):
    """PRNG keys and position of one worker in one round, the same on every engine.

    Compressors draw from `worker_key`, and `shared_bernoulli` from `shared_key`, as they are. Any other part folds a
    constant of its own into a key first (`jax.random.fold_in`), so that its draws are independent of theirs.

    Attributes:
        worker_key: key of this worker and round, `fold_in(fold_in(run_key, round), worker)`. For the server:
            `shared_key`.
        shared_key: key of this round, the same for all workers, `fold_in(fold_in(run_key, round), M)`.
        run_key: key of the whole run.
        round: round of the random draws, counted from 0: the number of the round, or 0 where a worker of a federation
            that lost its state starts anew.
        worker: number of the worker, 0 to M - 1. M for the server.
        shard_index: index of this worker's shard in the arrays of `Shards` on this device. None: it equals `worker`.
    """

    worker_key: PRNGKeyArray
    shared_key: PRNGKeyArray
    run_key: PRNGKeyArray
    round: Int[Array, ""]
    worker: Int[Array, ""]
    shard_index: Any = None

    @property
    def shard(self) -> Int[Array, ""]:
        """Return the index of this worker's shard in `Shards`. On a mesh, a device holds only some of the shards."""
        return self.worker if self.shard_index is None else self.shard_index


def shared_bernoulli(keys: RoundKeys, probability: Float[Array | np.ndarray, ""]) -> Bool[Array, ""]:
    """Sample the Bernoulli variable that all workers share in this round; always True in round 0.

    Args:
        keys: keys of a worker or of the server; only `shared_key` and `round` are used.
        probability: probability of True, in [0, 1].

    Returns:
        The variable, a scalar bool.
    """
    return (keys.round == 0) | (jax.random.uniform(keys.shared_key, (), jnp.float32) < probability)


@dataclass(frozen=True)
class RoundContext:
    """Information that is available before a worker computes its gradient.

    A server that selects workers has the same information. In a federation, its `gradient_at` returns zeros, and its
    `memory_state` is None.

    Attributes:
        params: model of the workers in this round, [p].
        keys: PRNG keys, round number and worker number.
        lr: learning rate of the server in this round, a scalar.
        num_workers: M.
        gradient_at: function `(params, full=False, when=True) -> gradient [p]`. It computes this worker's gradient at
            another model, on the examples of the round, or on the whole shard if `full`. It costs and counts one
            gradient for each call, only in rounds in which the scalar bool `when` is true. In the other rounds it
            returns zeros.
        round: number of the round. `keys.round` is the round of the random draws: 0 where a worker of a federation that
            lost its state starts anew.
        memory_state: memory of this worker before the round.
        aggregate: aggregate of the server before the round, [p]. None if the memory is not persistent. A worker of a
            federation has it only if the oracle declares `OracleHints.reads_aggregate`.
    """

    params: Float[Array, " p"]
    keys: RoundKeys
    lr: Float[Array, ""]
    num_workers: int
    gradient_at: Callable[..., Float[Array, " p"]]
    round: Int[Array, ""] = field(kw_only=True)
    memory_state: Any = field(default=None, kw_only=True)
    aggregate: Any = field(default=None, kw_only=True)

    def squared_norm(self, v: Float[Array, " p"]) -> Float[Array, ""]:
        """Return the squared Euclidean norm of a vector [p].

        Use it instead of a sum of your own: where mesh axes split the parameters, `v` is the part on this device, and
        the norm includes the other parts. `laqjax.types.squared_norm` is the same without a context.
        """
        return squared_norm(v)

    def max_abs(self, v: Float[Array, " p"]) -> Float[Array, ""]:
        """Return the largest absolute value of a vector [p], as `squared_norm` does for the norm."""
        return max_abs(v)


@dataclass(frozen=True)
class UploadContext(RoundContext):
    """Information from which an upload rule decides whether a worker sends: a `RoundContext` plus the message.

    Attributes:
        grad: gradient of the worker at `params`, [p].
        target: vector that was compressed, [p].
        decoded: vector that the server would read from the message, [p].
        target_sq: squared Euclidean norm of `target`, a scalar.
        decoded_sq: squared Euclidean norm of `decoded`, a scalar. With LAQ it is that of the quantized innovation.
        error_sq: squared Euclidean norm of the compression error `target - decoded`, a scalar.
    """

    grad: Float[Array, " p"]
    target: Float[Array, " p"]
    decoded: Float[Array, " p"]
    target_sq: Float[Array, ""]
    decoded_sq: Float[Array, ""]
    error_sq: Float[Array, ""]


class OracleResult(NamedTuple):
    """Loss and gradient of one worker: the result of an oracle.

    Attributes:
        loss: loss at the model that was given, a scalar.
        grad: gradient, [p].
        state: next state of the oracle for this worker, of a `StatefulOracle`; None of other oracles.
    """

    loss: Float[Array, ""]
    grad: Float[Array, " p"]
    state: Any = None


class Decision(NamedTuple):
    """Decision of an upload rule for one worker in one round: the result of `UploadRule.should_send`.

    Attributes:
        send: whether the worker sends its message, a scalar bool.
        if_sent: next rule state of the worker if it sends, a pytree or None.
        if_silent: next rule state of the worker if it stays silent or is not selected, with the same structure.
    """

    send: Bool[Array, ""]
    if_sent: Any
    if_silent: Any


class ServerStep(NamedTuple):
    """Step of the server in one round, from which a rule updates the state that it shares with all workers.

    Attributes:
        before: model of the workers in this round, [p].
        after: model of the workers in the next round, [p].
        direction_sq: squared Euclidean norm of the direction that the memory gave to the downlink, a scalar.
        step_sq: squared Euclidean norm of `after - before`, a scalar.
        round: number of the round.
    """

    before: Float[Array, " p"]
    after: Float[Array, " p"]
    direction_sq: Float[Array, ""]
    step_sq: Float[Array, ""]
    round: Int[Array, ""]


class WorkerState(NamedTuple):
    """State of one worker. `AlgorithmState.workers` stacks M of them along a leading axis.

    Attributes:
        memory_state: pytree of the memory, created by `Memory.init`.
        rule_state: pytree of the upload rule, created by `UploadRule.init` (the second result).
        oracle_state: pytree of the oracle, created by `StatefulOracle.init_state`. None for other oracles.
    """

    memory_state: Any
    rule_state: Any
    oracle_state: Any = None


class AlgorithmState(NamedTuple):
    """State of an algorithm between two rounds: everything that the next round needs.

    It is a plain pytree and may be edited between runs.

    Attributes:
        params: model of the workers as a flat vector, [p]; `alg.params(state)` returns it as a pytree.
        round: number of the next round.
        aggregate: sum over the workers of the vectors that the server holds for them, [p]. None if the memory is not
            persistent.
        optimizer_state: state of the optax transformation of the server.
        rule_state: state that the upload rule shares with all workers, such as a history or a snapshot of the model.
        downlink_state: state of the downlink on the server.
        workers: states of the workers; every leaf is [M, ...]. On a mesh, padding workers follow the M-th.
    """

    params: Float[Array, " p"]
    round: Int[Array, ""]
    aggregate: Any
    optimizer_state: Any
    rule_state: Any
    downlink_state: Any
    workers: WorkerState


class WorkerUpload(NamedTuple):
    """Message of one worker in one round, as it is passed to the collective.

    Attributes:
        payload: result of `Compressor.encode`. It has no effect unless `sent`.
        decoded: vector that the payload decodes to, [p]. It has no effect unless `sent`.
        sent: whether the worker sends the message.
        selected: whether the worker participates in this round.
        bytes: size of the message in bytes, int32. It is computed also where the message is not sent.
    """

    payload: Any
    decoded: Any
    sent: Bool[Array, ""]
    selected: Bool[Array, ""]
    bytes: Int[Array, ""]


class Broadcast(NamedTuple):
    """Message of the server to the workers in one round, and its effects: the result of `Downlink.broadcast`.

    Attributes:
        params: next model of the workers, [p].
        downlink_state: next state of the downlink, a pytree or None.
        optimizer_state: next state of the optax transformation of the server.
        payload: result of `Compressor.encode` for the message. None if the full model is sent.
        bytes: size of the message to one worker in bytes, an int32 scalar.
    """

    params: Float[Array, " p"]
    downlink_state: Any
    optimizer_state: Any
    payload: Any
    bytes: Int[Array, ""]


class ServerResult(NamedTuple):
    """Result of `laqjax.server_step`.

    Attributes:
        state: state after the round, with `workers` unchanged.
        bytes_down: bytes that the server sends in this round, an int32 scalar.
        payload: payload of the broadcast, see `Broadcast`.
        metrics: metrics of the server by name: "direction_sq", "step_sq" (scalars) and "params" [p], the model before
            the step.
    """

    state: AlgorithmState
    bytes_down: Int[Array, ""]
    payload: Any
    metrics: dict[str, Array]


class RoundInfo(NamedTuple):
    """Metrics of one round, or of K rounds with one row per round. Row k belongs to the model *before* step k.

    `loss` is the mean over all M workers of the loss that each worker's oracle computed at that model. It is evaluated
    on the examples of the round: the whole shard, or the minibatch of the sampler. This has three consequences:

    - Workers that did not participate in the round (partial participation, rules in which the server selects) are
      included.
    - With local steps and a sampler it is the loss on the examples of the first local step.
    - VR-MARINA reports the loss of the minibatch also in a round whose message is a full gradient.

    Messages are counted in bytes (int32), since the bits of 2^26 float32 numbers exceed int32. `bits_up` and
    `bits_down` are 8 times as large, in int64, and exist on the host only. Inside a function that JAX traces, read the
    bytes.

    Attributes:
        loss: mean loss, [K] (a scalar for one round).
        sent: whether each worker sent a message, [K, M].
        bytes_up: bytes of the message of each worker, [K, M]; 0 where nothing was sent.
        bytes_down: bytes that the server sent, [K].
        extra: further metrics by name, each [K, ...]: those named in the argument `metrics` of `run` or
            `Algorithm.step`.
    """

    loss: Float[Array | np.ndarray, "*K"]
    sent: Bool[Array | np.ndarray, "*K M"]
    bytes_up: Int[Array | np.ndarray, "*K M"]
    bytes_down: Int[Array | np.ndarray, "*K"]
    extra: dict[str, Any]

    @property
    def bits_up(self) -> Int[np.ndarray, "*K M"]:
        """Return the bits of the message of each worker in int64, [K, M]; 0 where nothing was sent.

        Raises:
            TypeError: it is read inside a function that JAX traces. Read `bytes_up` there.
        """
        return _count_bits("bits_up", self.bytes_up)

    @property
    def bits_down(self) -> Int[np.ndarray, "*K"]:
        """Return the bits that the server sent in each round, in int64, [K].

        Raises:
            TypeError: it is read inside a function that JAX traces. Read `bytes_down` there.
        """
        return _count_bits("bits_down", self.bytes_down)


class WireField(NamedTuple):
    """Field of a message: one entry of its payload, and how many bits each of its numbers takes.

    Both directions use it. A writer reads `payload[name]`; a reader stores what it received there.

    Attributes:
        payload: the payload that was given to `Compressor.wire_fields`.
        name: key of the entry in `payload`.
        like: shape and dtype of the entry, a `jax.ShapeDtypeStruct` or an array.
        bits: bits of each number, a scalar, which may be traced. 0 means that the field is absent. Floats of full width
            are sent as they are. All other numbers are sent as whole numbers >= 0 of this width.
        mask: bool array that marks the numbers that are sent, one flag per number. None: all of them.
    """

    payload: dict[str, Any]
    name: str
    like: Any
    bits: Any
    mask: Any = None


# ---- protocols of the parts (checkable at run time: the tests check every annotation) --------------------------------


@runtime_checkable
class Oracle(Protocol):
    """Loss and gradient of one worker, as functions of the model as a flat vector [p].

    `laqjax.oracles.from_loss` builds an oracle from a loss per example. An oracle may also define members of
    `OracleHints`.
    """

    @property
    def size(self) -> int:
        """Return the number of parameters p."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of parameters, gradients and losses."""
        ...

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """Convert a model from a pytree to a flat vector [p].

        Args:
            params: the pytree, or a vector [p], which is returned as it is.
        """
        ...

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """Convert a model from a flat vector [p] to a pytree. It is the inverse of `ravel`."""
        ...

    def validate(self, shards: Shards) -> None:
        """Check that the loss accepts the data. It is called before anything is compiled.

        Args:
            shards: data of all workers.

        Raises:
            ValueError: the loss does not fit the data.
        """
        ...

    def __call__(self, params: Any, shards: Shards, shard: Any, examples: Any = None) -> OracleResult:
        """Compute the loss and the gradient of one worker.

        Args:
            params: model, [p].
            shards: data of all workers, or on a mesh of the workers of this device.
            shard: index of the worker's shard in the arrays of `shards`, an integer scalar (`RoundKeys.shard`).
            examples: minibatch, a `laqjax.samplers.ExampleSelection`. None: the whole shard.

        Returns:
            The loss and the gradient. With `examples`, both are estimates from these examples alone.
        """
        ...


@runtime_checkable
class OracleHints(Protocol):
    """Optional declarations of an oracle. A member that the oracle lacks behaves as the one given here.

    Attributes:
        evaluates_anywhere: whether the oracle can be evaluated at any model. If it is False, methods that ask for
            gradients at other models than that of the round, or for local steps, are refused.
        reads_aggregate: whether the oracle reads `RoundContext.aggregate`. A federation then broadcasts the aggregate.
        num_local_steps: number of equal parts into which the oracle splits a minibatch, one for each local step.
        local_schedule: learning rate of the local steps, a `jax.tree_util.Partial` of the step round * num_local_steps
            + t. A run checks that it is finite and >= 0. None: no schedule.
    """

    evaluates_anywhere: bool = True
    reads_aggregate: bool = False
    num_local_steps: int = 1
    local_schedule: Any = None

    def activation_bytes(self, shards: Shards) -> int:
        """Estimate the memory in bytes that one gradient needs in addition to the parameters and the gradient.

        `laqjax.max_batch_size` uses it to compute how many points of a sweep fit in memory.
        """
        return 0

    def prefers_sequential(self, shards: Shards) -> bool:
        """Return whether gradients are faster one after another than batched with `vmap`.

        It is a hint for the points of a sweep, and on the CPU also for the workers of a round.
        """
        return False


@runtime_checkable
class StatefulOracle(Protocol):
    """Optional methods of an oracle that has a state for each worker, or reads more of the round than the model.

    An oracle that lacks them behaves as the methods given here: it has no state. The state of a worker advances in the
    rounds in which it participates, whether it sends or not.
    """

    def init_state(self, params: Float[Array, " p"]) -> Any:
        """Create the state of one worker before round 0.

        Args:
            params: initial model, [p].

        Returns:
            The state, a pytree of arrays, or None.
        """
        return None

    def evaluate(
        self, params: Float[Array, " p"], shards: Shards, examples: Any, state: Any, context: RoundContext
    ) -> Any:
        """Compute the loss, the gradient and the next state of one worker; replaces `Oracle.__call__` in a round.

        Args:
            params: model, [p]: `context.params`, or another model where a method asks for its gradient.
            shards: data of all workers, or on a mesh of the workers of this device.
            examples: minibatch, a `laqjax.samplers.ExampleSelection`. None: the whole shard.
            state: state of the oracle for this worker.
            context: round, keys, memory of the worker and aggregate of the server. `context.keys.shard` is the index
                of the worker's shard in `shards`.

        Returns:
            An `OracleResult`, whose state has the structure of `state`. It is discarded where a method asks for the
            gradient at another model.
        """
        oracle: Any = self
        return oracle(params, shards, context.keys.shard, examples)


@runtime_checkable
class Collective(Protocol):
    """Summation of the messages of workers that are distributed over devices, so that every device gets the sum.

    The methods are called inside `jax.shard_map`, and see the workers of their device. `laqjax.sharding` contains the
    collectives. Without a mesh, `Algorithm.step` uses one that moves nothing. A collective of your own must be
    hashable. For `sweep` it must also be a dataclass with the field `vmap_axis`, and for `lazy_aggregate` it must have
    the method `bytes_received`, as `laqjax.sharding.AllGather` has them.
    """

    @property
    def accumulates_locally(self) -> bool:
        """Return whether contributions are added on the device of their workers, before `reduce`.

        True: `reduce` gets the sum of the contributions of this device's senders. False: it gets the stacked
        contributions.
        """
        ...

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        """Return which workers are on this device.

        Args:
            num_workers: M.
            shards: the data on this device, of m workers.

        Returns:
            The number of the first worker, which may be traced, and the number m of workers. Worker numbers >= M are
            padding.
        """
        ...

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> Any:
        """Return the part of a worker's message that `reduce` needs. It is called for one worker at a time.

        Args:
            alg: the algorithm.
            upload: message of the worker.

        Returns:
            A vector [p] if `accumulates_locally`, else any pytree.
        """
        ...

    def gather_metrics(self, metrics: Any, num_workers: int) -> Any:
        """Gather the metrics of all workers on every device.

        Args:
            metrics: pytree of arrays [m, ...] of the workers on this device.
            num_workers: M.

        Returns:
            The same pytree with arrays [M, ...].
        """
        ...

    def reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """Add up the messages of all workers that send.

        Args:
            alg: the algorithm.
            messages: sum [p] of the contributions of this device's senders if `accumulates_locally`. Otherwise the
                contributions of its workers, stacked to [m, ...].
            sent: which of all workers send, [M].
            like: a vector with the shape [p] and the dtype of the result.

        Returns:
            The sum [p], the same on every device.
        """
        ...


@runtime_checkable
class Sampler(Protocol):
    """Choice of the examples of a shard that a worker uses in a round; see `laqjax.samplers`."""

    @property
    def size(self) -> int:
        """Return the number of examples in a round."""
        ...

    def __call__(self, keys: RoundKeys, shards: Shards) -> Any:
        """Select the examples of one worker in one round.

        Args:
            keys: keys, round number and worker number. `keys.shard` is the index of the worker's shard in `shards`.
            shards: data of all workers, or on a mesh of the workers of this device.

        Returns:
            A `laqjax.samplers.ExampleSelection` of `size` examples.
        """
        ...


@runtime_checkable
class Compressor(Protocol):
    """Conversion of a vector [p] to a message and back; see `laqjax.compressors`.

    A compressor may also declare the members of `CompressorTraits`. Without them it works everywhere, but devices of a
    mesh exchange its messages in decoded form.

    The example of this module has a compressor.
    """

    def encode(self, target: Float[Array, " p"], keys: RoundKeys) -> dict[str, Any]:
        """Compress a vector.

        Args:
            target: vector to compress, [p]. On a mesh that splits the parameters, it is the part on this device. Only
                in `laqjax.compressors.Grid`, the functions `squared_norm` and `max_abs` then include the other parts.
            keys: PRNG keys. `worker_key` gives each worker its own draws, `shared_key` gives all workers the same
                draws.

        Returns:
            The payload: arrays by name.
        """
        ...

    def decode(self, payload: dict[str, Any], like: Any) -> Float[Array, " p"]:
        """Decompress a payload.

        Args:
            payload: result of `encode`, or the same entries as a receiver read them.
            like: shape [p] and dtype of the target, a `jax.ShapeDtypeStruct` or an array.

        Returns:
            The decoded vector, [p].
        """
        ...

    def wire_fields(self, payload: dict[str, Any], like: Any) -> Iterable[WireField]:
        """List the fields of a message in the order in which they are sent.

        The size of a message, its bytes and the reading of these bytes all follow from this list. It should be a
        generator: a reader starts with an empty payload and stores each field in it before it requests the next one.
        The width of a field may therefore depend on earlier entries, unless the compressor declares a static layout
        (`CompressorTraits`).

        Args:
            payload: result of `encode`, or a dict that the caller fills while it reads.
            like: shape [p] and dtype of the target.

        Returns:
            The fields.
        """
        ...


@runtime_checkable
class CompressorTraits(Protocol):
    """Optional declarations of a compressor. A member that the compressor lacks has the value given here.

    Attributes:
        is_coordinatewise: whether a coordinate is decoded from its own numbers, and from numbers of the whole message.
            It is read together with a static layout only.
            Each entry of the payload is then a scalar or has one number for each coordinate. `collective="all_to_all"`
            needs this to exchange parts of packed messages.
        has_static_layout: whether shapes and widths of the fields are the same for all messages, and no field has a
            mask. `wire_fields({}, like)` then lists the fields without reading the payload. Only such messages are
            packed for the exchange between devices.
    """

    is_coordinatewise: bool = False
    has_static_layout: bool = False


@runtime_checkable
class UploadRule(Protocol):
    """Decision which workers participate in a round, and which of them send a message; see `laqjax.rules`.

    A rule owns two states: one that it shares with all workers, and one of each worker. `laqjax.rules.BaseUploadRule`
    has a default for every member, so a subclass defines only what differs. By default a rule is stateless, and every
    worker is selected and sends.

    The example of this module has a rule with a state.
    """

    @property
    def needs_persistent_memory(self) -> bool:
        """Return whether the server must keep the last uploads of workers that send nothing.

        `assemble` raises ValueError if it is True and the memory is not persistent. It may be False if every selected
        worker sends, and the server uses the messages of the round only.
        """
        ...

    @property
    def server_selects(self) -> bool:
        """Return whether the server selects only some workers in a round.

        The others neither receive the model nor compute. The downlink is then counted as one message to each selected
        worker, and it must send the full model. If it is False, all workers are selected, and a federation does not
        call `is_selected`.
        """
        ...

    def init(self, params: Float[Array, " p"]) -> tuple[Any, Any]:
        """Create the states before round 0.

        Args:
            params: initial model, [p].

        Returns:
            The state that is shared with all workers, and the state of one worker; both are pytrees or None.
        """
        ...

    def is_selected(self, shared_state: Any, worker_state: Any, context: RoundContext) -> Bool[Array, ""]:
        """Decide whether the server selects a worker, before the worker computes its gradient.

        Args:
            shared_state: state that the rule shares with all workers.
            worker_state: state of this worker.
            context: model, keys, learning rate and number of workers.

        Returns:
            Whether the worker participates in the round, a scalar bool.
        """
        ...

    def should_send(self, shared_state: Any, worker_state: Any, context: UploadContext) -> Decision:
        """Decide whether a selected worker sends its message.

        It is evaluated for workers that are not selected too. These send nothing, and `if_silent` becomes their state.
        In a federation, a server whose rule has `server_selects` evaluates it with zeros in place of gradients and
        messages.

        Args:
            shared_state: state that the rule shares with all workers.
            worker_state: state of this worker.
            context: gradient and message of the worker, in addition to the fields of `RoundContext`.

        Returns:
            Whether to send, and the worker's next state for both outcomes.
        """
        ...

    def update(self, shared_state: Any, step: ServerStep) -> Any:
        """Update the shared state after the step of the server.

        Args:
            shared_state: state that the rule shares with all workers.
            step: step of the server in this round.

        Returns:
            The next shared state.
        """
        ...


@runtime_checkable
class Memory(Protocol):
    """Choice of the vector that is compressed, and the states that this needs; see `laqjax.memories`.

    A worker's memory usually mirrors the vector that the server holds for it. LAQ compresses the difference between the
    gradient and this vector.
    """

    @property
    def is_persistent(self) -> bool:
        """Return whether the server has an aggregate, which keeps the earlier messages of workers that are silent now."""
        ...

    def init(self, params: Float[Array, " p"]) -> Any:
        """Create the memory of one worker before round 0.

        Args:
            params: initial model, [p].

        Returns:
            The memory, a pytree or None.
        """
        ...

    def compression_target(
        self, memory_state: Any, grad: Float[Array, " p"], context: RoundContext
    ) -> tuple[Float[Array, " p"], Any]:
        """Return the vector that is compressed.

        Args:
            memory_state: memory of the worker.
            grad: gradient of the worker, [p].
            context: model, keys and learning rate, and gradients at other models through `context.gradient_at`.

        Returns:
            The target [p], and the worker's next memory if it is selected and stays silent. A worker that is not
            selected keeps `memory_state`.
        """
        ...

    def update(self, memory_state: Any, grad: Any, target: Any, decoded: Float[Array, " p"]) -> Any:
        """Return the next memory of a worker that sends.

        Args:
            memory_state: the second result of `compression_target`.
            grad: gradient of the worker, [p].
            target: vector that was compressed, [p].
            decoded: vector that the server reads from the message, [p].

        Returns:
            The next memory, with the same structure as `memory_state`.
        """
        ...

    def update_aggregate(self, aggregate: Any, total: Float[Array, " p"]) -> tuple[Float[Array, " p"], Any]:
        """Compute the direction of the server from the messages of a round.

        The next aggregate must be additive over workers: a federation also keeps the share of each worker, and updates
        it by this method from zeros and the messages of this worker alone.

        Args:
            aggregate: aggregate of the server, [p]; zeros before round 0. None if the memory is not persistent.
            total: sum of the decoded messages of all senders, [p].

        Returns:
            The direction [p] for the optimizer, and the next aggregate ([p] or None).
        """
        ...


@runtime_checkable
class DownlinkTraits(Protocol):
    """Optional declaration of a downlink. If the downlink lacks it, it has the value given here.

    Attributes:
        num_vectors: number of vectors [p] in the message to a worker.
    """

    num_vectors: int = 1


@runtime_checkable
class Downlink(Protocol):
    """Transmission of the model from the server to the workers; see `laqjax.downlinks`.

    A downlink may also declare the member of `DownlinkTraits`. A federation sends the payload of `CompressedStep` and
    `CompressedModel`, and the whole model for any other downlink.
    """

    def init(self, params: Float[Array, " p"]) -> Any:
        """Create the state of the downlink on the server before round 0.

        Args:
            params: initial model, [p].

        Returns:
            The state, a pytree or None.
        """
        ...

    def broadcast(
        self,
        downlink_state: Any,
        params: Float[Array, " p"],
        direction: Float[Array, " p"],
        optimize: Callable[..., Any],
        keys: RoundKeys,
    ) -> Broadcast:
        """Run the server optimizer and send the result to the workers.

        Args:
            downlink_state: state of the downlink.
            params: model of the workers in this round, [p].
            direction: direction from `Memory.update_aggregate`, [p].
            optimize: function `(direction, params) -> (step, optimizer state)`, the optax transformation of the server.
                The step [p] is to be added to the model. Call it once: each call starts from the optimizer state of
                this round.
            keys: PRNG keys of the server.

        Returns:
            The next model of the workers, the next states of downlink and optimizer, and the message.
        """
        ...
