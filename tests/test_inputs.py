"""What cannot work is refused before anything is compiled, in words: the argument, its value, what was expected.

A run that diverges stops and says where.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import KEY, Toy, programs, softmax_loss

import laqjax
from laqjax import algorithms, checks, oracle, rules


@pytest.fixture(autouse=True)
def _without_a_type_checker() -> Iterator[None]:
    """As for a user: what the library itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(call: Callable[[], Any], message: str) -> None:
    """`message` is a part of the error, as it stands."""
    compiled = programs()
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    assert programs() == compiled


def test_a_close_name_is_suggested() -> None:
    assert checks.suggest("mesages", ["sums", "messages"]) == "; did you mean 'messages'?"
    assert checks.suggest("hope", ["sums", "messages"]) == ""
    assert checks.suggest(3, {"sums": 1}) == ""


KNOBS: list[Any] = [
    *(("bits", bad, "expected one whole number and >= 1 and <= 16") for bad in (0, 17, 2.5, True, None, [4, 4])),
    *(("lr", bad, "expected one finite number and > 0") for bad in (0, -1, np.nan, np.inf, "fast", [0.1, 0.1])),
    *(("num_workers", bad, "expected one whole number and >= 1") for bad in (0, -4, 1.5)),
    *(("limit", bad, "expected one whole number and >= 1") for bad in (0, -1, 2.5, np.nan, True)),
    *(("window", bad, "expected one whole number and >= 1") for bad in (0, -1, 2.5)),
    *(("max_window", bad, "expected one whole number and >= 10") for bad in (0, 9, 10.5)),
    *(("xi", bad, "expected one number >= 0") for bad in (-0.1, np.nan, np.inf, "much", [0.1] * 9, [[0.1] * 10])),
    ("xi", [0.1] * 9 + [-0.1], "expected one number >= 0"),
    ("xi", [0.1] * 9 + [np.nan], "expected one number >= 0"),
    ("bits", np.True_, "expected one whole number and >= 1 and <= 16"),
    ("first_upload", "maybe", "expected 'forced' or 'rule'"),
    ("ramp", "no", "expected True or False"),
    ("bits", "4", "expected one whole number and >= 1 and <= 16"),
]


def test_smoothness_is_one_number_a_worker(toy: Toy) -> None:
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    for factory in (algorithms.lag_ps, algorithms.lasg_ps, algorithms.iag_random):
        for bad in ([1.0, 2.0], [1.0] * 5, 1.0, [1.0, 1.0, 1.0, -1.0]):
            refused(lambda f=factory, b=bad: f(toy.oracle, smoothness=b, **good), "L_m >= 0 of each of the num_workers")
    refused(lambda: algorithms.iag_random(toy.oracle, smoothness=[0.0] * 4, **good), "expected at least one > 0")


def test_the_weight_of_cada_is_c(toy: Toy) -> None:
    make: Any = algorithms.cada2
    with pytest.raises(TypeError, match="xi"):
        make(toy.oracle, lr=0.1, num_workers=4, xi=0.5)


@pytest.mark.parametrize(("knob", "bad", "expected"), KNOBS)
def test_knobs(knob: str, bad: Any, expected: str, toy: Toy) -> None:
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    message = f"{knob} = {bad!r}: {expected}"
    refused(lambda: algorithms.laq(toy.oracle, **good | {knob: bad}), message)
    if knob != "bits":
        refused(lambda: algorithms.lag_wk(toy.oracle, **good | {knob: bad}), message)
    if knob in ("lr", "num_workers"):
        refused(lambda: algorithms.gd(toy.oracle, **good | {knob: bad}), message)
    if knob in ("lr", "num_workers", "bits"):
        refused(lambda: algorithms.qgd(toy.oracle, **good | {knob: bad}), message)


def test_patience_may_be_zero_but_not_less() -> None:
    rule = algorithms.lazy(rules.history(0.8, 10, np.float32), rules.InnovationChange())
    rules.max_silence(rule, 0)
    refused(lambda: rules.max_silence(rule, -1), "limit = -1: expected one whole number and >= 0")


ORACLE: list[tuple[dict[str, Any], str]] = [
    (dict(reduction="median"), "reduction = 'median': expected 'mean' or 'sum'"),
    (dict(l2=-0.1), "l2 = -0.1: expected one finite number and >= 0"),
    (dict(l2=np.nan), "l2 = nan: expected one finite number and >= 0"),
    (dict(l2=np.inf), "l2 = inf: expected one finite number and >= 0"),
    (dict(tile=0), "tile = 0: expected one whole number and >= 1"),
    (dict(tile=2.5), "tile = 2.5: expected one whole number and >= 1"),
]


@pytest.mark.parametrize(("wrong", "message"), ORACLE)
def test_the_oracle(wrong: dict[str, Any], message: str) -> None:
    refused(lambda: oracle.from_loss(softmax_loss, jnp.zeros(3), **wrong), message)


@pytest.mark.parametrize(
    ("params", "got"),
    [
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float64)}, "['float32', 'float64']"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.int32)}, "['float32', 'int32']"),
        (np.zeros(2, np.int32), "['int32']"),
        ({}, "[]"),
    ],
)
def test_the_parameters_dtype(params: Any, got: str) -> None:
    refused(lambda: oracle.from_loss(softmax_loss, params), f"params: expected arrays of one floating dtype, got {got}")


def changed(array: Any, index: Any, value: float) -> np.ndarray:
    array = np.array(array, np.float32)
    array[index] = value
    return array


SHARDS: list[Any] = [
    (lambda s: s._replace(y=s.y[:, :-1]), "expected x [M, N, ...], y [M, N, ...] and weight [M, N], got [4, 12, 20], [4, 11]"),
    (lambda s: s._replace(weight=s.weight[:, :-1]), "expected x [M, N, ...], y [M, N, ...] and weight [M, N], got [4, 12"),
    (lambda s: s._replace(weight=s.weight[0]), "and weight [M, N], got [4, 12, 20], [4, 12], [12]"),
    (lambda s: laqjax.Shards(*(a[:3] for a in s)), "shards of 3 workers for an algorithm of num_workers = 4"),
    (lambda s: laqjax.Shards(*(a[:, :0] for a in s)), "shards.weight of worker 0 sums to 0"),
    (lambda s: s._replace(weight=changed(s.weight, 2, 0)), "shards.weight of worker 2 sums to 0: expected weights >= 0"),
    (lambda s: s._replace(weight=changed(s.weight, (3, 1), -1)), "shards.weight of worker 3 sums to 10: expected weights >= 0"),
    (lambda s: s._replace(weight=changed(s.weight, (3, 1), np.nan)), "shards.weight holds NaN or infinity"),
    (lambda s: s._replace(weight=changed(s.weight, (1, 3), 0)), "shards.weight of worker 1 is 0 at row 3 and not after it"),
    (lambda s: s._replace(weight=s.weight[:, ::-1]), "of worker 0 is 0 at row 0 and not after it: expected padding at the end"),
    (lambda s: s._replace(x=changed(s.x, (1, 2, 3), np.nan)), "shards.x holds NaN or infinity: expected finite data"),
    (lambda s: s._replace(x=changed(s.x, (1, 2, 3), np.inf)), "shards.x holds NaN or infinity: expected finite data"),
    (lambda s: s._replace(y=changed(s.y, (1, 2), -np.inf)), "shards.y holds NaN or infinity: expected finite data"),
    (lambda s: s._replace(x=np.asarray(s.x).astype(str)), "shards.x of dtype <U3: expected numbers"),
    (lambda s: s._replace(weight=np.asarray(s.weight) > 0), "shards.weight of dtype bool: expected numbers"),
    (lambda s: s._replace(y=np.asarray(s.y).astype(object)), "shards.y of dtype object: expected numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), SHARDS)
def test_the_shards(wrong: Callable[[laqjax.Shards], laqjax.Shards], message: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    shards = wrong(toy.shards)
    refused(lambda: laqjax.run(alg, toy.theta0, shards, 3, KEY), message)
    refused(lambda: laqjax.init(alg, toy.theta0, shards), message)
    state = laqjax.init(alg, toy.theta0, toy.shards)
    refused(lambda: laqjax.run(alg, state, shards, 3, KEY), message)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda theta: theta[:-1], "float32[62]"),
        (lambda theta: theta.reshape(3, 21), "float32[3, 21]"),
        (lambda theta: theta.astype(np.float16), "float16[63]"),
        (lambda theta: np.asarray(theta, np.float64), "float64[63]"),
        (lambda theta: np.ones(63, int), "int64[63]"),
        (lambda theta: np.ones(63).tolist(), "<class 'list'>"),
    ],
)
def test_the_start(wrong: Any, got: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    start = wrong(toy.theta0)
    refused(lambda: laqjax.run(alg, start, toy.shards, 3, KEY), f"params = {got}: expected float32[63], a vector")


def test_a_state_of_another_window(toy: Toy) -> None:
    short, long = (algorithms.laq(toy.oracle, lr=0.1, num_workers=4, window=window) for window in (5, 10))
    state = laqjax.init(long, toy.theta0, toy.shards)
    refused(
        lambda: laqjax.run(short, state, toy.shards, 3, KEY), "state: expected one that `init` makes for this algorithm"
    )


RUN: list[tuple[dict[str, Any], str]] = [
    *((dict(rounds=bad), f"rounds = {bad!r}: expected one whole number and >= 1") for bad in (0, -1, 2.5, None, True)),
    *((dict(chunk=bad), f"chunk = {bad!r}: expected one whole number and >= 1") for bad in (0, 2.5)),
    (dict(workers_at_once=0), "workers_at_once = 0: expected one whole number and >= 1"),
]


@pytest.mark.parametrize(("wrong", "message"), RUN)
def test_the_arguments_of_a_run(wrong: dict[str, Any], message: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    arguments: Any = dict(rounds=3, key=KEY) | wrong
    refused(lambda: laqjax.run(alg, toy.theta0, toy.shards, **arguments), message)


def test_an_unknown_record(toy: Toy) -> None:
    # found while tracing: only there is it known what this algorithm has to tell
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    with pytest.raises(
        ValueError, match=r"record = \['hope', 'pain'\]: expected names among .*'grad', .*'innovation_sq'"
    ):
        laqjax.run(alg, toy.theta0, toy.shards, 3, KEY, record=["pain", "grad", "hope"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda losses: jnp.mean(losses), "expected per-example losses of shape [2]; do not average"),
        (lambda losses: losses[:, None], "expected per-example losses of shape [2]"),
        (lambda losses: (losses, losses), "expected per-example losses of shape [2]"),
        (lambda losses: losses.astype(np.float16), "gave float16 losses for float32 params: expected float32"),
        (lambda losses: losses.astype(np.int32), "gave int32 losses for float32 params: expected float32"),
    ],
)
def test_the_loss(wrong: Any, message: str, toy: Toy) -> None:
    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        return wrong(softmax_loss(params, x, y))

    alg = algorithms.laq(replace(toy.oracle, loss_fn=loss_fn), lr=0.1, num_workers=4)
    refused(lambda: laqjax.run(alg, toy.theta0, toy.shards, 3, KEY), message)


def test_a_diverging_run_says_where(toy: Toy) -> None:
    """Twice the largest stable step: losses grow a hundredfold a round, until float32 overflows."""
    flat = oracle.from_loss(lambda params, x, y: 1e3 * params[0] ** 2 + 0 * y.astype(np.float32), jnp.ones(1))
    alg = algorithms.gd(flat, lr=0.01, num_workers=4)
    theta0 = jnp.ones(1)
    with pytest.raises(laqjax.Diverged) as whole:
        laqjax.run(alg, theta0, toy.shards, 50, KEY, chunk=4)
    stop = whole.value.round
    assert 4 < stop < 50
    assert f"from round {stop} on, after it had grown; a smaller lr" in str(whole.value)
    losses = whole.value.info.loss
    assert losses.shape == (stop,)
    assert whole.value.info.sent.shape == (stop, 4)
    assert np.all(np.isfinite(losses))
    # every round before is good, the round itself is not
    good = laqjax.run(alg, theta0, toy.shards, stop, KEY, chunk=4)
    np.testing.assert_array_equal(good.info.loss, losses)
    # rounds are counted from the very start, infos from the start of the call
    state = laqjax.run(alg, theta0, toy.shards, 3, KEY, chunk=4).state
    with pytest.raises(laqjax.Diverged) as resumed:
        laqjax.run(alg, state, toy.shards, 50, KEY, chunk=4)
    assert resumed.value.round == stop
    np.testing.assert_array_equal(resumed.value.info.loss, losses[3:])


def test_a_loss_that_is_nan_is_no_step_too_large(toy: Toy) -> None:
    zero_by_zero = oracle.from_loss(lambda params, x, y: params[0] * 0 / (0 * y.astype(np.float32)), jnp.ones(1))
    alg = algorithms.gd(zero_by_zero, lr=0.01, num_workers=4)
    with pytest.raises(laqjax.Diverged, match="not finite in round 0, and had not grown before: a 0 / 0"):
        laqjax.run(alg, jnp.ones(1), toy.shards, 5, KEY, chunk=4)
