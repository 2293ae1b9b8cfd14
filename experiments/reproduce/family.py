"""The whole family side by side at the steps of theory, and what the lazy rules save as workers differ."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments.figures import drawing
from experiments.harness import comparison, results, runner, storage
from experiments.harness.cases import SYNTHETIC, convex_case
from experiments.harness.comparison import Comparison
from experiments.harness.results import Targets
from experiments.harness.runner import RunOptions
from experiments.reproduce import run_methods, write_and_print

DECADES, ALPHAS = (0, 0.5, 1, 1.5, 2), (0.1, 0.3, 1, 3, 10)  # of L_m; of Dirichlet


def family(out: Path = Path("results/family"), rounds: int = 3000, target: float = 1e-6) -> None:
    """Every member at the step of theory, on one strongly convex problem.

    Bits against residual; the steps stand in `members.MEMBERS`.

    Args:
        out: Folder for the results.
        rounds: Rounds of each member at most.
        target: Residual f - f* at which the cost is read off.
    """
    console = Console()
    with jax.enable_x64(True):
        compared = Comparison(comparison.Settings(), console)
        chosen = [replace(p, label={"method": p.label["algorithm"]}) for p in compared.points(compared.first(), (0,))]
        summary = run_methods(
            {"name": "family"}, chosen, Targets((target,)), out, RunOptions(rounds, eval_every=20), console
        )
    t = f"{target:g}"
    table = summary.sort(f"bits_up_{t}", nulls_last=True).select(
        "method",
        *(pl.col(f"{c}_{t}").cast(pl.Int64).alias(c) for c in ("rounds", "uploads")),
        *(pl.col(f"{c}_{t}").cast(pl.Int64).alias(n) for c, n in (("bits_up", "bits up"), ("bits", "bits up + down"))),
        (pl.col("final_loss") - pl.col("f_star")).alias("f - f* at the end"),
    )
    write_and_print(out, table, f"cost to f - f* <= {t} (- : not reached in {rounds} rounds)", console)


def heterogeneity(out: Path = Path("results/heterogeneity"), target: float = 1e-6) -> None:
    """Uploads that LAQ and LAG save against GD, as workers differ more and more.

    Over the spread of L_m and over Dirichlet alpha.

    Args:
        out: Folder for the results.
        target: Residual f - f* at which the uploads are read off.
    """
    console, chosen = Console(), []
    cases = [("decades of L_m", h, f"{SYNTHETIC}{h:g}", "contiguous") for h in DECADES]
    cases += [("Dirichlet alpha", a, f"{SYNTHETIC}0", f"dirichlet:{a}") for a in ALPHAS]
    with jax.enable_x64(True):
        for axis, value, name, scheme in cases:
            case = convex_case(name, scheme)
            spread = float(np.log10(case.smoothness[0].max() / case.smoothness[0].min()))
            axes = replace(comparison.Settings().axes, algorithm=("gd", "laq", "lag_wk"))
            compared = Comparison(replace(comparison.Settings(), axes=axes), console, case)
            label = {"axis": axis, "value": float(value), "spread": spread}
            made = compared.points(compared.first(), (0,))
            chosen += [replace(point, label=label | {"method": point.label["algorithm"]}) for point in made]
        identity = {"experiment": "heterogeneity", "targets": (target,)}
        budget = RunOptions(20_000, eval_every=500)
        summary = runner.run(chosen, Targets((target,)), out, budget, identity=identity, console=console)
    table = summary.pivot("method", index=["axis", "value", "spread"], values=f"uploads_{target:g}").with_columns(
        **{f"{m} saves": 1 - pl.col(m) / pl.col("gd") for m in ("laq", "lag_wk")}
    )
    storage.save_frame(table, out / "heterogeneity", csv=True)
    drawing.draw_figures(out)
    shown = table.select(
        pl.concat_str("axis", "value", separator=" ").alias("workers"),
        "spread",
        *("gd", "laq", "lag_wk", "laq saves", "lag_wk saves"),
    )
    title = f"uploads to f - f* <= {target:g}; spread: log10 of max L_m / min L_m"
    words: Any = dict.fromkeys(("gd", "laq", "lag_wk"), results.format_count)
    words |= dict.fromkeys(("laq saves", "lag_wk saves"), lambda share: "-" if share is None else f"{share:.1%}")
    results.report_result(console, out, {title: shown}, words=words)
