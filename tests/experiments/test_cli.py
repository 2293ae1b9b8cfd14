"""Command lines: their list, exit codes, one JSON object, and help that begins with the examples."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import __main__ as listing
from experiments import sweep
from experiments.figures import drawing
from experiments.harness import cli, runner

ROOT = Path(__file__).parents[2]
TASK = ["--dataset", "synthetic-logistic?workers=4&samples=30&features=10", "--problem", "logistic", "--workers", "4"]
TASK += ["--compute-ms", "1", "--target", "5", "-b", "2", "4", "-C", "5", "-D", "1", "--lr", "0.05", "--rounds", "30"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drawing, "draw_figures", lambda folder: None)
    return tmp_path


def command(*words: str) -> Any:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "100"}
    return subprocess.run([sys.executable, "-m", "experiments", *words], env=env, capture_output=True, text=True)


def test_the_list_is_whole() -> None:
    done = command()
    assert done.returncode == 0
    with_command_line = {
        ".".join(path.relative_to(ROOT / "experiments").with_suffix("").parts).removesuffix(".__main__")
        for path in (ROOT / "experiments").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    } - {"__main__"}
    assert {*listing.COMMANDS, *listing.EXAMPLES} == with_command_line
    for name in (*with_command_line, *listing.reproduce_subcommands(), "laq-logistic"):
        assert re.search(rf"^ +{re.escape(name)} +\w", done.stdout, re.MULTILINE), name
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert done.stdout == command("--help").stdout


def test_a_command_is_started_by_its_name() -> None:
    done = command("swep")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: swep is no command: must be one of sweep, tune")
    done = command("plots", "none")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: none: must be a folder that an experiment wrote, with its identity.json; give another one\n"
    )


def test_help_begins_with_the_examples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{(sweep.__doc__ or '').splitlines()[0]}\n\n    python -m experiments.sweep  ")
    assert max(map(len, said.splitlines())) <= 100
    example, codes, usage = (said.index(words) for words in ("--rounds 2000", cli.EXIT_CODE_HELP, "usage: "))
    assert example < codes < usage < said.index("--bits INT ...")


def test_json_is_all_that_stands_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.main([*TASK, "--json", "--out", "out"])
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert (result["out"], result["notices"]) == ("out", [])
    summary = pl.read_parquet("out/summary.parquet").sort("bits_up_5")
    ((title, rows),) = result["tables"].items()
    assert title.startswith("fewest bits up to f - f* <= 5")
    assert [row["b"] for row in rows] == summary["bits"].to_list()
    assert [row["Mbit up"] for row in rows] == pytest.approx([bits / 1e6 for bits in summary["bits_up_5"]])
    assert "fewest bits up to f - f* <= 5" in said.err
    assert "figures and tables: out" in said.err
    sweep.main([*TASK, "--out", "out"])
    assert "figures and tables: out" in capsys.readouterr().out


def test_json_is_alone_beside_what_libraries_write() -> None:
    """As Gloo does, with the file descriptor; before and behind the command stdout is as ever."""
    script = """
import ctypes, os
from experiments.harness import cli
print("before")
with cli.command_line(["--json", "word"]) as words:
    print("python", words)
    os.write(1, b"library\\n")
    ctypes.CDLL(None).printf(b"C\\n")
    cli.write_json_result({"a": 1})
print("behind", flush=True)
os.write(1, b"the end\\n")
"""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # C's stdout too
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == 'before\n{"a": 1}\nbehind\nthe end\n'
    assert sorted(done.stderr.splitlines()) == ["C", "library", "python ['word']"]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ValueError("lr = -1: expected more"), 2, "error: lr = -1: expected more"),
        (FileNotFoundError("data is missing"), 2, "error: data is missing"),
        (OSError(errno.ENOSPC, "the disk is full"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "stopped; the same command continues"),
    ],
)
def test_exit_codes(error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(runner, "run", failing)
    with pytest.raises(SystemExit, match=re.escape(said)) as stop:
        sweep.main([*TASK, "--json"])
    assert stop.value.code == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--rounds", "many"])
    assert stop.value.code == 2
