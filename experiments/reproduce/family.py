"""All methods at the steps of theory, and what the lazy rules save as workers differ more."""

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
from experiments.harness.comparison import MethodGrids
from experiments.harness.results import Targets
from experiments.harness.runner import RunOptions
from experiments.reproduce import run_methods, write_and_print

DECADES, ALPHAS = (0, 0.5, 1, 1.5, 2), (0.1, 0.3, 1, 3, 10)  # spread of L_m; Dirichlet parameter


def family(out: Path | None = None, rounds: int = 3000, target: float = 1e-6, quick: bool = False) -> None:
    """Run all methods at the step of theory on one strongly convex problem.

    The table shows bits against residual; the steps are those of `experiments.harness.search_spaces.MEMBERS`.

    Args:
        out: Folder for the results. Default: results/family.
        rounds: Maximum number of rounds of each method.
        target: Residual f - f* at which the cost is read.
        quick: Run every sixth method for few rounds, to check that everything works.
    """
    console, out = Console(), out or Path("results") / ("family" + "-quick" * quick)
    rounds = min(rounds, 60) if quick else rounds
    with jax.enable_x64(True):
        space = MethodGrids(comparison.Settings(), console)
        first = space.first()[:: 6 if quick else 1]
        points = [replace(p, label={"method": p.label["algorithm"]}) for p in space.points(first, (0,))]
        budget = RunOptions(rounds, eval_every=20)
        summary = run_methods({"name": "family"}, points, Targets((target,)), out, budget, console)
    t = f"{target:g}"
    costs = {"rounds": "rounds", "uploads": "uploads", "bits_up": "bits up", "bits": "bits up + down"}
    table = summary.sort(f"bits_up_{t}", nulls_last=True).select(
        "method",
        *(pl.col(f"{cost}_{t}").cast(pl.Int64).alias(title) for cost, title in costs.items()),
        (pl.col("final_loss") - pl.col("f_star")).alias("f - f* at the end"),
    )
    write_and_print(out, table, f"cost to f - f* <= {t} (- : not reached in {rounds} rounds)", console)


def heterogeneity(out: Path | None = None, target: float = 1e-6, quick: bool = False) -> None:
    """Compare the uploads of LAQ, LAG and GD as workers differ more and more.

    Workers differ by the spread of L_m, or by the alpha of a Dirichlet partition.

    Args:
        out: Folder for the results. Default: results/heterogeneity.
        target: Residual f - f* at which the uploads are read.
        quick: Run one value of each to a residual of at least 1e-2, to check that everything works.
    """
    console, chosen = Console(), []
    out = out or Path("results") / ("heterogeneity" + "-quick" * quick)
    some, target = slice(-1 if quick else None, None), max(target, 1e-2) if quick else target
    cases = [("decades of L_m", h, f"{SYNTHETIC}{h:g}", "contiguous") for h in DECADES[some]]
    cases += [("Dirichlet alpha", a, f"{SYNTHETIC}0", f"dirichlet:{a}") for a in ALPHAS[some]]
    axes = replace(comparison.Settings().axes, algorithm=("gd", "laq", "lag_wk"))
    with jax.enable_x64(True):
        for axis, value, name, scheme in cases:
            case = convex_case(name, scheme)
            spread = float(np.log10(case.smoothness[0].max() / case.smoothness[0].min()))
            space = MethodGrids(replace(comparison.Settings(), axes=axes), console, case)
            label = {"axis": axis, "value": float(value), "spread": spread}
            points = space.points(space.first(), (0,))
            chosen += [replace(point, label=label | {"method": point.label["algorithm"]}) for point in points]
        identity = {"experiment": "heterogeneity", "targets": (target,)}
        budget = RunOptions(20_000, eval_every=500)
        summary = runner.run(chosen, Targets((target,)), out, budget, identity=identity, console=console)
    table = summary.pivot("method", index=["axis", "value", "spread"], values=f"uploads_{target:g}").with_columns(
        **{f"{m} saves": 1 - pl.col(m) / pl.col("gd") for m in ("laq", "lag_wk")}
    )
    storage.save_frame(table, out / "heterogeneity", csv=True)
    drawing.draw_figures(out)
    workers = pl.concat_str("axis", "value", separator=" ").alias("workers")
    shown = table.select(workers, "spread", "gd", "laq", "lag_wk", "laq saves", "lag_wk saves")
    title = f"uploads to f - f* <= {target:g}; spread: log10 of max L_m / min L_m"
    words: Any = dict.fromkeys(("gd", "laq", "lag_wk"), results.format_count)
    words |= dict.fromkeys(("laq saves", "lag_wk saves"), lambda share: "-" if share is None else f"{share:.1%}")
    results.report_result(console, out, {title: shown}, words=words)
