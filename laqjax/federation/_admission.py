"""Admission of replies: validation of each message, and a check for outliers among the messages of a round."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from flwr.app import Message, MessageType
from jaxtyping import Array

from laqjax._core.round import Algorithm
from laqjax._core.wire_format import decode_message, read_payload
from laqjax.compressors import identity
from laqjax.federation import _protocol
from laqjax.federation._polling import ReplyPoller
from laqjax.federation._roster import Rejection, Roster, describe_error, register_node
from laqjax.types import Compressor

MAX_LOSS = float(np.finfo(np.float32).max)
MAX_FACT = 1e6  # seconds, and gradient evaluations
MIN_KNOWN_WORKERS = 3  # fewest workers whose median tells an outlier


class AcceptedReply(NamedTuple):
    """Reply that passed validation."""

    node: int  # the sender
    header: _protocol.ReplyHeader
    decoded: Any  # message [p]; None if the worker is silent or out of sync
    magnitude: float  # largest absolute value of the message; 0 without one


class ExpectedReply(NamedTuple):
    """Values that the next reply of one worker must have."""

    session: int
    round: int
    scheme: bytes
    worker: int
    accepted: _protocol.UploadId  # last accepted upload of the worker
    is_due: bool  # whether the worker received a broadcast and has not replied yet


@jax.jit
def _decode(compressor: Compressor, payload: Any, like: Array) -> Array:
    """Decode a message as one compiled program."""
    return decode_message(compressor, payload, like)


def validate_reply(
    alg: Algorithm, params: Array, reply: Message, expected: ExpectedReply | None
) -> AcceptedReply | Rejection:
    """Check and decode one reply.

    Args:
        alg: the algorithm.
        params: model [p], for the shape and dtype of a message.
        reply: the reply.
        expected: values that the reply must have; None if the sender is not registered.

    Returns:
        The accepted reply, or why it is rejected.
    """
    node = reply.metadata.src_node_id
    if expected is None:
        return Rejection(node, "sender is not registered: must be a node that has answered a hello message")
    if reply.has_error():
        return Rejection(node, describe_error(reply))
    try:
        header, parts = _protocol.parse_message(_protocol.ReplyHeader, reply)
        body, decoded, magnitude = parts.get("body", b""), None, 0.0
        reason = _find_fault(header, body, expected, alg.memory.is_persistent)
        if reason is None and header.kind in (_protocol.REPLY_UPLOAD, _protocol.REPLY_FULL):
            compressor = identity() if header.kind == _protocol.REPLY_FULL else alg.compressor
            decoded = _decode(compressor, read_payload(compressor, body, params), params)
            magnitude = float(np.max(np.abs(np.asarray(decoded)), initial=0.0))
            if not np.isfinite(magnitude):
                reason = "numbers with NaN or infinity: must be finite"
    except ValueError as error:
        return Rejection(node, str(error))
    return AcceptedReply(node, header, decoded, magnitude) if reason is None else Rejection(node, reason)


@dataclass
class Admission:
    """Replies of one round, validated as they arrive.

    alg: the algorithm.
    params: model [p], for the shape and dtype of a message.
    roster: table of the nodes; answers to hello messages add to it.
    expected: node id -> values that its reply must have, for all registered nodes.
    asked: id of a broadcast of this round -> its worker.
    accepted: accepted replies of workers in sync, by worker.
    rejections: rejected messages.
    replied: workers that replied to a broadcast of this round, even if the reply was rejected.
    late: workers that replied to a broadcast of an earlier round.
    bytes_up: size of the replies of each worker as Flower serializes them, rejected ones included.
    seconds: time spent in validation.
    """

    alg: Algorithm
    params: Array
    roster: Roster
    expected: dict[int, ExpectedReply]
    asked: dict[str, int]
    accepted: dict[int, AcceptedReply] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)
    replied: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    bytes_up: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0

    def receive(
        self, poller: ReplyPoller, min_replies: int, timeout: float, send_again: Callable[[set[int]], None]
    ) -> None:
        """Receive replies until none is waited for or the deadline is over, and then those that have arrived by then.

        Nothing is waited for once `min_replies` are accepted. Unawaited workers are waited for only if there are no others.
        After half of the time, `send_again` is called once with the workers that are waited for: a node that is killed
        while it receives a message has lost it.
        """
        began, remaining = time.monotonic(), timeout
        end, again = began + timeout, began + timeout / 2
        asked = set(self.asked.values())
        awaited = asked - self.roster.find_unawaited_workers() or asked
        while remaining > 0:
            waiting = poller.waiting_nodes()
            due = {reply.worker for node, reply in self.expected.items() if reply.is_due and node in waiting}
            overdue = due & awaited if len(self.accepted) < min_replies else set()
            if overdue and time.monotonic() >= again:
                send_again(overdue)
                again = math.inf
            remaining = max(min(end, again) - time.monotonic(), 0.0) if overdue else 0.0
            for reply in poller.receive(remaining):
                self.admit(reply)

    def find_rejected_workers(self) -> set[int]:
        """Return the workers that replied to a broadcast of this round, but without a valid reply."""
        due = {reply.worker for reply in self.expected.values() if reply.is_due}
        return self.replied & due

    def admit(self, reply: Message) -> None:
        """Validate one reply; whatever it holds, only this reply is rejected."""
        began, node = time.perf_counter(), reply.metadata.src_node_id
        try:
            result = self._check(reply)
        except Exception as error:
            result = Rejection(node, f"{type(error).__name__}: {error}")
        if isinstance(result, Rejection):
            self.rejections.append(result)
        elif result is not None:
            self.expected[node] = self.expected[node]._replace(is_due=False)
            if result.header.kind != _protocol.REPLY_OUT_OF_SYNC:
                self.accepted[result.header.worker] = result
        self.seconds += time.perf_counter() - began

    def _check(self, reply: Message) -> AcceptedReply | Rejection | None:
        """Return the accepted reply to a broadcast, None for a new node, or why the message is rejected."""
        expected = self.expected.get(reply.metadata.src_node_id)
        if expected is not None:
            self.bytes_up[expected.worker] += _protocol.get_serialized_size(reply)
        if reply.metadata.message_type == MessageType.QUERY:
            return register_node(self.roster, reply)
        if (worker := self.asked.get(reply.metadata.reply_to_message_id)) is not None:
            self.replied.add(worker)
        elif expected is not None:
            self.late.add(expected.worker)
        return validate_reply(self.alg, self.params, reply, expected)


def _find_fault(header: _protocol.ReplyHeader, body: bytes, expected: ExpectedReply, is_persistent: bool) -> str | None:
    """Return why a reply must be rejected before its body is decoded, or None."""
    notes = {"scheme": f"; {', '.join(_protocol.SCHEME_PARTS)} must be those of the server"}
    if header.round < expected.round:
        notes["round"] = "; the reply is late"
    for name in ("session", "round", "worker", "scheme"):
        found, value = getattr(header, name), getattr(expected, name)
        if found != value:
            return f"{name} = {found}: must be {value}{notes.get(name, '')}"
    if not expected.is_due:
        return "second reply, or reply without a broadcast: must be one reply to each broadcast"
    if header.kind == _protocol.REPLY_OUT_OF_SYNC:
        return None
    kinds = _protocol.REPLY_SILENT, _protocol.REPLY_UPLOAD, _protocol.REPLY_FULL
    if header.kind not in kinds or not abs(header.loss) <= MAX_LOSS:
        allowed = "{}, {} or {}".format(*kinds)
        return f"kind = {header.kind}, loss = {header.loss}: must be kind {allowed}, and a finite loss"
    facts = header.compute, header.pack, header.gradients
    if not all(0 <= fact <= MAX_FACT for fact in facts):
        return "compute = {}, pack = {}, gradients = {}: must be ".format(*facts) + f"from 0 to {MAX_FACT:g}"
    base = header.base, header.base_digest
    if header.kind != _protocol.REPLY_FULL and is_persistent and base != expected.accepted:
        return f"base = upload of round {header.base}: must be that of round {expected.accepted[0]}, the last accepted"
    digest = bytes(8) if header.kind == _protocol.REPLY_SILENT else _protocol.upload_id(body, header.round, base)[1]
    if header.size != len(body) or header.digest != digest or (body and header.kind == _protocol.REPLY_SILENT):
        return f"size = {header.size} for a body of {len(body)} bytes: must be the size of the body, with its digest"
    return None


def find_outliers(
    replies: dict[int, AcceptedReply], max_magnitudes: dict[int, float], factor: float
) -> dict[int, Rejection]:
    """Return a rejection for each message whose largest absolute value is an outlier, by worker.

    The limit is `factor` times the median over the workers of the largest value so far, or of this round for a worker
    without an accepted message. There is no limit before three workers have sent a message other than zeros: of two
    workers, neither can say which one is the outlier.

    Args:
        replies: replies of this round, by worker.
        max_magnitudes: largest absolute value that each worker has sent in earlier rounds.
        factor: factor of the limit.
    """
    sizes = {worker: reply.magnitude for worker, reply in replies.items() if reply.decoded is not None}
    known = [size for size in {**sizes, **max_magnitudes}.values() if size > 0]
    usual = statistics.median(known) if len(known) >= MIN_KNOWN_WORKERS else np.inf
    reason = "largest absolute value = {:.3g}: must be at most {:g} times the median {:.3g}"
    return {
        worker: Rejection(replies[worker].node, reason.format(size, factor, usual))
        for worker, size in sizes.items()
        if size > factor * usual
    }
