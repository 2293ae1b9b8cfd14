"""Strict modes for all tests, and the problems that they run on as fixtures."""

from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest
from hypothesis import settings
from jax._src import compiler  # the options of every compilation, which JAX offers for single functions only

from tests.typechecking import typecheck

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# the same examples every time; a deadline would measure compilation
settings.register_profile("laqjax", deadline=None, derandomize=True)
settings.load_profile("laqjax")

pytest.register_assert_rewrite("tests.support", "tests.laws.laws")
# before the first import of the library: the shapes in its annotations are then checked at every call
jaxtyping.install_import_hook("laqjax", f"{typecheck.__module__}.{typecheck.__name__}")

from experiments.harness import datasets  # noqa: E402
from laqjax import Shards, partition  # noqa: E402
from tests.support import Toy, make_quadratic, make_toy  # noqa: E402


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
    options: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False}
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
