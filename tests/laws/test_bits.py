"""Bit-identity with XLA's optimisations on: however a run is cut, looped or streamed, its bits are the same.

The other laws compile without most optimisations, which are what could break these.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laqjax
from laqjax import Shards, compressors
from tests.laws.laws import check_sweep_is_loop
from tests.laws.registry import ROWS, make, points_of
from tests.support import CHUNK, KEY, RECORD, Toy, identical, run

pytestmark = pytest.mark.optimized

# In `make test` one member for each kind of part: the grid with a lazy rule, a history and a compressed downlink; a memory of
# estimates with gradients at other models, minibatches and shared draws; partial participation with local steps.
QUICK = ["two_laq", "dasha_mvr", "fedlaq"]
MEMBERS = [pytest.param(name, marks=[pytest.mark.long] * (name not in QUICK)) for name in ROWS]
SWEPT = [pytest.param(name, marks=[pytest.mark.long] * (name != "laq")) for name in ROWS]
ROUNDS = 33


@pytest.mark.parametrize("name", MEMBERS)
def test_a_run_cut_streamed_or_looped_is_the_same_run(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    straight = run(alg, toy.theta0, toy.shards, ROUNDS)
    for cut in ([10, 23], [1, 12, 20]):
        start, infos = toy.theta0, []
        for rounds in cut:
            out = run(alg, start, toy.shards, rounds)
            start = out.state
            infos.append(out.info)
        identical((laqjax.concatenate_infos(infos), start), tuple(straight))

    infos, state = [], None
    for out in laqjax.stream(alg, toy.theta0, toy.shards, ROUNDS, KEY, metrics=RECORD, chunk_size=CHUNK):
        infos.append(out.info)
        state = jax.tree.map(np.array, out.state)  # a copy: the next chunk consumes it
    identical((laqjax.concatenate_infos(infos), state), tuple(straight))

    shards = Shards(*map(jnp.asarray, toy.shards))
    closed_over = jax.jit(alg.step)
    argument = jax.jit(lambda alg, state, shards, key: alg.step(state, shards, key))
    for step in (closed_over, lambda *given: argument(alg, *given)):
        state, infos = alg.init(toy.theta0), []
        for _ in range(ROUNDS):
            state, info = step(state, shards, KEY)
            infos.append(info)
        identical(state, straight.state)
        identical(jax.tree.map(lambda *rows: np.stack(rows), *infos)[:4], straight.info[:4])


def test_a_scan_of_ones_own_is_the_same_run(toy: Toy) -> None:
    alg, shards = make("two_laq", toy), Shards(*map(jnp.asarray, toy.shards))
    scan = jax.jit(lambda state: jax.lax.scan(lambda state, _: alg.step(state, shards, KEY), state, length=ROUNDS))
    state, info = scan(alg.init(toy.theta0))
    straight = run(alg, toy.theta0, toy.shards, ROUNDS)
    identical(state, straight.state)
    identical(jax.device_get(info)[:4], straight.info[:4])


@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_cut_anywhere_is_the_same_sweep(name: str, toy: Toy) -> None:
    points, keys = laqjax.stack_algorithms(points_of(name, toy)), jax.random.split(KEY, 5)

    def sweep(start: Any, rounds: int) -> laqjax.RunResult:
        return laqjax.sweep(points, start, toy.shards, rounds, keys, batch_size=3, metrics=RECORD, chunk_size=CHUNK)

    straight, first = sweep(toy.theta0, 23), sweep(toy.theta0, 9)
    rest = sweep(first.state, 14)
    identical((laqjax.concatenate_infos([first.info, rest.info]), rest.state), tuple(straight))


@pytest.mark.long
@pytest.mark.parametrize("name", ROWS)
def test_a_sweep_is_a_loop_of_runs(name: str, quadratic: Toy) -> None:
    check_sweep_is_loop(points_of(name, quadratic), quadratic)


def test_clag_with_the_identity_waits_as_3pc_says(quadratic: Toy) -> None:
    """||g - h||^2 > zeta ||g - last g||^2 with zeta = 1: in the round after an upload both sides are equal, nobody sends."""
    clag = make("clag", quadratic, compressor=compressors.identity(), zeta=1.0)
    info = run(clag, quadratic.theta0, quadratic.shards, ROUNDS).info
    grads, memory, sent = info.extra["grad"], np.zeros((4, 5)), np.zeros((ROUNDS, 4), bool)
    for k in range(ROUNDS):
        progress = np.sum((grads[k] - grads[k - 1]) ** 2, axis=1)
        sent[k] = (np.sum((grads[k] - memory) ** 2, axis=1) > progress) | (k == 0)
        memory = np.where(sent[k][:, None], grads[k], memory)
    np.testing.assert_array_equal(info.sent, sent)
    assert 0.3 < sent.mean() < 0.7
