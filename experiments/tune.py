"""Find the cheapest b, C, D, xi, lr with Optuna: batches of trials, each one compiled program over trials and seeds.

    python -m experiments.tune --trials 64                                     the embedded MNIST, about 10 minutes
    python -m experiments.tune -b 2 8 -C 1 200 --lr 0.01 0.03 --seeds 0 1 --trials 200 --out results/mine

An axis of two values is a range, of one is fixed, of more a choice. The cost is bits up to the last target, the mean over
seeds; a trial that misses it on any seed is pruned. The paper's b = 4, C = 100, D = 10 comes first. Leaves in --out: best
(JSON), trials (Parquet, CSV), figure (PNG, SVG), and Optuna's journal, from which the same command goes on after a kill.
"""

import itertools
import sys
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optuna
import polars as pl
import tyro
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from rich.console import Console

import laqjax
from experiments import files, plots, sweep
from experiments.sweep import KNOBS, SHAPES, WHOLE, short
from laqjax.checks import number

COST = tuple(name for name in sweep.COST if name != "bits_down")  # two_laq has a knob of that name
PAPER = {"bits": 4.0, "limit": 100.0, "window": 10.0, "xi": 0.8, "lr": 0.02}


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """What a search takes from the command line; axes as in `experiments.sweep`."""

    bits: Annotated[tuple[float, ...], short("b")] = (2, 8)
    limit: Annotated[tuple[float, ...], short("C")] = (5, 200)
    window: Annotated[tuple[float, ...], short("D")] = (1, 10)
    xi: tuple[float, ...] = (0.1, 1.0)
    target: tuple[float, ...] = (3e-2,)
    trials: int = 64
    """In all, the paper's setting among them; more of them go on from what is there."""
    batch: int | None = 8
    """Trials that run side by side, each on all seeds."""
    random: tyro.conf.Suppress[int | None] = None
    shard: tyro.conf.Suppress[str] = "1/1"
    random_seed: int = 0
    """Of the search."""
    out: Path = Path("results/tune")


def run(settings: Settings) -> Path:
    """Run the trials that are not yet done; tables and figure in the output folder, which is returned."""
    console = Console()
    settings = sweep.configured(settings)
    number("trials", settings.trials, np.int32, least=1)
    batch = int(number("batch", settings.batch or 1, np.int32, least=1))
    space = searched(settings)
    values = sweep.axes(settings)
    paper: dict[str, Any] = {name: PAPER.get(name, values[name][0]) for name in space}
    paper |= {n: float(np.clip(PAPER[n], min(values[n]), max(values[n]))) for n in ("xi", "lr") if n in space}
    # the ends of all ranges are checked before anything is compiled
    corners = itertools.product(*(values[name] for name in space))
    points = points_of([paper, *(dict(zip(space, corner, strict=True)) for corner in corners)], settings)
    (group,) = sweep.checked(points, settings, console)
    widest = sweep.widest_window(points, settings)
    size = -(-batch * len(settings.seeds) // jax.device_count()) * jax.device_count()
    memory = None if settings.memory is None else settings.memory * 2**30
    if (fits := laqjax.batch_size(group.algs[0], group.shards, memory)) < size:
        raise ValueError(
            f"batch = {batch} on {len(settings.seeds)} seeds: expected at most {fits} points in the memory"
        )
    free = {"out", "memory", "trials", "config"}
    files.claim(settings.out, {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in free})
    compute = sweep.planned([group], [size], settings)["compute_ms"][0]
    study = opened(settings.out)
    with sweep.bar(console) as progress:
        task = progress.add_task("trials", total=settings.trials, note="")
        try:
            while (done := len(table(study))) < settings.trials:
                first = not done
                # seeded by what is done: a search that was killed goes on as if it had not been
                study.sampler = sampler(1000 * settings.random_seed + done)
                trials = [study.ask(space) for _ in range(min(batch, settings.trials - done) - first)]
                asked = [paper] * first + [trial.params for trial in trials]

                def show(work: float, note: str, done: int = done, count: int = len(asked)) -> None:
                    share = work / (count * len(settings.seeds) * settings.rounds)
                    progress.update(task, completed=done + share * count, note=f"{done} trials, {note}")

                costs = measured(group, widest, asked, size, settings, compute, show)
                if first:
                    remember(study, space, paper, costs[0])
                for trial, cost in zip(trials, costs[first:], strict=True):
                    trial.set_user_attr("cost", cost)
                    pruned = cost["bits_up"] is None
                    study.tell(trial, cost["bits_up"], TrialState.PRUNED if pruned else TrialState.COMPLETE)
        except KeyboardInterrupt:
            console.print(f"stopped; {settings.out} keeps what is done, the same command goes on from there")
    if done := len(table(study)):
        report(table(study), settings, console)
    if done < settings.trials:
        raise SystemExit(130)
    return settings.out


def searched(settings: Settings) -> dict[str, BaseDistribution]:
    """What Optuna draws from, a knob each. ValueError for more than one problem, or an empty axis."""
    own, given = sweep.knobs(settings.algorithm[0]), sweep.axes(settings)
    for name in SHAPES:
        if len(given[name]) != 1:
            raise ValueError(f"{name} = {given[name]}: expected one; a search runs on one problem")
    space: dict[str, BaseDistribution] = {}
    for name in ("seed", *(name for name in KNOBS if name in own and given[name] != (None,))):
        values = given[name]
        if not values:
            raise ValueError(f"axis {name} has no values: expected one or more")
        if name == "seed":
            continue
        if len(set(values)) != 2:
            space[name] = CategoricalDistribution([float(value) for value in values])
            continue
        low, high = sorted(values)
        whole = name in WHOLE
        if (name == "lr" and low <= 0) or (whole and (low, high) != (int(low), int(high))):
            raise ValueError(f"{name} = {values}: expected a range of {'whole' if whole else 'positive'} numbers")
        space[name] = IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high, log=name == "lr")
    return space


def points_of(asked: list[dict[str, float]], settings: Settings) -> list[dict[str, Any]]:
    """Rows as the sweep has them, a setting's seeds behind each other."""
    given = sweep.axes(settings)
    shape = {name: given[name][0] for name in SHAPES} | dict.fromkeys(KNOBS)
    rows = [shape | knobs | {"seed": seed} for knobs in asked for seed in settings.seeds]
    return [{"point": i, **row} for i, row in enumerate(rows)]


def measured(
    group: sweep.Group, widest: int, asked: Any, size: int, settings: Settings, compute: float, show: Any
) -> list[dict[str, float | None]]:
    """What each setting costs to the last target: the mean over seeds, None where a seed missed it."""
    points = points_of(asked, settings)
    group = replace(
        group,
        points=points,
        algs=[sweep.build(point, group.oracle, widest, settings.authors, group) for point in points],
    )
    rows = sweep.run_batch(group, range(len(points)), size, settings, compute, show)["points"]
    target = f"{settings.target[-1]:g}"
    seeds = len(settings.seeds)
    costs = []
    for i in range(len(asked)):
        mine = rows[i * seeds : (i + 1) * seeds]
        whole = bool(mine["reached"].all())
        cost: dict[str, Any] = {name: mine[f"{name}_{target}"].mean() if whole else None for name in COST}
        costs.append(cost | {"reached": int(mine["reached"].sum()), "diverged": int(mine["diverged"].sum())})
    return costs


def opened(folder: Path) -> optuna.Study:
    """The study in the folder's journal; trials that a kill left unfinished count as failed."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def sampler(seed: int) -> optuna.samplers.BaseSampler:
    """TPE; trials of one batch keep away from each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=True)


def contained(axis: Any, value: float) -> bool:
    """Whether Optuna could draw the value."""
    return value in axis.choices if isinstance(axis, CategoricalDistribution) else axis.low <= value <= axis.high


def remember(study: optuna.Study, space: dict[str, BaseDistribution], paper: dict[str, float], cost: Any) -> None:
    """The paper's setting: for the tables always, for the search where it lies in the ranges."""
    if all(contained(d, paper[name]) for name, d in space.items()):
        state = TrialState.PRUNED if cost["bits_up"] is None else TrialState.COMPLETE
        params = {name: d.to_external_repr(d.to_internal_repr(paper[name])) for name, d in space.items()}
        study.add_trial(optuna.create_trial(state=state, value=cost["bits_up"], params=params, distributions=space))
    study.set_user_attr("paper", paper | cost)


def table(study: optuna.Study) -> list[dict[str, Any]]:
    """A row a trial, the paper's first; none before that one is done."""
    if "paper" not in study.user_attrs:
        return []
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    rows = [study.user_attrs["paper"], *(t.params | t.user_attrs["cost"] for t in done if "cost" in t.user_attrs)]
    return [{"trial": i} | row for i, row in enumerate(rows)]


def report(rows: list[dict[str, Any]], settings: Settings, console: Console) -> None:
    """Tables, figure, and what the best setting saves against the paper's."""
    kinds = {name: pl.Float64 for name in (*KNOBS, *COST) if name in rows[0]}
    frame = pl.DataFrame(rows, infer_schema_length=None, schema_overrides=kinds)
    target, out = settings.target[-1], settings.out
    sweep.save(frame.with_columns(target=pl.lit(target)), out / "trials", csv=True)
    plots.tune(out)
    paper = rows[0]
    best = min((row for row in rows if row["bits_up"] is not None), key=lambda row: row["bits_up"], default=None)
    saved = 1 - best["bits_up"] / paper["bits_up"] if best and paper["bits_up"] else None
    found = {"best": best, "paper": paper, "bits_saved": saved, "trials": len(rows), "target": target}
    files.write_json(out / "best.json", files.provenance() | found)
    if best is None:
        console.print(f"none of {len(rows)} trials reached {target:g}: give more --rounds, or another --lr")
        return
    named = ", ".join(f"{name} = {best[name]:.4g}" for name in KNOBS if name in best)
    against = f"the paper's setting does not reach {target:g} in {settings.rounds} rounds here"
    if saved is not None:
        against = f"{saved:.1%} fewer than the paper's setting ({paper['bits_up']:.4g})"
    console.print(f"best of {len(rows)} trials: {named}\n{best['bits_up']:.4g} bits up to {target:g}, {against}\n{out}")


if __name__ == "__main__":
    try:
        run(sweep.parsed(sys.argv[1:], Settings, __doc__))
    except files.REFUSED as error:
        raise SystemExit(f"error: {error}") from None
