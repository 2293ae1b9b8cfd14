"""Exchange of messages with the nodes of a Flower grid, in which no node holds up the others."""

import time
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from flwr.app import Error, Message
from flwr.serverapp import Grid

MIN_POLL_INTERVAL, MAX_POLL_INTERVAL = 0.02, 0.2  # seconds between two pulls of one reply
MAX_PULL_RATE = 500.0  # pulls per second of all threads together


class ReplyPoller:
    """Messages that wait for a reply, and the replies that have arrived.

    `Grid.pull_messages` takes a reply from the SuperLink and then blocks until all its parts have arrived: for minutes,
    if a node announces a reply and does not push it. A pull of many replies would block with the first of them.
    Therefore each reply has a daemon thread that pulls it until the message expires.

    A grid with a true attribute `is_synchronous` has all its replies as soon as the messages are pushed. It is pulled
    without threads, and a message without a reply is not waited for.
    """

    def __init__(self) -> None:
        self._arrived: SimpleQueue[tuple[str, Message | None]] = SimpleQueue()
        self._pending: dict[str, tuple[int, float]] = {}  # message id -> node, time at which the message expires

    def send(self, grid: Grid, messages: Sequence[Message]) -> None:
        """Send messages, and begin to pull their replies."""
        pushed, now = set(grid.push_messages(messages)) if messages else set(), time.monotonic()
        self._pending = {name: entry for name, entry in self._pending.items() if entry[1] > now}
        sent = {name: message for message in messages if (name := message.metadata.message_id) in pushed}
        ends = {name: now + message.metadata.ttl for name, message in sent.items()}
        self._pending |= {name: (message.metadata.dst_node_id, ends[name]) for name, message in sent.items()}
        for name, message in sent.items():
            if getattr(grid, "is_synchronous", False):
                self._pull(grid, name, message)
                del self._pending[name]
            else:
                Thread(target=self._poll, args=(grid, name, message, ends[name]), daemon=True).start()

    def waiting_nodes(self) -> set[int]:
        """Return the nodes that have a message without a reply."""
        now = time.monotonic()
        return {node for node, end in self._pending.values() if end > now}

    def receive(self, timeout: float) -> Iterator[Message]:
        """Yield the replies that have arrived; if there is none, wait until something arrives."""
        try:
            while True:
                name, reply = self._arrived.get(timeout > 0, timeout)
                timeout = 0.0
                self._pending.pop(name, None)
                if reply is not None:
                    yield reply
        except Empty:
            pass

    def _poll(self, grid: Grid, name: str, message: Message, end: float) -> None:
        """Pull the reply to one message until it has arrived or the message expires."""
        began = now = time.monotonic()
        while not self._pull(grid, name, message) and name in self._pending and now < end:
            interval = min(max((now - began) / 10, MIN_POLL_INTERVAL), MAX_POLL_INTERVAL)
            time.sleep(max(interval, len(self._pending) / MAX_PULL_RATE))
            now = time.monotonic()

    def _pull(self, grid: Grid, name: str, message: Message) -> bool:
        """Pull the reply to one message, and return whether it has arrived.

        A reply that cannot be pulled becomes an error of its node. An error that Flower reports in place of the node
        (the node is offline, the message expired) ends the wait without a reply.
        """
        try:
            replies = list(grid.pull_messages([name]))
        except Exception as error:
            replies = [Message(Error(0, f"reply cannot be pulled: {type(error).__name__}: {error}"), reply_to=message)]
        for reply in replies:
            metadata = reply.metadata
            node = self._pending.get(metadata.reply_to_message_id, (metadata.src_node_id,))[0]
            is_from_node = not reply.has_error() or metadata.src_node_id == node
            self._arrived.put((metadata.reply_to_message_id, reply if is_from_node else None))
        return bool(replies)
