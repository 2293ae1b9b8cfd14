"""Methods side by side: what a row of their curves is, where a stopped race goes on, what is printed and drawn."""

import errno
import io
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from rich.console import Console

import laqjax
from experiments import datasets, files, plots, race
from laqjax import algorithms, rules, types
from laqjax.oracle import Blocks

INFO = laqjax.Info(
    loss=np.array([3.0, 2.0, 1.0]),
    sent=np.array([[1, 1], [0, 1], [0, 0]], bool),
    bits_up=np.array([[8, 16], [0, 16], [0, 0]], np.int32),
    bits_down=np.array([100, 100, 100], np.int32),
    extra={},
)


def test_row_k_is_the_model_after_k_rounds() -> None:
    frame = race.rows(INFO, np.array([[0, 9.0, 0.1], [3, 0.5, 0.9]]), 0.25)
    assert frame["loss"].to_list() == [3.0, 2.0, 1.0, 0.5]  # the round's own, and the measured one behind the last
    assert frame["residual"].to_list() == [2.75, 1.75, 0.75, 0.25]
    assert frame["uploads"].to_list() == [0, 2, 3, 3]
    assert frame["bits_up"].to_list() == [0, 24, 40, 40]
    assert frame["bits"].to_list() == [0, 124, 240, 340]
    assert frame["sent"].to_list() == [[0, 1], [1], [], []]
    assert frame["accuracy"].to_list() == [0.1, None, None, 0.9]


def test_the_loss_of_a_minibatch_is_not_the_loss() -> None:
    frame = race.rows(INFO, np.array([[0, 9.0, 0.1], [2, 0.5, 0.9]]), 0.0, Blocks(5))
    np.testing.assert_array_equal(frame["loss"], [9.0, np.nan, 0.5, np.nan])


def test_the_summary_has_the_first_model_within_each_target_and_the_last_of_those_that_miss() -> None:
    curves = pl.concat(
        race.rows(INFO._replace(loss=INFO.loss + shift), np.array([[3, 0.5 + shift, 0.9]]), 0.0).select(
            pl.lit(name).alias("method"), pl.all()
        )
        for name, shift in (("near", 0.0), ("far", 1.0))
    )
    found = race.summary(curves, (2.0, 1.0)).select("method", "target", "rounds", "uploads", "loss").rows()
    assert found == [
        ("near", 2.0, 1, 2, 2.0),
        ("far", 2.0, 2, 3, 2.0),
        ("near", 1.0, 2, 3, 1.0),
        ("far", None, 3, 3, 1.5),
    ]


@pytest.fixture
def start() -> Any:
    """A race of two methods on a small problem, as a function of its folder and rounds."""
    data = datasets.load("synthetic-logistic?workers=4&samples=30&features=10")
    shards = jax.tree.map(jnp.asarray, laqjax.problems.partition(data.x, data.y, 4, "contiguous"))
    problem = laqjax.problems.Logistic(10)
    oracle = problem.oracle()
    server: Any = {"lr": 0.01, "num_workers": 4}
    methods = {"LAQ": algorithms.laq(oracle, **server), "SGD": algorithms.sgd(oracle, sampler=Blocks(5), **server)}
    loss = jax.jit(race.full_loss(oracle, shards))

    def go(folder: Path, evaluate: Any = None) -> tuple[pl.DataFrame, bool]:
        plain = lambda params: (float(loss(jnp.asarray(params))), 0.5)  # noqa: E731
        given = (Console(quiet=True), folder, methods, problem.theta0(oracle), shards, 30, (), np.nan)
        return race.race(*given, evaluate or plain, chunk=10)

    return go


def test_a_stopped_race_goes_on_where_it_was(start: Any, tmp_path: Path) -> None:
    straight, stopped = start(tmp_path / "straight")
    assert not stopped
    calls = 0

    def interrupted(params: Any, value: Any = None) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        if calls == 7:  # of the second method: at its start and behind the first of its three chunks
            raise KeyboardInterrupt
        return float(np.sum(np.asarray(params) ** 2)), 0.5

    part, stopped = start(tmp_path / "cut", interrupted)
    assert stopped
    assert part["method"].unique().to_list() == ["LAQ"]
    again, stopped = start(tmp_path / "cut")
    assert not stopped
    assert_frame_equal(again.drop("loss", "residual"), straight.drop("loss", "residual"), check_exact=True)
    known = straight.filter(pl.col("method") == "SGD")["loss"].to_numpy()
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(known)), [0, 10, 20, 30])


def test_report_and_figures(start: Any, tmp_path: Path) -> None:
    curves, _ = start(tmp_path)
    console = Console(record=True, width=150, file=io.StringIO())
    race.report(console, tmp_path, curves, race.summary(curves, ()), {"SGD": {"uploads": 100}}, None)
    assert "120 (100, +20.0%)" in console.export_text()
    assert {path.stem for path in tmp_path.glob("*.png")} == {"loss", "accuracy", "uploads"}
    before = {path: path.read_bytes() for path in tmp_path.glob("*.svg")}
    plots.main(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.svg")}


def test_half_the_errors_is_between_the_rule_and_none() -> None:
    one, zeros, key = jnp.float32(1), jnp.zeros(1), jax.random.key(0)
    make = partial(
        types.Evidence,
        params=zeros,
        keys=types.Keys(key, key, key, jnp.int32(5), jnp.int32(0)),
        lr=jnp.float32(0.1),
        num_workers=2,
        gradient_at=lambda *given, **more: zeros,
        grad=zeros,
        target=zeros,
        decoded=zeros,
        target_sq=jnp.float32(5),
        error_sq=one,
    )
    rule = algorithms.lazy(rules.history(0.8, 1, np.float32), rules.InnovationChange())
    # the paper's rule asks for 3 (1 + 1) = 6, the half for 3
    for change, sends in ((7, (True, True)), (4, (False, True)), (2, (False, False))):
        evidence = make(innovation_sq=jnp.float32(change))
        decided = [
            r.decide((zeros, None), (one, None), evidence)[0]
            for r in (rule, replace(rule, errors=np.asarray(1.5, np.float32)))
        ]
        assert tuple(map(bool, decided)) == sends


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    def write() -> None:
        with files.replacing(tmp_path / "rows.csv") as part:
            part.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="the disk is full; make room and run the same command again"):
        write()
    assert not list(tmp_path.iterdir())
