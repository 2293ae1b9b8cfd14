"""One round as a pure function: Algorithm 2 of LAQ (Sun, Chen, Giannakis, Yang, NeurIPS 2019) for any parts.

Each worker:

    selected = rule.is_selected(...)
    loss, grad = oracle(params, shards, shard, examples)
    target = memory.compression_target(grad)
    message = compressor.encode(target)
    sent = selected and rule.should_send(...)
    memory.update(...) if sent

The server:

    total = sum of compressor.decode(message) over the senders
    direction, aggregate = memory.update_aggregate(aggregate, total)
    params = downlink.broadcast(params, direction, optimizer)
    rule.update(...)

`worker_step` is written for ONE worker and `server_step` for the server. `Algorithm.step` adds the worker axis in one
place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from laqjax._core.validation import (
    as_optimizer_factory,
    as_schedule,
    check_compressor,
    check_evaluates_anywhere,
    check_implements,
    check_number,
    check_oracle_result,
    get_declaration,
    oracle_dtype,
    suggest,
)
from laqjax._core.wire_format import decode_message, message_bytes
from laqjax.downlinks import FullModelDownlink
from laqjax.types import (
    AlgorithmState,
    Collective,
    Compressor,
    Downlink,
    Memory,
    Oracle,
    OracleHints,
    OracleResult,
    RoundContext,
    RoundInfo,
    RoundKeys,
    Sampler,
    ServerResult,
    ServerStep,
    Shards,
    StatefulOracle,
    UploadContext,
    UploadRule,
    WorkerState,
    WorkerUpload,
    register_dataclass,
    squared_norm,
    static_field,
)

CACHE_RESIDENT_DATA_BYTES = 2**21  # up to this size, the data of all workers stays in the cache of a CPU
CACHE_RESIDENT_PARAMS_BYTES = 16 * 2**20  # up to this size, vectors [p] stay in the cache of a CPU


@register_dataclass
@dataclass(frozen=True)
class Algorithm:
    """Algorithm assembled from parts, with the methods `init` and `step`.

    Build it with a function of `laqjax.algorithms`, or from parts with `assemble`. It is a pytree whose leaves are its
    numbers. The constructor checks nothing.

    Attributes:
        oracle: loss and gradient of a worker.
        compressor: compressor of the uplink.
        rule: upload rule.
        memory: memory of workers and server.
        lr: learning rate on the sum over workers: a number, or a schedule, that is, a function of the round.
        optimizer: function of the learning rate that returns the optax transformation of the server, a pytree.
        num_workers: M.
        sampler: minibatches. None: every worker uses its whole shard.
        downlink: transmission of the model to the workers.
    """

    oracle: Oracle
    compressor: Compressor
    rule: UploadRule
    memory: Memory
    lr: Any
    optimizer: Callable[[Any], optax.GradientTransformation]
    num_workers: int = static_field()
    sampler: Sampler | None = None
    downlink: Downlink = FullModelDownlink()

    def init(self, params: Any) -> AlgorithmState:
        """Create the state before round 0.

        Args:
            params: initial model, as the pytree of the oracle or as a flat vector [p].

        Returns:
            A state with zero memories and no history. It is a plain pytree and may be edited before the run.
        """
        params = jnp.asarray(self.oracle.ravel(params))
        worker = init_worker_state(self, params)
        return AlgorithmState(
            params=params,
            round=jnp.zeros((), jnp.int32),
            aggregate=jnp.zeros_like(params) if self.memory.is_persistent else None,
            optimizer_state=self.optimizer(self.learning_rate_at(jnp.int32(0))).init(params),
            rule_state=self.rule.init(params)[0],
            downlink_state=self.downlink.init(params),
            workers=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.num_workers, *leaf.shape)), worker),
        )

    def step(
        self,
        state: AlgorithmState,
        shards: Shards,
        key: PRNGKeyArray,
        *,
        metrics: Sequence[str] = (),
        worker_batch_size: int | None = None,
        collective: Collective | None = None,
    ) -> tuple[AlgorithmState, RoundInfo]:
        """Compute one round of all workers and the server.

        It is a pure function, which the caller may jit, vmap, scan and export.

        Args:
            state: state from `init` or from the previous step.
            shards: data of the workers, as JAX arrays under jit. They are not checked here, see `laqjax.check_inputs`.
            key: PRNG key of the run, the same in every round.
            metrics: names of metrics to keep in `info.extra`. Of each worker, [M, ...]: "grad", "target_sq",
                "decoded_sq", "error_sq", "worker_loss", "gradients" (the number of gradients that it computed). Of
                the server: "params", "direction_sq", "step_sq".
            worker_batch_size: number of workers whose gradients are computed in one batch. None:
                `default_worker_batch_size`.
            collective: inside `jax.shard_map`, the collective that sums the messages of all devices, see
                `laqjax.sharding`. `shards` and `state.workers` are then those of this device. None: all workers are on
                this device.

        Returns:
            The state after the round, and the metrics of the round without the axis [K] of rounds.

        Raises:
            ValueError: `metrics` contains an unknown name.
        """

        # A caller may close over `self`. XLA then knows its numbers at compile time, turns a division by such a number
        # into a product, and rounds differently from `run`. A `where` that depends on the traced round keeps the
        # numbers unknown, and the barrier keeps XLA from moving the `where` behind the division. Neither of them
        # suffices alone.
        def hide(leaf: Any) -> Array:
            return jnp.where(state.round < 0, jnp.zeros_like(leaf), leaf)

        alg = jax.lax.optimization_barrier(jax.tree.map(hide, self))
        round_key = jax.random.fold_in(key, state.round)
        shared_key = jax.random.fold_in(round_key, alg.num_workers)

        collective = collective or LocalCollective()
        first, count = collective.local_workers(alg.num_workers, shards)

        def run_worker(position: Array, worker: WorkerState) -> Any:
            index = first + position
            keys = RoundKeys(jax.random.fold_in(round_key, index), shared_key, key, state.round, index, position)
            worker, upload, measured = worker_step(alg, worker, state, shards, keys)
            real = index < alg.num_workers
            upload = upload._replace(sent=upload.sent & real, selected=upload.selected & real)
            kept = {name: value for name, value in measured.items() if name in metrics}
            bare = upload._replace(payload=None, decoded=None)
            return worker, collective.worker_contribution(alg, upload), (bare, kept, measured["worker_loss"])

        at_once = worker_batch_size or alg.default_worker_batch_size(shards)
        workers, messages, rest = map_workers(run_worker, state, count, at_once, collective.accumulates_locally)
        uploads, extra, losses = collective.gather_metrics(rest, alg.num_workers)
        total = collective.reduce(alg, messages, uploads.sent, state.params)
        keys = RoundKeys(shared_key, shared_key, key, state.round, jnp.int32(alg.num_workers))
        result = server_step(alg, state, total, jnp.sum(uploads.selected, dtype=jnp.int32), keys)
        extra |= {name: value for name, value in result.metrics.items() if name in metrics}
        unknown = sorted(set(metrics) - set(extra))
        if unknown:
            known = sorted({*WORKER_METRICS, *result.metrics})
            raise ValueError(f"metrics = {unknown}: must be names among {known}{suggest(unknown[0], known)}")
        info = RoundInfo(
            loss=jnp.mean(losses),
            sent=uploads.sent,
            bytes_up=jnp.where(uploads.sent, uploads.bytes, 0),
            bytes_down=result.bytes_down,
            extra=extra,
        )
        return result.state._replace(workers=workers), info

    def default_worker_batch_size(self, shards: Shards) -> int:
        """Return how many workers are computed in one batch: all of them or one at a time.

        On GPU and TPU all workers are batched. On the CPU the fastest choice depends on the cache:

        - All data and vectors fit in the cache: all workers are batched, which is 1.5 times as fast.
        - Not even one vector [p] fits: all workers are batched, because the passes over the vectors then use all cores.
        - In between: one worker at a time, so that each tile of data and the vectors of this worker stay in the cache.

        On the CPU, an oracle that prefers sequential gradients always runs one worker at a time.

        Args:
            shards: data of the workers; only shapes and dtypes are used.
        """
        data = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shards))
        vector = self.oracle.size * self.oracle.dtype.itemsize
        medium = vector < CACHE_RESIDENT_PARAMS_BYTES and (
            data > CACHE_RESIDENT_DATA_BYTES or self.num_workers * vector > CACHE_RESIDENT_PARAMS_BYTES
        )
        prefers_sequential = get_declaration(self.oracle, OracleHints, "prefers_sequential")
        alone = jax.default_backend() == "cpu" and (medium or prefers_sequential(shards))
        return 1 if alone else self.num_workers

    def params(self, state: AlgorithmState) -> Any:
        """Return the model of a state as the pytree of the oracle."""
        return self.oracle.unravel(state.params)

    def learning_rate_at(self, round: Any) -> Float[Array, ""]:
        """Return the learning rate in a round, a scalar. The server and the upload rule use the same value."""
        with jax.numpy_dtype_promotion("standard"):  # schedules combine the integer round with floats
            return jnp.asarray(self.lr(round) if callable(self.lr) else self.lr, self.oracle.dtype)


def assemble(
    oracle: Oracle,
    compressor: Compressor,
    rule: UploadRule,
    memory: Memory,
    *,
    lr: Any,
    num_workers: int,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
    downlink: Downlink | None = None,
) -> Algorithm:
    """Assemble an algorithm from parts, and check that they fit each other.

    Args:
        oracle: loss and gradient of a worker, from `oracles.from_loss`.
        compressor: compressor of the uplink, see `laqjax.compressors`.
        rule: upload rule, which decides when a worker sends, see `laqjax.rules`.
        memory: choice of the vector that is compressed, and its state, see `laqjax.memories`.
        lr: learning rate > 0 on the sum over workers, or an optax schedule. A schedule that is a pytree
            (`jax.tree_util.Partial` of a function and its numbers) does not recompile for other numbers.
        num_workers: M.
        optimizer: function of the learning rate that returns the optax transformation of the server, such as
            `optax.adam`. The numbers of a `jax.tree_util.Partial` are traced. It may also be a transformation, such as
            `optax.adam(1e-3)`, which then has its own learning rate.
        sampler: minibatches, `samplers.BlockSampler(size)` or `samplers.ShuffleSampler(size)`. None: the whole shard.
        downlink: transmission of the model to the workers, see `laqjax.downlinks`. None: the full model.

    Returns:
        The algorithm, a pytree with its numbers as leaves.

    Raises:
        ValueError: a number is out of range, an argument is not a part of the required kind, or the parts do not fit
            each other.
    """
    downlink = FullModelDownlink() if downlink is None else downlink
    check_compressor(compressor)
    check_implements("rule", rule, UploadRule, "an upload rule, such as rules.Always()")
    check_implements("memory", memory, Memory, "a memory, such as memories.NoMemory()")
    check_implements(
        "downlink", downlink, Downlink, "a downlink, such as downlinks.CompressedModel(compressor), or None"
    )
    if sampler is not None:
        check_implements("sampler", sampler, Sampler, "a sampler, such as samplers.BlockSampler(10), or None")
        check_number("sampler.size", sampler.size, np.int32, minimum=1)
    if rule.needs_persistent_memory and not memory.is_persistent:
        raise ValueError(
            f"memory {type(memory).__name__} with rule {type(rule).__name__}, which lets workers stay silent: must be "
            "persistent, since a silent gradient would be lost; use an Innovation memory or a rule that always sends"
        )
    if rule.server_selects and not isinstance(downlink, FullModelDownlink):
        raise ValueError(
            f"downlink {type(downlink).__name__} with rule {type(rule).__name__}, which selects workers: must be None, "
            "since workers that are not selected would miss a change of the model; use downlink=None"
        )
    return Algorithm(
        oracle=oracle,
        compressor=compressor,
        rule=rule,
        memory=memory,
        lr=as_schedule(lr, oracle_dtype(oracle)),
        num_workers=int(check_number("num_workers", num_workers, np.int32, minimum=1)),
        optimizer=as_optimizer_factory(optimizer, oracle_dtype(oracle)),
        sampler=sampler,
        downlink=downlink,
    )


class LocalCollective:
    """Collective for workers that are all on this device: it adds their messages and moves nothing."""

    accumulates_locally = True

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        return 0, num_workers

    def worker_contribution(self, alg: Algorithm, upload: WorkerUpload) -> Any:
        return upload.decoded

    def gather_metrics(self, metrics: Any, num_workers: int) -> Any:
        return metrics

    def reduce(self, alg: Algorithm, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Any:
        return messages


def map_workers(
    run_worker: Callable[..., Any], state: AlgorithmState, count: int, batch_size: int, accumulates_locally: bool
) -> Any:
    """Apply a function of one worker to all workers of this device.

    Args:
        run_worker: function `(position, worker) -> (worker, contribution, rest)`. `position` counts the workers of
            this device from 0, and `worker` its `WorkerState`. `rest` is a tuple whose first entry is a `WorkerUpload`.
        state: state of the algorithm. The leaves of `state.workers` are [count, ...].
        count: number of workers on this device.
        batch_size: number of workers that are computed in one batch.
        accumulates_locally: whether contributions are vectors [p] to be added up, see `laqjax.types.Collective`.

    Returns:
        The next states of the workers, the contributions, and `rest`; states and `rest` are stacked to [count, ...].
        The contributions are the sum [p] over the senders if `accumulates_locally`, else they are stacked too.
    """
    positions = jnp.arange(count, dtype=jnp.int32)

    def add_worker(carry: Any, position: Array) -> Any:
        # updating the worker's state in place and adding its message at once avoids writing another array [M, p]
        workers, total = carry
        before = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, position, keepdims=False), workers)
        after, message, rest = run_worker(position, before)

        def write(all: Array, new: Array, old: Array) -> Array:
            return all if new is old else jax.lax.dynamic_update_index_in_dim(all, new, position, 0)

        if accumulates_locally:
            total, message = total + jnp.where(rest[0].sent, message, 0), None
        return (jax.tree.map(write, workers, after, before), total), (message, rest)

    if batch_size == 1:
        (workers, total), (messages, rest) = jax.lax.scan(
            add_worker, (state.workers, jnp.zeros_like(state.params)), positions
        )
        return workers, total if accumulates_locally else messages, rest
    if batch_size >= count:
        workers, messages, rest = jax.vmap(run_worker)(positions, state.workers)
    else:
        pairs = positions, state.workers
        workers, messages, rest = jax.lax.map(lambda pair: run_worker(*pair), pairs, batch_size=batch_size)
    if accumulates_locally:  # a matrix product, because XLA on the CPU sums over a leading axis many times slower
        messages = jnp.matmul(rest[0].sent.astype(messages.dtype), messages, precision="highest")
    return workers, messages, rest


def tree_where(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """Select `yes` or `no` by a scalar condition, leaf by leaf. Leaves that are the same array are passed through."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), yes, no)


# ---- one worker, and the server ---------------------------------------------------------------------------------


def init_worker_state(alg: Algorithm, params: Float[Array, " p"]) -> WorkerState:
    """Create the state of one worker before its first round, from the initial model [p]."""
    oracle_state = get_declaration(alg.oracle, StatefulOracle, "init_state")(params)
    return WorkerState(alg.memory.init(params), alg.rule.init(params)[1], oracle_state)


WORKER_METRICS = ("grad", "target_sq", "decoded_sq", "error_sq", "worker_loss", "gradients")


def worker_step(
    alg: Algorithm, worker: WorkerState, state: AlgorithmState, shards: Shards, keys: RoundKeys
) -> tuple[WorkerState, WorkerUpload, dict[str, Array]]:
    """Compute one round of one worker: gradient, message, decision, states.

    Args:
        alg: the algorithm.
        worker: state of this worker.
        state: state of the algorithm. Only the model, the round, the aggregate and the shared state of the rule are
            read.
        shards: data of all workers on this device. Only the shard `keys.shard` is read.
        keys: PRNG keys, round number and worker number.

    Returns:
        The next state of the worker, its message, and its metrics by name, those of `WORKER_METRICS`. "grad" is [p],
        the others are scalars.
    """
    examples = alg.sampler(keys, shards) if alg.sampler else None
    counted: list[Any] = [1]  # gradients of this round; `gradient_at` appends to it while it is traced

    # without a state, this is the body of `StatefulOracle.evaluate`, which calls `alg.oracle(...)`
    run_oracle = get_declaration(alg.oracle, StatefulOracle, "evaluate")

    def evaluate(params: Any, examples: Any) -> OracleResult:
        result = run_oracle(params, shards, examples, worker.oracle_state, context)  # `context` is created below
        return check_oracle_result(alg.oracle, result, worker.oracle_state)

    def gradient_at(params: Any, full: bool = False, when: bool | Bool[Array, ""] = True) -> Float[Array, " p"]:
        def evaluate_grad(params: Any) -> Any:
            return evaluate(params, None if full else examples).grad

        check_evaluates_anywhere(alg.oracle)
        counted.append(jnp.asarray(when, jnp.int32))
        return evaluate_grad(params) if when is True else jax.lax.cond(when, evaluate_grad, jnp.zeros_like, params)

    known: Any = {"round": state.round, "memory_state": worker.memory_state, "aggregate": state.aggregate}
    context = RoundContext(state.params, keys, alg.learning_rate_at(state.round), alg.num_workers, gradient_at, **known)
    selected = alg.rule.is_selected(state.rule_state, worker.rule_state, context)
    loss, grad, oracle_state = evaluate(state.params, examples)
    target, renewed = alg.memory.compression_target(worker.memory_state, grad, context)
    payload = alg.compressor.encode(target, keys)
    decoded = decode_message(alg.compressor, payload, target)
    norms = {"target_sq": squared_norm(target), "decoded_sq": squared_norm(decoded)}
    norms["error_sq"] = squared_norm(target - decoded)
    fields: dict[str, Any] = vars(context) | norms
    upload_context = UploadContext(**fields, grad=grad, target=target, decoded=decoded)
    decision = alg.rule.should_send(state.rule_state, worker.rule_state, upload_context)
    sent = selected & decision.send

    # A worker that is not selected keeps memory and oracle state. Its rule gets the state for silence, because a limit
    # on silence also counts rounds without selection (LAG-PS); `PartialParticipation` keeps the old state.
    silent_memory = tree_where(selected, renewed, worker.memory_state)
    memory = tree_where(sent, alg.memory.update(renewed, grad, target, decoded), silent_memory)
    oracle_state = tree_where(selected, oracle_state, worker.oracle_state)
    worker = WorkerState(memory, tree_where(sent, decision.if_sent, decision.if_silent), oracle_state)
    upload = WorkerUpload(payload, decoded, sent, selected, message_bytes(alg.compressor.wire_fields(payload, target)))
    # a worker that is not selected counts as computing no gradient, although the simulation computes one
    gradients = jnp.where(selected, jnp.asarray(sum(counted), jnp.int32), 0)
    metrics = {"worker_loss": loss, "grad": grad, "gradients": gradients}
    return worker, upload, metrics | norms


def server_step(
    alg: Algorithm, state: AlgorithmState, total: Float[Array, " p"], num_selected: Int[Array, ""], keys: RoundKeys
) -> ServerResult:
    """Compute one round of the server.

    Args:
        alg: the algorithm.
        state: state before the round.
        total: sum of the decoded messages of all senders, [p].
        num_selected: number of selected workers, a scalar.
        keys: PRNG keys of the server, whose `worker` is M.

    Returns:
        The next state, the bytes and the payload of the broadcast, and the metrics of the server.
    """
    direction, aggregate = alg.memory.update_aggregate(state.aggregate, total)

    def optimize(direction: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax combines floats and integers
            return alg.optimizer(alg.learning_rate_at(state.round)).update(direction, state.optimizer_state, params)

    message = alg.downlink.broadcast(state.downlink_state, state.params, direction, optimize, keys)
    step_sq = squared_norm(message.params - state.params)
    step = ServerStep(state.params, message.params, squared_norm(direction), step_sq, state.round)
    after = AlgorithmState(
        params=message.params,
        round=state.round + 1,
        aggregate=aggregate,
        optimizer_state=message.optimizer_state,
        rule_state=alg.rule.update(state.rule_state, step),
        downlink_state=message.downlink_state,
        workers=state.workers,
    )
    metrics = {"direction_sq": step.direction_sq, "step_sq": step.step_sq, "params": state.params}
    # one broadcast to all workers, or one message to each selected worker
    return ServerResult(
        after, message.bytes * (num_selected if alg.rule.server_selects else 1), message.payload, metrics
    )
