"""Tests of experiments.federated: its tables agree with the library's counts, a deployment leaves no process behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import polars.selectors as cs
import psutil
import pytest

pytest.importorskip("flwr")

from experiments import deployment, federated, plots
from experiments.federation import local
from experiments.federation.flower_apps import PointSpec
from experiments.harness import cli, grid, processes, results

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
    assert (table["bits_up_end"] == 8 * table["payload_up"]).all()
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


def test_a_plan_is_the_same_in_every_process() -> None:
    choice = next(iter(grid.iter_settings(settings().axes, settings().data)))
    plan = PointSpec(choice, 10, False, None, 5, 60.0, "facts.json", "")
    assert PointSpec.from_hex_json(plan.to_hex_json()) == plan


def test_certificates_are_good_for_this_machine_only(tmp_path: Path) -> None:
    import ssl

    from cryptography import x509

    deployment.keys(tmp_path / "keys", server_names=("127.0.0.1", "localhost"), workers=2, days=30)
    tmp_path = tmp_path / "keys"
    names = ["ca.crt", "node-0", "node-0.pub", "node-1", "node-1.pub", "server.crt", "server.key"]
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


def handshake(client: Any, server: Any) -> bool:
    import ssl

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


def test_a_server_and_its_descendants_are_stopped(tmp_path: Path) -> None:
    flwr, port = local.FlowerCli(tmp_path, tmp_path, 1.0, dict(os.environ)), processes.find_free_port()
    inner = "import socket, subprocess, time; subprocess.Popen(['sleep', '60'], start_new_session=True)"
    inner += f"; server = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with local.start_server([sys.executable, "-c", inner], flwr, "parent", port) as process:
        family = [process, *process.children(recursive=True)]
        assert len(family) == 2
        assert all(map(processes.is_alive, family))
    assert not any(map(processes.is_alive, family))
    words = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    with (
        pytest.raises(ChildProcessError, match=r"(?s)parent did not start.*no such thing"),
        local.start_server(words, flwr, "parent", processes.find_free_port()),
    ):
        pass


def test_a_server_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SHUTDOWN_TIMEOUT", 0.5)
    flwr, port = local.FlowerCli(tmp_path, tmp_path, 1.0, dict(os.environ)), processes.find_free_port()
    inner = "import signal, socket, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    inner += f"; server = socket.create_server(('127.0.0.1', {port})); time.sleep(60)"
    with local.start_server([sys.executable, "-c", inner], flwr, "parent", port) as process:
        pass
    assert process.returncode == -signal.SIGKILL


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
def test_three_nodes_with_tls_equal_in_process(tmp_path: Path) -> None:
    words = ["--algorithm", "laq", "--rounds", "5", "--max-silence", "3"]
    status, output = run_to_end(command(tmp_path / "real", *words))
    assert status == 0, output
    here = federated.run(settings(*words, "--out", str(tmp_path / "in_process")))
    table, in_process = read(tmp_path / "real", "points"), read(here, "points")
    masks = [read(folder, "masks").row(0, named=True) for folder in (tmp_path / "real", here)]
    np.testing.assert_array_equal(results.unpack_mask(masks[0]), results.unpack_mask(masks[1]))
    assert table["answered"][0] == 1
    assert table["bits_up_end"][0] == 8 * table["payload_up"][0] == in_process["bits_up_end"][0]
    assert table["payload_down"][0] == in_process["payload_down"][0]
    # the SuperLink also counts its own requests, hashes of objects and the app
    assert table["superlink_inbound"][0] > table["bytes_up"][0]
    facts = json.loads((tmp_path / "real" / "facts" / "0.json").read_text())
    assert facts["refused"] == [0] * 5


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
def test_flowers_simulation_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = ["--algorithm", "laq", "--rounds", "3", "--transport", "simulation"]
    real = command(tmp_path / "real", *words)
    said = subprocess.run(real, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "3 simulated nodes" in said
    here = federated.run(settings(*words[:-2], "--out", str(tmp_path / "in_process")))
    masks = [read(folder, "masks").row(0, named=True) for folder in (tmp_path / "real", here)]
    np.testing.assert_array_equal(results.unpack_mask(masks[0]), results.unpack_mask(masks[1]))


@pytest.mark.skipif(find_spec("ray") is not None, reason="Ray is here")
def test_the_simulation_engine_needs_ray(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs Ray: pip install"):
        federated.run(settings("--transport", "simulation", "--algorithm", "laq", "--out", str(tmp_path / "run")))
