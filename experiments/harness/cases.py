"""Problems on data that is split over workers, their initial parameters and their f*."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import laqjax
from experiments.harness import arguments, datasets, storage, user_code
from laqjax.problems import Logistic, Problem, Ridge, Softmax, TwoLayerNetwork

SYNTHETIC = "synthetic-logistic?workers=10&samples=200&features=50&condition=100&heterogeneity="
OPTIMUM_CACHE_DIR = Path("results") / "cache"


@dataclass(frozen=True)
class UserProblem(Problem):
    """Problem of functions, from `--problem FILE.py:make`.

    `make(data)` is called once with the `datasets.Dataset`. It returns a `laqjax.problems.Problem`, (loss, start) or
    (loss, start, accuracy):

        loss(params, x, y) -> [n]        loss of each of n rows; x and y as in the data set, leading axis n
        start(seed) -> params            initial parameters, any pytree of floating arrays
        accuracy(params, x, y) -> share  share of correct test rows; --target-accuracy needs it
    """

    source: str
    loss: Callable[[Any, Any, Any], Array]
    init_fn: Callable[[int], Any]
    accuracy_fn: Callable[[Any, Any, Any], Any] | None = None
    l2: float = 0.0
    reduction: str = "mean"
    name = "model"

    def __call__(self, params: Any, x: Any, y: Any) -> Array:
        """Return the losses of n rows."""
        return user_code.call_named(f"{self.source}, loss", self.loss, params, x, y)

    def init_params(self, seed: int, dtype: Any = np.float32) -> Any:
        """Return the initial parameters from the given function."""
        start = user_code.call_named(f"{self.source}, start", self.init_fn, seed)
        return jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), start)  # float32 where x64 is off

    def accuracy(self, params: Any, x: Any, y: Any) -> Any:
        """Return the share of correct rows, None without a function for it."""
        if self.accuracy_fn is None:
            return None
        return user_code.call_named(f"{self.source}, accuracy", self.accuracy_fn, params, x, y)


@dataclass(frozen=True, eq=False)
class ProblemInstance:
    """Problem on shards, and the values that all points on it share."""

    problem: Problem
    shards: laqjax.Shards  # arrays on the host
    test: tuple[Any, Any] | None = None  # rows (x, y)
    dtype: Any = np.float32
    given_f_star: float | None = None  # f* where it is known without a solver

    @cached_property
    def oracle(self) -> laqjax.oracles.TiledOracle:
        """Loss and gradient of a worker, as a function of flat parameters."""
        return self.problem.oracle(self.dtype)

    @cached_property
    def device_shards(self) -> laqjax.Shards:
        """Shards on the device."""
        return jax.tree.map(jnp.asarray, self.shards)

    @cached_property
    def smoothness(self) -> tuple[np.ndarray, float]:
        """Smoothness constants: L_m of the workers, and L."""
        return self.problem.smoothness_constants(self.shards)

    @cached_property
    def f_star(self) -> float | None:
        """Smallest f, by a solver in float64; None for a problem without a bound on its curvature."""
        if self.given_f_star is not None or self.problem.curvature is None:
            return self.given_f_star
        return solve_optimum(self.problem, self.shards, OPTIMUM_CACHE_DIR)

    def start(self, seed: int) -> Array:
        """Return the flat initial parameters of a seed.

        If those of the problem are equal for all seeds, other seeds than 0 add a normal draw of norm about 1.
        """
        start, first = (self.problem.init_vector(self.oracle, s) for s in (seed, 0))
        if seed and bool(jnp.all(start == first)):
            start += np.random.default_rng(seed).normal(0, len(start) ** -0.5, len(start)).astype(start.dtype)
        return start

    @cached_property
    def batched_loss(self) -> Callable[[Any], Any]:
        """Function from parameters [S, p] to the mean of the workers' losses [S]."""
        one = make_full_loss(self.oracle, self.device_shards)
        if self.oracle.prefers_sequential(self.shards):
            return jax.jit(lambda many: jax.lax.map(one, many))
        return jax.jit(jax.vmap(one))

    @cached_property
    def has_accuracy(self) -> bool:
        """Whether problem and data have a test accuracy."""
        start = jax.eval_shape(self.oracle.unravel, jax.ShapeDtypeStruct((self.oracle.size,), self.oracle.dtype))
        return self.test is not None and jax.eval_shape(self.problem.accuracy, start, *self.test) is not None

    @cached_property
    def batched_accuracy(self) -> Callable[[Any], np.ndarray]:
        """Function from parameters [S, p] to test accuracies [S], if `has_accuracy`."""
        x, y = jax.tree.map(jnp.asarray, self.test)
        one = jax.jit(lambda params: self.problem.accuracy(self.oracle.unravel(params), x, y))
        return lambda many: np.array([one(params) for params in many], float)


def make_full_loss(oracle: Any, shards: laqjax.Shards) -> Callable[[Any], Any]:
    """Return the mean of the workers' losses as a function of flat parameters, for use in compiled code."""
    workers = jnp.arange(len(shards.weight), dtype=jnp.int32)
    return lambda params: jnp.mean(jax.lax.map(lambda m: oracle(params, shards, m).loss, workers))


@cache
def get_case(problem: str, dataset: str, partition: str = "contiguous", seed: int = 0, workers: int = 10, rows: int | None = None) -> ProblemInstance:  # fmt: skip
    """Return the problem of these names, built once; `rows` limits the rows of each worker."""
    data = _load_cached(dataset)
    shards = laqjax.partition_data(data.x, data.y, workers, partition, seed)
    shards = jax.tree.map(lambda array: array[:, :rows], shards)
    test = None if data.x_test is None else (data.x_test, data.y_test)
    made = ProblemInstance(make_problem(problem, data), shards, test)
    made.oracle.validate(made.shards)
    return made


def convex_case(name: str, scheme: str = "contiguous") -> ProblemInstance:
    """Build binary logistic regression with l2 = 0.01 in float64; the loss of a worker is a mean over its rows."""
    made = get_case("logistic", name, scheme)
    weight = made.shards.weight.astype(np.float64)
    problem = Logistic(made.shards.x.shape[2], l2=0.01, reduction="mean")
    return replace(made, problem=problem, shards=made.shards._replace(weight=weight), dtype=np.float64)


_load_cached = cache(datasets.load)


def make_problem(name: str, data: datasets.Dataset) -> Problem:
    """Build a problem on data: softmax, network, ridge, logistic, or FILE.py:make (see `UserProblem`)."""
    if user_code.is_user_reference(name):
        made = user_code.call_user_function(name, data)
        if isinstance(made, tuple) and len(made) in (2, 3) and all(map(callable, made)):
            return UserProblem(name, *made)
        if isinstance(made, Problem):
            return made
        raise ValueError(f"{name} returned {made!r:.80}: must be functions (loss, start) or (loss, start, accuracy)")
    known = {"softmax": Softmax, "network": TwoLayerNetwork, "ridge": Ridge, "logistic": Logistic}
    classes, flat = data.num_classes, getattr(data.x, "ndim", 0) == 2
    if flat and classes and name in ("softmax", "network"):
        return known[name](data.x.shape[1], classes)
    if flat and (name == "ridge" or (name == "logistic" and classes in (None, 2))):
        return known[name](data.x.shape[1])
    raise ValueError(
        f"problem = {name!r} on {data.name}: must be softmax or network for classes, logistic for two, ridge for numbers "
        f"(all on rows of features), or FILE.py:make{arguments.suggest(name, known) if name not in known else ''}"
    )


def load_authors_init(oracle: Any) -> Array:
    """Load the initial parameters of the authors' program, since late rounds depend on them."""
    # in the file: weight [784, 10], then bias
    theta0 = np.load(Path(__file__).parents[1] / "mnist" / "laq_logistic_theta0.npy").astype(oracle.dtype)
    return oracle.ravel({"bias": theta0[7840:], "weight": theta0[:7840].reshape(784, 10).T})


def solve_optimum(problem: Problem, shards: laqjax.Shards, folder: Path | None = None) -> float:
    """Return f*, the smallest mean of the workers' losses, by L-BFGS in float64 down to the rounding of f.

    If `folder` is given, the result is kept there under a hash of problem and data.
    """
    import scipy.optimize  # here: half a second

    # float64 for this solve only; the flag is thread-local, so that it does not change a float32 run around it
    with jax.enable_x64(True):
        data = jax.tree.map(np.asarray, shards)
        ours = type(problem).__module__ == Problem.__module__  # a user's name may get another meaning
        path = folder / f"optimum-{problem.name}-{_digest(problem, data)}.txt" if folder and ours else None
        if path and path.exists():
            return float(path.read_text())
        case = ProblemInstance(problem, data, dtype=np.float64)
        oracle, workers = case.oracle, jnp.arange(len(data.weight))

        @jax.jit
        def value_and_grad(params: Array) -> tuple[Array, Array]:
            losses, grads, _ = jax.lax.map(lambda m: oracle(params, case.device_shards, m), workers)
            return jnp.mean(losses), jnp.mean(grads, axis=0)

        start = np.asarray(problem.init_vector(oracle))
        options = {"maxiter": 5000, "maxfun": 20000, "maxcor": 30, "ftol": 1e-15, "gtol": 1e-9}
        result = scipy.optimize.minimize(value_and_grad, start, jac=True, method="L-BFGS-B", options=options)
    if path:
        storage.write_text(path, repr(float(result.fun)))
    return float(result.fun)


def _digest(problem: Problem, data: laqjax.Shards) -> str:
    digest = hashlib.sha256(repr((problem.name, problem.l2, problem.reduction)).encode())
    digest.update(repr([a.shape for a in jax.tree.leaves(problem.init_params(0))]).encode())
    for array in data:
        digest.update(repr((array.shape, array.dtype)).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]
