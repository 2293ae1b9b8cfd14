"""Every deterministic member against its twin: plain NumPy in float64, written from the paper (`twins.py`).

The twin takes the draws that are the library's own (the rows of a minibatch, MARINA's coin, who takes part) and nothing else.
Masks are equal and losses and models agree to 1e-12 over 60 rounds.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laqjax
from laqjax import Shards, algorithms, compressors, memories, rules, samplers, types
from tests.laws import reference, twins
from tests.support import KEY, Toy, keys_of

ROUNDS, WORKERS, LR = 60, 3, 0.05
EACH = [1.0, 2.0, 0.5]
TOP, TWIN_TOP = compressors.top_k(7), twins.top_k(7)
LAZY: dict[str, Any] = dict(xi=0.07, window=4, max_silence=9)
CADA: dict[str, Any] = dict(window=4, max_silence=10)
SHARE = 0.3  # of the rounds of MARINA's coin


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


COINS = np.array(
    [bool(types.shared_bernoulli(keys_of(k, 0, WORKERS), np.asarray(SHARE, np.float32))) for k in range(ROUNDS)]
)
Call = Callable[..., Any]
# named: (the library's, the twin's), each called with lr and what it takes beside; the twin gets the same knobs otherwise
MEMBERS: dict[str, tuple[Call, Call]] = {
    "gd": (algorithms.gd, twins.gd),
    "qgd": (partial(algorithms.qgd, bits=3), partial(twins.qgd, bits=3)),
    "lag_wk": (partial(algorithms.lag_wk, **LAZY), partial(twins.lag_wk, **LAZY)),
    "lag_ps": (
        partial(algorithms.lag_ps, smoothness=EACH, **LAZY),
        partial(twins.lag_ps, smoothness=np.array(EACH), **LAZY),
    ),
    "iag_cyclic": (algorithms.iag_cyclic, twins.iag_cyclic),
    "laq": (partial(algorithms.laq, bits=3, **LAZY), partial(twins.laq, bits=3, **LAZY)),
    "two_laq": (
        partial(algorithms.two_laq, bits=3, downlink_bits=5, **LAZY),
        partial(twins.two_laq, bits=3, bits_down=5, **LAZY),
    ),
    "slaq": (partial(algorithms.slaq, **LAZY), partial(twins.slaq, bits=3, **LAZY)),
    "laq_ramp_rule": (
        partial(algorithms.laq, bits=8, rescale_short_history=True, force_first_upload=False, **LAZY),
        partial(twins.laq, bits=8, rescale_short_history=True, force_first_upload=False, **LAZY),
    ),
    "ef21": (partial(algorithms.ef21, compressor=TOP), partial(twins.ef21, compressor=TWIN_TOP)),
    "clag": (partial(algorithms.clag, compressor=TOP, zeta=30), partial(twins.clag, compressor=TWIN_TOP, zeta=30)),
    "ef_bv": (
        partial(algorithms.ef_bv, compressor=TOP, damping=0.6, scaling=0.8),
        partial(twins.ef_bv, compressor=TWIN_TOP, damping=0.6, scaling=0.8),
    ),
    "diana": (
        partial(algorithms.diana, compressor=TOP, damping=0.6),
        partial(twins.diana, compressor=TWIN_TOP, damping=0.6),
    ),
    "ef21_sgdm": (
        partial(algorithms.ef21_sgdm, compressor=TOP, eta=0.3),
        partial(twins.ef21_sgdm, compressor=TWIN_TOP, momentum=0.3),
    ),
    "ef21_p": (
        partial(algorithms.ef21_p, compressor=TOP, downlink_compressor=compressors.top_k(11)),
        partial(twins.ef21_p, compressor=TWIN_TOP, down=twins.top_k(11)),
    ),
    "dasha_mvr": (
        partial(algorithms.dasha, compressor=TOP, estimate_momentum=0.4, mvr_momentum=0.3),
        partial(twins.dasha, compressor=TWIN_TOP, a=0.4, momentum=0.3),
    ),
    "sign_sgd": (partial(algorithms.sign_sgd), twins.sign_sgd),
    "ef_sign_sgd": (algorithms.ef_sign_sgd, twins.ef_sign_sgd),
    "topk_ef": (partial(algorithms.topk_ef, k=7), partial(twins.topk_ef, k=7)),
    "dgc": (partial(algorithms.dgc, k=7, momentum=0.6), partial(twins.dgc, k=7, momentum=0.6)),
    "lasg_wk1": (partial(algorithms.lasg_wk1, period=7, **LAZY), partial(twins.lasg_wk1, period=7, **LAZY)),
    "lasg_wk2": (partial(algorithms.lasg_wk2, **LAZY), partial(twins.lasg_wk2, **LAZY)),
    "lasg_wk1_c": (
        partial(algorithms.lasg_wk1, period=7, c=9, **CADA),
        partial(twins.lasg_wk1, period=7, c=9, **CADA),
    ),
    "lasg_wk2_c": (partial(algorithms.lasg_wk2, c=9, **CADA), partial(twins.lasg_wk2, c=9, **CADA)),
    "lasg_ps_c": (
        partial(algorithms.lasg_ps, smoothness=EACH, c=9, **CADA),
        partial(twins.lasg_ps, smoothness=np.array(EACH), c=9, **CADA),
    ),
    "cada1": (partial(algorithms.cada1, c=2.5, period=7, **CADA), partial(twins.cada1, c=2.5, period=7, **CADA)),
    "cada2": (partial(algorithms.cada2, c=2.5, **CADA), partial(twins.cada2, c=2.5, **CADA)),
    "marina": (
        partial(algorithms.marina, compressor=TOP, probability=SHARE),
        lambda problem, *a, **k: (twins.marina if problem.rows(0, 0) is None else twins.vr_marina)(
            problem, *a, compressor=TWIN_TOP, coins=COINS, **k
        ),
    ),
    "fedavg": (
        lambda oracle, lr, **k: algorithms.fedavg(oracle, num_local_steps=2, local_lr=lr, **k),
        lambda *a, lr: twins.fedavg(*a, steps=2, local_lr=lr),
    ),
    "fedlaq": (
        partial(algorithms.fedlaq, num_local_steps=2, local_lr=0.1, bits=4, **LAZY),
        partial(twins.fedlaq, steps=2, local_lr=0.1, bits=4, **LAZY),
    ),
}
FULL_ONLY = {
    "dasha": (
        partial(algorithms.dasha, compressor=TOP, estimate_momentum=0.4),
        partial(twins.dasha, compressor=TWIN_TOP, a=0.4),
    )
}
LAZY_MEMBERS = [name for name in MEMBERS if name.startswith(("la", "slaq", "two", "cada", "clag", "fedlaq"))]


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
    max_silence = getattr(MEMBERS[name][1], "keywords", {}).get("max_silence", ROUNDS)
    early = 0
    for worker in sent.T:
        rounds = np.flatnonzero(worker)
        early += np.sum(np.diff(rounds) <= max_silence)
    share = early / sent[1:].size
    assert share > 0.05, f"{share:.3f} of the mask are uploads that the rule asked for"
    assert sent[1:].mean() < 0.95


# whose parts other members have: `make test-long` compares them
COVERED = [
    "qgd",
    "iag_cyclic",
    "slaq",
    "ef_bv",
    "topk_ef",
    "lasg_wk2",
    "lasg_wk1_c",
    "lasg_wk2_c",
    "lasg_ps_c",
    "cada1",
]


def in_turn(members: Iterable[str], kinds: Sequence[str]) -> list[Any]:
    """Return all pairs; in `make test` each member with one kind, one after another."""
    return [
        pytest.param(name, kind, marks=[pytest.mark.long] * (name in COVERED or i % len(kinds) != j))
        for i, name in enumerate(members)
        for j, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize(("name", "rows"), in_turn(MEMBERS, ["full", "blocks", "epochs"]))
def test_the_twin(name: str, rows: str, toy64: Toy) -> None:
    sampler = {"full": None, "blocks": samplers.BlockSampler(4), "epochs": samplers.ShuffleSampler(4)}[rows]
    out = agree(toy64, *MEMBERS[name], sampler)
    if name in LAZY_MEMBERS:
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.parametrize("name", FULL_ONLY)
def test_the_twin_of_full_gradients(name: str, toy64: Toy) -> None:
    agree(toy64, *FULL_ONLY[name])


SERVERS: dict[str, tuple[Any, Any]] = {
    "momentum": (partial(optax.sgd, momentum=0.9), twins.momentum(LR, 0.9)),
    "nesterov": (partial(optax.sgd, momentum=0.9, nesterov=True), twins.momentum(LR, 0.9, nesterov=True)),
    "adam": (optax.adam, twins.adam(LR)),
}


@pytest.mark.parametrize(("name", "server"), in_turn(["lag_wk", "lag_ps", "laq", "lasg_wk2", "ef21"], list(SERVERS)))
def test_the_twin_with_another_server(name: str, server: str, toy64: Toy) -> None:
    (ours, twin), (optimizer, update) = MEMBERS[name], SERVERS[server]
    if name == "lag_ps":  # a direction of these servers is longer than a step: with EACH nearly everybody always sends
        ours, twin = (partial(f, smoothness=0.1 * np.array(EACH)) for f in (ours, twin))
    out = agree(toy64, ours, twin, optimizer=optimizer, server=update)
    if name in LAZY_MEMBERS:
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.parametrize(
    "name", ["laq", "gd", *(pytest.param(n, marks=pytest.mark.long) for n in ("lag_wk", "lasg_wk1_c"))]
)
def test_the_twin_on_a_schedule(name: str, toy64: Toy) -> None:
    """It begins at zero, as warm-up does."""
    out = agree(
        toy64,
        *MEMBERS[name],
        lr=jax.tree_util.Partial(lambda slope, k: jnp.minimum(slope * k, 0.08), 0.01),
        twin_lr=lambda k: min(0.01 * k, 0.08),
    )
    if name in LAZY_MEMBERS:
        check_that_the_rule_decides(name, out.info.sent)


@pytest.mark.parametrize("member", ["laq", "gd"])
def test_the_twin_of_partial_participation(member: str, toy64: Toy) -> None:
    knobs: dict[str, Any] = LAZY | dict(max_silence=3) if member == "laq" else {}

    def ours(given: Any, sampler: Any, **server: Any) -> laqjax.Algorithm:
        inner: Any = rules.Always()
        if member == "laq":
            inner = algorithms.laq(given, bits=3, **knobs, **server).rule
        rule = rules.partial_participation(inner, WORKERS, count=2)
        scheme = compressors.grid(3) if member == "laq" else compressors.identity()
        return laqjax.assemble(given, scheme, rule, memories.make_innovation_memory(given), **server)

    rule = rules.partial_participation(rules.Always(), WORKERS, count=2)
    nothing: Any = None
    asked = np.array(
        [
            [
                bool(
                    rule.is_participating(
                        types.RoundContext(nothing, keys_of(k, m, WORKERS), nothing, WORKERS, nothing)
                    )
                )
                for m in range(WORKERS)
            ]
            for k in range(ROUNDS)
        ]
    )
    assert np.all(asked.sum(axis=1) == 2)
    assert np.all(asked.mean(axis=0) > 0.4)
    out = agree(
        toy64, ours, partial(twins.partial, member=member, asked=asked, **({"bits": 3} | knobs if knobs else {}))
    )
    np.testing.assert_array_equal(out.info.bits_down, 2 * 64 * 63)
    assert not np.any(out.info.sent & ~asked)
