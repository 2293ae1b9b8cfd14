r"""Every method at its best: searched and chosen on some seeds, reported on others.

    python -m experiments.compare                all members on a convex problem, 8 minutes
    python -m experiments.compare --problem softmax --dataset mnist --algorithm gd laq qgd
    python -m experiments.compare --problem my.py:make --dataset my.py:load \
        --algorithm laq my.py:factory --set beta 0.1 0.5 --target-accuracy 0.8 0.9

Every member runs its grid of steps (powers of `--lr-ratio` around the step of theory, or around a plain one where the problem
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

import numpy as np
import polars as pl
from rich.console import Console

from experiments.harness import cases, grid, results, runner, storage
from experiments.harness.results import NetworkModel
from experiments.harness.runner import RunOptions
from experiments.harness.search_spaces import MEMBERS, USER_SEARCH_SPACE
from laqjax import check_number, distributed

Setting = dict[str, Any]
Candidate = tuple[str, Setting]  # an algorithm's name and setting
CRITERIA = {"bits up": "bits_up", "all bits": "bits", "rounds": "rounds", "seconds": "seconds"}
MAX_WIDEN_ROUNDS, MAX_REFINE_ROUNDS = (
    5,
    2,
)  # times that a grid is widened; that the distance of two steps is halved about the best
SEARCH_PHASES = {"wider": "beyond the edges of their grids", "finer": "between the steps of their grids"}


@dataclass(frozen=True)
class Settings:
    """A comparison."""

    axes: grid.GridAxes = grid.GridAxes(
        algorithm=tuple(dict.fromkeys((*MEMBERS, *grid.algorithm_factories()))), seeds=(0, 1)
    )
    """What is given here is the grid of those that have it, instead of their own."""
    lr_ratio: float = 2.0
    """Ratio of two neighbouring step sizes of a grid."""
    num_lrs: int = 5
    """Step sizes in each grid, around its first one; more are tried beyond its edges and between its best ones."""
    report_seeds: grid.Ints = (2, 3, 4, 5)
    """Seeds of the runs that the tables report."""
    data: grid.DataAxes = grid.DataAxes(problem=("logistic",), dataset=(cases.SYNTHETIC + "1",))
    goal: grid.TargetOptions = grid.TargetOptions((1e-2, 1e-4, 1e-6))
    budget: RunOptions = RunOptions(
        1000, batch_size=16, curve_points=100, compact_after=10**9, pad_batches=True, longest=25
    )
    link: NetworkModel = NetworkModel()
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/compare")
    """Folder for the results."""
    hosts: grid.HostOptions = grid.HostOptions()
    quick: bool = False
    """Few examples and rounds: does everything work here?"""


class Comparison:
    """The grids of a comparison, and the points of any settings."""

    def __init__(self, settings: Settings, console: Console, case: cases.ProblemInstance | None = None) -> None:
        self.settings, data = settings, settings.data
        for f in fields(data):
            if len(getattr(data, f.name)) != 1:
                raise ValueError(f"{f.name} = {getattr(data, f.name)}: expected one; a comparison is of one problem")
        self.data = {f.name: getattr(data, f.name)[0] for f in fields(data)}
        default = data == Settings().data
        rows = 200 if settings.quick else None
        self.case = case or (
            cases.convex_case(data.dataset[0]) if default else cases.get_case(*self.data.values(), rows)
        )
        self.known = self.case.problem.curvature is not None  # L, and so a step of theory
        lost = [
            name for name in settings.axes.algorithm if "smoothness" in grid.argument_names(name) and not self.known
        ]
        if lost:
            console.print(f"left out, since L_m is not known here: {', '.join(lost)}")
        self.grids = {name: self.grid(name) for name in settings.axes.algorithm if name not in lost}
        if not self.grids:
            raise ValueError(f"algorithm = {settings.axes.algorithm}: expected one that runs without L_m")
        for seed in (*settings.axes.seeds, *settings.report_seeds):
            check_number("seeds", seed, np.int32, minimum=0)
        if not (settings.axes.seeds and settings.report_seeds):
            raise ValueError("seeds, report_seeds: expected one or more of each")
        if settings.goal.targets.accuracy and not self.case.has_accuracy:
            raise ValueError("target_accuracy: expected a problem with an accuracy, and data with test rows")

    def grid(self, name: str) -> dict[str, tuple[Any, ...]]:
        """The axes of a member, the first value of each that of theory (a plain step where L is unknown) or of the default."""
        member, own = MEMBERS.get(name, USER_SEARCH_SPACE), grid.argument_names(name)
        given = grid.axis_values(replace(self.settings.axes, algorithm=(name,)), self.settings.data, strict=False)
        said = {key: values for key, values in given.items() if key in own and values != (None,)}
        axes = {key: values for key, values in member.axes.items() if (key, "c" in said) != ("xi", True)} | said
        step, base = "local_lr" if "local_lr" in own else "lr", float(member.step(self.case))
        around = [(i + 1) // 2 * (-1) ** i for i in range(self.settings.num_lrs)]
        if not all(map(grid.is_number, axes.get("lr", ()))):
            raise ValueError(
                f"lr = {axes['lr']}: must be numbers in a comparison; a schedule needs a factory in a file"
            )
        if self.settings.axes.minibatch and "sampler" in own:
            axes["minibatch"] = self.settings.axes.minibatch
        return {step: tuple(base * self.settings.lr_ratio**power for power in around)} | axes

    def first(self) -> list[Candidate]:
        """Return every member at the first step of its grid and its defaults."""
        return [(name, {axis: values[0] for axis, values in axes.items()}) for name, axes in self.grids.items()]

    def to_point_settings(self, name: str, values: Setting) -> dict[str, Any]:
        """A setting as `points.build` takes it."""
        member, k = MEMBERS.get(name, USER_SEARCH_SPACE), max(self.case.oracle.size // 10, 1)
        choice: dict[str, Any] = self.data | {"algorithm": name, **values}
        if member.stochastic and "minibatch" not in values:
            choice["minibatch"] = max(self.case.shards.weight.shape[1] // 10, 1)
        if member.compressor and "compressor" not in values:
            choice["compressor"] = f"rand_k:{k}" if member.compressor == "rand_k" else member.compressor
        return choice

    def points(self, wanted: list[Candidate], seeds: tuple[int, ...]) -> list[runner.SweepPoint]:
        """The points of settings on seeds; the window's padding is the same for all."""
        made = []
        for name, values in wanted:
            choice = self.to_point_settings(name, values) | {"point": None, "seed": 0}
            point = grid.build_point(choice, self.case, max((10, *self.settings.axes.window)))
            made += [replace(point, seed=seed, label={"algorithm": name, **values}) for seed in seeds]
        return made

    def run(self, folder: str, wanted: list[Candidate], seeds: tuple[int, ...], console: Console) -> pl.DataFrame:
        """A study of settings; its summary. One of other settings, chosen with fewer rounds or targets, is set aside."""
        s, made, path = self.settings, self.points(wanted, seeds), self.settings.out / folder / "identity.json"
        identity = json.loads(json.dumps({"seeds": seeds, "settings": wanted}, default=str))

        def aside() -> str | None:
            other = path.exists() and storage.read_identity(path.parent) != identity
            return storage.quarantine(path.parent, "before") if other else None

        if kept := distributed.run_on_process_zero(aside):
            console.print(f"other settings than before for {folder}: kept as {kept}")
        return runner.run(made, s.goal.targets, path.parent, s.budget, s.link, identity, console)

    def best_rows(self, name: str, tried: pl.DataFrame, reported: pl.DataFrame) -> Iterator[dict[str, Any]]:
        """The best of a member at each target by each criterion, as reported."""
        axes, measures = self.grids[name], ("uploads", *CRITERIA.values())
        first = rows_matching(reported, name, dict(self.first())[name])
        for t, (title, cost) in product(results.target_labels(tried), CRITERIA.items()):
            row: dict[str, Any] = {
                "method": name,
                "kind": MEMBERS.get(name, USER_SEARCH_SPACE).kind,
                "target": t,
                "cheapest in": title,
            }
            row |= dict.fromkeys(f"{c}{end}" for c in measures for end in ("", "_ci95", " of theory"))
            row |= dict.fromkeys(("gain over theory", "setting", "widened", "at the edge"))
            if values := cheapest_setting(tried, name, axes, cost, t):
                mine = rows_matching(reported, name, values)
                row |= {f"{c}{end}": mine[f"{c}_{t}{end}"][0] for c in measures for end in ("", "_ci95")}
                if self.known:
                    row |= {f"{c} of theory": first[f"{c}_{t}"][0] for c in measures}
                    both = row[f"{cost} of theory"], row[cost]
                    row["gain over theory"] = both[0] / both[1] if None not in both and both[1] else None
                row["setting"] = ", ".join(
                    f"{results.COLUMN_TITLES.get(k, k)}={results.format_value(v)}" for k, v in values.items()
                )
                outside = [k for k, v in values.items() if v not in axes[k] and not min(axes[k]) < v < max(axes[k])]
                row["widened"] = ", ".join(outside)
                row["at the edge"] = ", ".join(dict(self.values_beyond_edges(name, values, tried)))
            yield row

    def search_phases(self) -> Iterator[tuple[str, Callable[[pl.DataFrame], list[Candidate]]]]:
        """What is searched further: a folder each, and the settings that follow from those tried so far."""
        for turn in range(MAX_WIDEN_ROUNDS):
            yield f"wider-{turn}", self.propose_wider
        for turn in range(MAX_REFINE_ROUNDS):
            yield f"finer-{turn}", partial(self.propose_finer, ratio=self.settings.lr_ratio ** (0.5 ** (turn + 1)))

    def propose_wider(self, tried: pl.DataFrame) -> list[Candidate]:
        """Beyond the edges, where a best setting lies there."""
        best, factor = best_candidates(tried, self.grids), self.settings.lr_ratio
        found = [(n, v | {axis: value}) for n, v in best for axis, value in self.values_beyond_edges(n, v, tried)]
        for name, values in self.first():
            if name not in dict(best):  # it reached nothing: further steps on both sides
                step = next(iter(self.grids[name]))
                steps = rows_matching(tried, name, {key: value for key, value in values.items() if key != step})[step]
                found += [(name, values | {step: new}) for new in (steps.min() / factor, steps.max() * factor)]  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
        return found

    def propose_finer(self, tried: pl.DataFrame, ratio: float) -> list[Candidate]:
        """The steps beside the best ones at the smallest target that a member reached."""
        best = [
            (name, values, next(iter(self.grids[name])))
            for name, values in best_candidates(tried, self.grids, last=True)
        ]
        return [(name, v | {step: v[step] * by}) for name, v, step in best for by in (ratio, 1 / ratio)]

    def values_beyond_edges(self, name: str, best: Setting, tried: pl.DataFrame) -> Iterator[tuple[str, Any]]:
        """(Axis, value) beyond the tried ones, where the best has the least or the most beside its other values."""
        step, factor = next(iter(self.grids[name])), self.settings.lr_ratio
        for axis in self.grids[name]:
            beside = rows_matching(tried, name, {key: value for key, value in best.items() if key != axis})
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
                    if best[axis] == end != new and self.is_valid(name, best | {axis: new}):
                        yield axis, new

    def is_valid(self, name: str, values: Setting) -> bool:
        """Whether the algorithm takes these numbers."""
        try:
            return bool(self.points([(name, values)], (0,)))
        except (TypeError, ValueError):
            return False


def candidate_key(wanted: Candidate) -> Any:
    """Settings of equal numbers are one, whatever their types."""
    return wanted[0], tuple(wanted[1].values())


def rows_matching(frame: pl.DataFrame, name: str, values: Setting) -> pl.DataFrame:
    """The rows of an algorithm with these values."""
    return frame.filter(pl.col("algorithm") == name, *(pl.col(key) == value for key, value in values.items()))


def cheapest_setting(tried: pl.DataFrame, name: str, axes: Any, cost: str, target: str) -> Setting | None:
    """The setting of a member that costs least at a target."""
    reached = (
        rows_matching(tried, name, {}).drop_nulls(f"{cost}_{target}").sort(f"{cost}_{target}", maintain_order=True)
    )
    return reached.select(list(axes)).row(0, named=True) if len(reached) else None


def best_candidates(tried: pl.DataFrame, grids: Any, last: bool = False) -> list[Candidate]:
    """The settings that are cheapest by some criterion at some target, or at the last one that a member reached."""
    found = {}
    for name, cost in product(grids, CRITERIA.values()):
        best = [v for t in results.target_labels(tried) if (v := cheapest_setting(tried, name, grids[name], cost, t))]
        found |= {candidate_key((name, values)): (name, values) for values in best[-last:]}
    return list(found.values())
