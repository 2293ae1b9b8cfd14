"""Tests of experiments.federated: its tables agree with the library's counts, a deployment leaves no process behind."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import psutil
import pytest
from rich.console import Console

pytest.importorskip("flwr")

import httpx
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import message_to_proto
from flwr.supercore.task_identity import TaskIdentity

from experiments import deployment, federated, plots
from experiments.federation import flower_apps, local, warm, wire
from experiments.federation import node as long_lived
from experiments.federation.flower_apps import PointSpec
from experiments.federation.node import Node, answer_messages
from experiments.harness import cli, grid, processes, results
from laqjax.federation.testing import InProcessGrid

ROOT = Path(__file__).parents[2]
DATA = "synthetic-logistic?workers=3&samples=40&features=12&condition=10&heterogeneity=1"
SMALL = ["--problem", "logistic", "--dataset", DATA, "--workers", "3", "--lr", "0.002"]


def settings(*words: str) -> federated.Settings:
    return grid.parse_settings(federated.Settings, [*SMALL, *words], None)


def read(folder: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(folder / f"{name}.parquet")


def test_the_command_in_one_process(tmp_path: Path, capsys: Any) -> None:
    words = ["--rounds", "12", "--seeds", "0", "1", "--compute-ms", "1", "--out", str(tmp_path / "run")]
    out = federated.run(settings(*words))
    table, curves, masks = (read(out, name) for name in ("points", "curves", "masks"))
    assert table["algorithm"].unique(maintain_order=True).to_list() == ["laq", "gd", "qgd", "ef21"]
    assert (table["bytes_up"] == table["payload_up"] + table["heads_up"]).all()
    sent = [results.unpack_mask(row).sum() for row in masks.iter_rows(named=True)]
    assert sent == table["uploads_end"].to_list()
    laq, gd = (table.filter(algorithm=name) for name in ("laq", "gd"))
    assert laq["uploads_end"].sum() < gd["uploads_end"].sum()
    last = curves.group_by("point", maintain_order=True).last()
    assert (last["round"] >= 11).all()
    # row k has what was sent before model k: the last row lacks the last round's
    assert (last["bytes_up"] <= table["bytes_up"]).all()
    for name in ("loss.png", "loss.svg", "uploads.png", "summary.csv", "points.csv", "run.json", "identity.json"):
        assert (out / name).exists(), name
    said = capsys.readouterr().out
    assert "12 rounds" in said
    assert "median milliseconds" in said
    kept = (out / "facts" / "0.json").read_bytes()
    (out / "facts" / "1.json").unlink()  # as if it had been stopped there
    with cli.command_line(["--json"]):
        federated.run(settings(*words))
    result = json.loads(capsys.readouterr().out)
    assert [row["uploads"] for row in result["tables"]["12 rounds"]] == table["uploads_end"].to_list()
    assert read(out, "points").drop(cs.ends_with("_ms")).equals(table.drop(cs.ends_with("_ms")))
    assert (out / "facts" / "0.json").read_bytes() == kept
    (out / "loss.svg").unlink()
    plots.main(out)
    assert (out / "loss.svg").exists()


def test_points_that_cannot_run_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 of 1 points cannot run"):
        federated.run(settings("--algorithm", "laq", "--bits", "99", "--out", str(tmp_path / "run")))
    with pytest.raises(ValueError, match="rounds = 0"):
        federated.run(settings("--rounds", "0", "--out", str(tmp_path / "run")))


def first_spec(rounds: int = 5, **more: Any) -> PointSpec:
    chosen = settings("--algorithm", "laq")
    spec = flower_apps.make_specs(chosen.axes, chosen.data, False, None)[0]
    return replace(spec, rounds=rounds, **more)


def test_a_plan_is_the_same_in_every_process() -> None:
    plan = first_spec(folder="results", server={"min_replies": 2})
    assert PointSpec.from_hex_json(plan.to_hex_json()) == plan


def test_missing_and_rejected_workers_are_named() -> None:
    absent, rejected = np.zeros((6, 3), int), np.zeros((6, 3), int)
    found = [{"absent": absent, "rejected": rejected, "loss": [0.0] * 6}]
    federated.check_workers(settings(), found)
    absent[2, 1] = rejected[4, 2] = 1
    with pytest.raises(
        ConnectionError, match=r"worker 1 was absent in 1 .* of 6 rounds; .*worker 2 .* rejected in 1 of 6"
    ):
        federated.check_workers(settings(), found)
    rejected[:] = 0  # a slow worker may miss rounds that do not wait for all
    federated.check_workers(settings("--min-replies", "2"), found)
    absent[3:, 1] = 1, 2, 3
    with pytest.raises(ConnectionError, match="worker 1 was absent in 4"):
        federated.check_workers(settings("--min-replies", "2"), found)


def test_a_server_resumes_with_the_stats_of_earlier_rounds(tmp_path: Path) -> None:
    """Killed after a checkpoint and before the stats, or in the middle of a line."""
    spec = first_spec(folder=str(tmp_path))
    grid = InProcessGrid(flower_apps.make_client_app(spec), range(3))
    context = Context(1, 1, {}, RecordDict(), {})
    flower_apps.make_server_app(replace(spec, rounds=3))(grid, context)
    resume = (tmp_path / "resume.npz").read_bytes()
    flower_apps.make_server_app(replace(spec, rounds=4))(grid, context)
    (tmp_path / "resume.npz").write_bytes(resume)  # of round 2; the stats are of round 3
    with (tmp_path / "facts.jsonl").open("a") as file:
        file.write('{"round": 4, "loss"')
    flower_apps.make_server_app(replace(spec, rounds=6))(grid, context)
    rows = local.read_rounds(tmp_path / "facts.jsonl")
    assert [row["round"] for row in rows] == list(range(6))
    whole = tmp_path / "whole"
    whole.mkdir()
    undisturbed = InProcessGrid(flower_apps.make_client_app(spec), range(3))
    flower_apps.make_server_app(replace(spec, rounds=6, folder=str(whole)))(undisturbed, context)
    for name in ("sent", "loss"):
        assert [row[name] for row in rows] == [row[name] for row in local.read_rounds(whole / "facts.jsonl")]


def test_certificates_are_good_for_this_machine_only(tmp_path: Path) -> None:
    from cryptography import x509

    deployment.keys(tmp_path / "keys", server_names=("a.example.org",), workers=2, days=30)
    tmp_path = tmp_path / "keys"
    names = ["ca.crt", "nginx.conf", "node-0", "node-0.pub", "node-1", "node-1.pub", "server.crt", "server.key"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for secret in (tmp_path / "node-1", tmp_path / "server.key"):
        assert secret.stat().st_mode & 0o777 == 0o600
    certificate = x509.load_pem_x509_certificate((tmp_path / "server.crt").read_bytes())
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 30
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    for name, good in (("127.0.0.1", True), ("localhost", True), ("example.org", False)):
        ends = [ssl.MemoryBIO() for _ in range(2)]
        client = context.wrap_bio(ends[0], ends[1], server_hostname=name)
        assert handshake(client, server.wrap_bio(ends[1], ends[0], server_side=True)) is good


def test_keys_that_are_not_there_are_not_registered(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no node-\*\.pub: must be a folder that `keys` wrote"):
        deployment.register(tmp_path, superlink="127.0.0.1:1")
    with pytest.raises(ValueError, match="workers = 0: must be a whole number >= 1"):
        deployment.keys(tmp_path / "keys", server_names=("a.example.org",), workers=0)
    assert not list(tmp_path.iterdir())


def handshake(client: Any, server: Any) -> bool:
    done = [False, False]
    for _ in range(20):
        for i, end in enumerate((client, server)):
            try:
                end.do_handshake()
                done[i] = True
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError:
                return False
    return all(done)


def server(tmp_path: Path, inner: str, port: int, name: str = "parent", is_node: bool = False) -> local.Server:
    words = [sys.executable, "-c", inner]
    ready = partial(local.is_listening, port)
    return local.Server(name, words, tmp_path / f"{name}.log", dict(os.environ), ready, is_node)


def commands(tmp_path: Path, console: Console | None = None) -> local.FlowerCli:
    return local.FlowerCli(tmp_path, tmp_path, 1.0, dict(os.environ), console or Console(quiet=True))


def test_a_server_and_its_descendants_are_stopped(tmp_path: Path) -> None:
    flwr, port = commands(tmp_path), processes.find_free_port()
    inner = "import socket, subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    inner += f"; server = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with local.run_servers(flwr, [started := server(tmp_path, inner, port)]):
        family = [started.process, *started.process.children(recursive=True)]
        assert len(family) == 2
        assert all(map(processes.is_alive, family))
    assert not any(map(processes.is_alive, family))
    ends = server(tmp_path, "raise SystemExit('no such thing')", processes.find_free_port())
    with (
        pytest.raises(ChildProcessError, match=r"(?s)parent did not start.*no such thing"),
        local.run_servers(flwr, [ends]),
    ):
        pass


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SHUTDOWN_TIMEOUT", 0.5)
    port = processes.find_free_port()
    inner = "import signal, socket, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    inner += f"; server = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with local.run_servers(commands(tmp_path), [started := server(tmp_path, inner, port)]):
        pass
    assert started.process.returncode == -signal.SIGKILL


def test_a_killed_node_starts_again_and_a_killed_superlink_ends_the_run(tmp_path: Path) -> None:
    said = io.StringIO()
    flwr = commands(tmp_path, Console(file=said))
    (tmp_path / "facts.jsonl").write_text('{"round": 0}\n{"round": 1}\n')
    node, link = (
        server(tmp_path, "import time; time.sleep(60)", 0, name, name == "node 1") for name in ("node 1", "link")
    )
    for one in (node, link):
        one.is_ready = lambda: True
    with local.run_servers(flwr, [node, link]):
        flwr.check_processes(tmp_path)
        assert not said.getvalue()
        (first := node.process).kill()
        first.wait()
        flwr.check_processes(tmp_path)
        assert "node 1 was ended by signal 9: started again" in said.getvalue()
        assert processes.is_alive(node.process)
        link.process.kill()
        link.process.wait()
        with pytest.raises(ChildProcessError, match="link was ended by signal 9: 2 rounds are kept, round 2 is lost"):
            flwr.check_processes(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_started_process_ends_with_a_killed_command(tmp_path: Path) -> None:
    port = processes.find_free_port()
    inner = f"import socket, time; server = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    words = [sys.executable, "-c", local.STARTER, sys.executable, "-c", inner]
    parent = f"import subprocess, time; print(subprocess.Popen({words}).pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        child = psutil.Process(int(command.stdout.readline()))
        while not local.is_listening(port):
            time.sleep(0.05)
        command.kill()
    end = time.monotonic() + 10
    while processes.is_alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not processes.is_alive(child)


def test_processes_of_an_earlier_command_are_killed(tmp_path: Path) -> None:
    for home, stays in ((tmp_path / "a", False), (tmp_path / "b", True)):
        with psutil.Popen(["sleep", "60"], env={**os.environ, "FLWR_HOME": str(home)}) as process:
            local.kill_leftovers(tmp_path / "a")
            with contextlib.suppress(psutil.TimeoutExpired):
                process.wait(0.5 if stays else 10)
            assert processes.is_alive(process) is stays
            local.kill_leftovers(home)


def test_commands_of_flower_run_in_their_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder called laqjax beside the command would be taken for an app."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "flwr").write_text("#!/bin/sh\npwd\n")
    (tmp_path / "flwr").chmod(0o700)
    monkeypatch.setattr(local, "find_executable", lambda name: str(tmp_path / name))
    flwr = replace(commands(tmp_path), home=home)
    assert flwr.command("list", "laqjax") == f"{home}\n"
    (tmp_path / "flwr").write_text("#!/bin/sh\necho '{\"success\": false}'\n")
    (tmp_path / "ended").touch()
    with pytest.raises(
        ChildProcessError, match="does not know run 7: no round is complete; run the same command again"
    ):
        flwr.wait_for_run("7", tmp_path)


def test_the_proxy_counts_bytes_and_requests() -> None:
    with socket.create_server(("127.0.0.1", 0)) as service, wire.count_wire_bytes(service.getsockname()[1]) as counter:
        with socket.create_connection(("127.0.0.1", counter.port)) as client:
            peer = service.accept()[0]
            with peer:
                for parts in ([4, 6], [300]):  # a request in two parts, then one
                    for size in parts:
                        client.sendall(bytes(size))
                        assert len(peer.recv(1000)) == size
                    peer.sendall(bytes(2 * sum(parts)))
                    assert len(client.recv(1000)) == 2 * sum(parts)
        assert counter.count_since({}) == {"up": 310, "down": 620, "requests": 2}
        assert counter.count_since({"up": 10, "down": 20, "requests": 1}) == {"up": 300, "down": 600, "requests": 1}


# ---- the long-lived node -----------------------------------------------------------------------------------------


class FakeFleet:
    """SuperLink of one run; `broken_pushes` replies are lost together with the connection."""

    node_id = 5

    def __init__(self, messages: list[Message], broken_pushes: int = 0) -> None:
        self.messages, self.broken_pushes, self.replies = messages, broken_pushes, []
        self.heads = {message.metadata.message_id: message for message in messages}

    def pull(self) -> dict[str, bytes] | None:
        if not self.messages:
            return None
        message = self.messages.pop(0)
        return {"message": message_to_proto(message).SerializeToString(), "tree": b""}

    def get_run(self, run: int) -> Any:
        return SimpleNamespace(series_id=1)

    def get_run_config(self, run: Any) -> dict[str, Any]:
        return {"plan": "a"}

    def pull_content(self, head: Message, tree: bytes) -> Message:
        return self.heads[head.metadata.message_id]

    def push(self, reply: Message, seconds: float) -> None:
        if self.broken_pushes:
            self.broken_pushes -= 1
            raise httpx.ConnectError("lost")
        self.replies.append(reply)

    def has_ended(self, run: int) -> bool:
        return not self.messages


def counting_app(calls: list[int], fails: int = 0) -> ClientApp:
    """App that counts its messages in its state, and fails at one of them."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = context.state.get("count")
        count = 1 + (int(before["n"]) if isinstance(before, ConfigRecord) else 0)  # pyright: ignore[reportArgumentType]
        context.state["count"] = ConfigRecord({"n": count})
        calls.append(count)
        if len(calls) == fails:
            raise ValueError("no\ndata" + "x" * 1000)
        return Message(RecordDict({"n": ConfigRecord({"n": count})}), reply_to=message)

    return app


def messages(number: int) -> list[Message]:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    made = [Message(RecordDict(), 5, "train", group_id=str(i)) for i in range(number)]
    for i, message in enumerate(made):
        message.metadata.__dict__["_message_id"] = f"{i:064d}"
    return made


def run_until_end(node: Node, fleet: FakeFleet, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("experiments.federation.node.RUN_QUERY_INTERVAL", 0.0)
    return next(iter(answer_messages(node, fleet)))  # pyright: ignore[reportArgumentType]


def test_a_node_answers_and_a_failure_of_its_app_leaves_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fleet = FakeFleet(messages(4))
    assert run_until_end(Node(counting_app(calls, 3), "app", {}, tmp_path), fleet, monkeypatch) == 1
    assert calls == [1, 2, 3, 3]
    failed = [reply.has_error() for reply in fleet.replies]
    assert failed == [False, False, True, False]
    assert len(fleet.replies[2].error.reason) <= 300
    assert fleet.replies[3].content["n"]["n"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["worker"]


def test_a_killed_node_neither_computes_twice_nor_loses_a_reply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    sent = messages(2)
    fleet = FakeFleet(sent[:1], broken_pushes=1)
    with pytest.raises(httpx.ConnectError):  # the reply was saved, but has not arrived
        run_until_end(Node(counting_app(calls), "app", {}, tmp_path), fleet, monkeypatch)
    fleet = FakeFleet(sent[1:])
    assert run_until_end(Node(counting_app(calls), "app", {}, tmp_path), fleet, monkeypatch) == 1
    assert calls == [1, 2]
    assert [reply.content["n"]["n"] for reply in fleet.replies] == [1, 2]
    again = Node(counting_app(calls), "app", {}, tmp_path)  # killed after it has pulled a message
    fleet = FakeFleet(messages(3)[2:])
    again.keep_message(fleet.pull() or {})
    run_until_end(again, fleet, monkeypatch)
    assert calls == [1, 2, 3]
    assert len(fleet.replies) == 1


def test_a_node_uses_no_state_of_another_run(tmp_path: Path) -> None:
    calls: list[int] = []
    node, sent = Node(counting_app(calls), "app", {}, tmp_path), messages(2)
    node.answer(sent[0], {"plan": "a"}, 1)
    node.answer(sent[1], {"plan": "b"}, 1)
    assert calls == [1, 1]


def test_a_node_works_on_the_points_of_its_command_line_only(tmp_path: Path) -> None:
    words = [*SMALL, "--algorithm", "gd", "laq"]
    own = long_lived.make_specs(grid.parse_settings(long_lived.Settings, words, None))
    app = flower_apps.make_own_client(own, tmp_path)
    other = first_spec()
    other.choice["lr"] = 1.0
    context = Context(1, 5, {"partition-id": 0}, RecordDict(), {"plan": other.to_hex_json()})
    with pytest.raises(ValueError, match="must be one of this node's 2 points; give the node the problem"):
        app(messages(1)[0], context)
    plan = first_spec(rounds=7, folder="x", programs="/other", token="1", server={"min_replies": 2})
    context.run_config = {"plan": plan.to_hex_json()}
    with pytest.raises(ValueError, match="must be a head of"):  # accepted: the library reads the message
        app(messages(1)[0], context)


def test_a_node_refuses_other_versions_of_flower(monkeypatch: pytest.MonkeyPatch) -> None:
    long_lived.check_flower_version()
    monkeypatch.setattr(long_lived, "version", lambda name: "1.43.0")
    with pytest.raises(ImportError, match=r"Flower 1\.43\.0: a node needs 1\.42\.0; install .*flower-supernode"):
        long_lived.check_flower_version()


def test_another_process_under_the_same_pid_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        stale = psutil.Process(other.pid)
        monkeypatch.setattr(stale, "_ident", (other.pid, 1.0))  # as if the child had started at another time
        assert not processes.is_alive(stale)
        parent = psutil.Popen(["sleep", "60"])
        monkeypatch.setattr(parent, "children", lambda recursive: [stale])
        processes.stop_tree(parent)
        assert parent.returncode == -signal.SIGTERM
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_of_a_message_asks_the_warm_process(tmp_path: Path, monkeypatch: Any, fails: bool) -> None:
    def handle(message: Message, context: Context) -> Message:
        if fails:
            raise ValueError("no data")
        context.state["counter"] = ConfigRecord({"calls": 1})
        return Message(RecordDict({"about": ConfigRecord({"plan": context.run_config["plan"]})}), reply_to=message)

    monkeypatch.setattr(flower_apps, "handle_message", handle)
    monkeypatch.setattr(warm.sys, "argv", ["/somewhere/flwr-clientapp"])
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    path = tmp_path / f"warm-{os.getppid()}"
    path.write_text("1 00")  # of a warm process that was killed
    starts: list[Any] = []

    def start(words: list[str], **_: Any) -> SimpleNamespace:
        starts.append(words)
        threading.Thread(target=warm.serve, args=(path, os.getpid()), daemon=True).start()
        return SimpleNamespace(poll=lambda: None)

    monkeypatch.setattr(warm.subprocess, "Popen", start)
    for _ in range(2):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        context = Context(1, 5, {}, RecordDict(), {"plan": "laq"})
        reply = warm.handle_message(Message(RecordDict(), 5, "train"), context)
        assert reply.has_error() == fails
        if fails:
            assert reply.error.reason == "ValueError: no data"
        else:
            assert reply.content["about"]["plan"] == "laq"
            assert context.state["counter"]["calls"] == 1
    assert len(starts) == 1  # and the second message found it
    assert path.stat().st_mode & 0o077 == 0


def test_the_help_of_deployment_lists_all_commands(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        cli.parse_cli(deployment.COMMANDS, ["--help"], deployment.__doc__, answers=False)
    assert f"{{{','.join(deployment.COMMANDS)}}}" in capsys.readouterr().out


def test_processes_find_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's commands are started anywhere, and the experiments are not installed."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    look = "from importlib.util import find_spec; raise SystemExit(find_spec('experiments.federation.flower_apps') is None)"
    subprocess.run([sys.executable, "-c", look], cwd=tmp_path, env=local.subprocess_env(tmp_path, 0.2), check=True)


# ---- a SuperLink and SuperNodes ----------------------------------------------------------------------------------


def command(out: Path, *words: str) -> list[str]:
    options = ["--transport", "deployment", "--out", str(out)]
    return [sys.executable, "-m", "experiments.federated", *SMALL, *options, *words]


def run_to_end(words: list[str], number: int | None = None) -> tuple[int, str]:
    """Run a command, with a signal after its start; return (exit status, output). None of its processes may be left."""
    with psutil.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        output = ""
        while "SuperLink at" not in output and (line := process.stdout.readline()):
            output += line
        family = set(process.children(recursive=True))
        end = time.monotonic() + 8  # the run has then started processes for the apps
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family |= set(process.children(recursive=True))
            if number is not None and time.monotonic() > end:
                process.send_signal(number)
                number = None
            time.sleep(0.2)
        output += process.stdout.read()
    assert len(family) >= 4  # a SuperLink, three SuperNodes and their children
    assert not [one for one in family if processes.is_alive(one)]
    return process.returncode, output


@pytest.mark.distributed
@pytest.mark.parametrize("nodes", ["long_lived", "supernode"])
def test_three_nodes_with_tls_equal_in_process(nodes: str, tmp_path: Path) -> None:
    words = ["--algorithm", "laq", "--rounds", "5", "--max-silence", "3"]
    status, output = run_to_end(command(tmp_path / "real", *words, "--nodes", nodes, "--measure-wire"))
    assert status == 0, output
    beats = re.findall(r"a heartbeat of a node is a request of (\d+)", output)
    assert len(beats) == (nodes == "long_lived")
    assert all(600 < int(size) < 1500 for size in beats)
    here = federated.run(settings(*words, "--out", str(tmp_path / "in_process")))
    table, in_process = read(tmp_path / "real", "points"), read(here, "points")
    assert_same_masks(tmp_path / "real", here)
    assert table["accepted"][0] == 1
    assert table["bits_up_end"][0] == in_process["bits_up_end"][0]
    assert table["payload_down"][0] == in_process["payload_down"][0]
    # the SuperLink also counts its own requests, hashes of objects and the app
    assert table["superlink_inbound"][0] > table["bytes_up"][0]
    assert 15 * table["wire_up"][0] > table["superlink_inbound"][0]  # with TLS, HTTP and signatures
    facts = json.loads((tmp_path / "real" / "facts" / "0.json").read_text())
    assert facts["rejections"] == [0] * 5
    assert not (tmp_path / "real" / "flower" / "private").exists()  # the keys


def assert_same_masks(*folders: Path) -> None:
    first, second = (results.unpack_mask(read(folder, "masks").row(0, named=True)) for folder in folders)
    np.testing.assert_array_equal(first, second)


def find_processes(out: Path, word: str = "") -> list[psutil.Process]:
    """Return the processes that a command with these results has started, by a word of their command lines."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(out / "flower" / "private"):
                found += [process] if word in " ".join(process.cmdline()) else []
    return found


def wait_for_rounds(out: Path, number: int, process: psutil.Popen) -> None:
    while len(local.read_rounds(out / "flower" / "server-0" / "facts.jsonl")) < number:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


@pytest.mark.distributed
def test_killed_processes_change_no_result(tmp_path: Path) -> None:
    """kill -9 of a node at any moment, of the SuperLink and of the command."""
    words, out = ["--algorithm", "laq", "--rounds", "24", "--max-silence", "3", "--deadline", "60"], tmp_path / "real"
    words += ["--dataset", DATA.replace("workers=3", "workers=2"), "--workers", "2"]
    start = partial(psutil.Popen, command(out, *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)  # fmt: skip
    with start() as process:
        wait_for_rounds(out, 3, process)
        time.sleep(np.random.default_rng().uniform(0, 0.5))
        find_processes(out, "node --superlink")[0].kill()
        wait_for_rounds(out, 6, process)
        find_processes(out, "bin/flower-superlink")[0].kill()
        killed = time.monotonic()
        output = process.stdout.read()
        assert process.wait() == 1
        assert time.monotonic() - killed < 30
    assert re.search(r"the node of worker \d was ended by signal 9: started again", output)
    assert re.search(r"the SuperLink was ended by signal 9: \d+ rounds are kept, round \d+ is lost", output)
    assert not find_processes(out)
    with start() as process:
        wait_for_rounds(out, 10, process)
        process.kill()
    end = time.monotonic() + 20
    while find_processes(out) and time.monotonic() < end:
        time.sleep(0.2)
    assert not find_processes(out)
    done = subprocess.run(command(out, *words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ rounds of an earlier command are kept", done.stdout)
    assert_same_masks(out, federated.run(settings(*words, "--out", str(tmp_path / "in_process"))))
    assert sorted(path.name for path in (out / "flower").iterdir() if path.is_dir()) == ["programs"]


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_process_is_left_after_a_signal(number: int, tmp_path: Path) -> None:
    status, output = run_to_end(command(tmp_path, "--algorithm", "laq", "--rounds", "500"), number)
    assert status != 0
    assert "stopped" in output


@pytest.mark.distributed
def test_no_process_is_left_after_a_failure(tmp_path: Path) -> None:
    """A deadline that no worker meets."""
    status, output = run_to_end(command(tmp_path, "--algorithm", "laq", "--rounds", "2", "--deadline", "0.01"))
    assert status != 0
    assert "see the logs in" in output


@pytest.mark.distributed
@pytest.mark.skipif(shutil.which("nginx") is None, reason="needs nginx")
def test_the_proxy_passes_the_fleet_api_only(tmp_path: Path) -> None:
    """Whoever has the certificate of the authority could else run an app on the machine of the SuperLink."""
    from experiments.federation import fleet

    flwr, (inner, outer) = commands(tmp_path), (processes.find_free_port() for _ in range(2))
    flwr.environment = local.subprocess_env(tmp_path, 0.2)
    folder = tmp_path / "keys"
    deployment.keys(folder, server_names=("a.example.org",), workers=1)
    for path in folder.iterdir():
        path.rename(tmp_path / path.name)
    config = (tmp_path / "nginx.conf").read_text().replace("8000", f"127.0.0.1:{outer}").replace("8001", str(inner))
    (tmp_path / "nginx.conf").write_text(config)
    words = [shutil.which("nginx") or "", "-p", str(tmp_path), "-c", "nginx.conf"]
    ready = partial(local.is_listening, outer)
    proxy = local.Server("nginx", words, tmp_path / "nginx.log", dict(os.environ), ready)
    with local.run_servers(flwr, [local.make_superlink(flwr, inner, False), proxy]):
        local.write_connection_config(flwr, f"127.0.0.1:{inner}", tmp_path / "ca.crt")
        flwr.command("supernode", "register", str(tmp_path / "node-0.pub"), "laqjax")
        with fleet.connect(f"127.0.0.1:{outer}", tmp_path / "ca.crt", tmp_path / "node-0", 0) as node:
            assert node.pull() is None
        context = ssl.create_default_context(cafile=str(tmp_path / "ca.crt"))
        for path in (
            "control/list-runs",
            "fleet/../control/list-runs",
            "fleet/%2e%2e/control/list-runs",
            "runtime/responses",
        ):
            with contextlib.closing(http.client.HTTPSConnection("127.0.0.1", outer, context=context)) as connection:
                connection.request("POST", f"/v1/{path}", b"")
                assert connection.getresponse().status == 404, path
        local.write_connection_config(flwr, f"127.0.0.1:{outer}", tmp_path / "ca.crt")
        with pytest.raises(ChildProcessError, match="flwr list"):
            flwr.command("list", "laqjax")


@pytest.mark.distributed
def test_flowers_simulation_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ["--algorithm", "laq", "--rounds", "3", "--transport", "simulation"]
    real = command(tmp_path / "real", *words)
    said = subprocess.run(real, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "3 simulated nodes" in said
    here = federated.run(settings(*words[:-2], "--out", str(tmp_path / "in_process")))
    assert_same_masks(tmp_path / "real", here)


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is here")
def test_the_simulation_engine_needs_ray(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs Ray: pip install"):
        federated.run(settings("--transport", "simulation", "--algorithm", "laq", "--out", str(tmp_path / "run")))
