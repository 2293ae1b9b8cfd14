"""The generated sections of the factories' docstrings are up to date, and the script reports those that are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALGORITHMS = ROOT / "laqjax" / "algorithms"


def run_script(*arguments: str | Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / "docs" / "docstrings.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ALGORITHMS, tmp_path / "algorithms", ignore=shutil.ignore_patterns("__pycache__")))


def test_docstrings_are_up_to_date() -> None:
    assert run_script("--check") == (0, [])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        bits: Number b of bits", "        bits: Count b of bits"),  # edited by hand
        ("    window: int = 10,\n", "    window: int = 10,\n    period: int = 100,\n"),  # a new argument
        ("        >>> laqjax.algorithms.laq(oracle, lr=0.1, ", "        >>> laqjax.algorithms.laq(oracle, lr=0.2, "),
    ],
)
def test_a_changed_docstring_is_reported_and_written_again(folder: Path, old: str, new: str) -> None:
    path, start = folder / "_laq.py", "def laq("
    original = path.read_text()
    before, _, after = original.partition(start)
    changed = before + start + after.replace(old, new, 1)
    assert changed != original
    path.write_text(changed)
    assert run_script("--check", folder) == (1, ["_laq.py: laq: docstring is out of date; run `make docstrings`"])
    assert path.read_text() == changed
    assert run_script(folder) == (0, ["_laq.py: laq: rewritten"])
    assert run_script("--check", folder) == (0, [])
    assert (path.read_text() == original) == ("period" not in new)
    assert run_script(folder) == (0, [])


def test_text_above_the_arguments_is_kept(folder: Path) -> None:
    path = folder / "_baselines.py"
    changed = path.read_text().replace("Gradient descent: theta", "Méthode du gradient: theta", 1)
    path.write_text(changed)
    assert run_script(folder) == (0, [])
    assert path.read_text() == changed


def test_an_argument_without_a_description_is_named(folder: Path) -> None:
    path = folder / "_baselines.py"
    changed = path.read_text().replace("bits: int = 4", "codes: int = 4", 1)
    path.write_text(changed)
    error = "error: qgd: argument codes must have an entry in ARGUMENTS"
    assert run_script("--check", folder) == run_script(folder) == (1, [error])
    assert path.read_text() == changed
