"""Every cell of the Colab notebook runs, in order, as plain Python."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = json.loads((Path(__file__).parents[1] / "experiments" / "laqjax_colab.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_all_cells_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAQJAX_SMOKE", "1")
    scope: dict[str, Any] = {}
    for source in CELLS:
        exec(compile(source, "cell", "exec"), scope)
    assert not (tmp_path / "constraints.txt").exists()
    assert (tmp_path / "results" / "sweep-smoke" / "summary.csv").exists()
    said = capsys.readouterr().out
    assert f"JAX {version('jax')} on 1 x cpu" in said
    assert "of 200 uploads" in said


def test_installing_keeps_the_jax_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (install,) = (source for source in CELLS if "pip" in source)
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(sys, "path", [*sys.path])
    exec(install, {"REPOSITORY": "https://example.org/laqjax.git"})
    checkout = str(tmp_path / "laqjax-checkout")  # the wheel has no experiments
    assert ran[0][:2] == ["git", "clone"]
    assert ran[0][-2:] == ["https://example.org/laqjax.git", checkout]
    assert ran[1][-3:] == ["-c", "constraints.txt", f"{checkout}[experiments]"]
    assert sys.path[0] == checkout
    assert {f"{name}=={version(name)}" for name in ("jax", "jaxlib")} <= set(
        (tmp_path / "constraints.txt").read_text().split()
    )


def test_it_holds_no_outputs() -> None:
    code = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
