"""Flower apps that run one point of a sweep. Flower starts a process for each message, so imports are few."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

import laqjax
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
    rounds: int
    deadline: float
    facts: str = ""  # file for the stats of the rounds
    programs: str = ""  # folder for compiled programs

    @classmethod
    def from_hex_json(cls, text: str) -> "PointSpec":
        """Parse the text of `to_hex_json`."""
        return cls(**json.loads(bytes.fromhex(text)))

    def to_hex_json(self) -> str:
        """Encode the description as hexadecimal digits, which need no quoting on any command line."""
        return json.dumps(asdict(self)).encode().hex()

    def build_point(self) -> SweepPoint:
        """Build the point with its data."""
        data = {name: self.choice[name] for name in grid.DataAxes.__dataclass_fields__}
        case = cases.get_case(*data.values(), rows=self.rows)
        return grid.build_point(self.choice, case, self.padded_window, self.authors_rule)


def make_client_app(spec: PointSpec) -> ClientApp:
    """Create the client app of a point; worker m reads row m of the shards."""
    point = spec.build_point()

    def load_shard(worker: int) -> laqjax.Shards:
        return jax.tree.map(lambda array: array[worker : worker + 1], point.case.shards)

    return federation.client_app(point.algorithm, load_shard, compilation_cache_dir=spec.programs or None)


def make_server_app(spec: PointSpec) -> ServerApp:
    """Create the server app of a point, which writes the stats of its rounds to `spec.facts` after each round."""
    point, rounds = spec.build_point(), []

    def write_stats(stats: RoundStats, server: FederatedServer) -> None:
        rounds.append(stats)
        storage.write_json(Path(spec.facts), stats_to_json(rounds))

    key = jax.random.key(point.seed)
    options: Any = {"round_timeout": spec.deadline, "compilation_cache_dir": spec.programs or None}
    return federation.server_app(
        point.algorithm, point.initial_params(), key, spec.rounds, on_round=write_stats, **options
    )


def stats_to_json(rounds: Sequence[RoundStats]) -> dict[str, Any]:
    """Convert the stats of all rounds to one list for each field."""
    return {
        name: [np.asarray(getattr(one, name)).tolist() for one in rounds] for name in RoundStats.__dataclass_fields__
    }


@cache
def get_client_app(text: str) -> ClientApp:
    """Create the client app of an encoded `PointSpec` once in each process."""
    return make_client_app(PointSpec.from_hex_json(text))


def handle_message(message: Message, context: Context) -> Message:
    """Reply as a client of the run's point; a module-level function, since Ray pickles it by name."""
    return get_client_app(str(context.run_config["plan"]))(message, context)


def make_apps() -> tuple[ServerApp, ClientApp]:
    """Create the apps that Flower starts; the run's config says which point they run."""
    client, server = ClientApp(), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        spec = PointSpec.from_hex_json(str(context.run_config["plan"]))
        try:
            make_server_app(spec)(grid, context)
        finally:  # `FlowerCli.run` waits for this file: each question to the SuperLink would start a process
            storage.write_text(Path(spec.facts).with_suffix(".ended"), "")

    client.train()(handle_message)
    client.query()(handle_message)
    return server, client
