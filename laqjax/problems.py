"""The problems of the papers, and how data is dealt out to workers.

A problem is a frozen dataclass and its own loss: equal problems are equal, so they are one compiled program. Matrices are
stored [outputs, inputs] and activations [outputs, examples]: then the products of a whole sweep, [points x outputs,
inputs] x [inputs, examples], need no transposition, and one point runs about 1.5 times as fast on a CPU.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax._core.validation import is_readable
from laqjax.oracles import TiledOracle, from_loss
from laqjax.types import Shards

__all__ = ["Logistic", "Problem", "Ridge", "Softmax", "TwoLayerNetwork"]


_Params = dict[str, Any]


class Problem:
    """What the problems share. A problem is its own loss: (params, x [n, features], y [n]) -> losses [n].

    l2 and reduction are those of `oracles.from_loss`. curvature: of the loss in its linear predictor, at most; None where
    there is no such bound.
    """

    name: ClassVar[str]
    curvature: ClassVar[float | None] = None
    features: int
    l2: float
    reduction: str

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Losses of n examples."""
        raise NotImplementedError

    def init_params(self, seed: int, dtype: Any = np.float32) -> _Params:
        """The parameters of a seed before round 0, NumPy arrays of `dtype`."""
        return jax.tree.map(lambda a: a.astype(dtype), self._sample_params(np.random.default_rng(seed)))

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """The parameters before round 0, float64."""
        return {"weight": np.zeros(self.features)}

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array | None:
        """The share of right predictions; None for regression."""
        return None

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless the data fit; called before each run. Override it: here nothing is checked."""

    def oracle(self, dtype: Any = np.float32, tile: int | None = None) -> TiledOracle:
        """The oracle of this problem for parameters of `dtype`."""
        return from_loss(self, self.init_params(0, dtype), l2=self.l2, reduction=self.reduction, tile=tile)

    def init_vector(self, oracle: TiledOracle, seed: int = 0) -> Float[Array, " p"]:
        """The start of a seed as a flat vector of the oracle's dtype."""
        return oracle.ravel(self.init_params(seed, oracle.dtype))

    def design_matrix(self, x: np.ndarray) -> np.ndarray:
        """The rows that meet the weights, float64."""
        return x.reshape(len(x), -1).astype(np.float64)

    def smoothness_constants(self, shards: Shards) -> tuple[np.ndarray, float]:
        """(L_m [M], L) of a linear model: curvature x the largest eigenvalue of the weighted Gram matrix + l2.

        Exact eigenvalues: an upper bound only through the curvature. L is of the sum over workers.

        Raises:
            ValueError: the problem has no such bound.
        """
        if self.curvature is None:
            raise ValueError(f"problem = {self.name!r} has no bound on its curvature: give the step size otherwise")
        grams = []
        for x, weight in zip(np.asarray(shards.x), np.asarray(shards.weight, np.float64), strict=True):
            rows, scale = self.design_matrix(x), weight.sum() if self.reduction == "mean" else 1.0
            grams.append(rows.T @ (rows * (weight / scale)[:, None]))
        top = [np.linalg.eigvalsh(gram)[-1] for gram in [*grams, np.sum(grams, axis=0)]]
        each = self.curvature * np.array(top[:-1]) + self.l2
        return each, float(self.curvature * top[-1] + len(grams) * self.l2)


@dataclass(frozen=True)
class Softmax(Problem):
    """Softmax regression, LAQ's convex problem: mean cross-entropy + (l2 / 2) ||all variables||^2 per worker."""

    features: int
    classes: int
    l2: float = 0.01
    reduction: str = "mean"
    name = "softmax"
    curvature = 0.5

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Cross-entropy per example."""
        return _cross_entropy(_affine(params["weight"], params["bias"], x), y)

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """Glorot uniform weight, zero bias."""
        return {"bias": np.zeros(self.classes), "weight": _glorot(rng, self.classes, self.features)}

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N] holds whole numbers from 0 to classes - 1."""
        _check_shapes(shards, self.features)
        _check_labels(shards, self.classes, f"a whole number from 0 to {self.classes - 1}")

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array:
        """The share of right classes."""
        return jnp.mean(jnp.argmax(_affine(params["weight"], params["bias"], x), axis=0) == y)

    def design_matrix(self, x: np.ndarray) -> np.ndarray:
        """With a column for the bias; bytes are pixels in 0..1."""
        rows = super().design_matrix(x) / (255.0 if x.dtype == np.uint8 else 1.0)
        return np.column_stack([rows, np.ones(len(rows))])


@dataclass(frozen=True)
class TwoLayerNetwork(Problem):
    """features-hidden-classes with ReLU, LAQ's network (784-200-10)."""

    features: int
    classes: int
    hidden: int = 200
    l2: float = 0.01
    reduction: str = "mean"
    name = "network"

    def logits(self, params: _Params, x: Array) -> Array:
        """[classes, n]."""
        first = _affine(params["weight1"], params["bias1"], x)
        return params["weight2"] @ jax.nn.relu(first) + params["bias2"][:, None]

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Cross-entropy per example."""
        return _cross_entropy(self.logits(params, x), y)

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """Glorot uniform weights, zero biases."""
        return {
            "bias1": np.zeros(self.hidden),
            "bias2": np.zeros(self.classes),
            "weight1": _glorot(rng, self.hidden, self.features),
            "weight2": _glorot(rng, self.classes, self.hidden),
        }

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N] holds whole numbers from 0 to classes - 1."""
        _check_shapes(shards, self.features)
        _check_labels(shards, self.classes, f"a whole number from 0 to {self.classes - 1}")

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array:
        """The share of right classes."""
        return jnp.mean(jnp.argmax(self.logits(params, x), axis=0) == y)


@dataclass(frozen=True)
class Ridge(Problem):
    """Linear least squares, (x'theta - y)^2 / 2 per example; sums over the shard, as LAG's linear problem."""

    features: int
    l2: float = 0.0
    reduction: str = "sum"
    name = "ridge"
    curvature = 1.0

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Half the squared residual per example."""
        weight = params["weight"]
        return (x.astype(weight.dtype) @ weight - y.astype(weight.dtype)) ** 2 / 2

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N]."""
        _check_shapes(shards, self.features)


@dataclass(frozen=True)
class Logistic(Problem):
    """Binary logistic regression, log(1 + exp(-y x'theta)) per example, as LAG's.

    Class ids 0 and 1 (integers or booleans) stand for -1 and 1; float labels are used as they are, also 0.0 and 1.0.
    """

    features: int
    l2: float = 1e-4
    reduction: str = "sum"
    name = "logistic"
    curvature = 0.25

    def margin(self, params: _Params, x: Array, y: Array) -> Array:
        """Y x'theta per example, > 0 where the prediction is right."""
        weight = params["weight"]
        real = jnp.issubdtype(y.dtype, jnp.floating)
        y = y.astype(weight.dtype)  # before the sum: bytes have no -1
        return (y if real else 2 * y - 1) * (x.astype(weight.dtype) @ weight)

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """log(1 + exp(-margin)) per example."""
        return jax.nn.softplus(-self.margin(params, x, y))

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N], 0 or 1 where it holds class ids."""
        _check_shapes(shards, self.features)
        if not jnp.issubdtype(shards.y.dtype, jnp.floating):
            _check_labels(shards, 2, "0 or 1")

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array:
        """The share of right signs."""
        return jnp.mean(self.margin(params, x, y) > 0)


def _check_shapes(shards: Shards, features: int) -> None:
    """Raise ValueError unless x is one array [M, N, features] and y one array [M, N]."""
    rows = tuple(shards.weight.shape)
    remedies = {
        "x": f"flatten each example to a row of features, or build the problem with another number than {features}",
        "y": "turn one-hot labels into class ids with np.argmax(y, axis=-1), or drop an axis of length 1 with y[..., 0]",
    }
    for name, wanted in (("x", (*rows, features)), ("y", rows)):
        given, tree = [list(leaf.shape) for leaf in jax.tree.leaves(getattr(shards, name))], getattr(shards, name)
        if not hasattr(tree, "shape") or given != [list(wanted)]:
            text = ", ".join(map(str, given))
            raise ValueError(f"shards.{name} of shape {text}: must be {list(wanted)}; {remedies[name]}")


def _check_labels(shards: Shards, classes: int, wanted: str) -> None:
    """Raise ValueError unless the labels of rows that count are whole numbers from 0 to classes - 1.

    Arrays that are traced or spread over processes cannot be read here and are not checked.
    """
    if is_readable(shards.y) and is_readable(shards.weight):
        y = np.asarray(shards.y, np.float64)
        wrong = ((y < 0) | (y >= classes) | (y != np.floor(y))) & (np.asarray(shards.weight) > 0)
        if np.any(wrong):
            worker, row = np.argwhere(wrong)[0]
            raise ValueError(
                f"shards.y of worker {worker} is {y[worker, row]:g} at row {row}: must be {wanted}; number the classes from "
                "0, as np.unique(y, return_inverse=True)[1]"
            )


def _cross_entropy(logits: Float[Array, "classes n"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """-log softmax(logits)[y] per example. The label is picked by a comparison: a gather costs more than the product."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=0, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=0)) + top[0]
    mine = jnp.arange(logits.shape[0], dtype=y.dtype)[:, None] == y[None]
    return log_sum - jnp.sum(jnp.where(mine, logits, 0), axis=0)


def _affine(weight: Array, bias: Array, x: Array) -> Array:
    """Weight @ x + bias, [outputs, n]. Bytes are pixels in 0..1: the weights are divided by 255, not the images.

    Where images are fewer than outputs the product is, which spares two passes over the weights and their gradient.
    """
    pixels, few = x.dtype == jnp.uint8, len(x) < len(weight)
    scaled = weight / 255 if pixels and not few else weight
    product = jnp.einsum("cd,td->ct", scaled, x.astype(weight.dtype))
    return (product / 255 if pixels and few else product) + bias[:, None]


def _glorot(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """Uniform in +-sqrt(6 / (inputs + outputs)), the start of the authors' program (Glorot and Bengio 2010)."""
    bound = np.sqrt(6 / (inputs + outputs))
    return rng.uniform(-bound, bound, (outputs, inputs))
