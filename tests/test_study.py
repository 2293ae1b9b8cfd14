"""Points of any kind, run from Python: what a stop leaves, who holds a folder, and f* against a second solver."""

import errno
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console

import laqjax
from experiments import files, ledger, problems, study
from experiments.ledger import Link, Targets
from experiments.study import Budget, Point
from laqjax import algorithms
from laqjax.oracle import Blocks

DATA = "synthetic-logistic?workers=4&samples=30&features=10"
LINK = Link(compute_ms=1.0)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where f* is kept."""
    monkeypatch.chdir(tmp_path_factory.mktemp("home"))


def case() -> problems.Case:
    return problems.case("logistic", DATA, workers=4)


def chosen() -> list[Point]:
    """Two structures, one with a sampler; three points of the first."""
    mine, server = case(), dict[str, Any](num_workers=4)
    laq: Any = [algorithms.laq(mine.oracle, lr=lr, **server) for lr in (0.01, 0.02, 0.05)]
    sgd: Any = algorithms.sgd(mine.oracle, lr=0.01, sampler=Blocks(5), **server)
    points = [Point(alg, mine, 0, {"method": f"LAQ {i}"}) for i, alg in enumerate(laq)]
    return [*points, Point(sgd, mine, 1, {"method": "SGD", "rows": 5})]


def run(out: Path, targets: Targets | None = None, **given: Any) -> pl.DataFrame:
    return study.run(chosen(), targets or Targets((1.0,)), out, Budget(40, every=10), LINK, **given)


def same(a: Path, b: Path) -> None:
    for name in (*ledger.TABLES, "summary"):
        one, other = (pl.read_parquet(folder / f"{name}.parquet") for folder in (a, b))
        assert_frame_equal(one, other, check_exact=True)


def test_points_of_several_structures_are_rows_in_their_order(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert ledger.settings_of(summary) == ["method", "rows"]
    assert summary["method"].to_list() == ["LAQ 0", "LAQ 1", "LAQ 2", "SGD"]
    assert summary["rows"].to_list() == [None, None, None, 5]
    assert files.read_json(tmp_path / "plan.json")["batch"] == [3, 1]
    curve = pl.read_parquet(tmp_path / "curves.parquet").filter(pl.col("point") == 3)
    assert curve["round"].to_list() == [0, 10, 20, 30, 40]  # a minibatch says little: all data, at the ends of chunks
    info = laqjax.run(chosen()[1].algorithm, case().start(0), case().on_device, 40, jax.random.key(0)).info
    mine = pl.read_parquet(tmp_path / "curves.parquet").filter(pl.col("point") == 1)
    np.testing.assert_allclose(mine["loss"], info.loss[: len(mine)], rtol=1e-5)
    np.testing.assert_array_equal(mine["uploads"][1:], np.cumsum(info.sent.sum(axis=1))[: len(mine) - 1])


def test_a_start_may_be_a_state(tmp_path: Path) -> None:
    alg, mine = chosen()[2].algorithm, case()
    half = laqjax.run(alg, mine.start(0), mine.on_device, 20, jax.random.key(0))
    points = [Point(alg, mine, 0, {"method": "LAQ"}, half.state)]
    study.run(points, Targets(), tmp_path, Budget(20, every=20), LINK)
    rest = laqjax.run(alg, half.state, mine.on_device, 20, jax.random.key(0)).info
    (mask,) = pl.read_parquet(tmp_path / "masks.parquet").iter_rows(named=True)
    np.testing.assert_array_equal(ledger.unpacked(mask), rest.sent)


@pytest.mark.parametrize("calls", [2, 6])
def test_what_was_saved_within_a_batch_is_gone_on_with(
    calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first batch, and in the second: the rows of an undisturbed run, no chunk twice."""
    run(tmp_path / "calm", Targets())
    monkeypatch.setattr(study, "SAVE", 0.0)
    take_in, taken = study.Batch.take_in, []

    def counted(self: study.Batch, out: Any) -> None:
        if len(taken) == calls:
            taken.append(None)
            raise KeyboardInterrupt
        taken.append(self.done)
        take_in(self, out)

    monkeypatch.setattr(study.Batch, "take_in", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Targets())
    assert len(list(tmp_path.glob("cut/batches/*.npz"))) == 1
    run(tmp_path / "cut", Targets())
    assert [done for done in taken if done is not None] == 2 * [0, 10, 20, 30]
    assert not list(tmp_path.glob("cut/batches/*.npz"))
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_stop_before_a_cut_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is saved, then cut in half: what goes on is cut too."""
    mine, server = case(), dict[str, Any](num_workers=4)
    rates = (0.05, 0.05, 0.05, 0.05, 0.05, 1e-5)
    points = [Point(algorithms.gd(mine.oracle, lr=lr, **server), mine, i, {"lr": lr}) for i, lr in enumerate(rates)]
    budget, targets = Budget(300, every=10), Targets((5.0,))
    study.run(points, targets, tmp_path / "calm", budget, LINK)
    monkeypatch.setattr(study, "SAVE", 0.0)
    compact, cuts = study.Batch.compact, []

    def stopped(self: study.Batch) -> None:
        cuts.append((self.done, self.size))
        if len(cuts) == 1:
            raise KeyboardInterrupt
        compact(self)

    monkeypatch.setattr(study.Batch, "compact", stopped)
    with pytest.raises(KeyboardInterrupt):
        study.run(points, targets, tmp_path / "cut", budget, LINK)
    study.run(points, targets, tmp_path / "cut", budget, LINK)
    assert cuts[1] == cuts[0]
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_damaged_state_is_set_aside(tmp_path: Path) -> None:
    run(tmp_path / "calm")
    (tmp_path / "cut" / "batches").mkdir(parents=True)
    (tmp_path / "cut" / "batches" / "000-000000.npz").write_bytes(b"")
    console = Console(record=True, width=200, file=io.StringIO())
    run(tmp_path / "cut", console=console)
    assert "is damaged" in console.export_text()
    assert (tmp_path / "cut" / "batches" / "000-000000.npz.damaged-1").exists()
    same(tmp_path / "calm", tmp_path / "cut")


def test_a_state_of_other_points_is_set_aside(tmp_path: Path) -> None:
    """What a search that is asked for more trials would find after a kill."""
    mine, budget = chosen(), Budget(40, every=10)
    path, show = tmp_path / "batch.npz", lambda work, note: None
    other = study.Batch(mine[2::-1], Targets(), budget, 3, path, show)
    files.save_tree(path, other.kept())
    console = Console(record=True, width=200, file=io.StringIO())
    study.Batch(mine[:3], Targets(), budget, 3, path, show).run(console)
    assert "holds other points" in console.export_text()


def test_the_loss_of_local_steps_is_that_of_the_model_before_them() -> None:
    mine = case()
    alg = algorithms.fedavg(mine.oracle, num_workers=4, steps=3, local_lr=0.01)
    info = laqjax.run(alg, mine.start(1), mine.on_device, 1, jax.random.key(0)).info
    np.testing.assert_allclose(info.loss[0], mine.losses(mine.start(1)[None])[0], rtol=1e-6)


def test_a_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with files.claimed(tmp_path, {"a": 1}):
        with pytest.raises(
            ValueError, match=r"is held by process \d+ on .*: wait until it ends, or give another --out"
        ):
            files.claimed(tmp_path, {"a": 1}).__enter__()
        with pytest.raises(ValueError, match=r"holds the results of other settings \(a: 1 there, 2 asked for\)"):
            files.claimed(tmp_path, {"a": 2}).__enter__()
    with files.claimed(tmp_path, {"a": 1}):
        pass


def test_another_study_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ValueError, match=r"targets: \[1.0\] there, \[2.0\] asked for"):
        run(tmp_path, Targets((2.0,)))


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
    found = problems.optimum(problem, laqjax.Shards(x, y, np.ones((2, 30), np.float32)))
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
        with files.replacing(tmp_path / "rows.csv") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full; make room and run the same command again"):
        write()
    assert not list(tmp_path.iterdir())
