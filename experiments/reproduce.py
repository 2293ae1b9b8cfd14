"""The tables of the papers, beside the published values.

    python -m experiments.reproduce laq-logistic     LAQ, GD, QGD, LAG to residual 1e-6; about 7 minutes on 2 cores
    python -m experiments.reproduce laq-nn           the 784-200-10 network, 8000 rounds; hours on a CPU
    ... --smoke                                      a tenth of the data, 200 rounds; under a minute

Leaves in --out: table (CSV, Parquet), curves (Parquet, one row a round), figures (PNG, SVG), the command and versions.
Ctrl-C ends early and keeps what is done; the same command goes on where it, or a kill, stopped.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import laqjax
from experiments import datasets, files, lag, plots, problems
from laqjax import algorithms

TARGETS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
AXES = {"rounds": "rounds", "uploads": "uploads", "bits_up": "bits up", "paper_bits": "as b p", "bits": "up + down"}

# values read off the published figures, good to about 2 %
PUBLISHED_LOGISTIC = {
    "LAQ": {"rounds": 2626, "uploads": 572, "paper_bits": 1.80e7, "bits": 6.77e8},
    "GD": {"rounds": 2762, "uploads": 27610, "paper_bits": 6.94e9, "bits": 7.63e9},
    "QGD": {"rounds": 2758, "uploads": 27594, "paper_bits": 8.66e8, "bits": 1.56e9},
    "LAG": {"rounds": 2620, "uploads": 2432, "paper_bits": 6.11e8, "bits": 1.27e9},
}
PUBLISHED_NETWORK = {
    "LAQ": {"uploads": 32729},
    "GD": {"uploads": 80000},
    "QGD": {"uploads": 80000},
    "LAG": {"uploads": 30818},
}


@dataclass(frozen=True)
class Settings:
    """What a comparison run takes from the command line."""

    out: Path | None = None
    """Folder for the results; results/NAME by default."""
    rounds: int | None = None
    """Stop each method after so many rounds."""
    seed: int | None = None
    """Of the start. Without one: the start of the authors' program (softmax regression), seed 0 (network)."""
    smoke: bool = False
    """A tenth of the data and few rounds: does everything work here?"""
    float64: bool = False
    """Compute in float64: shows which counts are ruled by rounding."""


def laq_logistic(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """Softmax regression on MNIST, 10 workers, b = 4, C = 100, D = 10, lr 0.02: NeurIPS 2019, figure 4 and table 2."""
    compare("laq-logistic", settings, bits=4, default_rounds=4000, targets=TARGETS, published=PUBLISHED_LOGISTIC)


def laq_nn(settings: tyro.conf.OmitArgPrefixes[Settings]) -> None:
    """The 784-200-10 network on MNIST, 10 workers, b = 8, 8000 rounds: NeurIPS 2019, figure 5 and table 2."""
    compare("laq-nn", settings, bits=8, default_rounds=8000, targets=(), published=PUBLISHED_NETWORK)


def lag_table(data: Path, out: Path = Path("results/lag")) -> None:
    """LAG's real-data table: uploads to 1e-8, linear and logistic, M = 9 and 18 (NeurIPS 2018, table 5).

    Args:
        data: Folder laid out as the authors publish it: dataN/data.txt and dataN/y.txt.
        out: Folder for the results.
    """
    lag.table(data, out, Console())


def compare(
    name: str, settings: Settings, *, bits: int, default_rounds: int, targets: tuple[float, ...], published: Any
) -> None:
    """Run LAQ, GD, QGD and LAG from one start; table, curves and figures in the output folder."""
    console = Console()
    folder = settings.out or Path("results") / (name + "-smoke" * settings.smoke + "-float64" * settings.float64)
    rounds = settings.rounds or (200 if settings.smoke else default_rounds)
    jax.config.update("jax_enable_x64", settings.float64)
    data = datasets.load("mnist")
    shards = datasets.partition(data.x, data.y, 10, "contiguous")
    if settings.smoke:
        shards = laqjax.Shards(*(array[:, :600] for array in shards))
    problem = (problems.softmax if targets else problems.network)(data.x.shape[1], 10)
    oracle = problem.oracle(np.float64 if settings.float64 else np.float32)
    theta0 = authors_start(oracle) if targets and settings.seed is None else problem.theta0(oracle, settings.seed or 0)
    files.claim(folder, {"name": name, "seed": settings.seed, "smoke": settings.smoke, "float64": settings.float64})
    f_star = np.nan
    if targets:
        with console.status("f* by L-BFGS in float64 (half a minute, then cached)"):
            f_star = problems.optimum(problem, shards, cache=Path("results") / "cache")
    shards = jax.tree.map(jnp.asarray, shards)

    server = {"lr": 0.02, "num_workers": 10}
    authors = {"ramp": True, "first_upload": "rule"}
    methods = {
        "LAQ": algorithms.laq(oracle, bits=bits, **server, **authors),
        "GD": algorithms.gd(oracle, **server),
        "QGD": algorithms.qgd(oracle, bits=bits, **server),
        "LAG": algorithms.lag_wk(oracle, **server, **authors),
    }
    evaluate = accuracy_on(problem, oracle, data)
    finished: list[pl.DataFrame] = []
    stopped = False
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
            goal = Goal(rounds, targets, f_star, evaluate, progress, tasks[method])
            try:
                curves = follow(alg, theta0, shards, goal, folder / f"{method}.npz")
            except KeyboardInterrupt:
                console.print(f"stopped; {folder} keeps what is done, the same command goes on from there")
                stopped = True
                break
            finished.append(curves.select(pl.lit(method).alias("method"), pl.all()))
    if finished:
        full = theta0.nbytes * 8
        message = {"LAQ": bits * oracle.size, "GD": full, "QGD": bits * oracle.size, "LAG": full}
        report(console, folder, pl.concat(finished), targets, message, {} if settings.smoke else published)
        files.write_json(folder / "run.json", files.provenance() | {"settings": asdict(settings), "f_star": f_star})
        console.print(f"figures, table and curves: {folder}")
    if stopped:
        raise SystemExit(130)


def authors_start(oracle: Any) -> jax.Array:
    """The theta0 of the authors' program (there: weight [784, 10] first, then bias): late rounds depend on the start."""
    theta0 = np.load(Path(__file__).parent / "mnist" / "laq_logistic_theta0.npy").astype(oracle.dtype)
    return oracle.ravel({"bias": theta0[7840:], "weight": theta0[:7840].reshape(784, 10).T})


@dataclass(frozen=True)
class Goal:
    """How far one method runs, what is measured on the way, and where its progress is shown."""

    rounds: int
    targets: tuple[float, ...]
    f_star: float  # nan where there is none
    accuracy: Callable[[Any], float]
    progress: Progress
    task: Any

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
    state, hits = laqjax.init(alg, theta0, shards), np.zeros((0, 2))  # hits: round, accuracy
    none = np.zeros((0, alg.num_workers), np.int32)
    info = laqjax.Info(np.zeros(0), none.astype(bool), none, none[:, 0], {})
    if path.exists():
        state, info, hits = files.load_tree(path, (state, info, hits))
    goal.progress.start_task(goal.task)
    goal.show(info)
    while not goal.reached(info):
        done = len(info.loss)
        count = min(laqjax.engine.CHUNK, goal.rounds - done)
        try:
            out = laqjax.run(alg, state, shards, count, key, record=["params"] * bool(goal.targets))
        except laqjax.Diverged as stop:
            goal.progress.console.print(f"[red]{goal.progress.tasks[goal.task].description} {stop}[/red]")
            return rows(laqjax.join([info, stop.info._replace(extra={})]), hits, goal.f_star)
        new = out.info._replace(extra={}, loss=out.info.loss.astype(np.float64))
        for target in goal.targets:
            met = np.flatnonzero(new.loss - goal.f_star <= target)
            if len(met) and not np.any(info.loss - goal.f_star <= target):
                hits = np.vstack([hits, (done + met[0], goal.accuracy(out.info.extra["params"][met[0]]))])
        state, info = out.state, laqjax.join([info, new])
        if goal.reached(info):
            hits = np.vstack([hits, (len(info.loss), goal.accuracy(state.server.broadcast.params))])
        files.save_tree(path, (state, info, hits))
        goal.show(info)
    return rows(jax.tree.map(lambda a: a[: goal.rounds], info), hits, goal.f_star)


def rows(info: laqjax.Info, hits: np.ndarray, f_star: float) -> pl.DataFrame:
    """Row k is the model after k rounds: its loss (not known of the last one), and what had been sent until then."""

    def until(counts: Any) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    up, down = until(info.bits_up.sum(axis=1, dtype=np.int64)), until(np.asarray(info.bits_down))
    loss = np.append(info.loss, np.nan)
    accuracy = {int(k): value for k, value in hits}
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


def summary(curves: pl.DataFrame, targets: tuple[float, ...], message: dict[str, int]) -> pl.DataFrame:
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
    paper_bits = pl.col("uploads") * pl.col("method").replace_strict(message)  # the authors leave out the radius
    columns = (
        "method",
        "target",
        pl.col("round").alias("rounds"),
        "uploads",
        "bits_up",
        paper_bits.alias("paper_bits"),
    )
    return pl.concat([*met, end]).select(*columns, "bits", "accuracy")


def report(
    console: Console,
    folder: Path,
    curves: pl.DataFrame,
    targets: tuple[float, ...],
    message: dict[str, int],
    published: dict[str, dict[str, float]],
) -> None:
    """Write curves, table and figures, and print the table beside the published values."""
    table = summary(curves, targets, message)
    for name, frame in (("curves", curves), ("table", table)):
        with files.replacing(folder / f"{name}.parquet") as part:
            frame.write_parquet(part)
    with files.replacing(folder / "table.csv") as part:
        table.write_csv(part)
    plots.comparison(folder)
    shown = Table(
        "method",
        "f - f*",
        *AXES.values(),
        "accuracy",
        title="first round within the target (published value, difference)",
    )
    for row in table.iter_rows(named=True):
        last = row["target"] == (targets[-1] if targets else None)
        cells = [figure(row[axis], published.get(row["method"], {}).get(axis) if last else None) for axis in AXES]
        shown.add_row(
            row["method"],
            f"{row['target']:g}" if row["target"] else "end",
            *cells,
            "" if row["accuracy"] is None else f"{row['accuracy']:.4f}",
        )
    console.print(shown)


def figure(ours: float, published: float | None) -> str:
    """A number, and beside it the published one with the difference in per cent."""
    text = f"{ours:,}" if ours < 1e6 else f"{ours:.2e}"
    return text if published is None else f"{text} ({published:.4g}, {ours / published - 1:+.1%})"


def accuracy_on(problem: problems.Problem, oracle: Any, data: datasets.Dataset) -> Callable[[Any], float]:
    """Test accuracy of a flat parameter vector."""
    x, y = jnp.asarray(data.x_test), jnp.asarray(data.y_test)
    predict = jax.jit(lambda params: problem.accuracy(oracle.unravel(params), x, y))  # pyright: ignore[reportOptionalCall]
    return lambda params: float(predict(jnp.asarray(params)))


def main() -> None:
    """The command line."""
    try:
        tyro.extras.subcommand_cli_from_dict({"laq-logistic": laq_logistic, "laq-nn": laq_nn, "lag": lag_table})
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
