"""Laws that every named algorithm obeys, reductions between them, and what the engine promises. A newcomer adds a row."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import laqjax
from laqjax import Shards, algorithms, compressors, memories, rules, samplers, types
from laqjax._core import validation, wire_format
from laqjax.algorithms import _shared
from tests.laws.laws import (
    check_billed_bits,
    check_cut_run,
    check_memories,
    check_state_is_fixed_point,
    check_sweep_is_loop,
)
from tests.laws.registry import ROWS, make, parametrize_rows, points_of
from tests.support import KEY, Toy, identical, programs, run

pytestmark = pytest.mark.core


LAZY_ROWS = ["lag_wk", "laq"]
# one member for each kind of part in `make test`, the others in `make test-long`: a lazy rule, a selecting server, a compressed
# step and a compressed model, a memory of estimates on minibatches, a shared draw, gradients at other models, local steps,
# local optimizers with a state
KINDS = ["laq", "iag_random", "two_laq", "ef21_p", "dasha_mvr", "marina", "cada2", "fedlaq", "diloco_ef"]
FEW = parametrize_rows(KINDS)
SWEPT = parametrize_rows(["two_laq", "dasha_mvr"])
CALLED = parametrize_rows(["laq", "two_laq", "dasha_mvr", "fedlaq", "diloco_ef"])
LONG = parametrize_rows([])


def rows_on(dtype: str, *more: Any, rows: list[Any] = FEW) -> list[Any]:
    """Return the rows of a law on one problem."""
    return [pytest.param(dtype, *more, *row.values, marks=row.marks, id=f"{row.values[0]}-{dtype}") for row in rows]


# ---- the contract of every named algorithm ----------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [*rows_on("toy"), *rows_on("toy64", rows=LONG)])
def test_the_state_is_a_fixed_point(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(dtype)
    check_state_is_fixed_point(make(name, toy), toy)


@pytest.mark.parametrize("name", CALLED)
def test_other_numbers_do_not_recompile(name: str, toy: Toy) -> None:
    others = ROWS[name].other_values
    out = run(make(name, toy), toy.theta0, toy.shards, 2)
    compiled = programs()
    on_device = Shards(*map(jnp.asarray, toy.shards))
    calls = [(np.asarray(toy.theta0), toy.shards, 3), (out.state, on_device, 4), (toy.theta0, on_device, np.int64(9))]
    for i in range(len(others["lr"])):
        start, shards, rounds = calls[i % len(calls)]
        alg = make(name, toy, **{knob: values[i] for knob, values in others.items()})
        run(alg, start, shards, rounds, jax.random.key(i))
    assert programs() == compiled


@pytest.mark.parametrize("name", SWEPT)
def test_a_sweep_is_a_loop(name: str, quadratic: Toy) -> None:
    check_sweep_is_loop(points_of(name, quadratic), quadratic)


@pytest.mark.parametrize(
    ("dtype", "rounding", "name"), [*rows_on("toy", 1e-6, rows=LONG), *rows_on("quadratic", 1e-14)]
)
def test_memories(name: str, dtype: str, rounding: float, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(dtype)
    check_memories(make(name, toy), toy, rounding)


@pytest.mark.parametrize(("dtype", "name"), [*rows_on("toy"), *rows_on("quadratic")])
def test_billed_bits_are_bytes(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    toy: Toy = request.getfixturevalue(dtype)
    check_billed_bits(make(name, toy), toy)


@pytest.mark.parametrize("name", FEW)
def test_a_run_cut_anywhere_is_the_same_run(name: str, toy: Toy) -> None:
    check_cut_run(make(name, toy), toy)


def test_workers_side_by_side_are_workers_in_turn(toy64: Toy) -> None:
    alg = make("laq", toy64)
    one, three = (
        laqjax.run(alg, toy64.theta0, toy64.shards, 30, KEY, chunk_size=30, worker_batch_size=n) for n in (1, 3)
    )
    np.testing.assert_array_equal(three.info.sent, one.info.sent)
    np.testing.assert_allclose(three.info.loss, one.info.loss, rtol=1e-12)


@pytest.mark.parametrize("name", FEW)
def test_the_callers_arrays_survive(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    shards = Shards(*map(jnp.asarray, toy.shards))
    state = alg.init(toy.theta0)
    # the caller's vector stands in two places: neither is donated
    state = state._replace(params=toy.theta0, optimizer_state=jax.tree.map(lambda a: a, state.optimizer_state))
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
    assert not any(np.any(value) for name, value in info.extra.items() if name != "gradients")
    assert not info.loss.any()
    np.testing.assert_array_equal(state.params, np.zeros(5))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# with momentum, the history of lazy_diloco is made of directions; its twin has them
STEPS = [name for name, row in ROWS.items() if "window" in row.other_values and name != "lazy_diloco"]


@pytest.mark.parametrize("name", [row for row in FEW if row.values[0] in STEPS])
def test_the_history_is_made_of_the_steps_really_taken(name: str, toy: Toy) -> None:
    alg = make(name, toy)
    info, state = run(alg, toy.theta0, toy.shards, 25)
    path = np.concatenate([info.extra["params"], state.params[None]]).astype(np.float64)
    np.testing.assert_allclose(info.extra["step_sq"], np.sum(np.diff(path, axis=0) ** 2, axis=1), rtol=1e-5)
    motion = np.asarray(state.rule_state[0] if isinstance(state.rule_state, tuple) else state.rule_state)
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
        info = run(alg, state._replace(rule_state=(jnp.ones(6), None)), toy.shards, 20).info
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
        with pytest.raises(ValueError, match=f"memory {type(memory).__name__} .*: must be persistent"):
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
            np.testing.assert_allclose(state.rule_state[0][k % 6], given, rtol=1e-9)
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
