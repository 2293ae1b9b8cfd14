"""Methods run one after another from one start, with progress, kept on disk, and reported side by side."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import laqjax
from experiments import datasets, files, plots
from laqjax.loop import CHUNK

Evaluate = Callable[[Any], tuple[float, float]]  # params -> (loss on all data, test accuracy)
AXES = {"rounds": "rounds", "uploads": "uploads", "bits_up": "bits up", "paper_bits": "as b p", "bits": "up + down"}


def race(
    console: Console,
    folder: Path,
    methods: dict[str, laqjax.Algorithm],
    theta0: Any,
    shards: laqjax.Shards,
    rounds: int,
    targets: tuple[float, ...],
    f_star: float,
    evaluate: Evaluate,
    *,
    chunk: int = CHUNK,
) -> tuple[pl.DataFrame, bool]:
    """Run methods one after another from one start, with progress; (rows of all, whether Ctrl-C ended it early)."""
    finished: list[pl.DataFrame] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        tasks = {method: progress.add_task(method, total=rounds, note="", start=False) for method in methods}
        for method, alg in methods.items():
            goal = Goal(rounds, targets, f_star, evaluate, progress, tasks[method], chunk)
            try:
                curves = follow(alg, theta0, shards, goal, folder / f"{method}.npz")
            except KeyboardInterrupt:
                console.print(f"stopped; {folder} keeps what is done, the same command goes on from there")
                if not finished:
                    raise SystemExit(130) from None
                break
            finished.append(curves.select(pl.lit(method).alias("method"), pl.all()))
    return pl.concat(finished), len(finished) < len(methods)


@dataclass(frozen=True)
class Goal:
    """How far one method runs, what is measured on the way, and where its progress is shown."""

    rounds: int
    targets: tuple[float, ...]
    f_star: float  # nan where there is none
    evaluate: Evaluate
    progress: Progress
    task: Any
    chunk: int

    def reached(self, info: laqjax.Info) -> bool:
        """The last target is met, or the rounds are done."""
        close = bool(self.targets) and float(np.min(info.loss, initial=np.inf)) - self.f_star <= self.targets[-1]
        return close or len(info.loss) >= self.rounds

    def show(self, info: laqjax.Info) -> None:
        """Move the bar."""
        best = float(np.min(info.loss, initial=np.inf))
        note = f"loss {best:.5f}" if np.isnan(self.f_star) else f"f - f* = {best - self.f_star:.1e}"
        self.progress.update(self.task, completed=len(info.loss), note=f"{note}, {int(info.sent.sum()):,} uploads")


def follow(alg: laqjax.Algorithm, theta0: Any, shards: laqjax.Shards, goal: Goal, path: Path) -> pl.DataFrame:
    """One method's rows, a round each. State and rows so far are kept in `path` after every chunk and taken up again."""
    key = jax.random.key(0)
    state = laqjax.init(alg, theta0, shards)
    measured = np.array(
        [(0, *goal.evaluate(theta0))]
    )  # round, loss, accuracy: at the start, at targets, after each chunk
    none = np.zeros((0, alg.num_workers), np.int32)
    info = laqjax.Info(np.zeros(0), none.astype(bool), none, none[:, 0], {})
    if path.exists():
        state, info, measured = files.load_tree(path, (state, info, measured))
    goal.progress.start_task(goal.task)
    goal.show(info)
    while not goal.reached(info):
        done = len(info.loss)
        count = min(goal.chunk, goal.rounds - done)
        try:
            out = laqjax.run(alg, state, shards, count, key, record=["params"] * bool(goal.targets), chunk=goal.chunk)
        except laqjax.Diverged as stop:
            goal.progress.console.print(f"[red]{goal.progress.tasks[goal.task].description} {stop}[/red]")
            return rows(laqjax.join([info, stop.info._replace(extra={})]), measured, goal.f_star, alg.sampler)
        new = out.info._replace(extra={}, loss=out.info.loss.astype(np.float64))
        for target in goal.targets:
            met = np.flatnonzero(new.loss - goal.f_star <= target)
            if len(met) and not np.any(info.loss - goal.f_star <= target):
                measured = np.vstack([measured, (done + met[0], *goal.evaluate(out.info.extra["params"][met[0]]))])
        state, info = out.state, laqjax.join([info, new])
        measured = np.vstack([measured, (len(info.loss), *goal.evaluate(state.params))])
        files.save_tree(path, (state, info, measured))
        goal.show(info)
    return rows(jax.tree.map(lambda a: a[: goal.rounds], info), measured, goal.f_star, alg.sampler)


def rows(info: laqjax.Info, measured: np.ndarray, f_star: float, sampler: Any = None) -> pl.DataFrame:
    """Row k is the model after k rounds: its loss on all data, and what had been sent until then.

    The loss is NaN where nobody computed it: of the last model, and with a sampler of every one that was not measured.
    """

    def until(counts: Any) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    up, down = until(info.bits_up.sum(axis=1, dtype=np.int64)), until(np.asarray(info.bits_down))
    loss = np.append(np.full_like(info.loss, np.nan) if sampler else info.loss, np.nan)
    accuracy = {}
    for k, value, share in measured:
        loss[int(k)] = value if np.isnan(loss[int(k)]) else loss[int(k)]
        accuracy[int(k)] = share
    return pl.DataFrame(
        {
            "round": np.arange(len(loss)),
            "loss": loss,
            "residual": loss - f_star,
            "uploads": until(info.sent.sum(axis=1)),
            "bits_up": up,
            "bits": up + down,
            "sent": [np.flatnonzero(row).tolist() for row in info.sent] + [[]],
            "accuracy": [accuracy.get(k) for k in range(len(loss))],
        },
        schema_overrides={"sent": pl.List(pl.Int64), "accuracy": pl.Float64},
    ).with_columns(workers=info.sent.shape[1])


def summary(curves: pl.DataFrame, targets: tuple[float, ...]) -> pl.DataFrame:
    """A row per method and target: the first model that meets it; the last model where the last target is not met."""
    by = {"by": "method", "maintain_order": True}
    met = [
        curves.filter(pl.col("residual") <= target).group_by(**by).first().with_columns(target=pl.lit(target))
        for target in targets
    ]
    done = met[-1]["method"].to_list() if met else []
    end = (
        curves.filter(~pl.col("method").is_in(done)).group_by(**by).last().with_columns(target=pl.lit(None, pl.Float64))
    )
    columns = ("method", "target", pl.col("round").alias("rounds"), "uploads", "bits_up", "bits", "loss", "accuracy")
    return pl.concat([*met, end]).select(*columns)


def report(
    console: Console,
    folder: Path,
    curves: pl.DataFrame,
    table: pl.DataFrame,
    published: Mapping[str, Mapping[str, float]],
    target: float | None,
) -> None:
    """Write curves, table and figures, and print the table, at `target` beside the published values."""
    for name, frame in (("curves", curves), ("table", table)):
        with files.replacing(folder / f"{name}.parquet") as part:
            frame.write_parquet(part)
    with files.replacing(folder / "table.csv") as part:
        table.write_csv(part)
    plots.comparison(folder)
    axes = {axis: title for axis, title in AXES.items() if axis in table.columns}
    title = "first round within the target" if target else "at the end"
    shown = Table(title=f"{title} (published, difference)")
    for name in ("method", "f - f*" if target else "f", *axes.values(), "accuracy"):
        shown.add_column(name, overflow="fold")  # a narrow terminal loses no digit
    for row in table.iter_rows(named=True):
        beside = published.get(row["method"], {}) if row["target"] == target else {}
        cells = [figure(row[axis], beside.get(axis)) for axis in axes]
        goal = f"{row['loss']:.4g}" if target is None else f"{row['target']:g}" if row["target"] else "end"
        shown.add_row(row["method"], goal, *cells, f"{row['accuracy']:.4f}")
    console.print(shown)
    console.print(f"figures, table and curves: {folder}")


def figure(ours: float, published: float | None) -> str:
    """A number, and beside it the published one with the difference in per cent."""
    return short(ours) if published is None else f"{short(ours)} ({short(published)}, {ours / published - 1:+.1%})"


def short(number: float) -> str:
    """1,234 or 12.3M or 1.23G."""
    for limit, suffix in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:,.0f}"


def evaluator(problem: laqjax.problems.Problem, oracle: Any, data: datasets.Dataset, shards: laqjax.Shards) -> Evaluate:
    """(Loss on all shards, test accuracy) of a flat parameter vector."""
    x, y = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    loss = full_loss(oracle, shards)
    both = jax.jit(lambda params: (loss(params), problem.accuracy(oracle.unravel(params), x, y)))
    return lambda params: tuple(map(float, both(jnp.asarray(params))))  # pyright: ignore[reportReturnType]


def full_loss(oracle: Any, shards: laqjax.Shards) -> Callable[[Any], Any]:
    """The mean of the workers' losses, as a function of a flat parameter vector; traced."""
    workers = jnp.arange(len(shards.weight), dtype=jnp.int32)
    return lambda params: jnp.mean(jax.lax.map(lambda m: oracle(params, shards, m)[0], workers))
