"""The run of the authors' own program, and the library's with their settings."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import laqjax
from laqjax import algorithms
from tests.laws import reference
from tests.support import KEY, softmax_loss

GOLDEN = np.load(Path(__file__).parent / "golden_laq_logistic.npz")


def flat(theta: np.ndarray) -> np.ndarray:
    """From the authors' order, weight [784, 10] then bias, to ours, bias then weight [10, 784]."""
    return np.concatenate([theta[7840:], theta[:7840].reshape(784, 10).T.ravel()])


def authors_run(mnist: laqjax.Shards, dtype, rounds: int) -> laqjax.RunResult:
    theta0 = jnp.asarray(flat(GOLDEN["theta0"]), dtype)
    params = {"bias": theta0[:10], "weight": theta0[10:].reshape(10, 784)}
    oracle = laqjax.oracles.from_loss(softmax_loss, params, l2=reference.AUTHORS_L2)
    alg = algorithms.laq(oracle, num_workers=10, **reference.AUTHORS)
    return laqjax.run(alg, theta0, mnist, rounds, KEY, metrics=["direction_sq"], chunk_size=rounds)
