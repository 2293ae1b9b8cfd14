"""Laws that every named algorithm obeys, reductions between them, and what the engine promises. A newcomer adds a row."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import KEY, Toy, programs

import laqjax
from laqjax import Algorithm, Shards, algorithms, compressors, downlinks, memories, rules, samplers, types
from laqjax._core import validation, wire_format
from laqjax.algorithms import _shared


class Row(NamedTuple):
    """A named algorithm, knobs to test it with, and other values of all of them in every kind of number."""

    factory: Callable[..., Algorithm]
    knobs: dict[str, Any]
    others: dict[str, tuple[Any, ...]]


LR = {"lr": (0.03, np.float64(0.01), np.float32(0.07), jnp.float32(0.02), 1)}
BITS = {"bits": (2, np.int64(5), np.uint8(16), jnp.int32(1), 7)}
MOTION = {
    "window": (2, np.int64(4), 3, 6, jnp.int32(5)),
    "max_silence": (3, np.int32(9), jnp.int32(4), None, 1),
    "rescale_short_history": (True, False, np.bool_(True), False, True),
    "force_first_upload": (False, True, False, False, True),
}
LAZY = MOTION | {"xi": (0.5, np.float64(0.1), np.ones(3) / 10, [0.1, 0, 0.2, 0, 0.3, 0], jnp.float32(0.3))}
CADA = MOTION | {"c": (0.5, np.float64(0.1), 0, np.int32(1), jnp.float32(0.3))}
SMOOTH = {"smoothness": ([1, 2, 3, 4], np.ones(4), np.arange(4), [0.1, 0, 1e3, 1], jnp.ones(4, np.float32))}
SHARE = {"probability": (0.1, np.float64(0.2), np.float32(0.3), jnp.float32(0.4), 1)}
DAMPING = {"damping": SHARE["probability"]}
ZETA = {"zeta": (0, np.float64(0.2), np.float32(0.3), jnp.float32(4), 1)}
PERIOD = {"period": BITS["bits"]}
LAZY_KNOBS = dict(xi=0.4, window=4, max_silence=6, padded_window=6)
CADA_KNOBS = dict(c=0.5, window=4, max_silence=6, padded_window=6)
EACH = dict(smoothness=[1.0, 2.0, 0.5, 1.5])
BLOCKS, EPOCHS = dict(sampler=samplers.BlockSampler(4)), dict(sampler=samplers.ShuffleSampler(4))
TOP, RANDOM = dict(compressor=compressors.top_k(3)), dict(compressor=compressors.rand_k(3))
LOCAL = dict(num_local_steps=2, local_lr=0.1)
ROWS = {
    "gd": Row(algorithms.gd, {}, LR),
    "qgd": Row(algorithms.qgd, dict(bits=3), LR | BITS),
    "lag_wk": Row(algorithms.lag_wk, LAZY_KNOBS, LR | LAZY),
    "lag_ps": Row(algorithms.lag_ps, LAZY_KNOBS | EACH, LR | LAZY | SMOOTH),
    "iag_cyclic": Row(algorithms.iag_cyclic, {}, LR),
    "iag_random": Row(algorithms.iag_random, EACH, LR | SMOOTH),
    "laq": Row(algorithms.laq, LAZY_KNOBS | dict(bits=3), LR | BITS | LAZY),
    "two_laq": Row(algorithms.two_laq, LAZY_KNOBS | dict(bits=3, downlink_bits=5), LR | BITS | LAZY),
    "laq_adaptive": Row(algorithms.laq_adaptive, LAZY_KNOBS, LR | {"min_bits": BITS["bits"]} | LAZY),
    "ef21": Row(algorithms.ef21, TOP, LR),
    "clag": Row(algorithms.clag, TOP | dict(zeta=200.0), LR | ZETA),
    "diana": Row(algorithms.diana, RANDOM | dict(damping=0.5), LR | DAMPING),
    "marina": Row(algorithms.marina, RANDOM | dict(probability=0.4), LR | SHARE),
    "marina_natural": Row(algorithms.marina, dict(compressor=compressors.natural(), probability=0.4), LR | SHARE),
    "vr_marina": Row(algorithms.marina, EPOCHS | RANDOM | dict(probability=0.4), LR | SHARE),
    "ef21_sgdm": Row(algorithms.ef21_sgdm, BLOCKS | TOP | dict(eta=0.3), LR | {"eta": SHARE["probability"]}),
    "ef21_p": Row(algorithms.ef21_p, TOP | dict(downlink_compressor=compressors.top_k(4)), LR),
    "ef_bv": Row(algorithms.ef_bv, TOP | dict(damping=0.5, scaling=0.8), LR | DAMPING),
    "dasha": Row(
        algorithms.dasha, RANDOM | dict(estimate_momentum=0.2), LR | {"estimate_momentum": SHARE["probability"]}
    ),
    "dasha_mvr": Row(
        algorithms.dasha,
        EPOCHS | RANDOM | dict(estimate_momentum=0.2, mvr_momentum=0.3),
        LR | {"mvr_momentum": SHARE["probability"]},
    ),
    "sgd": Row(algorithms.sgd, BLOCKS, LR),
    "qsgd": Row(algorithms.qsgd, EPOCHS | dict(levels=5), LR | {"levels": BITS["bits"]}),
    "terngrad": Row(algorithms.terngrad, BLOCKS, LR),
    "ssgd": Row(algorithms.ssgd, EPOCHS | dict(density=0.3), LR | {"density": SHARE["probability"]}),
    "sign_sgd": Row(algorithms.sign_sgd, BLOCKS, LR),
    "ef_sign_sgd": Row(algorithms.ef_sign_sgd, BLOCKS, LR),
    "topk_ef": Row(algorithms.topk_ef, EPOCHS | dict(k=3), LR),
    "dgc": Row(
        algorithms.dgc, EPOCHS | dict(k=3, momentum=0.5), LR | {"momentum": (0, 0.9, np.float32(0.3), 0.1, 0.5)}
    ),
    "fedavg": Row(algorithms.fedavg, LOCAL, LR | {"local_lr": LR["lr"]}),
    "fedpaq": Row(algorithms.fedpaq, EPOCHS | LOCAL | dict(levels=5), LR | {"levels": BITS["bits"]}),
    "fedlaq": Row(algorithms.fedlaq, LAZY_KNOBS | LOCAL | dict(num_participants=3), LR | BITS | LAZY),
    "slaq": Row(algorithms.slaq, EPOCHS | LAZY_KNOBS, LR | BITS | LAZY),
    "lasg_wk1": Row(algorithms.lasg_wk1, BLOCKS | LAZY_KNOBS | dict(period=5), LR | LAZY | PERIOD),
    "lasg_wk2": Row(algorithms.lasg_wk2, EPOCHS | LAZY_KNOBS, LR | LAZY),
    "lasg_ps": Row(algorithms.lasg_ps, BLOCKS | LAZY_KNOBS | EACH, LR | LAZY | SMOOTH),
    "cada1": Row(algorithms.cada1, BLOCKS | CADA_KNOBS | dict(period=5), LR | CADA | PERIOD),
    "cada2": Row(algorithms.cada2, EPOCHS | CADA_KNOBS, LR | CADA),
}
LAZY_ROWS = ["lag_wk", "laq"]
# whose parts are those of others, or close to them: `make test-long` checks them
COVERED = [
    "qgd",
    "lag_ps",
    "iag_cyclic",
    "ef21",
    "ef_bv",
    "marina_natural",
    "sgd",
    "terngrad",
    "ssgd",
    "topk_ef",
    "fedavg",
    "fedpaq",
    "slaq",
    "lasg_wk2",
    "lasg_ps",
    "cada1",
    "lag_wk",
    "diana",
    "vr_marina",
    "ef21_sgdm",
    "dasha",
    "qsgd",
    "ef_sign_sgd",
]
MANY = [pytest.param(name, marks=[pytest.mark.long] * (name in COVERED)) for name in ROWS]
# one member for each kind of part, for laws that compile programs of their own: a lazy rule, a selecting server, a compressed
# step and a compressed model, a memory of estimates on minibatches, a shared draw, gradients at other models, local steps
KINDS = ["laq", "iag_random", "two_laq", "ef21_p", "dasha_mvr", "marina", "cada2", "fedlaq"]
FEW = [pytest.param(name, marks=[pytest.mark.long] * (name not in KINDS)) for name in ROWS]
RECORD = ["error_sq", "grad", "gradients", "innovation_sq", "params", "step_sq", "target_sq"]
CHUNK = 10


def both(dtype: str, *more: Any) -> list[Any]:
    """Return the rows of a law on one problem: in `make test` many on the toy, and one for each kind of part on the other."""
    rows = MANY if dtype == "toy" else FEW
    return [pytest.param(dtype, *more, *row.values, marks=row.marks, id=f"{row.values[0]}-{dtype}") for row in rows]


def make(name: str, toy: Toy, **knobs: Any) -> Algorithm:
    row = ROWS[name]
    return row.factory(toy.oracle, **{"lr": 0.05, "num_workers": 4, **row.knobs, **knobs})


def run(alg: Algorithm, start: Any, shards: Shards, rounds: int, key: jax.Array = KEY) -> laqjax.RunResult:
    """All tests use one chunk and one record, so that each algorithm compiles once."""
    return laqjax.run(alg, start, shards, rounds, key, metrics=RECORD, chunk_size=CHUNK)


def identical(a: Any, b: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), strict=True)


def avals(tree: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(jax.eval_shape(lambda t: t, tree))]


# ---- the contract of every named algorithm ----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [*both("toy"), *both("toy64")])
def test_the_state_is_a_fixed_point(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(dtype)
    alg = make(name, toy)
    state = alg.init(toy.theta0)
    after, _ = jax.eval_shape(alg.step, state, Shards(*map(jnp.asarray, toy.shards)), KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert avals(after) == avals(state)


@pytest.mark.parametrize("name", MANY)
def test_other_numbers_do_not_recompile(name: str, toy: Toy) -> None:
    others = ROWS[name].others
    out = run(make(name, toy), toy.theta0, toy.shards, 2)
    compiled = programs()
    on_device = Shards(*map(jnp.asarray, toy.shards))
    calls = [(np.asarray(toy.theta0), toy.shards, 3), (out.state, on_device, 4), (toy.theta0, on_device, np.int64(9))]
    for i in range(len(others["lr"])):
        start, shards, rounds = calls[i % len(calls)]
        alg = make(name, toy, **{knob: values[i] for knob, values in others.items()})
        run(alg, start, shards, rounds, jax.random.key(i))
    assert programs() == compiled


def points_of(name: str, toy: Toy) -> list[Algorithm]:
    others = ROWS[name].others
    return [make(name, toy, **{k: v[i] for k, v in others.items()} | {"lr": 0.02 * (i + 1)}) for i in range(5)]


@pytest.mark.parametrize("name", FEW)
def test_a_sweep_is_a_loop(name: str, quadratic: Toy) -> None:
    algs, keys, shards = points_of(name, quadratic), jax.random.split(KEY, 5), quadratic.shards
    sweep = laqjax.sweep(
        laqjax.stack_algorithms(algs),
        quadratic.theta0,
        shards,
        CHUNK,
        keys,
        batch_size=3,
        metrics=RECORD,
        chunk_size=CHUNK,
    )
    for i, alg in enumerate(algs):
        info, state = run(alg, quadratic.theta0, shards, CHUNK, keys[i])
        np.testing.assert_array_equal(sweep.info.sent[:, i], info.sent)
        np.testing.assert_array_equal(sweep.info.bits_up[:, i], info.bits_up)
        np.testing.assert_array_equal(sweep.info.bits_down[:, i], info.bits_down)
        np.testing.assert_allclose(sweep.info.loss[:, i], info.loss, rtol=1e-12)
        point = laqjax.select_points(sweep.state, i)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), point, state)


@pytest.mark.parametrize(("dtype", "rounding", "name"), [*both("toy", 1e-6), *both("quadratic", 1e-14)])
def test_memories(name: str, dtype: str, rounding: float, request: pytest.FixtureRequest) -> None:
    """Silence changes nothing at a worker but its count, and the server's aggregate is the sum of the memories."""
    toy: Toy = request.getfixturevalue(dtype)
    alg = make(name, toy)
    state = alg.init(toy.theta0)
    silent = 0
    for _ in range(12):
        before = jax.device_get(state.workers)
        info, state = run(alg, state, toy.shards, 1)
        workers, sent = jax.device_get(state.workers), info.sent[0]
        if isinstance(alg.rule, rules.MaxSilence):
            np.testing.assert_array_equal(workers.rule[0], np.where(sent, 0, before.rule[0] + 1))
            workers, before = (w._replace(rule=w.rule[1]) for w in (workers, before))
        if isinstance(
            alg.rule, rules.PartialParticipation
        ):  # it has asked some of the silent ones, whose silence is longer now
            workers, before = (w._replace(rule=None) for w in (workers, before))
        kept = [w.memory if alg.rule.renews_in_silence else w for w in (before, workers)]
        identical(*([leaf[~sent] for leaf in jax.tree.leaves(w)] for w in kept))
        if alg.memory.is_persistent:
            memory = workers.memory[0] if isinstance(workers.memory, tuple) else workers.memory
            error = np.abs(np.asarray(state.aggregate) - memory.sum(axis=0)).max()
            assert error <= rounding * np.abs(memory).max()
        silent += np.sum(~sent)
    assert (silent > 0) == alg.rule.can_skip


@pytest.mark.parametrize(("dtype", "name"), [*both("toy"), *both("quadratic")])
def test_billed_bits_are_bytes(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    """Every message of a run, made again from the state: its bytes are what was billed, and decode to what it meant."""
    toy: Toy = request.getfixturevalue(dtype)
    alg = make(name, toy)
    state: Any = alg.init(toy.theta0)
    for k in range(4):
        before, state_before = jax.device_get(state.workers), state
        info, state = run(alg, state, toy.shards, 1)
        for m in range(4):
            keys, grad = keys_of(k, m), info.extra["grad"][0, m]
            memory = jax.tree.map(lambda leaf: leaf[m], before.memory)  # noqa: B023
            now: Any = types.RoundContext(
                state_before.params, keys, alg.learning_rate_at(k), 4, gradient_at=partial(looked, alg, toy, keys)
            )
            target = jnp.asarray(alg.memory.compression_target(memory, grad, now)[0])
            payload = alg.compressor.encode(target, keys)
            data = wire_format.to_bytes(alg.compressor, payload, target)
            assert len(data) == wire_format.message_bytes(alg.compressor.wire_fields(payload, target))
            assert info.bits_up[0, m] == (8 * len(data) if info.sent[0, m] else 0)
            back = wire_format.from_bytes(alg.compressor, data, target)
            identical(np.asarray(back), np.asarray(alg.compressor.decode(payload, target)))
        down = 8 * toy.theta0.nbytes
        if isinstance(
            alg.downlink, downlinks.CompressedStep | downlinks.CompressedModel | downlinks.CompressedDirection
        ):
            payload = alg.downlink.compressor.encode(jnp.ones_like(toy.theta0), keys_of(k, 4))
            down = 8 * len(wire_format.to_bytes(alg.downlink.compressor, payload, toy.theta0))
        asked = info.extra["gradients"][0] > 0
        assert info.bits_down == down * (asked.sum() if alg.rule.server_selects else 1)


def looked(alg: Algorithm, toy: Toy, keys: types.RoundKeys, params: Any, full: bool = False, when: Any = True) -> Any:
    """The gradient of a worker at another model on the rows of its round."""
    shards = jax.tree.map(jnp.asarray, toy.shards)
    return gradient(alg.oracle, None if full else alg.sampler, jnp.asarray(params), shards, keys)


@jax.jit
def gradient(oracle: Any, sampler: Any, params: Any, shards: Shards, keys: types.RoundKeys) -> Any:
    """The gradient of the worker of `keys`, compiled once for each sampler."""
    return oracle(params, shards, keys.worker, sampler and sampler(keys, shards)).grad


def keys_of(round: int, worker: int, workers: int = 4) -> types.RoundKeys:
    """The draws of a worker in a round, as they are documented."""
    key = jax.random.fold_in(KEY, round)
    own, shared = (jax.random.fold_in(key, index) for index in (worker, workers))
    return types.RoundKeys(own, shared, KEY, jnp.int32(round), jnp.int32(worker))


@pytest.mark.parametrize("name", MANY)
def test_a_run_cut_anywhere_is_the_same_run(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    straight = run(alg, toy.theta0, toy.shards, 33)
    for cut in ([10, 23], [1, 12, 20]):
        start, infos = toy.theta0, []
        for rounds in cut:
            out = run(alg, start, toy.shards, rounds)
            start = out.state
            infos.append(out.info)
        identical((laqjax.concatenate_infos(infos), start), tuple(straight))


def test_workers_side_by_side_are_workers_in_turn(toy64: Toy) -> None:
    alg = make("laq", toy64)
    one, three = (
        laqjax.run(alg, toy64.theta0, toy64.shards, 30, KEY, chunk_size=30, worker_batch_size=n) for n in (1, 3)
    )
    np.testing.assert_array_equal(three.info.sent, one.info.sent)
    np.testing.assert_allclose(three.info.loss, one.info.loss, rtol=1e-12)


@pytest.mark.parametrize("name", MANY)
def test_the_callers_arrays_survive(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    shards = Shards(*map(jnp.asarray, toy.shards))
    state = alg.init(toy.theta0)
    # the caller's vector stands in two places: neither is donated
    state = state._replace(params=toy.theta0, optimizer=jax.tree.map(lambda a: a, state.optimizer))
    given = alg, toy.theta0, state, shards
    copies = jax.tree.map(np.array, given)
    first, *others = (run(alg, start, shards, 5) for start in (toy.theta0, state, toy.theta0, state))
    identical(given, copies)
    for out in others:
        identical(out, first)


@pytest.mark.parametrize("name", [row for row in FEW if row.values != ("sign_sgd",)])  # one bit has no zero
def test_a_zero_gradient_moves_nothing(name: str, quadratic: Toy) -> None:
    still = quadratic.shards._replace(y=np.zeros((4, 12)))
    info, state = run(make(name, quadratic), quadratic.theta0, still, 10)
    assert not any(np.any(fact) for name, fact in info.extra.items() if name != "gradients")
    assert not info.loss.any()
    np.testing.assert_array_equal(state.params, np.zeros(5))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", [row for row in MANY if "window" in ROWS[str(row.values[0])].others])
def test_the_history_is_made_of_the_steps_really_taken(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    info, state = run(alg, toy.theta0, toy.shards, 25)
    path = np.concatenate([info.extra["params"], state.params[None]]).astype(np.float64)
    np.testing.assert_allclose(info.extra["step_sq"], np.sum(np.diff(path, axis=0) ** 2, axis=1), rtol=1e-5)
    motion = np.asarray(state.rule[0] if isinstance(state.rule, tuple) else state.rule)
    assert motion.shape == (6,)
    for k in range(25 - len(motion), 25):
        assert motion[k % len(motion)] == info.extra["step_sq"][k] > 0


def test_parts_of_one_shape_are_not_one_structure(toy: Toy) -> None:
    """`jax.jit` tells programs apart by comparing structures, and so does `stack_algorithms`."""
    pairs = [
        (samplers.BlockSampler(4), samplers.ShuffleSampler(4)),
        (compressors.identity(), compressors.ternary()),
        (memories.NoMemory(), memories.ErrorFeedback()),
        (rules.Always(), rules.Cyclic()),
        (rules.InnovationChange(), rules.StaleModelChange()),
    ]
    for one, other in pairs:
        assert jax.tree.structure(one) != jax.tree.structure(other)
    with pytest.raises(ValueError, match="algorithm 1 differs in structure"):
        laqjax.stack_algorithms([make("sgd", toy), make("sgd", toy, sampler=samplers.ShuffleSampler(4))])


# ---- rules, memories, servers -------------------------------------------------------------------------------------------------


def test_patience_of_zero_always_sends(toy64: Toy) -> None:
    laq = make("laq", toy64, force_first_upload=False)
    rule: Any = laq.rule
    eager = replace(laq, rule=rules.limit_silence(rule.rule, 0))
    assert not run(laq, toy64.theta0, toy64.shards, 50).info.sent.all()
    laq, qgd = (run(alg, toy64.theta0, toy64.shards, 50).info for alg in (eager, make("qgd", toy64)))
    assert laq.sent.all()
    np.testing.assert_allclose(laq.extra["params"], qgd.extra["params"], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", LAZY_ROWS)
def test_patience_counts_the_silent_rounds(name: str, toy: Toy) -> None:
    # with these weights no innovation outweighs the motion, once there is any: only patience sends
    for force_first_upload, rounds in ((True, [0, 5, 10, 15]), (False, [4, 9, 14, 19])):
        alg = make(name, toy, xi=1e20, max_silence=4, force_first_upload=force_first_upload)
        state = alg.init(toy.theta0)
        info = run(alg, state._replace(rule=(jnp.ones(6), None)), toy.shards, 20).info
        np.testing.assert_array_equal(info.sent.T, [np.isin(np.arange(20), rounds)] * 4)


@pytest.mark.parametrize("name", LAZY_ROWS)
def test_a_tie_is_sent(name: str, quadratic: Toy) -> None:
    still = quadratic.shards._replace(y=np.zeros((4, 12)))
    assert run(make(name, quadratic, force_first_upload=False), quadratic.theta0, still, 1).info.sent.all()


@pytest.mark.parametrize("name", LAZY_ROWS)
def test_the_forced_first_upload(name: str, toy: Toy) -> None:
    # the rule alone: LAG's sends, there being neither motion nor error; LAQ's 1-bit grid is too coarse to be worth it
    knobs = {"bits": 1} if name == "laq" else {}
    algs = [make(name, toy, force_first_upload=first, **knobs) for first in (True, False)]
    forced, rule = (run(alg, toy.theta0, toy.shards, 1).info.sent for alg in algs)
    assert forced.all()
    assert rule.any() == rule.all() == (name == "lag_wk")


@pytest.mark.parametrize("memory", [memories.NoMemory(), memories.ErrorFeedback()])
def test_a_rule_that_skips_needs_a_memory_that_persists(memory: types.Memory, toy: Toy) -> None:
    lazy = _shared.make_lazy_rule(rules.make_history(0.8, 10, np.float32), rules.InnovationChange())
    for trigger in (lazy, rules.limit_silence(lazy, 100)):
        with pytest.raises(ValueError, match=f"memory {type(memory).__name__} .*: must be a persistent memory"):
            laqjax.assemble(toy.oracle, compressors.identity(), trigger, memory, lr=0.1, num_workers=4)
    laqjax.assemble(toy.oracle, compressors.identity(), rules.Always(), memory, lr=0.1, num_workers=4)


def test_the_server_can_be_adam(toy64: Toy) -> None:
    """The aggregate is what the optimizer gets, and what the rule watches: Adam's steps have another scale."""
    alg, adam = make("laq", toy64, optimizer=optax.adam), optax.adam(0.05)
    state = alg.init(toy64.theta0)
    params: Any = toy64.theta0
    memory = adam.init(params)
    uploads = 0
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float and int
        for k in range(15):
            info, state = run(alg, state, toy64.shards, 1)
            updates, memory = adam.update(jnp.asarray(state.aggregate), memory, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(state.params, params, rtol=1e-12)
            given = jnp.sum(jnp.asarray(state.aggregate) ** 2)
            np.testing.assert_allclose(state.rule[0][k % 6], given, rtol=1e-9)
            uploads += np.sum(info.sent)
    assert uploads < 15 * 4


@pytest.mark.parametrize("factory", [algorithms.gd, algorithms.iag_cyclic])
def test_bits_beyond_int32_are_counted(factory: Any, toy: Toy) -> None:
    """Bytes in int32 on the device, bits in int64 on the host, and a refusal where bytes would exceed int32."""
    workers = 4 if factory is algorithms.iag_cyclic else 2  # the server sends one model to each that it selects
    most = (2**31 - 1) // 4 // workers
    for size, fits in ((most, True), (most + 1, False)):
        given = jax.ShapeDtypeStruct((size,), np.float32)
        wide = laqjax.oracles.from_loss(lambda params, x, y: params[0] * y.astype(np.float32), given)
        alg = factory(wide, lr=0.1, num_workers=4)
        payload: dict[str, Any] = {}
        assert int(wire_format.message_bytes(alg.compressor.wire_fields(payload, given))) == 4 * size
        with nullcontext() if fits else pytest.raises(ValueError, match=f"parameters: must be <= {most}"):
            validation.check_run_inputs(alg, given, toy.shards)
    sizes = np.full((3, 4), 4 * most, np.int32)
    info = laqjax.RoundInfo(np.zeros(3), sizes > 0, sizes, sizes[:, 0], {})
    assert info.bits_up.dtype == info.bits_down.dtype == np.int64
    assert info.bits_up.sum() == 4 * info.bits_down.sum() == 3 * 4 * 32 * most
    with pytest.raises(TypeError, match="read bytes_up"):
        jax.eval_shape(lambda info: info.bits_up, info)


def test_a_sweep_of_many_chunks_is_one_program(toy: Toy) -> None:
    algs = laqjax.stack_algorithms([make("laq", toy), make("laq", toy, bits=5)])
    before = programs()
    laqjax.sweep(algs, toy.theta0, toy.shards, 21, jax.random.split(KEY, 2), chunk_size=7)
    assert programs() == before + 1
