"""The descent that LAQ's rule is made for, round by round, on random problems.

With L the smoothness of f = sum f_m, beta_d = (1 / lr) sum_{j >= d} xi_j and V = f + sum_d beta_d motion_d, where
motion_d = ||theta^{k+1-d} - theta^{k-d}||^2: whenever sum_d xi_d <= (1 - lr L) / 2,

    V(k+1) <= V(k) - (lr / 2) ||grad f(theta^k)||^2 + lr M sum_m (4 error_sq_m + 3 last_error_sq_m).

Where it comes from: f falls by (lr / 2) ||grad f||^2 + (1 / (2 lr) - L / 2) motion_1, up to (lr / 2) ||deviation||^2; a
sender deviates by its error, a silent worker by innovation and error, of which the rule bounds the innovation.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import laqjax
from laqjax import Algorithm, Shards, algorithms, theory
from tests.support import KEY, square_loss

M, N, P, WINDOW, ROUNDS = 3, 6, 4, 5, 40
L2 = 0.05


def logistic_loss(params: Any, x: Any, y: Any) -> jax.Array:
    return jax.nn.softplus(-jnp.sign(y) * (x @ params))


CURVATURE = {square_loss: 1, logistic_loss: 1 / 4}  # the largest second derivative in x @ params


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, float, dict[str, Any], float, list[int]]:
    """Seed of the data, lr L, the knobs of the rule, sum xi as a share of its bound, and the shape of xi."""
    window = draw(st.integers(1, WINDOW))
    shape = draw(st.lists(st.integers(0, 5), min_size=window, max_size=window).filter(any))
    knobs = dict(
        window=window,
        max_silence=draw(st.sampled_from([None, 3, 20])),
        force_first_upload=draw(st.sampled_from([True, False])),
    )
    return draw(st.integers(0, 999)), draw(st.floats(0.05, 0.9)), knobs, draw(st.floats(0, 1)), shape


@pytest.mark.parametrize("loss", [logistic_loss, pytest.param(square_loss, marks=pytest.mark.long)])
@given(cases(), st.integers(1, 16))
def test_laq_descends(loss: Any, case: Any, bits: int) -> None:
    check_descent(algorithms.laq, loss, *case, bits=bits)


@pytest.mark.long
@pytest.mark.parametrize("loss", [square_loss, logistic_loss])
@given(cases())
def test_lag_descends(loss: Any, case: Any) -> None:
    check_descent(algorithms.lag_wk, loss, *case)


def check_descent(
    factory: Any, loss: Any, seed: int, lr_times_l: float, knobs: dict, share: float, shape: list, **bits
):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(M, N, P)) * rng.choice([0.3, 1, 2], (M, 1, 1))
        shards = Shards(x, rng.normal(size=(M, N)), np.ones((M, N)))
        # of f, a sum over workers of means over examples
        hessian = CURVATURE[loss] * np.einsum("mni,mnj->ij", x, x) / N + M * L2 * np.eye(P)
        lr = float(lr_times_l / np.linalg.norm(hessian, 2))
        xi = np.array(shape) / sum(shape) * share * theory.max_xi_sum(lr, lr_times_l / lr)
        oracle = laqjax.oracles.from_loss(loss, jnp.zeros(P), l2=L2)
        alg: Algorithm = factory(oracle, lr=lr, num_workers=M, xi=xi, padded_window=WINDOW, **knobs, **bits)
        record = ["worker_loss", "grad", "error_sq", "step_sq"]
        out = laqjax.run(alg, jnp.asarray(rng.normal(size=P)), shards, ROUNDS, KEY, metrics=record, chunk_size=ROUNDS)
    extra = out.info.extra
    # motion[k, d - 1] is the squared step from theta^{k-d} to theta^{k-d+1}
    motion = np.zeros((ROUNDS, len(xi)))
    for k in range(ROUNDS):
        recent = extra["step_sq"][:k][::-1][: len(xi)]
        motion[k, : len(recent)] = recent
    last_error_sq = np.zeros((ROUNDS, M))
    for k in range(1, ROUNDS):
        last_error_sq[k] = np.where(out.info.sent[k - 1], extra["error_sq"][k - 1], last_error_sq[k - 1])
    v = theory.lyapunov(extra["worker_loss"].sum(axis=1), motion, xi, lr)
    gradient_sq = np.sum(extra["grad"].sum(axis=1) ** 2, axis=1)
    noise = lr * M * np.sum(4 * extra["error_sq"] + 3 * last_error_sq, axis=1)
    bound = v - lr / 2 * gradient_sq + noise
    assert np.all(v[1:] <= bound[:-1] + 1e-13 * v[0])


def test_the_lyapunov_function_by_hand() -> None:
    """beta_1 carries all weights, beta_D the last one only."""
    xi, motion = np.array([0.1, 0.2, 0.3]), np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 2, 3]])
    v = theory.lyapunov(np.array([0.0, 0, 0, 7]), motion, xi, 0.5)
    np.testing.assert_allclose(v, [0.6 / 0.5, 0.5 / 0.5, 0.3 / 0.5, 7 + (0.6 + 2 * 0.5 + 3 * 0.3) / 0.5])
