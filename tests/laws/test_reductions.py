"""Members of the family that are other members in disguise, and what the bills of the odd ones say.

Where twins hold both sides, `make test` leaves the law to `make test-long`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laqjax
from laqjax import Algorithm, algorithms, compressors, downlinks, types
from tests.laws.registry import BLOCKS, EACH, EPOCHS, LAZY_KNOBS, make
from tests.support import KEY, Toy, identical, keys_of, make_quadratic, run

ROUNDS = 40
TOP, IDENTITY = compressors.top_k(3), compressors.identity()


def same(one: Algorithm, other: Algorithm, toy: Toy, *, bills: bool = True, rtol: float = 1e-10) -> laqjax.RoundInfo:
    """Two float64 runs that differ in rounding only; the first one's info."""
    a, b = (run(alg, toy.theta0, toy.shards, ROUNDS).info for alg in (one, other))
    np.testing.assert_array_equal(a.sent, b.sent)
    np.testing.assert_allclose(a.extra["params"], b.extra["params"], rtol=rtol, atol=1e-13)
    if bills:
        np.testing.assert_array_equal(a.bits_up, b.bits_up)
        np.testing.assert_array_equal(a.bits_down, b.bits_down)
    return a


def some_silence(alg: Algorithm, toy: Toy) -> None:
    """A law about lazy members says little where nobody is silent, or nobody speaks."""
    sent = run(alg, toy.theta0, toy.shards, ROUNDS).info.sent[1:]
    assert 0.05 < sent.mean() < 0.95


# ---- members that always send ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("lag_wk", dict(xi=0, max_silence=None)),
        ("ef21", dict(compressor=IDENTITY)),
        ("diana", dict(compressor=IDENTITY, damping=0.3)),
        ("clag", dict(compressor=IDENTITY, zeta=0)),
        ("topk_ef", dict(k=5, sampler=None)),
    ],
)
def test_what_loses_nothing_is_gd(name: str, knobs: dict[str, Any], quadratic: Toy) -> None:
    same(make(name, quadratic, **knobs), make("gd", quadratic), quadratic, bills=name != "topk_ef")


def test_marina_whose_coin_always_falls_is_gd(quadratic: Toy) -> None:
    """Its messages say so with one bit each."""
    gd, marina = (make(name, quadratic) for name in ("gd", "marina"))
    marina = algorithms.marina(quadratic.oracle, compressor=TOP, probability=1, lr=0.05, num_workers=4)
    same(marina, gd, quadratic, bills=False)
    assert run(marina, quadratic.theta0, quadratic.shards, 3).info.bits_up.max() == 8 * (8 * 5 + 1)


@pytest.mark.long
def test_clag_that_never_waits_is_ef21(quadratic: Toy) -> None:
    same(make("clag", quadratic, zeta=0), make("ef21", quadratic), quadratic)
    some_silence(make("clag", quadratic, zeta=20), quadratic)
    patient = run(make("clag", quadratic, zeta=50), quadratic.theta0, quadratic.shards, ROUNDS).info
    assert patient.sent[0].all()  # there is no progress yet to wait for
    assert patient.sent[1:].mean() < 0.5


@pytest.mark.long
def test_undamped_diana_is_ef21(quadratic: Toy) -> None:
    same(make("diana", quadratic, compressor=TOP, damping=1), make("ef21", quadratic), quadratic)


@pytest.mark.long
def test_ef21_on_the_grid_is_qgd(quadratic: Toy) -> None:
    ef21 = algorithms.ef21(quadratic.oracle, compressor=compressors.grid(3), lr=0.05, num_workers=4)
    identical(*(run(alg, quadratic.theta0, quadratic.shards, ROUNDS) for alg in (ef21, make("qgd", quadratic))))


def test_laq_of_no_patience_is_qgd(quadratic: Toy) -> None:
    """A worker is never silent in two rounds running: max_silence = 1 sends every second round at least, xi = 0 and b = 16 always."""
    sent = run(make("laq", quadratic, xi=1e9, max_silence=1), quadratic.theta0, quadratic.shards, ROUNDS).info.sent
    assert np.all(sent[1:] | sent[:-1])
    same(make("laq", quadratic, xi=0, bits=16), make("qgd", quadratic, bits=16), quadratic, rtol=1e-9)


def test_qsgd_of_many_levels_is_nearly_sgd(quadratic: Toy) -> None:
    """It draws the same minibatches, and loses at most norm / levels."""
    sgd, qsgd = (make(name, quadratic, **EPOCHS) for name in ("sgd", "qsgd"))
    qsgd = replace(qsgd, compressor=compressors.qsgd(65535))
    a, b = (run(alg, quadratic.theta0, quadratic.shards, ROUNDS).info.extra["params"] for alg in (sgd, qsgd))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert not np.array_equal(a, b)


@pytest.mark.long
def test_sgd_on_all_rows_is_gd(quadratic: Toy) -> None:
    """One epoch a round, in a new order each: only the order of the sum differs."""
    for sampler in (laqjax.samplers.BlockSampler(12), laqjax.samplers.ShuffleSampler(12)):
        same(make("sgd", quadratic, sampler=sampler), make("gd", quadratic), quadratic)


def test_minibatches_without_replacement_see_every_row_once_an_epoch(toy: Toy) -> None:
    """12 rows, 4 a round; the first shard has 5 rows only: one round is its epoch, and padding is never drawn."""
    sampler = laqjax.samplers.ShuffleSampler(4)
    shards = jax.tree.map(jnp.asarray, toy.shards)
    draw = jax.jit(lambda m, k: sampler(types.RoundKeys(KEY, KEY, KEY, k, m), shards).index)
    for epoch in (0, 1):
        rows = [np.asarray(draw(np.int32(1), np.int32(3 * epoch + k))) for k in range(3)]
        np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(12))
    short = np.stack([draw(np.int32(0), np.int32(k)) for k in range(40)])
    assert set(short.ravel()) == set(range(5))
    assert all(len(set(row)) == 4 for row in short)


def test_minibatches_of_blocks_are_runs_of_the_shard(toy: Toy) -> None:
    sampler = laqjax.samplers.BlockSampler(4)
    shards = jax.tree.map(jnp.asarray, toy.shards)
    draw = jax.jit(lambda key, m: sampler(types.RoundKeys(key, key, key, jnp.int32(0), m), shards).start)
    keys = jax.random.split(KEY, 60)
    assert {int(draw(key, np.int32(1))) for key in keys} == {0, 4, 8}
    assert {int(draw(key, np.int32(0))) for key in keys} == {0}


# ---- lazy members ------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_laq_with_the_identity_is_lag(toy: Toy) -> None:
    laq = replace(make("laq", toy), compressor=IDENTITY)
    outs = [run(alg, toy.theta0, toy.shards, ROUNDS) for alg in (laq, make("lag_wk", toy))]
    identical(*outs)
    assert not outs[0].info.sent.all()


@pytest.mark.long
def test_two_laq_with_nothing_lost_on_the_way_down_is_laq(quadratic: Toy) -> None:
    two = replace(make("two_laq", quadratic), downlink=downlinks.CompressedStep(IDENTITY))
    same(two, make("laq", quadratic), quadratic)
    # and what is lost changes the run: the grid has an even number of points
    outs = [run(make(name, quadratic), quadratic.theta0, quadratic.shards, 3).info for name in ("laq", "two_laq")]
    assert not np.allclose(outs[0].extra["params"][1], outs[1].extra["params"][1], rtol=1e-4)


@pytest.mark.long
def test_adaptive_laq_of_one_choice_is_laq(quadratic: Toy) -> None:
    """It bills the byte that says how many bits follow."""
    adaptive = make("laq_adaptive", quadratic, min_bits=3, max_bits=3)
    same(adaptive, make("laq", quadratic), quadratic, bills=False)
    bits = [run(alg, quadratic.theta0, quadratic.shards, 1).info.bits_up for alg in (adaptive, make("laq", quadratic))]
    np.testing.assert_array_equal(bits[0], bits[1] + 8)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cada1", "cada2"])
def test_cada_of_c_zero_is_amsgrad(name: str, quadratic: Toy) -> None:
    cada = make(name, quadratic, c=0, sampler=None)
    info = same(cada, make("gd", quadratic, optimizer=laqjax.optimizers.amsgrad), quadratic)
    first, second, most = (np.zeros(5) for _ in range(3))
    for grad, now, after in zip(info.extra["grad"], info.extra["params"], info.extra["params"][1:], strict=False):
        total = grad.sum(axis=0)
        first, second = 0.9 * first + 0.1 * total, 0.999 * second + 0.001 * total**2
        most = np.maximum(most, second)
        np.testing.assert_allclose(after - now, -0.05 * first / (np.sqrt(most) + 1e-8), rtol=1e-9, atol=1e-12)
    some_silence(make(name, quadratic, sampler=None), quadratic)


@pytest.mark.long
def test_lasg_wk2_without_noise_is_lag(quadratic: Toy) -> None:
    """The memory is the gradient of the stale model. On minibatches it is not, and the rules differ."""
    same(make("lasg_wk2", quadratic, sampler=None), make("lag_wk", quadratic), quadratic)
    some_silence(make("lag_wk", quadratic), quadratic)
    sent = [
        run(make(name, quadratic, **BLOCKS), quadratic.theta0, quadratic.shards, ROUNDS).info.sent
        for name in ("lasg_wk2", "lag_wk")
    ]
    assert sent[0].sum() < sent[1].sum()


@pytest.mark.long
def test_lasg_wk1_by_hand(quadratic: Toy) -> None:
    """g_m(theta) - g_m(snapshot) against its value at the last upload; the snapshot is renewed every 5 rounds."""
    alg = make("lasg_wk1", quadratic, sampler=None, max_silence=None)
    info = run(alg, quadratic.theta0, quadratic.shards, ROUNDS).info
    params, grads = info.extra["params"], info.extra["grad"]
    period, lr, last = 5, 0.05, np.zeros((4, 5))
    sent = []
    for k in range(ROUNDS):
        drift = grads[k] - grads[k // period * period]
        recent = info.extra["step_sq"][:k][::-1][:4]
        threshold = 0.1 * np.sum(recent) / (lr * 4) ** 2  # xi = 0.4 over a window of 4
        send = (np.sum((drift - last) ** 2, axis=1) >= threshold) | (k == 0)
        last = np.where(send[:, None], drift, last)
        sent.append(send)
    np.testing.assert_array_equal(info.sent, sent)
    assert 0.05 < info.sent[1:].mean() < 0.95
    assert params.shape == (ROUNDS, 5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["cada1", "cada2"])
def test_cada_by_hand(name: str, quadratic: Toy) -> None:
    """Its threshold is c / D sum_d motion_d, whatever lr and M."""
    alg = make(name, quadratic, sampler=None, max_silence=None, c=20)
    info = run(alg, quadratic.theta0, quadratic.shards, ROUNDS).info
    grads, sent = info.extra["grad"], np.zeros((ROUNDS, 4), bool)
    last = np.zeros((4, 5))
    for k in range(ROUNDS):
        value = grads[k] - grads[k // 5 * 5] if name == "cada1" else grads[k]
        threshold = 20 / 4 * np.sum(info.extra["step_sq"][:k][::-1][:4])
        sent[k] = (np.sum((value - last) ** 2, axis=1) >= threshold) | (k == 0)
        last = np.where(sent[k][:, None], value, last)
    np.testing.assert_array_equal(info.sent, sent)
    assert 0.05 < sent[1:].mean() < 0.95


# ---- the server asks ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_lag_ps_by_hand(quadratic: Toy) -> None:
    """L_m^2 ||theta - theta_hat_m||^2 against the recent motion; only who is asked gets the model and computes."""
    alg = make("lag_ps", quadratic, max_silence=None)
    out = laqjax.run(alg, quadratic.theta0, quadratic.shards, ROUNDS, KEY, metrics=["gradients", "params", "step_sq"])
    params, each = out.info.extra["params"], np.array(EACH["smoothness"])
    stale, sent = np.zeros((4, 5)), []
    for k in range(ROUNDS):
        threshold = 0.1 * np.sum(out.info.extra["step_sq"][:k][::-1][:4]) / (0.05 * 4) ** 2
        ask = (each**2 * np.sum((params[k] - stale) ** 2, axis=1) >= threshold) | (k == 0)
        stale = np.where(ask[:, None], params[k], stale)
        sent.append(ask)
    np.testing.assert_array_equal(out.info.sent, sent)
    np.testing.assert_array_equal(out.info.bits_down, 64 * 5 * out.info.sent.sum(axis=1))
    np.testing.assert_array_equal(out.info.extra["gradients"], out.info.sent)
    assert 0.05 < out.info.sent[1:].mean() < 0.95


def test_iag_asks_one_worker_a_round(quadratic: Toy) -> None:
    info = run(make("iag_cyclic", quadratic), quadratic.theta0, quadratic.shards, ROUNDS).info
    np.testing.assert_array_equal(info.sent, np.arange(4) == np.arange(ROUNDS)[:, None] % 4)
    np.testing.assert_array_equal(info.bits_down, 64 * 5)


def test_random_iag_draws_workers_in_proportion_to_their_smoothness() -> None:
    with jax.enable_x64(True):
        toy, each = make_quadratic(), np.array([1, 4, 0, 5])
        sent = run(make("iag_random", toy, smoothness=each), toy.theta0, toy.shards, 1000).info.sent
    assert np.all(sent.sum(axis=1) == 1)
    counts, expected = sent.sum(axis=0), 100 * each
    assert counts[2] == 0
    drawn = expected > 0
    assert np.sum((counts[drawn] - expected[drawn]) ** 2 / expected[drawn]) < 13.8  # chi-square of 2, 1 in 1000
    # and one draw does not tell the next
    who = np.argmax(sent, axis=1)
    assert abs(np.corrcoef(who[1:], who[:-1])[0, 1]) < 0.1


def test_computed_gradients_are_counted(quadratic: Toy) -> None:
    """Rules that look at a second model compute a second gradient."""
    for name, each in (("laq", 1), ("lasg_wk1", 2), ("lasg_wk2", 2), ("cada1", 2), ("clag", 1)):
        alg = make(name, quadratic)
        out = laqjax.run(alg, quadratic.theta0, quadratic.shards, 2, KEY, metrics=["gradients"], chunk_size=2)
        np.testing.assert_array_equal(out.info.extra["gradients"], np.full((2, 4), each))


# ---- compressed members ------------------------------------------------------------------------------------------


@pytest.mark.long
def test_marina_by_hand(quadratic: Toy) -> None:
    """All estimates become the gradients in the rounds of the coin, which is one for all; else they move by Q(change)."""
    alg = make("marina", quadratic)
    info, state = run(alg, quadratic.theta0, quadratic.shards, ROUNDS)
    full = info.bits_up == 8 * 41
    assert np.all(full == full[:, :1])
    assert 0.2 < full[:, 0].mean() < 0.6
    grads, estimate = info.extra["grad"], np.zeros((4, 5))
    for k in range(ROUNDS - 1):
        for m in range(4):
            change = grads[k, m] - (grads[k - 1, m] if k else 0)
            keys = keys_of(k, m)
            rand_k: Any = compressors.rand_k(3)
            moved = rand_k.decode(rand_k.encode(jnp.asarray(change), keys), jnp.asarray(change))
            estimate[m] = grads[k, m] if full[k, 0] else estimate[m] + moved
        step = info.extra["params"][k + 1] - info.extra["params"][k]
        np.testing.assert_allclose(step, -0.05 * estimate.sum(axis=0), rtol=1e-9, atol=1e-12)
    assert jax.tree.leaves(state.workers.memory_state)[0].shape == (4, 5)


def test_the_coin_of_marina_always_falls_in_round_0(quadratic: Toy) -> None:
    info = run(make("marina", quadratic, probability=1e-6), quadratic.theta0, quadratic.shards, 5).info
    full = np.arange(5) == 0
    np.testing.assert_array_equal(info.bits_up.T == 8 * 41, [full] * 4)


@pytest.mark.long
def test_diana_by_hand(quadratic: Toy) -> None:
    """The direction takes the whole change, the memories move by the damped one."""
    info = run(make("diana", quadratic, damping=0.3), quadratic.theta0, quadratic.shards, ROUNDS).info
    memory, rand_k = np.zeros((4, 5)), compressors.rand_k(3)
    for k in range(ROUNDS - 1):
        change = np.zeros((4, 5))
        for m in range(4):
            target = jnp.asarray(info.extra["grad"][k, m] - memory[m])
            change[m] = rand_k.decode(rand_k.encode(target, keys_of(k, m)), target)
        step = info.extra["params"][k + 1] - info.extra["params"][k]
        np.testing.assert_allclose(step, -0.05 * (memory + change).sum(axis=0), rtol=1e-9, atol=1e-12)
        memory += 0.3 * change


def test_error_feedback_loses_nothing(quadratic: Toy) -> None:
    """What was sent and what is still owed add up to all gradients so far."""
    for name in ("topk_ef", "ef_sign_sgd"):
        info, state = run(make(name, quadratic), quadratic.theta0, quadratic.shards, ROUNDS)
        owed, params = state.workers.memory_state, state.params
        sent = (quadratic.theta0 - params) / 0.05
        everything = info.extra["grad"].sum(axis=(0, 1))
        np.testing.assert_allclose(sent + jnp.sum(owed, axis=0), everything, rtol=1e-9, atol=1e-10)
        assert np.any(np.abs(owed) > 1e-3)


def test_sign_sgd_is_a_majority_vote(quadratic: Toy) -> None:
    info = run(make("sign_sgd", quadratic), quadratic.theta0, quadratic.shards, ROUNDS).info
    vote = np.sign(np.sign(info.extra["grad"]).sum(axis=1))[:-1]
    # one bit has no zero: where four votes tie, the server says yes and no in turn
    turn = np.where((np.arange(ROUNDS - 1) + 4) % 2 == 1, -1, 1)[:, None]
    np.testing.assert_allclose(np.diff(info.extra["params"], axis=0), -0.05 * np.where(vote, vote, turn), atol=1e-15)
    assert 0.05 < np.mean(vote == 0) < 0.6
    assert np.all(info.bits_down == 8)
    assert np.all(info.bits_up == 8)


@pytest.mark.long
def test_lag_with_xi_zero_sends_always(quadratic: Toy) -> None:
    for name in ("lag_wk", "lag_ps", "lasg_wk2"):
        sent = run(
            make(name, quadratic, **LAZY_KNOBS | dict(xi=0)), quadratic.theta0, quadratic.shards, ROUNDS
        ).info.sent
        assert sent.all()
