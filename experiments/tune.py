"""Search for the cheapest b, C, D, xi and lr with Optuna, in batches of trials.

    python -m experiments.tune                   64 trials on the embedded MNIST, 9 minutes
    python -m experiments.tune --quick           a few trials, under a minute
    python -m experiments.tune -b 2 8 -C 1 200 --lr 0.01 0.03 --trials 200 --out results/mine
    python -m experiments.tune --problem my.py:make --algorithm my.py:factory --set beta 0.1 0.9

All batches share one compiled program over their trials and seeds. An axis of two numbers is a range, one of a single
value is fixed, and one of more values is a choice. The cost is the mean over seeds of the bits up to the last target. A
trial that misses the target on a seed is pruned. The first trial is the paper's setting, b = 4, C = 100, D = 10.

Files in --out: best (JSON), trials (Parquet, CSV), figure (PNG, SVG), result.json, the studies of the batches, and
Optuna's journal, from which the same command continues after a kill.
"""

import itertools
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import polars as pl
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console

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
    """Settings of a search."""

    trials: int = 64
    """Total number of trials, with the paper's setting. A finished search continues with more trials."""
    search_seed: int = 0
    """Seed of the search."""
    axes: grid.GridAxes = grid.GridAxes(bits=(2, 8), max_silence=(5, 200), window=(1, 10), xi=(0.1, 1.0), lr=(0.02,))
    data: grid.DataAxes = grid.DataAxes()
    goal: grid.TargetOptions = grid.TargetOptions((3e-2,))
    budget: RunOptions = RunOptions(batch_size=8)
    """Here a batch is of trials, each on all seeds."""
    link: NetworkModel = NetworkModel()
    authors_rule: bool = False
    """Use the lazy rule of the authors' program: first upload by the rule, xi scaled up over the first D rounds."""
    config: Path | None = None
    """TOML or YAML file of these settings. Options on the command line override it."""
    out: Path = Path("results/tune")
    """Folder for the results."""
    quick: bool = False
    """Run few trials on few examples, to check that everything works."""


class Search:
    """Space of a search, its first setting, and the costs of settings."""

    def __init__(self, settings: Settings) -> None:
        self.seeds = settings.axes.seeds
        self.values = grid.axis_values(settings.axes, settings.data)
        self.space = make_search_space(self.values)
        numbers = {name for name in self.space if all(map(grid.is_number, self.values[name]))}
        paper = {name: PAPER_SETTING[name] for name in numbers & PAPER_SETTING.keys()}
        self.first: dict[str, Any] = {name: paper.get(name, self.values[name][0]) for name in self.space}
        for name in {"xi", "lr"} & numbers:
            self.first[name] = float(np.clip(PAPER_SETTING[name], min(self.values[name]), max(self.values[name])))
        # all batches pad their windows to one length, also those without the first setting
        windows = (*settings.axes.window, self.first.get("window", 10))
        self.settings = replace(settings, axes=replace(settings.axes, window=windows))
        # the ends of all ranges are checked before anything is compiled
        corners = itertools.product(*(self.values[name] for name in self.space))
        points = self.make_points([self.first, *(dict(zip(self.space, corner, strict=True)) for corner in corners)])
        if len(runner.group_by_structure(points)) > 1:
            raise ValueError("settings of several structures: must differ in numbers only; see laqjax.stack_algorithms")
        size = (settings.budget.batch_size or 1) * len(self.seeds)
        self.budget = replace(settings.budget, batch_size=size, pad_batches=True)
        runner.choose_batch_size(points, self.budget)

    def make_points(self, trials: list[dict[str, Any]]) -> list[runner.SweepPoint]:
        """Return the points of settings, each on all seeds; their label is the position in the list."""
        fixed = {name: values[0] for name, values in self.values.items() if name not in self.space}
        rows = [fixed | setting | {"seed": seed} for setting in trials for seed in self.seeds]
        points = grid.build_checked_points(self.settings, [{"point": i, **row} for i, row in enumerate(rows)])
        return [replace(point, label={"trial": i // len(self.seeds)}) for i, point in enumerate(points)]

    def run_batch(self, folder: Path, trials: list[dict[str, Any]], link: NetworkModel, console: Console) -> list[Any]:
        """Run settings as a study; return the mean costs of each over its seeds, None if one missed the target."""
        targets, points = self.settings.goal.targets, self.make_points(trials)
        identity = {"seeds": self.seeds, "settings": trials}
        runner.set_aside_other_study(folder, identity, console)
        summary = runner.run(points, targets, folder, self.budget, link, identity, console)
        costs = [pl.col(f"{name}_{results.target_labels(summary)[-1]}").alias(name) for name in COST]
        return summary.select(*costs, "reached", "diverged", "goal").to_dicts()


def run(settings: Settings) -> Path:
    """Run the trials that are not finished, and return the folder of the results."""
    console, plain = Console(), Settings()
    if settings.quick:
        trials = 6 if settings.trials == plain.trials else settings.trials
        budget = replace(settings.budget, batch_size=3) if settings.budget == plain.budget else settings.budget
        settings = grid.apply_quick_defaults(replace(settings, trials=trials, budget=budget))
    check_number("trials", settings.trials, np.int32, minimum=1)
    search = Search(settings)
    identity = grid.settings_identity(settings, experiment="tune")
    identity = {name: value for name, value in identity.items() if name not in ("memory_gib", "trials")}
    with storage.lock_results_dir(settings.out, identity, "each trial follows from the costs of those before it"):
        try:
            run_trials(search, open_study(settings.out), console)
        except KeyboardInterrupt:
            if rows := trial_rows(open_study(settings.out)):
                print_report(rows, search, console)
            raise
        print_report(trial_rows(open_study(settings.out)), search, console)
    return settings.out


def run_trials(search: Search, study: optuna.Study, console: Console) -> None:
    """Run batches of trials until there are enough."""
    settings, space, plan = search.settings, search.space, search.settings.out / "trials-00000" / "plan.json"
    while (done := len(trial_rows(study))) < settings.trials:
        # the seed depends on the completed trials, so a search continues after a kill as if it had not been interrupted
        study.sampler = make_sampler(1000 * settings.search_seed + done)
        count = min(settings.budget.batch_size or 1, settings.trials - done)
        trials = [study.ask(space) for _ in range(count - (not done))]
        wanted = [search.first] * (not done) + [trial.params for trial in trials]
        console.print(f"trials {done} to {done + count - 1} of {settings.trials}")
        link = settings.link
        if plan.exists():  # all batches use the compute time that the first one measured
            link = replace(link, compute_ms=storage.read_json(plan)["compute_ms"][0])
        costs = search.run_batch(settings.out / f"trials-{done:05d}", wanted, link, console)
        if not done:
            record_first_setting(study, space, search.first, costs.pop(0))
        for trial, cost in zip(trials, costs, strict=True):
            trial.set_user_attr("cost", cost)
            pruned = cost["bits_up"] is None
            study.tell(trial, cost["bits_up"], TrialState.PRUNED if pruned else TrialState.COMPLETE)


def make_search_space(values: dict[str, tuple[Any, ...]]) -> dict[str, BaseDistribution]:
    """Return the distribution of each axis, one per argument of the algorithm that has values.

    Raises:
        ValueError: there is more than one problem, or a range of lr is not positive.
    """
    own = grid.argument_names(values["algorithm"][0]) - NON_SEARCHABLE
    for name in NON_SEARCHABLE & values.keys():
        if len(values[name]) != 1:
            raise ValueError(f"{name} = {values[name]}: must be one; a search runs on one problem")
    space: dict[str, BaseDistribution] = {}
    for name in (name for name, given in values.items() if name in own and given != (None,)):
        if len(set(values[name])) != 2 or not all(map(grid.is_number, values[name])):
            space[name] = CategoricalDistribution(list(values[name]))
            continue
        low, high = sorted(values[name])
        if name == "lr" and low <= 0:
            raise ValueError(f"lr = {values[name]}: must be a range of positive numbers")
        whole = isinstance(low, int) and isinstance(high, int)
        space[name] = IntDistribution(low, high) if whole else FloatDistribution(low, high, log=name == "lr")
    return space


def open_study(folder: Path) -> optuna.Study:
    """Open the study in the journal of a folder; trials that a kill left unfinished count as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    study = optuna.create_study(storage=journal, study_name="tune", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def make_sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Create a TPE sampler that keeps the trials of one batch apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)


def record_first_setting(study: optuna.Study, space: dict[str, Any], first: dict[str, Any], cost: Any) -> None:
    """Record the first setting for the tables, and for the search if it lies in the ranges."""
    choices = {name: d.choices for name, d in space.items() if isinstance(d, CategoricalDistribution)}
    if all(first[n] in choices[n] if n in choices else d.low <= first[n] <= d.high for n, d in space.items()):
        state = TrialState.PRUNED if cost["bits_up"] is None else TrialState.COMPLETE
        params = {name: d.to_external_repr(d.to_internal_repr(first[name])) for name, d in space.items()}
        study.add_trial(optuna.create_trial(state=state, value=cost["bits_up"], params=params, distributions=space))
    study.set_user_attr("first", first | cost)


def trial_rows(study: optuna.Study) -> list[dict[str, Any]]:
    """Return one row per trial, the first setting first; none before that one is done."""
    if "first" not in study.user_attrs:
        return []
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rows = [study.user_attrs["first"], *(t.params | t.user_attrs["cost"] for t in done if "cost" in t.user_attrs)]
    return [{"trial": i} | row for i, row in enumerate(rows)]


def print_report(rows: list[dict[str, Any]], search: Search, console: Console) -> None:
    """Write the tables and the figure, and print what the best setting saves against the first."""
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
        notices = [f"none of {len(rows)} trials reached {target:g}: give more --rounds, or another --lr"]
    else:
        named = results.format_setting({name: best[name] for name in search.space}, " = ")
        against = f"the first setting does not reach {target:g} in {search.settings.budget.rounds} rounds here"
        if saved is not None:
            against = f"{saved:.1%} fewer than the first setting ({first['bits_up']:.4g})"
        notices = [f"best of {len(rows)} trials: {named}", f"{best['bits_up']:.4g} bits up to {target:g}, {against}"]
    results.report_result(console, out, {}, notices, **found)


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(Settings, given, __doc__))
