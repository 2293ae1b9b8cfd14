"""Flower grid in one process, for tests and for experiments on one machine.

The grid calls the ClientApp directly. It serializes, counts and parses every message.

`downlink_fault` and `uplink_fault` inject faults. Each function receives a message and returns the messages that arrive
now: none (lost), two (duplicated), a different one (damaged), or one from an earlier call (late, reordered).
"""

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from laqjax.federation import _protocol

__all__ = ["FaultInjector", "InProcessGrid", "no_fault"]


FaultInjector = Callable[[Message], Iterable[Message]]


def no_fault(message: Message) -> list[Message]:
    """Return the message unchanged."""
    return [message]


class InProcessGrid(Grid):
    """Flower grid whose nodes live in this process; worker m runs on node 100 + m.

    client: the ClientApp of all workers.
    downlink_fault, uplink_fault: fault injectors for broadcasts and for replies.
    contexts: node id -> Flower context, with the worker's state.
    public_keys: node id -> public key of the node, where it has one.
    bytes_down, bytes_up: serialized size of all messages so far.
    pending_replies: replies that have arrived and that no call has pulled yet.
    """

    is_synchronous = True  # the server waits for no reply, because all have arrived when `push_messages` returns

    def __init__(
        self,
        client: ClientApp,
        workers: Iterable[int],
        downlink_fault: FaultInjector = no_fault,
        uplink_fault: FaultInjector = no_fault,
    ) -> None:
        self.client, self.downlink_fault, self.uplink_fault = client, downlink_fault, uplink_fault
        self.contexts: dict[int, Context] = {}
        self.public_keys: dict[int, bytes] = {}
        self.bytes_down = self.bytes_up = 0
        self.pending_replies: list[Message] = []
        self.count = 0
        for worker in workers:
            self.join(worker)
        # The sender of a message is read from TaskIdentity, which Flower sets in every process that it starts.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def join(self, worker: int, node: int | None = None, public_key: bytes = b"") -> int:
        """Add a node with an empty context and return its id (default: 100 + worker)."""
        node = 100 + worker if node is None else node
        self.public_keys[node] = public_key
        self.contexts[node] = Context(1, node, {"partition-id": worker}, RecordDict(), {})
        return node

    def leave(self, node: int) -> Context:
        """Remove a node and return its context."""
        return self.contexts.pop(node)

    def set_run(self, run: Run) -> None:
        """Ignore the run, because this grid has only one."""

    @property
    def run(self) -> Run:
        """The only run of this grid."""
        return Run.create_empty(1)

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:  # fmt: skip
        """Create a message, like the constructor `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return list(self.contexts)

    def get_nodes(self) -> list[NodeInfo]:
        """Return all nodes with their public keys."""
        return [NodeInfo(node_id=node, public_key=self.public_keys[node]) for node in self.contexts]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages immediately and return their ids; replies wait in `pending_replies`."""
        ids = []
        for message in messages:
            self.count += 1
            ids.append(str(self.count))
            message.metadata.__dict__["_message_id"] = ids[-1]
            arrived = _protocol.send_in_process(message)
            self.bytes_down += _protocol.get_serialized_size(message)
            for copy in self.downlink_fault(arrived):
                self.deliver(copy)
        return ids

    def deliver(self, message: Message) -> None:
        """Deliver one message to its node and queue the reply; drop the message if the node has left."""
        context = self.contexts.get(message.metadata.dst_node_id)
        if context is None:
            return
        try:
            reply = self.client(message, context)
        except Exception as error:  # Flower also turns an exception into an error reply
            reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
        arrived = _protocol.send_in_process(reply)
        self.bytes_up += _protocol.get_serialized_size(reply)
        self.pending_replies += self.uplink_fault(arrived)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return all pending replies, late ones included; the server has to recognize those."""
        arrived, self.pending_replies = self.pending_replies, []
        return arrived

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return every reply that no fault injector has dropped or delayed."""
        return self.pull_messages(self.push_messages(messages))
