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
from experiments import files, points, problems
from experiments.study import Point
from laqjax import federation
from laqjax.federation import FederatedServer, RoundStats


@dataclass(frozen=True)
class Plan:
    """A point in words, from which each process makes it anew."""

    choice: dict[str, Any]
    padded_window: int
    authors: bool
    rows: int | None
    rounds: int
    deadline: float
    facts: str = ""  # a file for the facts of the rounds
    programs: str = ""  # a folder for compiled programs

    @classmethod
    def read(cls, text: str) -> "Plan":
        """The inverse of `text`."""
        return cls(**json.loads(bytes.fromhex(text)))

    @property
    def text(self) -> str:
        """In letters that every command line takes."""
        return json.dumps(asdict(self)).encode().hex()

    def point(self) -> Point:
        """The point."""
        data = {name: self.choice[name] for name in points.Data.__dataclass_fields__}
        case = problems.case(*data.values(), rows=self.rows)
        return points.build(self.choice, case, self.padded_window, self.authors)


def shard_of(point: Point, worker: int) -> laqjax.Shards:
    """The data of one worker."""
    return jax.tree.map(lambda array: array[worker : worker + 1], point.case.shards)


def client_of(plan: Plan) -> ClientApp:
    """A worker of a point."""
    point = plan.point()
    return federation.client_app(
        point.algorithm, lambda worker: shard_of(point, worker), compilation_cache_dir=plan.programs or None
    )


def server_of(plan: Plan) -> ServerApp:
    """The server of a point; the facts of its rounds are in a file when it ends, and after each round."""
    point, rounds = plan.point(), []

    def observe(facts: RoundStats, server: FederatedServer) -> None:
        rounds.append(facts)
        if plan.facts:
            files.write_json(Path(plan.facts), as_json(rounds))

    key = jax.random.key(point.seed)
    return federation.server_app(
        point.algorithm, point.begin(), key, plan.rounds, on_round=observe, round_timeout=plan.deadline, compilation_cache_dir=plan.programs or None
    )  # fmt: skip


def as_json(rounds: Sequence[RoundStats]) -> dict[str, Any]:
    """Facts as lists."""
    return {
        name: [np.asarray(getattr(one, name)).tolist() for one in rounds] for name in RoundStats.__dataclass_fields__
    }


@cache
def client_named(text: str) -> ClientApp:
    """The worker of a plan in words, made once a process."""
    return client_of(Plan.read(text))


def answer(message: Message, context: Context) -> Message:
    """Of whatever point the run is; Ray takes this function from process to process by its name."""
    return client_named(str(context.run_config["plan"]))(message, context)


def apps() -> tuple[ServerApp, ClientApp]:
    """The apps that Flower starts: which point they are is in the run's config."""
    client, server = ClientApp(), ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        plan = Plan.read(str(context.run_config["plan"]))
        try:
            server_of(plan)(grid, context)
        finally:  # for who waits: asking the SuperLink starts a process each time
            files.write_text(Path(plan.facts).with_suffix(".ended"), "")

    client.train()(answer)
    client.query()(answer)
    return server, client
