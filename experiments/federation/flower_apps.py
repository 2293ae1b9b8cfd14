"""A point as Flower's apps. Flower starts a process for each message, so little is imported here."""

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
    """A point in words, from which each process makes it anew."""

    choice: dict[str, Any]
    padded_window: int
    authors_rule: bool
    rows: int | None
    rounds: int
    deadline: float
    facts: str = ""  # a file for the facts of the rounds
    programs: str = ""  # a folder for compiled programs

    @classmethod
    def from_hex_json(cls, text: str) -> "PointSpec":
        """The inverse of `text`."""
        return cls(**json.loads(bytes.fromhex(text)))

    @property
    def to_hex_json(self) -> str:
        """In letters that every command line takes."""
        return json.dumps(asdict(self)).encode().hex()

    def point(self) -> SweepPoint:
        """The point."""
        data = {name: self.choice[name] for name in grid.DataAxes.__dataclass_fields__}
        case = cases.get_case(*data.values(), rows=self.rows)
        return grid.build_point(self.choice, case, self.padded_window, self.authors_rule)


def worker_shard(point: SweepPoint, worker: int) -> laqjax.Shards:
    """The data of one worker."""
    return jax.tree.map(lambda array: array[worker : worker + 1], point.case.shards)


def make_client_app(plan: PointSpec) -> ClientApp:
    """A worker of a point."""
    point = plan.point()
    return federation.client_app(
        point.algorithm, lambda worker: worker_shard(point, worker), compilation_cache_dir=plan.programs or None
    )


def make_server_app(plan: PointSpec) -> ServerApp:
    """The server of a point; the facts of its rounds are in a file when it ends, and after each round."""
    point, rounds = plan.point(), []

    def observe(facts: RoundStats, server: FederatedServer) -> None:
        rounds.append(facts)
        if plan.facts:
            storage.write_json(Path(plan.facts), stats_to_json(rounds))

    key = jax.random.key(point.seed)
    return federation.server_app(
        point.algorithm, point.initial_params(), key, plan.rounds, on_round=observe, round_timeout=plan.deadline, compilation_cache_dir=plan.programs or None
    )  # fmt: skip


def stats_to_json(rounds: Sequence[RoundStats]) -> dict[str, Any]:
    """Facts as lists."""
    return {
        name: [np.asarray(getattr(one, name)).tolist() for one in rounds] for name in RoundStats.__dataclass_fields__
    }


@cache
def cached_client_app(text: str) -> ClientApp:
    """The worker of a plan in words, made once a process."""
    return make_client_app(PointSpec.from_hex_json(text))


def handle_message(message: Message, context: Context) -> Message:
    """Of whatever point the run is; Ray takes this function from process to process by its name."""
    return cached_client_app(str(context.run_config["plan"]))(message, context)


def make_apps() -> tuple[ServerApp, ClientApp]:
    """The apps that Flower starts: which point they are is in the run's config."""
    client, server = ClientApp(), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        plan = PointSpec.from_hex_json(str(context.run_config["plan"]))
        try:
            make_server_app(plan)(grid, context)
        finally:  # for who waits: asking the SuperLink starts a process each time
            storage.write_text(Path(plan.facts).with_suffix(".ended"), "")

    client.train()(handle_message)
    client.query()(handle_message)
    return server, client
