"""Problems of the LAG and LAQ papers: losses with initial parameters, accuracy and smoothness constants.

A problem is a frozen dataclass, and is its own loss function. Problems with equal fields compare equal, so they share
one compiled program.

Matrices are stored as [outputs, inputs] and activations as [outputs, examples]. The products of a whole sweep,
[points x outputs, inputs] x [inputs, examples], then need no transposition. One point runs about 1.5 times as fast on a
CPU.
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
    """Base class for problems, which are callable as a loss: (params, x [n, features], y [n]) -> losses [n].

    Attributes:
        name: name of the problem.
        curvature: upper bound on the curvature of the loss in its linear predictor; None if there is no such bound.
        features: number of features of an example.
        l2: as in `oracles.from_loss`.
        reduction: as in `oracles.from_loss`.
    """

    name: ClassVar[str]
    curvature: ClassVar[float | None] = None
    features: int
    l2: float
    reduction: str

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Return the losses of n examples.

        Args:
            params: pytree of parameters.
            x: examples, [n, features].
            y: labels, [n].

        Returns:
            The losses, [n].
        """
        raise NotImplementedError

    def init_params(self, seed: int, dtype: Any = np.float32) -> _Params:
        """Return the initial parameters.

        Args:
            seed: seed of the random generator.
            dtype: dtype of the parameters.

        Returns:
            A dict of NumPy arrays of `dtype`.
        """
        return jax.tree.map(lambda a: a.astype(dtype), self._sample_params(np.random.default_rng(seed)))

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """Sample the initial parameters in float64."""
        return {"weight": np.zeros(self.features)}

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array | None:
        """Return the share of correct predictions for n examples, or None for regression."""
        return None

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless the data fit the problem; called before each run.

        The base class checks nothing; subclasses override this method.
        """

    def oracle(self, dtype: Any = np.float32, tile: int | None = None) -> TiledOracle:
        """Build the oracle of this problem.

        Args:
            dtype: dtype of the parameters.
            tile: examples read at a time, as in `oracles.from_loss`.

        Returns:
            The oracle.
        """
        return from_loss(self, self.init_params(0, dtype), l2=self.l2, reduction=self.reduction, tile=tile)

    def init_vector(self, oracle: TiledOracle, seed: int = 0) -> Float[Array, " p"]:
        """Return the initial parameters of a seed as a flat vector [p] of the oracle's dtype."""
        return oracle.ravel(self.init_params(seed, oracle.dtype))

    def design_matrix(self, x: np.ndarray) -> np.ndarray:
        """Return the float64 matrix [n, columns] that the weights of a linear model are multiplied by."""
        return x.reshape(len(x), -1).astype(np.float64)

    def smoothness_constants(self, shards: Shards) -> tuple[np.ndarray, float]:
        """Compute the smoothness constants of a linear model.

        L_m is the curvature times the largest eigenvalue of the weighted Gram matrix of worker m, plus l2. L is the
        constant of the sum over workers. The eigenvalues are exact; the constants are upper bounds only because of
        `curvature`.

        Args:
            shards: the data, x [M, N, features] and weight [M, N].

        Returns:
            (L_m [M], L).

        Raises:
            ValueError: the problem has no bound on its curvature.
        """
        if self.curvature is None:
            raise ValueError(
                f"problem = {self.name!r}, which has no bound on its curvature: must be one that has; give lr directly"
            )
        grams = []
        for x, weight in zip(np.asarray(shards.x), np.asarray(shards.weight, np.float64), strict=True):
            rows, scale = self.design_matrix(x), weight.sum() if self.reduction == "mean" else 1.0
            grams.append(rows.T @ (rows * (weight / scale)[:, None]))
        top = [np.linalg.eigvalsh(gram)[-1] for gram in [*grams, np.sum(grams, axis=0)]]
        each = self.curvature * np.array(top[:-1]) + self.l2
        return each, float(self.curvature * top[-1] + len(grams) * self.l2)


@dataclass(frozen=True)
class Softmax(Problem):
    """Softmax regression, the convex problem of LAQ: mean cross-entropy + (l2 / 2) ||all variables||^2 per worker.

    The parameters are weight [classes, features] and bias [classes]. Features of dtype uint8 are divided by 255.
    """

    features: int
    classes: int
    l2: float = 0.01
    reduction: str = "mean"
    name = "softmax"
    curvature = 0.5

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Return the cross-entropy of each example."""
        return _cross_entropy(_affine(params["weight"], params["bias"], x), y)

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """Sample a Glorot uniform weight; the bias is zero."""
        return {"bias": np.zeros(self.classes), "weight": _glorot(rng, self.classes, self.features)}

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N] holds whole numbers from 0 to classes - 1."""
        _check_shapes(shards, self.features)
        _check_labels(shards, self.classes, f"a whole number from 0 to {self.classes - 1}")

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array:
        """Return the share of correctly predicted classes."""
        return jnp.mean(jnp.argmax(_affine(params["weight"], params["bias"], x), axis=0) == y)

    def design_matrix(self, x: np.ndarray) -> np.ndarray:
        """Return the float64 matrix [n, features + 1], with a column of ones for the bias.

        Bytes are pixels, which are scaled to 0..1.
        """
        rows = super().design_matrix(x) / (255.0 if x.dtype == np.uint8 else 1.0)
        return np.column_stack([rows, np.ones(len(rows))])


@dataclass(frozen=True)
class TwoLayerNetwork(Problem):
    """ReLU network of the layers features-hidden-classes; the network of LAQ is 784-200-10.

    The parameters are weight1 [hidden, features], bias1 [hidden], weight2 [classes, hidden] and bias2 [classes].
    Features of dtype uint8 are divided by 255.
    """

    features: int
    classes: int
    hidden: int = 200
    l2: float = 0.01
    reduction: str = "mean"
    name = "network"

    def logits(self, params: _Params, x: Array) -> Array:
        """Return the logits [classes, n] of n examples."""
        first = _affine(params["weight1"], params["bias1"], x)
        return params["weight2"] @ jax.nn.relu(first) + params["bias2"][:, None]

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Return the cross-entropy of each example."""
        return _cross_entropy(self.logits(params, x), y)

    def _sample_params(self, rng: np.random.Generator) -> _Params:
        """Sample Glorot uniform weights; the biases are zero."""
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
        """Return the share of correctly predicted classes."""
        return jnp.mean(jnp.argmax(self.logits(params, x), axis=0) == y)


@dataclass(frozen=True)
class Ridge(Problem):
    """Linear least squares, the linear problem of LAG: (x'theta - y)^2 / 2 per example, summed over the shard.

    The parameter is weight [features].
    """

    features: int
    l2: float = 0.0
    reduction: str = "sum"
    name = "ridge"
    curvature = 1.0

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Return half the squared residual of each example."""
        weight = params["weight"]
        return (x.astype(weight.dtype) @ weight - y.astype(weight.dtype)) ** 2 / 2

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y [M, N]."""
        _check_shapes(shards, self.features)


@dataclass(frozen=True)
class Logistic(Problem):
    """Binary logistic regression, as in LAG: log(1 + exp(-y x'theta)) per example, summed over the shard.

    The parameter is weight [features].

    Class ids 0 and 1 (integers or booleans) stand for the labels -1 and 1. Float labels are used unchanged, also 0.0
    and 1.0.
    """

    features: int
    l2: float = 1e-4
    reduction: str = "sum"
    name = "logistic"
    curvature = 0.25

    def margin(self, params: _Params, x: Array, y: Array) -> Array:
        """Return y x'theta for each example, which is > 0 where the prediction is correct."""
        weight = params["weight"]
        real = jnp.issubdtype(y.dtype, jnp.floating)
        y = y.astype(weight.dtype)  # cast before the subtraction, because bytes cannot represent -1
        return (y if real else 2 * y - 1) * (x.astype(weight.dtype) @ weight)

    def __call__(self, params: _Params, x: Array, y: Array) -> Array:
        """Return log(1 + exp(-margin)) for each example."""
        return jax.nn.softplus(-self.margin(params, x, y))

    def check_shards(self, shards: Shards) -> None:
        """Raise ValueError unless x is [M, N, features] and y is [M, N]; class ids must be 0 or 1."""
        _check_shapes(shards, self.features)
        if not jnp.issubdtype(shards.y.dtype, jnp.floating):
            _check_labels(shards, 2, "0 or 1")

    def accuracy(self, params: _Params, x: Array, y: Array) -> Array:
        """Return the share of examples with a positive margin."""
        return jnp.mean(self.margin(params, x, y) > 0)


def _check_shapes(shards: Shards, features: int) -> None:
    """Raise ValueError unless x is one array [M, N, features] and y one array [M, N]."""
    leading = tuple(shards.weight.shape)
    remedies = {
        "x": f"flatten each example to a row of features, or build the problem with another number than {features}",
        "y": "turn one-hot labels into class ids with np.argmax(y, axis=-1), or drop an axis of length 1 with y[..., 0]",
    }
    for name, wanted in (("x", (*leading, features)), ("y", leading)):
        given, tree = [list(leaf.shape) for leaf in jax.tree.leaves(getattr(shards, name))], getattr(shards, name)
        if not hasattr(tree, "shape") or given != [list(wanted)]:
            text = ", ".join(map(str, given))
            raise ValueError(f"shards.{name} of shape {text}: must be {list(wanted)}; {remedies[name]}")


def _check_labels(shards: Shards, classes: int, wanted: str) -> None:
    """Raise ValueError unless the labels of examples with positive weight are whole numbers from 0 to classes - 1.

    Arrays that are traced or distributed over processes cannot be read here, and are not checked.
    """
    if is_readable(shards.y) and is_readable(shards.weight):
        y = np.asarray(shards.y, np.float64)
        wrong = ((y < 0) | (y >= classes) | (y != np.floor(y))) & (np.asarray(shards.weight) > 0)
        if np.any(wrong):
            worker, row = np.argwhere(wrong)[0]
            raise ValueError(
                f"shards.y of worker {worker} is {y[worker, row]:g} at row {row}: must be {wanted}; number the classes from "
                "0 with np.unique(y, return_inverse=True)[1]"
            )


def _cross_entropy(logits: Float[Array, "classes n"], y: Int[Array, " n"]) -> Float[Array, " n"]:
    """Compute -log softmax(logits)[y] for each example.

    A comparison selects the logit of the label, because a gather costs more than the matrix product.
    """
    top = jax.lax.stop_gradient(jnp.max(logits, axis=0, keepdims=True))
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - top), axis=0)) + top[0]
    mine = jnp.arange(logits.shape[0], dtype=y.dtype)[:, None] == y[None]
    return log_sum - jnp.sum(jnp.where(mine, logits, 0), axis=0)


def _affine(weight: Array, bias: Array, x: Array) -> Array:
    """Compute weight @ x.T + bias, of shape [outputs, n].

    Bytes are pixels, which are scaled to 0..1: the weights are divided by 255 instead of the images. If there are fewer
    images than outputs, the product is divided instead. This avoids two passes over the weights and their gradient.
    """
    pixels, few = x.dtype == jnp.uint8, len(x) < len(weight)
    scaled = weight / 255 if pixels and not few else weight
    product = jnp.einsum("cd,td->ct", scaled, x.astype(weight.dtype))
    return (product / 255 if pixels and few else product) + bias[:, None]


def _glorot(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    """Sample a matrix [outputs, inputs] uniformly in +-sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010).

    The authors' program initializes its weights in this way.
    """
    bound = np.sqrt(6 / (inputs + outputs))
    return rng.uniform(-bound, bound, (outputs, inputs))
