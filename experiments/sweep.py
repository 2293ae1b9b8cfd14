"""Sweep b, C, D, xi, lr and seeds in one compiled program; rank them by cost.

    python -m experiments.sweep                  the default grid on the embedded MNIST, 3 minutes
    python -m experiments.sweep -b 2 4 8 -C 10 100 -D 1 10 --seeds 0 1 2 --lr 0.02 --rounds 2000
    python -m experiments.sweep --problem my.py:make --dataset my.py:load --target-accuracy 0.9
    python -m experiments.sweep --algorithm ef21 --set compressor top_k:50 natural --lr 0.02
    python -m experiments.sweep --set optimizer sgd adam --set lr 0.02 cosine:0.02:2000
    python -m experiments.sweep --set help           arguments of all algorithms, values by name
    python -m experiments.sweep --num-random 200 -b 2 8 -C 1 200        two values are a range here
    python -m experiments.sweep --shard 2/3 ...                     a part of the points, and then
    python -m experiments.sweep merge DIR DIR DIR --out DIR         all parts in one folder

Writes to --out: points (a row per point), summary (mean and 95 % interval over seeds), curves (thinned) and masks (who sent
when) as Parquet, the first two as CSV too; figures as PNG and SVG; the plan, the exact command and the versions.
The rows of a batch are safe when it ends: after a kill the same command continues, and its rows are those of a run without
a kill. With more --rounds, or with smaller targets after the given ones, it continues from the last states.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

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
    """Options of a sweep."""

    axes: grid.GridAxes = grid.GridAxes(bits=(3, 4, 6, 8), max_silence=(5, 10, 100), window=(1, 3, 10), lr=(0.01,))
    data: grid.DataAxes = grid.DataAxes()
    goal: grid.TargetOptions = grid.TargetOptions()
    budget: RunOptions = RunOptions()
    draw: grid.SamplingOptions = grid.SamplingOptions()
    link: NetworkModel = NetworkModel()
    authors_rule: bool = False
    """Lazy rule of the authors' program: first upload by the rule, xi rescaled over the first D rounds."""
    config: Path | None = None
    """TOML or YAML file of these settings; the command line takes precedence."""
    out: Path = Path("results/sweep")
    """Folder for the results."""
    hosts: grid.HostOptions = grid.HostOptions()
    quick: bool = False
    """Few rows and rounds, to test the installation."""


def run(settings: Settings) -> Path:
    """Run the points of a sweep that are not done yet, and return the folder of its tables and figures."""
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
    """Draw the figures, and print the cheapest settings, the best of each algorithm first."""
    drawing.draw_figures(folder)
    summary = pl.read_parquet(folder / "summary.parquet")
    last, goal = results.target_labels(summary)[-1], summary["goal"][0]
    target = find_hardest_target(summary) or last
    ranked = ranking.rank_by_bits(summary, target)
    differ = [name for name in results.setting_columns(summary) if summary[name].n_unique() > 1]
    same = [name for name in results.setting_columns(summary) if name not in differ and summary[name][0] is not None]
    titles = {name: results.COLUMN_TITLES.get(name, name) for name in summary.columns}
    constant = ", ".join(f"{titles[name]} = {results.format_value(summary[name][0])}" for name in same)
    console.print(constant)
    best = ranked.unique("algorithm", keep="first", maintain_order=True)
    shown = pl.concat([best, ranked.join(best, on="point", how="anti")])[: max(10, len(best))]
    costs = {name: pl.col(f"{name}_{target}") for name in ("rounds", "uploads")}
    costs |= {"Mbit up": pl.col(f"bits_up_{target}") / 1e6, "+ down": pl.col(f"bits_{target}") / 1e6}
    costs |= {"seconds": pl.col(f"seconds_{target}"), "accuracy": pl.col("accuracy")}
    names = differ or ["algorithm"]
    columns = [pl.col(n).alias(titles[n] if titles[n] not in {*costs, *differ} else f"{n} ") for n in names]
    title = f"fewest bits up to {goal} {target}, the best of each algorithm first (seconds are simulated)"
    tables = {title: shown.select(*columns, **costs)} if len(ranked) else {}
    notices = [*results.describe_unreached_settings(summary), *results.tied(pl.read_parquet(folder / "points.parquet"))]
    if target != last or not len(ranked):
        notices.append(nearest_miss_notice(folder, summary, float(last)))
    results.report_result(console, folder, tables, notices, constant=constant)


def find_hardest_target(summary: pl.DataFrame) -> str | None:
    """Return the last target that a setting reached on all of its seeds, None if there is none."""
    met = [t for t in results.target_labels(summary) if summary[f"rounds_{t}"].null_count() < len(summary)]
    return met[-1] if met else None


def nearest_miss_notice(folder: Path, summary: pl.DataFrame, target: float) -> str:
    """Return a notice if no point reached the last target: the nearest, and its rounds at the present rate."""
    target_met = find_hardest_target(summary)
    said = f"the last target reached is {target_met}" if target_met else "no setting reached a target on all seeds"
    if summary["accuracy"].count():
        said += f"; the best test accuracy at the end is {summary['accuracy'].max():.3g}"
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
        out: Folder for the whole sweep.
    """
    console = Console()
    identities = []
    for folder in folders:
        if not (folder / "identity.json").exists():
            raise ValueError(f"{folder} holds no sweep: must be a folder of --shard i/n with its identity.json")
        there = storage.read_identity(folder)
        if there.get("experiment") != "sweep":
            raise ValueError(f"{folder} holds no sweep but {there.get('experiment')}: must be a folder of --shard i/n")
        if lacking := [name for name in ("points.parquet", "run.json") if not (folder / name).exists()]:
            raise ValueError(f"{folder} is not finished: must hold {lacking[0]}; run its command again first")
        first = {"shard": there["shard"]} | (identities or [there])[0]
        if keys := sorted(k for k in there.keys() - {"shard"} if there[k] != first.get(k)):
            words = [f"{k}: {there[k]} here, {first.get(k)} there" for k in keys]
            raise ValueError(f"{folder} holds another sweep: {', '.join(words)}")
        identities.append(there)
    shards = [there["shard"] for there in identities]
    n = int(shards[0].split("/")[1]) if shards else 1
    wanted = [f"{i}/{n}" for i in range(1, n + 1)]
    if sorted(shards) != sorted(wanted):
        raise ValueError(f"shards {shards}: must be {wanted}, each once")
    times = {str(storage.read_json(folder / "plan.json")["compute_ms"]) for folder in folders}
    if len(times) > 1:
        console.print(f"seconds use different compute times ({', '.join(sorted(times))} ms): give all --compute-ms")
    with storage.lock_results_dir(out, identities[0] | {"shard": "1/1"}):
        results.save_tables(out, results.concat_tables([f"{folder}/" for folder in folders]))
        storage.write_json(out / "run.json", storage.provenance() | {"merged": [str(folder) for folder in folders]})
    print_report(out, console)


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the command line."""
    with cli.command_line(arguments) as given:
        if given[:1] == ["merge"]:
            cli.parse_cli(merge, given[1:], name=" merge")
        else:
            run(grid.parse_settings(Settings, given, __doc__))


if __name__ == "__main__":
    main()
