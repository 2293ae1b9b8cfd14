"""Search for the cheapest b, C, D, xi and lr with Optuna, in batches of trials.

    python -m experiments.tune                   64 trials on the embedded MNIST, 9 minutes
    python -m experiments.tune -b 2 8 -C 1 200 --lr 0.01 0.03 --trials 200 --out results/mine
    python -m experiments.tune --problem my.py:make --algorithm my.py:factory --set beta 0.1 0.9

Each batch is one compiled program over its trials and seeds. An axis of two numbers is a range, of one is fixed, of more a choice. The cost is bits up to the last target, the mean over
seeds; a trial that misses it on any seed is pruned. The paper's b = 4, C = 100, D = 10 comes first. Leaves in --out: best
(JSON), trials (Parquet, CSV), figure (PNG, SVG), and Optuna's journal, from which the same command goes on after a kill.
"""

import itertools
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optuna
import polars as pl
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console

import laqjax
from experiments.figures import drawing
from experiments.harness import cli, grid, results, runner, storage
from experiments.harness.results import NetworkModel
from experiments.harness.runner import RunOptions
from laqjax import check_number

COST = ("rounds", "uploads", "bits_up", "seconds")
PAPER_SETTING = {"bits": 4, "max_silence": 100, "window": 10, "xi": 0.8, "lr": 0.02}
NON_SEARCHABLE = {f.name for f in fields(grid.DataAxes)} | {"algorithm", "compressor", "k", "minibatch"}


@dataclass(frozen=True)
class Settings:
    """A search."""

    trials: int = 64
    """Trials in all, the paper's setting among them; more of them go on from what is there."""
    search_seed: int = 0
    """Seed of the search."""
    axes: grid.GridAxes = grid.GridAxes(bits=(2, 8), max_silence=(5, 200), window=(1, 10), xi=(0.1, 1.0), lr=(0.02,))
    data: grid.DataAxes = grid.DataAxes()
    goal: grid.TargetOptions = grid.TargetOptions((3e-2,))
    budget: RunOptions = RunOptions(batch_size=8)
    """The batch is of trials here, each on all seeds."""
    link: NetworkModel = NetworkModel()
    authors_rule: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/tune")
    """Folder for the results."""
    quick: bool = False
    """Few examples and rounds: does everything work here?"""


@dataclass
class Search:
    """The space of a search, its first setting, and the points of any setting."""

    settings: Settings
    values: dict[str, tuple[Any, ...]] = field(init=False)
    space: dict[str, BaseDistribution] = field(init=False)
    first: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.values = grid.axis_values(self.settings.axes, self.settings.data)
        self.space = search_space(self.values)
        self.first = {name: PAPER_SETTING.get(name, self.values[name][0]) for name in self.space}
        for name in {"xi", "lr"} & self.space.keys():
            self.first[name] = float(np.clip(PAPER_SETTING[name], min(self.values[name]), max(self.values[name])))

    def to_points(self, asked: list[dict[str, Any]]) -> list[runner.SweepPoint]:
        """A setting's seeds behind each other."""
        shape = {name: values[0] for name, values in self.values.items() if name not in self.space}
        rows = [shape | knobs | {"seed": seed} for knobs in asked for seed in self.settings.axes.seeds]
        return grid.build_checked_points(self.settings, [{"point": i, **row} for i, row in enumerate(rows)])


def run(settings: Settings) -> Path:
    """Run the trials that are not yet done; tables and figure in the output folder, which is returned."""
    console = Console()
    settings = grid.apply_quick_defaults(settings)
    check_number("trials", settings.trials, np.int32, minimum=1)
    search, targets, seeds = Search(settings), settings.goal.targets, len(settings.axes.seeds)
    # the ends of all ranges are checked before anything is compiled
    corners = itertools.product(*(search.values[name] for name in search.space))
    some = search.to_points([search.first, *(dict(zip(search.space, corner, strict=True)) for corner in corners)])
    if len(runner.group_by_structure(some)) > 1:
        raise ValueError(
            "the settings have different structures: expected numbers only to differ; see `laqjax.stack_algorithms`"
        )
    batch = settings.budget.batch_size or 1
    size = -(-batch * seeds // jax.device_count()) * jax.device_count()
    if (fits := laqjax.max_batch_size(some[0].algorithm, some[0].case.shards, settings.budget.bytes)) < size:
        raise ValueError(f"batch_size = {batch} on {seeds} seeds: expected at most {fits} points in the memory")
    identity = grid.settings_identity(settings, experiment="tune")
    identity = {name: value for name, value in identity.items() if name not in ("memory_gib", "trials")}
    with storage.lock_results_dir(settings.out, identity, "each trial was asked for by what those before it cost"):
        plan = runner.load_or_make_plan([some[0]], [size], settings.out, settings.link, targets, settings.budget)
        compute, budget = plan["compute_ms"][0], replace(settings.budget, eval_every=plan["every"][0])

        def measured(asked: list[dict[str, Any]], show: Callable[[float, str], None]) -> list[dict[str, Any]]:
            path, some = settings.out / "batch", search.to_points(asked)
            record = runner.Batch(some, targets, budget, size, path, show).run(console)
            labels = [{"point": i} for i in range(len(some))]
            made = results.build_tables(labels, record, targets, record.cumulative_costs(settings.link, compute), 2)
            shutil.rmtree(path)
            return mean_costs(made["points"], results.target_labels(made["points"])[-1], seeds)

        run_trials(search, measured, console)
    return settings.out


def run_trials(search: Search, measured: Callable[..., list[dict[str, Any]]], console: Console) -> None:
    """Batches of trials until there are enough; what is done when Ctrl-C comes is reported."""
    settings, space = search.settings, search.space
    found, batch = open_study(settings.out), settings.budget.batch_size or 1
    with runner.make_progress_bar(console) as progress:
        task = progress.add_task("trials", total=settings.trials, note="")
        try:
            while (done := len(trial_rows(found))) < settings.trials:
                first = not done
                # seeded by what is done: a search that was killed goes on as if it had not been
                found.sampler = make_sampler(1000 * settings.search_seed + done)
                trials = [found.ask(space) for _ in range(min(batch, settings.trials - done) - first)]
                asked = [search.first] * first + [trial.params for trial in trials]

                def show(work: float, note: str, done: int = done, count: int = len(asked)) -> None:
                    share = work / (count * len(settings.axes.seeds) * settings.budget.rounds)
                    progress.update(task, completed=done + share * count, note=f"{done} trials, {note}")

                spent = measured(asked, show)
                if first:
                    record_first_setting(found, space, search.first, spent[0])
                for trial, cost in zip(trials, spent[first:], strict=True):
                    trial.set_user_attr("cost", cost)
                    pruned = cost["bits_up"] is None
                    found.tell(trial, cost["bits_up"], TrialState.PRUNED if pruned else TrialState.COMPLETE)
        except KeyboardInterrupt:
            console.print(f"stopped; {settings.out} keeps what is done, the same command goes on from there")
    if done := len(trial_rows(found)):
        print_report(trial_rows(found), search, console)
    if done < settings.trials:
        raise SystemExit(130)


def search_space(values: dict[str, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    """What Optuna draws from, a number of the algorithm each. ValueError for more than one problem."""
    own = grid.argument_names(values["algorithm"][0]) - NON_SEARCHABLE
    for name in NON_SEARCHABLE & values.keys():
        if len(values[name]) != 1:
            raise ValueError(f"{name} = {values[name]}: expected one; a search runs on one problem")
    space: dict[str, BaseDistribution] = {}
    for name in (name for name, given in values.items() if name in own and given != (None,)):
        if len(set(values[name])) != 2 or not all(map(grid.is_number, values[name])):
            space[name] = CategoricalDistribution(list(values[name]))
            continue
        low, high = sorted(values[name])
        if name == "lr" and low <= 0:
            raise ValueError(f"lr = {values[name]}: expected a range of positive numbers")
        whole = isinstance(low, int) and isinstance(high, int)
        space[name] = IntDistribution(low, high) if whole else FloatDistribution(low, high, log=name == "lr")
    return space


def mean_costs(rows: pl.DataFrame, target: str, seeds: int) -> list[dict[str, Any]]:
    """What each setting costs to the target: the mean over its seeds, None where a seed missed it."""
    spent = []
    for first in range(0, len(rows), seeds):
        mine = rows[first : first + seeds]
        cost: dict[str, Any] = {n: mine[f"{n}_{target}"].mean() if mine["reached"].all() else None for n in COST}
        spent.append(cost | {"reached": int(mine["reached"].sum()), "diverged": int(mine["diverged"].sum())})
        spent[-1]["goal"] = mine["goal"][0]
    return spent


def open_study(folder: Path) -> optuna.Study:
    """The study in the folder's journal; trials that a kill left unfinished count as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    found = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
    for trial in found.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        found.tell(trial.number, state=TrialState.FAIL)
    return found


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE; trials of one batch keep away from each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)


def is_in_distribution(axis: Any, value: float) -> bool:
    """Whether Optuna could draw the value."""
    return value in axis.choices if isinstance(axis, CategoricalDistribution) else axis.low <= value <= axis.high


def record_first_setting(
    found: optuna.Study, space: dict[str, BaseDistribution], first: dict[str, Any], cost: Any
) -> None:
    """The first setting: for the tables always, for the search where it lies in the ranges."""
    if all(is_in_distribution(d, first[name]) for name, d in space.items()):
        state = TrialState.PRUNED if cost["bits_up"] is None else TrialState.COMPLETE
        params = {name: d.to_external_repr(d.to_internal_repr(first[name])) for name, d in space.items()}
        found.add_trial(optuna.create_trial(state=state, value=cost["bits_up"], params=params, distributions=space))
    found.set_user_attr("first", first | cost)


def trial_rows(found: optuna.Study) -> list[dict[str, Any]]:
    """A row a trial, the paper's first; none before that one is done."""
    if "first" not in found.user_attrs:
        return []
    done = found.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rows = [found.user_attrs["first"], *(t.params | t.user_attrs["cost"] for t in done if "cost" in t.user_attrs)]
    return [{"trial": i} | row for i, row in enumerate(rows)]


def print_report(rows: list[dict[str, Any]], search: Search, console: Console) -> None:
    """Tables, figure, and what the best setting saves against the first."""
    target, out = search.settings.goal.targets.values[-1], search.settings.out
    frame = pl.DataFrame(rows, infer_schema_length=None, schema_overrides=dict.fromkeys(COST, pl.Float64))
    storage.save_frame(frame.with_columns(target=pl.lit(target)), out / "trials", csv=True)
    drawing.draw_figures(out)
    first = rows[0]
    best = min((row for row in rows if row["bits_up"] is not None), key=lambda row: row["bits_up"], default=None)
    saved = 1 - best["bits_up"] / first["bits_up"] if best and first["bits_up"] else None
    found = {"best": best, "first": first, "bits_saved": saved, "trials": len(rows), "target": target}
    storage.write_json(out / "best.json", storage.provenance() | found)
    if best is None:
        words = f"none of {len(rows)} trials reached {target:g}: give more --rounds, or another --lr"
        results.report_result(console, out, {}, [words], **found)
        return
    named = ", ".join(
        f"{results.COLUMN_TITLES.get(name, name)} = {results.format_value(best[name])}" for name in search.space
    )
    against = f"the first setting does not reach {target:g} in {search.settings.budget.rounds} rounds here"
    if saved is not None:
        against = f"{saved:.1%} fewer than the first setting ({first['bits_up']:.4g})"
    said = [f"best of {len(rows)} trials: {named}", f"{best['bits_up']:.4g} bits up to {target:g}, {against}"]
    results.report_result(console, out, {}, said, **found)


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(Settings, given, __doc__))
