"""Every deterministic member against its twin: plain NumPy in float64, written from the paper (`twins.py`).

The twin takes the draws that are the library's own (the rows of a minibatch, MARINA's coin, who takes part) and nothing else.
Masks are equal and losses and models agree to 1e-12 over 60 rounds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laqjax
from laqjax import Shards, algorithms, compressors, memories, oracles, rules, samplers
from tests.laws import local_twins, reference, twins
from tests.laws.registry import ROWS, TWIN_EACH, TWIN_LAZY, Twin, draw_participants, with_participants
from tests.support import KEY, Toy, keys_of

ROUNDS, WORKERS, LR = 60, 3, 0.05
# name: (row, changed arguments of both sides, left to `make test-long`)
VARIANTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "laq_short_history": ("laq", dict(bits=8, rescale_short_history=True, force_first_upload=False), False),
    "lasg_wk1_c": ("lasg_wk1", dict(xi=None, c=9, max_silence=10), True),
    "lasg_wk2_c": ("lasg_wk2", dict(xi=None, c=9, max_silence=10), True),
}
MEMBERS = {name: (name, {}, row.long) for name, row in ROWS.items() if row.twin} | VARIANTS
FULL_ONLY = "dasha"  # on minibatches it is dasha_mvr


def problem_of(toy: Toy, sampler: Any) -> twins.Problem:
    """The toy's first workers in NumPy, with the rows that the library draws."""
    x, y, weight = (np.asarray(a)[:WORKERS] for a in toy.shards)

    def rows(k: int, m: int) -> np.ndarray | None:
        if sampler is None:
            return None
        drawn = sampler(keys_of(k, m, WORKERS), jax.tree.map(lambda a: jnp.asarray(a[:WORKERS]), toy.shards))
        return int(drawn.start) + np.arange(drawn.size) if drawn.index is None else np.asarray(drawn.index)

    def grad(m: int, theta: np.ndarray, rows: np.ndarray | None) -> tuple[float, np.ndarray]:
        mine = np.flatnonzero(weight[m]) if rows is None else rows
        assert np.all(weight[m][mine] > 0)  # no padding
        return reference.softmax_regression(theta, x[m][mine] / 255, y[m][mine], 3, 0.01)

    return twins.Problem(np.array(toy.theta0), WORKERS, grad, rows)


def twin_of(name: str) -> Twin:
    """Return the twin of a member, with the arguments of its variant."""
    base, changes, _ = MEMBERS[name]
    twin = ROWS[base].twin
    assert twin
    return replace(twin, both=twin.both | changes)


def pair(name: str, **changes: Any) -> tuple[Any, Any]:
    """Return the method and its twin, to be called with the problem and what differs between the tests."""
    twin = twin_of(name)
    both = twin.both | changes
    return partial(ROWS[MEMBERS[name][0]].factory, **both | twin.ours), partial(twin.run, **both | twin.theirs)


def agree(toy: Toy, ours: Any, twin: Any, sampler: Any = None, lr: Any = LR, twin_lr: Any = None, **server: Any) -> Any:
    """Both runs; the library's masks, losses and models are the twin's."""
    shards = Shards(*(np.asarray(a)[:WORKERS] for a in toy.shards))
    alg = ours(
        toy.oracle, lr=lr, num_workers=WORKERS, sampler=sampler, **{k: v for k, v in server.items() if k != "server"}
    )
    out = laqjax.run(alg, toy.theta0, shards, ROUNDS, KEY, metrics=["params"], chunk_size=ROUNDS)
    kept = {"server": server["server"]} if "server" in server else {}
    history = twin(problem_of(toy, sampler), ROUNDS, lr=lr if twin_lr is None else twin_lr, **kept)
    np.testing.assert_array_equal(out.info.sent, history.sent)
    np.testing.assert_allclose(out.info.loss, history.loss, rtol=1e-12)
    path = np.concatenate([out.info.extra["params"], out.state.params[None]])
    scale = np.linalg.norm(history.theta, axis=1)
    assert np.all(np.linalg.norm(path - history.theta, axis=1) <= 1e-12 * scale)
    return out


def check_that_the_rule_decides(name: str, sent: np.ndarray) -> None:
    """Check that a mask has silence, and uploads that come before the bound forces them: 5 % of each after round 0."""
    max_silence = twin_of(name).both.get("max_silence", ROUNDS)
    early = 0
    for worker in sent.T:
        rounds = np.flatnonzero(worker)
        early += np.sum(np.diff(rounds) <= max_silence)
    share = early / sent[1:].size
    assert share > 0.05, f"{share:.3f} of the mask are uploads that the rule asked for"
    assert sent[1:].mean() < 0.95


def is_lazy(name: str) -> bool:
    """Return whether a rule of the worker's, or of the server's, decides from what it sees."""
    return name == "clag" or bool({"xi", "c"} & set(twin_of(name).both))


def in_turn(members: Iterable[str], kinds: Sequence[str]) -> list[Any]:
    """Return all pairs; in `make test` one kind for each member that is not left to `make test-long`, one after another."""
    quick = [name for name in members if not MEMBERS[name][2]]
    pairs = [(name, kind) for name in members for kind in kinds]
    now = {(name, kinds[i % len(kinds)]) for i, name in enumerate(quick)}
    return [pytest.param(*one, marks=[pytest.mark.long] * (one not in now)) for one in pairs]


@pytest.mark.parametrize(
    ("name", "rows"), in_turn([name for name in MEMBERS if name != FULL_ONLY], ["full", "blocks", "epochs"])
)
def test_the_twin(name: str, rows: str, toy64: Toy) -> None:
    sampler = {"full": None, "blocks": samplers.BlockSampler(4), "epochs": samplers.ShuffleSampler(4)}[rows]
    out = agree(toy64, *pair(name), sampler, twin_of(name).lr)
    if is_lazy(name):
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.long
def test_the_twin_of_full_gradients(toy64: Toy) -> None:
    agree(toy64, *pair(FULL_ONLY))


SERVERS: dict[str, tuple[Any, Any]] = {
    "momentum": (partial(optax.sgd, momentum=0.9), twins.momentum(LR, 0.9)),
    "nesterov": (partial(optax.sgd, momentum=0.9, nesterov=True), twins.momentum(LR, 0.9, nesterov=True)),
    "adam": (optax.adam, twins.adam(LR)),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize(
    "name", ["laq", *(pytest.param(n, marks=pytest.mark.long) for n in ("lag_wk", "lag_ps", "lasg_wk2", "ef21"))]
)
def test_the_twin_with_another_server(name: str, server: str, toy64: Toy) -> None:
    optimizer, update = SERVERS[server]
    changes = {}
    if name == "lag_ps":  # a direction of these servers is longer than a step: else nearly everybody always sends
        changes = dict(smoothness=0.1 * TWIN_EACH["smoothness"])
    out = agree(toy64, *pair(name, **changes), optimizer=optimizer, server=update)
    if is_lazy(name):
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.parametrize(
    "name", ["laq", "gd", *(pytest.param(n, marks=pytest.mark.long) for n in ("lag_wk", "lasg_wk1_c"))]
)
def test_the_twin_on_a_schedule(name: str, toy64: Toy) -> None:
    """It begins at zero, as warm-up does."""
    out = agree(
        toy64,
        *pair(name),
        lr=jax.tree_util.Partial(lambda slope, k: jnp.minimum(slope * k, 0.08), 0.01),
        twin_lr=lambda k: min(0.01 * k, 0.08),
    )
    if is_lazy(name):
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.parametrize("member", ["laq", "gd"])
def test_the_twin_of_partial_participation(member: str, toy64: Toy) -> None:
    knobs: dict[str, Any] = TWIN_LAZY | dict(max_silence=3) if member == "laq" else {}

    def ours(given: Any, sampler: Any, **server: Any) -> laqjax.Algorithm:
        inner: Any = rules.Always()
        if member == "laq":
            inner = algorithms.laq(given, bits=3, **knobs, **server).rule
        rule = rules.partial_participation(inner, WORKERS, count=2)
        scheme = compressors.grid(3) if member == "laq" else compressors.identity()
        return laqjax.assemble(given, scheme, rule, memories.make_innovation_memory(given), **server)

    asked = draw_participants(WORKERS, ROUNDS, 2)
    assert np.all(asked.sum(axis=1) == 2)
    assert np.all(asked.mean(axis=0) > 0.4)
    out = agree(
        toy64, ours, partial(twins.partial, member=member, asked=asked, **({"bits": 3} | knobs if knobs else {}))
    )
    np.testing.assert_array_equal(out.info.bits_down, 2 * 64 * 63)
    assert not np.any(out.info.sent & ~asked)


def rising(slope: float, step: Any) -> Any:
    """A local step size that is zero in round 0."""
    return slope * (step // 2)


def falling(step: Any) -> Any:
    return 0.02 / (1 + 0.1 * step)


LOCAL: dict[str, tuple[Any, dict[str, Any]]] = {  # the oracle, and the arguments of the twin
    "proximal": (
        partial(
            oracles.with_local_steps,
            lr=jax.tree_util.Partial(rising, 1e-3),
            optimizer=jax.tree_util.Partial(optax.adamw, weight_decay=0.01),
            proximal=0.5,
            keep_optimizer_state=False,
        ),
        dict(
            local_lr=partial(rising, 1e-3),
            inner=local_twins.adamw(weight_decay=0.01),
            proximal=0.5,
            keep=False,
            lr=0.01,
        ),
    ),
    "ready": (
        partial(oracles.with_local_steps, optimizer=optax.adamw(falling)),
        dict(local_lr=falling, inner=local_twins.adamw(), difference=True, lr=0.3),
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_twin_of_local_training(name: str, toy64: Toy) -> None:
    """Schedules read the step of the run also where workers are absent, and a sum of step sizes of zero is no NaN."""
    local, given = LOCAL[name]

    def ours(oracle: Any, **server: Any) -> laqjax.Algorithm:
        rule = rules.partial_participation(rules.Always(), WORKERS, count=2)
        return laqjax.assemble(local(oracle, 2), compressors.identity(), rule, memories.NoMemory(), **server)

    twin = partial(with_participants(local_twins.local_steps), num_participants=2, steps=2)
    agree(toy64, ours, partial(twin, **{k: v for k, v in given.items() if k != "lr"}), lr=given["lr"])


def test_the_default_lr_averages_the_local_models(toy64: Toy) -> None:
    alg = algorithms.fedavg(toy64.oracle, num_workers=4, num_participants=2, num_local_steps=3, local_lr=falling)
    for k in (0, 5):
        total = sum(falling(3 * k + t) for t in range(3))
        np.testing.assert_allclose(alg.learning_rate_at(jnp.int32(k)), total / 2, rtol=1e-12)


def test_scaffold_sends_two_vectors_down_unless_one_suffices(toy64: Toy) -> None:
    given: dict[str, Any] = dict(num_workers=4, num_local_steps=2, local_lr=0.1)
    sizes = {}
    for name, more in {
        "all": {},
        "some": dict(num_participants=4),
        "momentum": dict(optimizer=partial(optax.sgd, momentum=0.9)),
        "schedule": dict(local_lr=falling),
    }.items():
        alg = algorithms.scaffold(toy64.oracle, **given | more)
        sent = alg.downlink.broadcast(None, toy64.theta0, toy64.theta0, lambda d, x: (d, ()), keys_of(0, 4))
        sizes[name] = int(sent.bytes) // toy64.theta0.nbytes
    assert sizes == {"all": 1, "some": 2, "momentum": 2, "schedule": 2}
