"""The server of a federation, round by round; the protocol is in `laqjax.flower`."""

import logging
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from jaxtyping import Array, PRNGKeyArray

from laqjax.compressors import Identity
from laqjax.messages import (
    BEHIND,
    CHANGE,
    FULL,
    NAME,
    NEVER,
    SAME,
    SENT,
    SILENT,
    WHOLE,
    Down,
    Up,
    digest,
    down_compressor,
    draws,
    message_bytes,
    moved,
    name_of,
    opened,
    packed,
    record,
    scheme,
)
from laqjax.step import Algorithm, server_step
from laqjax.types import Evidence, Keys, Round, State
from laqjax.wire import from_bytes, to_bytes

log = logging.getLogger(__name__)


class Refused(ValueError):
    """A message that the server does not take, and why."""


@dataclass
class Facts:
    """What a round did and cost; arrays are [M], sizes in bytes, times in seconds."""

    round: int
    loss: float  # mean over those that answered
    bits_down: int  # as the library bills them: one broadcast
    answered: np.ndarray
    sent: np.ndarray
    bits_up: np.ndarray  # as the library bills them
    gradients: np.ndarray
    payload_up: np.ndarray  # of the messages without heads
    payload_down: np.ndarray
    bytes_up: np.ndarray  # of the messages as Flower serialises them, refused ones too
    bytes_down: np.ndarray
    compute: np.ndarray
    pack: np.ndarray
    transfer: float  # waiting for replies, less the slowest worker's work
    decode: float
    refused: int

    @classmethod
    def empty(cls, round: int, workers: int) -> "Facts":
        """Of a round in which nothing happened."""
        zeros = lambda kind: np.zeros(workers, kind)  # noqa: E731
        arrays: Any = [zeros(kind) for kind in (*[bool] * 2, *[np.int64] * 6, *[np.float64] * 2)]
        return cls(round, np.nan, 0, *arrays, transfer=0.0, decode=0.0, refused=0)


class Tap:
    """A compressor that keeps what it encoded."""

    def __init__(self, compressor: Any) -> None:
        self.inner, self.payload = compressor, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def encode(self, target, keys):
        self.payload = self.inner.encode(target, keys)
        return self.payload


@jax.jit
def server_round(alg: Algorithm, state: State, total: Array, asked: Any, key: PRNGKeyArray) -> Any:
    """(state, bytes down, payload of the change of the model, ||direction||^2, ||step||^2) of `server_step`."""
    shared = draws(alg, key, state.round, alg.num_workers)[1]
    keys = Keys(shared, shared, key, state.round, jnp.int32(alg.num_workers))
    tap = Tap(down_compressor(alg))
    if tap.inner is not None:
        alg = replace(alg, downlink=replace(alg.downlink, compressor=tap))  # pyright: ignore[reportArgumentType]
    after, size, facts = server_step(alg, state, total, asked, keys)
    return after, size, tap.payload, facts["direction_sq"], facts["step_sq"]


@jax.jit
def absorbed(alg: Algorithm, total: Array, memory: Any, decoded: Array) -> tuple[Array, Any]:
    """(total, what the aggregate holds of a worker) with one more message of it."""
    return total + decoded, None if memory is None else alg.memory.aggregate(memory, decoded)[1]


@jax.jit
def asked_of(alg: Algorithm, state: State, own: Any, key: PRNGKeyArray, sent: Any) -> tuple[Array, Any]:
    """(whom the rule asks [M], what it keeps of each worker after a round in which `sent` [M] did).

    A rule by which the server decides, decides on what the server knows; the gradients in its evidence are zeros here.
    """

    def one(worker: Array, own: Any, sent: Array) -> tuple[Array, Any]:
        nothing, zero = jnp.zeros_like(state.params), jnp.zeros((), state.params.dtype)
        keys = Keys(*draws(alg, key, state.round, worker), key, state.round, worker)
        now = Round(state.params, keys, alg.step_size(state.round), alg.num_workers, lambda *_, **__: nothing)
        known: dict[str, Any] = vars(now)
        evidence = Evidence(**known, grad=nothing, target=nothing, decoded=nothing, target_sq=zero, innovation_sq=zero, error_sq=zero)  # fmt: skip
        _, after, silent = alg.rule.decide(state.rule, own, evidence)
        return alg.rule.asked(state.rule, own, now), jax.tree.map(lambda a, b: jnp.where(sent, a, b), after, silent)

    return jax.vmap(one)(jnp.arange(alg.num_workers, dtype=jnp.int32), own, sent)


class Federation:
    """The server, round by round: `round(grid)`. What it keeps is all in one checkpoint: the state, and M p numbers, what the
    aggregate holds of each worker, so that one that lost its memory can begin anew.
    """

    def __init__(
        self,
        alg: Algorithm,
        params: Any,
        key: PRNGKeyArray,
        *,
        deadline: float = 60.0,
        checkpoint: Path | None = None,
        absurd: float = 1e3,
    ) -> None:
        """Begin, or go on from a checkpoint.

        Args:
            alg: the algorithm.
            params: the model, a pytree or a flat vector [p].
            key: of the run, as `laqjax.run` takes it.
            deadline: seconds that a round waits for replies.
            checkpoint: a file, written after every round; where it is there, the run goes on from it.
            absurd: a message whose largest number is so many times the median of what workers sent is refused.

        Raises:
            ValueError: the checkpoint is of another algorithm or damaged, the key is not of JAX's default kind.
        """
        self.alg, self.deadline, self.checkpoint, self.absurd = alg, deadline, checkpoint, absurd
        self.key, self.scheme, self.workers = key, scheme(alg), range(alg.num_workers)
        self.key_bytes = np.asarray(jax.random.key_data(key)).tobytes()
        if len(self.key_bytes) != 8:
            raise ValueError(f"key of {len(self.key_bytes)} bytes: expected jax.random.key(seed) of JAX's default kind")
        state = alg.init(params)
        self.like = jax.ShapeDtypeStruct(state.params.shape, state.params.dtype)
        self.own, self.state = state.workers.rule, state._replace(workers=None)  # pyright: ignore[reportArgumentType]
        zeros = jnp.zeros_like(state.params) if alg.memory.persists else None
        self.memories: list[Any] = [zeros for _ in self.workers]  # what the aggregate holds of each
        self.accepted = [NEVER for _ in self.workers]
        self.holds: list[int | None] = [None for _ in self.workers]  # the round whose model a worker is known to have
        self.peaks: dict[int, float] = {}  # the largest number that each worker sent
        self.nodes: dict[int, int] = {}  # node id -> worker
        self.strangers: set[int] = set()
        self.session, self.change, self.squares, self.refusals = time.time_ns(), b"", (0.0, 0.0), 0
        if checkpoint is not None and checkpoint.exists():
            self.restore(checkpoint)

    # -- who is there

    def greetings(self, grid: Grid) -> list[Message]:
        """A question to each node that is new, and no memory of those that are gone."""
        there = set(grid.get_node_ids())
        if self.nodes.keys() - there:  # somebody may come in the place of who is gone
            self.strangers.clear()
        self.nodes = {node: worker for node, worker in self.nodes.items() if node in there}
        new = sorted(there - self.nodes.keys() - self.strangers)
        return [Message(RecordDict(), node, MessageType.QUERY, ttl=self.deadline) for node in new]

    def meet(self, reply: Message) -> None:
        """A node says which worker it is."""
        node = reply.metadata.src_node_id
        if reply.has_error():  # asked again in the next round
            return self.refuse(node, f"its app failed: {reply.error.reason:.200}")
        found = reply.content.get(NAME)
        worker = found.get("worker") if isinstance(found, ConfigRecord) else None
        if worker is not None and self.nodes.get(node) == worker:  # it has said so before
            return
        if worker not in self.workers or isinstance(worker, bool) or worker in self.nodes.values():
            self.strangers.add(node)
            self.refuse(
                node, f"it says that it is worker {worker!r:.20}: expected one of {self.workers} that is not there yet"
            )
        else:
            self.nodes[node] = int(worker)  # pyright: ignore[reportArgumentType]
            self.holds[int(worker)] = None  # pyright: ignore[reportArgumentType]

    def gather(self, grid: Grid, workers: int, patience: int) -> None:
        """Wait until so many workers are there. RuntimeError after `patience` deadlines."""
        end = time.monotonic() + patience * self.deadline
        while len(self.nodes) < workers:
            for reply in self.ask(grid, self.greetings(grid)):
                self.meet(reply)
            if len(self.nodes) < workers:
                if time.monotonic() > end:
                    raise RuntimeError(f"{len(self.nodes)} workers came: expected {workers}; are their nodes running?")
                time.sleep(min(1.0, self.deadline))

    def ask(self, grid: Grid, messages: list[Message]) -> list[Message]:
        """What is answered before the deadline."""
        return list(grid.send_and_receive(messages, timeout=self.deadline)) if messages else []

    def refuse(self, node: int, reason: str) -> None:
        """One line in the log."""
        self.refusals += 1
        log.warning("worker %s (node %s) refused: %s", self.nodes.get(node, "?"), node, reason)

    # -- a round

    def broadcast(self, node: int, reads: bytes) -> Message:
        """What a worker gets: only what it does not have."""
        worker, round = self.nodes[node], int(self.state.round)
        near = self.holds[worker] == round - 1
        model = CHANGE if near and self.change else WHOLE
        body = self.change if model == CHANGE else packed(self.state.params)
        history = CHANGE if near else WHOLE
        if self.holds[worker] == round:
            model, history, body = SAME, SAME, b""
        shared = packed(self.state.rule) if history == WHOLE else b""
        head = Down(
            self.session, round, worker, model, history, *self.accepted[worker], reads, self.key_bytes, *self.squares
        )
        # past its deadline Flower need not deliver it: a slow node does not fall behind further and further
        content, group = record(head, body=body, history=shared), str(round)
        return Message(content, node, MessageType.TRAIN, group_id=group, ttl=self.deadline)

    def round(self, grid: Grid) -> Facts | None:
        """One round; None where all were asked and nobody answered: then nothing has changed, and the round comes again."""
        refusals, facts = self.refusals, Facts.empty(int(self.state.round), len(self.workers))
        greetings = self.greetings(grid)
        messages, all_asked = self.broadcasts()
        for node, message in messages.items():
            worker, content = self.nodes[node], message.content.config_records[NAME]
            facts.bytes_down[worker], facts.payload_down[worker] = message_bytes(message), len(content.get("body", b""))  # pyright: ignore[reportArgumentType]
        began = time.perf_counter()
        replies = self.ask(grid, [*messages.values(), *greetings])
        facts.transfer, began = time.perf_counter() - began, time.perf_counter()
        taken = self.listen(replies, messages, facts)
        self.drop_absurd(taken)
        answered = {worker: pair for worker, pair in sorted(taken.items()) if pair[0].kind != BEHIND}
        for node in messages:
            self.holds[self.nodes[node]] = facts.round if self.nodes[node] in answered else None
        if not answered and (all_asked or not self.nodes):
            return None
        self.write(facts, answered)
        self.step(answered, facts)
        jax.block_until_ready(self.state)
        facts.decode, facts.refused = time.perf_counter() - began, self.refusals - refusals
        if self.checkpoint is not None:
            self.save(self.checkpoint)
        return facts

    def broadcasts(self) -> tuple[dict[int, Message], bool]:
        """(what goes to the nodes of the workers that are asked, whether that are all workers)."""
        asked = np.ones(len(self.workers), bool)
        if self.alg.rule.server_decides:
            asked = np.asarray(asked_of(self.alg, self.state, self.own, self.key, jnp.zeros(len(asked), bool))[0])
        reads = digest(packed((self.state.params, self.state.rule)))
        messages = {node: self.broadcast(node, reads) for node, worker in self.nodes.items() if asked[worker]}
        return messages, bool(asked.all())

    def listen(self, replies: Iterable[Message], messages: dict[int, Message], facts: Facts) -> dict[int, Any]:
        """Worker -> (head, decoded message or None), of the replies that are taken."""
        taken: dict[int, Any] = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            if node in self.nodes:
                facts.bytes_up[self.nodes[node]] += message_bytes(reply)
            if reply.metadata.message_type == MessageType.QUERY:
                self.meet(reply)
                continue
            try:
                worker, up, decoded = self.take(reply, messages, taken)
            except ValueError as error:
                self.refuse(node, str(error))
            else:
                taken[worker] = up, decoded
        return taken

    def take(self, reply: Message, asked: Iterable[int], taken: dict[int, Any]) -> tuple[int, Up, Any]:
        """(worker, head, decoded message or None) of a reply; ValueError where it is refused."""
        node = reply.metadata.src_node_id
        if node not in self.nodes:
            raise Refused("an unknown worker")
        if reply.has_error():
            raise Refused(f"its app failed: {reply.error.reason:.200}")
        up, parts = opened(Up, reply)
        worker, body = self.nodes[node], parts.get("body", b"")
        expected = {"session": self.session, "round": int(self.state.round), "worker": worker, "scheme": self.scheme}
        for name, value in expected.items():
            if getattr(up, name) != value:
                raise Refused(
                    f"{name} {getattr(up, name)}: expected {value}" + (", it is late" if name == "round" else "")
                )
        if node not in asked or worker in taken:
            raise Refused("a second reply, or one that nobody asked for")
        if up.kind == BEHIND:
            return worker, up, None
        if up.kind not in (SILENT, SENT, FULL) or not np.isfinite(up.loss):
            raise Refused(f"kind {up.kind}, loss {up.loss}: expected {SILENT}, {SENT} or {FULL}, and a finite loss")
        if up.kind != FULL and self.alg.memory.persists and (up.base, up.base_digest) != self.accepted[worker]:
            raise Refused(f"it stands on its upload of round {up.base}: expected that of {self.accepted[worker][0]}")
        if up.kind == SILENT:
            return worker, up, None
        if up.size != len(body) or up.digest != name_of(body, up.round, (up.base, up.base_digest))[1]:
            raise Refused(f"{len(body)} bytes billed as {up.size}: expected what was billed, and its digest")
        decoded = from_bytes(Identity() if up.kind == FULL else self.alg.compressor, body, self.like)
        if not np.all(np.isfinite(np.asarray(decoded))):
            raise Refused("numbers that are not finite")
        return worker, up, decoded

    def drop_absurd(self, taken: dict[int, Any]) -> None:
        """Without messages that are far larger than what others send."""
        sizes = {worker: float(jnp.max(jnp.abs(pair[1]))) for worker, pair in taken.items() if pair[1] is not None}
        usual = [size for size in (self.peaks or sizes).values() if size > 0]
        for worker, size in sizes.items():
            if usual and size > self.absurd * np.median(usual):
                node = next(node for node, there in self.nodes.items() if there == worker)
                self.refuse(node, f"numbers up to {size:.3g}: expected at most {self.absurd:g} times the usual {np.median(usual):.3g}")  # fmt: skip
                del taken[worker]
            else:
                self.peaks[worker] = max(size, self.peaks.get(worker, 0.0))

    def write(self, facts: Facts, answered: dict[int, Any]) -> None:
        """What the replies say of the round."""
        for worker, (up, decoded) in answered.items():
            facts.answered[worker], facts.sent[worker] = True, decoded is not None
            facts.bits_up[worker], facts.gradients[worker] = 8 * up.size, up.gradients
            facts.payload_up[worker] = up.size
            facts.compute[worker], facts.pack[worker] = up.compute, up.pack
        if answered:
            facts.loss = float(np.mean([up.loss for up, _ in answered.values()]))
        facts.transfer -= float((facts.compute + facts.pack).max())

    def step(self, answered: dict[int, Any], facts: Facts) -> None:
        """The server's step on what was sent, in the order of the workers."""
        uploads = {worker: pair for worker, pair in answered.items() if pair[1] is not None}
        total = jnp.zeros_like(self.state.params)
        again = [worker for worker, (up, _) in uploads.items() if up.kind == FULL and self.memories[worker] is not None]
        if again:  # what they send takes the place of what the aggregate holds of them
            for worker in again:
                self.memories[worker] = jnp.zeros_like(total)
            self.state = self.state._replace(aggregate=self.sum_of_memories())
        for worker, (up, decoded) in uploads.items():
            total, self.memories[worker] = absorbed(self.alg, total, self.memories[worker], decoded)
            self.accepted[worker] = up.round, up.digest
        if self.alg.rule.server_decides:
            self.own = asked_of(self.alg, self.state, self.own, self.key, jnp.asarray(facts.sent))[1]
        asked, before = np.int32(np.count_nonzero(facts.bytes_down)), self.state.params
        self.state, size, payload, *squares = server_round(self.alg, self.state, total, asked, self.key)
        facts.bits_down, self.squares = 8 * int(size), tuple(float(square) for square in squares)
        self.change, down = b"", down_compressor(self.alg)
        if down is not None:  # the model is what the workers make of the message
            self.change = to_bytes(down, payload, self.like)
            self.state = self.state._replace(params=moved(before, from_bytes(down, self.change, self.like)))

    def sum_of_memories(self) -> Array:
        """What the aggregate is, up to rounding."""
        total = jnp.zeros(self.like.shape, self.like.dtype)
        for memory in self.memories:
            total = moved(total, memory)
        return total

    # -- what is kept

    def kept(self) -> Any:
        """All that the next round needs."""
        accepted = [np.asarray(first, np.int32) for first, _ in self.accepted]
        digests = [np.frombuffer(second, np.uint8) for _, second in self.accepted]
        peaks = np.asarray([self.peaks.get(worker, -1.0) for worker in self.workers])
        about = np.frombuffer(self.scheme + self.key_bytes, np.uint8), np.asarray(self.session, np.int64)
        return about, self.state, self.memories, self.own, accepted, digests, peaks

    def save(self, path: Path) -> None:
        """A file that is whole or the one before."""
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(self.kept())))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def restore(self, path: Path) -> None:
        """From such a file."""
        like = self.kept()
        try:
            with np.load(path) as file:
                leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
        except (OSError, ValueError, EOFError, KeyError) as error:
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
        self.peaks = {worker: float(peak) for worker, peak in enumerate(peaks) if peak >= 0}
        self.session = max(self.session, int(about[1]) + 1)

    def run(self, grid: Grid, rounds: int, *, workers: int | None = None, patience: int = 10) -> Iterator[Facts]:
        """Rounds up to number `rounds`, each as soon as it is done.

        Raises:
            RuntimeError: too few workers came, or nobody answered, `patience` deadlines long.
        """
        self.gather(grid, len(self.workers) if workers is None else workers, patience)
        missed = 0
        while int(self.state.round) < rounds:
            facts = self.round(grid)
            if facts is not None:
                missed = 0
                yield facts
            elif (missed := missed + 1) >= patience:
                raise RuntimeError(f"nobody answered in round {int(self.state.round)}, {patience} times: see the log")
