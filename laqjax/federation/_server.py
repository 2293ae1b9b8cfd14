"""Server side of a federation: `FederatedServer` and the Flower ServerApp around it."""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from jaxtyping import Array, PRNGKeyArray

from laqjax._core.round import Algorithm, server_step
from laqjax._core.validation import check_number
from laqjax._core.wire_format import from_bytes, to_bytes
from laqjax.federation import _protocol
from laqjax.federation._admission import AcceptedReply, Admission, ExpectedReply, find_outliers
from laqjax.federation._checkpoint import Checkpoint, WorkerRecords, restore_checkpoint, save_checkpoint
from laqjax.federation._polling import ReplyPoller
from laqjax.federation._protocol import add_delta, down_compressor, worker_keys
from laqjax.federation._roster import Rejection, Roster, make_hello_messages, one_line
from laqjax.types import AlgorithmState, RoundContext, RoundKeys, ServerResult, UploadContext

log = logging.getLogger(__name__)
WAITING_NOTICE = 5.0  # seconds without the workers before the first round, after which the log reports it
MAX_HELLOS = 3  # rejected answers of each node after which a server without a worker gives up


@dataclass
class RoundStats:
    """Results and costs of one federation round.

    Arrays have shape [M], one entry for each worker. Fields that begin with `bits` are in bits, other sizes in bytes,
    times in seconds.
    """

    round: int
    loss: float  # mean over the workers whose reply was accepted; NaN without one
    bits_down: int  # as the library counts them (`info.bits_down`)
    accepted: np.ndarray  # bool: the worker is in sync and its reply was accepted
    sent: np.ndarray  # bool: the accepted reply holds a message
    bits_up: np.ndarray  # as the library counts them (`info.bits_up`)
    gradients: np.ndarray  # gradient evaluations
    payload_down: np.ndarray  # model bodies without headers
    bytes_up: np.ndarray  # replies as Flower serializes them, rejected ones included
    bytes_down: np.ndarray  # broadcasts as Flower serializes them
    compute: np.ndarray  # the worker's step, as the worker reports it
    pack: np.ndarray  # packing the message into bytes, as the worker reports it
    transfer: float  # waiting for replies, less the work of the slowest worker
    decode: float  # checking the replies and the server's step
    rejections: int  # rejected messages, answers to hello messages included
    absent: np.ndarray  # rounds in a row in which the worker did not reply, this one included
    rejected: np.ndarray  # rounds in a row in which the reply of the worker was rejected, this one included

    @classmethod
    def empty(cls, round: int, workers: int) -> "RoundStats":
        """Create the stats of a round without broadcasts or replies."""
        arrays = [name for name, kind in cls.__annotations__.items() if kind is np.ndarray]
        dtypes = {"accepted": bool, "sent": bool, "compute": float, "pack": float}
        zeros: Any = {name: np.zeros(workers, dtypes.get(name, np.int64)) for name in arrays}
        return cls(round=round, loss=np.nan, bits_down=0, transfer=0.0, decode=0.0, rejections=0, **zeros)


@jax.jit
def _compute_server_step(
    alg: Algorithm, state: AlgorithmState, total: Array, num_selected: Any, key: PRNGKeyArray
) -> ServerResult:
    """Compute `laqjax.server_step` as one compiled program, with the keys of the round."""
    shared = worker_keys(alg, key, state.round, alg.num_workers)[1]
    keys = RoundKeys(shared, shared, key, state.round, jnp.int32(alg.num_workers))
    return server_step(alg, state, total, num_selected, keys)


@jax.jit
def _accumulate(alg: Algorithm, total: Array, contribution: Any, decoded: Array) -> tuple[Array, Any]:
    """Add one message to the sum of messages and to the worker's part of the aggregate.

    Returns:
        The new sum [p], and the worker's new part of the aggregate [p] (None if `contribution` is None).
    """
    return total + decoded, None if contribution is None else alg.memory.update_aggregate(contribution, decoded)[1]


@jax.jit
def _select_workers(alg: Algorithm, state: AlgorithmState, own: Any, key: PRNGKeyArray, sent: Any) -> tuple[Array, Any]:
    """Evaluate a rule with `server_selects` on the server.

    Such a rule decides from what the server knows. The gradients in its context are zeros here.

    Args:
        alg: the algorithm.
        state: the server's state.
        own: the rule's state of each worker, [M, ...].
        key: PRNG key of the run.
        sent: [M], which workers sent a message in this round.

    Returns:
        The mask [M] of selected workers, and the rule's state of each worker after the round.
    """

    def select(worker: Array, own: Any, sent: Array) -> tuple[Array, Any]:
        nothing, zero = jnp.zeros_like(state.params), jnp.zeros((), state.params.dtype)
        keys = RoundKeys(*worker_keys(alg, key, state.round, worker), key, state.round, worker)
        lr, known = alg.learning_rate_at(state.round), {"round": state.round, "aggregate": state.aggregate}
        now = RoundContext(state.params, keys, lr, alg.num_workers, lambda *_, **__: nothing, **known)
        evidence = UploadContext(**vars(now), grad=nothing, target=nothing, decoded=nothing, target_sq=zero, decoded_sq=zero, error_sq=zero)  # fmt: skip
        decision = alg.rule.should_send(state.rule_state, own, evidence)
        after = jax.tree.map(lambda a, b: jnp.where(sent, a, b), decision.if_sent, decision.if_silent)
        return alg.rule.is_selected(state.rule_state, own, now), after

    return jax.vmap(select)(jnp.arange(alg.num_workers, dtype=jnp.int32), own, sent)


class ModelChange(NamedTuple):
    """Last step of the server, as broadcasts carry it."""

    body: bytes = b""  # message with the change of the model; empty if the server broadcasts the whole model
    direction_sq: float = 0.0  # ||direction||^2
    step_sq: float = 0.0  # ||model change||^2


def _apply_replies(
    alg: Algorithm,
    key: PRNGKeyArray,
    state: AlgorithmState,
    workers: WorkerRecords,
    accepted: dict[int, AcceptedReply],
    stats: RoundStats,
) -> tuple[AlgorithmState, ModelChange]:
    """Add up the accepted messages in worker order, and make the server's step from their sum.

    Args:
        alg: the algorithm.
        key: PRNG key of the run.
        state: state of the server.
        workers: records of the workers; this function updates them.
        accepted: accepted replies, sorted by worker.
        stats: stats of the round; this function sets `bits_down`.

    Returns:
        The new state, and the change of the model.
    """
    uploads = {worker: reply for worker, reply in accepted.items() if reply.decoded is not None}
    total, contributions = np.zeros(state.params.shape, state.params.dtype), workers.contributions
    again = [
        m for m, reply in uploads.items() if reply.header.kind == _protocol.REPLY_FULL and contributions[m] is not None
    ]
    if again:  # a full upload replaces the worker's part of the aggregate
        for worker in again:
            contributions[worker] = jnp.zeros_like(total)
        state = state._replace(aggregate=functools.reduce(add_delta, contributions, total))
    for worker, (_, head, decoded, _) in uploads.items():
        total, contributions[worker] = _accumulate(alg, total, contributions[worker], decoded)
        workers.accepted[worker] = head.round, head.digest
    if alg.rule.server_selects:
        workers.rule_states = _select_workers(
            alg, state, workers.rule_states, key, np.isin(np.arange(alg.num_workers), list(uploads))
        )[1]
    num_selected, before = np.int32(np.count_nonzero(stats.bytes_down)), state.params
    result = _compute_server_step(alg, state, total, num_selected, key)
    state, stats.bits_down, change, down = result.state, 8 * int(result.bytes_down), b"", down_compressor(alg)
    if down is not None:  # use the decoded message, so that server and workers hold the same model
        change = to_bytes(down, result.payload, before)
        state = state._replace(params=add_delta(before, from_bytes(down, change, before)))
    return state, ModelChange(change, float(result.metrics["direction_sq"]), float(result.metrics["step_sq"]))


class RoundResult(NamedTuple):
    """Server after a round."""

    state: AlgorithmState
    change: ModelChange
    workers: WorkerRecords
    accepted: dict[int, AcceptedReply]  # replies that the round uses
    rejections: dict[int, Rejection]  # messages that it does not use, by worker


def _compute_finite_round(
    alg: Algorithm,
    key: PRNGKeyArray,
    state: AlgorithmState,
    workers: WorkerRecords,
    accepted: dict[int, AcceptedReply],
    stats: RoundStats,
) -> RoundResult:
    """Apply the replies; leave out the largest messages, at most half, with which the model or its step overflows.

    Raises:
        RuntimeError: the model or its step is not finite without these messages either.
    """
    accepted, rejections = dict(accepted), {}
    uploads = sorted((m for m in accepted if accepted[m].decoded is not None), key=lambda m: accepted[m].magnitude)
    for _ in range(1 + (len(uploads) + 1) // 2):
        records = replace(workers, contributions=list(workers.contributions), accepted=list(workers.accepted))
        after, change = _apply_replies(alg, key, state, records, accepted, stats)
        if np.isfinite([change.direction_sq, change.step_sq]).all() and np.isfinite(np.asarray(after.params)).all():
            sizes = {worker: reply.magnitude for worker, reply in accepted.items() if reply.decoded is not None}
            records.max_magnitudes = sizes | {
                worker: max(size, sizes.get(worker, 0.0)) for worker, size in workers.max_magnitudes.items()
            }
            return RoundResult(after, change, records, accepted, rejections)
        if uploads:
            reply = accepted.pop(worker := uploads.pop())
            reason = f"largest absolute value = {reply.magnitude:.3g}: must keep the model and its step finite"
            rejections[worker] = Rejection(reply.node, reason)
    raise RuntimeError(
        f"round {int(state.round)}: the model or its step is not finite, even without the largest messages; "
        "lower the learning rate; a checkpoint holds the state before the round"
    )


def _fill_stats(stats: RoundStats, accepted: dict[int, AcceptedReply]) -> None:
    """Fill the stats of a round from the accepted replies."""
    for worker, (_, up, decoded, _) in accepted.items():
        stats.accepted[worker], stats.sent[worker] = True, decoded is not None
        stats.bits_up[worker], stats.gradients[worker] = 8 * up.size, up.gradients
        stats.compute[worker], stats.pack[worker] = up.compute, up.pack
    if accepted:
        stats.loss = float(np.mean([reply.header.loss for reply in accepted.values()]))
    stats.transfer = max(stats.transfer - float((stats.compute + stats.pack).max()), 0.0)


def _find_selected(alg: Algorithm, key: PRNGKeyArray, state: AlgorithmState, rule_states: Any) -> np.ndarray:
    """Return the mask [M] of workers that receive a broadcast in this round."""
    nobody = np.zeros(alg.num_workers, bool)
    if not alg.rule.server_selects:
        return ~nobody
    return np.asarray(_select_workers(alg, state, rule_states, key, nobody)[0])


def _log_rejections(admission: Admission, rejections: Iterable[Rejection]) -> None:
    """Log each rejection as one line of at most 300 printable characters."""
    for node, reason in rejections:
        worker = admission.expected[node].worker if node in admission.expected else "?"
        log.warning("worker %s (node %s) rejected: %s", worker, node, one_line(reason))


def _report_workers(
    roster: Roster,
    selected: list[int],
    admission: Admission,
    rejections: dict[int, Rejection],
    max_rejections: int,
    stats: RoundStats,
) -> set[int]:
    """Log rejected replies and workers that are missing, and fill the stats that count them.

    Args:
        roster: table of the nodes; this function counts the round.
        selected: workers that take part in the round.
        admission: replies of the round.
        rejections: messages that were rejected after their validation, by worker.
        max_rejections: number of rounds in a row in which a worker is rejected, after which it is logged.
        stats: stats of the round.

    Returns:
        The workers that were rejected in `max_rejections` rounds in a row.
    """
    _log_rejections(admission, [*admission.rejections, *rejections.values()])
    for worker in roster.count_absent(selected, admission.replied, admission.late):
        log.warning(
            "worker %s was absent in %s rounds: the server no longer waits for it", worker, roster.absent[worker]
        )
    roster.count_rejected(admission.replied, admission.find_rejected_workers() | rejections.keys())
    excluded = {worker for worker, count in roster.rejected.items() if count == max_rejections}
    for worker in sorted(excluded):
        advice = "it has no part in the run; see the reasons above; raise outlier_factor if its messages are only large"
        log.warning("worker %s was rejected in %s rounds in a row: %s", worker, max_rejections, advice)
    stats.rejections = len(admission.rejections) + len(rejections)
    for name, counts in ("absent", roster.absent), ("rejected", roster.rejected), ("bytes_up", admission.bytes_up):
        getattr(stats, name)[:] = [counts[worker] for worker in roster.workers]
    return excluded


class FederatedServer:
    """Server of a federation.

    The methods and functions nest as follows:

    - `run` waits for the workers and repeats `run_round`.
    - `run_round` sends the broadcasts, admits the replies, and saves a checkpoint.
    - `_apply_replies` adds up the admitted messages, and updates the records of the workers.
    - `_compute_server_step` is one compiled program: it calls `laqjax.server_step`, as a simulation does.

    For a memory that is persistent, the server also stores each worker's part of the aggregate: M p numbers. With them
    it can replace the part of a worker that lost its state. One checkpoint holds everything that the next round needs.

    alg: the algorithm.
    state: its state without the workers; `alg.params(state)` returns the model.
    excluded_workers: workers that were rejected in `max_rejections` rounds in a row, at any time. They still receive
        broadcasts, and their next valid reply counts.
    """

    def __init__(
        self,
        alg: Algorithm,
        params: Any,
        key: PRNGKeyArray,
        *,
        round_timeout: float = 60.0,
        min_replies: int | None = None,
        max_absent_rounds: int = 3,
        checkpoint_path: Path | None = None,
        outlier_factor: float = 1e3,
        max_rejections: int = 10,
        authenticated_nodes: bool = True,
        release_workers: Iterable[int] = (),
    ) -> None:
        """Initialize the server, or restore it from an existing checkpoint.

        Args:
            alg: the algorithm; it must be the same as the workers'.
            params: initial model, a pytree or a flat vector [p].
            key: PRNG key of the run, as in `laqjax.run`.
            round_timeout: seconds that a round waits for replies. After half of them, broadcasts without one are sent again.
            min_replies: number of accepted replies after which a round waits for no more. None: all selected workers;
                only then are the results those of a simulation.
            max_absent_rounds: number of rounds in a row in which a worker may be absent. After them the server does not wait
                for it, but still sends it broadcasts, and waits for it again once it replies.
            checkpoint_path: file that is written after every round. If it exists, the server resumes from it.
            outlier_factor: a message is rejected if its largest absolute value exceeds this many times the median of
                the workers' largest values so far. With fewer than three workers there is no such limit, because
                nothing tells which of two is the outlier.
            max_rejections: number of rounds in a row in which a worker is rejected, after which it is logged and
                added to `excluded_workers`.
            authenticated_nodes: whether a worker id belongs to the first node that claimed it, by its public key, also
                while that node is away and after a restart of the server. False for nodes without node authentication,
                whose keys change at each start: an id then belongs to a node while it is there.
            release_workers: worker ids that another node may take over; its worker starts with one full upload. The
                checkpoint holds releases and new owners from the next complete round on: give a release again to a
                server that is restarted before that.

        Raises:
            ValueError: the checkpoint is damaged, has another format or belongs to another algorithm, the key is
                not of JAX's default kind, or a number is out of range.
        """
        most = alg.num_workers
        min_replies = most if min_replies is None else min_replies
        self._min_replies = int(check_number("min_replies", min_replies, np.int32, minimum=1, maximum=most))
        max_absent_rounds = int(check_number("max_absent_rounds", max_absent_rounds, np.int32, minimum=1))
        self.alg, self._key, self._key_bytes = alg, key, np.asarray(jax.random.key_data(key)).tobytes()
        if (size := len(self._key_bytes)) != 8:
            raise ValueError(f"key of {size} bytes: must be jax.random.key(seed) of JAX's default kind")
        self._timeout = float(check_number("round_timeout", round_timeout, np.float64, above=0))
        self._outlier_factor = float(check_number("outlier_factor", outlier_factor, np.float64, above=0))
        self._checkpoint_path = checkpoint_path
        self._max_rejections = int(check_number("max_rejections", max_rejections, np.int32, minimum=1))
        digests = _protocol.scheme_digests(alg)
        self._scheme, self._session = _protocol.short_digest(digests), time.time_ns()
        self._identity = digests + self._key_bytes
        state = alg.init(params)
        self.state: AlgorithmState = state._replace(workers=None)  # pyright: ignore[reportArgumentType]
        contributions: list[Any] = [jnp.zeros_like(state.params) if alg.memory.is_persistent else None] * most
        self._workers = WorkerRecords(
            state.workers.rule_state, contributions, [_protocol.NO_UPLOAD] * most, [b""] * most, {}
        )
        self._change = ModelChange()
        if checkpoint_path is not None and checkpoint_path.exists():
            restored = restore_checkpoint(checkpoint_path, self._checkpoint())
            self.state, self._workers = restored.state, restored.workers
            self._session = max(self._session, restored.session + 1)
        if not authenticated_nodes:
            self._workers.owners = [b""] * most
        for worker in release_workers:
            self._workers.release(int(check_number("release_workers", worker, np.int32, minimum=0, maximum=most - 1)))
        self._poller, self.excluded_workers = ReplyPoller(), set[int]()
        self._roster = Roster(range(most), digests, self._workers.owners, authenticated_nodes, max_absent_rounds)

    def run(
        self, grid: Grid, rounds: int, *, workers: int | None = None, max_empty_rounds: int = 10
    ) -> Iterator[RoundStats]:
        """Run rounds until the state has completed `rounds` of them, counted from round 0.

        Args:
            grid: the Flower grid.
            rounds: total number of rounds, rounds before a checkpoint included.
            workers: number of workers to wait for before the first round (None: all).
            max_empty_rounds: number of deadlines without a valid reply after which the run fails.

        Yields:
            The stats of each round, as soon as it is complete.

        Raises:
            RuntimeError: too few workers registered, or no valid reply arrived, for `max_empty_rounds` deadlines; or all
                nodes, at least two, were rejected three times before a worker registered.
        """
        _wait_for_workers(self, grid, self.alg.num_workers if workers is None else workers, max_empty_rounds)
        empty = 0
        while (round := int(self.state.round)) < rounds:
            stats = self.run_round(grid)
            if stats is not None:
                empty = 0
                yield stats
            elif (empty := empty + 1) >= max_empty_rounds:
                raise RuntimeError(f"no valid reply in round {round} after {max_empty_rounds} attempts; see the log")

    def run_round(self, grid: Grid) -> RoundStats | None:
        """Run one round.

        Returns:
            The stats of the round. None if no reply was accepted, and either all workers were selected or no node is
            registered. In that case the state is unchanged, and the next call repeats the round.
        """
        roster, stats = self._roster, RoundStats.empty(int(self.state.round), self.alg.num_workers)
        selected = _find_selected(self.alg, self._key, self.state, self._workers.rule_states)
        admission = _exchange(self, grid, selected, stats)
        began = time.perf_counter()
        valid, may_be_empty = dict(sorted(admission.accepted.items())), bool(roster.nodes) and not selected.all()
        rejections = find_outliers(valid, self._workers.max_magnitudes, self._outlier_factor)
        accepted = {worker: reply for worker, reply in valid.items() if worker not in rejections}
        result = None
        if accepted or may_be_empty:
            result = _compute_finite_round(self.alg, self._key, self.state, self._workers, accepted, stats)
            accepted, rejections = result.accepted, rejections | result.rejections
        self.excluded_workers |= _report_workers(
            roster, np.flatnonzero(selected).tolist(), admission, rejections, self._max_rejections, stats
        )
        for worker in admission.asked.values():
            roster.model_rounds[worker] = stats.round if worker in accepted else None
        if result is None or not (accepted or may_be_empty):
            return None
        self.state, self._change, self._workers = result[:3]
        _fill_stats(stats, accepted)
        jax.block_until_ready(self.state)
        stats.decode += time.perf_counter() - began
        if self._checkpoint_path is not None:
            save_checkpoint(self._checkpoint_path, self._checkpoint())
        return stats

    def _checkpoint(self) -> Checkpoint:
        """Return everything that the next round needs."""
        return Checkpoint(self._identity, self._session, self.state, self._workers)


def _make_broadcasts(server: FederatedServer, selected: np.ndarray, stats: RoundStats) -> dict[int, Message]:
    """Return the broadcasts of this round by node, and add the sizes of their bodies to the stats.

    A broadcast holds only what the worker lacks.
    """
    messages: dict[int, Message] = {}
    unchanged, full, delta = _protocol.MODEL_UNCHANGED, _protocol.MODEL_FULL, _protocol.MODEL_DELTA
    skipped, change = server._roster.find_skipped_nodes(server._poller.waiting_nodes()), server._change
    history = _protocol.get_shared_history(server.alg, server.state.rule_state, server.state.aggregate)
    model, shared = _protocol.tree_to_bytes(server.state.params), _protocol.tree_to_bytes(history)
    digest, bodies = _protocol.short_digest(model, shared), {unchanged: b"", full: model, delta: change.body}
    computes_history = history[1] is None and len(shared) > _protocol.SHORT_HISTORY
    for node, worker in server._roster.nodes.items():
        if selected[worker] and node not in skipped:
            form = history_form = unchanged
            if (known := server._roster.model_rounds[worker]) != stats.round:
                is_near = known == stats.round - 1
                form = delta if is_near and change.body else full
                history_form = delta if is_near and computes_history else full
            about = *server._workers.accepted[worker], digest, server._key_bytes, *change[1:]
            head = _protocol.BroadcastHeader(server._session, stats.round, worker, form, history_form, *about)
            body, history_body = bodies[form], shared if history_form == full else b""
            stats.payload_down[worker] = len(body)
            content = _protocol.make_record(head, body=body, history=history_body)
            messages[node] = _make_train_message(content, node, stats.round, server._timeout)
    return messages


def _make_train_message(content: RecordDict, node: int, round: int, ttl: float) -> Message:
    """Return a broadcast that Flower drops after `ttl` seconds, so that a slow node does not build up a backlog."""
    return Message(content, node, MessageType.TRAIN, group_id=str(round), ttl=ttl)


def _exchange(server: FederatedServer, grid: Grid, selected: np.ndarray, stats: RoundStats) -> Admission:
    """Greet new nodes, send the broadcasts of a round, and receive and validate the replies."""
    roster, accepted = server._roster, server._workers.accepted
    greetings = make_hello_messages(roster, grid.get_nodes(), server._poller.waiting_nodes(), server._timeout)
    broadcasts, began = _make_broadcasts(server, selected, stats), time.perf_counter()
    server._poller.send(grid, [*broadcasts.values(), *greetings])
    for node, message in broadcasts.items():
        stats.bytes_down[roster.nodes[node]] = _protocol.get_serialized_size(message)
    roster.greeted |= {message.metadata.dst_node_id: message.metadata.message_id for message in greetings}
    asked = {message.metadata.message_id: roster.nodes[node] for node, message in broadcasts.items()}
    about = server._session, stats.round, server._scheme
    expected = {node: ExpectedReply(*about, m, accepted[m], node in broadcasts) for node, m in roster.nodes.items()}
    admission = Admission(server.alg, server.state.params, roster, expected, asked)

    def send_again(workers: set[int]) -> None:
        overdue = {node: message for node, message in broadcasts.items() if roster.nodes.get(node) in workers}
        copies = {
            node: _make_train_message(old.content, node, stats.round, server._timeout / 2)
            for node, old in overdue.items()
        }
        server._poller.send(grid, list(copies.values()))
        for node, message in copies.items():
            asked[message.metadata.message_id] = roster.nodes[node]
            stats.bytes_down[roster.nodes[node]] += _protocol.get_serialized_size(message)

    admission.receive(server._poller, server._min_replies, server._timeout, send_again)
    stats.transfer, stats.decode = time.perf_counter() - began - admission.seconds, admission.seconds
    return admission


def _wait_for_workers(server: FederatedServer, grid: Grid, workers: int, max_empty_rounds: int) -> None:
    """Wait until `workers` workers are registered, for at most `max_empty_rounds` deadlines.

    The wait ends early if all nodes are rejected, as they are if the apps have other settings. One node cannot end it.
    """
    began, told, rejected, reason = time.monotonic(), -1, Counter[int](), ""
    while len(server._roster.nodes) < workers:
        stats = RoundStats.empty(int(server.state.round), server.alg.num_workers)
        admission = _exchange(server, grid, np.zeros(server.alg.num_workers, bool), stats)
        _log_rejections(admission, admission.rejections)
        for node, reason in admission.rejections:  # noqa: B007
            rejected[node] += 1
        there = [] if server._roster.nodes else list(server._roster.keys)
        if len(there) >= 2 and all(rejected[node] >= MAX_HELLOS for node in there):
            raise RuntimeError(
                f"all {len(there)} nodes were rejected {MAX_HELLOS} times, the last one because: {one_line(reason)}"
            )
        if (came := len(server._roster.nodes)) < workers:
            waited = time.monotonic() - began
            if waited > WAITING_NOTICE and came != told:
                log.warning("%s of %s workers are registered: waiting for the others", came, workers)
                told = came
            if waited > max_empty_rounds * server._timeout:
                raise RuntimeError(f"{came} workers registered: must be {workers}; check that their nodes run")
            time.sleep(min(0.2, server._timeout))


def server_app(
    alg: Algorithm,
    params: Any,
    key: PRNGKeyArray,
    rounds: int,
    *,
    on_round: Callable[[RoundStats, FederatedServer], None] | None = None,
    workers: int | None = None,
    max_empty_rounds: int = 10,
    compilation_cache_dir: str | Path | None = None,
    **options: Any,
) -> ServerApp:
    """Build the Flower ServerApp of a federation.

    Args:
        alg: the algorithm; it must be the same as the workers'.
        params: initial model, a pytree or a flat vector [p].
        key: PRNG key of the run, as in `laqjax.run`.
        rounds: total number of rounds, rounds before a checkpoint included.
        on_round: function called after each round with its stats and the server.
        workers: number of workers to wait for before the first round (None: all).
        max_empty_rounds: number of deadlines without a valid reply after which the run fails.
        compilation_cache_dir: folder for compiled programs.
        **options: further arguments of `FederatedServer`: `round_timeout`, `min_replies`, `max_absent_rounds`,
            `checkpoint_path`, `outlier_factor`, `max_rejections`, `authenticated_nodes`, `release_workers`.

    Returns:
        The app.
    """
    _protocol.enable_compilation_cache(compilation_cache_dir)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server = FederatedServer(alg, params, key, **options)
        for stats in server.run(grid, rounds, workers=workers, max_empty_rounds=max_empty_rounds):
            if on_round is not None:
                on_round(stats, server)

    return app
