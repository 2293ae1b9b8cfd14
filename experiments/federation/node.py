"""Worker of a federation as one long-lived process: its ClientApp stays loaded and compiled between two rounds.

Flower's SuperNode starts a process for each message. This node speaks the same Fleet API of the SuperLink, but answers
the messages itself. It runs the ClientApp of its own command line only; the app that a run brings along is not used.

The API is private to Flower, so only the versions in `TESTED_VERSIONS` are supported.

Two files in the node's folder make it safe to kill: `message`, the last message until its reply has arrived, and
`worker`, the state after that message with the reply. A restarted node continues from them: nothing is computed twice
with another result, and no reply is lost.
"""

import hashlib
import importlib
import json
import logging
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import tyro
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.task_identity import TaskIdentity

from experiments.federation import flower_apps
from experiments.harness import grid, storage

if TYPE_CHECKING:
    from experiments.federation.fleet import Fleet

log = logging.getLogger(__name__)

TESTED_VERSIONS = ("1.42.0",)  # of Flower, each tested with a SuperLink of the same version
SHORTEST_PAUSE, LONGEST_PAUSE = 0.02, 1.0  # seconds between two questions for a message
RECONNECT_PAUSE = 1.0  # seconds before a new connection after a failure
RUN_QUERY_INTERVAL = 2.0  # seconds without a message after which the node asks whether the run has ended


@dataclass(frozen=True)
class Settings:
    """Settings of a node. Its problems, data and algorithms are those of the server's command."""

    superlink: Annotated[str, tyro.conf.arg(metavar="HOST:PORT")] = ""
    """Address of the SuperLink."""
    root_certificates: Path | None = None
    """File with the certificate of its authority, ca.crt; by default the system's authorities."""
    key: Path | None = None
    """Private key of this node, whose public key is registered with the SuperLink."""
    worker: int = 0
    """Id m of this node's worker."""
    folder: Path | None = None
    """Folder for the state of the worker and compiled programs; by default results/node-M for worker M."""
    app: Annotated[str, tyro.conf.arg(metavar="MODULE:ATTRIBUTE")] = ""
    """ClientApp to run instead of the problems and algorithms of this command line."""
    keep_running: bool = False
    """Wait for further runs; by default the node ends with the first run."""
    axes: grid.GridAxes = grid.GridAxes(algorithm=("laq", "gd", "qgd", "ef21"), bits=(4,), lr=(0.02,))
    data: grid.DataAxes = grid.DataAxes()
    authors_rule: bool = False
    """As in the server's command."""
    quick: bool = False
    """As in the server's command."""
    config: Path | None = None
    """TOML or YAML file of these settings; options on the command line take precedence."""


def run(settings: Settings) -> None:
    """Run a node until its run ends, or forever with `keep_running`."""
    check_flower_version()
    if not settings.superlink or settings.key is None:
        raise ValueError("a node needs --superlink HOST:PORT and --key FILE: give both")
    folder = settings.folder or Path(f"results/node-{settings.worker}")
    app = (
        load_app(settings.app)
        if settings.app
        else flower_apps.make_own_client(make_specs(settings), folder / "programs")
    )
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    log.setLevel(logging.INFO)
    workers = settings.data.workers[0]
    config: Any = {"partition-id": settings.worker, "num-partitions": workers}
    node = Node(app, settings.app or "points", config, folder)
    from experiments.federation import fleet  # imports what only the tested versions have

    connect = partial(fleet.connect, settings.superlink, settings.root_certificates, settings.key)
    told = ""
    while True:
        try:
            return serve(node, connect, settings.keep_running)
        except httpx.HTTPStatusError as error:
            problem = f"the SuperLink refuses this node ({error}): register its public key, or wait half a minute after a node with this key was killed; trying again"
        except (httpx.HTTPError, OSError) as error:
            problem = f"no connection to the SuperLink ({error}): trying again"
        if problem != told:
            log.warning("%s", told := problem)
        time.sleep(RECONNECT_PAUSE)


def make_specs(settings: Settings) -> list[flower_apps.PointSpec]:
    """Return the points of the settings, as `experiments.federated` plans them."""
    return flower_apps.make_specs(settings.axes, settings.data, settings.authors_rule, 200 if settings.quick else None)


def check_flower_version() -> None:
    """Raise ImportError if the installed Flower has not been tested with this node."""
    if (found := version("flwr")) not in TESTED_VERSIONS:
        raise ImportError(
            f"Flower {found}: a node needs {' or '.join(TESTED_VERSIONS)}; install that version, or start"
            " flower-supernode instead"
        )


def load_app(name: str) -> ClientApp:
    """Load the ClientApp MODULE:ATTRIBUTE."""
    module, _, attribute = name.partition(":")
    app = getattr(importlib.import_module(module), attribute, None)
    if not isinstance(app, ClientApp):
        raise ValueError(f"app = {name}: must be MODULE:ATTRIBUTE, the name of a ClientApp")
    return app


# ---- the worker and its files ------------------------------------------------------------------------------------


@dataclass
class Node:
    """ClientApp with the state of one worker, which is saved before a reply leaves the node.

    app: the ClientApp.
    app_name: its name. State of another app is not used.
    node_config: what Flower calls so, the id of the worker and the number of workers.
    folder: folder of the files.
    """

    app: ClientApp
    app_name: str
    node_config: dict[str, Any]
    folder: Path
    node_id: int = 0
    _saved: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saved = read_parts(self.folder / "worker")
        self.node_id = int(self._saved.get("node", b"0"))

    def pending_message(self) -> dict[str, bytes]:
        """Return the message whose reply may not have arrived, as `Fleet.pull` does; empty if there is none."""
        return read_parts(self.folder / "message")

    def keep_message(self, pulled: dict[str, bytes]) -> None:
        """Save a message until `drop_message`."""
        write_parts(self.folder / "message", **pulled)

    def drop_message(self) -> None:
        """Remove the message whose reply has arrived, or that nobody waits for."""
        (self.folder / "message").unlink(missing_ok=True)

    def load_reply(self, message_id: str) -> Message | None:
        """Return the saved reply to a message."""
        if self._saved.get("answers") != message_id.encode():
            return None
        return message_from_proto(MessageProto.FromString(self._saved["reply"]))

    def answer(self, message: Message, run_config: dict[str, Any], series: int) -> Message:
        """Answer a message by the app, and save the new state together with the reply.

        An exception of the app becomes an error reply, as in Flower, and leaves the state as it was.
        """
        config = json.dumps([self.app_name, run_config], sort_keys=True, default=str).encode()
        of_run = hashlib.sha256(config).hexdigest().encode()  # a resumed run has the config of the run that it resumes
        old = self._saved.get("state", b"") if self._saved.get("of_run") == of_run else b""
        state = recorddict_from_proto(RecordDictProto.FromString(old)) if old else RecordDict()
        meta = message.metadata
        context = Context(meta.run_id, self.node_id, self.node_config, state, run_config, series)
        # Flower reads the sender of a new message from here
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = meta.run_id, self.node_id, 0
        try:
            reply = self.app(message, context)
            new = recorddict_to_proto(context.state).SerializeToString()
        except Exception as error:
            log.exception("the app failed")
            reply, new = Message(Error(0, f"{type(error).__name__}: {error}"[:300]), reply_to=message), old
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self.save(of_run=of_run, state=new, answers=meta.message_id.encode(), reply=message_to_proto(reply).SerializeToString())  # fmt: skip
        return reply

    def save(self, **parts: bytes) -> None:
        """Save the state of the worker with the node id."""
        self._saved = self._saved | parts | {"node": str(self.node_id).encode()}
        write_parts(self.folder / "worker", **self._saved)


def read_parts(path: Path) -> dict[str, bytes]:
    """Return the parts of a file of `write_parts`; none if it is missing."""
    if not path.exists():
        return {}
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write_parts(path: Path, **parts: bytes) -> None:
    """Write named bytes to a file atomically."""
    with storage.atomic_write(path) as part, zipfile.ZipFile(part, "w") as file:
        for name, data in parts.items():
            file.writestr(name, data)


# ---- the loop ----------------------------------------------------------------------------------------------------


def serve(node: Node, connect: Callable[[int], AbstractContextManager["Fleet"]], keep_running: bool) -> None:
    """Answer messages over one connection until the run has ended.

    Raises:
        httpx.HTTPError: The connection fails.
    """
    with connect(node.node_id) as fleet:
        if fleet.node_id != node.node_id:
            node.node_id = fleet.node_id
            node.save()
        log.info("node %s is connected", node.node_id)
        for run in answer_messages(node, fleet):
            log.info("run %s has ended", run)
            if not keep_running:
                return fleet.deactivate()


def answer_messages(node: Node, fleet: "Fleet") -> Iterator[int]:
    """Answer messages; yield the id of each run that has ended."""
    runs: dict[int, tuple[dict[str, Any], int]] = {}  # run -> its config and series
    last = asked = time.monotonic()
    while True:
        pulled = node.pending_message() or fleet.pull()
        if pulled is None:
            now = time.monotonic()
            if runs and now - max(last, asked) > RUN_QUERY_INTERVAL:
                asked = now
                for run in [run for run in runs if fleet.has_ended(run)]:
                    del runs[run]
                    yield run
            time.sleep(min(LONGEST_PAUSE, max(SHORTEST_PAUSE, (now - last) / 20)))
            continue
        node.keep_message(pulled)
        head = message_from_proto(MessageProto.FromString(pulled["message"]))
        run = head.metadata.run_id
        try:
            reply, began = node.load_reply(head.metadata.message_id), time.perf_counter()
            if reply is None:
                if run not in runs:
                    about = fleet.get_run(run)
                    runs[run] = fleet.get_run_config(about), about.series_id
                message = fleet.pull_content(head, pulled["tree"])
                reply = node.answer(message, *runs[run])
            fleet.push(reply, time.perf_counter() - began)
        except Exception as error:
            status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
            if isinstance(error, httpx.TransportError) or status >= 500:  # the next connection continues with it
                raise
            log.warning("a message of run %s is dropped: %s", run, f"{type(error).__name__}: {error}"[:300])
        node.drop_message()
        last = time.monotonic()
