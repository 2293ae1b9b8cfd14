"""Fleet API of a SuperLink, as one node uses it. The API is private to Flower: see `node.TESTED_VERSIONS`."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.config import get_fused_config_from_fab
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

log = logging.getLogger(__name__)

HEARTBEAT_INTERVAL = 30.0  # seconds; the SuperLink declares a node offline after twice this time
NOT_RUNNING = 403  # HTTP status of a request about a run that has ended
OBJECT_PAUSES: Any = {
    "initial_backoff": 0.02,
    "backoff_cap": 1.0,
    "max_time": 60.0,
}  # seconds, while the server pushes them


@contextmanager
def connect(superlink: str, root_certificates: Path | None, key: Path, node_id: int) -> Iterator["Fleet"]:
    """Connect to a SuperLink as a node, and send heartbeats meanwhile.

    Args:
        superlink: HOST:PORT.
        root_certificates: certificate of its authority; None: the system's authorities.
        key: private key of the node.
        node_id: id that the SuperLink gave this node before; 0 if none.

    Raises:
        httpx.HTTPError: The SuperLink does not answer, or does not admit the node.
    """
    private: Any = load_ssh_private_key(key.read_bytes(), None)
    signing = NodeAuthHttpInterceptor(private, private.public_key())
    known = None if root_certificates is None else root_certificates.read_bytes()
    interceptors = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), signing]
    ended = threading.Event()
    with FleetHttpClient.from_server_address(superlink, False, known, interceptors) as client:
        fleet = Fleet(client, node_id)
        fleet.activate(public_key_to_bytes(private.public_key()))

        def send_heartbeats() -> None:
            while not ended.wait(0.7 * HEARTBEAT_INTERVAL):
                try:
                    fleet.send_heartbeat()
                except (httpx.HTTPError, RuntimeError) as error:  # the main thread finds out, too
                    log.warning("heartbeat: %s", error)

        threading.Thread(target=send_heartbeats, daemon=True).start()
        try:
            yield fleet
        finally:
            ended.set()


class Fleet:
    """Connection of a node to the Fleet API; each method is a request."""

    def __init__(self, client: FleetHttpClient, node_id: int) -> None:
        self._client, self.node_id = client, node_id

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    def activate(self, public_key: bytes) -> None:
        """Report that the node is here. A node that was killed is still active: then a heartbeat is enough."""
        try:
            if self.node_id and self.send_heartbeat():
                return
        except httpx.HTTPStatusError:  # another SuperLink, or the same one after a restart
            pass
        request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=HEARTBEAT_INTERVAL)
        self.node_id = self._client.ActivateNode(request).node_id

    def send_heartbeat(self) -> bool:
        """Send a heartbeat; return whether the SuperLink knows the node."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_INTERVAL)
        return self._client.SendNodeHeartbeat(request).success

    def deactivate(self) -> None:
        """Report that the node leaves."""
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))

    def pull(self) -> dict[str, bytes] | None:
        """Return the next message without its content, and the tree of the objects that hold the content; or None."""
        found = self._client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        message, tree = found.messages_list[0], found.message_object_trees[0]
        return {"message": message.SerializeToString(), "tree": tree.SerializeToString()}

    def get_run(self, run_id: int) -> Any:
        """Return what the SuperLink knows about a run."""
        return run_from_proto(self._client.GetRun(GetRunRequest(node=self._node, run_id=run_id)).run)

    def get_run_config(self, run: Any) -> dict[str, Any]:
        """Return the config of a run: the defaults of its app, and what was given to `flwr run`."""
        request = GetFabRequest(node=self._node, hash_str=run.fab_hash, run_id=run.run_id)
        return get_fused_config_from_fab(self._client.GetFab(request).fab.content, run)  # reads pyproject.toml only

    def pull_content(self, head: Message, object_tree: bytes) -> Message:
        """Return a message with its content."""
        ids = [tree.object_id for tree in iterate_object_tree(ObjectTree.FromString(object_tree))]
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, head.metadata.run_id)
        contents = pull_objects(ids, pull, **OBJECT_PAUSES)
        message: Any = inflate_object_from_contents(head.metadata.message_id, contents)
        message.metadata.__dict__["_message_id"] = head.metadata.message_id
        return message

    def push(self, reply: Message, seconds: float) -> None:
        """Confirm a message, and push its reply.

        Args:
            reply: the reply.
            seconds: time that the app took, for the SuperLink's statistics.
        """
        run = reply.metadata.run_id
        about: Any = {"node": self._node, "run_id": run}
        received = ConfirmMessageReceivedRequest(**about, message_object_id=reply.metadata.reply_to_message_id)
        self._client.ConfirmMessageReceived(received)
        head = remove_content_from_message(reply) if reply.has_content() else reply
        answer = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(head)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
        )
        push = make_push_object_fn_protobuf(self._client.PushObject, self._node, run, answer.session_id)
        push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(answer.objects_to_push))

    def has_ended(self, run_id: int) -> bool:
        """Return whether a run has ended."""
        try:
            self.get_run(run_id)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == NOT_RUNNING:
                return True
            raise
        return False
