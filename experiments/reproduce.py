"""The tables of the papers, beside the published values.

    python -m experiments.reproduce laq-logistic     LAQ, TWO-LAQ, GD, QGD, LAG to residual 1e-6; 10 minutes on 2 cores
    python -m experiments.reproduce laq-nn           the 784-200-10 network, 8000 rounds; hours on a CPU
    ... --smoke                                      a tenth of the data, 200 rounds; under a minute

Leaves in --out: table (CSV, Parquet), curves (Parquet, one row a round), figures (PNG, SVG), the command and versions.
Ctrl-C ends early and keeps what is done; the same command goes on where it, or a kill, stopped.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import tyro
from rich.console import Console

import laqjax
from experiments import datasets, family, files, lag, problems, race
from laqjax import algorithms
from laqjax.checks import number

TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# values read off the published figures, good to about 2 %
PUBLISHED_LOGISTIC = {
    "LAQ": {"rounds": 2626, "uploads": 572, "paper_bits": 1.80e7, "bits": 6.77e8},
    "TWO-LAQ": {"rounds": 2576, "uploads": 734, "paper_bits": 2.30e7, "bits": 1.04e8},
    "GD": {"rounds": 2762, "uploads": 27610, "paper_bits": 6.94e9, "bits": 7.63e9},
    "QGD": {"rounds": 2758, "uploads": 27594, "paper_bits": 8.66e8, "bits": 1.56e9},
    "LAG": {"rounds": 2620, "uploads": 2432, "paper_bits": 6.11e8, "bits": 1.27e9},
}
PUBLISHED_NETWORK = {
    "LAQ": {"uploads": 32729},
    "TWO-LAQ": {"uploads": 30741},
    "GD": {"uploads": 80000},
    "QGD": {"uploads": 80000},
    "LAG": {"uploads": 30818},
}


@dataclass(frozen=True)
class Settings:
    """What a comparison run takes from the command line."""

    out: Path | None = None
    """Folder for the results; results/NAME by default."""
    rounds: int | None = None
    """Stop each method after so many rounds."""
    seed: int | None = None
    """Of the start. Without one: the start of the authors' program (softmax regression), seed 0 (network)."""
    smoke: bool = False
    """A tenth of the data and few rounds: does everything work here?"""
    float64: bool = False
    """Compute in float64: shows which counts are ruled by rounding."""


def laq_logistic(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Softmax regression on MNIST, 10 workers, b = 4, C = 100, D = 10, lr 0.02: NeurIPS 2019, figure 4 and table 2."""
    compare("laq-logistic", settings, bits=4, default_rounds=4000, targets=TARGETS, published=PUBLISHED_LOGISTIC)


def laq_nn(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """The 784-200-10 network on MNIST, 10 workers, b = 8, 8000 rounds: NeurIPS 2019, figure 5 and table 2."""
    compare("laq-nn", settings, bits=8, default_rounds=8000, targets=(), published=PUBLISHED_NETWORK)


def lag_table(data: Path, out: Path = Path("results/lag")) -> None:
    """LAG's real-data table: uploads to 1e-8, linear and logistic, M = 9 and 18 (NeurIPS 2018, table 5).

    Args:
        data: Folder laid out as the authors publish it: dataN/data.txt and dataN/y.txt.
        out: Folder for the results.
    """
    lag.table(data, out, Console())


def compare(
    name: str, settings: Settings, *, bits: int, default_rounds: int, targets: tuple[float, ...], published: Any
) -> None:
    """Run LAQ, TWO-LAQ, GD, QGD and LAG from one start; table, curves and figures in the output folder."""
    console = Console()
    folder = settings.out or Path("results") / (name + "-smoke" * settings.smoke + "-float64" * settings.float64)
    rounds = (200 if settings.smoke else default_rounds) if settings.rounds is None else settings.rounds
    number("rounds", rounds, np.int32, least=1)
    jax.config.update("jax_enable_x64", settings.float64)
    data = datasets.load("mnist")
    shards = laqjax.problems.partition(data.x, data.y, 10, "contiguous")
    if settings.smoke:
        shards = laqjax.Shards(*(array[:, :600] for array in shards))
    problem = (laqjax.problems.Softmax if targets else laqjax.problems.Network)(data.x.shape[1], 10)
    oracle = problem.oracle(np.float64 if settings.float64 else np.float32)
    theta0 = (
        problems.authors_start(oracle)
        if targets and settings.seed is None
        else problem.theta0(oracle, settings.seed or 0)
    )
    files.claim(folder, {"name": name, "seed": settings.seed, "smoke": settings.smoke, "float64": settings.float64})
    f_star = np.nan
    if targets:
        with console.status("f* by L-BFGS in float64 (half a minute, then cached)"):
            f_star = problems.optimum(problem, shards, cache=Path("results") / "cache")
    shards = jax.tree.map(jnp.asarray, shards)

    server: dict[str, Any] = {"lr": 0.02, "num_workers": 10}
    authors: dict[str, Any] = {"ramp": True, "first_upload": "rule"}
    methods = {
        "LAQ": algorithms.laq(oracle, bits=bits, **server, **authors),
        "TWO-LAQ": algorithms.two_laq(oracle, bits=bits, **server, **authors),
        "GD": algorithms.gd(oracle, **server),
        "QGD": algorithms.qgd(oracle, bits=bits, **server),
        "LAG": algorithms.lag_wk(oracle, **server, **authors),
    }
    evaluate = race.evaluator(problem, oracle, data, shards)
    curves, stopped = race.race(console, folder, methods, theta0, shards, rounds, targets, f_star, evaluate)
    full = theta0.nbytes * 8
    message = {
        "LAQ": bits * oracle.size,
        "TWO-LAQ": bits * oracle.size,
        "GD": full,
        "QGD": bits * oracle.size,
        "LAG": full,
    }
    table = race.summary(curves, targets).with_columns(
        paper_bits=pl.col("uploads") * pl.col("method").replace_strict(message)
    )
    race.report(console, folder, curves, table, {} if settings.smoke else published, targets[-1] if targets else None)
    files.write_json(folder / "run.json", files.provenance() | {"settings": asdict(settings), "f_star": f_star})
    if stopped:
        raise SystemExit(130)


def main() -> None:
    """The command line."""
    commands = {
        "laq-logistic": laq_logistic,
        "laq-nn": laq_nn,
        "slaq": family.slaq,
        "lag": lag_table,
        "heterogeneity": family.heterogeneity,
        "family": family.family,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(commands)
    except files.REFUSED as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
