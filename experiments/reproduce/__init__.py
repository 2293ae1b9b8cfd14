"""Tables of the papers next to the published values."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import polars as pl
from rich.console import Console

from experiments.figures import drawing
from experiments.harness import results, runner, storage
from experiments.harness.results import Targets
from experiments.harness.runner import RunOptions, SweepPoint

COSTS = {"rounds": "rounds", "uploads": "uploads", "bits_up": "bits up", "paper_bits": "as b p", "bits": "up + down"}
NUMBERS = ("mean", "least", "most", "published")


def run_methods(
    name: Any, points: Sequence[SweepPoint], targets: Targets, out: Path, budget: RunOptions, console: Console
) -> pl.DataFrame:
    """Run points that are labeled with their method, draw the figures, and return the summary."""
    identity = name | {"experiment": "methods", "rounds": budget.rounds, "targets": targets.values}
    summary = runner.run(points, targets, out, budget, identity=identity, console=console)
    if jax.process_index() == 0:
        drawing.draw_figures(out)
    return summary


def compare_with_published(
    summary: pl.DataFrame, target: str, published: Mapping[str, Mapping[str, float]], message: Any
) -> pl.DataFrame:
    """Compare the mean, minimum and maximum of each cost of each method over the starts with the published value.

    `message` holds the bits of an upload of each method as the paper counts them, b p.
    """
    rows = []
    for row in summary.iter_rows(named=True):
        method = row["method"]
        for cost, title in COSTS.items():
            source, scale = ("uploads", message[method]) if cost == "paper_bits" else (cost, 1)
            found = {e: row[f"{source}_{target}{x}"] for e, x in (("mean", ""), ("least", "_least"), ("most", "_most"))}
            ours: Any = {e: None if value is None else value * scale for e, value in found.items()}
            value: Any = published.get(method, {}).get(cost)
            known = value is not None and ours["mean"] is not None
            rows.append(
                {"method": method, "cost": title, **ours, "published": value}
                | {"difference": f"{ours['mean'] / value - 1:+.1%}" if known else None}
                | {"inside": ("yes" if ours["least"] <= value <= ours["most"] else "no") if known else None}
            )
    kinds: Any = dict.fromkeys(NUMBERS, pl.Float64) | dict.fromkeys(("difference", "inside"), pl.String)
    return pl.DataFrame(rows, schema_overrides=kinds)


def write_and_print(out: Path, table: pl.DataFrame, title: str, console: Console) -> None:
    """Write and print a table on process 0."""
    if jax.process_index() > 0:
        return
    storage.save_frame(table, out / "table", csv=True)
    results.report_result(console, out, {title: table}, words=dict.fromkeys(NUMBERS, results.format_count))
