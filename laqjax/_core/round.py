"""One round as a pure function: Algorithm 2 of LAQ (Sun, Chen, Giannakis, Yang, NeurIPS 2019) for any parts.

    asked = rule.asked                   grad = oracle(params)              target = memory.target(grad)
    message = compressor.encode(target)  sent = asked and rule.decide       memory.update where sent
    total = sum of decode(message) over the senders
    direction, aggregate = memory.aggregate(aggregate, total)               params = downlink.send(optimizer(direction))

`worker_step` is written for ONE worker and `server_step` for the server; `step` adds the worker axis at one visible place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from laqjax._core.validation import (
    as_optimizer_factory,
    as_schedule,
    check_implements,
    check_number,
    oracle_dtype,
    suggest,
)
from laqjax._core.wire_format import message_bytes
from laqjax.downlinks import FullModelDownlink
from laqjax.types import (
    AlgorithmState,
    Collective,
    Compressor,
    Downlink,
    Memory,
    Oracle,
    RoundContext,
    RoundInfo,
    RoundKeys,
    Sampler,
    ServerStep,
    Shards,
    UploadContext,
    UploadRule,
    WorkerState,
    WorkerUpload,
    register_dataclass,
    squared_norm,
    static_field,
)

CACHE_RESIDENT_DATA_BYTES = 2**21  # of all data
CACHE_RESIDENT_PARAMS_BYTES = 16 * 2**20  # of vectors of the model


@register_dataclass
@dataclass(frozen=True)
class Algorithm:
    """compressor x rule x memory x server: `init` and `step`. Build it with a function of `laqjax.algorithms`.

    A pytree whose leaves are its numbers. lr: a number, or a schedule, a function of the round.
    """

    oracle: Oracle
    compressor: Compressor
    rule: UploadRule
    memory: Memory
    lr: Any
    num_workers: int = static_field()
    optimizer: Callable[[Any], optax.GradientTransformation] = static_field()
    sampler: Sampler | None = None  # None: the whole shard
    downlink: Downlink = FullModelDownlink()

    def init(self, params: Any) -> AlgorithmState:
        """The state before round 0.

        Args:
            params: the model, as the pytree that the oracle knows or as a flat vector [p].

        Returns:
            A state with zero memories and no history; a plain pytree that may be changed before it is run.
        """
        params = jnp.asarray(self.oracle.ravel(params))
        shared, own = self.rule.init(params)
        worker = WorkerState(self.memory.init(params), own)
        return AlgorithmState(
            params=params,
            round=jnp.zeros((), jnp.int32),
            aggregate=jnp.zeros_like(params) if self.memory.is_persistent else None,
            optimizer=self.optimizer(self.learning_rate_at(jnp.int32(0))).init(params),
            rule=shared,
            downlink=self.downlink.init(params),
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
        """One round of all workers and the server: pure, to be jitted, vmapped, scanned and exported by its caller.

        Args:
            state: from `init` or from the step before.
            shards: the workers' data, as JAX arrays under jit; not checked here, see `laqjax.check_inputs`.
            key: of the run, the same in every round.
            metrics: facts of the round to keep in `info.extra`: "grad", "target_sq", "innovation_sq", "error_sq",
                "worker_loss", "gradients" (how many a worker computed) of each worker [M, ...], and "params",
                "direction_sq", "step_sq" of the server.
            worker_batch_size: workers whose gradients are computed side by side (None: see the method of that name).
            collective: inside `jax.shard_map`, how the devices' messages become one sum, see `laqjax.sharding`; `shards` and
                `state.workers` are then those of this device. None: all workers are here.

        Returns:
            The state after the round, and its raw facts, each without the axis of rounds.

        Raises:
            ValueError: `metrics` names something else.
        """

        # A caller may close over `self`: XLA then knows its numbers while it compiles, turns a division by such a number into
        # a product and rounds differently from `run`. A choice that depends on the traced round keeps them unknown; the
        # barrier keeps XLA from moving the choice behind the division. Either alone does not suffice.
        def hide(leaf: Any) -> Array:
            return jnp.where(state.round < 0, jnp.zeros_like(leaf), leaf)

        alg = jax.lax.optimization_barrier(jax.tree.map(hide, self))
        round_key = jax.random.fold_in(key, state.round)
        shared_key = jax.random.fold_in(round_key, alg.num_workers)

        collective = collective or LocalCollective()
        first, count = collective.local_workers(alg.num_workers, shards)

        def one(row: Array, worker: WorkerState) -> Any:
            index = first + row
            keys = RoundKeys(jax.random.fold_in(round_key, index), shared_key, key, state.round, index, row)
            worker, upload, facts = worker_step(alg, worker, state, shards, keys)
            real = index < alg.num_workers
            upload = upload._replace(sent=upload.sent & real, selected=upload.selected & real)
            kept = {name: fact for name, fact in facts.items() if name in metrics}
            bare = upload._replace(payload=None, decoded=None)
            return worker, collective.worker_contribution(alg, upload), (bare, kept, facts["loss"])

        at_once = worker_batch_size or alg.default_worker_batch_size(shards)
        workers, messages, rest = map_workers(one, state, count, at_once, collective.accumulates_locally)
        uploads, facts, losses = collective.gather_metrics(rest, alg.num_workers)
        total = collective.reduce(alg, messages, uploads.sent, state.params)
        keys = RoundKeys(shared_key, shared_key, key, state.round, jnp.int32(alg.num_workers))
        after, bytes_down, server_facts = server_step(
            alg, state, total, jnp.sum(uploads.selected, dtype=jnp.int32), keys
        )
        facts |= {name: fact for name, fact in server_facts.items() if name in metrics}
        unknown = sorted(set(metrics) - set(facts))
        if unknown:
            known = sorted({*WORKER_METRICS, *server_facts})
            raise ValueError(f"metrics = {unknown}: expected names among {known}{suggest(unknown[0], known)}")
        info = RoundInfo(
            loss=jnp.mean(losses),
            sent=uploads.sent,
            bytes_up=jnp.where(uploads.sent, uploads.bytes, 0),
            bytes_down=bytes_down,
            extra=facts,
        )
        return after._replace(workers=workers), info

    def default_worker_batch_size(self, shards: Shards) -> int:
        """How many workers run side by side: all of them on GPU and TPU.

        On the CPU one after another, where each tile, or what is done to a worker's vectors, then stays in cache; but all
        together where all data and vectors stay there anyway (1.5 times as fast), and where not even one vector does: the
        passes over it use all cores then.
        """
        data = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shards))
        vector = self.oracle.size * self.oracle.dtype.itemsize
        medium = vector < CACHE_RESIDENT_PARAMS_BYTES and (
            data > CACHE_RESIDENT_DATA_BYTES or self.num_workers * vector > CACHE_RESIDENT_PARAMS_BYTES
        )
        alone = jax.default_backend() == "cpu" and (medium or self.oracle.prefers_sequential(shards))
        return 1 if alone else self.num_workers

    def params(self, state: AlgorithmState) -> Any:
        """The model of a state as the pytree that the oracle knows."""
        return self.oracle.unravel(state.params)

    def learning_rate_at(self, round: Any) -> Float[Array, ""]:
        """The step size in a round: server and rule see the same."""
        with jax.numpy_dtype_promotion("standard"):  # schedules mix the round with their numbers
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
    """Put parts together.

    Args:
        oracle: loss and gradient of a worker, from `oracles.from_loss`.
        compressor: of what goes up, see `laqjax.compressors`.
        rule: when a worker sends, see `laqjax.rules`.
        memory: what is compressed and what is remembered, see `laqjax.memories`.
        lr: step size > 0 on the sum over workers, or an optax schedule. A schedule that is a pytree (`jax.tree_util.Partial`
            of a function and its numbers) does not recompile for other numbers.
        num_workers: M.
        optimizer: a function of the step size that gives the server's optax transformation, or a transformation, which
            then has a step size of its own.
        sampler: minibatches, `samplers.BlockSampler(size)` or `samplers.ShuffleSampler(size)`; None: the whole shard.
        downlink: how the model comes down, see `laqjax.memories`; None: as it is.

    Raises:
        ValueError: a number, a part, or a combination of parts cannot work.
    """
    check_implements(
        "compressor", compressor, ("encode", "decode", "wire_fields"), "a compressor, as laqjax.compressors.top_k(10)"
    )
    if sampler is not None:
        check_implements(
            "sampler",
            sampler,
            ("__call__",),
            "samplers.BlockSampler(size), samplers.ShuffleSampler(size), or None for the whole shard",
        )
        check_number("sampler.size", sampler.size, np.int32, minimum=1)
    if rule.can_skip and not memory.is_persistent:
        raise ValueError(
            f"rule {type(rule).__name__} lets workers stay silent, but memory {type(memory).__name__} does not persist: a "
            "silent worker's gradient would be dropped; use an Innovation memory or a rule that always sends"
        )
    if rule.server_selects and not isinstance(downlink, FullModelDownlink | None):
        raise ValueError(
            f"rule {type(rule).__name__} sends the model to some workers only, but downlink {type(downlink).__name__} sends "
            "changes, which the others would miss: use no downlink"
        )
    return Algorithm(
        oracle=oracle,
        compressor=compressor,
        rule=rule,
        memory=memory,
        lr=as_schedule(lr, oracle_dtype(oracle)),
        num_workers=int(check_number("num_workers", num_workers, np.int32, minimum=1)),
        optimizer=as_optimizer_factory(optimizer),
        sampler=sampler,
        downlink=FullModelDownlink() if downlink is None else downlink,
    )


class LocalCollective:
    """All workers are on this device: their messages are added as they come."""

    accumulates_locally = True

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        return 0, num_workers

    def worker_contribution(self, alg: Algorithm, upload: WorkerUpload) -> Any:
        return upload.decoded

    def gather_metrics(self, facts: Any, num_workers: int) -> Any:
        return facts

    def reduce(self, alg: Algorithm, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Any:
        return messages


def map_workers(
    one: Callable[..., Any], state: AlgorithmState, count: int, batch_size: int, accumulates_locally: bool
) -> Any:
    """(workers, messages, the rest for each) of `one(row, worker) -> (worker, message, rest)`: a worker becomes `count`.

    `accumulates_locally`: `messages` is the sum [p] of what was sent, else they are stacked; `rest` begins with an upload, which says who
    sent.
    """
    rows = jnp.arange(count, dtype=jnp.int32)

    def in_turn(carry: Any, row: Array) -> Any:
        # a worker's row moves in place and its message is added at once: [M, p] is not written once more
        workers, total = carry
        before = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, row, keepdims=False), workers)
        after, message, rest = one(row, before)

        def put(rows: Array, new: Array, old: Array) -> Array:
            return rows if new is old else jax.lax.dynamic_update_index_in_dim(rows, new, row, 0)

        if accumulates_locally:
            total, message = total + jnp.where(rest[0].sent, message, 0), None
        return (jax.tree.map(put, workers, after, before), total), (message, rest)

    if batch_size == 1:
        (workers, total), (messages, rest) = jax.lax.scan(in_turn, (state.workers, jnp.zeros_like(state.params)), rows)
        return workers, total if accumulates_locally else messages, rest
    side_by_side = jax.vmap(one) if batch_size >= count else partial(_map_in_batches, one, batch_size)
    workers, messages, rest = side_by_side(rows, state.workers)
    if accumulates_locally:  # a product: XLA on the CPU sums over a leading axis many times slower
        messages = jnp.matmul(rest[0].sent.astype(messages.dtype), messages, precision="highest")
    return workers, messages, rest


def _map_in_batches(one: Callable[..., Any], batch_size: int, rows: Array, workers: WorkerState) -> Any:
    return jax.lax.map(lambda pair: one(*pair), (rows, workers), batch_size=batch_size)


def tree_where(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    """`yes` or `no`, leaf by leaf; nothing is to be chosen where both are the same array."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), yes, no)


# ---- one worker, and the server ---------------------------------------------------------------------------------

NORM_METRICS = ("target_sq", "innovation_sq", "error_sq")
WORKER_METRICS = ("grad", *NORM_METRICS, "worker_loss", "gradients")


def worker_step(
    alg: Algorithm, worker: WorkerState, state: AlgorithmState, shards: Shards, keys: RoundKeys
) -> tuple[WorkerState, WorkerUpload, dict[str, Array]]:
    """One round of the worker of `keys`: gradient, message, decision, memory.

    Args:
        alg: the algorithm.
        worker: what this worker keeps.
        state: what all workers read of it: the model, the round, what the rule shares.
        shards: all workers' data; only this worker's is read.
        keys: its draws.

    Returns:
        What it keeps, its message, and the raw facts of its round ("loss" and `WORKER_METRICS`).
    """
    rows = alg.sampler(keys, shards) if alg.sampler else None
    counted: list[Any] = [1]

    def gradient_at(params: Any, full: bool = False, when: bool | Bool[Array, ""] = True) -> Float[Array, " p"]:
        def there(params: Any) -> Any:
            return alg.oracle(params, shards, keys.shard, None if full else rows)[1]

        counted.append(jnp.asarray(when, jnp.int32))
        return there(params) if when is True else jax.lax.cond(when, there, jnp.zeros_like, params)

    now = RoundContext(state.params, keys, alg.learning_rate_at(state.round), alg.num_workers, gradient_at)
    asked = alg.rule.is_selected(state.rule, worker.rule, now)
    loss, grad = alg.oracle(state.params, shards, keys.shard, rows)
    target, silent = alg.memory.compression_target(worker.memory, grad, now)
    payload = alg.compressor.encode(target, keys)
    decoded = alg.compressor.decode(payload, target)
    squares = squared_norm(target), squared_norm(decoded), squared_norm(target - decoded)
    known: dict[str, Any] = vars(now)
    evidence = UploadContext(
        **known, grad=grad, target=target, decoded=decoded, **dict(zip(NORM_METRICS, squares, strict=True))
    )
    send, sent_rule, silent_rule = alg.rule.should_send(state.rule, worker.rule, evidence)
    sent = asked & send

    # a worker that is not asked sees nothing of the round: its memory stays, and its rule has decided what it keeps
    silent_memory = tree_where(asked, silent, worker.memory)
    memory = tree_where(sent, alg.memory.update(silent, grad, target, decoded), silent_memory)
    worker = WorkerState(memory, tree_where(sent, sent_rule, silent_rule))
    upload = WorkerUpload(payload, decoded, sent, asked, message_bytes(alg.compressor.wire_fields(payload, target)))
    # a worker that the server does not ask computes nothing
    gradients = jnp.where(asked, jnp.asarray(sum(counted), jnp.int32), 0)
    facts = {"loss": loss, "worker_loss": loss, "grad": grad, "gradients": gradients}
    return worker, upload, facts | dict(zip(NORM_METRICS, squares, strict=True))


def server_step(
    alg: Algorithm, state: AlgorithmState, total: Float[Array, " p"], asked: Int[Array, ""], keys: RoundKeys
) -> tuple[AlgorithmState, Int[Array, ""], dict[str, Array]]:
    """One round of the server.

    Args:
        alg: the algorithm.
        state: before the round.
        total: [p], the sum of the messages sent.
        asked: how many workers took part.
        keys: the draws that all share.

    Returns:
        The state with a new model (its workers as they were), the bytes sent down, and the raw facts of the round.
    """
    direction, aggregate = alg.memory.update_aggregate(state.aggregate, total)

    def optimize(direction: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int
            return alg.optimizer(alg.learning_rate_at(state.round)).update(direction, state.optimizer, params)

    params, downlink, optimizer, sent_down = alg.downlink.broadcast(
        state.downlink, state.params, direction, optimize, keys
    )
    step = ServerStep(state.params, params, squared_norm(direction), squared_norm(params - state.params), state.round)
    after = AlgorithmState(
        params, state.round + 1, aggregate, optimizer, alg.rule.update(state.rule, step), downlink, state.workers
    )
    facts = {"direction_sq": step.direction_sq, "step_sq": step.step_sq, "params": state.params}
    # one broadcast to all, or a message to each worker that was asked
    return after, sent_down * (asked if alg.rule.server_selects else 1), facts
