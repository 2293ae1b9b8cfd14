"""Every method at its best: chosen on some seeds, reported on others; grids grow where the best lies on their edge."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console

from experiments import compare
from experiments.figures import drawing, ranking, style
from experiments.harness import cli, comparison, grid, runner, storage

ROOT = Path(__file__).parents[2]
TASK = ["--dataset", "synthetic-logistic?workers=4&samples=30&features=10", "--problem", "logistic", "--workers", "4"]
TASK += ["--compute-ms", "1", "--target", "10", "4", "--rounds", "80", "--eval-every", "20", "--batch-size", "8"]
TASK += ["--num-lrs", "2", "--seeds", "0", "1", "--report-seeds", "2", "3", "4"]
PAIR = ["--algorithm", "gd", "laq", "--xi", "0.4", "-b", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """f* is kept."""
    monkeypatch.chdir(home)


def run(out: Path, *more: str) -> pl.DataFrame:
    methods = [] if "--algorithm" in more else PAIR
    compare.run(grid.parse_settings(comparison.Settings, [*TASK, *methods, *more, "--out", str(out)], None))
    return pl.read_parquet(out / "best.parquet")


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        run(home / "whole")
    return home / "whole"


def test_a_method_without_a_row_is_compared_over_lr_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(comparison.Settings().axes.algorithm) == set(grid.algorithm_factories())
    monkeypatch.delitem(comparison.MEMBERS, "qgd")
    settings = grid.parse_settings(comparison.Settings, [*TASK, "--algorithm", "qgd"], None)
    (axes,) = comparison.MethodGrids(settings, Console()).grids.values()
    assert list(axes) == ["lr"]


def test_quick_replaces_what_is_not_given() -> None:
    read = lambda *given: comparison.apply_quick_defaults(grid.parse_settings(comparison.Settings, given, None))  # noqa: E731
    plain, quick = comparison.Settings(), read("--quick")
    assert read() == plain
    assert (quick.axes.algorithm, quick.axes.seeds, quick.report_seeds) == (("gd", "laq", "ef21"), (0,), (1, 2))
    assert (quick.out, quick.budget.rounds, quick.goal.target) == (Path("results/compare-quick"), 60, (0.1, 0.03))
    mine = read("--quick", "--algorithm", "qgd", "--seeds", "3", "4", "--num-lrs", "7", "--target", "2")
    assert (mine.axes.algorithm, mine.axes.bits, mine.axes.seeds) == (("qgd",), (), (3, 4))
    assert (mine.num_lrs, mine.goal.target) == (7, (2.0,))


def test_the_best_is_chosen_on_some_seeds_and_reported_on_others(whole: Path) -> None:
    best = pl.read_parquet(whole / "best.parquet")
    assert len(best) == 2 * 2 * 4  # methods, targets, criteria
    tried = pl.concat([pl.read_parquet(p) for p in sorted(whole.glob("[swf]*/points.parquet"))], how="diagonal_relaxed")
    again = pl.read_parquet(whole / "report" / "points.parquet")
    theory = pl.read_parquet(whole / "search" / "points.parquet")  # the first of a grid
    assert set(tried["seed"]) == {0, 1}
    assert set(again["seed"]) == {2, 3, 4}
    for row in best.filter(pl.col("cheapest in") == "bits up").iter_rows(named=True):
        cost, mine = f"bits_up_{row['target']}", pl.col("algorithm") == row["method"]
        means = tried.filter(mine).group_by("lr").agg(pl.col(cost).mean(), pl.col(cost).null_count().alias("missed"))
        ((lr, least),) = (
            (lr, value)
            for lr, value in means.select("lr", cost).iter_rows()
            if row["setting"].startswith(f"lr={lr:.3g}")
        )
        assert least == means.filter(pl.col("missed") == 0)[cost].min()  # of several, one
        reported = again.filter(mine, pl.col("lr") == lr)[cost]
        assert row["bits_up"] == pytest.approx(reported.mean())
        assert row["bits_up_ci95"] == pytest.approx(4.302653 * reported.to_numpy().std(ddof=1) / np.sqrt(3))
        first = again.filter(mine, pl.col("lr") == theory.filter(mine)["lr"][0])[cost].mean()
        assert row["gain over theory"] == pytest.approx(first / row["bits_up"])


def test_the_table_is_one_object_and_the_page_has_the_fronts(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, tried = (pl.read_parquet(whole / f"{name}.parquet") for name in ("best", "tried"))
    with cli.command_line(["--json"]):
        compare.print_report(whole, Console())
    printed = json.loads(capsys.readouterr().out)
    assert storage.read_json(whole / "result.json") == printed
    (rows,) = printed["tables"].values()
    known = {(row["method"], row["target"]): row["bits_up"] for row in best.filter(pl.col("cheapest in") == "bits up").iter_rows(named=True)}  # fmt: skip
    assert {(row["method"], target): row[target] for row in rows for target in ("10", "4")} == known
    figures = dict(drawing.build_figures(*drawing.read_tables(whole)))
    assert list(figures) == ["bits", "fronts-10", "fronts-4", "loss"]
    for target in ("10", "4"):
        rows = [row for rows in style.to_spec(figures[f"fronts-{target}"])["datasets"].values() for row in rows]
        for name in ("gd", "laq"):
            edge = ranking.pareto_front(tried.filter(pl.col("algorithm") == name), target)
            drawn = {(row["bits"], row["rounds"]) for row in rows if row["name"] == name}
            assert drawn == set(edge.select(f"bits_up_{target}", f"rounds_{target}").iter_rows())
    for panel in style.to_spec(figures["bits"])["concat"]:  # every method stands in each, in one order
        assert panel["layer"][0]["encoding"]["y"]["scale"]["domain"] == ["laq (lazy)", "gd (full)"]


def test_a_grid_grows_where_its_best_lies_on_the_edge(whole: Path) -> None:
    """Two steps of a grid have nothing but edges; then the distance about the best one is halved, twice."""
    tried = pl.read_parquet(whole / "tried.parquet").filter(pl.col("algorithm") == "gd")
    assert len(tried) > 2
    steps = np.sort(tried["lr"].to_numpy())
    ratios = np.log2(steps[1:] / steps[:-1])
    rounds = tried.sort("lr")["rounds_4"].to_list()
    best = int(np.argmin([np.inf if k is None else k for k in rounds]))
    assert 0 < best < len(rounds) - 1
    near = tried.filter(pl.col("rounds_4").is_not_null())["lr"].to_numpy()
    assert set(np.round(ratios, 6)) <= {1, 0.5, 0.25, 0.75}
    assert ratios.min() == pytest.approx(0.25)
    assert len(near) > 3
    (row,) = (
        pl.read_parquet(whole / "best.parquet")
        .filter(pl.col("method") == "gd", pl.col("target") == "4", pl.col("cheapest in") == "rounds")
        .iter_rows(named=True)
    )
    assert (row["widened"], row["at the edge"]) == ("lr", "")


def test_a_grid_of_local_steps_grows_to_a_limit() -> None:
    settings = grid.parse_settings(comparison.Settings, [*TASK, "--algorithm", "fedavg"], None)
    space = comparison.MethodGrids(settings, Console())
    (lr, *_), known = space.grids["fedavg"]["local_lr"], [2, 5]

    def wider(best: int) -> list[Any]:
        tried = pl.DataFrame({"algorithm": "fedavg", "local_lr": lr, "num_local_steps": known})
        found = comparison.values_beyond_edges(space, "fedavg", {"local_lr": lr, "num_local_steps": best}, tried)
        return [value for axis, value in found if axis == "num_local_steps"]

    assert wider(2) == [1]
    assert wider(5) == [12, 31]
    known += [12, 31]
    assert wider(31) == []


def test_it_goes_on_where_it_was(whole: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, calls = runner.Batch.run, []

    def failing(self: runner.Batch, *given: Any) -> Any:
        calls.append(len(self.points))
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        return ran(self, *given)

    monkeypatch.setattr(runner.Batch, "run", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(home / "cut")
    assert_frame_equal(run(home / "cut"), pl.read_parquet(whole / "best.parquet"))
    assert len(calls) - 2 == len(list((home / "cut").glob("*/batches/*-points.parquet")))
    assert {path.name for path in whole.glob("*.png")} == {"bits.png", "fronts-4.png", "fronts-10.png", "loss.png"}


@pytest.mark.long
def test_it_goes_on_to_more_rounds_and_a_smaller_target(whole: Path, home: Path) -> None:
    """The tables of a straight run; what was chosen with fewer is set aside."""
    more = ["--rounds", "160", "--target", "10", "4", "2"]
    shutil.copytree(whole, home / "more")
    for out in ("straight", "more"):
        run(home / out, *more)
    for name in ("best", "tried"):
        assert_frame_equal(*(pl.read_parquet(home / out / f"{name}.parquet") for out in ("straight", "more")))
    aside = {path.name for path in (home / "more").glob("*before*")}
    assert aside == {f"{name}.before-1" for name in ("finer-0", "finer-1", "report")}
    assert storage.read_json(home / "more" / "search" / "run.json")["points_computed"] == 8
    with pytest.raises(ValueError, match="rounds: 160 there, 80 given, where only more rounds can be added"):
        run(home / "more")


@pytest.mark.long
def test_a_setting_is_reported_once_and_nothing_reached_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step of theory is the best of a grid of one, and a NumPy number."""
    run(home / "once", "--algorithm", "ef21", "--num-lrs", "1", "--rounds", "20", "--target", "1e-30")
    assert pl.read_parquet(home / "once" / "report" / "points.parquet")["seed"].to_list() == [2, 3, 4]
    assert "no target was reached: give more --rounds" in " ".join(capsys.readouterr().out.split())
    best = run(home / "named", "--algorithm", "diana", "--set", "compressor", "top_k:3", "natural", "--num-lrs", "1")
    tried = pl.read_parquet(home / "named" / "tried.parquet")
    assert tried.group_by("compressor").agg(pl.col("bits_up_end").first())["bits_up_end"].n_unique() == 2
    assert "compressor=" in best.drop_nulls("setting")["setting"][0]


def test_what_cannot_run_is_said_before_anything_is_written(home: Path) -> None:
    for given, said in (
        (["--partition", "contiguous", "sorted"], "partition = .*: must be one; a comparison is of one problem"),
        (["--algorithm", "lac"], "algorithm = 'lac': must be FILE.py:factory or one of"),
        (["--algorithm", "topk_ef", "--set", "k", "99"], "topk_ef: k argument to top_k must be no larger than size"),
        (["--rounds", "0"], "rounds = 0: must be"),
        (["--algorithm", "gd", "--set", "lr", "cosine:0.1:9"], "lr = .*: must be numbers in a comparison"),
    ):
        with pytest.raises(ValueError, match=said):
            run(home / "refused", *given)
    assert not (home / "refused").exists()


KILLED = {
    "compare": ["experiments.compare", *TASK, *PAIR],
    "reproduce": ["experiments.reproduce", "laq-logistic", "--quick", "--rounds", "100"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED)
def test_three_kills_lose_and_repeat_nothing(name: str, tmp_path: Path) -> None:
    """Killed at three random moments of its work; the tables of an undisturbed run in the end."""
    env, rng = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}, np.random.default_rng()
    command = [sys.executable, "-m", *KILLED[name], "--out"]
    began = time.monotonic()
    subprocess.run([*command, "calm"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    lasted = time.monotonic() - began
    done: dict[Path, int] = {}
    for _ in range(3):
        process = subprocess.Popen([*command, "cut"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 0.7) * lasted)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        now = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cut/**/batches/*.parquet")}
        whole = [path for path in done if path.with_name(f"{path.name[:10]}-points.parquet") in done]
        assert all(now[path] == done[path] for path in whole)
        done = now
    subprocess.run([*command, "cut"], cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    tables = sorted(path.relative_to(tmp_path / "calm") for path in (tmp_path / "calm").rglob("*.parquet"))
    assert len(tables) > 10
    for table in tables:
        one, other = (pl.read_parquet(tmp_path / folder / table) for folder in ("calm", "cut"))
        costs = [column for column in one.columns if "seconds" in column or column.startswith("gain")]
        assert_frame_equal(one.drop(costs), other.drop(costs))
    assert storage.read_json(tmp_path / "cut" / "identity.json") == storage.read_json(
        tmp_path / "calm" / "identity.json"
    )


@pytest.mark.parametrize(("given", "searched"), [([], {"xi"}), (["--set", "c", "0.6", "6"], {"c"})])
def test_c_takes_the_place_of_xi(given: list[str], searched: set[str]) -> None:
    """Both are no algorithm: where c is given nothing is searched over xi."""
    line = [*TASK[:6], "--algorithm", "lasg_wk2", "--minibatch", "10", *given]
    made = comparison.MethodGrids(grid.parse_settings(comparison.Settings, line, None), Console(quiet=True))
    assert {"xi", "c"} & made.grids["lasg_wk2"].keys() == searched
    assert len(made.points(made.first(), (0,))) == 1
