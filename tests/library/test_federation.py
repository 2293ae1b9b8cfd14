"""A federation in one process: the simulation's run, message by message, whatever is lost, late, repeated or hostile."""

import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import laqjax
from laqjax import algorithms, compressors
from tests.laws import reference
from tests.laws.golden import GOLDEN, authors_run, flat
from tests.laws.registry import make, parametrize_rows
from tests.support import KEY, Toy, make_toy, softmax_loss

pytest.importorskip("flwr")
from flwr.app import ConfigRecord, Error, Message, RecordDict

from laqjax.federation import _admission, _checkpoint, _client, _protocol, _roster, _server
from laqjax.federation.testing import InProcessGrid

L2 = 0.01


def loader(shards: laqjax.Shards) -> Callable[[int], laqjax.Shards]:
    return lambda worker: jax.tree.map(lambda a: a[worker : worker + 1], shards)


def federated(alg: Any, start: Any, shards: laqjax.Shards, rounds: int, **options: Any) -> Any:
    """(stats of all rounds, server, grid)."""
    grid = InProcessGrid(_client.client_app(alg, loader(shards)), range(alg.num_workers))
    server = _server.FederatedServer(alg, start, KEY, **options)
    return list(server.run(grid, rounds)), server, grid


def column(stats: Any, name: str) -> np.ndarray:
    return np.array([getattr(one, name) for one in stats])


# ---- the same run as the simulation ------------------------------------------------------------------------------

RULE: dict[str, Any] = dict(lr=0.05, num_workers=4)
ADAM: Any = dict(optimizer=laqjax.optimizers.amsgrad)
# in `make test` members with parts of their own: rules of the worker and of the server, a downlink, a shared draw, a snapshot,
# an oracle that reads the aggregate, an oracle with a state; participation
QUICK = ["two_laq", "lag_ps", "lasg_wk1", "scaffold", "diloco_ef"]


@pytest.mark.parametrize(
    ("name", "options", "short_history"),
    [
        *(
            pytest.param(*row.values, {}, _protocol.SHORT_HISTORY, marks=row.marks, id=str(row.values[0]))
            for row in parametrize_rows(QUICK)
        ),
        pytest.param("two_laq", {}, 0, id="two_laq, computed history"),
        pytest.param("laq", ADAM, 0, marks=pytest.mark.long, id="laq, Adam, computed history"),
    ],
)
def test_it_is_the_simulation(
    name: str, options: dict[str, Any], short_history: int, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_protocol, "SHORT_HISTORY", short_history)
    alg = make(name, toy, **options)
    out = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, metrics=["gradients"])
    stats, server, _ = federated(alg, toy.theta0, toy.shards, 12)
    np.testing.assert_array_equal(column(stats, "sent"), out.info.sent)
    np.testing.assert_array_equal(column(stats, "bits_up"), out.info.bits_up)
    np.testing.assert_array_equal(column(stats, "bits_down"), out.info.bits_down)
    np.testing.assert_array_equal(column(stats, "gradients"), out.info.extra["gradients"])
    np.testing.assert_allclose(server.state.params, out.state.params, rtol=1e-4, atol=1e-6)
    if alg.num_workers == column(stats, "accepted").sum() / len(stats):  # else the mean is over those that were asked
        np.testing.assert_allclose(column(stats, "loss"), out.info.loss, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision_is_the_simulation(dtype: Any) -> None:
    """Also for subnormal numbers, which are ordinary gradients in float16."""
    targets = np.asarray([[4e-5, 3e-4, 1.0], [3e-5, 3e-4, 1.0]], np.float32)

    def loss(params: Any, x: Any, y: Any) -> Any:
        return jnp.sum((params[None] - x.astype(dtype)) ** 2, axis=-1) / jnp.asarray(2, dtype)

    shards = laqjax.Shards(targets[:, None], np.zeros((2, 1), np.float32), np.ones((2, 1), np.float32))
    oracle = laqjax.oracles.from_loss(loss, np.zeros(3, dtype))
    alg = algorithms.ef21(oracle, lr=0.25, num_workers=2, compressor=compressors.identity())
    out = laqjax.run(alg, np.zeros(3, dtype), shards, 8, KEY)
    _, server, _ = federated(alg, np.zeros(3, dtype), shards, 8)
    assert server.state.params.dtype == out.state.params.dtype == dtype
    for params in (out.state.params, server.state.params):
        np.testing.assert_allclose(np.asarray(params, np.float32), targets.mean(axis=0), rtol=0.05)


@pytest.mark.long
def test_the_reference_problem(mnist: laqjax.Shards) -> None:
    """60 rounds: the masks of the simulation, and of the authors' program as far as the simulation has them."""
    out = authors_run(mnist, np.float32, 60)
    theta0 = jnp.asarray(flat(GOLDEN["theta0"]), np.float32)
    params = {"bias": theta0[:10], "weight": theta0[10:].reshape(10, 784)}
    oracle = laqjax.oracles.from_loss(softmax_loss, params, l2=reference.AUTHORS_L2)
    alg = algorithms.laq(oracle, num_workers=10, **reference.AUTHORS)
    stats, _, grid = federated(alg, theta0, mnist, 60)
    sent, payload = column(stats, "sent"), column(stats, "bits_up") // 8
    np.testing.assert_array_equal(sent, out.info.sent)
    np.testing.assert_array_equal(sent[:50], GOLDEN["sent"][:50])
    np.testing.assert_allclose(column(stats, "loss"), out.info.loss, rtol=0, atol=1e-6)
    # what is billed is what is sent, and the rest is heads: Flower's, and ours of a fixed size
    np.testing.assert_array_equal(8 * payload, out.info.bits_up)
    heads = column(stats, "bytes_up") - payload
    own = _protocol.HEADER_STRUCTS[_protocol.ReplyHeader].size
    assert own <= heads.min() <= heads.max() <= own + 120
    hello = grid.bytes_up - column(stats, "bytes_up").sum()
    assert 0 < hello <= 10 * 150  # one reply of each node: who it is, and the digests of its settings
    # every model goes down once a worker, as no worker has it yet, with the history of 10 numbers
    np.testing.assert_array_equal(column(stats, "payload_down"), 4 * 7850)
    assert (column(stats, "bytes_down") - 4 * 7850)[1:].max() < 200 + 4 * 10

    gd = algorithms.gd(oracle, lr=0.02, num_workers=10)
    plain = federated(gd, theta0, mnist, 20)[0]
    assert column(stats[:20], "bytes_up").sum() < 0.2 * column(plain, "bytes_up").sum()


def test_the_model_comes_down_in_the_bits_that_are_billed(toy: Toy) -> None:
    alg = make("two_laq", toy)
    stats, _, _ = federated(alg, toy.theta0, toy.shards, 5)
    down = column(stats, "payload_down")
    np.testing.assert_array_equal(down[0], 4 * 63)  # nobody has a model yet
    np.testing.assert_array_equal(8 * down[1:], np.broadcast_to(column(stats, "bits_down")[:-1, None], (4, 4)))


def test_who_is_not_asked_gets_nothing(toy: Toy) -> None:
    stats, _, _ = federated(make("lag_ps", toy), toy.theta0, toy.shards, 12)
    sent = column(stats, "sent")
    assert not sent.all()
    assert not column(stats, "bytes_down")[~sent].any()
    assert not column(stats, "bytes_up")[~sent].any()


def test_a_model_that_did_not_change_is_not_sent_again(toy: Toy) -> None:
    """A round that is repeated, since nobody's reply came through."""
    alg = make("laq", toy)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4))
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    list(server.run(grid, 3))
    server._roster.model_rounds = dict.fromkeys(range(4), 3)  # as if they had answered in round 3
    before = {node: context.state for node, context in grid.contexts.items()}
    assert before
    message = _server._make_broadcasts(server, np.ones(4, bool), _server.RoundStats.empty(3, 4))[100]
    assert _protocol.parse_message(_protocol.BroadcastHeader, message)[0].model == _protocol.MODEL_UNCHANGED
    assert "body" not in message.content[_protocol.RECORD_KEY]


# ---- faults ------------------------------------------------------------------------------------------------------


def damaged(message: Message, place: int) -> Message:
    """One byte of what it carries is another."""
    content = {}
    whole = message.content.config_records.get(_protocol.RECORD_KEY, {})
    for name, value in whole.items():
        data = bytearray(value) if isinstance(value, bytes) else None
        if data and len(whole) > 0 and sorted(whole)[place % len(whole)] == name:
            data[place % len(data)] ^= 1 + place % 255
        content[name] = value if data is None else bytes(data)
    message.content[_protocol.RECORD_KEY] = ConfigRecord(content)
    return message


class Weather:
    """What becomes of the messages of a round: `plan` has a fault for each node in each direction."""

    def __init__(self) -> None:
        self.plan: dict[tuple[str, int], tuple[str, int]] = {}
        self.late: list[Message] = []  # replies
        self.held: list[Message] = []  # broadcasts

    def down(self, message: Message) -> list[Message]:
        return self.meet("down", message.metadata.dst_node_id, message)

    def up(self, message: Message) -> list[Message]:
        return self.meet("up", message.metadata.src_node_id, message)

    def meet(self, way: str, node: int, message: Message) -> list[Message]:
        fault, place = self.plan.get((way, node), ("none", 0))
        if fault == "lost":
            return []
        if fault == "late":
            (self.late if way == "up" else self.held).append(message)
            return []
        if fault == "damaged" and message.has_content():
            return [damaged(message, place)]
        return [message] * (2 if fault == "twice" else 1)

    def released(self) -> tuple[list[Message], list[Message]]:
        out = self.late, self.held
        self.late, self.held = [], []
        return out


FAULTS = ("none", "none", "none", "lost", "late", "twice", "damaged")


def key_of(owner: int) -> bytes:
    """The public key of a node, as Flower reports it."""
    return b"-----BEGIN PUBLIC KEY-----\n%d" % owner


class Faulty:
    """A federation on the toy, its nodes, and what can happen to them."""

    def __init__(self, alg: Any, toy: Toy, folder: Path, seen: Counter[str] | None = None) -> None:
        self.alg, self.toy, self.folder, self.seen = alg, toy, folder, Counter() if seen is None else seen
        self.weather = Weather()
        self.grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), [], self.weather.down, self.weather.up)
        for worker in range(4):
            self.grid.join(worker, public_key=key_of(worker))
        self.client = _client.FederatedClient(alg, loader(toy.shards))
        self.file = folder / "checkpoint.npz"
        self.file.unlink(missing_ok=True)
        self.server = _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=self.file)
        _checkpoint.save_checkpoint(self.file, self.server._checkpoint())
        self.backups = [self.file.read_bytes()]

    def round(self, plan: dict[tuple[str, int], tuple[str, int]], reorder: bool = False) -> Any:
        self.weather.plan = plan
        late, held = self.weather.released()
        self.grid.pending_replies = [] if reorder else late
        for message in held if reorder else []:  # an old broadcast, before the new one or after it
            self.grid.deliver(message)
        stats = self.server.run_round(self.grid)
        self.seen["rounds"] += 1
        for message in [] if reorder else held:
            self.grid.deliver(message)
        self.grid.pending_replies += late if reorder else []
        if stats is not None:
            self.backups.append(self.file.read_bytes())
        return stats

    def restart(self, age: int, release: Sequence[int] = ()) -> None:
        self.file.write_bytes(self.backups[-1 - age % len(self.backups)])
        options: Any = dict(checkpoint_path=self.file, release_workers=release)
        self.server = _server.FederatedServer(self.alg, self.toy.theta0, KEY, **options)

    def check(self) -> int:
        """Check that the aggregate is the sum of what the workers remember, as the server will tell each of them.

        Returns:
            How many workers were in step, so that their own memory could be compared with the server's copy.
        """
        server, total = self.server, np.zeros(63)
        assert np.all(np.isfinite(np.asarray(server.state.params)))
        if not self.alg.memory.is_persistent:  # nothing is summed up: a message that is lost is missing from its round
            return 0
        compared = 0
        for worker in range(4):
            memory = np.asarray(server._workers.contributions[worker])
            total += memory
            for context in self.grid.contexts.values():
                kept = _client.load_state(context, self.client._likes)
                if context.node_config["partition-id"] != worker or kept is None:
                    continue
                found = {kept.base: kept.before, kept.last: kept.after}.get(server._workers.accepted[worker])
                if found is not None:  # else it is out of step, and will say so
                    mine = found.memory_state if not isinstance(found.memory_state, tuple) else found.memory_state[0]
                    np.testing.assert_allclose(mine, memory, rtol=1e-5, atol=1e-6)
                    compared += 1
        np.testing.assert_allclose(server.state.aggregate, total, rtol=1e-5, atol=1e-6)
        return compared


LAZY = ["diana", "ef21_sgdm", "laq", "two_laq"]
nodes = st.integers(0, 3)


class Federated(RuleBasedStateMachine):
    """Anything may happen between two rounds and to every message of a round; the invariant holds after each event.

    seen: counts the checks, and the workers that were compared in them.
    """

    def __init__(self, folder: Path, seen: Counter[str]) -> None:
        super().__init__()
        self.folder, self.seen = folder, seen

    @initialize(name=st.sampled_from(LAZY), short_history=st.sampled_from([0, 256]))
    def begin(self, name: str, short_history: int) -> None:
        toy, _protocol.SHORT_HISTORY = make_toy(np.float32), short_history
        self.faulty = Faulty(make(name, toy), toy, self.folder, self.seen)
        self.fresh = 200

    @rule(
        faults=st.lists(st.sampled_from(FAULTS), min_size=8, max_size=8),
        place=st.integers(0, 10**6),
        reorder=st.booleans(),
    )
    def faulty_round(self, faults: list[str], place: int, reorder: bool) -> None:
        there = sorted(self.faulty.grid.contexts)[:4]
        keys = [(way, node) for way in ("down", "up") for node in there]
        plan = {key: (fault, place + i) for i, (key, fault) in enumerate(zip(keys, faults, strict=False))}
        self.faulty.round(plan, reorder)

    @rule()
    def calm_round(self) -> None:
        self.faulty.round({})

    @rule(node=nodes, state=st.sampled_from(["lost", "old", "cut"]))
    def crash(self, node: int, state: str) -> None:
        """A client comes back without its state, with that of an earlier round, or with a damaged one."""
        contexts = list(self.faulty.grid.contexts.values())
        if node < len(contexts):
            context = contexts[node]
            if state == "lost":
                context.state = RecordDict()
            elif state == "old":
                old, self.old = getattr(self, "old", {}), {**getattr(self, "old", {}), context.node_id: context.state}
                context.state = old.get(context.node_id, RecordDict())
            elif _protocol.RECORD_KEY in context.state:
                parts = dict(context.state.config_records[_protocol.RECORD_KEY])
                parts["arrays"] = parts["arrays"][:-1]  # pyright: ignore[reportIndexIssue]
                context.state = RecordDict({_protocol.RECORD_KEY: ConfigRecord(parts)})

    @rule(node=nodes, with_state=st.booleans(), change=st.sampled_from(["node", "key", "claim"]), age=st.integers(0, 3))
    def move(self, node: int, with_state: bool, change: str, age: int) -> None:
        """A client goes and comes as another node: with its key, a new key after a release, or another's partition-id."""
        grid = self.faulty.grid
        old = list(grid.contexts)[node]
        context, self.fresh = grid.leave(old), self.fresh + 1
        worker, key = int(context.node_config["partition-id"]), grid.public_keys[old]
        claim = (worker + 1) % 4 if change == "claim" else worker
        new = grid.join(claim, self.fresh, key_of(self.fresh) if change == "key" else key)
        if with_state:
            grid.contexts[new].state = context.state
        if change == "claim":  # its replies are refused until its owner has corrected it
            self.faulty.round({})
            grid.contexts[new].node_config["partition-id"] = worker
        if change == "key":
            self.faulty.restart(age, [worker])

    @rule(worker=nodes)
    def intrude(self, worker: int) -> None:
        """A node with a key of its own claims a worker and is refused, as long as the owner is known."""
        self.fresh += 1
        intruder = self.faulty.grid.join(worker, self.fresh, key_of(self.fresh))
        known = self.faulty.server._workers.owners[worker] != b""
        self.faulty.round({})
        registered = intruder in self.faulty.server._roster.nodes
        self.faulty.grid.leave(intruder)
        assert not (known and registered)

    @rule(age=st.integers(0, 3))
    def restart(self, age: int) -> None:
        self.faulty.restart(age)

    @invariant()
    def sum_of_memories(self) -> None:
        if hasattr(self, "faulty"):
            self.seen.update(checks=1, compared=self.faulty.check())

    def stolen(self) -> list[int]:
        """The ids that the server holds for a key that is not their node's: only a release gives them to that node."""
        grid, owners = self.faulty.grid, self.faulty.server._workers.owners
        keys = {int(c.node_config["partition-id"]): grid.public_keys[node] for node, c in grid.contexts.items()}
        return [m for m, key in keys.items() if owners[m] not in (b"", _roster.hash_node_key(key))]

    def teardown(self) -> None:
        """Check that all four workers are in step after four calm rounds."""
        if hasattr(self, "faulty"):
            # An id belongs to the first key that claimed it, be it an intruder's, until a release. The owners are those
            # of the checkpoint that the server starts from, so the ids to release are found with that checkpoint.
            if self.stolen():
                self.faulty.restart(0)
                self.faulty.restart(0, self.stolen())
            for _ in range(4):
                self.faulty.round({})
            assert self.faulty.check() == 4
            for context in self.faulty.grid.contexts.values():
                kept = _client.load_state(context, self.faulty.client._likes)
                accepted = self.faulty.server._workers.accepted[int(context.node_config["partition-id"])]
                assert kept is not None
                assert accepted in (kept.base, kept.last)


@pytest.mark.parametrize(("examples", "steps"), [(15, 14), pytest.param(75, 50, marks=pytest.mark.long)])
def test_the_aggregate_is_the_sum_of_the_memories_whatever_happens(
    examples: int, steps: int, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    caplog.set_level(logging.CRITICAL, "laqjax.federation")
    monkeypatch.setattr(_roster, "FAILURE_INTERVAL", 0.0)
    monkeypatch.setattr(_roster, "RETRY_INTERVAL", 0.0)  # a hello message may be damaged
    monkeypatch.setattr(_protocol, "SHORT_HISTORY", 0)  # the machine draws it
    some = settings(max_examples=examples, stateful_step_count=steps, suppress_health_check=[HealthCheck.too_slow])
    machine: Any = partial(Federated, tmp_path, seen)
    run_state_machine_as_test(machine, settings=some)
    assert (
        seen["compared"] > seen["checks"] > 10 * examples
    )  # more than one worker in step at a check, between all these faults
    assert seen["rounds"] > (2000 if examples == 75 else 100)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) for name in ("laq", "two_laq", "gd", "dgc")]
)
def test_it_converges_through_faults(
    name: str, tmp_path: Path, toy: Toy, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every message meets a fault with probability 0.3, and every tenth round a client or the server loses its state.

    Without a memory too, but a message that is lost is then lost, and the model trembles.
    """
    caplog.set_level(logging.CRITICAL, "laqjax.federation")
    monkeypatch.setattr(_roster, "FAILURE_INTERVAL", 0.0)
    monkeypatch.setattr(_roster, "RETRY_INTERVAL", 0.0)
    alg, rng = make(name, toy), np.random.default_rng(0)
    faulty, compared = Faulty(alg, toy, tmp_path), []
    while int(faulty.server.state.round) < 150:
        keys = [(way, 100 + m) for way in ("down", "up") for m in range(4)]
        plan = {key: (str(rng.choice(FAULTS[3:])), int(rng.integers(10**6))) for key in keys if rng.random() < 0.3}
        faulty.round(plan, bool(rng.random() < 0.5))
        compared.append(faulty.check())
        if rng.random() < 0.1:
            list(faulty.grid.contexts.values())[rng.integers(4)].state = RecordDict()
        if rng.random() < 0.05:
            faulty.restart(int(rng.integers(3)))
    assert not alg.memory.is_persistent or np.mean(compared) > 3  # of the four
    calm = laqjax.run(alg, toy.theta0, toy.shards, 150, KEY).info.loss
    found = laqjax.run(alg, faulty.server.state.params, toy.shards, 1, KEY).info.loss[0]  # over all four workers
    assert found < calm[-1] + (0.005 if alg.memory.is_persistent else 0.3) * (calm[0] - calm[-1])


def test_a_restarted_server_goes_on_as_if_it_had_not_stopped(tmp_path: Path, toy: Toy) -> None:
    alg = make("laq", toy)
    straight, server, _ = federated(alg, toy.theta0, toy.shards, 14)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4))
    stats = []
    for end in (5, 9, 14):  # a new process each time
        again = _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=tmp_path / "state.npz")
        stats += list(again.run(grid, end))
    np.testing.assert_array_equal(column(stats, "sent"), column(straight, "sent"))
    np.testing.assert_array_equal(column(stats, "loss"), column(straight, "loss"))
    np.testing.assert_array_equal(again.state.params, server.state.params)  # pyright: ignore[reportPossiblyUnboundVariable]
    with pytest.raises(ValueError, match="is of a run with another rule: must be of this run"):
        _server.FederatedServer(make("qgd", toy), toy.theta0, KEY, checkpoint_path=tmp_path / "state.npz")
    whole = (tmp_path / "state.npz").read_bytes()
    for damaged in (b"no", whole[: len(whole) // 2]):
        (tmp_path / "state.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged"):
            _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=tmp_path / "state.npz")


@pytest.mark.parametrize("states", ["kept", "damaged", "none"])
def test_a_restart_of_everything_goes_on_from_the_checkpoint(
    states: str, tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperLink was killed after the clients' work and before the checkpoint; the next run has other nodes."""
    alg, path = make("laq", toy), tmp_path / "results" / "state.npz"
    app = _client.client_app(alg, loader(toy.shards), state_dir=None if states == "none" else tmp_path / "states")
    grid = InProcessGrid(app, range(4))
    server = _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=path)
    list(server.run(grid, 6))
    with monkeypatch.context() as patch:
        patch.setattr(_server, "save_checkpoint", lambda *_: None)
        server.run_round(grid)
    for file in tmp_path.glob("states/*") if states == "damaged" else []:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    grid = InProcessGrid(app, [])
    for worker in range(4):
        grid.join(worker, node=500 + worker)
    server = _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=path)
    stats = list(server.run(grid, 12))
    np.testing.assert_array_equal(column(stats, "round"), np.arange(6, 12))
    assert column(stats, "accepted").all()
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)
    if states == "kept":
        straight, calm, _ = federated(alg, toy.theta0, toy.shards, 12)
        np.testing.assert_array_equal(column(stats, "sent"), column(straight, "sent")[6:])
        np.testing.assert_array_equal(server.state.params, calm.state.params)
    else:
        np.testing.assert_array_equal(column(stats, "bits_up")[0], [32 * 63] * 4)


@pytest.mark.parametrize("found", [None, 0])
def test_a_checkpoint_of_another_format_is_refused(found: int | None, tmp_path: Path, toy: Toy) -> None:
    alg, path = algorithms.gd(toy.oracle, **RULE), tmp_path / "state.npz"
    _checkpoint.save_checkpoint(path, _server.FederatedServer(alg, toy.theta0, KEY)._checkpoint())
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files if name != "format"}
    if found is not None:
        arrays["format"] = np.asarray(found)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"is of format {found}: must be format 2"):
        _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=path)


def test_a_restarted_server_has_a_later_session_though_the_clock_went_back(tmp_path: Path, toy: Toy) -> None:
    alg, path = algorithms.gd(toy.oracle, **RULE), tmp_path / "state.npz"
    contents = _server.FederatedServer(alg, toy.theta0, KEY)._checkpoint()
    _checkpoint.save_checkpoint(path, contents._replace(session=2**62))
    assert _server.FederatedServer(alg, toy.theta0, KEY, checkpoint_path=path)._session == 2**62 + 1


def test_a_client_state_of_another_format_is_ignored(toy: Toy) -> None:
    client = _client.FederatedClient(algorithms.gd(toy.oracle, **RULE), loader(toy.shards))
    context = InProcessGrid(_client.client_app(algorithms.gd(toy.oracle, **RULE), loader(toy.shards)), [0]).contexts[
        100
    ]
    arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), client._likes)
    upload = 3, bytes(8)
    _client.save_state(context, 1, 4, upload, upload, _protocol.tree_to_bytes(arrays))
    kept = _client.load_state(context, client._likes)
    assert kept is not None
    assert kept[:4] == (1, 4, upload, upload)
    parts = context.state.config_records[_protocol.RECORD_KEY]
    parts["head"] = b"\1" + parts["head"][1:]  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    assert _client.load_state(context, client._likes) is None


@pytest.mark.parametrize("short_history", [0, 256])
def test_who_is_out_of_step_sends_everything_once(
    short_history: int, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient of the round takes the place of what the server had of it."""
    monkeypatch.setattr(_protocol, "SHORT_HISTORY", short_history)
    alg = make("laq", toy)
    _, server, grid = federated(alg, toy.theta0, toy.shards, 6)
    grid.contexts[102].state = RecordDict()
    if short_history == 0:  # it has no history to compute the next one from
        missed = server.run_round(grid)
        assert not missed.accepted[2]
        assert missed.accepted.sum() == 3
    first, second = (server.run_round(grid) for _ in range(2))
    assert first.bits_up[2] == 32 * 63
    assert second.bits_up[2] in (0, 32 + 3 * 63 + 3)
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_an_inner_optimizer_rolls_back_with_a_lost_upload(toy: Toy) -> None:
    """Its state is of the local steps whose change arrived; after lost state it starts anew."""
    alg, dropped, losing = make("diloco_ef", toy), [0], [False]
    likes = _client.FederatedClient(alg, loader(toy.shards))._likes

    def up(message: Message) -> list[Message]:
        drops = losing[0] and message.metadata.src_node_id == 101
        dropped[0] += drops
        return [] if drops else [message]

    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), uplink_fault=up)
    server = _server.FederatedServer(alg, toy.theta0, KEY, round_timeout=0.1)

    def steps_after(event: Callable[[Any], Any]) -> int:
        """Return the local steps of worker 1, after the round in which the event came."""
        stats = server.run_round(grid)
        for _ in range(9):
            if event(stats):
                break
            stats = server.run_round(grid)
        assert event(stats)
        return int(_client.load_state(grid.contexts[101], likes).after.oracle_state[0].count)  # pyright: ignore[reportOptionalMemberAccess]

    list(server.run(grid, 1))
    steps = steps_after(lambda stats: stats.sent[1])
    losing[0] = True
    assert steps_after(lambda stats: dropped[0]) == steps + 2
    losing[0] = False
    assert steps_after(lambda stats: stats.sent[1]) == steps + 2
    grid.contexts[101].state = RecordDict()
    assert steps_after(lambda stats: stats.sent[1]) == 2


def test_a_worker_that_joins_late(toy: Toy) -> None:
    alg = make("laq", toy)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(3))
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    stats = list(server.run(grid, 5, workers=3))
    grid.join(3)
    stats += list(server.run(grid, 10, workers=3))
    assert not column(stats, "accepted")[:6, 3].any()  # greeted in round 5
    assert column(stats, "sent")[6, 3]
    assert column(stats, "accepted")[6:, 3].all()
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_a_round_without_an_answer_comes_again(toy: Toy) -> None:
    weather = Weather()
    alg = make("laq", toy)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), weather.down, weather.up)
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    list(server.run(grid, 3))
    weather.plan = {("up", 100 + m): ("lost", 0) for m in range(4)}
    before = server.state
    assert server.run_round(grid) is None
    assert server.state is before
    with pytest.raises(RuntimeError, match="no valid reply in round 3 after 2 attempts"):
        list(server.run(grid, 9, max_empty_rounds=2))
    weather.plan = {}
    assert [stats.round for stats in server.run(grid, 5)] == [3, 4]
    empty = InProcessGrid(_client.client_app(alg, loader(toy.shards)), [])
    with pytest.raises(RuntimeError, match="0 workers registered: must be 4"):
        list(_server.FederatedServer(alg, toy.theta0, KEY, round_timeout=0.01).run(empty, 1, max_empty_rounds=1))


# ---- nodes that do not answer -------------------------------------------------------------------------------------


class BlockingGrid(InProcessGrid):
    """A grid that pulls by id, as a SuperLink does: some nodes announce a reply that never comes, some do not answer.

    gates: node -> event that its replies wait for, inside `pull_messages`.
    lazy: nodes whose replies no pull finds.
    broken: nodes whose replies no pull can read.
    delays: node -> seconds until a pull finds its replies.
    """

    is_synchronous = False

    def __init__(self, *args: Any) -> None:
        self.gates: dict[int, threading.Event] = {}
        self.lazy: set[int] = set()
        self.broken: set[int] = set()
        self.delays: dict[int, float] = {}
        super().__init__(*args)

    def pull_messages(self, message_ids: Any) -> list[Message]:
        names, found = set(message_ids), []
        for reply in list(self.pending_replies):
            node, age = reply.metadata.src_node_id, time.time() - reply.metadata.created_at
            is_there = node not in self.lazy and age >= self.delays.get(node, 0.0)
            if reply.metadata.reply_to_message_id in names and is_there:
                if node in self.gates:
                    assert self.gates[node].wait(60), "the round waited for a reply that never comes"
                if node in self.broken:
                    raise ValueError("damaged")
                self.pending_replies.remove(reply)
                found.append(reply)
        return found

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        """Wait for all replies, as Flower's grids do."""
        names, replies, end = set(self.push_messages(messages)), [], time.monotonic() + (timeout or 0.0)
        while len(replies) < len(names) and time.monotonic() < end:
            replies += self.pull_messages(names)
            time.sleep(0.01)
        return replies


@pytest.fixture
def blocking(toy: Toy) -> Iterator[Callable[..., tuple[BlockingGrid, _server.FederatedServer]]]:
    """Builder of a grid and its server after two rounds without a fault; the deadline is for the rounds after them."""
    servers: list[_server.FederatedServer] = []

    def build(timeout: float, **options: Any) -> tuple[BlockingGrid, _server.FederatedServer]:
        alg = algorithms.qgd(toy.oracle, bits=3, **RULE)
        grid = BlockingGrid(_client.client_app(alg, loader(toy.shards)), range(4))
        servers.append(server := _server.FederatedServer(alg, toy.theta0, KEY, **options))
        assert column(list(server.run(grid, 2)), "accepted").all()
        server._timeout = timeout
        return grid, server

    yield build
    for server in servers:  # end the threads
        server._poller._pending.clear()


NEVER = 10.0**6  # a test that waits so long does not end


@pytest.mark.parametrize("fault", ["lazy", "gates"])
def test_a_node_that_does_not_answer_costs_a_deadline_and_then_nothing(fault: str, blocking: Any, caplog: Any) -> None:
    grid, server = blocking(1.0, max_absent_rounds=2)
    gate = threading.Event()
    getattr(grid, fault).update({102: gate} if fault == "gates" else {102})
    for missed in (1, 2):  # the deadline ends the wait
        stats = server.run_round(grid)
        assert stats is not None
        assert list(stats.accepted) == [True, True, False, True]
        assert list(stats.absent) == [0, 0, missed, 0]
    assert [line.getMessage() for line in caplog.records] == [
        "worker 2 was absent in 2 rounds: the server no longer waits for it"
    ]
    while server._poller.waiting_nodes():  # the copy of a broadcast expires shortly after the deadline
        time.sleep(0.01)
    server._timeout = NEVER
    for _ in range(3):  # nothing waits for it
        stats = server.run_round(grid)
        assert stats is not None
        assert list(stats.accepted) == [True, True, False, True]
    # twice in each round that waited; while its last broadcast may still be answered, it gets no other
    assert sum(reply.metadata.src_node_id == 102 for reply in grid.pending_replies) == 5
    gate.set()
    grid.lazy.clear()
    grid.gates.clear()
    while (stats := server.run_round(grid)) and not stats.accepted[2]:
        pass  # a late answer is enough to be waited for again
    stats = server.run_round(grid)
    assert stats is not None
    assert stats.accepted.all()
    assert not stats.absent.any()
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_a_message_that_a_killed_node_lost_is_sent_again(blocking: Any, caplog: Any) -> None:
    (grid, server), (quiet, undisturbed) = blocking(1.0), blocking(1.0)
    calm = undisturbed.run_round(quiet)
    lost: list[Message] = []

    def lose(message: Message) -> list[Message]:
        if message.metadata.dst_node_id == 102 and not lost:
            lost.append(message)
            return []
        return [message]

    grid.downlink_fault = lose
    stats = server.run_round(grid)
    assert lost
    assert stats.accepted.all()
    assert not stats.absent.any()
    assert stats.bytes_down[2] > 1.9 * stats.bytes_down[1]
    assert server.run_round(grid).accepted.all()
    assert not caplog.records
    np.testing.assert_array_equal(stats.sent, calm.sent)
    assert stats.loss == calm.loss


def test_a_slow_node_that_answers_twice_counts_once(blocking: Any) -> None:
    grid, server = blocking(2.0)
    grid.delays[102] = 1.1  # after half of the time
    stats = server.run_round(grid)
    assert stats.accepted.all()
    grid.delays.clear()
    for _ in range(3):
        stats = server.run_round(grid)
        assert stats.accepted.all()
        assert not stats.absent.any()
        assert not stats.rejected.any()
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_a_round_goes_on_when_enough_have_answered(blocking: Any) -> None:
    grid, server = blocking(NEVER, min_replies=3)
    grid.lazy = {102}
    for _ in range(3):
        stats = server.run_round(grid)
        assert stats is not None
        assert list(stats.accepted) == [True, True, False, True]


def test_a_slow_worker_that_comes_back_is_waited_for(blocking: Any) -> None:
    """It would never answer in the time of the others."""
    grid, server = blocking(1.0, max_absent_rounds=1)
    grid.lazy = {102}
    assert not server.run_round(grid).accepted[2]
    server._timeout = NEVER
    grid.lazy, grid.delays = set(), {102: 0.3}
    late = 0
    while not server.run_round(grid).accepted[2]:
        late += 1
        assert late < 1000
        time.sleep(0.002)
    assert late


def test_a_reply_that_cannot_be_pulled_is_refused(blocking: Any, caplog: Any) -> None:
    grid, server = blocking(NEVER)
    grid.broken = {102}
    stats = server.run_round(grid)
    assert stats is not None
    assert list(stats.accepted) == [True, True, False, True]
    assert (
        "worker 2 (node 102) rejected: the client app failed: reply cannot be pulled: ValueError: damaged"
        in caplog.text
    )


def test_an_error_of_flower_itself_is_no_answer(blocking: Any, caplog: Any) -> None:
    """As for a node that is offline."""
    grid, server = blocking(NEVER)
    grid.uplink_fault = lambda message: [
        of_node(failed(message), 1) if message.metadata.src_node_id == 102 else message
    ]
    stats = server.run_round(grid)
    assert stats is not None
    assert list(stats.accepted) == [True, True, False, True]
    assert list(stats.absent) == [0, 0, 1, 0]
    assert not caplog.records


def test_a_greeting_holds_up_no_round(blocking: Any) -> None:
    grid, server = blocking(NEVER)
    grid.leave(102)
    grid.lazy = {500}
    grid.join(2, node=500)
    for _ in range(2):
        stats = server.run_round(grid)
        assert stats is not None
        assert list(stats.accepted) == [True, True, False, True]
    hellos = [m for m in grid.pending_replies if m.metadata.src_node_id == 500]
    assert len(hellos) == 1  # it is not greeted again before the first greeting expires
    grid.lazy.clear()
    while not stats.accepted[2]:  # pyright: ignore[reportPossiblyUnboundVariable, reportOptionalMemberAccess]
        stats = server.run_round(grid)
    assert server._roster.nodes[500] == 2


def test_all_workers_may_be_absent_and_come_back(blocking: Any) -> None:
    grid, server = blocking(0.1, max_absent_rounds=1)
    grid.lazy = set(grid.contexts)
    assert [server.run_round(grid) for _ in range(2)] == [None, None]
    server._timeout = NEVER
    threading.Timer(0.2, grid.lazy.clear).start()  # they are waited for
    assert server.run_round(grid) is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_replies", 0),
        ("min_replies", 5),
        ("max_absent_rounds", 0),
        ("max_rejections", 0),
        ("outlier_factor", 0.0),
        ("round_timeout", -1.0),
    ],
)
def test_options_out_of_range(name: str, value: float, toy: Toy) -> None:
    options: Any = {name: value}
    with pytest.raises(ValueError, match=f"{name} = {value}: must be a"):
        _server.FederatedServer(algorithms.gd(toy.oracle, **RULE), toy.theta0, KEY, **options)


# ---- hostile input -----------------------------------------------------------------------------------------------


def forged(reply: Message, head: dict[str, Any] | None = None, name: bool = True, **parts: Any) -> Message:
    """A reply with other contents, its head consistent again: billed bits and digest fit the body unless `name` is False."""
    up, there = _protocol.parse_message(_protocol.ReplyHeader, reply)
    there = {**there, **parts}
    if name and "body" in parts:
        base = up.base, up.base_digest
        up = up._replace(size=len(there["body"]), digest=_protocol.upload_id(there["body"], up.round, base)[1])
    up = up._replace(**head or {})
    reply.content = _protocol.make_record(up, **there)
    return reply


def body_of(reply: Message) -> bytes:
    return _protocol.parse_message(_protocol.ReplyHeader, reply)[1]["body"]


def grid_message(bits: int, value: float, size: int = 63, dtype: Any = np.float32) -> bytes:
    """An honest message of another compressor, size, dtype or magnitude."""
    with jax.enable_x64(dtype == np.float64):
        target = jnp.asarray(np.linspace(-value, value, size), dtype)
        scheme = compressors.grid(bits)
        keys: Any = None
        return laqjax.compressors.to_bytes(scheme, scheme.encode(target, keys), target)


HOSTILE: dict[str, tuple[Callable[[Message], Message], str]] = {
    "too short": (lambda r: forged(r, body=body_of(r)[:-1]), "field 'codes' needs 3 bits for each of 63"),
    "too long": (lambda r: forged(r, body=body_of(r) + b"\0"), "a message of 29 bytes: must be 28"),
    "bits behind the end": (lambda r: forged(r, body=body_of(r)[:-1] + b"\xff"), "with zeros after"),
    "empty": (lambda r: forged(r, body=b""), "a message of 0 bytes"),
    "another b": (lambda r: forged(r, body=grid_message(4, 0.1)), "a message of 36 bytes: must be 28"),
    "another p": (
        lambda r: forged(r, body=grid_message(3, 0.1, 60)),
        "a message of 27 bytes",
    ),
    "another dtype": (lambda r: forged(r, body=grid_message(3, 0.1, dtype=np.float64)), "a message of 32 bytes"),
    "another scheme": (lambda r: forged(r, {"scheme": bytes(8)}), "scheme = b'"),
    "not a number": (lambda r: forged(r, body=np.float32(np.nan).tobytes() + body_of(r)[4:]), "must be finite"),
    "infinite": (lambda r: forged(r, body=np.float32(np.inf).tobytes() + body_of(r)[4:]), "must be finite"),
    "absurd": (
        lambda r: forged(r, body=np.float32(1e9).tobytes() + body_of(r)[4:]),
        "absolute value = .*: must be at most",
    ),
    "an earlier round": (lambda r: forged(r, {"round": 1}), "round = 1: must be 3"),
    "a later round": (lambda r: forged(r, {"round": 9}), "round = 9: must be 3"),
    "another session": (lambda r: forged(r, {"session": 1}), "session = 1: must be"),
    "another worker's": (lambda r: forged(r, {"worker": 2}), "worker = 2: must be 1"),
    "a forged base": (lambda r: forged(r, {"base": 2, "base_digest": bytes(8)}), "base = upload of round 2: must be"),
    "a forged digest": (lambda r: forged(r, {"digest": bytes(8)}), "must be the size of the body, with its digest"),
    "another size billed": (lambda r: forged(r, {"size": 1}), "size = 1 for a body"),
    "another kind": (lambda r: forged(r, {"kind": 77}), "kind = 77, loss = .*: must be kind"),
    "everything, too short": (lambda r: forged(r, {"kind": _protocol.REPLY_FULL}), "needs 32 bits for each of 63"),
    "a loss beyond all numbers": (lambda r: forged(r, {"loss": 1e300}), "a finite loss"),
    "a negative time": (lambda r: forged(r, {"compute": -1.0}), "compute = -1.0, .*: must be from 0 to 1e\\+06"),
    "an endless time": (lambda r: forged(r, {"pack": float("inf")}), "pack = inf, .*: must be from 0"),
    "no time": (lambda r: forged(r, {"pack": float("nan")}), "pack = nan, .*: must be from 0"),
    "too many gradients": (lambda r: forged(r, {"gradients": 2**31 - 1}), "gradients = 2147483647: must be from 0"),
    "fewer than no gradients": (lambda r: forged(r, {"gradients": -1}), "gradients = -1: must be from 0"),
    "silence that is billed": (lambda r: silenced(r, size=10**9), "size = 1000000000 for a body of 0 bytes"),
    "silence with a body": (lambda r: silenced(r, size=28, body=bytes(28)), "size = 28 for a body of 28 bytes"),
    "no loss": (lambda r: forged(r, {"loss": float("nan")}), "a finite loss"),
    "no head": (lambda r: with_content(r, {}), "must be a head"),
    "a short head": (lambda r: with_content(r, {"head": b"short"}), "must be a head"),
    "a word for a head": (lambda r: with_content(r, {"head": "word"}), "must be a head"),
    "a number for a body": (lambda r: with_content(r, {"head": bytes(77), "body": 3}), "must be a head"),
    "more parts": (lambda r: with_content(r, {"head": bytes(77), "more": b""}), "must be a head"),
    "nothing": (lambda r: empty(r), "must be a head"),
    "an error": (lambda r: failed(r), "the client app failed: out of memory"),
    "an error without a reason": (lambda r: failed(r, None), "the client app failed: None"),
    "a long error": (
        lambda r: failed(r, 10**6 * "x" + "\n\x1b[2J\u2028 why"),
        r"the client app failed: \.\.\. x+\?\?\[2J\? why",
    ),
    "a reply of an unknown node": (lambda r: of_node(r, 999), "sender is not registered"),
    "a reply of another node": (lambda r: of_node(r, 102), "worker = 1: must be 2"),
}


def silenced(reply: Message, size: int, body: bytes = b"") -> Message:
    return forged(reply, {"kind": _protocol.REPLY_SILENT, "size": size, "digest": bytes(8)}, body=body)


def with_content(reply: Message, parts: Any) -> Message:
    reply.content = RecordDict({_protocol.RECORD_KEY: ConfigRecord(parts)})
    return reply


def empty(reply: Message) -> Message:
    reply.content = RecordDict()
    return reply


def failed(reply: Message, reason: str | None = "out of memory") -> Message:
    reply.__dict__["_content"], reply.__dict__["_error"] = None, Error(0, reason)
    return reply


def of_node(reply: Message, node: int) -> Message:
    reply.metadata.__dict__["_src_node_id"] = node
    return reply


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_is_refused(name: str, toy: Toy, caplog: Any) -> None:
    """In words, once; the round goes on without it, and the aggregate is that of the others."""
    hostile, reason = HOSTILE[name]
    alg = algorithms.qgd(toy.oracle, bits=3, **RULE)  # everybody sends in every round
    at_work: list[bool] = []

    def up(message: Message) -> list[Message]:
        return [hostile(message)] if at_work and message.metadata.src_node_id == 101 else [message]

    def silent(message: Message) -> list[Message]:
        return [] if at_work and message.metadata.src_node_id == 101 else [message]

    servers = []
    for fault in (up, silent):
        at_work.clear()
        grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), uplink_fault=fault)
        server = _server.FederatedServer(alg, toy.theta0, KEY)
        list(server.run(grid, 3))
        at_work.append(True)
        caplog.clear()
        stats = server.run_round(grid)
        assert stats is not None
        assert list(stats.accepted) == [True, False, True, True]
        assert stats.sent[2:].all()
        if fault is up:
            lines = [line.getMessage() for line in caplog.records]
            assert len(lines) == stats.rejections == 1
            assert "rejected: " in lines[0]
            assert len(lines[0]) <= 300
            assert lines[0].isprintable()
            assert "node " in lines[0]
            assert re.search(reason, lines[0]), lines[0]
        servers.append(server)
    np.testing.assert_array_equal(servers[0].state.aggregate, servers[1].state.aggregate)
    at_work.clear()
    server, grid = servers[1], grid  # pyright: ignore[reportPossiblyUnboundVariable]
    assert server.run_round(grid).accepted.all()


def scaled(reply: Message, value: float) -> Message:
    """Its message with another largest value."""
    return forged(reply, body=np.float32(value).tobytes() + body_of(reply)[4:])


def attacked(toy: Toy, workers: int, up: Any, rounds: int = 3, **options: Any) -> Any:
    """(stats of some rounds, server, grid) of the first workers of the toy, whose replies `up` may change."""
    alg = algorithms.qgd(toy.oracle, lr=0.05, num_workers=workers, bits=3)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(workers), uplink_fault=up)
    server = _server.FederatedServer(alg, toy.theta0, KEY, **options)
    return list(server.run(grid, rounds)), server, grid


def test_the_first_message_is_no_measure_of_the_others(toy: Toy) -> None:
    """A tiny one, before any other arrives."""
    seen: list[Message] = []

    def up(message: Message) -> list[Message]:
        if message.metadata.message_type == "query":
            return [message]
        seen.append(message)
        if message.metadata.src_node_id == 100:
            return [scaled(message, 1e-30)]
        return [message] if len(seen) > 4 else []

    stats, _, _ = attacked(toy, 4, up)
    np.testing.assert_array_equal(column(stats, "accepted"), [[True, False, False, False], *[[True] * 4] * 2])
    assert not column(stats, "rejections").any()


def test_the_bound_of_a_message(toy: Toy) -> None:
    """The median over all workers: of those without an accepted message, what they send now."""

    def outliers(sizes: dict[int, float], known: dict[int, float]) -> list[int]:
        head: Any = None
        replies = {m: _admission.AcceptedReply(100 + m, head, toy.theta0, size) for m, size in sizes.items()}
        return sorted(_admission.find_outliers(replies, known, 1e3))

    tiny = dict.fromkeys(range(3), 1e-30)
    assert outliers(dict.fromkeys(range(3, 10), 1.0), tiny) == []  # though the first three agree
    assert outliers({3: 1.0}, tiny) == [3]
    assert outliers({0: 1e30, 1: 1.0, 2: 1.0}, {}) == [0]
    assert outliers({0: 1.0}, {0: 1e-30, 1: 1e-30}) == []  # two are no measure
    assert outliers({0: 1.0}, {0: 1e-30, 1: 1e-30, 2: 0.0}) == []
    assert outliers({0: 1.0}, {0: 1.0, 1: 1e-30, 2: 1e-30}) == [0]


def test_of_two_workers_a_huge_message_stops_neither_the_run_nor_a_restart(
    tmp_path: Path, toy: Toy, caplog: Any
) -> None:
    def up(message: Message) -> list[Message]:
        at_work = message.metadata.src_node_id == 101 and message.metadata.message_type == "train"
        return [scaled(message, 1e30) if at_work else message]

    options: Any = dict(checkpoint_path=tmp_path / "state.npz", max_rejections=2)
    stats, server, _ = attacked(toy, 2, up, **options)
    np.testing.assert_array_equal(column(stats, "accepted"), [[True, False]] * 3)
    np.testing.assert_array_equal(column(stats, "rejected"), [[0, 1], [0, 2], [0, 3]])
    assert server.excluded_workers == {1}
    said = [line.getMessage() for line in caplog.records]
    assert sum("largest absolute value = 1e+30: must keep the model and its step finite" in line for line in said) == 3
    assert sum("worker 1 was rejected in 2 rounds in a row" in line for line in said) == 1
    assert np.all(np.isfinite(np.asarray(server.state.params)))
    again, server, _ = attacked(toy, 2, lambda message: [message], rounds=6, **options)  # it is honest now
    assert column(again, "accepted")[1:].all()
    assert not server.excluded_workers


def test_a_step_that_is_not_finite_is_not_saved(tmp_path: Path, toy: Toy) -> None:
    """Whoever causes it: here all workers, as with a learning rate that is too large."""
    path, at_work = tmp_path / "state.npz", []

    def up(message: Message) -> list[Message]:
        return [scaled(message, 1e30) if at_work else message]

    _, server, grid = attacked(toy, 2, up, checkpoint_path=path)
    before, saved = server.state, path.read_bytes()
    at_work.append(True)
    with pytest.raises(RuntimeError, match="round 3: the model or its step is not finite, even without"):
        server.run_round(grid)
    assert server.state is before
    assert path.read_bytes() == saved


def test_an_honest_worker_with_large_features_is_not_refused_in_silence(toy: Toy, caplog: Any) -> None:
    x = np.array(toy.shards.x, np.float32)
    x[3] *= 100
    larger = toy._replace(shards=toy.shards._replace(x=jnp.asarray(x)))
    honest: Any = lambda message: [message]  # noqa: E731
    stats, server, _ = attacked(larger, 4, honest, outlier_factor=20.0, max_rejections=3)
    np.testing.assert_array_equal(column(stats, "rejected")[:, 3], [1, 2, 3])
    assert server.excluded_workers == {3}
    assert "worker 3 was rejected in 3 rounds in a row" in caplog.text
    assert "raise outlier_factor" in caplog.text
    stats, server, _ = attacked(larger, 4, honest)  # with the default
    assert column(stats, "accepted").all()
    assert not server.excluded_workers


def test_a_repeated_reply_counts_once(toy: Toy, caplog: Any) -> None:
    alg = algorithms.gd(toy.oracle, **RULE)
    app = _client.client_app(alg, loader(toy.shards))
    once, twice = (InProcessGrid(app, range(4), uplink_fault=fault) for fault in (lambda m: [m], lambda m: [m, m]))
    servers = [_server.FederatedServer(alg, toy.theta0, KEY) for _ in range(2)]
    for server, grid in zip(servers, (once, twice), strict=True):
        list(server.run(grid, 3))
    np.testing.assert_array_equal(servers[0].state.params, servers[1].state.params)
    assert any("second reply" in line.getMessage() for line in caplog.records)


def test_a_worker_believes_no_forged_acknowledgement(toy: Toy) -> None:
    """A name that is not its last upload's: it takes its memory for lost, and sends everything; the next round heals."""
    alg = algorithms.qgd(toy.oracle, bits=3, **RULE)
    at_work: list[bool] = []

    def down(message: Message) -> list[Message]:
        if at_work and message.metadata.dst_node_id == 101:
            head, parts = _protocol.parse_message(_protocol.BroadcastHeader, message)
            message.content = _protocol.make_record(head._replace(digest=b"8 bytes!"), **parts)
        return [message]

    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), downlink_fault=down)
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    list(server.run(grid, 3))
    at_work.append(True)
    stats = server.run_round(grid)
    assert stats is not None
    assert stats.bits_up[1] == 32 * 63
    at_work.clear()
    for _ in range(3):
        stats = server.run_round(grid)
        assert stats is not None
        assert stats.accepted.all()
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_a_node_that_says_it_is_somebody_else(toy: Toy, caplog: Any) -> None:
    alg = algorithms.gd(toy.oracle, **RULE)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4))
    grid.join(1, node=500)  # a second worker 1
    grid.join(7, node=501)
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    stats = list(server.run(grid, 3))
    assert sorted(server._roster.nodes) == [100, 101, 102, 103]
    assert column(stats, "accepted").all()
    said = [line.getMessage() for line in caplog.records]
    assert len(said) == 2
    assert "worker = 1: must be in range(0, 4), and not registered already" in said[0]
    grid.leave(101)  # the other may take its place
    list(server.run(grid, 6))
    assert server._roster.nodes[500] == 1


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_that_all_nodes_refuse_ends_with_the_reason(
    nodes: int, toy: Toy, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node alone cannot end it: others may come."""
    monkeypatch.setattr(_roster, "FAILURE_INTERVAL", 0.0)
    alg = algorithms.gd(toy.oracle, **RULE)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(nodes))
    for context in grid.contexts.values():
        context.node_config["num-partitions"] = 2
    server = _server.FederatedServer(alg, toy.theta0, KEY, round_timeout=0.1)
    reason = "num-partitions = 4" if nodes == 2 else "0 workers registered: must be 4"
    with pytest.raises(RuntimeError, match=reason):
        list(server.run(grid, 1, max_empty_rounds=10))
    said = Counter(line.getMessage() for line in caplog.records)
    assert len(said) == nodes
    assert nodes == 1 or set(said.values()) == {3}


def test_a_node_that_fails_to_say_who_it_is_is_asked_again(
    toy: Toy, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_roster, "FAILURE_INTERVAL", 0.0)
    failures = [True, True]

    def up(message: Message) -> list[Message]:
        first = message.metadata.src_node_id == 101 and failures and failures.pop()
        return [failed(message)] if first else [message, message]

    alg = algorithms.gd(toy.oracle, **RULE)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), uplink_fault=up)
    server = _server.FederatedServer(alg, toy.theta0, KEY, round_timeout=0.01)
    assert list(server.run(grid, 0, max_empty_rounds=1000)) == []
    assert sorted(server._roster.nodes) == [100, 101, 102, 103]
    assert [line.getMessage() for line in caplog.records] == [
        "worker ? (node 101) rejected: the client app failed: out of memory"
    ] * 2


def test_a_worker_belongs_to_the_key_of_its_node(tmp_path: Path, toy: Toy, caplog: Any) -> None:
    alg = algorithms.qgd(toy.oracle, bits=3, **RULE)
    app = _client.client_app(alg, loader(toy.shards))
    options: Any = dict(checkpoint_path=tmp_path / "state.npz")
    server, grid = _server.FederatedServer(alg, toy.theta0, KEY, **options), InProcessGrid(app, [])
    for worker in range(4):
        grid.join(worker, public_key=key_of(worker))
    assert column(list(server.run(grid, 2)), "accepted").all()
    grid.leave(101)
    grid.join(1, node=501, public_key=key_of(77))  # it takes the place of the lost worker
    stats = [server.run_round(grid) for _ in range(2)]
    assert not column(stats, "accepted")[:, 1].any()
    assert "worker = 1: must be another, because the key of another node owns it" in caplog.text
    server = _server.FederatedServer(alg, toy.theta0, KEY, **options)  # not after a restart of the server either
    assert not column(list(server.run(grid, 6, workers=3)), "accepted")[:, 1].any()
    grid.leave(501)
    grid.join(1, node=601, public_key=key_of(1))  # its owner comes back
    stats = [server.run_round(grid) for _ in range(3)]
    assert stats[-1].accepted.all()  # pyright: ignore[reportOptionalMemberAccess]

    grid.leave(601)
    grid.join(3, node=701, public_key=key_of(1))  # with the data of another worker
    caplog.clear()
    stats = [server.run_round(grid) for _ in range(3)]
    assert server._roster.nodes[701] == 1
    np.testing.assert_array_equal(column(stats, "accepted"), [[True, False, True, True]] * 3)
    assert "node 701 claims worker 3: its key owns worker 1" in caplog.text
    assert "broadcast to worker 1: must be to worker 3, the node's partition-id" in caplog.text
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)


def test_a_replacement_of_a_released_worker_begins_with_a_full_upload(tmp_path: Path, toy: Toy) -> None:
    alg = algorithms.qgd(toy.oracle, bits=3, **RULE)
    app = _client.client_app(alg, loader(toy.shards))
    options: Any = dict(checkpoint_path=tmp_path / "state.npz")
    server, grid = _server.FederatedServer(alg, toy.theta0, KEY, **options), InProcessGrid(app, [])
    for worker in range(4):
        grid.join(worker, public_key=key_of(worker))
    list(server.run(grid, 3))
    state = grid.leave(101).state
    grid.join(1, node=501, public_key=key_of(77))
    grid.contexts[501].state = state  # even if it has the state of the old one
    server = _server.FederatedServer(alg, toy.theta0, KEY, release_workers=[1], **options)
    stats = list(server.run(grid, 5))
    assert column(stats, "accepted").all()
    np.testing.assert_array_equal(column(stats, "bits_up")[:, 1], [32 * 63, 32 + 3 * 63 + 3])
    assert server._workers.owners[1] == _roster.hash_node_key(key_of(77))
    np.testing.assert_allclose(server.state.aggregate, sum(server._workers.contributions), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="release_workers = 4: must be a whole number >= 0 and <= 3"):
        _server.FederatedServer(alg, toy.theta0, KEY, release_workers=[4])


def test_without_authentication_a_worker_belongs_to_a_node_while_it_is_there(tmp_path: Path, toy: Toy) -> None:
    """Then each start of a node has another key."""
    alg = algorithms.gd(toy.oracle, **RULE)
    app = _client.client_app(alg, loader(toy.shards))
    options: Any = dict(checkpoint_path=tmp_path / "state.npz", authenticated_nodes=False)
    grid = InProcessGrid(app, [])
    for start in range(2):
        for worker in range(4):
            if 100 + worker in grid.contexts:
                grid.leave(100 + worker)
            grid.join(worker, public_key=key_of(10 * start + worker))
        server = _server.FederatedServer(alg, toy.theta0, KEY, **options)
        assert column(list(server.run(grid, 2 + 2 * start)), "accepted").all()


def test_an_answer_to_no_greeting_registers_nobody(toy: Toy, caplog: Any) -> None:
    answers: list[Message] = []

    def up(message: Message) -> list[Message]:
        if message.metadata.src_node_id == 103 and message.metadata.message_type == "query":
            answers.append(message)
            return [of_node(message, 102)]  # a node answers for another one
        return [message]

    alg = algorithms.gd(toy.oracle, **RULE)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), uplink_fault=up)
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    list(server.run(grid, 2, workers=3))
    assert server._roster.nodes == {100: 0, 101: 1, 102: 2}
    assert "answer to no hello message" in caplog.text


def test_a_hello_message_with_anything_in_it_ends_no_run(toy: Toy) -> None:
    odd: list[Any] = [[1, 2], b"1", "1", 1.5, float("nan"), True, -1, 10**9]

    def up(message: Message) -> list[Message]:
        if message.metadata.src_node_id == 103 and message.metadata.message_type == "query":
            scheme = message.content.config_records[_protocol.RECORD_KEY]["scheme"]
            parts = {"worker": odd[-1], "scheme": scheme if len(odd) % 2 else [1]} if odd else None
            message = with_content(message, parts) if parts else hollow(message)
        return [message]

    alg = algorithms.gd(toy.oracle, **RULE)
    grid = InProcessGrid(_client.client_app(alg, loader(toy.shards)), range(4), uplink_fault=up)
    server = _server.FederatedServer(alg, toy.theta0, KEY)
    while odd:
        list(server.run(grid, int(server.state.round) + 1, workers=3))
        server._roster.rejected_until.clear()
        odd.pop()
    list(server.run(grid, int(server.state.round) + 1, workers=3))
    assert server._roster.nodes == {100: 0, 101: 1, 102: 2}


def hollow(message: Message) -> Message:
    """Neither content nor error."""
    message.__dict__["_content"] = None
    return message


# ---- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", parametrize_rows())
def test_settings_have_equal_digests_in_equal_algorithms(row: Any, toy: Toy) -> None:
    first, second = (_protocol.scheme_digests(make(row, toy)) for _ in range(2))
    assert first == second
    assert len(first) == 8 * len(_protocol.SCHEME_PARTS)


OTHERS: dict[str, Any] = {
    "lr": dict(lr=0.06),
    "lr of a function": dict(lr=optax.constant_schedule(0.05)),
    "compressor": dict(bits=4),
    "rule": dict(max_silence=7),
    "sampler": dict(sampler=laqjax.samplers.BlockSampler(5)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_client_with_other_settings_is_refused(name: str, toy: Toy, caplog: Any) -> None:
    options: Any = dict(lr=0.05, num_workers=4, bits=3)
    server = _server.FederatedServer(algorithms.laq(toy.oracle, **options), toy.theta0, KEY, round_timeout=0.01)
    other = algorithms.laq(toy.oracle, **options | OTHERS[name])
    grid = InProcessGrid(_client.client_app(other, loader(toy.shards)), [2])
    with pytest.raises(RuntimeError, match="0 workers registered: must be 4"):
        list(server.run(grid, 1, max_empty_rounds=1))
    assert re.search(f"other settings of (rule, )?{name.split()[0]}: must be those of the server", caplog.text)


def test_a_client_may_have_another_optimizer_and_oracle(toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, bits=3, **RULE)
    other = replace(
        alg, optimizer=laqjax.optimizers.amsgrad, oracle=laqjax.oracles.with_local_steps(toy.oracle, 2, 0.1)
    )
    assert _protocol.scheme_digests(alg) == _protocol.scheme_digests(other)


@pytest.mark.parametrize("replies_at_random", [1000, pytest.param(10_000, marks=pytest.mark.long)])
def test_replies_at_random(replies_at_random: int, toy: Toy) -> None:
    """No crash but the word that it is refused, and nothing that is taken is other than finite."""
    alg = algorithms.qgd(toy.oracle, bits=3, **RULE)
    _, server, grid = federated(alg, toy.theta0, toy.shards, 3)
    sent = _server._make_broadcasts(server, np.ones(4, bool), _server.RoundStats.empty(3, 4))
    replies = [grid.client(message, grid.contexts[node]) for node, message in sent.items()]
    rng, state, taken = np.random.default_rng(0), server.state, 0
    contents = [_protocol.parse_message(_protocol.ReplyHeader, reply) for reply in replies]
    for case in range(replies_at_random):
        reply, (up, parts) = replies[case % 4], contents[case % 4]
        body = bytearray(parts["body"])
        for _ in range(rng.integers(0, 4)):
            body[rng.integers(len(body))] = rng.integers(256)
        cut = rng.integers(-3, 4) if rng.random() < 0.3 else 0
        body = bytes(body[:cut] if cut < 0 else body + bytes(rng.integers(0, 256, cut, np.uint8)))
        if rng.random() < 0.9:  # as its sender would sign it
            up = up._replace(size=len(body), digest=_protocol.upload_id(body, up.round, (up.base, up.base_digest))[1])
        if rng.random() < 0.2:
            place = list(up._fields)[rng.integers(len(up))]
            value = getattr(up, place)
            up = up._replace(**{place: bytes(8) if isinstance(value, bytes) else type(value)(rng.integers(0, 100))})
        reply.content = _protocol.make_record(up, body=body)
        if rng.random() < 0.1:
            head = bytearray(reply.content.config_records[_protocol.RECORD_KEY]["head"])  # pyright: ignore[reportArgumentType]
            head[rng.integers(len(head))] ^= 1 << rng.integers(8)
            with_content(reply, {"head": bytes(head), "body": body})
        accepted = server._workers.accepted[case % 4]
        due = _admission.ExpectedReply(server._session, 3, server._scheme, case % 4, accepted, True)
        result = _admission.validate_reply(alg, state.params, reply, due)
        if isinstance(result, _admission.AcceptedReply):
            taken += 1
            assert result.decoded is None or np.all(np.isfinite(np.asarray(result.decoded)))
    assert server.state is state
    assert 0.1 < taken / replies_at_random < 0.9
