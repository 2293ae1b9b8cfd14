r"""Run a federation with Flower; compare counted bits with the bytes sent.

    python -m experiments.federated              LAQ, GD, QGD and EF21 in one process, half a minute
    python -m experiments.federated --quick      few examples and rounds, to try the installation
    python -m experiments.federated --algorithm laq two_laq -b 4 8 --rounds 200
    python -m experiments.federated --transport deployment --workers 3 --rounds 5
        a SuperLink and three nodes with TLS on this machine, started and stopped here
    python -m experiments.federated --transport deployment --superlink HOST:PORT \
        --root-certificates ca.crt               on a federation that is already running

Writes the tables of a sweep (points, summary, curves, masks) to --out, with the bytes and times of each point and figures
as PNG and SVG. A deployment adds the stats of each run and the traffic that the SuperLink counts.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import polars as pl
from rich.console import Console

from experiments.figures import drawing
from experiments.harness import cli, grid, results, storage
from experiments.harness.results import NetworkModel, PointHistory
from experiments.harness.runner import SweepPoint
from laqjax import check_number

try:
    from experiments.federation import local
    from experiments.federation.flower_apps import PointSpec, make_client_app, make_specs, stats_to_row
    from laqjax.federation import FederatedServer
    from laqjax.federation.testing import InProcessGrid
except ImportError as error:
    words = f"{error}: this command needs Flower, pip install 'laqjax[experiments,flower]'"
    raise (cli.exit_with_message(2, f"error: {words}") if __name__ == "__main__" else ImportError(words)) from None

LOST = ("absent", "rejected")  # fields of the facts, and columns
BYTE_FIELDS = ("payload_down", "bytes_up", "bytes_down")


@dataclass(frozen=True)
class ServerOptions:
    """What the server does about workers that do not answer, or that send absurd numbers."""

    min_replies: int | None = None
    """Replies after which a round waits for no more. By default it waits for all workers; only then are the results
    those of a run in one process."""
    outlier_factor: float = 1e3
    """A message is rejected if its largest number exceeds this many times the median of the workers' largest."""
    release_worker: Annotated[tuple[int, ...], cli.variadic_option("M")] = ()
    """Workers whose node has been replaced by one with another key."""


@dataclass(frozen=True)
class Settings:
    """Settings of a federation."""

    transport: Literal["in_process", "simulation", "deployment"] = "in_process"
    """In this process; in Flower's simulation engine (needs Ray); or with a SuperLink and SuperNodes."""
    axes: grid.GridAxes = grid.GridAxes(algorithm=("laq", "gd", "qgd", "ef21"), bits=(4,), lr=(0.02,))
    data: grid.DataAxes = grid.DataAxes()
    rounds: int = 60
    """Rounds of each point."""
    deadline: float = 300.0
    """Seconds that a round waits for replies; later workers count as silent."""
    server: ServerOptions = ServerOptions()
    goal: grid.TargetOptions = grid.TargetOptions()
    link: NetworkModel = NetworkModel()
    network: local.SuperLinkConfig = local.SuperLinkConfig()
    authors_rule: bool = False
    """Use the lazy rule of the authors' program: the rule decides the first upload, xi grows over the first D rounds."""
    config: Path | None = None
    """TOML or YAML file of these settings; options on the command line take precedence."""
    out: Path = Path("results/federated")
    """Folder for the results."""
    quick: bool = False
    """Use few examples and rounds, to try the installation."""


def run(settings: Settings) -> Path:
    """Run all points, write tables and figures to the output folder, and return the folder."""
    console = Console()
    if settings.quick:
        out = settings.out if settings.out != Settings().out else Path(f"{settings.out}-quick")
        settings = replace(settings, rounds=min(settings.rounds, 6), out=out)
    check_number("rounds", settings.rounds, np.int32, minimum=1)
    settings.link.check()
    server = {"min_replies": settings.server.min_replies, "outlier_factor": settings.server.outlier_factor}
    server |= {"release_workers": settings.server.release_worker, "round_timeout": settings.deadline}
    rows = 200 if settings.quick else None
    specs = make_specs(settings.axes, settings.data, settings.authors_rule, rows)
    width, choices = specs[0].padded_window, [spec.choice for spec in specs]
    points = grid.build_points(choices, width, settings.authors_rule, rows)  # refuses wrong settings before any work
    specs = [replace(spec, rounds=settings.rounds, server=server) for spec in specs]
    same = replace(settings, network=local.SuperLinkConfig(), server=replace(settings.server, release_worker=()))
    with storage.lock_results_dir(settings.out, grid.settings_identity(same, experiment="federated")):
        paths = [settings.out / "facts" / f"{i}.json" for i in range(len(specs))]  # a stopped command resumes from them
        missing = {i: spec for i, spec in enumerate(specs) if not paths[i].exists()}
        workers = max(len(point.case.shards.weight) for point in points)
        with open_transport(settings, workers, console) if missing else nullcontext() as flwr:
            for i, spec in missing.items():
                with console.status(f"{spec.choice['algorithm']}, {spec.rounds} rounds"):
                    storage.write_json(paths[i], flwr.run(spec, i) if flwr else run_in_process(spec))
        write_tables(settings, points, [storage.read_json(path) for path in paths])
        storage.write_json(settings.out / "run.json", storage.provenance())
        print_report(settings.out, console)
        check_workers(settings, [storage.read_json(path) for path in paths])
    return settings.out


def open_transport(settings: Settings, workers: int, console: Console) -> Any:
    """Return a context manager of Flower's commands, or of None if the points run in this process."""
    if settings.transport == "in_process":
        return nullcontext()
    simulation = settings.transport == "simulation"
    return local.run_local_federation(settings.network, workers, settings.out, console, simulation)


def run_in_process(spec: PointSpec) -> dict[str, Any]:
    """Run a point in this process and return the stats of its rounds."""
    point = spec.build_point()
    workers = InProcessGrid(make_client_app(spec), range(point.algorithm.num_workers))
    key = jax.random.key(point.seed)
    server = FederatedServer(point.algorithm, point.initial_params(), key, **spec.server)
    begin, rows = time.perf_counter(), []
    for stats in server.run(workers, spec.rounds):
        # the workers run one after another: the wait counts all of them, not the slowest alone
        stats.transfer += float((stats.compute + stats.pack).max() - (stats.compute + stats.pack).sum())
        rows.append(stats_to_row(stats))
    wall = time.perf_counter() - begin
    return {name: [row[name] for row in rows] for name in rows[0]} | {"wall": wall}


def check_workers(settings: Settings, found: Sequence[dict[str, Any]]) -> None:
    """Raise ConnectionError if workers were absent or rejected, so that the command ends with exit code 1."""
    lost = []
    for i, facts in enumerate(found):
        absent, rejected = (np.count_nonzero(facts[name], axis=0) for name in LOST)
        if settings.server.min_replies is not None:  # slow workers may then be absent, but not in the last three rounds
            absent = absent * (np.asarray(facts["absent"])[-1] >= 3)
        for worker in np.flatnonzero(absent + rejected):
            count = f"was absent in {absent[worker]} and rejected in {rejected[worker]} of {len(facts['loss'])} rounds"
            lost.append(f"point {i}: worker {worker} {count}")
    if lost:
        raise ConnectionError(f"{'; '.join(lost)}: the results are not those of a run with all workers; see the log")


# ---- tables ------------------------------------------------------------------------------------------------------


def write_tables(settings: Settings, points: Sequence[SweepPoint], found: Sequence[dict[str, Any]]) -> None:
    """Write the tables of a sweep, with the observed bytes and times."""
    parts: dict[str, list[Any]] = {name: [] for name in results.TABLES}
    for point, facts in zip(points, found, strict=True):
        # of each round: fields of `RoundStats`, [rounds, M] or [rounds], and the time at which it ended
        arrays = {name: np.asarray(value) for name, value in facts.items() if isinstance(value, list)}
        record = to_record(point, arrays)
        active = arrays["gradients"] > 0
        seconds = arrays["compute"][active] / arrays["gradients"][active]
        per_gradient = 1e3 * float(np.median(seconds)) if len(seconds) else 0.0  # the first round compiles
        compute_ms = per_gradient if settings.link.compute_ms is None else settings.link.compute_ms
        spent = record.cumulative_costs(settings.link, compute_ms)
        for name in BYTE_FIELDS:  # row k holds the costs before model k
            total = np.cumsum(arrays[name].sum(axis=1, dtype=np.int64))[:, None]
            spent[name] = np.concatenate([0 * total[:1], total])
        label = {"point": point.number, **point.label, "seed": point.seed}
        tables = results.build_tables([label], record, settings.goal.targets, spent, 200)
        tables["points"] = tables["points"].with_columns(**measurement_columns(arrays, facts))
        for name, table in tables.items():
            parts[name].append(table)
    for name, tables in parts.items():
        storage.save_frame(pl.concat(tables, how="diagonal_relaxed"), settings.out / name, csv=name == "points")
    summary = results.summarize(pl.read_parquet(settings.out / "points.parquet"))
    storage.save_frame(summary, settings.out / "summary", csv=True)


def to_record(point: SweepPoint, arrays: dict[str, np.ndarray]) -> PointHistory:
    """Convert the stats of a run to a history; the loss of a round without replies is missing."""
    rounds, workers = arrays["sent"].shape
    record = PointHistory.empty(rounds, 1, workers, point.case.f_star)
    record.loss[:rounds, 0] = arrays["loss"].astype(float)
    for name in ("sent", "bits_up", "bits_down"):
        getattr(record, name)[:, 0] = arrays[name]
    record.gradients[:, 0] = arrays["gradients"].max(axis=1)
    record.rounds_done[:] = rounds
    return record


def measurement_columns(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of observed bytes and of the median milliseconds of a round."""
    found: dict[str, Any] = {name: int(arrays[name].sum()) for name in BYTE_FIELDS}
    found["payload_up"] = int(arrays["bits_up"].sum()) // 8
    found |= {f"heads_{way}": found[f"bytes_{way}"] - found[f"payload_{way}"] for way in ("up", "down")}
    found |= {f"{name}_ms": 1e3 * float(np.median(arrays[name].max(axis=1))) for name in ("compute", "pack")}
    found |= {f"{name}_ms": 1e3 * float(np.median(arrays[name])) for name in ("transfer", "decode")}
    seconds = np.diff(arrays["ended"])
    found |= {"round_ms": 1e3 * float(np.median(seconds)) if len(seconds) else None}
    found |= {name: int(np.count_nonzero(arrays[name])) or None for name in LOST}
    worker_rounds = arrays["sent"].size - facts.get("resumed", 0) * arrays["sent"].shape[1]
    found |= {f"wire_{way}": facts["wire"][way] / worker_rounds if "wire" in facts else None for way in ("up", "down")}
    traffic = facts.get("run", {}).get("network-traffic", {})  # as the SuperLink counts it
    found |= {f"superlink_{way}": traffic.get(f"{way}-bytes") for way in ("inbound", "outbound")}
    return {name: pl.lit(value) for name, value in (found | {"accepted": float(arrays["accepted"].mean())}).items()}


def print_report(folder: Path, console: Console) -> None:
    """Draw the figures and print one row for each point."""
    drawing.draw_figures(folder)
    table = pl.read_parquet(folder / "points.parquet")
    names = [name for name in results.setting_columns(table) if table[name].n_unique() > 1] or ["algorithm"]
    labels = [pl.col(name).alias(results.COLUMN_TITLES.get(name, name)) for name in names]
    # the SuperLink also counts its own requests
    mega = {"Mbit billed": "bits_up_end", "MB up": "bytes_up", "MB down": "bytes_down", "counted": "superlink_inbound"}  # fmt: skip
    millions = {name: pl.col(column) / 1e6 for name, column in mega.items()}
    lost = {name: pl.col(name) for name in LOST}
    shown = table.select(*labels, pl.col("uploads_end").alias("uploads"), **millions, **lost, loss=pl.col("final_loss"))
    times = {name: pl.col(f"{name}_ms") for name in ("round", "compute", "pack", "transfer", "decode")}
    tables = {
        f"{table['rounds_end'].max()} rounds": shown,
        "median milliseconds of a round: all of it, the slowest worker, the transfer, the server": table.select(
            *labels, **times
        ),
    }
    if table["wire_up"].null_count() < len(table):
        exchanges = pl.col("workers") * pl.col("rounds_end")
        sizes = {
            f"{title} {way}": pl.col(f"{column}_{way}") / (1e3 if title == "wire" else 1e3 * exchanges)
            for way in ("up", "down")
            for title, column in {"body": "payload", "message": "bytes", "wire": "wire"}.items()
        }
        tables["kB of a worker and round"] = table.select(*labels, **sizes)
    results.report_result(console, folder, tables)


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(Settings, given, __doc__))
