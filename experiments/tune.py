"""Find the cheapest b, C, D, xi, lr with Optuna: batches of trials, each one compiled program over trials and seeds.

    python -m experiments.tune --trials 64 --target 1e-2                       the embedded MNIST, about 10 minutes
    python -m experiments.tune -b 2 8 -C 1 200 --lr 0.01 0.03 --seeds 0 1 --trials 200 --out results/mine

An axis of two values is a range, of one is fixed, of more a choice. The cost is bits up to the last target, the mean over
seeds; a trial that misses it on any seed is pruned. The paper's b = 4, C = 100, D = 10 comes first. Leaves in --out: best
(JSON), trials (Parquet, CSV), figure (PNG, SVG), and Optuna's journal, from which the same command goes on after a kill.
"""

import itertools
import math
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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import laqjax
from experiments import files, plots, sweep
from experiments.sweep import KNOBS, SHAPES, WHOLE, short

PAPER = {"bits": 4.0, "limit": 100.0, "window": 10.0, "xi": 0.8, "lr": 0.02}
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Settings(sweep.Settings):
    """What a search takes from the command line; axes as in `experiments.sweep`."""

    bits: Annotated[tuple[float, ...], short("b")] = (2, 8)
    """b, per coordinate."""
    limit: Annotated[tuple[float, ...], short("C")] = (5, 200)
    """C, rounds of silence at most."""
    window: Annotated[tuple[float, ...], short("D")] = (1, 10)
    """D, rounds that the rule looks back on."""
    xi: tuple[float, ...] = (0.1, 1.0)
    """Sum of the weights of these rounds."""
    target: tuple[float, ...] = (1e-2,)
    """Residuals f - f*; the cost counts to the last."""
    trials: int = 64
    """In all, the paper's setting among them; more of them go on from what is there."""
    batch: int | None = 8
    """Trials that run side by side, each on all seeds."""
    random: tyro.conf.Suppress[int | None] = None
    random_seed: int = 0
    """Of the search."""
    shard: tyro.conf.Suppress[str] = "1/1"
    config: tyro.conf.Suppress[Path | None] = None
    out: Path = Path("results/tune")


def run(settings: Settings) -> Path:
    """Run the trials that are not yet done; tables and figure in the output folder, which is returned."""
    console = Console()
    settings = sweep.configured(settings)  # pyright: ignore[reportAssignmentType]
    laqjax.core.number("trials", settings.trials, np.int32, least=1)
    space, fixed = searched(settings)
    paper = PAPER | {name: value for name, value in fixed.items() if name in ("xi", "lr")}
    paper = {name: paper[name] for name in KNOBS if name in space or name in fixed}
    group, widest = prepared(settings, space, fixed, paper, console)
    batch = settings.batch or 1
    size = -(-batch * len(settings.seeds) // jax.device_count()) * jax.device_count()
    memory = None if settings.memory is None else settings.memory * 2**30
    fits = laqjax.engine.batch_size(group.algs[0], group.shards, memory)
    if fits < size:
        raise ValueError(
            f"batch = {batch} on {len(settings.seeds)} seeds: expected at most {fits} points in the memory"
        )
    free = {"out", "memory", "trials"}
    files.claim(settings.out, {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in free})
    study = opened(settings.out)
    compute = sweep.planned([group], settings)["compute_ms"][0]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task("trials", total=settings.trials, note="")
        try:
            while (done := len(table(study))) < settings.trials:
                progress.update(task, completed=done, note=noted(study))
                # seeded by what is done: a search that was killed goes on as if it had not been
                sampler = {"seed": 1000 * settings.random_seed + done, "constant_liar": True}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    study.sampler = optuna.samplers.TPESampler(**sampler, multivariate=True)
                first = "paper" not in study.user_attrs
                trials = [study.ask(space) for _ in range(min(batch, settings.trials - done) - first)]
                asked = [paper] * first + [fixed | trial.params for trial in trials]

                def show(work: float, note: str, done: int = done, count: int = len(asked)) -> None:
                    share = work / (count * len(settings.seeds) * settings.rounds)
                    progress.update(task, completed=int(done + share * count), note=note)

                costs = measured(group, widest, asked, size, settings, compute, show)
                for trial, cost in zip(trials, costs[first:], strict=True):
                    trial.set_user_attr("cost", cost)
                    value = cost["bits_up"]
                    study.tell(trial, value, state=TrialState.PRUNED if value is None else TrialState.COMPLETE)
                if first:
                    remember(study, space, paper, costs[0])
        except KeyboardInterrupt:
            console.print(f"stopped; {settings.out} keeps what is done, the same command goes on from there")
        progress.update(task, completed=len(table(study)), note=noted(study))
    stopped = len(table(study)) < settings.trials
    if len(table(study)):
        report(study, settings, console)
    if stopped:
        raise SystemExit(130)
    return settings.out


def searched(settings: Settings) -> tuple[dict[str, BaseDistribution], dict[str, float]]:
    """What Optuna draws, and what stands still. ValueError for more than one problem."""
    many = [name for name in SHAPES if len(getattr(settings, name)) != 1]
    if many:
        raise ValueError(f"{many[0]} = {getattr(settings, many[0])}: expected one; a search runs on one problem")
    space: dict[str, BaseDistribution] = {}
    fixed: dict[str, float] = {}
    own = sweep.knobs(settings.algorithm[0])
    for name in (name for name in KNOBS if name in own):
        values = getattr(settings, name)
        if len(set(values)) == 1:
            fixed[name] = float(values[0])
        elif len(values) == 2:
            low, high = sorted(values)
            whole = name in WHOLE
            if (name == "lr" and low <= 0) or (whole and (low, high) != (int(low), int(high))):
                raise ValueError(f"{name} = {values}: expected a range of {'whole' if whole else 'positive'} numbers")
            space[name] = (
                IntDistribution(int(low), int(high)) if whole else FloatDistribution(low, high, log=name == "lr")
            )
        elif values:
            space[name] = CategoricalDistribution([float(value) for value in values])
        else:
            raise ValueError(f"axis {name} has no values: expected one or more")
    if not settings.seeds or not space:
        raise ValueError("nothing to search: expected a seed, and an axis of two values or more")
    return space, fixed


def prepared(settings: Settings, space: Any, fixed: Any, paper: Any, console: Console) -> tuple[sweep.Group, int]:
    """Data, problem and f*; the ends of all ranges are checked before anything is compiled."""
    ends = {name: getattr(settings, name) for name in (*space, *fixed)}
    corners = [dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values())]
    points = [row | {"point": i} for i, row in enumerate(points_of([paper, *corners], settings))]
    (group,) = sweep.checked(points, settings, console)
    return group, max((int(point["window"]) for point in points if point["window"]), default=1)


def points_of(asked: list[dict[str, float]], settings: Settings) -> list[dict[str, Any]]:
    """Rows as the sweep has them, a setting's seeds behind each other."""
    shape = {name: getattr(settings, name)[0] for name in SHAPES} | dict.fromkeys(KNOBS)
    rows = [shape | knobs | {"seed": seed} for knobs in asked for seed in settings.seeds]
    return [{"point": i, **row} for i, row in enumerate(rows)]


def measured(
    group: sweep.Group, widest: int, asked: Any, size: int, settings: Settings, compute: float, show: Any
) -> list[dict[str, float | None]]:
    """What each setting costs to the last target: the mean over seeds, None where a seed missed it."""
    points = points_of(asked, settings)
    group = replace(group, points=points, algs=[sweep.build(point, group.oracle, widest) for point in points])
    rows = sweep.run_batch(group, range(len(points)), size, settings, compute, show)["points"]
    target = f"{settings.target[-1]:g}"
    seeds = len(settings.seeds)
    costs = []
    for i in range(len(asked)):
        mine = rows[i * seeds : (i + 1) * seeds]
        whole = bool(mine["reached"].all())
        cost: dict[str, Any] = {name: mine[f"{name}_{target}"].mean() if whole else None for name in sweep.COST}
        costs.append(cost | {"reached": int(mine["reached"].sum()), "diverged": int(mine["diverged"].sum())})
    return costs


def opened(folder: Path) -> optuna.Study:
    """The study in the folder's journal, without the trials that a kill left unfinished."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / "optuna.journal")))
    study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def remember(study: optuna.Study, space: dict[str, BaseDistribution], paper: dict[str, float], cost: Any) -> None:
    """The paper's setting: for the tables always, for the search where it lies in the ranges."""
    study.set_user_attr("paper", paper | cost)
    params = {name: int(paper[name]) if isinstance(d, IntDistribution) else paper[name] for name, d in space.items()}
    if all(d._contains(d.to_internal_repr(params[name])) for name, d in space.items()):
        state = TrialState.PRUNED if cost["bits_up"] is None else TrialState.COMPLETE
        trial = optuna.create_trial(state=state, value=cost["bits_up"], params=params, distributions=space)
        study.add_trial(trial)


def table(study: optuna.Study) -> list[dict[str, Any]]:
    """A row a trial, the paper's first."""
    rows = [study.user_attrs["paper"]] if "paper" in study.user_attrs else []
    fixed = {name: value for row in rows for name, value in row.items() if name in KNOBS}
    for trial in study.get_trials(deepcopy=False, states=DONE):
        if "cost" in trial.user_attrs:
            rows.append(fixed | trial.params | trial.user_attrs["cost"])
    return [{"trial": i} | row for i, row in enumerate(rows)]


def noted(study: optuna.Study) -> str:
    """The cheapest so far."""
    least = min((row["bits_up"] for row in table(study) if row["bits_up"] is not None), default=math.inf)
    return "" if least == math.inf else f"fewest bits up: {least:.3g}"


def report(study: optuna.Study, settings: Settings, console: Console) -> None:
    """Tables, figure, and what the best setting saves against the paper's."""
    kinds = dict.fromkeys((*KNOBS, *sweep.COST), pl.Float64)
    rows = table(study)
    frame = pl.DataFrame(
        rows, infer_schema_length=None, schema_overrides={k: v for k, v in kinds.items() if k in rows[0]}
    )
    sweep.save(frame.with_columns(target=pl.lit(settings.target[-1])), settings.out / "trials", csv=True)
    plots.tune(settings.out)
    reached = frame.filter(pl.col("bits_up").is_not_null()).sort("bits_up")
    paper = frame.row(0, named=True)
    best = reached.row(0, named=True) if len(reached) else None
    saved = 1 - best["bits_up"] / paper["bits_up"] if best and paper["bits_up"] else None
    found = {"best": best, "paper": paper, "bits_saved": saved, "trials": len(frame), "target": settings.target[-1]}
    files.write_json(settings.out / "best.json", files.provenance() | found)
    if best is None:
        console.print(
            f"none of {len(frame)} trials reached {settings.target[-1]:g}; give more --rounds, or another --lr"
        )
        return
    named = ", ".join(f"{name} = {best[name]:.4g}" for name in KNOBS if name in best)
    console.print(f"best of {len(frame)} trials: {named}: {best['bits_up']:.4g} bits up, {best['rounds']:.0f} rounds")
    if saved is None:
        console.print(f"the paper's setting does not reach {settings.target[-1]:g} in {settings.rounds} rounds here")
    else:
        console.print(f"{saved:.1%} fewer than the paper's setting ({paper['bits_up']:.4g}); tables: {settings.out}")


if __name__ == "__main__":
    try:
        run(tyro.cli(Settings, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
