"""What tests share: a toy and a quadratic problem, and how runs are made and compared."""

import pkgutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import laqjax
from laqjax import Algorithm, Shards, oracles, types
from laqjax._engine import loop, sweep

ROOT = Path(__file__).parents[1]
# the public modules
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(laqjax.__path__, "laqjax.")
    if not any(part.startswith("_") for part in info.name.split("."))
)
KEY = jax.random.key(0)
RECORD = ["decoded_sq", "error_sq", "grad", "gradients", "params", "step_sq", "target_sq"]
CHUNK = 10


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


def run(alg: Algorithm, start: Any, shards: Shards, rounds: int, key: jax.Array = KEY) -> laqjax.RunResult:
    """All tests use one chunk and one record, so that each algorithm compiles once."""
    return laqjax.run(alg, start, shards, rounds, key, metrics=RECORD, chunk_size=CHUNK)


def identical(a: Any, b: Any) -> None:
    """Same structure, dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), strict=True)


def keys_of(round: int, worker: int, workers: int = 4) -> types.RoundKeys:
    """The draws of a worker in a round, as they are documented."""
    key = jax.random.fold_in(KEY, round)
    own, shared = (jax.random.fold_in(key, index) for index in (worker, workers))
    return types.RoundKeys(own, shared, KEY, jnp.int32(round), jnp.int32(worker))


@types.register_dataclass
@dataclass(frozen=True)
class Half:
    """The compressor of the docs: float16 values."""

    is_coordinatewise = True
    has_static_layout = True

    def encode(self, target: Any, keys: Any) -> Any:
        return {"values": target.astype(jnp.float16)}

    def decode(self, payload: Any, like: Any) -> Any:
        return payload["values"].astype(like.dtype)

    def wire_fields(self, payload: Any, like: Any) -> Any:
        yield types.WireField(payload, "values", jax.ShapeDtypeStruct(like.shape, np.float16), 16)
