"""The whole family side by side, called by `experiments.reproduce family | heterogeneity | slaq`."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track
from rich.table import Table

import laqjax
from experiments import datasets, files, plots, problems, race
from laqjax import algorithms, compressors, theory
from laqjax.oracle import Blocks

WORKERS = 10


@dataclass(frozen=True)
class Linear:
    """A convex problem dealt out to workers, with its constants."""

    oracle: Any
    theta0: Any
    shards: laqjax.Shards
    each: np.ndarray  # L_m
    smooth: float  # L
    f_star: float


def prepared(name: str, scheme: str = "contiguous", *, seed: int = 0) -> Linear:
    """Binary logistic regression on a data set, sums over shards made means, l2 = 0.01 per worker; float64."""
    data = datasets.load(name)
    shards = laqjax.problems.partition(data.x, data.y, WORKERS, scheme, seed)
    shards = laqjax.Shards(shards.x, shards.y, shards.weight.astype(np.float64))
    problem = laqjax.problems.Logistic(data.x.shape[1], l2=0.01, reduction="mean")
    oracle = problem.oracle(np.float64)
    each, smooth = problem.smoothness(shards)
    f_star = problems.optimum(problem, shards, cache=Path("results") / "cache")
    return Linear(oracle, problem.theta0(oracle), jax.tree.map(jnp.asarray, shards), each, smooth, f_star)


def members(linear: Linear, size: int) -> dict[str, laqjax.Algorithm]:
    """Every member at a step of its own; `size`: minibatch.

    Full gradients: what theory admits (the lazy rules take sum xi = 0.1 at 0.8 / L), the IAGs as in LAG's experiments.
    Minibatches: 0.1 / L, and they end at the floor of their variance; signs and CADA, whose steps have no such scale,
    at a plain choice.
    """
    oracle, p = linear.oracle, linear.oracle.size
    k = max(p // 10, 1)
    full = {"num_workers": WORKERS, "lr": 1 / linear.smooth}
    lazy = full | {"lr": 0.8 / linear.smooth, "xi": 0.1}
    batch = full | {"lr": 0.1 / linear.smooth, "sampler": Blocks(size)}
    lazy_batch = batch | {"xi": 0.1}
    top, natural, delta = compressors.top_k(k), compressors.natural(), k / p
    omega, probability = 1 / 8, k / p
    rand = p / k - 1
    lr_rand = theory.lr_marina(linear.each, linear.smooth, rand, probability)
    ef21 = theory.lr_ef21(linear.each, linear.smooth, delta)
    zeta = (1 - delta) / (1 - np.sqrt(1 - delta))  # the laziest that costs nothing in theory
    clag = theory.lr_ef21(linear.each, linear.smooth, delta, zeta)
    a: Any = algorithms
    return {
        "GD": a.gd(oracle, **full),
        "QGD": a.qgd(oracle, bits=4, **full),
        "LAG-WK": a.lag_wk(oracle, **lazy),
        "LAG-PS": a.lag_ps(oracle, smoothness=linear.each, **lazy),
        "Cyc-IAG": a.iag_cyclic(oracle, **(full | {"lr": 1 / (linear.smooth * WORKERS)})),
        "Num-IAG": a.iag_random(
            oracle, smoothness=linear.each, **(full | {"lr": 0.5 / (linear.smooth * np.sqrt(WORKERS))})
        ),
        "LAQ": a.laq(oracle, bits=4, **lazy),
        "TWO-LAQ": a.two_laq(oracle, bits=4, **lazy),
        "LAQ, b adaptive": a.laq_adaptive(oracle, **lazy),
        "EF21": a.ef21(oracle, compressor=top, **(full | {"lr": ef21})),
        "CLAG": a.clag(oracle, compressor=top, zeta=zeta, **(full | {"lr": clag})),
        "DIANA": a.diana(
            oracle,
            compressor=natural,
            damping=1 / (1 + omega),
            **(full | {"lr": theory.lr_diana(linear.each, linear.smooth, omega)}),
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
        "LASG-PS": a.lasg_ps(oracle, smoothness=linear.each, **lazy_batch),
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
    jax.config.update("jax_enable_x64", True)
    linear = prepared("synthetic-logistic?workers=10&samples=200&features=50&condition=100&heterogeneity=1")
    rows, curves = [], []
    for name, alg in track(members(linear, 20).items(), "family", console=console):
        # the residual is of the full loss: a minibatch's own loss says little
        out_run = laqjax.run(
            alg,
            linear.theta0,
            linear.shards,
            rounds,
            jax.random.key(0),
            record=["params"],
            chunk=rounds,
            workers_at_once=WORKERS,
        )
        frame = race.rows(
            out_run.info._replace(loss=full_loss(linear, out_run.info.extra["params"])), np.zeros((0, 3)), linear.f_star
        )
        met = frame.filter(pl.col("residual") <= target)
        rows.append(
            {
                "method": name,
                "target": target if len(met) else None,
                **(met.row(0, named=True) if len(met) else frame.row(-1, named=True)),
                "residual": float(frame["residual"][-2]),
            }
        )
        kept = plots.thinned(len(frame) - 1, 300)
        curves.append(frame[kept].select(pl.lit(name).alias("method"), pl.all()))
    table = pl.DataFrame(rows, infer_schema_length=None).select(
        "method", "target", "round", "uploads", "bits_up", "bits", "residual"
    )
    save(out, table, pl.concat(curves))
    plots.pareto_of_methods(out)
    shown = Table(
        "method",
        "rounds",
        "uploads",
        "bits up",
        "up + down",
        "residual at the end",
        title=f"cost to f - f* <= {target:g} (- : not reached in {rounds} rounds)",
    )
    for row in table.sort("target", "bits_up", nulls_last=True).iter_rows(named=True):
        cost = [race.short(row[c]) if row["target"] else "-" for c in ("round", "uploads", "bits_up", "bits")]
        shown.add_row(row["method"], *cost, f"{row['residual']:.1e}")
    console.print(shown)
    console.print(f"figures and tables: {out}")


def full_loss(linear: Linear, params: Any) -> np.ndarray:
    """The full loss at each row of params [K, p]."""
    loss = race.full_loss(linear.oracle, linear.shards)
    return np.asarray(jax.jit(lambda rows: jax.lax.map(loss, rows, batch_size=50))(jnp.asarray(params)))


def heterogeneity(out: Path = Path("results/heterogeneity"), target: float = 1e-6) -> None:
    """Uploads that LAQ and LAG save against GD, over the spread of L_m and over Dirichlet alpha.

    Args:
        out: Folder for the results.
        target: Residual f - f* at which the uploads are read off.
    """
    console = Console()
    jax.config.update("jax_enable_x64", True)
    base = "synthetic-logistic?workers=10&samples=200&features=50&condition=100&heterogeneity="
    cases = [("spread of L_m (decades)", h, f"{base}{h}", "contiguous") for h in (0, 0.5, 1, 1.5, 2)]
    cases += [("Dirichlet alpha", a, f"{base}0", f"dirichlet:{a}") for a in (0.1, 0.3, 1, 3, 10)]
    rows = []
    for axis, value, name, scheme in track(cases, "heterogeneity", console=console):
        linear = prepared(name, scheme)
        chosen = members(linear, 1)
        uploads = {}
        for method in ("GD", "LAQ", "LAG-WK"):
            uploads[method] = uploads_to(linear, chosen[method], target)
        spread = float(np.log10(linear.each.max() / linear.each.min()))
        rows.append({"axis": axis, "value": float(value), "spread": spread} | uploads)
    kinds: Any = dict.fromkeys(("GD", "LAQ", "LAG-WK"), pl.Int64)  # null: not reached
    table = pl.DataFrame(rows, schema_overrides=kinds).with_columns(
        **{f"{m} saves": 1 - pl.col(m) / pl.col("GD") for m in ("LAQ", "LAG-WK")}
    )
    with files.replacing(out / "heterogeneity.parquet") as part:
        table.write_parquet(part)
    with files.replacing(out / "heterogeneity.csv") as part:
        table.write_csv(part)
    files.write_json(out / "run.json", files.provenance())
    plots.heterogeneity(out)
    shown = Table("", "", "log10 max L_m / min L_m", "GD", "LAQ", "LAG-WK", title=f"uploads to f - f* <= {target:g}")
    for row in table.iter_rows(named=True):
        saved = [row[f"{m} saves"] for m in ("LAQ", "LAG-WK")]
        cells = [
            "-" if s is None else f"{row[m]:,} ({s:.1%} saved)" for m, s in zip(("LAQ", "LAG-WK"), saved, strict=True)
        ]
        shown.add_row(row["axis"], f"{row['value']:g}", f"{row['spread']:.2f}", str(row["GD"] or "-"), *cells)
    console.print(shown)
    console.print(f"figures and tables: {out}")


def uploads_to(linear: Linear, alg: laqjax.Algorithm, target: float, most: int = 20000) -> int | None:
    """Uploads before the first model within the target; None when `most` rounds do not reach it."""
    uploads = 0
    for out in laqjax.stream(
        alg, linear.theta0, linear.shards, most, jax.random.key(0), chunk=500, workers_at_once=WORKERS
    ):
        met = np.flatnonzero(out.info.loss - linear.f_star <= target)
        uploads += int(out.info.sent[: met[0] if len(met) else None].sum())
        if len(met):
            return uploads
    return None


def slaq(out: Path | None = None, network: bool = False, rounds: int = 1000, smoke: bool = False) -> None:
    """SLAQ and the stochastic baselines on MNIST, 500 examples per worker and round, lr 0.008, b = 3.

    With b = 3 the quantization error alone stands at the threshold of the paper's rule: nearly all uploads are those that
    C forces, and the model suffers. Half of the error terms (as in the authors' script), or b = 4, gives their picture.
    signSGD and CADA have another scale of step: 1e-3, the best of a few on softmax regression.

    Args:
        out: Folder for the results.
        network: The 784-200-10 network instead of softmax regression.
        rounds: Of each method.
        smoke: Few rounds.
    """
    console = Console()
    folder = out or Path("results") / ("slaq" + "-nn" * network + "-smoke" * smoke)
    rounds = 40 if smoke else rounds
    data = datasets.load("mnist")
    shards = laqjax.problems.partition(data.x, data.y, WORKERS, "contiguous")
    problem = (laqjax.problems.Network if network else laqjax.problems.Softmax)(data.x.shape[1], 10)
    oracle = problem.oracle()
    theta0 = problem.theta0(oracle) if network else problems.authors_start(oracle)
    files.claim(folder, {"network": network, "rounds": rounds})
    each = {"num_workers": WORKERS, "lr": 0.008, "sampler": Blocks(500)}
    authors = {"ramp": True, "first_upload": "rule"}
    a: Any = algorithms
    slaq = a.slaq(oracle, bits=3, **each, **authors)
    lazy = replace(slaq.rule.rule, errors=np.asarray(1.5, oracle.dtype))  # 3 in the paper
    more = 8 if network else 4
    methods = {
        "SGD": a.sgd(oracle, **each),
        "SLAQ": slaq,
        "SLAQ, half the errors": replace(slaq, rule=replace(slaq.rule, rule=lazy)),
        f"SLAQ, b = {more}": a.slaq(oracle, bits=more, **each, **authors),
        "QSGD": a.qsgd(oracle, levels=3, **each),
        "TernGrad": a.terngrad(oracle, **each),
        "SSGD": a.ssgd(oracle, density=0.05, **each),
        "signSGD": a.sign_sgd(oracle, **(each | {"lr": 1e-3})),
        "EF-signSGD": a.ef_sign_sgd(oracle, **each),
        "top-k EF": a.topk_ef(oracle, k=oracle.size // 20, **each),
        "LASG-WK1": a.lasg_wk1(oracle, **each),
        "LASG-WK2": a.lasg_wk2(oracle, **each),
        "CADA1": a.cada1(oracle, c=6.0, **(each | {"lr": 1e-3})),
        "CADA2": a.cada2(oracle, c=6.0, **(each | {"lr": 1e-3})),
    }
    shards = jax.tree.map(jnp.asarray, shards)
    curves, stopped = race.race(
        console,
        folder,
        methods,
        theta0,
        shards,
        rounds,
        (),
        np.nan,
        race.evaluator(problem, oracle, data, shards),
        chunk=20,
    )
    published = {} if network or smoke else {name: {"uploads": 8552} for name in methods if name.startswith("SLAQ")}
    race.report(console, folder, curves, race.summary(curves, ()), published, None)
    files.write_json(folder / "run.json", files.provenance())
    if stopped:
        raise SystemExit(130)


def save(out: Path, table: pl.DataFrame, curves: pl.DataFrame) -> None:
    """Table (Parquet and CSV), curves, and where they come from."""
    with files.replacing(out / "table.parquet") as part:
        table.write_parquet(part)
    with files.replacing(out / "table.csv") as part:
        table.write_csv(part)
    with files.replacing(out / "family.parquet") as part:
        curves.write_parquet(part)
    files.write_json(out / "run.json", files.provenance())
