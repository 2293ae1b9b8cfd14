"""Assignment of Flower nodes to workers: hello messages and their answers."""

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo

from laqjax.federation._protocol import RECORD_KEY, differing_parts

log = logging.getLogger(__name__)
RETRY_INTERVAL = 60.0  # seconds after which a rejected node gets another hello message
FAILURE_INTERVAL = 2.0  # likewise, after an error


class Rejection(NamedTuple):
    """Message that the server ignores."""

    node: int  # the sender
    reason: str


@dataclass
class Roster:
    """Table of the nodes and the workers that they run.

    workers: ids of all workers.
    scheme: digests of the server's settings.
    owners: key of the node that owns each worker id, as `hash_node_key` returns it; b"" if none does.
    uses_keys: whether the nodes have keys of their own.
    max_absent_rounds: rounds in a row in which a worker may be absent before the server waits for it no more.
    nodes: node id -> worker.
    keys: key of each node that is there and has one.
    greeted: node id -> id of the hello message that it has not answered yet.
    rejected_until: rejected node -> time from which it may get a hello message again.
    model_rounds: worker -> round whose model it is known to have; None if unknown.
    absent: rounds in a row in which each worker was absent: it did not answer the broadcast.
    rejected: rounds in a row in which the reply of each worker was rejected.
    """

    workers: range
    scheme: bytes
    owners: list[bytes]
    uses_keys: bool
    max_absent_rounds: int
    nodes: dict[int, int] = field(default_factory=dict)
    keys: dict[int, bytes] = field(default_factory=dict)
    greeted: dict[int, str] = field(default_factory=dict)
    rejected_until: dict[int, float] = field(default_factory=dict)
    model_rounds: dict[int, int | None] = field(default_factory=dict)
    absent: Counter[int] = field(default_factory=Counter)
    rejected: Counter[int] = field(default_factory=Counter)

    def find_unawaited_workers(self) -> set[int]:
        """Return the workers that the server does not wait for."""
        return {worker for worker, count in self.absent.items() if count >= self.max_absent_rounds}

    def find_skipped_nodes(self, waiting: Container[int]) -> set[int]:
        """Return the nodes that get no broadcast: those of unawaited workers whose last one has not expired.

        If the server waits for no worker, each of them gets a broadcast.
        """
        unawaited = self.find_unawaited_workers()
        skipped = {node for node, worker in self.nodes.items() if worker in unawaited and node in waiting}
        return set() if unawaited.issuperset(self.nodes.values()) else skipped

    def count_absent(self, selected: Iterable[int], replied: Container[int], late: Container[int]) -> list[int]:
        """Count the round for the selected workers that were absent, and return those that the server waits for no more.

        The server waits in the next round for a worker whose late reply to an earlier round arrived.
        """
        before = self.find_unawaited_workers()
        for worker in selected:
            count = 0 if worker in replied else self.absent[worker] + 1
            self.absent[worker] = min(count, self.max_absent_rounds - 1) if worker in late else count
        return sorted(self.find_unawaited_workers() - before)

    def count_rejected(self, replied: Iterable[int], rejected: Container[int]) -> None:
        """Count the round for the workers whose reply was rejected; an accepted reply ends the count."""
        for worker in replied:
            self.rejected[worker] = self.rejected[worker] + 1 if worker in rejected else 0


def one_line(text: str, length: int = 220) -> str:
    """Return the beginning of a text from a node as one line of printable characters."""
    return "".join(char if char.isprintable() else "?" for char in text[:length])


def describe_error(reply: Message) -> str:
    """Return why a client app failed: the end of a long text, because Ray's frames come first."""
    reason = str(reply.error.reason)
    return f"the client app failed: {reason if len(reason) <= 170 else '... ' + reason[-166:]}"


def hash_node_key(public_key: bytes) -> bytes:
    """Return the SHA-256 of a node's public key; b"" if it has none, as in Flower's simulation."""
    return hashlib.sha256(public_key).digest() if public_key.startswith(b"-----BEGIN PUBLIC KEY") else b""


def make_hello_messages(
    roster: Roster, nodes: Iterable[NodeInfo], waiting: Container[int], timeout: float
) -> list[Message]:
    """Build a hello message for every new node, and remove nodes that have left from the roster.

    Args:
        roster: table of the nodes.
        nodes: all nodes that are there.
        waiting: nodes that have not answered their last message yet.
        timeout: seconds until a message expires.

    Returns:
        The messages.
    """
    roster.keys = {node.node_id: hash_node_key(node.public_key) if roster.uses_keys else b"" for node in nodes}
    there, now = roster.keys.keys(), time.monotonic()
    if roster.nodes.keys() - there:  # a rejected node may now take the id of a lost one
        roster.rejected_until.clear()
    roster.nodes = {node: worker for node, worker in roster.nodes.items() if node in there}
    new = [node for node in sorted(there - roster.nodes.keys()) if node not in waiting]
    new = [node for node in new if roster.rejected_until.get(node, now) <= now]
    return [Message(RecordDict(), node, MessageType.QUERY, ttl=timeout) for node in new]


def register_node(roster: Roster, reply: Message) -> Rejection | None:
    """Assign a node to a worker after its answer to a hello message, or return why it is rejected.

    A node whose key owns a worker id gets this id, whatever it claims. Another node gets the id that it claims, unless
    a node that is there has it or a key owns it. From then on, the node's key owns the id.
    """
    metadata = reply.metadata
    node, key = metadata.src_node_id, roster.keys.get(metadata.src_node_id, b"")
    if reply.has_error():
        roster.rejected_until[node] = time.monotonic() + FAILURE_INTERVAL
        return Rejection(node, describe_error(reply))
    found = reply.content.get(RECORD_KEY)
    hello: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
    claimed, scheme = hello.get("worker"), hello.get("scheme", b"")
    if claimed is not None and roster.nodes.get(node) == claimed:  # the node is already registered
        return None
    if roster.greeted.pop(node, None) != metadata.reply_to_message_id:
        return Rejection(node, "answer to no hello message: must be one answer to each hello message")
    roster.rejected_until[node] = time.monotonic() + RETRY_INTERVAL
    if parts := differing_parts(scheme if isinstance(scheme, bytes) else b"", roster.scheme):
        return Rejection(node, f"other settings of {', '.join(parts)}: must be those of the server")
    worker = roster.owners.index(key) if key and key in roster.owners else claimed
    if worker not in roster.workers or isinstance(worker, bool) or worker in roster.nodes.values():
        return Rejection(node, f"worker = {worker!r:.20}: must be in {roster.workers}, and not registered already")
    assigned = int(worker)  # pyright: ignore[reportArgumentType]
    if roster.owners[assigned] not in (b"", key):
        reason = "must be another, because the key of another node owns it; the server can release it (release_workers)"
        return Rejection(node, f"worker = {assigned}: {reason}")
    if claimed != assigned:
        log.warning("node %s claims worker %.20r: its key owns worker %s, and it stays that", node, claimed, assigned)
    roster.nodes[node], roster.owners[assigned] = assigned, key
    roster.model_rounds[assigned] = None
    del roster.rejected_until[node]
    return None
