r"""A federation with Flower: what is billed beside what is on the wire.

    python -m experiments.federated              LAQ, GD, QGD and EF21 in one process, half a minute
    python -m experiments.federated --algorithm laq two_laq -b 4 8 --rounds 200
    python -m experiments.federated --grid deployment --workers 3 --rounds 5
        a SuperLink and three SuperNodes with TLS on this machine, started and stopped here
    python -m experiments.federated --grid deployment --superlink HOST:PORT \
        --root-certificates ca.crt               on a federation that runs already

Leaves in --out what a sweep leaves (points, summary, curves, masks), with the bytes and the times of each point, figures as
PNG and SVG, and of a deployment the facts of each run and the traffic that the SuperLink counted.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments import deployment, files, ledger, plots, points, sweep, terminal
from experiments.ledger import Link, Record
from experiments.study import Point
from laqjax import check_number

try:
    from experiments.apps import Plan, as_json, client_of
    from laqjax.federation import FederatedServer
    from laqjax.federation.testing import InProcessGrid
except ImportError as error:
    words = f"{error}: this command needs Flower, pip install 'laqjax[experiments,flower]'"
    raise (files.ended(2, f"error: {words}") if __name__ == "__main__" else ImportError(words)) from None

SIZES = ("payload_up", "payload_down", "bytes_up", "bytes_down")
EACH = ("answered", "sent", "bits_up", "gradients", *SIZES, "compute", "pack")  # of each worker


@dataclass(frozen=True)
class Settings:
    """A federation."""

    grid: Literal["loopback", "simulation", "deployment"] = "loopback"
    """In this process; in Flower's simulation engine (needs Ray); or a SuperLink and SuperNodes."""
    axes: points.Axes = points.Axes(algorithm=("laq", "gd", "qgd", "ef21"), bits=(4,), lr=(0.02,))
    data: points.Data = points.Data()
    rounds: int = 60
    """Rounds of each point."""
    deadline: float = 300.0
    """Seconds that a round waits for replies; who is later counts as silent."""
    goal: sweep.Goal = sweep.Goal()
    link: Link = Link()
    network: deployment.Network = deployment.Network()
    authors: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/federated")
    """Folder for the results."""
    smoke: bool = False
    """Few examples and rounds: does everything work here?"""


# ---- the command -------------------------------------------------------------------------------------------------


def loopback(plan: Plan) -> dict[str, Any]:
    """The facts of a point, in this process."""
    point, rounds = plan.point(), []
    grid = InProcessGrid(client_of(plan), range(point.algorithm.num_workers))
    server = FederatedServer(point.algorithm, point.begin(), jax.random.key(point.seed))
    began = time.perf_counter()
    for facts in server.run(grid, plan.rounds):
        rounds.append(facts)
    for facts in rounds:  # the workers have run in turn
        facts.transfer += float((facts.compute + facts.pack).max() - (facts.compute + facts.pack).sum())
    return as_json(rounds) | {"wall": time.perf_counter() - began}


def run(settings: Settings) -> Path:
    """Run all points; tables and figures in the output folder, which is returned."""
    console = Console()
    if settings.smoke:
        out = settings.out if settings.out != Settings().out else Path(f"{settings.out}-smoke")
        settings = replace(settings, rounds=min(settings.rounds, 6), out=out)
    check_number("rounds", settings.rounds, np.int32, minimum=1)
    settings.link.check()
    rows = 200 if settings.smoke else None
    choices = list(points.select(settings.axes, settings.data))
    width = points.widest(choices, settings.axes)
    chosen = points.built(choices, width, settings.authors, rows)  # what cannot run is refused before anything starts
    plans = [Plan(choice, width, settings.authors, rows, settings.rounds, settings.deadline) for choice in choices]
    with files.claimed(settings.out, points.identity(settings, experiment="federated")):
        paths = [
            settings.out / "facts" / f"{i}.json" for i in range(len(plans))
        ]  # of what is done: a stopped run goes on
        missing = {path: plan for path, plan in zip(paths, plans, strict=True) if not path.exists()}
        workers = max(len(point.case.shards.weight) for point in chosen)
        with grid_of(settings, workers, console) if missing else nullcontext() as flwr:
            for path, plan in missing.items():
                with console.status(f"{plan.choice['algorithm']}, {plan.rounds} rounds"):
                    files.write_json(path, deployed(plan, flwr, console) if flwr else loopback(plan))
        found = [files.read_json(path) for path in paths]
        write(settings, chosen, found)
        files.write_json(settings.out / "run.json", files.provenance())
        report(settings.out, console)
    return settings.out


def grid_of(settings: Settings, workers: int, console: Console) -> Any:
    """Where the points run: a context of Flower's commands, of None in this process."""
    if settings.grid == "loopback":
        return nullcontext()
    return deployment.running(settings.network, workers, settings.out, console, settings.grid == "simulation")


def deployed(plan: Plan, flwr: deployment.Flower, console: Console) -> dict[str, Any]:
    """The facts of a point, as a run of Flower."""
    made = replace(plan, facts=str(flwr.folder / "facts.json"), programs=str(flwr.folder / "programs"))
    return flwr.run(made.text, Path(made.facts), console)


def write(settings: Settings, chosen: Sequence[Point], found: Sequence[dict[str, Any]]) -> None:
    """The tables of a sweep, with what was observed."""
    parts: dict[str, list[Any]] = {name: [] for name in ledger.TABLES}
    for point, facts in zip(chosen, found, strict=True):
        arrays = {name: np.asarray(facts[name]) for name in (*EACH, "loss", "bits_down", "transfer", "decode")}
        record = recorded(point, arrays)
        asked = arrays["gradients"] > 0
        each = arrays["compute"][asked] / arrays["gradients"][asked]
        per_gradient = 1e3 * np.median(each) if len(each) else 0.0  # the first round compiles
        spent = record.spent(settings.link, settings.link.compute_ms or float(per_gradient))
        cumulated = {name: np.cumsum(arrays[name].sum(axis=1, dtype=np.int64))[:, None] for name in SIZES}
        spent |= {name: np.concatenate([0 * rows[:1], rows]) for name, rows in cumulated.items()}
        label = {"point": point.number, **point.label, "seed": point.seed}
        tables = ledger.tables([label], record, settings.goal.targets, spent, 200)
        tables["points"] = tables["points"].with_columns(**observed(arrays, facts))
        for name, table in tables.items():
            parts[name].append(table)
    for name, tables in parts.items():
        files.save(pl.concat(tables, how="diagonal_relaxed"), settings.out / name, csv=name == "points")
    files.save(ledger.summarised(pl.read_parquet(settings.out / "points.parquet")), settings.out / "summary", csv=True)


def recorded(point: Point, arrays: dict[str, np.ndarray]) -> Record:
    """The facts of a run as the ledger has them; a round in which nobody answered has no loss."""
    rounds, workers = arrays["sent"].shape
    f_star = point.case.f_star
    record = Record.empty(rounds, 1, workers, f_star)
    record.loss[:rounds, 0] = arrays["loss"].astype(float)
    record.sent[:, 0], record.up[:, 0], record.down[:, 0] = arrays["sent"], arrays["bits_up"], arrays["bits_down"]
    record.computed[:, 0] = arrays["gradients"].max(axis=1)
    record.ran[:] = rounds
    return record


def observed(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> dict[str, Any]:
    """What a run took, beside the ledger's columns: bytes, and the median milliseconds of a round."""
    sizes = {name: int(arrays[name].sum()) for name in SIZES}
    heads = {f"heads_{way}": sizes[f"bytes_{way}"] - sizes[f"payload_{way}"] for way in ("up", "down")}
    times = {f"{name}_ms": 1e3 * float(np.median(arrays[name].max(axis=1))) for name in ("compute", "pack")}
    times |= {f"{name}_ms": 1e3 * float(np.median(arrays[name])) for name in ("transfer", "decode")}
    traffic = facts.get("run", {}).get("network-traffic", {})  # as the SuperLink counted it
    counted = {f"superlink_{way}": traffic.get(f"{way}-bytes") for way in ("inbound", "outbound")}
    return {name: pl.lit(value) for name, value in (sizes | heads | times | counted).items()} | {
        "answered": pl.lit(float(arrays["answered"].mean()))
    }


def report(folder: Path, console: Console) -> None:
    """Figures, and a row a point."""
    plots.federated(folder)
    table = pl.read_parquet(folder / "points.parquet")
    names = [name for name in ledger.settings_of(table) if table[name].n_unique() > 1] or ["algorithm"]
    mega = {"Mbit billed": pl.col("bits_up_end") / 1e6, "MB of it": pl.col("payload_up") / 1e6}
    mega |= {"MB up": pl.col("bytes_up") / 1e6, "MB down": pl.col("bytes_down") / 1e6}
    mega |= {"counted": pl.col("superlink_inbound") / 1e6}  # by the SuperLink, its own requests included
    shown = table.select(
        *(pl.col(name).alias(ledger.HEADS.get(name, name)) for name in names),
        pl.col("uploads_end").alias("uploads"),
        **mega,
        loss=pl.col("final_loss"),
    )
    times = table.select(
        *(pl.col(name).alias(ledger.HEADS.get(name, name)) for name in names),
        **{name: pl.col(f"{name}_ms") for name in ("compute", "pack", "transfer", "decode")},
    )
    rounds = int(table["rounds_end"].max())  # pyright: ignore[reportArgumentType]
    tables = {f"{rounds} rounds": shown, "median milliseconds: the slowest worker's, the way, the server's": times}
    same = (table["bits_up_end"] == 8 * table["payload_up"]).all()
    ledger.result(console, folder, tables, [] if same else ["what was billed is not what was sent"])


if __name__ == "__main__":
    with terminal.command() as given:
        run(points.parsed(Settings, given, __doc__))
