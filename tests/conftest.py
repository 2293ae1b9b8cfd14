"""Strict modes for all tests, and the two problems that they run on: a toy, and MNIST in the authors' order."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, FrozenDict, beartype
from hypothesis import settings
from jax._src import compiler  # the options of every compilation, which JAX offers for single functions only

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# the same examples every time; a deadline would measure compilation
settings.register_profile("laqjax", deadline=None, derandomize=True)
settings.load_profile("laqjax")

# shapes and dtypes of arrays; the library takes numbers of every kind and checks them itself, in words
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({bool: object, int: object, float: object})))


def typecheck(function):
    """Constructors stay unchecked: while JAX rebuilds a pytree its fields also hold shapes, axes and placeholders."""
    return function if function.__name__ == "__init__" else _beartype(function)


# before the first import of the library: the shapes in its annotations are then checked at every call
jaxtyping.install_import_hook("laqjax", "conftest.typecheck")

from experiments import datasets  # noqa: E402
from laqjax import (  # noqa: E402
    Shards,
    oracles,
    partition,
)
from laqjax._engine import (  # noqa: E402
    loop,
    sweep,
)

KEY = jax.random.key(0)


class Toy(NamedTuple):
    """An oracle, a start and data: p = 63 (whole bytes for few b only), shards of unequal size with padding."""

    oracle: oracles.TiledOracle
    theta0: jax.Array
    shards: Shards


def softmax_loss(params: Any, x: Any, y: Any) -> jax.Array:
    """Cross-entropy per example; pixels are bytes."""
    weight = params["weight"]
    logits = (weight / 255) @ x.astype(weight.dtype).T + params["bias"][:, None]
    mine = jnp.take_along_axis(logits, y[None], axis=0)[0]
    return jax.nn.logsumexp(logits, axis=0) - mine


def softmax_params(rng: np.random.Generator, classes: int, pixels: int, dtype: Any) -> dict[str, jax.Array]:
    """A random start."""
    weight = rng.uniform(-0.1, 0.1, (classes, pixels))
    return {"bias": jnp.zeros(classes, dtype), "weight": jnp.asarray(weight, dtype)}


@cache
def make_toy(dtype: Any) -> Toy:
    """Three classes of 20-pixel images on 4 workers, the last pixel dead as MNIST's corners are."""
    rng = np.random.default_rng(0)
    sizes = (5, 12, 9, 12)
    weight = np.array([[1] * n + [0] * (max(sizes) - n) for n in sizes], np.float32)
    y = rng.integers(0, 3, weight.shape).astype(np.int32)
    y[0] = 0  # one worker sees one class only
    # x and y are filled in the padding too: what stands there must not matter
    x = np.clip(rng.normal(60 + 120 * rng.random((3, 20))[y], 40), 0, 255).astype(np.uint8)
    x[..., -1] = 0
    for shared in (x, y, weight):
        shared.setflags(write=False)
    params = softmax_params(rng, 3, 20, dtype)
    tiled = oracles.from_loss(softmax_loss, params, l2=0.01, tile=5)
    return Toy(tiled, tiled.ravel(params), Shards(x, y, weight))


def square_loss(params: Any, x: Any, y: Any) -> jax.Array:
    """Half the squared residual per example."""
    return (x @ params - y) ** 2 / 2


@cache
def make_quadratic() -> Toy:
    """Ridge regression of 5 features in double precision, its smoothness about 10."""
    rng = np.random.default_rng(0)
    scale = np.array([1, 1.4, 1, 0.5])[:, None, None]
    x, y = scale * rng.normal(size=(4, 12, 5)), rng.normal(size=(4, 12))
    return Toy(oracles.from_loss(square_loss, jnp.zeros(5), l2=0.1), jnp.zeros(5), Shards(x, y, np.ones((4, 12))))


def programs() -> int:
    """How many programs the loops have compiled."""
    chunks: list[Any] = [loop.run_chunk, sweep.run_sweep_chunk]
    return sum(chunk._cache_size() for chunk in chunks)


@pytest.fixture
def x64():
    """Double precision inside the test; the flag is this thread's only."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs are dropped with their module: thousands of them fill a process's table of memory maps, and XLA
    ends with a segmentation fault.
    """
    yield
    jax.clear_caches()


def _accepts(option: dict[str, Any]) -> bool:
    """Return whether this version of XLA knows an option."""
    try:
        jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request: pytest.FixtureRequest):
    """Compile in a third of the time; not in modules with the marker `optimized`, whose claims depend on the compiler."""
    if request.node.get_closest_marker("optimized"):
        yield
        return
    options = {"xla_cpu_use_fusion_emitters": False}
    known = options if _accepts(options) else {}
    original = compiler.get_compile_options

    def get_compile_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return original(*args, env_options_overrides=(env_options_overrides or {}) | known, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", get_compile_options)
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # these two for processes that the tests start
        if known:
            patch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def toy() -> Toy:
    return make_toy(np.float32)


@pytest.fixture
def toy64(x64) -> Toy:
    return make_toy(np.float64)


@pytest.fixture
def quadratic(x64) -> Toy:
    return make_quadratic()


@pytest.fixture(scope="session")
def mnist() -> Shards:
    """MNIST's training images in file order, 6000 for each of the 10 workers."""
    train = datasets.load("mnist")
    return partition.partition_data(train.x, train.y, 10, "contiguous")
