"""Search for the best settings of each method: the grids, the proposals beyond them, and the report."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from experiments.harness import cases, grid, results, runner
from experiments.harness.results import NetworkModel
from experiments.harness.runner import RunOptions
from experiments.harness.search_spaces import LARGEST, MEMBERS, USER_SEARCH_SPACE
from laqjax import check_number

Setting = dict[str, Any]
Candidate = tuple[str, Setting]  # name and setting of an algorithm
CRITERIA = {"bits up": "bits_up", "all bits": "bits", "rounds": "rounds", "seconds": "seconds"}
MAX_WIDEN_ROUNDS = 5  # how often a grid is widened
MAX_REFINE_ROUNDS = 2  # how often the distance of two steps is halved


@dataclass(frozen=True)
class Settings:
    """Settings of a comparison."""

    axes: grid.GridAxes = grid.GridAxes(
        algorithm=tuple(dict.fromkeys((*MEMBERS, *grid.algorithm_factories()))), seeds=(0, 1)
    )
    """Values given here replace the grid of the methods that have the argument."""
    lr_ratio: float = 2.0
    """Ratio of two neighboring step sizes of a grid."""
    num_lrs: int = 5
    """Number of step sizes in each grid, around its first one. More are tried beyond its edges and between the best."""
    report_seeds: grid.Ints = (2, 3, 4, 5)
    """Seeds of the runs that the tables report."""
    data: grid.DataAxes = grid.DataAxes(problem=("logistic",), dataset=(cases.SYNTHETIC + "1",))
    goal: grid.TargetOptions = grid.TargetOptions((1e-2, 1e-4, 1e-6))
    budget: RunOptions = RunOptions(
        1000, batch_size=16, curve_points=100, compact_after=10**9, pad_batches=True, longest=25
    )
    link: NetworkModel = NetworkModel()
    config: Path | None = None
    """TOML or YAML file of these settings. Options on the command line override it."""
    out: Path = Path("results/compare")
    """Folder for the results."""
    hosts: grid.HostOptions = grid.HostOptions()
    quick: bool = False
    """Run a few methods for few rounds, to check that everything works."""


def apply_quick_defaults(settings: Settings) -> Settings:
    """Return settings with few methods, steps, seeds and rounds, where these are not given, if `quick` is set."""
    plain, quick = Settings(), grid.apply_quick_defaults(settings)
    if not settings.quick:
        return settings
    axes = quick.axes
    if axes.algorithm == plain.axes.algorithm:
        axes = replace(axes, algorithm=("gd", "laq", "ef21"), bits=axes.bits or (4,), xi=axes.xi or (0.4,))
    if axes.seeds == plain.axes.seeds:
        axes = replace(axes, seeds=(0,))
    if settings.data == plain.data and settings.goal == plain.goal:
        quick = replace(quick, goal=grid.TargetOptions((0.1, 0.03)))
    lrs = 3 if settings.num_lrs == plain.num_lrs else settings.num_lrs
    seeds = (1, 2) if settings.report_seeds == plain.report_seeds else settings.report_seeds
    return replace(quick, axes=axes, num_lrs=lrs, report_seeds=seeds)


class MethodGrids:
    """Search space of a comparison: the grid of each method on one case.

    Attributes:
        settings: settings of the comparison.
        case: problem and data.
        known: whether the smoothness constant L is known, and with it a step of theory.
        grids: values of each axis of each method. The first axis is the step. The first value of an axis is that of
            theory (a plain step if L is not known) or the default.
    """

    def __init__(self, settings: Settings, console: Console, case: cases.ProblemInstance | None = None) -> None:
        self.settings, data, names = settings, settings.data, settings.axes.algorithm
        for f in fields(data):
            if len(getattr(data, f.name)) != 1:
                raise ValueError(f"{f.name} = {getattr(data, f.name)}: must be one; a comparison is of one problem")
        self.data = {f.name: getattr(data, f.name)[0] for f in fields(data)}
        self.case = case or (
            cases.convex_case(data.dataset[0])
            if data == Settings().data
            else cases.get_case(*self.data.values(), 200 if settings.quick else None)
        )
        self.known = self.case.problem.curvature is not None
        lost = [name for name in names if "smoothness" in grid.argument_names(name) and not self.known]
        if lost:
            console.print(f"left out, since L_m is not known here: {', '.join(lost)}")
        given = grid.axis_values(settings.axes, data)
        self.grids = {name: self._make_grid(name, given) for name in names if name not in lost}
        if not self.grids:
            raise ValueError(f"algorithm = {names}: must include one that runs without L_m")
        if not settings.report_seeds:
            raise ValueError("report_seeds = (): must be one or more")
        for seed in settings.report_seeds:
            check_number("report_seeds", seed, np.int32, minimum=0)
        if settings.goal.targets.accuracy and not self.case.has_accuracy:
            raise ValueError(
                "target_accuracy: must be of a problem with an accuracy, on data with test rows; else give --target"
            )

    def _make_grid(self, name: str, given: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        """Return the values of each axis of a method."""
        space, own, axes = MEMBERS.get(name, USER_SEARCH_SPACE), grid.argument_names(name), self.settings.axes
        given = {key: values for key, values in given.items() if key in own and values != (None,)}
        grid_axes = {key: values for key, values in space.axes.items() if not (key == "xi" and "c" in given)} | given
        if axes.minibatch and "sampler" in own:
            grid_axes["minibatch"] = axes.minibatch
        if not all(map(grid.is_number, grid_axes.get("lr", ()))):
            raise ValueError(
                f"lr = {grid_axes['lr']}: must be numbers in a comparison; a schedule needs a factory in a file"
            )
        powers = [(i + 1) // 2 * (-1) ** i for i in range(self.settings.num_lrs)]
        step, base = "local_lr" if "local_lr" in own else "lr", float(space.step(self.case))
        return {step: tuple(base * self.settings.lr_ratio**power for power in powers)} | grid_axes

    def first(self) -> list[Candidate]:
        """Return every method at the first value of each axis."""
        return [(name, {axis: values[0] for axis, values in axes.items()}) for name, axes in self.grids.items()]

    def all(self) -> list[Candidate]:
        """Return every setting of the grids."""
        return [
            (name, dict(zip(axes, values, strict=True)))
            for name, axes in self.grids.items()
            for values in product(*axes.values())
        ]

    def points(self, candidates: list[Candidate], seeds: tuple[int, ...]) -> list[runner.SweepPoint]:
        """Return the points of settings on seeds; all windows are padded to one length."""
        made, k = [], max(self.case.oracle.size // 10, 1)
        for name, values in candidates:
            space = MEMBERS.get(name, USER_SEARCH_SPACE)
            choice: dict[str, Any] = self.data | {"algorithm": name, **values, "point": None, "seed": 0}
            if "stochastic" in space.kind:
                choice.setdefault("minibatch", max(self.case.shards.weight.shape[1] // 10, 1))
            if space.compressor:
                choice.setdefault("compressor", f"rand_k:{k}" if space.compressor == "rand_k" else space.compressor)
            point = grid.build_point(choice, self.case, max((10, *self.settings.axes.window)))
            made += [replace(point, seed=seed, label={"algorithm": name, **values}) for seed in seeds]
        return made

    def is_valid(self, name: str, values: Setting) -> bool:
        """Return whether the algorithm accepts these values."""
        try:
            return bool(self.points([(name, values)], (0,)))
        except (TypeError, ValueError):
            return False

    def run(self, folder: str, candidates: list[Candidate], seeds: tuple[int, ...], console: Console) -> pl.DataFrame:
        """Run a study of settings and return its summary."""
        s, points = self.settings, self.points(candidates, seeds)
        identity = {"seeds": seeds, "settings": candidates}
        runner.set_aside_other_study(s.out / folder, identity, console)
        return runner.run(points, s.goal.targets, s.out / folder, s.budget, s.link, identity, console)


# ---- proposals -----------------------------------------------------------------------------------------------------


def iter_phases(space: MethodGrids) -> Iterator[tuple[str, str, Callable[[pl.DataFrame], list[Candidate]]]]:
    """Yield the folder of each further search, where it looks, and a function from settings tried so far to new ones."""
    for turn in range(MAX_WIDEN_ROUNDS):
        yield f"wider-{turn}", "beyond the edges of their grids", partial(propose_wider, space)
    for turn in range(MAX_REFINE_ROUNDS):
        ratio = space.settings.lr_ratio ** (0.5 ** (turn + 1))
        yield f"finer-{turn}", "between the steps of their grids", partial(propose_finer, space, ratio=ratio)


def propose_wider(space: MethodGrids, tried: pl.DataFrame) -> list[Candidate]:
    """Propose values beyond the edges where a best setting lies there, and more steps where no target was reached."""
    best, factor = best_candidates(tried, space.grids), space.settings.lr_ratio
    found = [(n, v | {axis: value}) for n, v in best for axis, value in values_beyond_edges(space, n, v, tried)]
    for name, values in space.first():
        if name not in dict(best):
            step = next(iter(space.grids[name]))
            same = rows_matching(tried, name, {key: value for key, value in values.items() if key != step})
            steps = same[step].to_numpy()
            found += [(name, values | {step: float(new)}) for new in (steps.min() / factor, steps.max() * factor)]
    return found


def propose_finer(space: MethodGrids, tried: pl.DataFrame, ratio: float) -> list[Candidate]:
    """Propose the steps next to the best ones at the smallest target that each method reached."""
    best = [(n, v, next(iter(space.grids[n]))) for n, v in best_candidates(tried, space.grids, last=True)]
    return [(name, v | {step: v[step] * by}) for name, v, step in best for by in (ratio, 1 / ratio)]


def values_beyond_edges(space: MethodGrids, name: str, best: Setting, tried: pl.DataFrame) -> Iterator[tuple[str, Any]]:
    """Yield (axis, value) beyond the tried values of each axis on whose edge the best setting lies."""
    step, factor = next(iter(space.grids[name])), space.settings.lr_ratio
    for axis in space.grids[name]:
        beside = rows_matching(tried, name, {key: value for key, value in best.items() if key != axis})
        values = sorted(beside[axis].drop_nulls().unique())
        # steps continue by their ratio, other numbers by the ratio of their last two values
        if axis == step:
            ends = ((values[0], 1 / factor), (values[-1], factor))
        elif len(values) < 2 or isinstance(values[0], str) or values[0] <= 0:
            continue
        else:
            ends = ((values[0], values[0] / values[1]), (values[-1], values[-1] / values[-2]))
        for end, ratio in ends:
            for new in (end * ratio, end * ratio**2):  # two values, to fill a batch
                new = round(new) if isinstance(end, int) else new
                is_new = best[axis] == end != new and new <= LARGEST.get(axis, math.inf)
                if is_new and space.is_valid(name, best | {axis: new}):
                    yield axis, new


def new_candidates(proposed: list[Candidate], known: list[Candidate]) -> list[Candidate]:
    """Return the proposed settings that are not known, each once; the types of their numbers do not matter."""
    key = lambda one: (one[0], tuple(one[1].values()))  # noqa: E731
    there = {key(one) for one in known}
    return list({key(one): one for one in proposed if key(one) not in there}.values())


def rows_matching(frame: pl.DataFrame, name: str, values: Setting) -> pl.DataFrame:
    """Return the rows of an algorithm with these values."""
    return frame.filter(pl.col("algorithm") == name, *(pl.col(key) == value for key, value in values.items()))


def cheapest_setting(tried: pl.DataFrame, name: str, axes: Any, cost: str, target: str) -> Setting | None:
    """Return the setting of a method that costs least at a target."""
    column = f"{cost}_{target}"
    reached = rows_matching(tried, name, {}).drop_nulls(column).sort(column, maintain_order=True)
    return reached.select(list(axes)).row(0, named=True) if len(reached) else None


def best_candidates(tried: pl.DataFrame, grids: Any, last: bool = False) -> list[Candidate]:
    """Return the cheapest settings by each criterion at each target, or at the last target that a method reached."""
    found = []
    for name, cost in product(grids, CRITERIA.values()):
        best = [v for t in results.target_labels(tried) if (v := cheapest_setting(tried, name, grids[name], cost, t))]
        found += [(name, values) for values in best[-last:]]
    return new_candidates(found, [])


# ---- report --------------------------------------------------------------------------------------------------------


def build_report(space: MethodGrids, tried: pl.DataFrame, reported: pl.DataFrame) -> pl.DataFrame:
    """Return the reported costs of the best setting of each method, at each target by each criterion."""
    measures, rows = ("uploads", *CRITERIA.values()), []
    for (name, first), t, (title, cost) in product(space.first(), results.target_labels(tried), CRITERIA.items()):
        axes, kind = space.grids[name], MEMBERS.get(name, USER_SEARCH_SPACE).kind
        row: dict[str, Any] = {"method": name, "kind": kind, "target": t, "cheapest in": title}
        row |= dict.fromkeys(f"{c}{end}" for c in measures for end in ("", "_ci95", " of theory"))
        row |= dict.fromkeys(("gain over theory", "setting", "widened", "at the edge"))
        rows.append(row)
        if not (values := cheapest_setting(tried, name, axes, cost, t)):
            continue
        mine = rows_matching(reported, name, values)
        row |= {f"{c}{end}": mine[f"{c}_{t}{end}"][0] for c in measures for end in ("", "_ci95")}
        if space.known:
            theory = rows_matching(reported, name, first)
            row |= {f"{c} of theory": theory[f"{c}_{t}"][0] for c in measures}
            both = row[f"{cost} of theory"], row[cost]
            row["gain over theory"] = both[0] / both[1] if None not in both and both[1] else None
        row["setting"] = results.format_setting(values)
        outside = [k for k, v in values.items() if v not in axes[k] and not min(axes[k]) < v < max(axes[k])]
        row["widened"] = ", ".join(outside)
        row["at the edge"] = ", ".join(dict(values_beyond_edges(space, name, values, tried)))
    kinds: Any = {c: pl.Float64 for c in rows[0] if c.startswith((*measures, "gain"))}
    kinds |= dict.fromkeys(("setting", "widened", "at the edge"), pl.String)
    return pl.DataFrame(rows, schema_overrides=kinds).with_columns(goal=pl.lit(tried["goal"][0]))
