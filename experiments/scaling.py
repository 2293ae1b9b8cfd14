"""Measure how a round scales with workers, parameters, devices, processes.

    python -m experiments.scaling                six to eight minutes on two quiet cores
    python -m experiments.scaling --quick        one minute: rougher times, small sizes

Starts its own processes on this machine, with CPU devices that XLA makes of its cores. More devices than cores cannot be
faster, and one device already uses all cores. So weak and strong scaling show what devices and processes cost here, not
what they gain. The algorithm is LAQ with b = 4 on MNIST. Measurements take turns, and the best call counts.

Bytes are those that a device receives, by the compiled program. Between processes, the counter of the loopback device is
read too, less its traffic in an equally long idle time. Other programs still add to it. A network namespace excludes them
(as root: unshare -n sh -c 'ip link set lo up; python -m experiments.scaling').
The costs of a thousand hosts are a model: see its formula, constants and assumptions in model.json.

Writes to --out: cost and bytes (Parquet, CSV), goals and model (Parquet, CSV; JSON), figures (PNG, SVG), run.json.
"""

from pathlib import Path

import polars as pl
from rich.console import Console

from experiments.benchmarks import measurements
from experiments.figures import drawing
from experiments.harness import cli, processes, results, storage


def main(out: Path | None = None, quick: bool = False) -> None:
    """Measure, draw and print.

    Args:
        out: Folder for tables and figures. By default results/scaling, or results/scaling-quick.
        quick: Use small sizes and few turns.
    """
    console, foreign_cpu = Console(), processes.monitor_foreign_cpu()
    out = out or Path("results") / ("scaling" + "-quick" * quick)
    with cli.exit_on_user_error():
        try:
            with console.status("") as status:
                tables = measurements.measure(out, quick, status.update)
        except KeyboardInterrupt:
            raise cli.exit_with_message(130, f"stopped; finished tables are in {out}") from None
        others = foreign_cpu()
        storage.write_json(out / "run.json", storage.provenance() | {"quick": quick, "others": others})
        drawing.draw_figures(out)
        print_report(out, tables, others, console)


def print_report(out: Path, tables: dict[str, pl.DataFrame], others: float, console: Console) -> None:
    """Print short tables."""
    layout = pl.format("{} x {}", "processes", "devices of each").alias("on")
    ratios = {"one collective / float32": "one collective", "the run / float32": "the run"}
    columns = ("collective", *ratios, "moved MB", "loopback MB", "server MB")
    shown = {
        "bytes, as shares of a float32 all-gather in every round": tables["bytes"]
        .select(layout, *columns)
        .rename(ratios),
        "memory": tables["memory"].select(layout, pl.all().exclude("processes", "devices of each")),
        f"goals; other processes used {others:.0%} of the CPU": tables["goals"],
    }
    numbers = {n for table in shown.values() for n, kind in table.schema.items() if kind.is_numeric()}
    words = dict.fromkeys(numbers, lambda value: "-" if value is None else f"{value:.3g}")
    results.report_result(console, out, shown, words=words)


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
