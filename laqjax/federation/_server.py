"""Server side of a federation: `FederatedServer` and the Flower ServerApp around it."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from jaxtyping import Array, PRNGKeyArray

from laqjax._core.round import Algorithm, server_step
from laqjax._core.wire_format import from_bytes, to_bytes
from laqjax.compressors import Identity
from laqjax.federation._protocol import (
    MODEL_DELTA,
    MODEL_FULL,
    MODEL_UNCHANGED,
    NO_UPLOAD,
    RECORD_KEY,
    REPLY_FULL,
    REPLY_OUT_OF_SYNC,
    REPLY_SILENT,
    REPLY_UPLOAD,
    BroadcastHeader,
    ReplyHeader,
    add_delta,
    down_compressor,
    enable_compilation_cache,
    make_record,
    parse_message,
    scheme_digest,
    serialized_size,
    short_digest,
    tree_to_bytes,
    upload_id,
    worker_keys,
)
from laqjax.types import (
    AlgorithmState,
    RoundContext,
    RoundKeys,
    ServerResult,
    UploadContext,
    max_abs,
)

log = logging.getLogger(__name__)


class RejectedReply(ValueError):
    """Error of a reply that the server rejects; its message gives the reason."""


@dataclass
class RoundStats:
    """Results and costs of one federation round.

    Arrays have shape [M], one entry for each worker. Fields that begin with `bits` are in bits, other sizes in bytes,
    times in seconds.
    """

    round: int
    loss: float  # mean over the workers that answered; NaN if none did
    bits_down: int  # as the library counts them (`info.bits_down`)
    answered: np.ndarray  # bool: the worker is in sync and its reply was accepted
    sent: np.ndarray  # bool: the accepted reply holds a message
    bits_up: np.ndarray  # as the library counts them (`info.bits_up`)
    gradients: np.ndarray  # gradient evaluations
    payload_up: np.ndarray  # message bodies without headers
    payload_down: np.ndarray  # model bodies without headers
    bytes_up: np.ndarray  # replies as Flower serializes them, rejected ones included
    bytes_down: np.ndarray  # broadcasts as Flower serializes them
    compute: np.ndarray  # the worker's step, as the worker reports it
    pack: np.ndarray  # packing the message into bytes, as the worker reports it
    transfer: float  # waiting for replies, less the work of the slowest worker
    decode: float  # checking the replies and the server's step
    refused: int  # rejected replies, answers to hello messages included

    @classmethod
    def empty(cls, round: int, workers: int) -> "RoundStats":
        """Create the stats of a round without broadcasts or replies."""
        zeros = lambda kind: np.zeros(workers, kind)  # noqa: E731
        arrays: Any = [zeros(kind) for kind in (*[bool] * 2, *[np.int64] * 6, *[np.float64] * 2)]
        return cls(round, np.nan, 0, *arrays, transfer=0.0, decode=0.0, refused=0)


@jax.jit
def _run_server_round(
    alg: Algorithm, state: AlgorithmState, total: Array, asked: Any, key: PRNGKeyArray
) -> ServerResult:
    """Run `server_step` and return its `ServerResult`."""
    shared = worker_keys(alg, key, state.round, alg.num_workers)[1]
    keys = RoundKeys(shared, shared, key, state.round, jnp.int32(alg.num_workers))
    return server_step(alg, state, total, asked, keys)


@jax.jit
def _accumulate(alg: Algorithm, total: Array, memory: Any, decoded: Array) -> tuple[Array, Any]:
    """Add one message to the sum of messages and to the worker's part of the aggregate.

    Returns:
        The new sum [p], and the worker's new part of the aggregate [p] (None if `memory` is None).
    """
    return total + decoded, None if memory is None else alg.memory.update_aggregate(memory, decoded)[1]


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

    def one(worker: Array, own: Any, sent: Array) -> tuple[Array, Any]:
        nothing, zero = jnp.zeros_like(state.params), jnp.zeros((), state.params.dtype)
        keys = RoundKeys(*worker_keys(alg, key, state.round, worker), key, state.round, worker)
        now = RoundContext(
            state.params, keys, alg.learning_rate_at(state.round), alg.num_workers, lambda *_, **__: nothing
        )
        known: dict[str, Any] = vars(now)
        evidence = UploadContext(**known, grad=nothing, target=nothing, decoded=nothing, target_sq=zero, innovation_sq=zero, error_sq=zero)  # fmt: skip
        decision = alg.rule.should_send(state.rule, own, evidence)
        return alg.rule.is_selected(state.rule, own, now), jax.tree.map(
            lambda a, b: jnp.where(sent, a, b), decision.if_sent, decision.if_silent
        )

    return jax.vmap(one)(jnp.arange(alg.num_workers, dtype=jnp.int32), own, sent)


class FederatedServer:
    """Server of a federation; `run` executes rounds, `run_round` a single one.

    For a memory that is persistent, the server also stores each worker's part of the aggregate: M p numbers. With them
    it can replace the part of a worker that lost its state. One checkpoint holds everything that the next round needs.
    """

    def __init__(
        self,
        alg: Algorithm,
        params: Any,
        key: PRNGKeyArray,
        *,
        round_timeout: float = 60.0,
        checkpoint_path: Path | None = None,
        outlier_factor: float = 1e3,
    ) -> None:
        """Initialize the server, or restore it from an existing checkpoint.

        Args:
            alg: the algorithm; it must be the same as the workers'.
            params: initial model, a pytree or a flat vector [p].
            key: PRNG key of the run, as in `laqjax.run`.
            round_timeout: seconds that a round waits for replies.
            checkpoint_path: file that is written after every round. If it exists, the server resumes from it.
            outlier_factor: a message is rejected if its largest absolute value exceeds this many times the median of
                the workers' largest values so far.

        Raises:
            ValueError: the checkpoint is damaged or belongs to another algorithm, or the key is not of JAX's default
                kind.
        """
        self.alg, self.round_timeout, self.checkpoint_path, self.outlier_factor = (
            alg,
            round_timeout,
            checkpoint_path,
            outlier_factor,
        )
        self.key, self.scheme, self.workers = key, scheme_digest(alg), range(alg.num_workers)
        self.key_bytes = np.asarray(jax.random.key_data(key)).tobytes()
        if len(self.key_bytes) != 8:
            raise ValueError(f"key of {len(self.key_bytes)} bytes: expected jax.random.key(seed) of JAX's default kind")
        state = alg.init(params)
        self.like = jax.ShapeDtypeStruct(state.params.shape, state.params.dtype)
        self.own, self.state = state.workers.rule, state._replace(workers=None)  # pyright: ignore[reportArgumentType]
        zeros = jnp.zeros_like(state.params) if alg.memory.is_persistent else None
        self.memories: list[Any] = [zeros for _ in self.workers]  # each worker's part of the aggregate
        self.accepted = [NO_UPLOAD for _ in self.workers]
        # the round whose model each worker is known to have; None if unknown
        self.model_rounds: list[int | None] = [None for _ in self.workers]
        self.max_magnitudes: dict[int, float] = {}  # worker -> largest absolute value that it has sent
        self.nodes: dict[int, int] = {}  # node id -> worker
        self.unassigned_nodes: set[int] = set()  # nodes whose worker id was rejected
        self.session, self.change, self.squares, self.refusals = time.time_ns(), b"", (0.0, 0.0), 0
        if checkpoint_path is not None and checkpoint_path.exists():
            self.restore(checkpoint_path)

    # -- membership

    def _hello_messages(self, grid: Grid) -> list[Message]:
        """Build a hello message for every new node and forget nodes that have left."""
        there = set(grid.get_node_ids())
        if self.nodes.keys() - there:  # a rejected node may now take the id of a lost one
            self.unassigned_nodes.clear()
        self.nodes = {node: worker for node, worker in self.nodes.items() if node in there}
        new = sorted(there - self.nodes.keys() - self.unassigned_nodes)
        return [Message(RecordDict(), node, MessageType.QUERY, ttl=self.round_timeout) for node in new]

    def _register_node(self, reply: Message) -> None:
        """Assign a node to the worker id in its answer to a hello message, or reject the node."""
        node = reply.metadata.src_node_id
        if reply.has_error():  # the node gets another hello message in the next round
            return self._log_rejection(node, f"its app failed: {reply.error.reason:.200}")
        found = reply.content.get(RECORD_KEY)
        worker = found.get("worker") if isinstance(found, ConfigRecord) else None
        if worker is not None and self.nodes.get(node) == worker:  # the node is already registered
            return
        if worker not in self.workers or isinstance(worker, bool) or worker in self.nodes.values():
            self.unassigned_nodes.add(node)
            self._log_rejection(
                node, f"it says that it is worker {worker!r:.20}: expected one of {self.workers} that is not there yet"
            )
        else:
            self.nodes[node] = int(worker)  # pyright: ignore[reportArgumentType]
            self.model_rounds[int(worker)] = None  # pyright: ignore[reportArgumentType]

    def wait_for_workers(self, grid: Grid, workers: int, max_missed_rounds: int) -> None:
        """Wait until `workers` workers are registered.

        Raises:
            RuntimeError: too few workers registered within `max_missed_rounds` deadlines.
        """
        end = time.monotonic() + max_missed_rounds * self.round_timeout
        while len(self.nodes) < workers:
            for reply in self._send_and_receive(grid, self._hello_messages(grid)):
                self._register_node(reply)
            if len(self.nodes) < workers:
                if time.monotonic() > end:
                    raise RuntimeError(f"{len(self.nodes)} workers came: expected {workers}; are their nodes running?")
                time.sleep(min(1.0, self.round_timeout))

    def _send_and_receive(self, grid: Grid, messages: list[Message]) -> list[Message]:
        """Send messages and return the replies that arrive before the deadline."""
        return list(grid.send_and_receive(messages, timeout=self.round_timeout)) if messages else []

    def _log_rejection(self, node: int, reason: str) -> None:
        """Count a rejected message and log the reason."""
        self.refusals += 1
        log.warning("worker %s (node %s) refused: %s", self.nodes.get(node, "?"), node, reason)

    # -- one round

    def _make_broadcast(self, node: int, reads: bytes) -> Message:
        """Build the broadcast to one node, with only the parts that its worker lacks.

        Args:
            node: id of the node.
            reads: digest of the current model and of the rule's shared state.

        Returns:
            The message for the node.
        """
        worker, round = self.nodes[node], int(self.state.round)
        near = self.model_rounds[worker] == round - 1
        model = MODEL_DELTA if near and self.change else MODEL_FULL
        body = self.change if model == MODEL_DELTA else tree_to_bytes(self.state.params)
        history = MODEL_DELTA if near else MODEL_FULL
        if self.model_rounds[worker] == round:
            model, history, body = MODEL_UNCHANGED, MODEL_UNCHANGED, b""
        shared = tree_to_bytes(self.state.rule) if history == MODEL_FULL else b""
        head = BroadcastHeader(
            self.session, round, worker, model, history, *self.accepted[worker], reads, self.key_bytes, *self.squares
        )
        # the ttl lets Flower drop an expired broadcast, so that a slow node does not build up a backlog
        content, group = make_record(head, body=body, history=shared), str(round)
        return Message(content, node, MessageType.TRAIN, group_id=group, ttl=self.round_timeout)

    def run_round(self, grid: Grid) -> RoundStats | None:
        """Run one round.

        Returns:
            The stats of the round. None if no selected worker answered, and either all workers were selected or no
            node is registered. In that case the state is unchanged, and the next call repeats the round.
        """
        refusals, facts = self.refusals, RoundStats.empty(int(self.state.round), len(self.workers))
        greetings = self._hello_messages(grid)
        messages, all_asked = self._make_broadcasts()
        for node, message in messages.items():
            worker, content = self.nodes[node], message.content.config_records[RECORD_KEY]
            facts.bytes_down[worker], facts.payload_down[worker] = serialized_size(message), len(content.get("body", b""))  # pyright: ignore[reportArgumentType]  # fmt: skip
        began = time.perf_counter()
        replies = self._send_and_receive(grid, [*messages.values(), *greetings])
        facts.transfer, began = time.perf_counter() - began, time.perf_counter()
        taken = self._collect_replies(replies, messages, facts)
        self._drop_outliers(taken)
        answered = {worker: pair for worker, pair in sorted(taken.items()) if pair[0].kind != REPLY_OUT_OF_SYNC}
        for node in messages:
            self.model_rounds[self.nodes[node]] = facts.round if self.nodes[node] in answered else None
        if not answered and (all_asked or not self.nodes):
            return None
        self._fill_stats(facts, answered)
        self.step(answered, facts)
        jax.block_until_ready(self.state)
        facts.decode, facts.refused = time.perf_counter() - began, self.refusals - refusals
        if self.checkpoint_path is not None:
            self.save(self.checkpoint_path)
        return facts

    def _make_broadcasts(self) -> tuple[dict[int, Message], bool]:
        """Build the broadcasts of this round.

        Returns:
            A dictionary from the nodes of the selected workers to their messages, and whether all workers are selected.
        """
        asked = np.ones(len(self.workers), bool)
        if self.alg.rule.server_selects:
            asked = np.asarray(
                _select_workers(self.alg, self.state, self.own, self.key, jnp.zeros(len(asked), bool))[0]
            )
        reads = short_digest(tree_to_bytes((self.state.params, self.state.rule)))
        messages = {node: self._make_broadcast(node, reads) for node, worker in self.nodes.items() if asked[worker]}
        return messages, bool(asked.all())

    def _collect_replies(
        self, replies: Iterable[Message], messages: dict[int, Message], facts: RoundStats
    ) -> dict[int, Any]:
        """Validate replies, log the rejected ones, and register new nodes.

        Returns:
            A dictionary from worker to (header, decoded message [p] or None), for the accepted replies.
        """
        taken: dict[int, Any] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node in self.nodes:
                facts.bytes_up[self.nodes[node]] += serialized_size(reply)
            if reply.metadata.message_type == MessageType.QUERY:
                self._register_node(reply)
                continue
            try:
                worker, up, decoded = self._validate_reply(reply, messages, taken)
            except ValueError as error:
                self._log_rejection(node, str(error))
            else:
                taken[worker] = up, decoded
        return taken

    def _validate_reply(
        self, reply: Message, asked: Iterable[int], taken: dict[int, Any]
    ) -> tuple[int, ReplyHeader, Any]:
        """Check and decode one reply.

        Args:
            reply: the reply.
            asked: nodes that received a broadcast in this round.
            taken: replies accepted so far, by worker.

        Returns:
            The worker, the header, and the decoded message [p]. The message is None if the worker is silent or out of
            sync.

        Raises:
            ValueError: the reply is rejected.
        """
        node = reply.metadata.src_node_id
        if node not in self.nodes:
            raise RejectedReply("an unknown worker")
        if reply.has_error():
            raise RejectedReply(f"its app failed: {reply.error.reason:.200}")
        up, parts = parse_message(ReplyHeader, reply)
        worker, body = self.nodes[node], parts.get("body", b"")
        expected = {"session": self.session, "round": int(self.state.round), "worker": worker, "scheme": self.scheme}
        for name, value in expected.items():
            if getattr(up, name) != value:
                raise RejectedReply(
                    f"{name} {getattr(up, name)}: expected {value}" + (", it is late" if name == "round" else "")
                )
        if node not in asked or worker in taken:
            raise RejectedReply("a second reply, or one that nobody asked for")
        if up.kind == REPLY_OUT_OF_SYNC:
            return worker, up, None
        if up.kind not in (REPLY_SILENT, REPLY_UPLOAD, REPLY_FULL) or not np.isfinite(up.loss):
            raise RejectedReply(
                f"kind {up.kind}, loss {up.loss}: expected {REPLY_SILENT}, {REPLY_UPLOAD} or {REPLY_FULL}, and a finite loss"
            )
        if (
            up.kind != REPLY_FULL
            and self.alg.memory.is_persistent
            and (up.base, up.base_digest) != self.accepted[worker]
        ):
            raise RejectedReply(
                f"it stands on its upload of round {up.base}: expected that of {self.accepted[worker][0]}"
            )
        if up.kind == REPLY_SILENT:
            return worker, up, None
        if up.size != len(body) or up.digest != upload_id(body, up.round, (up.base, up.base_digest))[1]:
            raise RejectedReply(f"{len(body)} bytes billed as {up.size}: expected what was billed, and its digest")
        decoded = from_bytes(Identity() if up.kind == REPLY_FULL else self.alg.compressor, body, self.like)
        if not np.all(np.isfinite(np.asarray(decoded))):
            raise RejectedReply("numbers that are not finite")
        return worker, up, decoded

    def _drop_outliers(self, taken: dict[int, Any]) -> None:
        """Remove messages from `taken` whose largest absolute value is an outlier.

        The limit is `outlier_factor` times the median of the workers' largest values in earlier rounds. Before the
        first accepted message it is computed from the messages of this round.
        """
        sizes = {worker: float(max_abs(pair[1])) for worker, pair in taken.items() if pair[1] is not None}
        usual = [size for size in (self.max_magnitudes or sizes).values() if size > 0]
        for worker, size in sizes.items():
            if usual and size > self.outlier_factor * np.median(usual):
                node = next(node for node, there in self.nodes.items() if there == worker)
                self._log_rejection(node, f"numbers up to {size:.3g}: expected at most {self.outlier_factor:g} times the usual {np.median(usual):.3g}")  # fmt: skip
                del taken[worker]
            else:
                self.max_magnitudes[worker] = max(size, self.max_magnitudes.get(worker, 0.0))

    def _fill_stats(self, facts: RoundStats, answered: dict[int, Any]) -> None:
        """Fill the stats of a round from the accepted replies."""
        for worker, (up, decoded) in answered.items():
            facts.answered[worker], facts.sent[worker] = True, decoded is not None
            facts.bits_up[worker], facts.gradients[worker] = 8 * up.size, up.gradients
            facts.payload_up[worker] = up.size
            facts.compute[worker], facts.pack[worker] = up.compute, up.pack
        if answered:
            facts.loss = float(np.mean([up.loss for up, _ in answered.values()]))
        facts.transfer -= float((facts.compute + facts.pack).max())

    def step(self, answered: dict[int, Any], facts: RoundStats) -> None:
        """Run the server's step on the accepted messages, summed in worker order.

        Args:
            answered: worker -> (header, decoded message or None), sorted by worker.
            facts: stats of the round; this method sets `bits_down`.
        """
        uploads = {worker: pair for worker, pair in answered.items() if pair[1] is not None}
        total = jnp.zeros_like(self.state.params)
        again = [
            worker for worker, (up, _) in uploads.items() if up.kind == REPLY_FULL and self.memories[worker] is not None
        ]
        if again:  # a full upload replaces the worker's part of the aggregate
            for worker in again:
                self.memories[worker] = jnp.zeros_like(total)
            self.state = self.state._replace(aggregate=self.sum_of_memories())
        for worker, (up, decoded) in uploads.items():
            total, self.memories[worker] = _accumulate(self.alg, total, self.memories[worker], decoded)
            self.accepted[worker] = up.round, up.digest
        if self.alg.rule.server_selects:
            self.own = _select_workers(self.alg, self.state, self.own, self.key, jnp.asarray(facts.sent))[1]
        asked, before = np.int32(np.count_nonzero(facts.bytes_down)), self.state.params
        result = _run_server_round(self.alg, self.state, total, asked, self.key)
        self.state, facts.bits_down = result.state, 8 * int(result.bytes_down)
        self.squares = float(result.metrics["direction_sq"]), float(result.metrics["step_sq"])
        self.change, down = b"", down_compressor(self.alg)
        if down is not None:  # use the decoded message, so that server and workers hold the same model
            self.change = to_bytes(down, result.payload, self.like)
            self.state = self.state._replace(params=add_delta(before, from_bytes(down, self.change, self.like)))

    def sum_of_memories(self) -> Array:
        """Return the sum of the workers' parts, which equals the aggregate up to rounding."""
        total = jnp.zeros(self.like.shape, self.like.dtype)
        for memory in self.memories:
            total = add_delta(total, memory)
        return total

    # -- checkpoints

    def _checkpoint_tree(self) -> Any:
        """Build a pytree of everything that the next round needs."""
        accepted = [np.asarray(first, np.int32) for first, _ in self.accepted]
        digests = [np.frombuffer(second, np.uint8) for _, second in self.accepted]
        peaks = np.asarray([self.max_magnitudes.get(worker, -1.0) for worker in self.workers])
        about = np.frombuffer(self.scheme + self.key_bytes, np.uint8), np.asarray(self.session, np.int64)
        return about, self.state, self.memories, self.own, accepted, digests, peaks

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically: a crash leaves the old file or the complete new one."""
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(self._checkpoint_tree())))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def restore(self, path: Path) -> None:
        """Restore the server from a file that `save` wrote.

        Raises:
            ValueError: the file is damaged, or belongs to another algorithm, model or key.
        """
        like = self._checkpoint_tree()
        try:
            with path.open("rb") as opened, np.load(opened) as file:  # NumPy leaves a damaged file open
                leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
        except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it, or give another checkpoint") from None
        shapes = [
            [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in leaves] for leaves in (jax.tree.leaves(like), leaves)
        ]
        if shapes[0] != shapes[1] or not np.array_equal(leaves[0], like[0][0]):
            raise ValueError(
                f"{path} is of another algorithm, model or key: expected that of this run; give another file"
            )
        about, state, memories, self.own, accepted, digests, peaks = jax.tree.unflatten(
            jax.tree.structure(like), leaves
        )
        self.state, self.memories = jax.tree.map(jnp.asarray, (state, memories))
        self.accepted = [(int(first), second.tobytes()) for first, second in zip(accepted, digests, strict=True)]
        self.max_magnitudes = {worker: float(peak) for worker, peak in enumerate(peaks) if peak >= 0}
        self.session = max(self.session, int(about[1]) + 1)

    def run(
        self, grid: Grid, rounds: int, *, workers: int | None = None, max_missed_rounds: int = 10
    ) -> Iterator[RoundStats]:
        """Run rounds until the state has completed `rounds` of them, counted from round 0.

        Args:
            grid: the Flower grid.
            rounds: total number of rounds, rounds before a checkpoint included.
            workers: number of workers to wait for before the first round (None: all).
            max_missed_rounds: number of deadlines without an answer after which the run fails.

        Yields:
            The stats of each round, as soon as it is complete.

        Raises:
            RuntimeError: too few workers registered, or no worker answered, for `max_missed_rounds` deadlines.
        """
        self.wait_for_workers(grid, len(self.workers) if workers is None else workers, max_missed_rounds)
        missed = 0
        while int(self.state.round) < rounds:
            facts = self.run_round(grid)
            if facts is not None:
                missed = 0
                yield facts
            elif (missed := missed + 1) >= max_missed_rounds:
                raise RuntimeError(
                    f"nobody answered in round {int(self.state.round)}, {max_missed_rounds} times: see the log"
                )


def server_app(
    alg: Algorithm,
    params: Any,
    key: PRNGKeyArray,
    rounds: int,
    *,
    on_round: Callable[[RoundStats, FederatedServer], None] | None = None,
    workers: int | None = None,
    max_missed_rounds: int = 10,
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
        max_missed_rounds: number of deadlines without an answer after which the run fails.
        compilation_cache_dir: folder for compiled programs.
        **options: further arguments of `FederatedServer`: `round_timeout`, `checkpoint_path`, `outlier_factor`.

    Returns:
        The app.
    """
    enable_compilation_cache(compilation_cache_dir)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server = FederatedServer(alg, params, key, **options)
        for facts in server.run(grid, rounds, workers=workers, max_missed_rounds=max_missed_rounds):
            if on_round is not None:
                on_round(facts, server)

    return app
