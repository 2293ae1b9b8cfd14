"""Tests of experiments.bench: its baselines compute what laqjax computes, and a short measurement gives all metrics."""

import json
import re
from functools import partial

import jax
import numpy as np
import pytest
from rich.console import Console

import laqjax
from experiments import bench
from experiments.benchmarks import speed, workloads
from experiments.harness import cli


@pytest.fixture(autouse=True)
def as_a_user():
    """Use JAX's defaults, for which the workloads are written, not the strict modes of the other tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def shards(mnist):
    return laqjax.Shards(*(a[:, :30] for a in mnist))


def run(shards, rounds):
    problem = laqjax.problems.Softmax(784, 10)
    alg = laqjax.algorithms.laq(problem.oracle(), lr=0.02, num_workers=10, bits=4)
    return laqjax.run(alg, problem.init_params(0), shards, rounds, jax.random.key(0), chunk_size=rounds).info


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_twin_is_laq(shards, name):
    xp = pytest.importorskip(name)
    convert = xp.asarray if name == "numpy" else xp.from_numpy
    arrays = [*workloads.to_float_arrays(shards, np.float64), workloads.init_params(shards)]
    history = workloads.laq_reference(xp, *(convert(a) for a in arrays), rounds=12)
    info = run(shards, 12)
    np.testing.assert_allclose([float(loss) for loss, _ in history], info.loss, rtol=1e-5)
    np.testing.assert_array_equal([np.asarray(sent) for _, sent in history], info.sent)
    assert 0 < info.sent[1:].mean() < 1


def test_plain_is_the_gradient_without_l2(shards):
    (losses, grads), *_ = workloads.autodiff_baseline(shards).call()
    assert losses.shape == (10,)
    np.testing.assert_allclose(losses, np.log(10), rtol=1e-6)
    images, onehot = workloads.to_float_arrays(shards, np.float64)
    expected = np.einsum("mnc,mnf->mfc", 0.1 - onehot, images) / 30
    np.testing.assert_allclose(grads["weight"], expected, atol=1e-6)


def test_federation_rounds(shards):
    pytest.importorskip("flwr")
    workload = speed.WORKLOAD_GROUPS["federation"]["federation-round"](shards)
    results = workload.call()
    assert [stats.round for stats in results] == [*range(1, 1 + workload.rounds)]
    assert all(stats.accepted.all() for stats in results)


def test_race_and_report(shards):
    racers = {name: speed.WORKLOAD_GROUPS["softmax"][name](shards) for name in ("laq", "gd")}
    racers["gemm"] = workloads.repeat(lambda: jax.numpy.ones(3), 2, flops=1e6)
    times = speed.time_interleaved({name: partial(speed.time_call, one) for name, one in racers.items()}, seconds=0)
    assert {len(calls) for calls in times.values()} == {2}
    flops = {name: workload.flops for name, workload in racers.items()}
    report = {
        "machine": speed.describe_machine(),
        "fresh": {},
        "seconds": {"softmax": times},
        "flops": flops,
        "missing": {},
        "others": 0.125,
    }
    report["fresh"]["fresh-softmax"] = {"compile s": 2.0, "peak MB": speed.peak_rss_bytes() / 1e6}
    report["missing"]["pytorch"] = "No module named 'torch'"
    found = speed.derive_metrics(report)
    assert found["laq / gd"] == pytest.approx(min(times["laq"]) / min(times["gd"]))
    console = Console(record=True, width=200)
    speed.print_report(report, console)
    text = console.export_text()
    for name in ("used 12%", "laq / gd", "fresh-softmax, compile s", "met by 60%", "not installed", "share of GEMM"):
        assert name in text


def test_one_object_for_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"machine": speed.describe_machine(), "fresh": {}, "seconds": {"softmax": {"gemm": [1.0], "laq": [0.5]}}}
    facts |= {"flops": {"gemm": 4.0, "laq": 1.0}, "missing": {}, "others": 0.0}
    monkeypatch.setattr(speed, "measure", lambda chosen, quick, note: facts | {"chosen": sorted(chosen)})
    with cli.command_line(["--workloads", "laq", "--json"]) as given:
        cli.parse_cli(bench.main, given)
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] == ["laq"]
    assert found["numbers"]["laq, share of GEMM"] == 0.5
    assert found["seconds"]["softmax"]["laq"] == [0.5]
    with cli.command_line(["--quick", "--json"]) as given:
        cli.parse_cli(bench.main, given)
    assert json.loads(capsys.readouterr().out)["chosen"] == sorted(speed.QUICK_NAMES)


def test_every_goal_names_something_measured():
    every = {
        name for builders in speed.WORKLOAD_GROUPS.values() for name in builders
    } | speed.COLD_START_WORKLOADS.keys()
    for goal, sign, _ in speed.TARGETS:
        assert sign in ("<=", ">=")
        assert set(re.split(" [/-] ", goal.partition(", ")[0])) <= every, goal
    assert set(speed.QUICK_NAMES) < every == set(speed.NAMES)


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"no-such.*network-laq"):
        bench.main(workloads=("no-such",))
