"""Certificates and keys of a federation of machines; its processes on this one.

    python -m experiments.deployment keys DIR --hosts NAME ADDRESS --workers 2    for a SuperLink there
    python -m experiments.deployment register DIR --superlink HOST:PORT           tells it which nodes may come

A SuperLink lets those nodes in whose keys it knows; `experiments.federated` runs on it.
"""

import importlib.util
import ipaddress
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.harness import storage

APP_PYPROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "laqjax-federation"
version = "1.0.0"
description = "Lazily aggregated gradients"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "laqjax"

[tool.flwr.app.components]
serverapp = "laqjax_app:server"
clientapp = "laqjax_app:client"

[tool.flwr.app.config]
plan = ""
"""
APP_MODULE = '''"""A point of `experiments.federated` as Flower's apps."""

from experiments.federation.flower_apps import make_apps

both = make_apps()
server = both[0]
client = both[1]
'''
STARTUP_TIMEOUT = 60.0  # seconds for a process to come up
SHUTDOWN_TIMEOUT = 10.0  # seconds to end by itself
STATUS_INTERVAL = 20.0  # seconds between two looks at the state of a run


@dataclass(frozen=True)
class SuperLinkConfig:
    """Where the federation is."""

    superlink: str = ""
    """HOST:PORT of a SuperLink that runs already, its nodes too; when not given, all are started here, on 127.0.0.1."""
    root_certificates: Path | None = None
    """The certificate file of that SuperLink."""
    poll_interval: float = 0.2
    """Seconds between two looks of the started processes for work."""
    run_timeout: float = 1800.0
    """Seconds that a run may take."""


@dataclass
class FlowerCli:
    """The commands of Flower, on one federation."""

    folder: Path
    home: Path
    run_timeout: float
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()  # of `flwr run`

    def command(self, *words: str, seconds: float = STARTUP_TIMEOUT) -> str:
        """What `flwr WORDS` says; ChildProcessError when it fails."""
        done = subprocess.run([venv_executable("flwr"), *words], env=self.environment, capture_output=True, text=True, timeout=seconds)  # fmt: skip
        if done.returncode:
            raise ChildProcessError(f"flwr {' '.join(words[:3])}: {(done.stdout + done.stderr).strip()[-2000:]}")
        return done.stdout

    def run(self, plan: str, facts: Path, console: Console) -> dict[str, Any]:
        """The facts of a run, with the traffic that the SuperLink counted; ChildProcessError when it failed."""
        ended = facts.with_suffix(".ended")  # the server app leaves it
        for path in (facts, ended):
            path.unlink(missing_ok=True)
        words = "run", str(self.home / "app"), "laqjax", "--run-config", f'plan="{plan}"', "--format", "json"
        said = self.command(*words, *self.options)
        number = str(json.loads(said).get("run-id"))
        if number == "None":
            raise ChildProcessError(f"flwr run: {said.strip()[-2000:]}")
        end, began = time.monotonic() + self.run_timeout, time.perf_counter()
        while True:
            asked = time.monotonic()
            while not ended.exists() and time.monotonic() < min(end, asked + STATUS_INTERVAL):
                time.sleep(0.2)
            state = next(run for run in self.list_runs() if str(run["run-id"]) == number)
            if state["status"].startswith("finished"):
                break
            if time.monotonic() > end:
                self.command("stop", number, "laqjax")
                raise ChildProcessError(
                    f"run {number} is not done after {self.run_timeout:g} s: see the logs in {self.folder}"
                )
            time.sleep(0.5)
        if state["status"] != "finished:completed" or not facts.exists():
            raise ChildProcessError(f"run {number} is {state['status']}: see the logs in {self.folder}")
        console.print(f"run {number}: {state['status']}")
        return storage.read_json(facts) | {"wall": time.perf_counter() - began, "run": state}

    def list_runs(self) -> list[dict[str, Any]]:
        """All runs of the SuperLink."""
        return json.loads(self.command("list", "laqjax", "--format", "json"))["runs"]


def venv_executable(name: str) -> str:
    """A command of this environment."""
    return str(Path(sys.executable).parent / name)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@contextmanager
def run_local_federation(
    network: SuperLinkConfig, workers: int, out: Path, console: Console, simulation: bool = False
) -> Iterator[FlowerCli]:
    """A federation of so many workers, and the commands on it.

    Args:
        network: where it is; by default it is started here.
        workers: SuperNodes, worker m with partition-id m.
        out: gets the logs, in the folder `flower`.
        console: says what starts.
        simulation: with Flower's simulation engine instead of SuperNodes.

    Raises:
        ChildProcessError: one did not start; its log is named.
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
            port = free_port()
            write_certificates(flwr.home, ["127.0.0.1", "localhost"])
            write_connection_config(flwr, f"127.0.0.1:{port}", flwr.home / "ca.crt")
            start_superlink(stack, flwr, port, simulation)
            for worker in range(0 if simulation else workers):
                start_supernode(stack, flwr, port, worker, workers)
            what = (
                f"{workers} simulated nodes"
                if simulation
                else f"{workers} SuperNodes; TLS and node authentication are on"
            )
            console.print(f"SuperLink at 127.0.0.1:{port}, {what}")
        if simulation:
            flwr.options = (
                "--federation-config",
                f"num-supernodes={workers} client-resources-num-cpus=1 client-resources-num-gpus=0.0",
            )
        yield flwr


@contextmanager
def temporary_flower_home(folder: Path, network: SuperLinkConfig) -> Iterator[FlowerCli]:
    """Flower's commands with a home of their own: nobody else reads the keys in it, and it is gone at the end."""
    with tempfile.TemporaryDirectory(prefix="laqjax-") as home:
        flwr = FlowerCli(folder, Path(home), network.run_timeout, subprocess_env(Path(home), network.poll_interval))
        write_app(flwr.home / "app")
        yield flwr


def write_connection_config(flwr: FlowerCli, address: str, root_certificates: Path | None) -> None:
    """The SuperLink that the commands speak to."""
    found = {"address": address}
    if root_certificates is not None:
        found["root-certificates"] = str(root_certificates.resolve())
    lines = ["[superlink]", 'default = "laqjax"', "", "[superlink.laqjax]"]
    (flwr.home / "config.toml").write_text(
        "\n".join(lines + [f"{k} = {json.dumps(v)}" for k, v in found.items()]) + "\n"
    )


def subprocess_env(home: Path, poll: float) -> dict[str, str]:
    """Of all processes: this Python's commands and this checkout first, no telemetry, no look for updates."""
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).parents[2]}  # apps import experiments
    paths = {name: os.pathsep.join(filter(None, (str(path), os.environ.get(name)))) for name, path in first.items()}
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {**os.environ, **paths, "FLWR_HOME": str(home), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll), **quiet}


def write_app(folder: Path) -> None:
    """What `flwr run` takes; Flower wants a license file."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(APP_PYPROJECT)
    (folder / "laqjax_app.py").write_text(APP_MODULE)
    (folder / "LICENSE").write_text("Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0\n")


def start_superlink(stack: ExitStack, flwr: FlowerCli, port: int, simulation: bool) -> None:
    """Registers who may come, when it is up."""
    home = flwr.home
    tls = {"--ssl-ca-certfile": "ca.crt", "--ssl-certfile": "server.crt", "--ssl-keyfile": "server.key"}
    words = [venv_executable("flower-superlink"), "--host", "127.0.0.1", "--port", str(port)]
    words += [word for option, name in tls.items() for word in (option, str(home / name))]
    words += [
        "--disable-runtime-dependency-installation",
        *(["--simulation"] if simulation else ["--enable-supernode-auth"]),
    ]
    process = stack.enter_context(spawn(words, flwr, "superlink"))
    wait_for(port, process, flwr.folder / "superlink.log")


def start_supernode(stack: ExitStack, flwr: FlowerCli, port: int, worker: int, workers: int) -> None:
    """A node with a key of its own, which the SuperLink is told first."""
    private = write_node_key(flwr.home, worker)
    flwr.command("supernode", "register", f"{private}.pub", "laqjax")
    own, words = free_port(), [venv_executable("flower-supernode"), "--superlink", f"127.0.0.1:{port}"]
    words += ["--root-certificates", str(flwr.home / "ca.crt"), "--auth-supernode-private-key", str(private)]
    words += ["--host", "127.0.0.1", "--port", str(own)]
    words += ["--node-config", f"partition-id={worker} num-partitions={workers}"]
    process = stack.enter_context(spawn(words, flwr, f"supernode-{worker}"))
    wait_for(own, process, flwr.folder / f"supernode-{worker}.log")


# ---- processes ---------------------------------------------------------------------------------------------------


@contextmanager
def spawn(words: list[str], flwr: FlowerCli, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own; it and all that came from it are gone at the end."""
    with (flwr.folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, env=flwr.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asked first, then killed; those whom it started too, whatever group they are in."""
    family = {pid: start_ticks(pid) for pid in descendants(process.pid)}
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(SHUTDOWN_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end = time.monotonic() + SHUTDOWN_TIMEOUT
    while (
        left := [pid for pid in family if is_running(pid) and start_ticks(pid) == family[pid]]
    ) and time.monotonic() < end:
        for pid in left:  # the same process still, not another of its number
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def proc_stat(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_running(pid: int) -> bool:
    """Whether it runs; one that has ended and that nobody has asked for does not."""
    return proc_stat(pid)[:1] not in ([], ["Z"])


def start_ticks(pid: int) -> str | None:
    """When it was started, in the machine's ticks."""
    return (proc_stat(pid) or [None] * 20)[19]


def descendants(pid: int) -> list[int]:
    """The processes that came from one (on Linux; elsewhere none is known)."""
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    parents = {number: int(words[1]) for number in numbers if (words := proc_stat(number))}
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until somebody listens there. ChildProcessError, with the end of the log, when the process ends or does not come up."""
    end = time.monotonic() + STARTUP_TIMEOUT
    while process.poll() is None and time.monotonic() < end:
        with socket.socket() as made:
            made.settimeout(1.0)
            if made.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise ChildProcessError(f"{log.stem} did not start; the end of {log}:\n{log.read_text(errors='replace')[-1500:]}")


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- certificates ------------------------------------------------------------------------------------------------


def write_certificates(folder: Path, hosts: Sequence[str], days: int = 7) -> None:
    """ca.crt, server.crt and server.key for these names and addresses; the authority's key is kept nowhere."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    def builder(subject: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        made = x509.CertificateBuilder().subject_name(named(subject)).issuer_name(named("laqjax CA"))
        now = datetime.now(UTC)
        made = made.not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(days=days))
        made = made.public_key(key.public_key()).serial_number(x509.random_serial_number())
        return made.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)

    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    usage = {name: False for name in ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only")}  # fmt: skip
    signing = x509.KeyUsage(**usage | {"key_cert_sign": True, "crl_sign": True})
    root = builder("laqjax CA", authority).add_extension(x509.BasicConstraints(True, None), True)
    root = root.add_extension(signing, True).sign(authority, hashes.SHA384())
    names = [x509.IPAddress(ipaddress.ip_address(h)) if is_address(h) else x509.DNSName(h) for h in hosts]
    own = builder(hosts[0], server).add_extension(x509.SubjectAlternativeName(names), False)
    own = own.add_extension(x509.BasicConstraints(False, None), True).add_extension(issuer, False)
    own = own.add_extension(x509.KeyUsage(**usage | {"digital_signature": True}), True)
    own = own.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "ca.crt").write_bytes(root.public_bytes(pem))
    (folder / "server.crt").write_bytes(own.sign(authority, hashes.SHA384()).public_bytes(pem))
    write_private_file(folder / "server.key", server.private_bytes(pem, form, serialization.NoEncryption()))


def write_node_key(folder: Path, worker: int) -> Path:
    """The private key of a node; the public one lies beside it, with .pub behind its name."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, path = ec.generate_private_key(ec.SECP384R1()), folder / f"node-{worker}"
    form = serialization.PrivateFormat.OpenSSH
    write_private_file(path, key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_name(f"{path.name}.pub").write_bytes(public)
    return path


def write_private_file(path: Path, data: bytes) -> None:
    """A file that its owner alone reads."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def is_address(host: str) -> bool:
    """Whether it is an address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# ---- commands ----------------------------------------------------------------------------------------------------
