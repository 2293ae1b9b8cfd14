"""Assignment of Flower nodes to workers: hello messages and their answers."""

from collections import Counter
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from laqjax.federation._protocol import RECORD_KEY


class Rejection(NamedTuple):
    """Message that the server ignores."""

    node: int  # the sender
    reason: str


@dataclass
class Roster:
    """Table of the nodes and the workers that they run.

    workers: ids of all workers.
    nodes: node id -> worker.
    unassigned_nodes: nodes whose worker id was rejected.
    model_rounds: worker -> round whose model it is known to have; None if unknown.
    max_absent_rounds: rounds in a row that a worker may miss before it is absent.
    missed: rounds in a row that each worker has missed.
    """

    workers: range
    nodes: dict[int, int] = field(default_factory=dict)
    unassigned_nodes: set[int] = field(default_factory=set)
    model_rounds: dict[int, int | None] = field(default_factory=dict)
    max_absent_rounds: int = 3
    missed: Counter[int] = field(default_factory=Counter)

    def absent_workers(self) -> set[int]:
        """Return the workers that the server does not wait for."""
        return {worker for worker, missed in self.missed.items() if missed >= self.max_absent_rounds}

    def count_missed(self, selected: Iterable[int], answered: Container[int], late: Container[int]) -> list[int]:
        """Count the round for the selected workers that missed it, and return those that became absent with it.

        A worker whose late answer to an earlier round arrived is waited for in the next round.
        """
        before = self.absent_workers()
        for worker in selected:
            missed = 0 if worker in answered else self.missed[worker] + 1
            self.missed[worker] = min(missed, self.max_absent_rounds - 1) if worker in late else missed
        return sorted(self.absent_workers() - before)


def make_hello_messages(
    roster: Roster, node_ids: Iterable[int], waiting: Container[int], timeout: float
) -> list[Message]:
    """Build a hello message for every new node, and remove nodes that have left from the roster.

    Args:
        roster: table of the nodes.
        node_ids: all nodes that are there.
        waiting: nodes that have not answered their last message yet.
        timeout: seconds until a message expires.

    Returns:
        The messages.
    """
    there = set(node_ids)
    if roster.nodes.keys() - there:  # a rejected node may now take the id of a lost one
        roster.unassigned_nodes.clear()
    roster.nodes = {node: worker for node, worker in roster.nodes.items() if node in there}
    new = sorted(there - roster.nodes.keys() - roster.unassigned_nodes)
    return [Message(RecordDict(), node, MessageType.QUERY, ttl=timeout) for node in new if node not in waiting]


def register_node(roster: Roster, reply: Message) -> Rejection | None:
    """Assign a node to the worker id in its answer to a hello message, or return why it is rejected."""
    node = reply.metadata.src_node_id
    if reply.has_error():  # the node gets another hello message in the next round
        return Rejection(node, f"the client app failed: {reply.error.reason}")
    found = reply.content.get(RECORD_KEY)
    worker = found.get("worker") if isinstance(found, ConfigRecord) else None
    if worker is not None and roster.nodes.get(node) == worker:  # the node is already registered
        return None
    if worker not in roster.workers or isinstance(worker, bool) or worker in roster.nodes.values():
        roster.unassigned_nodes.add(node)
        return Rejection(node, f"worker = {worker!r:.20}: must be in {roster.workers}, and not registered already")
    roster.nodes[node] = assigned = int(worker)  # pyright: ignore[reportArgumentType]
    roster.model_rounds[assigned] = None
    return None
