"""Flower federations: the processes of one on this machine, the commands on any, certificates and keys."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from experiments.harness import processes, storage

APP = Path(__file__).with_name("app")  # what `flwr run` starts
STARTUP_TIMEOUT = 60.0  # seconds for a process to start
STATUS_INTERVAL = 20.0  # seconds between two queries of a run's state


@dataclass(frozen=True)
class SuperLinkConfig:
    """Address of a federation and limits of its runs."""

    superlink: str = ""
    """HOST:PORT of a running SuperLink with its SuperNodes; if empty, all are started on 127.0.0.1."""
    root_certificates: Path | None = None
    """Certificate file of that SuperLink."""
    poll_interval: float = 0.2
    """Seconds between two queries for work by the started processes."""
    run_timeout: float = 1800.0
    """Seconds that a run may take."""


@dataclass
class FlowerCli:
    """Commands of Flower for one federation."""

    folder: Path  # of the logs
    home: Path  # FLWR_HOME: configuration, certificates and keys
    run_timeout: float
    environment: dict[str, str]
    options: tuple[str, ...] = ()  # of `flwr run`

    def command(self, *words: str) -> str:
        """Run `flwr WORDS` and return its output; raise ChildProcessError if it fails."""
        line = [find_executable("flwr"), *words]
        done = subprocess.run(line, env=self.environment, capture_output=True, text=True, timeout=STARTUP_TIMEOUT)
        if done.returncode:
            raise ChildProcessError(f"flwr {' '.join(words[:3])}: {(done.stdout + done.stderr).strip()[-2000:]}")
        return done.stdout

    def run(self, plan: str, facts: Path, console: Console) -> dict[str, Any]:
        """Run a plan; return the stats of its rounds, its seconds and the state that the SuperLink reports.

        Raises:
            ChildProcessError: The run fails or exceeds `run_timeout`.
        """
        ended = facts.with_suffix(".ended")  # written by the server app
        for path in (facts, ended):
            path.unlink(missing_ok=True)
        words = "run", str(APP), "laqjax", "--run-config", f'plan="{plan}"', "--format", "json", *self.options
        output = self.command(*words)
        number = str(json.loads(output).get("run-id"))
        if number == "None":
            raise ChildProcessError(f"flwr run: {output.strip()[-2000:]}")
        begin = time.monotonic()
        while True:
            query = min(time.monotonic() + STATUS_INTERVAL, begin + self.run_timeout)
            while not ended.exists() and time.monotonic() < query:
                time.sleep(0.2)
            runs = json.loads(self.command("list", "laqjax", "--format", "json"))["runs"]
            state = next(run for run in runs if str(run["run-id"]) == number)
            if state["status"].startswith("finished"):
                break
            if time.monotonic() > begin + self.run_timeout:
                self.command("stop", number, "laqjax")
                raise ChildProcessError(f"run {number} exceeds {self.run_timeout:g} s: see the logs in {self.folder}")
            time.sleep(0.5)
        if state["status"] != "finished:completed" or not facts.exists():
            raise ChildProcessError(f"run {number} is {state['status']}: see the logs in {self.folder}")
        console.print(f"run {number}: {state['status']}")
        return storage.read_json(facts) | {"wall": time.monotonic() - begin, "run": state}


@contextmanager
def run_local_federation(
    network: SuperLinkConfig, workers: int, out: Path, console: Console, simulation: bool = False
) -> Iterator[FlowerCli]:
    """Provide a federation and the commands on it; stop all processes that it starts at the end.

    Args:
        network: Address of the federation; without one it is started here.
        workers: Number of SuperNodes; worker m has partition-id m.
        out: Folder of the results; the logs go to its subfolder `flower`.
        console: Console for progress messages.
        simulation: Use Flower's simulation engine instead of SuperNodes.

    Raises:
        ChildProcessError: A process does not start; the message holds the end of its log.
    """
    if simulation and importlib.util.find_spec("ray") is None:
        raise ValueError("transport = 'simulation' needs Ray: pip install 'laqjax[simulation]'")
    folder = (out / "flower").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack, sigterm_as_interrupt():
        flwr = stack.enter_context(temporary_flower_home(folder, network))
        if network.superlink:
            write_connection_config(flwr, network.superlink, network.root_certificates)
        else:
            port = processes.find_free_port()
            write_certificates(flwr.home, ["127.0.0.1", "localhost"])
            write_connection_config(flwr, f"127.0.0.1:{port}", flwr.home / "ca.crt")
            stack.enter_context(start_superlink(flwr, port, simulation))
            for worker in range(0 if simulation else workers):
                stack.enter_context(start_supernode(flwr, port, worker, workers))
            nodes = "simulated nodes" if simulation else "SuperNodes; TLS and node authentication are on"
            console.print(f"SuperLink at 127.0.0.1:{port}, {workers} {nodes}")
        if simulation:
            resources = "client-resources-num-cpus=1 client-resources-num-gpus=0.0"
            flwr.options = ("--federation-config", f"num-supernodes={workers} {resources}")
        yield flwr


@contextmanager
def temporary_flower_home(folder: Path, network: SuperLinkConfig) -> Iterator[FlowerCli]:
    """Provide Flower's commands with a private FLWR_HOME, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="laqjax-") as home:
        yield FlowerCli(folder, Path(home), network.run_timeout, subprocess_env(Path(home), network.poll_interval))


def write_connection_config(flwr: FlowerCli, address: str, root_certificates: Path | None) -> None:
    """Write the address and certificates of the SuperLink to the configuration of Flower's commands."""
    lines = ["[superlink]", 'default = "laqjax"', "", "[superlink.laqjax]", f"address = {json.dumps(address)}"]
    if root_certificates is not None:
        lines.append(f"root-certificates = {json.dumps(str(root_certificates.resolve()))}")
    (flwr.home / "config.toml").write_text("\n".join(lines) + "\n")


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


def start_superlink(flwr: FlowerCli, port: int, simulation: bool) -> AbstractContextManager[psutil.Popen]:
    """Start a SuperLink with TLS."""
    tls = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [find_executable("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    words += [word for option, name in tls.items() for word in (option, str(flwr.home / name))]
    words += ["--disable-runtime-dependency-installation"]
    words += ["--simulation" if simulation else "--enable-supernode-auth"]
    return start_server(words, flwr, "superlink", port)


def start_supernode(flwr: FlowerCli, port: int, worker: int, workers: int) -> AbstractContextManager[psutil.Popen]:
    """Start the node of a worker after its new key is registered with the SuperLink."""
    key, own = write_node_key(flwr.home, worker), processes.find_free_port()
    flwr.command("supernode", "register", f"{key}.pub", "laqjax")
    words = [find_executable("flower-supernode"), "--superlink", f"127.0.0.1:{port}"]
    words += ["--root-certificates", str(flwr.home / "ca.crt"), "--auth-supernode-private-key", str(key)]
    words += ["--host", "127.0.0.1", "--port", str(own)]
    words += ["--node-config", f"partition-id={worker} num-partitions={workers}"]
    return start_server(words, flwr, f"supernode-{worker}", own)


@contextmanager
def start_server(words: list[str], flwr: FlowerCli, name: str, port: int) -> Iterator[psutil.Popen]:
    """Start a process, wait until it listens on a port, and stop it with all its descendants at the end.

    Raises:
        ChildProcessError: The process ends or does not listen in time; the message holds the end of its log.
    """
    log, end = flwr.folder / f"{name}.log", time.monotonic() + STARTUP_TIMEOUT
    with log.open("wb") as file:
        process = psutil.Popen(words, env=flwr.environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            while not is_listening(port):
                if process.poll() is not None or time.monotonic() > end:
                    text = log.read_text(errors="replace")[-1500:]
                    raise ChildProcessError(f"{name} did not start; the end of {log}:\n{text}")
                time.sleep(0.1)
            yield process
        finally:
            processes.stop_tree(process)


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


def write_certificates(folder: Path, server_names: Sequence[str], days: int = 7) -> None:
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
