"""The problems of the papers: a per-example loss, a start, and f* from a real solver.

Matrices are stored [outputs, inputs] and activations [outputs, examples]: then the products of a whole sweep,
[points x outputs, inputs] x [inputs, examples], need no transposition, and one point runs about 1.5 times as fast on a CPU.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int

import laqjax
from experiments.files import write_text
from laqjax.oracle import TiledOracle

Tree = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A loss on examples, a random start, and how well a model predicts.

    loss: (params, x [n, features], y [n]) -> per-example losses [n]. start: seed -> params pytree (NumPy).
    accuracy: (params, x, y) -> share of right predictions, None for regression.
    """

    name: str
    loss: Callable[[Any, Array, Array], Array]
    start: Callable[[int], Tree]
    l2: float
    reduction: str
    accuracy: Callable[[Any, Array, Array], Array] | None = None

    def oracle(self, dtype: Any = np.float32, tile: int | None = None) -> TiledOracle:
        """The library's oracle for parameters of `dtype`."""
        params = jax.tree.map(lambda a: jnp.asarray(a, dtype), self.start(0))
        return laqjax.oracle.from_loss(self.loss, params, l2=self.l2, reduction=self.reduction, tile=tile)

    def theta0(self, oracle: TiledOracle, seed: int = 0) -> Float[Array, " p"]:
        """The start of a seed as a flat vector."""
        return oracle.ravel(jax.tree.map(lambda a: jnp.asarray(a, oracle.dtype), self.start(seed)))


def softmax(features: int, classes: int, l2: float = 0.01) -> Problem:
    """Softmax regression, the paper's convex problem: mean cross-entropy + (l2 / 2) ||all variables||^2 per worker."""

    def start(seed: int) -> Tree:
        rng = np.random.default_rng(seed)
        return {"bias": np.zeros(classes), "weight": _glorot(rng, classes, features)}

    return Problem(
        "softmax",
        lambda params, x, y: cross_entropy(_affine(params["weight"], params["bias"], x), y),
        start,
        l2,
        "mean",
        lambda params, x, y: _hits(_affine(params["weight"], params["bias"], x), y),
    )


def network(features: int, classes: int, hidden: int = 200, l2: float = 0.01) -> Problem:
    """features-hidden-classes with ReLU, the paper's network (784-200-10)."""

    def logits(params: Tree, x: Array) -> Array:
        first = _affine(params["weight1"], params["bias1"], x)
        return params["weight2"] @ jax.nn.relu(first) + params["bias2"][:, None]

    def start(seed: int) -> Tree:
        rng = np.random.default_rng(seed)
        return {
            "bias1": np.zeros(hidden),
            "bias2": np.zeros(classes),
            "weight1": _glorot(rng, hidden, features),
            "weight2": _glorot(rng, classes, hidden),
        }

    return Problem(
        "network",
        lambda params, x, y: cross_entropy(logits(params, x), y),
        start,
        l2,
        "mean",
        lambda params, x, y: _hits(logits(params, x), y),
    )


def ridge(features: int, l2: float = 0.0, reduction: str = "sum") -> Problem:
    """Linear least squares, (x'theta - y)^2 / 2 per example; sums over the shard, as LAG's linear problem."""
    return Problem(
        "ridge",
        lambda params, x, y: (
            (x.astype(params["weight"].dtype) @ params["weight"] - y.astype(params["weight"].dtype)) ** 2 / 2
        ),
        lambda seed: {"weight": np.zeros(features)},
        l2,
        reduction,
    )


def logistic(features: int, l2: float = 1e-4, reduction: str = "sum") -> Problem:
    """Binary logistic regression, log(1 + exp(-y x'theta)) per example, as LAG's.

    Class ids 0 and 1 (integers) stand for -1 and 1; float labels are used as they are.
    """

    def margin(params: Tree, x: Array, y: Array) -> Array:
        sign = 2 * y - 1 if jnp.issubdtype(y.dtype, jnp.integer) else y
        return sign.astype(params["weight"].dtype) * (x.astype(params["weight"].dtype) @ params["weight"])

    return Problem(
        "logistic",
        lambda params, x, y: jax.nn.softplus(-margin(params, x, y)),
        lambda seed: {"weight": np.zeros(features)},
        l2,
        reduction,
        lambda params, x, y: jnp.mean(margin(params, x, y) > 0),
    )


def authors_start(oracle: Any) -> Array:
    """The theta0 of the authors' program (there: weight [784, 10] first, then bias): late rounds depend on the start."""
    theta0 = np.load(Path(__file__).parent / "mnist" / "laq_logistic_theta0.npy").astype(oracle.dtype)
    return oracle.ravel({"bias": theta0[7840:], "weight": theta0[:7840].reshape(784, 10).T})


def cross_entropy(logits: Float[Array, "classes n"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """-log softmax(logits)[y] per example. The label is picked by a comparison: a gather costs more than the product."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=0, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=0)) + top[0]
    mine = jnp.arange(logits.shape[0], dtype=y.dtype)[:, None] == y[None]
    return log_sum - jnp.sum(jnp.where(mine, logits, 0), axis=0)


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


def _affine(weight: Array, bias: Array, x: Array) -> Array:
    """Weight @ x + bias, [outputs, n]. Bytes are pixels in 0..1: the small weights are divided by 255, not the images."""
    scaled = weight / 255 if x.dtype == jnp.uint8 else weight
    return jnp.einsum("cd,td->ct", scaled, x.astype(weight.dtype)) + bias[:, None]


def _hits(logits: Array, y: Array) -> Array:
    return jnp.mean(jnp.argmax(logits, axis=0) == y)


def _glorot(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """Uniform in +-sqrt(6 / (inputs + outputs)), the start of the authors' program (Glorot and Bengio 2010)."""
    bound = np.sqrt(6 / (inputs + outputs))
    return rng.uniform(-bound, bound, (outputs, inputs))


def _digest(problem: Problem, data: laqjax.Shards) -> str:
    digest = hashlib.sha256(repr((problem.name, problem.l2, problem.reduction)).encode())
    digest.update(repr([a.shape for a in jax.tree.leaves(problem.start(0))]).encode())
    for array in data:
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
