"""A Flower grid in one process: the ClientApp is called directly, every message is serialised, counted and read again.

For tests and for experiments on one machine. `down` and `up` are where faults come in: each takes a message and returns those
that arrive now, none (lost), two (repeated), another one (damaged), or one that was held back before (late, reordered).
"""

from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as Serialised
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["FaultInjector", "InProcessGrid", "no_fault"]


FaultInjector = Callable[[Message], Iterable[Message]]


def no_fault(message: Message) -> list[Message]:
    """No fault."""
    return [message]


class InProcessGrid(Grid):
    """Nodes in this process, worker m at node 100 + m; `contexts` is what they keep."""

    def __init__(
        self,
        client: ClientApp,
        workers: Iterable[int],
        downlink_fault: FaultInjector = no_fault,
        uplink_fault: FaultInjector = no_fault,
    ) -> None:
        self.client, self.downlink_fault, self.uplink_fault = client, downlink_fault, uplink_fault
        self.contexts: dict[int, Context] = {}
        self.bytes_down = self.bytes_up = 0  # serialised, of all messages
        self.pending_replies: list[Message] = []
        self.count = 0
        for worker in workers:
            self.join(worker)
        # who a message is from; Flower sets it in each process that it starts
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

    def join(self, worker: int, node: int | None = None) -> int:
        """A node that begins without a state; its id."""
        node = 100 + worker if node is None else node
        self.contexts[node] = Context(1, node, {"partition-id": worker}, RecordDict(), {})
        return node

    def leave(self, node: int) -> Context:
        """A node that is gone, and what it kept."""
        return self.contexts.pop(node)

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """The one run."""
        return Run.create_empty(1)

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None) -> Message:  # fmt: skip
        """A message; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Those who are there."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver at once; replies wait to be pulled."""
        ids = []
        for message in messages:
            self.count += 1
            ids.append(str(self.count))
            message.metadata.__dict__["_message_id"] = ids[-1]
            data = message_to_proto(message).SerializeToString()
            self.bytes_down += len(data)
            for arrived in self.downlink_fault(message_from_proto(Serialised.FromString(data))):
                self.deliver(arrived)
        return ids

    def deliver(self, message: Message) -> None:
        """One message to its node, and the reply on its way back."""
        context = self.contexts.get(message.metadata.dst_node_id)
        if context is None:
            return
        try:
            reply = self.client(message, context)
        except Exception as error:  # as Flower does
            reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
        data = message_to_proto(reply).SerializeToString()
        self.bytes_up += len(data)
        self.pending_replies += self.uplink_fault(message_from_proto(Serialised.FromString(data)))

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """All that has arrived, late ones too: a server must know them by itself."""
        arrived, self.pending_replies = self.pending_replies, []
        return arrived

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """What arrives before the deadline: here all that is not lost or held back."""
        return self.pull_messages(self.push_messages(messages))
