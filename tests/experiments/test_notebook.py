"""The Colab notebook is what its text source makes, and every cell of it runs in a kernel."""

import importlib.util
import inspect
import re
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jupytext
import nbclient
import numpy as np
import pytest

import laqjax
from laqjax import compressors, rules
from laqjax._core.round import worker_step

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "experiments" / "notebook" / "laqjax_colab.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
CELLS = jupytext.read(SOURCE).cells
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
TEXT = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")


def with_(word: str) -> str:
    (source,) = (source for source in CODE if word in source)
    return source


class Ran(NamedTuple):
    """An executed notebook: its code cells, its settings, and the folder that it ran in."""

    cells: list[Any]
    settings: dict[str, Any]
    folder: Path

    def printed(self, word: str) -> str:
        (cell,) = (cell for cell in self.cells if word in cell.source)
        return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("1", id="smoke", marks=pytest.mark.long),
        pytest.param("0", id="full", marks=pytest.mark.long),
    ],
)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder, home = tmp_path_factory.mktemp("notebook"), tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "IPYTHONDIR": str(home),
            "JAX_PLATFORMS": "cpu",
            "LAQJAX_SMOKE": request.param,
            "PYTHONPATH": str(ROOT),
        }.items():
            patch.setenv(name, value)
        book = jupytext.read(NOTEBOOK)
        nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
        settings: dict[str, Any] = {}
        exec(with_("LAQJAX_SMOKE"), settings)
    return Ran([cell for cell in book.cells if cell.cell_type == "code"], settings, folder)


# ---- the file ---------------------------------------------------------------------------------------------------


def test_it_is_what_its_source_makes() -> None:
    made, source = jupytext.read(NOTEBOOK), jupytext.read(SOURCE)
    read = [[(cell.cell_type, cell.source, cell.metadata) for cell in book.cells] for book in (made, source)]
    assert read[0] == read[1], "make notebook"
    assert {**made.metadata, "jupytext": None} == {**source.metadata, "jupytext": None}
    assert all(cell.outputs == [] and cell.execution_count is None for cell in made.cells if cell.cell_type == "code")


def test_one_address() -> None:
    (address,) = re.findall(r'^REPOSITORY = "(.*)"$', CODE[0], re.MULTILINE)
    assert address == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    place = f"{address.removeprefix('https://github.com/')}/blob/main/{NOTEBOOK.relative_to(ROOT)}"
    assert f"](https://colab.research.google.com/github/{place})" in CELLS[0].source
    assert SOURCE.read_text().count(address) == 1


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((\.\./.*?)\)", TEXT)
    assert links
    assert [link for link in links if not (SOURCE.parent / link).exists()] == []


def test_installing_keeps_the_jax_that_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.setattr(sys, "path", [*sys.path])
    scope: dict[str, Any] = {}
    exec(CODE[0], scope)
    checkout = str(tmp_path / "laqjax-checkout")  # the wheel has no experiments
    assert ran[0][:2] == ["git", "clone"]
    assert ran[0][-4:] == ["--depth", "1", scope["REPOSITORY"], checkout]
    assert ran[1][-3:] == ["-c", "constraints.txt", f"{checkout}[experiments]"]
    assert sys.path[0] == checkout
    assert {f"{name}=={version(name)}" for name in ("jax", "jaxlib")} <= set(
        (tmp_path / "constraints.txt").read_text().split()
    )


def test_a_model_without_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    scope: dict[str, Any] = {"importlib": importlib, "jax": jax, "jnp": jnp}
    exec(with_("def loss"), scope)
    assert set(scope["params"]) == {"in", "out"}
    losses = scope["loss"](scope["params"], np.full((3, 784), 255, np.uint8), np.arange(3))
    np.testing.assert_allclose(losses, np.full(3, np.log(10)), rtol=1e-6)


# ---- what it does -----------------------------------------------------------------------------------------------


def test_all_cells_run_and_leave_nothing(ran: Ran) -> None:
    assert [cell.execution_count for cell in ran.cells] == list(range(1, len(CODE) + 1))
    said = [output for cell in ran.cells for output in cell.outputs if output.get("name") == "stderr"]
    assert said == []
    assert list(ran.folder.iterdir()) == []
    assert ran.printed("LAQJAX_SMOKE") == f"CPU: JAX {version('jax')} on 1 x cpu\n"


def test_figures_are_inline(ran: Ran) -> None:
    """Altair's default renderer, which Colab shows as it stands: HTML with the specification of the figure."""
    html = [[output.get("data", {}).get("text/html", "") for output in cell.outputs] for cell in ran.cells]
    charts = [sum("vegaEmbed(" in text for text in cell) for cell in html]
    assert charts == [int("alt.Chart(" in cell.source or cell.source.endswith("curves(runs)")) for cell in ran.cells]
    assert sum(charts) == 5


def test_code_shown_is_the_library_s(ran: Ran) -> None:
    shown = [output.data.get("text/markdown", "") for cell in ran.cells for output in cell.outputs if "data" in output]
    for piece in (compressors.Grid.encode, rules.LazyRule.should_send, worker_step):
        assert any(textwrap.dedent(inspect.getsource(piece)) in text for text in shown)


def test_what_it_says_of_laq_and_gd_is_what_run_gives(ran: Ran, mnist: laqjax.Shards) -> None:
    shards, rounds = laqjax.Shards(*(array[:, : ran.settings["ROWS"]] for array in mnist)), ran.settings["ROUNDS"]
    problem = laqjax.problems.Softmax(784, 10)
    oracle, start, key = problem.oracle(), problem.init_params(0), jax.random.key(0)
    laq = laqjax.algorithms.laq(oracle, lr=0.02, num_workers=10, bits=4, max_silence=100, window=10, xi=0.8)
    info = laqjax.run(laq, start, shards, rounds, key).info
    sent, message = info.sent.sum(), 32 + 4 * 7850
    assert 10 <= sent < 0.5 * info.sent.size
    said = ran.printed('test accuracy {right:.1%}", end')
    assert f"LAQ: loss {info.loss[0]:.3f} -> {info.loss[-1]:.3f}, " in said
    assert f"{sent} of {10 * rounds} uploads, {sent * message / 1e6:.4g} Mbit up\n" in said
    assert f"{10 * rounds} of {10 * rounds} uploads, {10 * rounds * 32 * 7850 / 1e6:.4g} Mbit up\n" in said

    # the cheapest of the sweep, alone; in another size of batch it rounds otherwise
    said = ran.printed("nanargmin")
    (found,) = re.findall(r"at loss (.*?) within .*\n.*b = (\d+), C = (\d+), D = (\d+) with (.*?) Mbit", said)
    goal, b, c, d, mbit = map(float, found)
    best = laqjax.algorithms.laq(
        oracle, lr=0.02, num_workers=10, bits=int(b), max_silence=int(c), window=int(d), xi=0.8
    )
    info = laqjax.run(best, start, shards, rounds, key).info
    spent = info.bits_up[: np.argmax(info.loss <= goal)].sum(dtype="int64") / 1e6
    assert mbit == pytest.approx(spent, rel=0.1)
    assert said.endswith(f"GD {rounds // 2 * 10 * 32 * 7850 / 1e6:.4g} Mbit\n")


def test_a_model_of_ones_own_learns(ran: Ran) -> None:
    said = ran.printed("optimizer")
    laq, gd = re.findall(r"loss (.*), test accuracy (.*)%, (\d+) uploads", said)
    assert int(gd[2]) == ran.settings["ROUNDS"] // 3 * 10
    assert 10 < int(laq[2]) < 0.9 * int(gd[2])
    assert float(laq[1]) == pytest.approx(float(gd[1]), abs=5)
