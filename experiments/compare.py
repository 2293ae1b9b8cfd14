r"""Every method at its best: searched and chosen on some seeds, reported on others.

    python -m experiments.compare                all members on a convex problem, 8 minutes
    python -m experiments.compare --problem softmax --dataset mnist --algorithm gd laq qgd
    python -m experiments.compare --problem my.py:make --dataset my.py:load \
        --algorithm laq my.py:factory --set beta 0.1 0.5 --target-accuracy 0.8 0.9

Every member runs its grid of steps (powers of `--factor` around the step of theory, or around a plain one where the problem
has no known smoothness constant L) and of its own numbers on `--seeds`, as one compiled program. Where the best value of a
number lies on the edge of its grid, the grid is widened there; between the best step and its neighbours further ones are
tried, down to a quarter of the grid's distance. The settings that are cheapest at each target in bits up, in all bits, in
rounds or in seconds run again on `--report-seeds`: what the tables say is what these cost. Leaves in --out: best (a row a method, target and criterion;
Parquet, CSV), tried (every setting), figures (PNG, SVG), and the studies that it is made of; resumes like a sweep, and goes
on to more rounds or smaller targets like one. Where the choice of settings is another then, their study is run anew.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments import files, ledger, plots, points, problems, study, sweep, terminal
from experiments.ledger import Link
from experiments.members import MEMBERS, OWN
from experiments.study import Budget
from laqjax import check_number, distributed

Setting = dict[str, Any]
Wanted = tuple[str, Setting]  # an algorithm's name and setting
CRITERIA = {"bits up": "bits_up", "all bits": "bits", "rounds": "rounds", "seconds": "seconds"}
WIDER, FINER = 5, 2  # times that a grid is widened; that the distance of two steps is halved about the best
TURNS = {"wider": "beyond the edges of their grids", "finer": "between the steps of their grids"}


@dataclass(frozen=True)
class Settings:
    """A comparison."""

    axes: points.Axes = points.Axes(algorithm=tuple(dict.fromkeys((*MEMBERS, *points.factories()))), seeds=(0, 1))
    """What is given here is the grid of those that have it, instead of their own."""
    factor: float = 2.0
    """Ratio of two neighbouring step sizes of a grid."""
    steps: int = 5
    """Step sizes in each grid, around its first one; more are tried beyond its edges and between its best ones."""
    report_seeds: points.Ints = (2, 3, 4, 5)
    """Seeds of the runs that the tables report."""
    data: points.Data = points.Data(problem=("logistic",), dataset=(problems.SYNTHETIC + "1",))
    goal: sweep.Goal = sweep.Goal((1e-2, 1e-4, 1e-6))
    budget: Budget = Budget(1000, batch=16, keep=100, short=10**9, filled=True, longest=25)
    link: Link = Link()
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/compare")
    """Folder for the results."""
    hosts: points.Hosts = points.Hosts()
    smoke: bool = False
    """Few examples and rounds: does everything work here?"""


class Comparison:
    """The grids of a comparison, and the points of any settings."""

    def __init__(self, settings: Settings, console: Console, case: problems.Case | None = None) -> None:
        self.settings, data = settings, settings.data
        for f in fields(data):
            if len(getattr(data, f.name)) != 1:
                raise ValueError(f"{f.name} = {getattr(data, f.name)}: expected one; a comparison is of one problem")
        self.data = {f.name: getattr(data, f.name)[0] for f in fields(data)}
        default = data == Settings().data
        rows = 200 if settings.smoke else None
        self.case = case or (problems.convex(data.dataset[0]) if default else problems.case(*self.data.values(), rows))
        self.known = self.case.problem.curvature is not None  # L, and so a step of theory
        lost = [name for name in settings.axes.algorithm if "smoothness" in points.arguments(name) and not self.known]
        if lost:
            console.print(f"left out, since L_m is not known here: {', '.join(lost)}")
        self.grids = {name: self.grid(name) for name in settings.axes.algorithm if name not in lost}
        if not self.grids:
            raise ValueError(f"algorithm = {settings.axes.algorithm}: expected one that runs without L_m")
        for seed in (*settings.axes.seeds, *settings.report_seeds):
            check_number("seeds", seed, np.int32, minimum=0)
        if not (settings.axes.seeds and settings.report_seeds):
            raise ValueError("seeds, report_seeds: expected one or more of each")
        if settings.goal.targets.accuracy and not self.case.scored:
            raise ValueError("target_accuracy: expected a problem with an accuracy, and data with test rows")

    def grid(self, name: str) -> dict[str, tuple[Any, ...]]:
        """The axes of a member, the first value of each that of theory (a plain step where L is unknown) or of the default."""
        member, own = MEMBERS.get(name, OWN), points.arguments(name)
        given = points.values_of(replace(self.settings.axes, algorithm=(name,)), self.settings.data, strict=False)
        said = {key: values for key, values in given.items() if key in own and values != (None,)}
        axes = {key: values for key, values in member.axes.items() if (key, "c" in said) != ("xi", True)} | said
        step, base = "local_lr" if "local_lr" in own else "lr", float(member.step(self.case))
        around = [(i + 1) // 2 * (-1) ** i for i in range(self.settings.steps)]
        if self.settings.axes.minibatch and "sampler" in own:
            axes["minibatch"] = self.settings.axes.minibatch
        return {step: tuple(base * self.settings.factor**power for power in around)} | axes

    def first(self) -> list[Wanted]:
        """Return every member at the first step of its grid and its defaults."""
        return [(name, {axis: values[0] for axis, values in axes.items()}) for name, axes in self.grids.items()]

    def choice(self, name: str, values: Setting) -> dict[str, Any]:
        """A setting as `points.build` takes it."""
        member, k = MEMBERS.get(name, OWN), max(self.case.oracle.size // 10, 1)
        choice: dict[str, Any] = self.data | {"algorithm": name, **values}
        if member.stochastic and "minibatch" not in values:
            choice["minibatch"] = max(self.case.shards.weight.shape[1] // 10, 1)
        if member.compressor and "compressor" not in values:
            choice["compressor"] = f"rand_k:{k}" if member.compressor == "rand_k" else member.compressor
        return choice

    def points(self, wanted: list[Wanted], seeds: tuple[int, ...]) -> list[study.Point]:
        """The points of settings on seeds; the window's padding is the same for all."""
        made = []
        for name, values in wanted:
            choice = self.choice(name, values) | {"point": None, "seed": 0}
            point = points.build(choice, self.case, max((10, *self.settings.axes.window)))
            made += [replace(point, seed=seed, label={"algorithm": name, **values}) for seed in seeds]
        return made

    def run(self, folder: str, wanted: list[Wanted], seeds: tuple[int, ...], console: Console) -> pl.DataFrame:
        """A study of settings; its summary. One of other settings, chosen with fewer rounds or targets, is set aside."""
        s, made, path = self.settings, self.points(wanted, seeds), self.settings.out / folder / "identity.json"
        identity = json.loads(json.dumps({"seeds": seeds, "settings": wanted}, default=str))

        def aside() -> str | None:
            other = path.exists() and files.read_identity(path.parent) != identity
            return files.set_aside(path.parent, "before") if other else None

        if kept := distributed.run_on_process_zero(aside):
            console.print(f"other settings than before for {folder}: kept as {kept}")
        return study.run(made, s.goal.targets, path.parent, s.budget, s.link, identity, console)

    def rows(self, name: str, tried: pl.DataFrame, reported: pl.DataFrame) -> Iterator[dict[str, Any]]:
        """The best of a member at each target by each criterion, as reported."""
        axes, measures = self.grids[name], ("uploads", *CRITERIA.values())
        first = same(reported, name, dict(self.first())[name])
        for t, (title, cost) in product(ledger.goals_of(tried), CRITERIA.items()):
            row: dict[str, Any] = {
                "method": name,
                "kind": MEMBERS.get(name, OWN).kind,
                "target": t,
                "cheapest in": title,
            }
            row |= dict.fromkeys(f"{c}{end}" for c in measures for end in ("", "_ci95", " of theory"))
            row |= dict.fromkeys(("gain over theory", "setting", "widened", "at the edge"))
            if values := cheapest(tried, name, axes, cost, t):
                mine = same(reported, name, values)
                row |= {f"{c}{end}": mine[f"{c}_{t}{end}"][0] for c in measures for end in ("", "_ci95")}
                if self.known:
                    row |= {f"{c} of theory": first[f"{c}_{t}"][0] for c in measures}
                    both = row[f"{cost} of theory"], row[cost]
                    row["gain over theory"] = both[0] / both[1] if None not in both and both[1] else None
                row["setting"] = ", ".join(f"{ledger.HEADS.get(k, k)}={ledger.said(v)}" for k, v in values.items())
                outside = [k for k, v in values.items() if v not in axes[k] and not min(axes[k]) < v < max(axes[k])]
                row["widened"] = ", ".join(outside)
                row["at the edge"] = ", ".join(dict(self.edges(name, values, tried)))
            yield row

    def turns(self) -> Iterator[tuple[str, Callable[[pl.DataFrame], list[Wanted]]]]:
        """What is searched further: a folder each, and the settings that follow from those tried so far."""
        for turn in range(WIDER):
            yield f"wider-{turn}", self.wider
        for turn in range(FINER):
            yield f"finer-{turn}", partial(self.finer, ratio=self.settings.factor ** (0.5 ** (turn + 1)))

    def wider(self, tried: pl.DataFrame) -> list[Wanted]:
        """Beyond the edges, where a best setting lies there."""
        best, factor = best_of(tried, self.grids), self.settings.factor
        found = [(n, v | {axis: value}) for n, v in best for axis, value in self.edges(n, v, tried)]
        for name, values in self.first():
            if name not in dict(best):  # it reached nothing: further steps on both sides
                step = next(iter(self.grids[name]))
                steps = same(tried, name, {key: value for key, value in values.items() if key != step})[step]
                found += [(name, values | {step: new}) for new in (steps.min() / factor, steps.max() * factor)]  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
        return found

    def finer(self, tried: pl.DataFrame, ratio: float) -> list[Wanted]:
        """The steps beside the best ones at the smallest target that a member reached."""
        best = [(name, values, next(iter(self.grids[name]))) for name, values in best_of(tried, self.grids, last=True)]
        return [(name, v | {step: v[step] * by}) for name, v, step in best for by in (ratio, 1 / ratio)]

    def edges(self, name: str, best: Setting, tried: pl.DataFrame) -> Iterator[tuple[str, Any]]:
        """(Axis, value) beyond the tried ones, where the best has the least or the most beside its other values."""
        step, factor = next(iter(self.grids[name])), self.settings.factor
        for axis in self.grids[name]:
            beside = same(tried, name, {key: value for key, value in best.items() if key != axis})
            values = sorted(beside[axis].drop_nulls().unique())
            # a step goes on by its factor, a number of the method's own as the last two of its values do
            if axis == step:
                ends = ((values[0], 1 / factor), (values[-1], factor))
            elif len(values) < 2 or isinstance(values[0], str) or values[0] <= 0:
                continue
            else:
                ends = ((values[0], values[0] / values[1]), (values[-1], values[-1] / values[-2]))
            for end, ratio in ends:
                for new in (end * ratio, end * ratio**2):  # two: they fill a batch up
                    new = round(new) if isinstance(end, int) else new
                    if best[axis] == end != new and self.allowed(name, best | {axis: new}):
                        yield axis, new

    def allowed(self, name: str, values: Setting) -> bool:
        """Whether the algorithm takes these numbers."""
        try:
            return bool(self.points([(name, values)], (0,)))
        except (TypeError, ValueError):
            return False


def key(wanted: Wanted) -> Any:
    """Settings of equal numbers are one, whatever their types."""
    return wanted[0], tuple(wanted[1].values())


def same(frame: pl.DataFrame, name: str, values: Setting) -> pl.DataFrame:
    """The rows of an algorithm with these values."""
    return frame.filter(pl.col("algorithm") == name, *(pl.col(key) == value for key, value in values.items()))


def cheapest(tried: pl.DataFrame, name: str, axes: Any, cost: str, target: str) -> Setting | None:
    """The setting of a member that costs least at a target."""
    reached = same(tried, name, {}).drop_nulls(f"{cost}_{target}").sort(f"{cost}_{target}", maintain_order=True)
    return reached.select(list(axes)).row(0, named=True) if len(reached) else None


def best_of(tried: pl.DataFrame, grids: Any, last: bool = False) -> list[Wanted]:
    """The settings that are cheapest by some criterion at some target, or at the last one that a member reached."""
    found = {}
    for name, cost in product(grids, CRITERIA.values()):
        best = [v for t in ledger.goals_of(tried) if (v := cheapest(tried, name, grids[name], cost, t))]
        found |= {key((name, values)): (name, values) for values in best[-last:]}
    return list(found.values())


def run(settings: Settings) -> Path:
    """Search, widen, report; tables and figures in the output folder, which is returned."""
    console, leads = terminal.console(), jax.process_index() == 0
    settings = sweep.configured(settings)
    settings.budget.check()
    settings.link.check()
    with jax.enable_x64(settings.data == Settings().data):
        compared = Comparison(settings, console)
        wanted = [(name, dict(zip(axes, v, strict=True))) for name, axes in compared.grids.items() for v in product(*axes.values())]  # fmt: skip
        made = compared.points(wanted, settings.axes.seeds)  # what cannot run is refused before anything is written
        with study.held(settings.out, points.identity(settings, experiment="compare"), study.not_kept(made)):
            tried = compared.run("search", wanted, settings.axes.seeds, console)
            for folder, proposed in compared.turns():
                known = {key(one) for one in wanted}
                more = list({key(one): one for one in proposed(tried) if key(one) not in known}.values())
                if more:
                    wanted += more
                    console.print(f"{len(more)} settings {TURNS[folder.partition('-')[0]]}")
                    summary = compared.run(folder, more, settings.axes.seeds, console)
                    tried = pl.concat([tried, summary], how="diagonal_relaxed")
            best_ones = best_of(tried, compared.grids)
            first = compared.first() if compared.known or not best_ones else []  # what the best is measured against
            chosen = {key(one): one for one in [*best_ones, *first]}
            reported = compared.run("report", list(chosen.values()), settings.report_seeds, console)
            if not leads:
                return settings.out
            files.save(tried, settings.out / "tried", csv=True)
            rows = [row for name in compared.grids for row in compared.rows(name, tried, reported)]
            kinds = {c: pl.Float64 for c in rows[0] if c.startswith((*CRITERIA.values(), "uploads", "gain"))}
            kinds |= dict.fromkeys(("setting", "widened", "at the edge"), pl.String)
            best = pl.DataFrame(rows, schema_overrides=kinds).with_columns(goal=pl.lit(tried["goal"][0]))
            files.save(best, settings.out / "best", csv=True)
            files.write_json(settings.out / "run.json", files.provenance())
            report(settings.out, console)
    return settings.out


def report(out: Path, console: Console) -> None:
    """Figures, and a row a member: its bits at each target, and its setting at the smallest that it reached."""
    plots.compare(out)
    if not pl.read_parquet(out / "best.parquet")["bits_up"].count():
        ledger.result(console, out, {}, ["no target was reached: give more --rounds, or larger targets"])
        return
    best = pl.read_parquet(out / "best.parquet").filter(pl.col("cheapest in") == "bits up")
    targets = best["target"].unique(maintain_order=True).to_list()
    wide = best.pivot("target", index="method", values="bits_up")
    last = best.drop_nulls("bits_up").group_by("method", maintain_order=True).last()
    shown = wide.join(last, on="method", how="left").sort(*reversed(targets), nulls_last=True)
    words = dict.fromkeys(targets, ledger.short) | {"gain": lambda gain: "-" if gain is None else f"{gain:.1f}x"}
    gain = [pl.col("gain over theory").alias("gain")] * (best["bits_up of theory"].count() > 0)
    wider = pl.when(pl.col("widened") != "").then(pl.format(" (wider: {})", "widened")).otherwise(pl.lit(""))
    title = f"fewest bits up to {best['goal'][0]} ..., mean over the report seeds"
    title += "; gain over the step of theory" if gain else ""
    open_ = last.filter(pl.col("at the edge") != "").select("method", "at the edge").rows()
    still = "still best at the edge of what was tried: " + ", ".join(f"{m} ({axes})" for m, axes in open_)
    table = shown.select("method", *targets, *gain, pl.col("setting") + wider)
    notices = [*([still] if open_ else []), *ledger.tied(pl.read_parquet(out / "report" / "points.parquet"))]
    ledger.result(console, out, {title: table}, notices, words)


if __name__ == "__main__":
    with terminal.command() as given:
        run(points.parsed(Settings, given, __doc__))
