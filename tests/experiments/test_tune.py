"""The search: the paper's setting first, seeded, batches of trials, and nothing lost by a kill."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from experiments import plots, sweep, tune
from experiments.harness import cli, grid, runner

TASK = ["--dataset", "synthetic-logistic?workers=4&samples=30&features=10", "--problem", "logistic", "--workers", "4"]
TASK += [
    "--compute-ms",
    "1",
    "--target",
    "5",
    "--rounds",
    "60",
    "--eval-every",
    "60",
    "--lr",
    "0.05",
    "0.1",
    "--batch-size",
    "4",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """f* is kept."""
    monkeypatch.chdir(home)


def run(out: Path, *more: str) -> pl.DataFrame:
    tune.run(grid.parse_settings(tune.Settings, [*TASK, *more, "--out", str(out)], None))
    return pl.read_parquet(out / "trials.parquet")


def test_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calm = run(tmp_path / "calm", "--trials", "11")
    assert calm["trial"].to_list() == list(range(11))
    assert calm.select("bits", "max_silence", "window", "xi", "lr").row(0) == (4, 100, 10, 0.8, 0.05)
    assert calm.select("bits", "max_silence", "window", "xi", "lr").n_unique() == 11
    assert calm["bits"].is_between(2, 8).all()
    assert calm["lr"].is_between(0.05, 0.1).all()
    best = json.loads((tmp_path / "calm" / "best.json").read_text())
    assert best["best"]["bits_up"] == calm["bits_up"].min()
    assert best["bits_saved"] == pytest.approx(1 - calm["bits_up"].min() / calm["bits_up"][0])
    assert best["bits_saved"] > 0
    said = " ".join(capsys.readouterr().out.split())
    with cli.command_line(["--json"]):
        run(tmp_path / "calm", "--trials", "11")
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "calm" / "result.json").read_text())
    assert printed["best"] == best["best"]
    assert "best of 11 trials: b = " in said
    assert "fewer than the first setting" in said
    for name in ("trials.png", "trials.svg", "trials.csv"):
        assert (tmp_path / "calm" / name).stat().st_size > 500
    (tmp_path / "calm" / "trials.png").unlink()
    plots.main(tmp_path / "calm")
    assert (tmp_path / "calm" / "trials.png").exists()
    # stopped in the second batch, then killed in the third: the same trials in the end
    out, measured = tmp_path / "out", runner.Batch.run
    for error in (KeyboardInterrupt, MemoryError):
        calls = []

        def failing(*given: Any, calls: list[int] = calls, error: type[BaseException] = error) -> Any:
            calls.append(1)
            if len(calls) > 1:
                raise error
            return measured(*given)

        monkeypatch.setattr(runner.Batch, "run", failing)
        with pytest.raises(error):
            run(out, "--trials", "11")
    assert len(pl.read_parquet(out / "trials.parquet")) == 4
    monkeypatch.setattr(runner.Batch, "run", measured)
    assert_frame_equal(run(out, "--trials", "11"), calm)
    monkeypatch.setattr(runner.Batch, "run", None)
    assert_frame_equal(run(out, "--trials", "11"), calm)
    with pytest.raises(ValueError, match="search_seed: 0 there, 1 given"):
        run(out, "--trials", "11", "--search-seed", "1")
    with pytest.raises(ValueError, match=r"cannot be continued: each trial follows .* \(rounds: 60 there, 80 given\)"):
        run(out, "--trials", "11", "--rounds", "80")


@pytest.mark.long
def test_a_trial_costs_what_the_sweep_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds; choices that leave out the paper's b, of which one never gets there."""
    axes = ["-b", "3", "-C", "10", "20", "30", "-D", "1", "--xi", "0.8", "--seeds", "0", "1"]
    table = run(tmp_path / "tune", *axes, "--lr", "1e-9", "0.05", "0.1", "--batch-size", "2", "--trials", "9")
    assert table.select("bits", "max_silence", "window", "lr").row(0) == (4, 100, 10, 0.02)
    assert set(table["lr"][1:]) <= {1e-9, 0.05, 0.1}
    assert table["bits_up"].is_null().any()
    best = json.loads((tmp_path / "tune" / "best.json").read_text())["best"]
    assert best["reached"] == 2
    monkeypatch.setattr(sweep, "print_report", lambda folder, console: None)
    axes = ["-b", "3", "-C", str(best["max_silence"]), "-D", "1", "--xi", "0.8", "--seeds", "0", "1"]
    sweep.main([*TASK, *axes, "--lr", str(best["lr"]), "--out", str(tmp_path / "sweep")])
    (row,) = pl.read_parquet(tmp_path / "sweep" / "summary.parquet").iter_rows(named=True)
    for name in ("rounds", "uploads", "bits_up"):
        assert row[f"{name}_5"] == pytest.approx(best[name], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-b", "0", "8"], "bits = 0"),
        (["--lr", "0", "1"], "must be a range of positive numbers"),
        (["--problem", "logistic", "ridge"], "must be one; a search runs on one problem"),
        (["--seeds"], "axis seed has no values"),
        (["--trials", "0"], "trials = 0: must be"),
        (["--memory-gib", "1e-9"], "memory_limit = 0 MiB: must be at least"),
    ],
)
def test_refusals(given: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_all_batches_share_one_program() -> None:
    """Also those without the first setting, whose window may be longer than all of the search."""
    search = tune.Search(grid.parse_settings(tune.Settings, [*TASK, "-D", "1"], None))
    assert search.first["window"] == 10
    points = [*search.make_points([search.first]), *search.make_points([search.first | {"window": 1}])]
    assert len(runner.group_by_structure(points)) == 1


def test_a_schedule_and_an_optimizer_are_searched_as_given() -> None:
    given = [*TASK[:6], "--set", "optimizer", "adam", "--set", "lr", "cosine:0.05:50"]
    first = tune.Search(grid.parse_settings(tune.Settings, given, None)).first
    assert (first["optimizer"], first["lr"]) == ("adam", "cosine:0.05:50")
