"""What a point runs on: a problem on data that is dealt out to workers, its starts and its f*."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array

import laqjax
from experiments.harness import cli, datasets, storage, user_code
from laqjax.problems import Problem

SYNTHETIC = "synthetic-logistic?workers=10&samples=200&features=50&condition=100&heterogeneity="
PROBLEMS = ("softmax", "network", "ridge", "logistic")
OPTIMUM_CACHE_DIR = Path("results") / "cache"  # of f*


@dataclass(frozen=True)
class UserProblem(Problem):
    """A problem made of functions, as `--problem FILE.py:make` gives it.

    `make(data)` is called once with the `datasets.Dataset` and returns (loss, start) or (loss, start, accuracy), or a
    `laqjax.problems.Problem`:

        loss(params, x, y) -> [n]        the loss of each of n rows; x and y as in the data set, leading axis n
        start(seed) -> params            any pytree of floating arrays
        accuracy(params, x, y) -> share  on the test rows; without it there is no --target-accuracy
    """

    source: str
    loss: Callable[[Any, Any, Any], Array]
    init_fn: Callable[[int], Any]
    accuracy_fn: Callable[[Any, Any, Any], Any] | None = None
    l2: float = 0.0
    reduction: str = "mean"
    name = "model"

    def __call__(self, params: Any, x: Any, y: Any) -> Array:
        """Losses of n examples."""
        return self._call_user("loss", self.loss, params, x, y)

    def init_params(self, seed: int, dtype: Any = np.float32) -> Any:
        """The parameters as the user made them."""
        start = self._call_user("start", self.init_fn, seed)
        return jax.tree.map(lambda leaf: np.asarray(jnp.asarray(leaf)), start)  # float32 where x64 is off

    def accuracy(self, params: Any, x: Any, y: Any) -> Any:
        """As the user counts it."""
        return None if self.accuracy_fn is None else self._call_user("accuracy", self.accuracy_fn, params, x, y)

    def _call_user(self, name: str, function: Callable[..., Any], *given: Any) -> Any:
        try:
            return function(*given)
        except Exception as error:
            raise ValueError(f"{self.source}, {name}: {user_code.locate_error(error, self.source)}") from error


@dataclass(frozen=True, eq=False)
class ProblemInstance:
    """A problem on shards, and all that points share which run on it.

    shards: host arrays. test: (x, y). known: f*, where the caller has it; else a problem with a bound on its curvature is
    taken for convex and solved, and any other has none.
    """

    problem: Problem
    shards: laqjax.Shards
    test: tuple[Any, Any] | None = None
    dtype: Any = np.float32
    given_f_star: float | None = None

    @cached_property
    def oracle(self) -> laqjax.oracles.TiledOracle:
        """Loss and gradient of a worker."""
        return self.problem.oracle(self.dtype)

    @cached_property
    def device_shards(self) -> laqjax.Shards:
        """The data, where the rounds read it."""
        return jax.tree.map(jnp.asarray, self.shards)

    @cached_property
    def smoothness(self) -> tuple[np.ndarray, float]:
        """(L_m of the workers, L)."""
        return self.problem.smoothness_constants(self.shards)

    @cached_property
    def f_star(self) -> float | None:
        """The least f, by a solver in float64 the first time."""
        if self.given_f_star is not None or self.problem.curvature is None:
            return self.given_f_star
        return solve_optimum(self.problem, self.shards, OPTIMUM_CACHE_DIR)

    def start(self, seed: int) -> Array:
        """The flat parameters of a seed: where the problem's own start is one for all seeds, seed 0 has it, and the others
        a normal draw of norm about 1 beside it.
        """
        start, first = (self.problem.init_vector(self.oracle, s) for s in (seed, 0))
        if seed and bool(jnp.all(start == first)):
            start += np.random.default_rng(seed).normal(0, len(start) ** -0.5, len(start)).astype(start.dtype)
        return start

    @cached_property
    def batched_loss(self) -> Callable[[Any], Any]:
        """The mean of the workers' losses at parameters [S, p]."""
        one = make_full_loss(self.oracle, self.device_shards)
        if self.oracle.prefers_sequential(self.shards):
            return jax.jit(lambda many: jax.lax.map(one, many))
        return jax.jit(jax.vmap(one))

    @cached_property
    def has_accuracy(self) -> bool:
        """Whether there is a test accuracy."""
        start = jax.eval_shape(self.oracle.unravel, jax.ShapeDtypeStruct((self.oracle.size,), self.oracle.dtype))
        return self.test is not None and jax.eval_shape(self.problem.accuracy, start, *self.test) is not None

    @cached_property
    def batched_accuracy(self) -> Callable[[Any], np.ndarray]:
        """Test accuracy at parameters [S, p], NaN where problem or data have none."""
        x, y = jax.tree.map(jnp.asarray, self.test or (None, None))
        one = jax.jit(lambda params: self.problem.accuracy(self.oracle.unravel(params), x, y) if self.test else None)
        return lambda many: np.array([one(params) for params in many], float)  # None is NaN


def make_full_loss(oracle: Any, shards: laqjax.Shards) -> Callable[[Any], Any]:
    """The mean of the workers' losses, as a function of a flat parameter vector; traced."""
    workers = jnp.arange(len(shards.weight), dtype=jnp.int32)
    return lambda params: jnp.mean(jax.lax.map(lambda m: oracle(params, shards, m).loss, workers))


@cache
def get_case(problem: str, dataset: str, partition: str = "contiguous", seed: int = 0, workers: int = 10, rows: int | None = None) -> ProblemInstance:  # fmt: skip
    """A case by its names, made once; `rows` keeps so many of each worker."""
    data = _load_cached(dataset)
    shards = laqjax.partition_data(data.x, data.y, workers, partition, seed)
    if rows:
        shards = laqjax.Shards(*jax.tree.map(lambda array: array[:, :rows], shards))
    test = None if data.x_test is None else (data.x_test, data.y_test)
    made = ProblemInstance(make_problem(problem, data), shards, test)
    made.oracle.validate(made.shards)
    return made


def convex_case(name: str, scheme: str = "contiguous") -> ProblemInstance:
    """Binary logistic regression on a data set, sums over shards made means, l2 = 0.01 per worker; float64."""
    made = get_case("logistic", name, scheme)
    weight = made.shards.weight.astype(np.float64)
    problem = laqjax.problems.Logistic(made.shards.x.shape[2], l2=0.01, reduction="mean")
    return replace(made, problem=problem, shards=made.shards._replace(weight=weight), dtype=np.float64)


@cache
def _load_cached(name: str) -> datasets.Dataset:
    return datasets.load(name)


def _make_user_problem(name: str, data: datasets.Dataset) -> Problem:
    made = user_code.call_user_function(name, data)
    if isinstance(made, Problem):
        return made
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not all(map(callable, made)):
        raise ValueError(f"{name} returned {made!r:.80}: expected functions (loss, start) or (loss, start, accuracy)")
    return UserProblem(name, *made)


def make_problem(name: str, data: datasets.Dataset) -> Problem:
    """A problem fit for the data: softmax, network, ridge, logistic, or FILE.py:make (see `FullModelDownlink`)."""
    if user_code.is_user_reference(name):
        return _make_user_problem(name, data)
    flat = getattr(data.x, "ndim", 0) == 2
    if flat and name in ("softmax", "network") and data.num_classes:
        return getattr(laqjax.problems, {"network": "TwoLayerNetwork"}.get(name, name.capitalize()))(
            data.x.shape[1], data.num_classes
        )
    if flat and (name == "ridge" or (name == "logistic" and data.num_classes in (None, 2))):
        return getattr(laqjax.problems, {"network": "TwoLayerNetwork"}.get(name, name.capitalize()))(data.x.shape[1])
    raise ValueError(
        f"problem = {name!r} on {data.name}: expected softmax or network for classes, logistic for two, ridge for numbers "
        f"(all on rows of features), or FILE.py:make{cli.suggest(name, PROBLEMS) if name not in PROBLEMS else ''}"
    )


def load_authors_init(oracle: Any) -> Array:
    """The theta0 of the authors' program (there: weight [784, 10] first, then bias): late rounds depend on the start."""
    theta0 = np.load(Path(__file__).parents[1] / "mnist" / "laq_logistic_theta0.npy").astype(oracle.dtype)
    return oracle.ravel({"bias": theta0[7840:], "weight": theta0[:7840].reshape(784, 10).T})


def solve_optimum(problem: Problem, shards: laqjax.Shards, folder: Path | None = None) -> float:
    """f*, the least mean over workers of their losses, by L-BFGS in float64 down to the rounding of f.

    Kept in `folder` under a hash of problem and data.
    """
    # float64 only for this solve; the flag is thread-local, so a float32 run around it is untouched
    with jax.enable_x64(True):
        data = jax.tree.map(np.asarray, shards)
        ours = type(problem).__module__ == Problem.__module__  # what another's name means may change
        path = folder / f"optimum-{problem.name}-{_digest(problem, data)}.txt" if folder and ours else None
        if path and path.exists():
            return float(path.read_text())
        case = ProblemInstance(problem, data, dtype=np.float64)
        oracle, workers = case.oracle, jnp.arange(len(data.weight))

        @jax.jit
        def mean(params: Array) -> tuple[Array, Array]:
            losses, grads, _ = jax.lax.map(lambda m: oracle(params, case.device_shards, m), workers)
            return jnp.mean(losses), jnp.mean(grads, axis=0)

        def value_and_grad(params: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = mean(jnp.asarray(params))
            return float(value), np.asarray(grad)

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
