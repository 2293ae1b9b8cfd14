"""Real-data table of LAG (Chen, Giannakis, Sun, Yin, NeurIPS 2018): `experiments.reproduce lag --data DIR`.

DIR has the layout of the authors' data: dataN/data.txt (rows of features) and dataN/y.txt. The exact counts need the
initial state and the late first uploads of their program, which this file defines through the public API.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from rich.console import Console

import laqjax
from experiments.harness import results
from experiments.harness.cases import ProblemInstance
from experiments.harness.results import Targets
from experiments.harness.runner import RunOptions, SweepPoint
from experiments.reproduce import run_methods, write_and_print
from laqjax import algorithms
from laqjax.rules import BaseUploadRule
from laqjax.types import register_dataclass

SETS = {"linear": (28, 29, 30), "logistic": (2, 9, 11)}
FEATURES = {"linear": 8, "logistic": 34}  # the smallest number of the three sets
OPTIMUM_ROUNDS = {"linear": 25000, "logistic": 8000}  # rounds of GD
TOLERANCE = 1e-8
RECOMPUTED = {  # uploads, from the authors' rules and data
    ("linear", 9): {"GD": 5283, "LAG-WK": 398, "LAG-PS": 1756, "Cyc-IAG": 5270, "Num-IAG": 3466},
    ("linear", 18): {"GD": 10548, "LAG-WK": 664, "LAG-PS": 3610, "Cyc-IAG": 10523, "Num-IAG": 5283},
    ("logistic", 9): {"GD": 33309, "LAG-WK": 584, "LAG-PS": 14419, "Cyc-IAG": 33300, "Num-IAG": 22113},
    ("logistic", 18): {"GD": 65322, "LAG-WK": 1098, "LAG-PS": 29968, "Cyc-IAG": 65289, "Num-IAG": 30540},
}


@register_dataclass
@dataclass(frozen=True)
class DelayedRule(BaseUploadRule):
    """Upload rule that applies `rule` after the first rounds: the LAGs of the authors begin with a full history."""

    rule: Any
    rounds: Any

    @property
    def server_selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the server selects the workers."""
        return self.rule.server_selects

    def init(self, params):
        """Create the state of `rule`."""
        return self.rule.init(params)

    def is_selected(self, shared_state, worker_state, context):
        """Return whether a worker is selected: by a server only after the first rounds."""
        asked = self.rule.is_selected(shared_state, worker_state, context)
        return asked & (context.keys.round >= self.rounds) if self.server_selects else asked

    def should_send(self, shared_state, worker_state, context):
        """Decide whether a worker sends: only after the first rounds."""
        decision = self.rule.should_send(shared_state, worker_state, context)
        return decision._replace(send=decision.send & (context.keys.round >= self.rounds))

    def update(self, shared_state, step):
        """Update the state of `rule`."""
        return self.rule.update(shared_state, step)


def read(folder: Path, problem: str, parts: int) -> laqjax.Shards:
    """Read the three sets, cut to the common features and split in file order into equal parts: M = 3 parts workers."""
    sets = []
    for number in SETS[problem]:
        paths = folder / f"data{number}" / "data.txt", folder / f"data{number}" / "y.txt"
        for path in paths:
            if not path.exists():
                raise FileNotFoundError(
                    f"{path} is missing: must be a file in the data folder of the LAG authors; give --data DIR with "
                    f"DIR/data{number}"
                )
        x, y = (np.loadtxt(path) for path in paths)
        sets.append(laqjax.partition_data(x[:, : FEATURES[problem]], y.ravel(), parts, "contiguous"))
    most = max(shards.weight.shape[1] for shards in sets)
    pad = lambda a: np.pad(a, [(0, 0), (0, most - a.shape[1])] + [(0, 0)] * (a.ndim - 2))  # noqa: E731
    return jax.tree.map(lambda *arrays: np.concatenate([pad(a) for a in arrays], dtype=np.float64), *sets)


def make_model(problem: str) -> laqjax.problems.Problem:
    """Create the linear or logistic problem of LAG."""
    return (laqjax.problems.Logistic if problem == "logistic" else laqjax.problems.Ridge)(FEATURES[problem])


def make_algorithms(problem: str, shards: laqjax.Shards) -> dict[str, tuple[laqjax.Algorithm, laqjax.AlgorithmState]]:
    """Return each method with the state before the round that the authors' program counts as its first."""
    workers = shards.x.shape[0]
    model = make_model(problem)
    oracle = model.oracle(np.float64)
    each, smooth = model.smoothness_constants(shards)
    smooth -= (workers - 1) * model.l2  # the authors add lambda once
    lags: dict[str, Any] = {"lr": 1 / smooth, "num_workers": workers}
    lags |= {"window": 10, "max_silence": None, "force_first_upload": False}
    late = lambda alg: replace(alg, rule=DelayedRule(alg.rule, np.int32(10)))  # noqa: E731
    algs: dict[str, laqjax.Algorithm] = {
        "GD": algorithms.gd(oracle, lr=1 / smooth, num_workers=workers),
        "LAG-WK": late(algorithms.lag_wk(oracle, xi=1.0, **lags)),
        "LAG-PS": late(algorithms.lag_ps(oracle, xi=10.0, smoothness=each, **lags)),
        "Cyc-IAG": algorithms.iag_cyclic(oracle, lr=1 / (smooth * workers), num_workers=workers),
        "Num-IAG": algorithms.iag_random(
            oracle, lr=0.5 / (smooth * np.sqrt(workers)), num_workers=workers, smoothness=each
        ),
    }
    return {name: (alg, initial_state(name, alg, shards, workers)) for name, alg in algs.items()}


def initial_state(name: str, alg: laqjax.Algorithm, shards: laqjax.Shards, workers: int) -> laqjax.AlgorithmState:
    """Return zero parameters and memories of ones; GD and the IAGs have taken a step along these ones."""
    zero = jnp.zeros(alg.oracle.size)
    state, ones = alg.init(zero), jnp.ones_like(zero)
    if name == "GD":
        return state._replace(params=-alg.lr * ones)
    if name.endswith("IAG"):
        state = state._replace(params=-alg.lr * workers * ones, round=jnp.int32(2))
    memory = jnp.ones_like(state.workers.memory_state)
    return state._replace(aggregate=workers * ones, workers=state.workers._replace(memory_state=memory))


def count_uploads_like_authors(out: Path, tolerance: float) -> pl.DataFrame:
    """Return the uploads as the authors count them, from the tables of a study.

    The loss of a round's model is measured after the uploads of that round, and must be within the tolerance of the
    optimum in the sum over workers. The counter starts at 1, and gains 1 at the rounds 1000, 2000, ... without uploads.
    """
    rows = []
    points, masks = (pl.read_parquet(out / f"{name}.parquet") for name in ("points", "masks"))
    for row, mask in zip(points.iter_rows(named=True), masks.iter_rows(named=True), strict=True):
        sent, name, workers = results.unpack_mask(mask), row["method"], row["workers"]
        end = row[f"rounds_{tolerance / workers:g}"] + 1
        uploads = int(sent[:end].sum()) + 1 + sum(not sent[k - 1].any() for k in range(1000, end, 1000))
        if name == "GD":  # one more round of M uploads precedes the initial state
            uploads += workers - 1
        elif name.endswith("IAG"):  # every round counts, and one precedes the initial state
            uploads += 1
        recomputed = RECOMPUTED[row["problem"], workers][name]
        rows.append(
            {n: row[n] for n in ("problem", "workers", "method")} | {"uploads": uploads, "recomputed": recomputed}
        )
    return pl.DataFrame(rows).with_columns(difference=pl.col("uploads") - pl.col("recomputed"))


def lag_table(data: Path | None = None, out: Path | None = None, quick: bool = False) -> None:
    """Reproduce the real-data table of LAG: uploads to 1e-8 (NeurIPS 2018, table 5).

    Linear and logistic regression, M = 9 and 18.

    Args:
        data: Folder with the layout of the authors' data: dataN/data.txt and dataN/y.txt. It must be given.
        out: Folder for the results. Default: results/lag.
        quick: Run the logistic problem on M = 9 to a coarse target, to check that everything works.
    """
    if data is None:
        raise ValueError(
            "--data is not given: must be the data folder of the LAG authors, with dataN/data.txt and dataN/y.txt"
        )
    console, points, out = Console(), [], out or Path("results") / ("lag" + "-quick" * quick)
    tolerance = 1e-1 if quick else TOLERANCE
    with jax.enable_x64(True):
        for problem, parts in [("logistic", 3)] if quick else [(p, s) for p in SETS for s in (3, 6)]:
            shards = read(data, problem, parts)
            algs = make_algorithms(problem, shards)
            with console.status(f"f* of {problem}, M = {len(shards.x)}, by GD"):
                gd = laqjax.run(*algs["GD"], shards, OPTIMUM_ROUNDS[problem], jax.random.key(0), chunk_size=1000)
            case = ProblemInstance(make_model(problem), shards, None, np.float64, float(gd.info.loss[-1]))
            for name, (alg, state) in algs.items():
                label = {"problem": problem, "workers": len(shards.x), "method": name}
                points.append(SweepPoint(alg, case, 0, label, state))
        targets = Targets(tuple(sorted({tolerance / len(point.case.shards.x) for point in points}, reverse=True)))
        budget = RunOptions(200_000, eval_every=1000, curve_points=1000)
        run_methods({"name": "lag", "data": str(data), "quick": quick}, points, targets, out, budget, console)
    title = f"uploads to a total loss within {tolerance:g} of the optimum"
    write_and_print(out, count_uploads_like_authors(out, tolerance), title, console)
