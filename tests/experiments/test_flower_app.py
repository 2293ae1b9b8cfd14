"""The Flower app that `experiments.deployment new-app` writes: Flower takes it, and it trains."""

import ast
import importlib
import json
import re
import time
import tomllib
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("flwr")
from flwr.app import Context, RecordDict

from experiments import deployment
from experiments.federation import local
from laqjax.federation import _protocol
from laqjax.federation.testing import InProcessGrid

PYTHON = ["lazyapp/__init__.py", "lazyapp/client_app.py", "lazyapp/server_app.py", "lazyapp/task.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    deployment.new_app(tmp_path / "my-app")
    return tmp_path / "my-app"


def test_the_app_trains(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_protocol, "enable_compilation_cache", lambda folder: None)  # it is one for the whole process
    client, server = (importlib.import_module(f"lazyapp.{name}") for name in ("client_app", "server_app"))
    config = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {"num-server-rounds": 15}
    grid = InProcessGrid(client.app, range(config["num-workers"]))
    for context in grid.contexts.values():
        context.run_config = config
        context.node_config["num-partitions"] = 2
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a user's, not the tests'
        server.app(grid, Context(1, 1, {}, RecordDict(), config))
    lines = [line for line in caplog.messages if line.startswith("[ROUND")]
    assert [line.split("]")[0] for line in lines] == [f"[ROUND {round}/15" for round in range(16)]
    accuracies = [float(value) for value in re.findall(r"eval_acc (\S+)\b", lines[-1])]
    assert len(accuracies) == 2
    assert min(accuracies) > 0.8
    assert 2 <= sum(int(value) for value in re.findall(r"uploads (\d+)", "".join(lines))) < 15  # of 30
    printed = capsys.readouterr().out
    assert "'eval_acc'" in printed  # the result
    path = Path(re.search(r"The final model is in (\S+)", printed)[1])  # pyright: ignore[reportOptionalSubscript]
    assert path.is_relative_to(tmp_path)
    with np.load(path) as file:
        assert {name: array.shape for name, array in file.items()} == {"bias": (3,), "weight": (20, 3)}


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # Flower's
def test_flower_takes_the_app(folder: Path) -> None:
    from flwr.cli.build import build_fab_from_disk
    from flwr.cli.config_utils import load_and_validate

    assert load_and_validate(folder / "pyproject.toml")[1] == []
    with zipfile.ZipFile(BytesIO(build_fab_from_disk(folder))) as bundle:
        assert set(bundle.namelist()) == {*PYTHON, "LICENSE", "README.md", "pyproject.toml", ".info/CONTENT"}
    with pytest.raises(FileExistsError):
        deployment.new_app(folder)


def test_the_app_imports_the_package_alone(folder: Path) -> None:
    roots = set()
    for name in PYTHON:
        for node in ast.walk(ast.parse((folder / name).read_text())):
            roots |= {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else set()
            roots |= {str(node.module).split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    assert roots == {"flwr", "jax", "laqjax", "lazyapp", "numpy", "optax", "pathlib", "typing"}


def run_app(folder: Path, out: Path, simulation: bool, **settings: Any) -> list[str]:
    """Run the app with Flower's own commands, and return the lines of its log."""
    words = " ".join(f"{name}={value}" for name, value in settings.items())
    with local.run_local_federation(local.SuperLinkConfig(), 2, out, Console(), simulation) as flwr:
        said = flwr.command("run", str(folder), "laqjax", "--run-config", words, "--format", "json", *flwr.options)
        number, end = str(json.loads(said)["run-id"]), time.monotonic() + 300
        while not (state := get_status(flwr, number)).startswith("finished"):
            assert time.monotonic() < end, state
            time.sleep(1)
        lines = flwr.command("log", number, "laqjax", "--show").splitlines()
    assert state == "finished:completed", "\n".join(lines)
    return [line[line.index("[ROUND") :] for line in lines if "[ROUND" in line]


def get_status(flwr: local.FlowerCli, number: str) -> str:
    runs = json.loads(flwr.command("list", "laqjax", "--format", "json"))["runs"]
    return next(run["status"] for run in runs if str(run["run-id"]) == number)


@pytest.mark.distributed
def test_the_app_on_a_superlink(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 0 is a stock SuperNode, worker 1 a long-lived node with its own copy of the app."""
    make_node = local.make_node

    def make(flwr: local.FlowerCli, port: int, worker: int, workers: int) -> local.Server:
        node = (make_node if worker else local.make_supernode)(flwr, port, worker, workers)
        return replace(node, words=[word.replace("experiments.federation.flower_apps:client", "lazyapp.client_app:app") for word in node.words])  # fmt: skip

    monkeypatch.setattr(local, "make_node", make)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    lines = run_app(folder, tmp_path / "out", False, **{"num-server-rounds": 2})
    assert [line[:10] for line in lines] == ["[ROUND 0/2", "[ROUND 1/2", "[ROUND 2/2"]
    assert "workers 2, uploads 2" in lines[1]
    assert "eval_acc" in lines[2]


@pytest.mark.distributed
def test_the_app_on_the_simulation_engine(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    lines = run_app(folder, tmp_path / "out", True, **{"num-server-rounds": 2})
    assert [line[:10] for line in lines] == ["[ROUND 0/2", "[ROUND 1/2", "[ROUND 2/2"]
    assert "eval_acc" in lines[2]
