"""The whole family side by side at the steps of theory, and what the lazy rules save as workers differ."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

import laqjax
from experiments import files, ledger, plots, problems, study
from experiments.ledger import Targets
from experiments.problems import Case
from experiments.reproduce import finish, methods
from experiments.study import Budget, Point
from laqjax import algorithms, compressors, theory
from laqjax.oracle import Blocks

WORKERS = 10
BASE = "synthetic-logistic?workers=10&samples=200&features=50&condition=100&heterogeneity="


def convex(name: str, scheme: str = "contiguous") -> Case:
    """Binary logistic regression on a data set, sums over shards made means, l2 = 0.01 per worker; float64."""
    case = problems.case("logistic", name, scheme)
    weight = case.shards.weight.astype(np.float64)
    problem = laqjax.problems.Logistic(case.shards.x.shape[2], l2=0.01, reduction="mean")
    return replace(case, problem=problem, shards=case.shards._replace(weight=weight), dtype=np.float64)


def members(case: Case, size: int) -> dict[str, laqjax.Algorithm]:
    """Every member at a step of its own; `size`: minibatch.

    Full gradients: what theory admits (the lazy rules take sum xi = 0.1 at 0.8 / L), the IAGs as in LAG's experiments.
    Minibatches: 0.1 / L, and they end at the floor of their variance; signs and CADA, whose steps have no such scale,
    at a plain choice.
    """
    oracle, p = case.oracle, case.oracle.size
    k, (each, smooth) = max(p // 10, 1), case.smoothness
    full = {"num_workers": WORKERS, "lr": 1 / smooth}
    lazy = full | {"lr": 0.8 / smooth, "xi": 0.1}
    batch = full | {"lr": 0.1 / smooth, "sampler": Blocks(size)}
    lazy_batch = batch | {"xi": 0.1}
    top, natural, delta = compressors.top_k(k), compressors.natural(), k / p
    omega, probability = 1 / 8, k / p
    rand = p / k - 1
    lr_rand = theory.lr_marina(each, smooth, rand, probability)
    ef21 = theory.lr_ef21(each, smooth, delta)
    zeta = (1 - delta) / (1 - np.sqrt(1 - delta))  # the laziest that costs nothing in theory
    clag = theory.lr_ef21(each, smooth, delta, zeta)
    a: Any = algorithms
    return {
        "GD": a.gd(oracle, **full),
        "QGD": a.qgd(oracle, bits=4, **full),
        "LAG-WK": a.lag_wk(oracle, **lazy),
        "LAG-PS": a.lag_ps(oracle, smoothness=each, **lazy),
        "Cyc-IAG": a.iag_cyclic(oracle, **(full | {"lr": 1 / (smooth * WORKERS)})),
        "Num-IAG": a.iag_random(oracle, smoothness=each, **(full | {"lr": 0.5 / (smooth * np.sqrt(WORKERS))})),
        "LAQ": a.laq(oracle, bits=4, **lazy),
        "TWO-LAQ": a.two_laq(oracle, bits=4, **lazy),
        "LAQ, b adaptive": a.laq_adaptive(oracle, **lazy),
        "EF21": a.ef21(oracle, compressor=top, **(full | {"lr": ef21})),
        "CLAG": a.clag(oracle, compressor=top, zeta=zeta, **(full | {"lr": clag})),
        "DIANA": a.diana(
            oracle,
            compressor=natural,
            damping=1 / (1 + omega),
            **(full | {"lr": theory.lr_diana(each, smooth, omega)}),
        ),
        "MARINA": a.marina(
            oracle, compressor=compressors.rand_k(k), probability=probability, **(full | {"lr": lr_rand})
        ),
        "SGD": a.sgd(oracle, **batch),
        "QSGD": a.qsgd(oracle, **batch),
        "TernGrad": a.terngrad(oracle, **batch),
        "SSGD": a.ssgd(oracle, density=0.25, **batch),
        "signSGD": a.sign_sgd(oracle, **(batch | {"lr": 1e-3})),
        "EF-signSGD": a.ef_sign_sgd(oracle, **batch),
        "top-k EF": a.topk_ef(oracle, k=k, **batch),
        "SLAQ": a.slaq(oracle, bits=4, **lazy_batch),
        "LASG-WK1": a.lasg_wk1(oracle, **lazy_batch),
        "LASG-WK2": a.lasg_wk2(oracle, **lazy_batch),
        "LASG-PS": a.lasg_ps(oracle, smoothness=each, **lazy_batch),
        "CADA1": a.cada1(oracle, **(batch | {"lr": 1e-2})),
        "CADA2": a.cada2(oracle, **(batch | {"lr": 1e-2})),
    }


def family(out: Path = Path("results/family"), rounds: int = 3000, target: float = 1e-6) -> None:
    """Every member on one strongly convex problem, each at its own step (see `members`): bits against residual.

    Args:
        out: Folder for the results.
        rounds: Of each member at most.
        target: Residual f - f* at which the cost is read off.
    """
    console = Console()
    with jax.enable_x64(True):
        case = convex(BASE + "1")
        chosen = [Point(alg, case, 0, {"method": name}) for name, alg in members(case, 20).items()]
        summary = methods({"name": "family"}, chosen, Targets((target,)), out, Budget(rounds, every=20), console)
    t = f"{target:g}"
    table = summary.sort(f"bits_up_{t}", nulls_last=True).select(
        "method",
        *(pl.col(f"{c}_{t}").cast(pl.Int64).alias(c) for c in ("rounds", "uploads")),
        *(pl.col(f"{c}_{t}").cast(pl.Int64).alias(n) for c, n in (("bits_up", "bits up"), ("bits", "bits up + down"))),
        (pl.col("final_loss") - pl.col("f_star")).alias("f - f* at the end"),
    )
    finish(out, table, f"cost to f - f* <= {t} (- : not reached in {rounds} rounds)", console)


def heterogeneity(out: Path = Path("results/heterogeneity"), target: float = 1e-6) -> None:
    """Uploads that LAQ and LAG save against GD, over the spread of L_m and over Dirichlet alpha.

    Args:
        out: Folder for the results.
        target: Residual f - f* at which the uploads are read off.
    """
    console, chosen = Console(), []
    cases = [("decades of L_m", h, f"{BASE}{h:g}", "contiguous") for h in (0, 0.5, 1, 1.5, 2)]
    cases += [("Dirichlet alpha", a, f"{BASE}0", f"dirichlet:{a}") for a in (0.1, 0.3, 1, 3, 10)]
    with jax.enable_x64(True):
        for axis, value, name, scheme in cases:
            case = convex(name, scheme)
            spread = float(np.log10(case.smoothness[0].max() / case.smoothness[0].min()))
            algs = members(case, 1)
            for method in ("GD", "LAQ", "LAG-WK"):
                label = {"axis": axis, "value": float(value), "spread": spread, "method": method}
                chosen.append(Point(algs[method], case, 0, label))
        identity = {"experiment": "heterogeneity", "targets": (target,)}
        budget = Budget(20_000, every=500)
        summary = study.run(chosen, Targets((target,)), out, budget, identity=identity, console=console)
    table = summary.pivot("method", index=["axis", "value", "spread"], values=f"uploads_{target:g}").with_columns(
        **{f"{m} saves": 1 - pl.col(m) / pl.col("GD") for m in ("LAQ", "LAG-WK")}
    )
    files.save(table, out / "heterogeneity", csv=True)
    plots.heterogeneity(out)
    shown = table.select(
        pl.concat_str("axis", "value", separator=" ").alias("workers"),
        "spread",
        *(pl.col(m).map_elements(ledger.short, pl.String) for m in ("GD", "LAQ", "LAG-WK")),
        *(pl.col(f"{m} saves").map_elements(lambda s: f"{s:.1%}", pl.String) for m in ("LAQ", "LAG-WK")),
    )
    title = f"uploads to f - f* <= {target:g}; spread: log10 of max L_m / min L_m"
    console.print(ledger.printed(shown, title))
    console.print(f"figures and tables: {out}")
