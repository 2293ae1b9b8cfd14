"""Sweep b, C, D, xi, lr and seeds as one compiled program; see what is cheapest.

    python -m experiments.sweep                  the default grid on the embedded MNIST, 3 minutes
    python -m experiments.sweep -b 2 4 8 -C 10 100 -D 1 10 --seeds 0 1 2 --lr 0.02 --rounds 2000
    python -m experiments.sweep --problem my.py:make --dataset my.py:load --target-accuracy 0.9
    python -m experiments.sweep --random 200 -b 2 8 -C 1 200        two values are a range here
    python -m experiments.sweep --shard 2/3 ...                     a part of the points, and then
    python -m experiments.sweep merge DIR DIR DIR --out DIR         all parts in one folder

Leaves in --out: points (a row a point), summary (mean and 95 % interval over seeds), curves (thinned), masks (who sent
when), each as Parquet, the first two as CSV too; figures as PNG and SVG; the plan, the exact command and the versions.
A batch's rows are safe when it ends: after a kill the same command goes on, and no row differs from an undisturbed run.
With more --rounds, or with smaller targets behind those that are there, it goes on from the last states.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments import files, ledger, plots, points, study, terminal
from experiments.ledger import Link, Targets
from experiments.study import Budget


@dataclass(frozen=True)
class Goal:
    """When a point is done, and its cost read off."""

    target: points.Floats = (0.3, 0.1)
    """Residuals f - f* (f itself where no f* is known, as for networks), the largest first."""
    target_accuracy: points.Floats = ()
    """Shares of right test rows instead, the lowest first."""

    @property
    def targets(self) -> Targets:
        """What the study takes."""
        if not (self.target or self.target_accuracy):
            raise ValueError("target = (): expected residuals > 0, or a --target-accuracy")
        return Targets(self.target_accuracy or self.target, bool(self.target_accuracy))


@dataclass(frozen=True)
class Settings:
    """A sweep."""

    axes: points.Axes = points.Axes(bits=(3, 4, 6, 8), max_silence=(5, 10, 100), window=(1, 3, 10), lr=(0.01,))
    data: points.Data = points.Data()
    goal: Goal = Goal()
    budget: Budget = Budget()
    draw: points.Draw = points.Draw()
    link: Link = Link()
    authors: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/sweep")
    """Folder for the results."""
    hosts: points.Hosts = points.Hosts()
    smoke: bool = False
    """Few examples and rounds: does everything work here?"""


def run(settings: Settings) -> Path:
    """Run what is not yet done of a sweep; tables and figures in the output folder, which is returned."""
    console = terminal.console()
    settings = configured(settings)
    choices = list(points.select(settings.axes, settings.data, settings.draw))
    chosen = built(settings, choices)
    identity = points.identity(settings, experiment="sweep")
    study.run(chosen, settings.goal.targets, settings.out, settings.budget, settings.link, identity, console)
    if jax.process_index() == 0:
        report(settings.out, console)
    return settings.out


def built(settings: Any, choices: list[dict[str, Any]]) -> list[study.Point]:
    """The points of these settings, all checked."""
    settings.budget.check()
    settings.link.check()
    rows, _ = 200 if settings.smoke else None, settings.goal.targets
    chosen = points.built(choices, points.widest(choices, settings.axes), settings.authors, rows)
    if settings.goal.target_accuracy and not all(point.case.scored for point in chosen):
        raise ValueError("target_accuracy: expected a problem with an accuracy, and data with test rows")
    return chosen


def configured(settings: Any) -> Any:
    """Settings with smoke sizes, in a folder of their own, where these are not given."""
    if not settings.smoke:
        return settings
    plain = type(settings)()
    out = settings.out if settings.out != plain.out else Path(f"{plain.out}-smoke")
    goal = replace(settings.goal, target=(1.0, 0.5)) if settings.goal == plain.goal else settings.goal
    budget = replace(settings.budget, rounds=min(settings.budget.rounds, 60))
    return replace(settings, budget=budget, goal=goal, out=out)


def report(folder: Path, console: Console) -> None:
    """Figures, and the cheapest settings as a short table: with several algorithms the best of each first."""
    plots.sweep(folder)
    summary = pl.read_parquet(folder / "summary.parquet")
    target, goal = ledger.goals_of(summary)[-1], summary["goal"][0]
    ranked = plots.ranked(summary, target)
    differ = [name for name in ledger.settings_of(summary) if summary[name].n_unique() > 1]
    same = [name for name in ledger.settings_of(summary) if name not in differ and summary[name][0] is not None]
    constant = ", ".join(f"{ledger.HEADS.get(name, name)} = {ledger.said(summary[name][0])}" for name in same)
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
    heads = {name: ledger.HEADS.get(name, name) for name in differ or ["algorithm"]}
    columns = [pl.col(n).alias(head if head not in taken else f"{n} ") for n, head in heads.items()]
    title = f"cheapest to {goal} {target} (simulated seconds)"
    tables = {title: shown.select(*columns, **costs)} if len(ranked) else {}
    notices = [*ledger.missed(summary), *ledger.tied(pl.read_parquet(folder / "points.parquet"))]
    if not len(ranked):
        notices.append(nearest(folder, summary, float(target)))
    ledger.result(console, folder, tables, notices, constant=constant)


def nearest(folder: Path, summary: pl.DataFrame, target: float) -> str:
    """What was reached where no point came to the last target, and how long it would take at that rate."""
    met = [t for t in ledger.goals_of(summary) if summary[f"rounds_{t}"].null_count() < len(summary)]
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


def merge(folders: terminal.Folders, /, out: Path) -> None:
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
        there = files.read_identity(folder)
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
    times = {str(files.read_json(folder / "plan.json")["compute_ms"]) for folder in folders}
    if len(times) > 1:
        console.print(
            f"seconds rest on the compute times of different runs ({', '.join(sorted(times))} ms): give all --compute-ms"
        )
    with files.claimed(out, seen | {"shard": "1/1"}):
        ledger.joined(out, [f"{folder}/" for folder in folders])
        files.write_json(out / "run.json", files.provenance() | {"merged": [str(folder) for folder in folders]})
    report(out, console)


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    with terminal.command(arguments) as given:
        if given[:1] == ["merge"]:
            terminal.cli(merge, given[1:], name=" merge")
        else:
            run(points.parsed(Settings, given, __doc__))


if __name__ == "__main__":
    main()
