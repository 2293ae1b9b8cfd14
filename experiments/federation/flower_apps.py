"""Flower apps that run one point of a sweep. A SuperNode starts a process for each message, so imports are few."""

import importlib
import json
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import laqjax
from experiments.federation.local import END_WITH_PARENT, read_rounds
from experiments.harness import cases, grid, storage
from experiments.harness.runner import SweepPoint
from laqjax import federation
from laqjax.federation import FederatedServer, RoundStats


@dataclass(frozen=True)
class PointSpec:
    """Description of a point as plain values, from which each process builds the same point."""

    choice: dict[str, Any]
    padded_window: int
    authors_rule: bool
    rows: int | None
    rounds: int = 0
    folder: str = ""  # for the server's files: see `make_server_app`
    programs: str = ""  # folder for compiled programs
    states: str = ""  # folder for the states of workers whose node does not keep them
    token: str = ""  # of this run and the runs that resume it: other state of a worker is not used
    server: dict[str, Any] = field(default_factory=dict)  # further arguments of `server_app`

    @classmethod
    def from_hex_json(cls, text: str) -> "PointSpec":
        """Parse the text of `to_hex_json`."""
        return cls(**json.loads(bytes.fromhex(text)))

    def to_hex_json(self) -> str:
        """Encode the description as hexadecimal digits, which need no quoting on any command line."""
        return json.dumps(asdict(self)).encode().hex()

    def client_part(self, programs: str) -> "PointSpec":
        """Return the description without what concerns the server alone, with another folder for programs."""
        choice = self.choice | {"point": 0}  # its number among the points of a command
        return PointSpec(choice, self.padded_window, self.authors_rule, self.rows, programs=programs)

    def build_point(self) -> SweepPoint:
        """Build the point with its data."""
        data = {name: self.choice[name] for name in grid.DataAxes.__dataclass_fields__}
        case = cases.get_case(*data.values(), rows=self.rows)
        return grid.build_point(self.choice, case, self.padded_window, self.authors_rule)


def make_specs(axes: grid.GridAxes, data: grid.DataAxes, authors_rule: bool, rows: int | None) -> list[PointSpec]:
    """Return the descriptions of all points of a grid."""
    choices = list(grid.iter_settings(axes, data))
    width = grid.max_history_length(axes)
    return [PointSpec(choice, width, authors_rule, rows) for choice in choices]


def make_client_app(spec: PointSpec) -> ClientApp:
    """Create the client app of a point; worker m reads row m of the shards."""
    point = spec.build_point()

    def load_shard(worker: int) -> laqjax.Shards:
        return jax.tree.map(lambda array: array[worker : worker + 1], point.case.shards)

    return federation.client_app(
        point.algorithm, load_shard, compilation_cache_dir=spec.programs or None, state_dir=spec.states or None
    )


def make_server_app(spec: PointSpec) -> ServerApp:
    """Create the server app of a point.

    After each round it appends the stats to `facts.jsonl` in `spec.folder`, and then makes `resume.npz` a link to the
    checkpoint of that round. A restarted server continues from this file, and drops later stats.
    """
    point, folder = spec.build_point(), Path(spec.folder)
    facts, checkpoint, resume = (folder / name for name in ("facts.jsonl", "server.npz", "resume.npz"))
    checkpoint.unlink(missing_ok=True)  # may be of a round whose stats were not written
    if resume.exists():
        os.link(resume, checkpoint)
    kept: list[str] | None = None

    def write_stats(stats: RoundStats, server: FederatedServer) -> None:
        nonlocal kept
        if kept is None:
            kept = [json.dumps(row) for row in read_rounds(facts) if row["round"] < stats.round]
            storage.write_text(facts, "".join(f"{line}\n" for line in kept))
        with facts.open("a") as file:
            file.write(json.dumps(stats_to_row(stats)) + "\n")
        part = folder / "part.npz"
        part.unlink(missing_ok=True)
        os.link(checkpoint, part)
        part.replace(resume)

    return federation.server_app(
        point.algorithm,
        point.initial_params(),
        jax.random.key(point.seed),
        spec.rounds,
        on_round=write_stats,
        compilation_cache_dir=spec.programs or None,
        checkpoint_path=checkpoint,
        **spec.server,
    )


def stats_to_row(stats: RoundStats) -> dict[str, Any]:
    """Convert the stats of a round that has just ended to plain values."""
    row = {name: np.asarray(getattr(stats, name)).tolist() for name in RoundStats.__dataclass_fields__}
    return row | {"ended": time.time()}


@cache
def get_client_app(text: str) -> ClientApp:
    """Create the client app of an encoded `PointSpec` once in each process."""
    return make_client_app(PointSpec.from_hex_json(text))


def handle_message(message: Message, context: Context) -> Message:
    """Reply as a client of the run's point; a module-level function, since Ray pickles it by name."""
    return get_client_app(str(context.run_config["plan"]))(message, context)


def make_own_client(specs: Sequence[PointSpec], programs: Path) -> ClientApp:
    """Create the client app of a node that works on these points only, whatever a run asks for."""
    own = [spec.client_part(str(programs)).to_hex_json() for spec in specs]
    client = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        spec = PointSpec.from_hex_json(str(context.run_config.get("plan", "")))
        if (text := spec.client_part(str(programs)).to_hex_json()) not in own:
            raise ValueError(
                f"a run of {spec.choice}: must be one of this node's {len(own)} points; give the node the problem, data"
                " and algorithms of the server's command"
            )
        return get_client_app(text)(message, context)

    client.train()(handle)
    client.query()(handle)
    return client


def shorten_pauses() -> None:
    """Let this process ask for a missing part of a reply every 20 ms, in the versions of Flower that allow it.

    A reply is announced before its parts have arrived. Flower then waits a second, which is most of a short round.
    """
    with suppress(ImportError, AttributeError):
        module: Any = importlib.import_module("flwr.superlink.grid.http_grid")
        module.pull_objects = partial(module.pull_objects, initial_backoff=0.02, backoff_cap=1.0)


client, server = ClientApp(), ServerApp()  # Flower starts them; the run's config says which point they run
client.train()(handle_message)
client.query()(handle_message)


@server.main()
def run_server(grid: Grid, context: Context) -> None:
    """Run the server of the run's point."""
    spec = PointSpec.from_hex_json(str(context.run_config["plan"]))
    exec(END_WITH_PARENT, {})  # Flower's process of the SuperLink
    log = logging.FileHandler(f"{spec.folder}.log")  # Flower keeps the output of this process in its SuperLink
    log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.setLevel(logging.INFO)
    logging.getLogger().addHandler(log)
    shorten_pauses()
    try:
        make_server_app(spec)(grid, context)
    except BaseException:
        logging.exception("the server app failed")
        raise
    finally:  # `FlowerCli.run` waits for this file: each question to the SuperLink would start a process
        storage.write_text(Path(spec.folder) / "ended", "")
