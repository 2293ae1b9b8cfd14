"""Tests of the runner: continuation after stops and with more rounds, locked folders, and f* against a second solver."""

import errno
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console

import laqjax
from experiments.figures import report_page
from experiments.harness import cases, results, runner, storage
from experiments.harness.results import NetworkModel, PointHistory, Targets
from experiments.harness.runner import RunOptions, SweepPoint
from laqjax import algorithms
from laqjax.samplers import BlockSampler

DATA = "synthetic-logistic?workers=4&samples=30&features=10"
LINK = NetworkModel(compute_ms=1.0)


class CrashError(Exception):
    """The process ends here."""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where f* is kept."""
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))


def case() -> cases.ProblemInstance:
    return cases.get_case("logistic", DATA, workers=4)


def chosen() -> list[SweepPoint]:
    """Two structures, one with a sampler; three points of the first."""
    mine, server = case(), dict[str, Any](num_workers=4)
    laq: Any = [algorithms.laq(mine.oracle, lr=lr, **server) for lr in (0.01, 0.02, 0.05)]
    sgd: Any = algorithms.sgd(mine.oracle, lr=0.01, sampler=BlockSampler(5), **server)
    points = [SweepPoint(alg, mine, 0, {"method": f"LAQ {i}"}) for i, alg in enumerate(laq)]
    return [*points, SweepPoint(sgd, mine, 1, {"method": "SGD", "rows": 5})]


def run(out: Path, targets: Targets | None = None, **given: Any) -> pl.DataFrame:
    return runner.run(chosen(), targets or Targets((1.0,)), out, RunOptions(40, eval_every=10), LINK, **given)


def chunks(patch: pytest.MonkeyPatch, *stops: int) -> list[tuple[int, ...]]:
    """Return the rounds done before each recorded chunk; Ctrl-C comes once after so many of them."""
    add, taken, left = PointHistory.add, [], list(stops)

    def counted(self: PointHistory, *given: Any, **more: Any) -> None:
        if left and len(taken) == left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        taken.append(tuple(self.rounds_done.tolist()))
        add(self, *given, **more)

    patch.setattr(PointHistory, "add", counted)
    return taken


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(a: Path, b: Path) -> None:
    for name in (*results.TABLES, "summary"):
        one, other = (pl.read_parquet(folder / f"{name}.parquet") for folder in (a, b))
        assert_frame_equal(one, other, check_exact=True)


def test_points_of_several_structures_are_rows_in_their_order(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert results.setting_columns(summary) == ["method", "rows"]
    assert summary["method"].to_list() == ["LAQ 0", "LAQ 1", "LAQ 2", "SGD"]
    assert summary["rows"].to_list() == [None, None, None, 5]
    assert storage.read_json(tmp_path / "plan.json")["batch"] == [3, 1]
    curve = pl.read_parquet(tmp_path / "curves.parquet").filter(pl.col("point") == 3)
    assert curve["round"].to_list() == [0, 10, 20, 30, 40]  # a minibatch says little: all data, at the ends of chunks
    info = laqjax.run(chosen()[1].algorithm, case().start(0), case().device_shards, 40, jax.random.key(0)).info
    mine = pl.read_parquet(tmp_path / "curves.parquet").filter(pl.col("point") == 1)
    np.testing.assert_allclose(mine["loss"], info.loss[: len(mine)], rtol=1e-5)
    np.testing.assert_array_equal(mine["uploads"][1:], np.cumsum(info.sent.sum(axis=1))[: len(mine) - 1])


def test_points_without_a_label_are_seeds_of_one_setting(tmp_path: Path) -> None:
    points = [replace(point, label={}, seed=seed) for seed, point in enumerate([chosen()[0]] * 2)]
    summary = runner.run(points, Targets(), tmp_path, RunOptions(5), LINK)
    assert summary["seeds"].to_list() == [2]
    assert results.setting_columns(summary) == []


def scored(rows: int) -> cases.ProblemInstance:
    """The case with so many test rows."""
    mine = case()
    return replace(mine, test=(np.resize(mine.shards.x, (rows, 10)), np.resize(mine.shards.y, rows)))


def interval(rows: int, targets: Targets, sampler: Any = None, **given: Any) -> int:
    mine = scored(rows) if rows else case()
    alg = algorithms.sgd(mine.oracle, num_workers=4, lr=0.01, sampler=sampler)
    return runner.choose_eval_interval(SweepPoint(alg, mine), targets, RunOptions(**given))


def test_the_chosen_interval_costs_few_rows() -> None:
    """Of 120 rows on four workers: a round reads them at three times the cost of scoring, 2 % of that is 7.2 rows."""
    residuals, shares = Targets((1.0,)), Targets((0.6, 0.8), accuracy=True)
    assert [interval(rows, shares) for rows in (12, 72, 73, 3600)] == [4, 10, 11, 50]
    assert interval(72, residuals) == 50  # the loss is known in every round
    assert interval(0, residuals, BlockSampler(25)) == 20  # 120 rows scored for 300 * 2 %
    assert interval(60, residuals, BlockSampler(25)) == 30
    assert interval(0, residuals, BlockSampler(5)) == 50
    assert [interval(72, shares, **given) for given in ({"eval_every": 7}, {"longest": 8}, {"longest": 2})] == [7, 8, 2]


def test_the_chosen_interval_is_kept_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, targets = scored(72), Targets((0.99, 0.999), accuracy=True)
    points = [replace(point, case=mine) for point in chosen()[:3]]
    for name, rounds in (("straight", 30), ("more", 20)):
        runner.run(points, targets, tmp_path / name, RunOptions(rounds), LINK)
        assert storage.read_json(tmp_path / name / "plan.json")["every"] == [10]
    monkeypatch.setattr(runner, "EVALUATION_SHARE", 1e-9)  # what a later version may choose
    runner.run(points, targets, tmp_path / "more", RunOptions(30), LINK)
    same(tmp_path / "straight", tmp_path / "more")
    curve = pl.read_parquet(tmp_path / "more" / "curves.parquet").drop_nans("accuracy")
    assert curve["round"].unique().to_list() == [0, 10, 20, 30]


def test_a_start_may_be_a_state(tmp_path: Path) -> None:
    alg, mine = chosen()[2].algorithm, case()
    half = laqjax.run(alg, mine.start(0), mine.device_shards, 20, jax.random.key(0))
    points = [SweepPoint(alg, mine, 0, {"method": "LAQ"}, half.state)]
    runner.run(points, Targets(), tmp_path, RunOptions(20, eval_every=20), LINK)
    rest = laqjax.run(alg, half.state, mine.device_shards, 20, jax.random.key(0)).info
    (mask,) = pl.read_parquet(tmp_path / "masks.parquet").iter_rows(named=True)
    np.testing.assert_array_equal(results.unpack_mask(mask), rest.sent)


@pytest.mark.parametrize("calls", [2, 6])
def test_what_was_saved_within_a_batch_is_gone_on_with(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first batch, and in the second: the rows of an undisturbed run, no chunk twice."""
    run(tmp_path / "calm", Targets())
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    taken = chunks(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Targets())
    assert len(list(tmp_path.glob("cut/batches/*/run.json"))) == min(calls // 4 + 1, 2)
    run(tmp_path / "cut", Targets())
    assert [max(done) for done in taken] == 2 * [0, 10, 20, 30]
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_stop_before_a_cut_changes_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[np.ndarray]
) -> None:
    """The batch is saved, then cut in half: what goes on is cut too."""
    mine, server = case(), dict[str, Any](num_workers=4)
    rates = (0.05, 0.05, 0.05, 0.05, 0.05, 1e-5)
    points = [
        SweepPoint(algorithms.gd(mine.oracle, lr=lr, **server), mine, i, {"lr": lr}) for i, lr in enumerate(rates)
    ]
    budget, targets = RunOptions(300, eval_every=10), Targets((5.0,))
    runner.run(points, targets, tmp_path / "calm", budget, LINK)
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    begun.clear()
    chunks(monkeypatch, 10)  # of 10 rounds: the batch is cut at round 100
    with pytest.raises(KeyboardInterrupt):
        runner.run(points, targets, tmp_path / "cut", budget, LINK)
    runner.run(points, targets, tmp_path / "cut", budget, LINK)
    assert [(rounds.min(), len(rounds)) for rounds in begun] == [(0, 6), (100, 1), (100, 1)]
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_folder_that_is_no_checkpoint_is_set_aside(tmp_path: Path) -> None:
    run(tmp_path / "calm")
    (tmp_path / "cut" / "batches" / "000-000000").mkdir(parents=True)
    (tmp_path / "cut" / "batches" / "000-000000" / "run.json").write_text("{")
    console = Console(record=True, width=200, file=io.StringIO())
    run(tmp_path / "cut", console=console)
    assert "000-000000.damaged-1, the batch starts again" in console.export_text()
    assert (tmp_path / "cut" / "batches" / "000-000000.damaged-1").exists()
    same(tmp_path / "calm", tmp_path / "cut")


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(damaged: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the midst of a batch, and files that were cut off: it goes on from the one before, or from the start."""
    run(tmp_path / "calm", Targets())
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    taken = chunks(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Targets())
    there = sorted((tmp_path / "cut" / "batches" / "000-000000").glob("[0-9]*"), key=lambda path: int(path.name))
    assert len(there) == 2
    for path in there[-damaged:]:
        for file in path.rglob("*"):
            if file.is_file():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    console = Console(record=True, width=400, file=io.StringIO())
    run(tmp_path / "cut", Targets(), console=console)
    assert console.export_text().count("cannot be read") == damaged
    assert max(taken[3]) == 20 * (2 - damaged)
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_state_of_other_points_is_set_aside(tmp_path: Path) -> None:
    """What a search that is asked for more trials would find after a kill."""
    mine, budget = chosen(), RunOptions(40, eval_every=10)
    path, show, console = (
        tmp_path / "batch",
        lambda work, note: None,
        Console(record=True, width=200, file=io.StringIO()),
    )
    runner.Batch(mine[2::-1], Targets(), budget, 3).run(path, True, console, show)
    assert not console.export_text(clear=False)
    runner.Batch(mine[:3], Targets(), budget, 3).run(path, False, console, show)
    assert "of a run with other arguments (points)" in console.export_text()


def test_the_loss_of_local_steps_is_that_of_the_model_before_them() -> None:
    mine = case()
    alg = algorithms.fedavg(mine.oracle, num_workers=4, num_local_steps=3, local_lr=0.01)
    info = laqjax.run(alg, mine.start(1), mine.device_shards, 1, jax.random.key(0)).info
    np.testing.assert_allclose(info.loss[0], mine.batched_loss(mine.start(1)[None])[0], rtol=1e-6)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with storage.lock_results_dir(tmp_path, {"a": 1}):
        with pytest.raises(
            ValueError, match=r"is held by process \d+ on .*: wait until it ends, or give another --out"
        ):
            storage.lock_results_dir(tmp_path, {"a": 1}).__enter__()
        with pytest.raises(ValueError, match=r"holds the results of other settings \(a: 1 there, 2 given\)"):
            storage.lock_results_dir(tmp_path, {"a": 2}).__enter__()
    with storage.lock_results_dir(tmp_path, {"a": 1}):
        pass


def test_more_of_an_experiment_removes_what_says_that_it_is_done(tmp_path: Path) -> None:
    with storage.lock_results_dir(tmp_path, {"rounds": 10}):
        results.report_result(Console(quiet=True), tmp_path, {"title": pl.DataFrame({"x": [1.0, None]})}, ["a"], b=2)
        storage.write_json(tmp_path / "run.json", {})
    with storage.lock_results_dir(tmp_path, {"rounds": 10}):
        expected = {"out": str(tmp_path), "tables": {"title": [{"x": 1.0}, {"x": None}]}, "notices": ["a"], "b": 2}
        assert storage.read_json(tmp_path / "result.json") == expected
    with storage.lock_results_dir(tmp_path, {"rounds": 20}):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".holder", "identity.json"}
    results.report_result(Console(quiet=True), tmp_path / "identity.json", {})  # a file: no result beside it
    assert not list(tmp_path.rglob("result.json"))


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    with storage.lock_results_dir(tmp_path, {"experiment": "sweep"}):
        pass
    assert storage.read_identity(tmp_path) == {"experiment": "sweep"}
    path = tmp_path / "identity.json"
    for other, found in ({"format": 1}, "1"), ({}, "None"):
        storage.write_json(path, {"experiment": "sweep"} | other)
        for read in (
            lambda: storage.lock_results_dir(tmp_path, {"experiment": "sweep"}).__enter__(),
            lambda: report_page.read(tmp_path),
        ):
            with pytest.raises(ValueError, match=f"holds results of format {found}: must be format 2"):
                read()


@pytest.mark.parametrize("error", [ValueError, CrashError])
def test_a_failure_before_anything_is_done_leaves_the_folder_free(error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error), storage.lock_results_dir(tmp_path, {"a": 1}):
        raise error
    with storage.lock_results_dir(tmp_path, {"a": 2}):
        pass


def test_another_study_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"targets: \[1.0\] there, \[2.0\] given"):
        run(tmp_path, Targets((2.0,)))


# ---- more of the same ------------------------------------------------------------------------------------------------

FAR, NEVER = (4.0, 3.0), 10**9


def uneven() -> list[SweepPoint]:
    """Points that are done early, late, never, and one that diverges; and minibatches, with which another batch begins."""
    mine, server = case(), dict[str, Any](num_workers=4)
    laq: Any = [algorithms.laq(mine.oracle, lr=lr, **server) for lr in (0.1, 0.1, 0.08, 0.05, 0.01, 1e38)]
    sgd: Any = [algorithms.sgd(mine.oracle, lr=lr, sampler=BlockSampler(5), **server) for lr in (0.1, 0.03)]
    return [SweepPoint(alg, mine, i, {"method": f"{i}"}) for i, alg in enumerate([*laq, *sgd])]


def asked(out: Path, rounds: int, targets: tuple[float, ...], short: int = NEVER, **given: Any) -> pl.DataFrame:
    return runner.run(
        uneven(), Targets(targets), out, RunOptions(rounds, eval_every=10, compact_after=short), LINK, **given
    )


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The rounds at which points begin, a row a call of the engine."""
    stream, seen = laqjax.stream_sweep, []

    def seeing(algs: Any, state: Any, *given: Any, **more: Any) -> Any:
        seen.append(np.asarray(state.round))
        return stream(algs, state, *given, **more)

    monkeypatch.setattr(laqjax, "stream_sweep", seeing)
    return seen


@pytest.mark.parametrize(
    ("first", "then", "short", "laq", "sgd"),  # the last two: points in each call of the engine of a straight run
    [
        ((37, FAR[:1]), (130, FAR[:1]), 20, [6, 3, 1], [2, 1]),  # cut in half on the way
        pytest.param(
            (130, FAR[:1]), (130, FAR), NEVER, [6], [2], marks=pytest.mark.long
        ),  # whole chunks of 10 rounds: one call
        # the last 5 rounds are a call of their own
        pytest.param((37, FAR[:1]), (75, FAR), NEVER, [6, 6], [2, 2], marks=pytest.mark.long),
        pytest.param((7, ()), (75, ()), 10, [6, 6], [2, 2], marks=pytest.mark.long),
    ],
)
def test_more_is_what_a_straight_run_would_have(
    first: tuple[int, Any],
    then: tuple[int, Any],
    short: int,
    laq: list[int],
    sgd: list[int],
    tmp_path: Path,
    begun: list[np.ndarray],
) -> None:
    """Bit for bit, and nobody begins anew."""
    asked(tmp_path / "straight", *then, short)
    assert [len(rounds) for rounds in begun] == laq + sgd
    asked(tmp_path / "more", *first, short)
    begun.clear()
    points = pl.read_parquet(tmp_path / "more" / "points.parquet").filter(~pl.col("diverged"))
    left = points.filter(~pl.col("reached")) if first[1] == then[1] else points  # further targets continue all points
    asked(tmp_path / "more", *then, short)
    ended: Any = left["ended"].min()
    assert min(rounds.min() for rounds in begun) == ended // 10 * 10  # a last chunk of 7 rounds is run again
    same(tmp_path / "straight", tmp_path / "more")
    begun.clear()
    asked(tmp_path / "more", *then, short)
    assert storage.read_json(tmp_path / "more" / "run.json")["points_computed"] == len(begun) == 0


def test_a_target_that_is_met_between_two_looks_is_a_straight_run_too(tmp_path: Path) -> None:
    """More rounds would have taken the point to its next look."""
    for name, rounds in (("straight", 75), ("more", 37), ("more", 75)):
        runner.run(uneven()[3:4], Targets(FAR[:1]), tmp_path / name, RunOptions(rounds, eval_every=10), LINK)
    assert pl.read_parquet(tmp_path / "more" / "points.parquet")["ended"].to_list() == [40]
    same(tmp_path / "straight", tmp_path / "more")


def test_further_targets_after_a_cut_change_nothing_before(tmp_path: Path, begun: list[np.ndarray]) -> None:
    """Rows up to where a point was; from there on those of a batch of another size."""
    for name, targets in (("straight", FAR), ("more", FAR[:1])):
        asked(tmp_path / name, 130, targets, 10)
    before = pl.read_parquet(tmp_path / "more" / "masks.parquet")
    assert len({len(rounds) for rounds in begun[-3:]}) > 1
    begun.clear()
    asked(tmp_path / "more", 130, FAR, 10)
    assert len(set(begun[0])) > 1  # points of different rounds side by side
    for old, new in zip(
        before.to_dicts(), pl.read_parquet(tmp_path / "more" / "masks.parquet").to_dicts(), strict=True
    ):
        np.testing.assert_array_equal(results.unpack_mask(old), results.unpack_mask(new)[: old["rounds"]])
    one, other = (pl.read_parquet(tmp_path / name / "points.parquet") for name in ("straight", "more"))
    assert_frame_equal(one.select("ended", "reached", "diverged"), other.select("ended", "reached", "diverged"))
    assert_frame_equal(one.select("rounds_3", "final_loss"), other.select("rounds_3", "final_loss"), rel_tol=0.03)


def test_a_stop_while_it_goes_on_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[np.ndarray]
) -> None:
    asked(tmp_path / "straight", 130, FAR)
    for name in ("calm", "cut"):
        asked(tmp_path / name, 37, FAR[:1])
    begun.clear()
    asked(tmp_path / "calm", 130, FAR)
    before = {path: path.read_bytes() for path in tmp_path.glob("cut/*.parquet")}
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    calm, taken = len(begun), chunks(monkeypatch, 1, 4)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            asked(tmp_path / "cut", 130, FAR)
        assert {path: path.read_bytes() for path in tmp_path.glob("cut/*.parquet")} == before
        assert not (tmp_path / "cut" / "run.json").exists()
    saved = storage.save_frame

    def crash(*given: Any, **more: Any) -> None:
        raise CrashError

    monkeypatch.setattr(
        storage, "save_frame", crash
    )  # the last states are there, and the tables those of the first request
    with pytest.raises(CrashError):
        asked(tmp_path / "cut", 130, FAR)
    monkeypatch.setattr(storage, "save_frame", saved)
    asked(tmp_path / "cut", 130, FAR)
    assert len(set(taken)) == len(taken)
    calls_of_the_calm_run, calls_after_the_stops = calm, len(begun) - calm
    assert calls_after_the_stops == calls_of_the_calm_run + 2  # each stop costs the call that it interrupted
    same(tmp_path / "straight", tmp_path / "cut")


def test_less_is_refused(tmp_path: Path) -> None:
    asked(tmp_path, 40, FAR[:1])
    before = contents(tmp_path)
    for rounds, targets, said in (
        (30, FAR[:1], r"\(rounds: 40 there, 30 given, where only more rounds can be added\)"),
        (
            80,
            FAR[1:],
            r"\(targets: \[4.0\] there, \[3.0\] given, where only further targets can be added",
        ),
        (80, (), r"targets: \[4.0\] there, \[\] given"),
        (80, (9.0, 4.0), r"targets: \[4.0\] there, \[9.0, 4.0\] given"),
    ):
        with pytest.raises(ValueError, match=said):
            asked(tmp_path, rounds, targets)
    with pytest.raises(ValueError, match=r"holds the results of other settings \(points: .* given[^)]*\); give"):
        runner.run(uneven()[:3], Targets(FAR), tmp_path, RunOptions(80, eval_every=10), LINK)
    assert before == contents(tmp_path)


def test_states_that_are_too_large_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MAX_STATES_GIB", 1e-9)
    monkeypatch.setattr(runner, "CHECKPOINT_SECONDS", 0.0)
    console = Console(record=True, width=200, file=io.StringIO())
    asked(tmp_path, 20, FAR, console=console)
    assert "of its last states were not kept" in console.export_text()
    assert not [path for path in tmp_path.glob("batches/*") if path.is_dir()]
    with pytest.raises(
        ValueError, match=r"cannot be continued: the 0.0 GiB of its last states were not kept \(rounds: 20 there"
    ):
        asked(tmp_path, 30, FAR)
    asked(tmp_path, 20, FAR)


def test_a_batch_without_its_last_states_begins_anew(tmp_path: Path) -> None:
    asked(tmp_path / "straight", 75, FAR)
    asked(tmp_path / "more", 37, FAR)
    shutil.rmtree(tmp_path / "more" / "batches" / "000-000000")
    console = Console(record=True, width=200, file=io.StringIO())
    asked(tmp_path / "more", 75, FAR, console=console)
    assert "is missing: the batch starts again" in " ".join(console.export_text().split())
    same(tmp_path / "straight", tmp_path / "more")


def test_seeds_of_a_start_that_has_none_are_draws_beside_it() -> None:
    mine = case()
    assert not np.any(mine.start(0))
    assert 0.3 < float(np.linalg.norm(mine.start(1))) < 3
    assert np.any(mine.start(1) != mine.start(2))
    np.testing.assert_array_equal(mine.start(1), mine.start(1))


def test_f_star_is_that_of_newton() -> None:
    """A second solver, in plain NumPy."""
    mine = case()
    x, sign = np.asarray(mine.shards.x, float), 2.0 * np.asarray(mine.shards.y) - 1
    rows, signs, l2 = x.reshape(-1, 10), sign.reshape(-1), 4 * mine.problem.l2  # sums over the 4 workers
    theta, gradient = np.zeros(10), np.ones(10)
    for _ in range(30):
        p = 1 / (1 + np.exp(signs * (rows @ theta)))
        gradient = -rows.T @ (signs * p) + l2 * theta
        theta -= np.linalg.solve((rows * (p * (1 - p))[:, None]).T @ rows + l2 * np.eye(10), gradient)
    f = (np.log1p(np.exp(-signs * (rows @ theta))).sum() + l2 / 2 * theta @ theta) / 4
    assert np.abs(gradient).max() < 1e-12
    assert mine.f_star == pytest.approx(f, abs=1e-12)


def test_f_star_of_softmax_regression_is_that_of_newton() -> None:
    """The problem of LAQ's tables: mean cross-entropy + (l2 / 2) ||all variables||^2 for each worker."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (2, 30, 4)).astype(np.uint8), rng.integers(0, 3, (2, 30)).astype(np.int32)
    problem = laqjax.problems.Softmax(4, 3)
    found = cases.solve_optimum(problem, laqjax.Shards(x, y, np.ones((2, 30), np.float32)))
    rows = np.column_stack([x.reshape(60, 4) / 255, np.ones(60)])
    theta, gradient, p = np.zeros((3, 5)), np.ones((3, 5)), np.ones((60, 3))
    for _ in range(20):
        p = np.exp(rows @ theta.T)
        p /= p.sum(axis=1, keepdims=True)
        gradient = (p - np.eye(3)[y.ravel()]).T @ rows / 60 + problem.l2 * theta
        outer = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
        hessian = np.einsum("ncd,ni,nj->cidj", outer, rows, rows).reshape(15, 15) / 60 + problem.l2 * np.eye(15)
        theta -= np.linalg.solve(hessian, gradient.ravel()).reshape(3, 5)
    f = -np.log(p[np.arange(60), y.ravel()]).mean() + problem.l2 / 2 * np.sum(theta**2)
    assert np.abs(gradient).max() < 1e-12
    assert found == pytest.approx(f, abs=1e-12)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def write() -> None:
        with storage.atomic_write(tmp_path / "rows.csv") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full; free some space and run the same command again"):
        write()
    assert not list(tmp_path.iterdir())


def test_targets_of_one_name_are_refused() -> None:
    """The tables name a target by six digits."""
    with pytest.raises(ValueError, match="must differ in the first six digits"):
        Targets((0.1234562, 0.1234561))
