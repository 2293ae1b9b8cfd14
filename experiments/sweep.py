"""Sweep b, C, D, xi, lr and seeds as one compiled program; see what is cheapest.

    python -m experiments.sweep                  the default grid on the embedded MNIST, 3 minutes
    python -m experiments.sweep -b 2 4 8 -C 10 100 -D 1 10 --seeds 0 1 2 --lr 0.02 --rounds 2000
    python -m experiments.sweep --problem my.py:make --dataset my.py:load --target-accuracy 0.9
    python -m experiments.sweep --num-random 200 -b 2 8 -C 1 200        two values are a range here
    python -m experiments.sweep --shard 2/3 ...                     a part of the points, and then
    python -m experiments.sweep merge DIR DIR DIR --out DIR         all parts in one folder

Leaves in --out: points (a row a point), summary (mean and 95 % interval over seeds), curves (thinned), masks (who sent
when), each as Parquet, the first two as CSV too; figures as PNG and SVG; the plan, the exact command and the versions.
A batch's rows are safe when it ends: after a kill the same command goes on, and no row differs from an undisturbed run.
With more --rounds, or with smaller targets behind those that are there, it goes on from the last states.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments.figures import drawing, ranking
from experiments.harness import cli, grid, results, runner, storage
from experiments.harness.results import NetworkModel
from experiments.harness.runner import RunOptions


@dataclass(frozen=True)
class Settings:
    """A sweep."""

    axes: grid.GridAxes = grid.GridAxes(bits=(3, 4, 6, 8), max_silence=(5, 10, 100), window=(1, 3, 10), lr=(0.01,))
    data: grid.DataAxes = grid.DataAxes()
    goal: grid.TargetOptions = grid.TargetOptions()
    budget: RunOptions = RunOptions()
    draw: grid.SamplingOptions = grid.SamplingOptions()
    link: NetworkModel = NetworkModel()
    authors_rule: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/sweep")
    """Folder for the results."""
    hosts: grid.HostOptions = grid.HostOptions()
    quick: bool = False
    """Few examples and rounds: does everything work here?"""


def run(settings: Settings) -> Path:
    """Run what is not yet done of a sweep; tables and figures in the output folder, which is returned."""
    console = cli.leader_console()
    settings = grid.apply_quick_defaults(settings)
    choices = list(grid.iter_settings(settings.axes, settings.data, settings.draw))
    chosen = grid.build_checked_points(settings, choices)
    identity = grid.settings_identity(settings, experiment="sweep")
    runner.run(chosen, settings.goal.targets, settings.out, settings.budget, settings.link, identity, console)
    if jax.process_index() == 0:
        print_report(settings.out, console)
    return settings.out


def print_report(folder: Path, console: Console) -> None:
    """Figures, and the cheapest settings as a short table: with several algorithms the best of each first."""
    drawing.draw_figures(folder)
    summary = pl.read_parquet(folder / "summary.parquet")
    target, goal = results.target_labels(summary)[-1], summary["goal"][0]
    ranked = ranking.rank_by_bits(summary, target)
    differ = [name for name in results.setting_columns(summary) if summary[name].n_unique() > 1]
    same = [name for name in results.setting_columns(summary) if name not in differ and summary[name][0] is not None]
    constant = ", ".join(
        f"{results.COLUMN_TITLES.get(name, name)} = {results.format_value(summary[name][0])}" for name in same
    )
    console.print(constant)
    best = ranked.unique("algorithm", keep="first", maintain_order=True)
    shown = pl.concat([best, ranked.join(best, on="point", how="anti")])[: max(10, len(best))]
    costs = {
        "rounds": pl.col(f"rounds_{target}"),
        "uploads": pl.col(f"uploads_{target}"),
        "Mbit up": pl.col(f"bits_up_{target}") / 1e6,
        "+ down": pl.col(f"bits_{target}") / 1e6,
        "seconds": pl.col(f"seconds_{target}"),
        "accuracy": pl.col("accuracy"),
    }
    taken = {*costs, *differ}
    heads = {name: results.COLUMN_TITLES.get(name, name) for name in differ or ["algorithm"]}
    columns = [pl.col(n).alias(head if head not in taken else f"{n} ") for n, head in heads.items()]
    title = f"cheapest to {goal} {target} (simulated seconds)"
    tables = {title: shown.select(*columns, **costs)} if len(ranked) else {}
    notices = [*results.unreached_notice(summary), *results.tied(pl.read_parquet(folder / "points.parquet"))]
    if not len(ranked):
        notices.append(nearest_miss_notice(folder, summary, float(target)))
    results.report_result(console, folder, tables, notices, constant=constant)


def nearest_miss_notice(folder: Path, summary: pl.DataFrame, target: float) -> str:
    """What was reached where no point came to the last target, and how long it would take at that rate."""
    met = [t for t in results.target_labels(summary) if summary[f"rounds_{t}"].null_count() < len(summary)]
    said = f"the smallest target reached is {met[-1]}" if met else "no target was reached"
    best = summary.sort("final_loss", nulls_last=True)["point"][0]
    curve = pl.read_parquet(folder / "curves.parquet").filter(pl.col("point") == best).drop_nans("residual")
    last, rounds = curve["residual"].to_numpy(), curve["round"].to_numpy()
    half = int(np.searchsorted(rounds, rounds[-1] / 2)) if len(rounds) else 0
    if summary["goal"][0] != "f - f* <=" or len(last) < 2 or not last[-1] < last[half]:
        return f"{said}; give more --rounds, another --lr or another target"
    rate = np.log(last[half] / last[-1]) / (rounds[-1] - rounds[half])
    need = rounds[-1] + np.log(last[-1] / target) / rate
    return f"{said}; point {best} is at {last[-1]:.2g} and would need about {need:,.0f} rounds at its rate: --rounds"


def merge(folders: cli.Folders, /, out: Path) -> None:
    """Join the folders of `--shard i/n` runs of one sweep.

    Args:
        folders: All of them, in any order.
        out: Folder for the whole.
    """
    console = Console()
    seen: dict[str, Any] = {}
    shards = []
    for folder in folders:
        if not (folder / "identity.json").exists():
            raise ValueError(f"{folder} holds no sweep: expected identity.json there")
        there = storage.read_identity(folder)
        if there.get("experiment") != "sweep":
            raise ValueError(f"{folder} holds no sweep but {there.get('experiment')}: expected folders of --shard i/n")
        shards.append(there.pop("shard"))
        if lacking := [name for name in ("points.parquet", "run.json") if not (folder / name).exists()]:
            raise ValueError(f"{folder} is not finished: expected {lacking[0]} there; run its command again first")
        if seen and there != seen:
            keys = sorted(k for k in there if there[k] != seen.get(k))
            raise ValueError(
                f"{folder} holds another sweep: {', '.join(f'{k}: {there[k]} here, {seen.get(k)} there' for k in keys)}"
            )
        seen = there
    n = int(shards[0].split("/")[1]) if shards else 1
    wanted = [f"{i}/{n}" for i in range(1, n + 1)]
    if sorted(shards) != sorted(wanted):
        raise ValueError(f"shards {shards}: expected {wanted}, each once")
    times = {str(storage.read_json(folder / "plan.json")["compute_ms"]) for folder in folders}
    if len(times) > 1:
        console.print(
            f"seconds rest on the compute times of different runs ({', '.join(sorted(times))} ms): give all --compute-ms"
        )
    with storage.lock_results_dir(out, seen | {"shard": "1/1"}):
        results.merge_tables(out, [f"{folder}/" for folder in folders])
        storage.write_json(out / "run.json", storage.provenance() | {"merged": [str(folder) for folder in folders]})
    print_report(out, console)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    with cli.command_line(arguments) as given:
        if given[:1] == ["merge"]:
            cli.parse_cli(merge, given[1:], name=" merge")
        else:
            run(grid.parse_settings(Settings, given, __doc__))


if __name__ == "__main__":
    main()
