"""How the cost of a round grows with workers, parameters, devices and processes.

    python -m experiments.scaling                six minutes on two quiet cores
    python -m experiments.scaling --quick        a minute and a half: rougher times, small sizes

Starts its own processes on this machine, on CPU devices that XLA makes of its cores: more devices than cores cannot be
faster, and a device alone uses all cores in its products, so that weak and strong scaling show here what devices and
processes cost, not what they gain. LAQ with b = 4, on MNIST. Contestants take turns, the best call counts. Bytes are those
that a device receives, by the compiled program; between processes also by the counter of the loopback device, from which
the traffic of an idle while as long is taken away: what else the machine says to itself meanwhile stays in it, but not in a
network of its own (as root: unshare -n sh -c 'ip link set lo up; python -m experiments.scaling').
The model of a thousand hosts is a model: its formula, constants and assumptions stand in model.json.

Leaves in --out: cost and bytes (Parquet, CSV), goals and model (Parquet, CSV; JSON), figures (PNG, SVG), run.json.
"""

import time
from pathlib import Path

import polars as pl
from rich.console import Console

from experiments.benchmarks import measurements
from experiments.benchmarks.speed import foreign_cpu_seconds, num_available_cores
from experiments.figures import drawing
from experiments.harness import cli, results, storage


def main(out: Path = Path("results/scaling"), quick: bool = False) -> None:
    """Measure, draw, print.

    Args:
        out: Folder for tables and figures.
        quick: Small sizes and few turns.
    """
    console = Console()
    others, spent, wall = foreign_cpu_seconds(), measurements.child_cpu_seconds(), time.perf_counter()
    with cli.exit_on_user_error():
        try:
            with console.status("") as status:
                tables = measurements.measure(out, quick, status.update)
        except KeyboardInterrupt:
            raise cli.exit_with_message(130, f"stopped; tables that were done are in {out}") from None
        others = foreign_cpu_seconds() - others - (measurements.child_cpu_seconds() - spent)
        others /= (time.perf_counter() - wall) * num_available_cores()
        storage.write_json(out / "run.json", storage.provenance() | {"quick": quick, "others": others})
        drawing.draw_figures(out)
        print_report(out, tables, others, console)


def print_report(out: Path, tables: dict[str, pl.DataFrame], others: float, console: Console) -> None:
    """Short tables."""
    team = pl.format("{} x {}", "processes", "devices of each").alias("on")
    heads = {"an collective / float32": "an collective", "the run / float32": "the run"}
    columns = ("collective", *heads, "moved MB", "loopback MB", "server MB")
    shown = {
        "bytes, as shares of a float32 all-gather in every round": tables["bytes"].select(team, *columns).rename(heads),
        "memory": tables["memory"].select(team, pl.all().exclude("processes", "devices of each")),
        f"goals; other processes took {others:.0%} of the CPU": tables["goals"],
    }
    numbers = {n for table in shown.values() for n, kind in table.schema.items() if kind.is_numeric()}
    words = dict.fromkeys(numbers, lambda value: "-" if value is None else f"{value:.3g}")
    results.report_result(console, out, shown, words=words)


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
