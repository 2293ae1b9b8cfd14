"""Flower federations: the processes of one on this machine, the commands on any, certificates and keys."""

import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from rich.console import Console

from experiments.federation.wire import WireCounter, count_wire_bytes
from experiments.harness import processes, storage

if TYPE_CHECKING:
    from experiments.federation.flower_apps import PointSpec

APP = Path(__file__).with_name("app")  # what `flwr run` starts
PROXY_CONFIG = Path(__file__).with_name("nginx.conf")
STARTUP_TIMEOUT = 60.0  # seconds for a process to start, and for a command of Flower
STATUS_INTERVAL = 20.0  # seconds between two queries of a run's state
HEARTBEATS = 20  # heartbeats whose bytes are counted
IDLE_SECONDS = 3.0  # seconds in which the bytes of idle nodes are counted
MAX_RESTARTS = 3  # of one node in a run
# Linux kills a process after this with its parent, however that ends; other systems do not
END_WITH_PARENT = "import ctypes, signal, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGKILL)"
STARTER = f"{END_WITH_PARENT}; import os; os.execv(sys.argv[1], sys.argv[1:])"


@dataclass(frozen=True)
class SuperLinkConfig:
    """Address of a federation and limits of its runs."""

    superlink: str = ""
    """HOST:PORT of a running SuperLink with its nodes; if empty, all are started on 127.0.0.1."""
    root_certificates: Path | None = None
    """Certificate file of that SuperLink."""
    nodes: Literal["long_lived", "supernode"] = "long_lived"
    """Nodes to start: those of `experiments.deployment node`, or Flower's SuperNodes, which start a process for each
    message."""
    poll_interval: float = 0.2
    """Seconds between two queries for work by the started processes of Flower."""
    run_timeout: float = 1800.0
    """Seconds that a run may take."""
    measure_wire: bool = False
    """Count the bytes between the started nodes and the SuperLink by a proxy, TLS included."""


@dataclass
class Server:
    """Process that this command has started.

    is_ready: whether it accepts work.
    is_node: whether it is a node, which is started again if it ends.
    """

    name: str
    words: list[str]
    log: Path
    environment: dict[str, str]
    is_ready: Callable[[], bool]
    is_node: bool = False
    restarts: int = 0
    process: Any = None

    def start(self) -> None:
        """Start the process; its output is appended to the log."""
        with self.log.open("ab") as file:
            self.process = psutil.Popen([sys.executable, "-S", "-c", STARTER, *self.words], env=self.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip

    def wait(self) -> None:
        """Wait until the process is ready.

        Raises:
            ChildProcessError: The process ends or is not ready in time; the message holds the end of its log.
        """
        end = time.monotonic() + STARTUP_TIMEOUT
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > end:
                text = self.log.read_text(errors="replace")[-1500:]
                raise ChildProcessError(f"{self.name} did not start; the end of {self.log}:\n{text}")
            time.sleep(0.1)

    def ending(self) -> str:
        """Return how the process ended; empty if it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


@dataclass
class FlowerCli:
    """Commands of Flower for one federation, and the processes of this federation on this machine."""

    folder: Path  # of the logs
    home: Path  # FLWR_HOME: configuration, certificates and keys
    run_timeout: float
    environment: dict[str, str]
    console: Console
    options: tuple[str, ...] = ()  # of `flwr run`
    nodes_keep_state: bool = True  # also if they are killed
    servers: list[Server] = field(default_factory=list)
    wire: WireCounter | None = None

    def command(self, *words: str) -> str:
        """Run `flwr WORDS` and return its output; raise ChildProcessError if it fails."""
        line = [find_executable("flwr"), *words]
        # in its home, since `flwr run APP laqjax` takes a folder called laqjax for an app
        about: Any = {"cwd": self.home, "env": self.environment, "capture_output": True, "text": True}
        try:
            done = subprocess.run(line, timeout=STARTUP_TIMEOUT, **about)
        except subprocess.TimeoutExpired:
            raise ChildProcessError(f"flwr {' '.join(words[:3])} takes more than {STARTUP_TIMEOUT:g} s") from None
        if done.returncode:
            raise ChildProcessError(f"flwr {' '.join(words[:3])}: {(done.stdout + done.stderr).strip()[-2000:]}")
        return done.stdout

    def run(self, spec: "PointSpec", number: int) -> dict[str, Any]:
        """Run a point; return the stats of its rounds, its seconds and the state that the SuperLink reports.

        If an earlier command was stopped in this point, the run resumes from its last checkpoint.

        Args:
            spec: description of the point.
            number: number of the point, which names its folder and its log.

        Raises:
            ChildProcessError: The run fails or exceeds `run_timeout`.
        """
        folder = self.folder / f"server-{number}"
        ended, token = folder / "ended", folder / "token"
        ended.unlink(missing_ok=True)  # written by the server app
        if not token.exists():
            storage.write_text(token, secrets.token_hex(8))
        if done := len(read_rounds(folder / "facts.jsonl")):
            self.console.print(f"{done} rounds of an earlier command are kept")
        programs = str(self.folder / "programs")
        states = "" if self.nodes_keep_state else str(self.home / f"states-{token.read_text()}")
        spec = replace(spec, folder=str(folder), programs=programs, states=states, token=token.read_text())
        words = "run", str(APP), "laqjax", "--run-config", f'plan="{spec.to_hex_json()}"', "--format", "json"
        output = self.command(*words, *self.options)
        run = str(json.loads(output).get("run-id"))
        if run == "None":
            raise ChildProcessError(f"flwr run: {output.strip()[-2000:]}")
        begin, before = time.monotonic(), self.wire.count_since({}) if self.wire else {}
        state = self.wait_for_run(run, folder)
        rows = read_rounds(folder / "facts.jsonl")
        if state["status"] != "finished:completed" or len(rows) != spec.rounds:
            raise ChildProcessError(
                f"run {run} is {state['status']}: see the logs in {self.folder}, {folder.name}.log first"
            )
        self.console.print(f"run {run}: {state['status']}")
        found = {"wall": time.monotonic() - begin, "run": state, "resumed": done}
        found |= {"wire": self.wire.count_since(before)} if self.wire else {}
        shutil.rmtree(folder)
        return {name: [row[name] for row in rows] for name in rows[0]} | found

    def wait_for_run(self, run: str, folder: Path) -> dict[str, Any]:
        """Wait until a run has ended; return the state that the SuperLink reports."""
        begin = time.monotonic()
        while True:
            query = min(time.monotonic() + STATUS_INTERVAL, begin + self.run_timeout)
            while not (folder / "ended").exists() and time.monotonic() < query:
                self.check_processes(folder)
                time.sleep(0.2)
            listed: list[Any] = json.loads(self.command("list", "laqjax", "--format", "json")).get("runs", [])
            state = next((one for one in listed if str(one["run-id"]) == run), None)
            if state is None:
                self.check_processes(folder)
                raise ChildProcessError(f"the SuperLink does not know run {run}: {self.describe_loss(folder)}")
            if state["status"].startswith("finished"):
                return state
            if time.monotonic() > begin + self.run_timeout:
                self.command("stop", run, "laqjax")
                raise ChildProcessError(f"run {run} exceeds {self.run_timeout:g} s: see the logs in {self.folder}")
            time.sleep(0.5)

    def check_processes(self, folder: Path) -> None:
        """Start nodes again that have ended; raise ChildProcessError if another process has ended."""
        for server in self.servers:
            if not (ending := server.ending()):
                continue
            if not server.is_node:
                raise ChildProcessError(f"{server.name} {ending}: {self.describe_loss(folder)}")
            if server.restarts == MAX_RESTARTS:
                raise ChildProcessError(f"{server.name} {ending} again: {self.describe_loss(folder)}")
            server.restarts += 1
            self.console.print(f"{server.name} {ending}: started again, see {server.log}", soft_wrap=True, markup=False)
            server.start()

    def describe_loss(self, folder: Path) -> str:
        """Return what a run that has stopped has lost, and how to go on."""
        done = len(read_rounds(folder / "facts.jsonl"))
        kept = f"{done} rounds are kept, round {done} is lost" if done else "no round is complete"
        return f"{kept}; run the same command again to continue, see the logs in {self.folder}"


@contextmanager
def run_local_federation(
    network: SuperLinkConfig, workers: int, out: Path, console: Console, simulation: bool = False
) -> Iterator[FlowerCli]:
    """Provide a federation and the commands on it; stop all processes that it starts at the end.

    Keys and the state of the nodes are in the folder `flower/private` of the results. It stays if the block fails,
    so that the same command can continue, and is removed at the end otherwise.

    Args:
        network: Address of the federation; without one it is started here.
        workers: Number of nodes; worker m has partition-id m.
        out: Folder of the results; the logs go to its subfolder `flower`.
        console: Console for progress messages.
        simulation: Use Flower's simulation engine instead of nodes.

    Raises:
        ChildProcessError: A process does not start; the message holds the end of its log.
    """
    if simulation and importlib.util.find_spec("ray") is None:
        raise ValueError("transport = 'simulation' needs Ray: pip install 'laqjax[simulation]'")
    folder = (out / "flower").resolve()
    home = folder / "private"
    folder.mkdir(parents=True, exist_ok=True)
    home.mkdir(mode=0o700, exist_ok=True)
    with ExitStack() as stack, sigterm_as_interrupt():
        flwr = FlowerCli(folder, home, network.run_timeout, subprocess_env(home, network.poll_interval), console)
        kill_leftovers(home)  # of an earlier command that was killed
        stack.callback(kill_leftovers, home)  # descendants of a process that was killed
        if network.superlink:
            write_connection_config(flwr, network.superlink, network.root_certificates)
        else:
            port = processes.find_free_port()
            for name in ("ca.crt", "server.crt", "server.key"):
                (home / name).unlink(missing_ok=True)
            write_certificates(home, ["127.0.0.1", "localhost"])
            write_connection_config(flwr, f"127.0.0.1:{port}", home / "ca.crt")
            stack.enter_context(run_servers(flwr, [make_superlink(flwr, port, simulation)]))
            entry = port
            if network.measure_wire and not simulation:
                flwr.wire = stack.enter_context(count_wire_bytes(port))
                entry = flwr.wire.port
            flwr.nodes_keep_state = network.nodes != "supernode"
            make = make_supernode if network.nodes == "supernode" else make_node
            nodes = [make(flwr, entry, worker, workers) for worker in range(0 if simulation else workers)]
            if flwr.wire and flwr.nodes_keep_state:
                console.print(f"a heartbeat of a node is a request of {measure_heartbeat(flwr, flwr.wire)} on the wire")
            stack.enter_context(run_servers(flwr, nodes))
            kind = "simulated nodes" if simulation else "nodes; TLS and node authentication are on"
            console.print(f"SuperLink at 127.0.0.1:{port}, {workers} {kind}")
            if flwr.wire:
                before = flwr.wire.count_since({})
                time.sleep(IDLE_SECONDS)
                sizes = describe_requests(**flwr.wire.count_since(before))
                console.print(f"an idle node asks for work, and sends heartbeats, by requests of {sizes} on the wire")
        if simulation:
            resources = "client-resources-num-cpus=1 client-resources-num-gpus=0.0"
            flwr.options = ("--federation-config", f"num-supernodes={workers} {resources}")
        yield flwr
    shutil.rmtree(home)


def describe_requests(up: int, down: int, requests: int) -> str:
    """Return a sentence with the mean bytes of requests."""
    return f"{up / max(requests, 1):.0f} bytes up and {down / max(requests, 1):.0f} down"


def measure_heartbeat(flwr: FlowerCli, wire: WireCounter) -> str:
    """Connect as the node of worker 0, before it starts, and return a sentence with the bytes of a heartbeat."""
    from experiments.federation import fleet  # here: needs an exact version of Flower

    with fleet.connect(f"127.0.0.1:{wire.port}", flwr.home / "ca.crt", flwr.home / "node-0", 0) as node:
        before = wire.count_since({})
        for _ in range(HEARTBEATS):
            node.send_heartbeat()
        found = wire.count_since(before)
        node.deactivate()
    return describe_requests(**found)


def read_rounds(facts: Path) -> list[dict[str, Any]]:
    """Return the stats of the rounds in a file; its last line may be incomplete, if the writer was killed."""
    lines = facts.read_text().split("\n")[:-1] if facts.exists() else []
    return [json.loads(line) for line in lines]


def write_connection_config(flwr: FlowerCli, address: str, root_certificates: Path | None) -> None:
    """Write the address and certificates of the SuperLink to the configuration of Flower's commands."""
    lines = ["[superlink]", 'default = "laqjax"', "", "[superlink.laqjax]", f"address = {json.dumps(address)}"]
    if root_certificates is not None:
        lines.append(f"root-certificates = {json.dumps(str(root_certificates.resolve()))}")
    (flwr.home / "config.toml").write_text("\n".join(lines) + "\n")


def register_nodes(public_keys: Sequence[Path], superlink: str, root_certificates: Path, console: Console) -> None:
    """Register public keys of nodes with a SuperLink."""
    with tempfile.TemporaryDirectory(prefix="laqjax-") as home:
        environment = subprocess_env(Path(home), SuperLinkConfig.poll_interval)
        flwr = FlowerCli(Path(home), Path(home), STARTUP_TIMEOUT, environment, console)
        write_connection_config(flwr, superlink, root_certificates)
        for path in public_keys:
            flwr.command("supernode", "register", str(path.resolve()), "laqjax")
            console.print(f"{path.name} is registered")


def subprocess_env(home: Path, poll: float) -> dict[str, str]:
    """Return the environment of all processes: this Python and checkout first, no telemetry, no update check."""
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).parents[2]}  # apps import experiments
    paths = {name: os.pathsep.join(filter(None, (str(path), os.environ.get(name)))) for name, path in first.items()}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **paths, "FLWR_HOME": str(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll), **quiet}


def find_executable(name: str) -> str:
    """Return the path of a command of this Python environment."""
    return str(Path(sys.executable).parent / name)


# ---- processes ---------------------------------------------------------------------------------------------------


def make_superlink(flwr: FlowerCli, port: int, simulation: bool) -> Server:
    """Describe a SuperLink with TLS."""
    tls = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [find_executable("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    words += [word for option, name in tls.items() for word in (option, str(flwr.home / name))]
    words += ["--disable-runtime-dependency-installation"]
    words += ["--simulation" if simulation else "--enable-supernode-auth"]
    return Server("the SuperLink", words, flwr.folder / "superlink.log", flwr.environment, partial(is_listening, port))


def make_supernode(flwr: FlowerCli, port: int, worker: int, workers: int) -> Server:
    """Describe Flower's node of a worker, after its key is registered with the SuperLink."""
    key, own = register_key(flwr, worker), processes.find_free_port()
    words = [find_executable("flower-supernode"), "--superlink", f"127.0.0.1:{port}"]
    words += ["--root-certificates", str(flwr.home / "ca.crt"), "--auth-supernode-private-key", str(key)]
    words += ["--host", "127.0.0.1", "--port", str(own)]
    words += ["--node-config", f"partition-id={worker} num-partitions={workers}"]
    log = flwr.folder / f"node-{worker}.log"
    return Server(f"the node of worker {worker}", words, log, flwr.environment, partial(is_listening, own), True)


def make_node(flwr: FlowerCli, port: int, worker: int, workers: int) -> Server:
    """Describe the long-lived node of a worker, after its key is registered with the SuperLink."""
    key, log = register_key(flwr, worker), flwr.folder / f"node-{worker}.log"
    words = [sys.executable, "-m", "experiments.deployment", "node", "--superlink", f"127.0.0.1:{port}"]
    words += ["--root-certificates", str(flwr.home / "ca.crt"), "--key", str(key), "--keep-running"]
    words += ["--app", "experiments.federation.flower_apps:client", "--folder", str(flwr.home / f"worker-{worker}")]
    words += ["--worker", str(worker), "--workers", str(workers)]
    old = log.stat().st_size if log.exists() else 0
    is_ready = lambda: b"is connected" in log.read_bytes()[old:]  # noqa: E731
    return Server(f"the node of worker {worker}", words, log, flwr.environment, is_ready, True)


def register_key(flwr: FlowerCli, worker: int) -> Path:
    """Register the key of a worker's node with the SuperLink; a key of an earlier command is used again."""
    key = flwr.home / f"node-{worker}"
    if not key.with_name(f"{key.name}.pub").exists():
        key.unlink(missing_ok=True)
        write_node_key(flwr.home, worker)
    flwr.command("supernode", "register", f"{key}.pub", "laqjax")
    return key


@contextmanager
def run_servers(flwr: FlowerCli, servers: Sequence[Server]) -> Iterator[None]:
    """Start processes, wait until all are ready, and stop them with all their descendants at the end."""
    with ExitStack() as stack:
        for server in servers:
            server.start()
            stack.callback(lambda server=server: processes.stop_tree(server.process))
        for server in servers:
            server.wait()
        flwr.servers += servers
        yield


def kill_leftovers(home: Path) -> None:
    """Kill all processes whose FLWR_HOME is this folder."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(home):
                process.kill()


def is_listening(port: int) -> bool:
    """Return whether a process listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM inside the block, so that its processes are stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- certificates and keys ---------------------------------------------------------------------------------------


def write_certificates(folder: Path, server_names: Iterable[str], days: int = 7) -> None:
    """Write ca.crt, server.crt and server.key for these names and addresses; the authority's key is not kept."""
    import trustme

    now, authority = datetime.now(UTC), trustme.CA(organization_name="laqjax")
    validity: Any = {"not_before": now - timedelta(minutes=5), "not_after": now + timedelta(days=days)}
    server = authority.issue_cert(*server_names, organization_name="laqjax", **validity)
    authority.cert_pem.write_to_path(folder / "ca.crt")
    server.cert_chain_pems[0].write_to_path(folder / "server.crt")
    write_private_file(folder / "server.key", server.private_key_pem.bytes())


def write_node_key(folder: Path, worker: int) -> Path:
    """Write the private key of a node to node-M and its public key to node-M.pub; return the path of the first."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, path = ec.generate_private_key(ec.SECP384R1()), folder / f"node-{worker}"
    form = serialization.PrivateFormat.OpenSSH
    write_private_file(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)
    return path


def write_private_file(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
