"""What the reproductions need of the problems beside `laqjax.problems`: the authors' start, and f* from a real solver."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

import laqjax
from experiments.files import write_text
from laqjax.problems import Problem


def authors_start(oracle: Any) -> Array:
    """The theta0 of the authors' program (there: weight [784, 10] first, then bias): late rounds depend on the start."""
    theta0 = np.load(Path(__file__).parent / "mnist" / "laq_logistic_theta0.npy").astype(oracle.dtype)
    return oracle.ravel({"bias": theta0[7840:], "weight": theta0[:7840].reshape(784, 10).T})


def optimum(problem: Problem, shards: laqjax.Shards, cache: Path | None = None) -> float:
    """f*, the least mean over workers of their losses, by L-BFGS in float64 down to the rounding of f.

    Kept in `cache` (a folder) under a hash of problem and data.
    """
    # float64 only for this solve; the flag is thread-local, so a float32 run around it is untouched
    with jax.enable_x64(True):
        data = jax.tree.map(np.asarray, shards)
        path = cache / f"optimum-{problem.name}-{_digest(problem, data)}.txt" if cache else None
        if path and path.exists():
            return float(path.read_text())
        oracle = problem.oracle(np.float64)
        on_device = laqjax.Shards(*(jnp.asarray(a) for a in data))

        @jax.jit
        def mean(params: Array) -> tuple[Array, Array]:
            losses, grads = jax.lax.map(lambda m: oracle(params, on_device, m), jnp.arange(len(data.x)))
            return jnp.mean(losses), jnp.mean(grads, axis=0)

        def value_and_grad(params: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = mean(jnp.asarray(params))
            return float(value), np.asarray(grad)

        start = np.asarray(problem.theta0(oracle))
        options = {"maxiter": 5000, "maxfun": 20000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-9}
        result = scipy.optimize.minimize(value_and_grad, start, jac=True, method="L-BFGS-B", options=options)
    if path:
        write_text(path, repr(float(result.fun)))
    return float(result.fun)


def _digest(problem: Problem, data: laqjax.Shards) -> str:
    digest = hashlib.sha256(repr((problem.name, problem.l2, problem.reduction)).encode())
    digest.update(repr([a.shape for a in jax.tree.leaves(problem.start(0))]).encode())
    for array in data:
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
