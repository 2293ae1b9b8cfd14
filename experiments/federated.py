r"""A federation with Flower: what is billed beside what is on the wire.

    python -m experiments.federated              LAQ, GD, QGD and EF21 in one process, half a minute
    python -m experiments.federated --algorithm laq two_laq -b 4 8 --rounds 200
    python -m experiments.federated --transport deployment --workers 3 --rounds 5
        a SuperLink and three SuperNodes with TLS on this machine, started and stopped here
    python -m experiments.federated --transport deployment --superlink HOST:PORT \
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

from experiments.federation import local
from experiments.figures import drawing
from experiments.harness import cli, grid, results, storage
from experiments.harness.results import NetworkModel, PointHistory
from experiments.harness.runner import SweepPoint
from laqjax import check_number

try:
    from experiments.federation.flower_apps import PointSpec, make_client_app, stats_to_json
    from laqjax.federation import FederatedServer
    from laqjax.federation.testing import InProcessGrid
except ImportError as error:
    words = f"{error}: this command needs Flower, pip install 'laqjax[experiments,flower]'"
    raise (cli.exit_with_message(2, f"error: {words}") if __name__ == "__main__" else ImportError(words)) from None

BYTE_FIELDS = ("payload_up", "payload_down", "bytes_up", "bytes_down")
PER_WORKER_FIELDS = ("answered", "sent", "bits_up", "gradients", *BYTE_FIELDS, "compute", "pack")  # of each worker


@dataclass(frozen=True)
class Settings:
    """A federation."""

    transport: Literal["loopback", "simulation", "deployment"] = "loopback"
    """In this process; in Flower's simulation engine (needs Ray); or a SuperLink and SuperNodes."""
    axes: grid.GridAxes = grid.GridAxes(algorithm=("laq", "gd", "qgd", "ef21"), bits=(4,), lr=(0.02,))
    data: grid.DataAxes = grid.DataAxes()
    rounds: int = 60
    """Rounds of each point."""
    deadline: float = 300.0
    """Seconds that a round waits for replies; who is later counts as silent."""
    goal: grid.TargetOptions = grid.TargetOptions()
    link: NetworkModel = NetworkModel()
    network: local.SuperLinkConfig = local.SuperLinkConfig()
    authors_rule: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    config: Path | None = None
    """A TOML or YAML file of these settings; what the command line says counts more."""
    out: Path = Path("results/federated")
    """Folder for the results."""
    quick: bool = False
    """Few examples and rounds: does everything work here?"""


# ---- the command -------------------------------------------------------------------------------------------------


def run_in_process(plan: PointSpec) -> dict[str, Any]:
    """The facts of a point, in this process."""
    point, rounds = plan.point(), []
    grid = InProcessGrid(make_client_app(plan), range(point.algorithm.num_workers))
    server = FederatedServer(point.algorithm, point.initial_params(), jax.random.key(point.seed))
    began = time.perf_counter()
    for facts in server.run(grid, plan.rounds):
        rounds.append(facts)
    for facts in rounds:  # the workers have run in turn
        facts.transfer += float((facts.compute + facts.pack).max() - (facts.compute + facts.pack).sum())
    return stats_to_json(rounds) | {"wall": time.perf_counter() - began}


def run(settings: Settings) -> Path:
    """Run all points; tables and figures in the output folder, which is returned."""
    console = Console()
    if settings.quick:
        out = settings.out if settings.out != Settings().out else Path(f"{settings.out}-quick")
        settings = replace(settings, rounds=min(settings.rounds, 6), out=out)
    check_number("rounds", settings.rounds, np.int32, minimum=1)
    settings.link.check()
    rows = 200 if settings.quick else None
    choices = list(grid.iter_settings(settings.axes, settings.data))
    width = grid.max_history_length(choices, settings.axes)
    chosen = grid.build_points(
        choices, width, settings.authors_rule, rows
    )  # what cannot run is refused before anything starts
    plans = [
        PointSpec(choice, width, settings.authors_rule, rows, settings.rounds, settings.deadline) for choice in choices
    ]
    with storage.lock_results_dir(settings.out, grid.settings_identity(settings, experiment="federated")):
        paths = [
            settings.out / "facts" / f"{i}.json" for i in range(len(plans))
        ]  # of what is done: a stopped run goes on
        missing = {path: plan for path, plan in zip(paths, plans, strict=True) if not path.exists()}
        workers = max(len(point.case.shards.weight) for point in chosen)
        with open_transport(settings, workers, console) if missing else nullcontext() as flwr:
            for path, plan in missing.items():
                with console.status(f"{plan.choice['algorithm']}, {plan.rounds} rounds"):
                    storage.write_json(path, run_deployed(plan, flwr, console) if flwr else run_in_process(plan))
        found = [storage.read_json(path) for path in paths]
        write_tables(settings, chosen, found)
        storage.write_json(settings.out / "run.json", storage.provenance())
        print_report(settings.out, console)
    return settings.out


def open_transport(settings: Settings, workers: int, console: Console) -> Any:
    """Where the points run: a context of Flower's commands, of None in this process."""
    if settings.transport == "loopback":
        return nullcontext()
    return local.run_local_federation(
        settings.network, workers, settings.out, console, settings.transport == "simulation"
    )


def run_deployed(plan: PointSpec, flwr: local.FlowerCli, console: Console) -> dict[str, Any]:
    """The facts of a point, as a run of Flower."""
    made = replace(plan, facts=str(flwr.folder / "facts.json"), programs=str(flwr.folder / "programs"))
    return flwr.run(made.to_hex_json, Path(made.facts), console)


def write_tables(settings: Settings, chosen: Sequence[SweepPoint], found: Sequence[dict[str, Any]]) -> None:
    """The tables of a sweep, with what was observed."""
    parts: dict[str, list[Any]] = {name: [] for name in results.TABLES}
    for point, facts in zip(chosen, found, strict=True):
        arrays = {
            name: np.asarray(facts[name]) for name in (*PER_WORKER_FIELDS, "loss", "bits_down", "transfer", "decode")
        }
        record = to_record(point, arrays)
        asked = arrays["gradients"] > 0
        each = arrays["compute"][asked] / arrays["gradients"][asked]
        per_gradient = 1e3 * np.median(each) if len(each) else 0.0  # the first round compiles
        spent = record.cumulative_costs(settings.link, settings.link.compute_ms or float(per_gradient))
        cumulated = {name: np.cumsum(arrays[name].sum(axis=1, dtype=np.int64))[:, None] for name in BYTE_FIELDS}
        spent |= {name: np.concatenate([0 * rows[:1], rows]) for name, rows in cumulated.items()}
        label = {"point": point.number, **point.label, "seed": point.seed}
        tables = results.build_tables([label], record, settings.goal.targets, spent, 200)
        tables["points"] = tables["points"].with_columns(**observed_columns(arrays, facts))
        for name, table in tables.items():
            parts[name].append(table)
    for name, tables in parts.items():
        storage.save_frame(pl.concat(tables, how="diagonal_relaxed"), settings.out / name, csv=name == "points")
    storage.save_frame(
        results.summarize(pl.read_parquet(settings.out / "points.parquet")), settings.out / "summary", csv=True
    )


def to_record(point: SweepPoint, arrays: dict[str, np.ndarray]) -> PointHistory:
    """The facts of a run as the ledger has them; a round in which nobody answered has no loss."""
    rounds, workers = arrays["sent"].shape
    f_star = point.case.f_star
    record = PointHistory.empty(rounds, 1, workers, f_star)
    record.loss[:rounds, 0] = arrays["loss"].astype(float)
    record.sent[:, 0], record.bits_up[:, 0], record.bits_down[:, 0] = (
        arrays["sent"],
        arrays["bits_up"],
        arrays["bits_down"],
    )
    record.gradients[:, 0] = arrays["gradients"].max(axis=1)
    record.rounds_done[:] = rounds
    return record


def observed_columns(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> dict[str, Any]:
    """What a run took, beside the ledger's columns: bytes, and the median milliseconds of a round."""
    sizes = {name: int(arrays[name].sum()) for name in BYTE_FIELDS}
    heads = {f"heads_{way}": sizes[f"bytes_{way}"] - sizes[f"payload_{way}"] for way in ("up", "down")}
    times = {f"{name}_ms": 1e3 * float(np.median(arrays[name].max(axis=1))) for name in ("compute", "pack")}
    times |= {f"{name}_ms": 1e3 * float(np.median(arrays[name])) for name in ("transfer", "decode")}
    traffic = facts.get("run", {}).get("network-traffic", {})  # as the SuperLink counted it
    counted = {f"superlink_{way}": traffic.get(f"{way}-bytes") for way in ("inbound", "outbound")}
    return {name: pl.lit(value) for name, value in (sizes | heads | times | counted).items()} | {
        "answered": pl.lit(float(arrays["answered"].mean()))
    }


def print_report(folder: Path, console: Console) -> None:
    """Figures, and a row a point."""
    drawing.draw_figures(folder)
    table = pl.read_parquet(folder / "points.parquet")
    names = [name for name in results.setting_columns(table) if table[name].n_unique() > 1] or ["algorithm"]
    mega = {"Mbit billed": pl.col("bits_up_end") / 1e6, "MB of it": pl.col("payload_up") / 1e6}
    mega |= {"MB up": pl.col("bytes_up") / 1e6, "MB down": pl.col("bytes_down") / 1e6}
    mega |= {"counted": pl.col("superlink_inbound") / 1e6}  # by the SuperLink, its own requests included
    shown = table.select(
        *(pl.col(name).alias(results.COLUMN_TITLES.get(name, name)) for name in names),
        pl.col("uploads_end").alias("uploads"),
        **mega,
        loss=pl.col("final_loss"),
    )
    times = table.select(
        *(pl.col(name).alias(results.COLUMN_TITLES.get(name, name)) for name in names),
        **{name: pl.col(f"{name}_ms") for name in ("compute", "pack", "transfer", "decode")},
    )
    rounds = int(table["rounds_end"].max())  # pyright: ignore[reportArgumentType]
    tables = {f"{rounds} rounds": shown, "median milliseconds: the slowest worker's, the way, the server's": times}
    same = (table["bits_up_end"] == 8 * table["payload_up"]).all()
    results.report_result(console, folder, tables, [] if same else ["what was billed is not what was sent"])


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(Settings, given, __doc__))
