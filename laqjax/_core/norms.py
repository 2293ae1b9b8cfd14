"""Norms of vectors [p], whole or split over the devices of a mesh.

Rules, the round and, of the compressors, `Grid` compute norms over all parts of a vector: where mesh axes split the
parameters, the devices hold parts, and add up the norms of their parts. Any other compressor takes its part as a
vector.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_SEGMENTS: ContextVar[Any] = ContextVar("segments", default=None)


@contextmanager
def norms_over(segments: Any) -> Iterator[None]:
    """Compute norms of vectors whose parts are on many devices, while a function is traced inside `jax.shard_map`.

    Args:
        segments: (size on this device, mesh axes that split it) of consecutive parts of the vectors. None: the vectors
            are whole on this device.
    """
    token = _SEGMENTS.set(segments)
    try:
        yield
    finally:
        _SEGMENTS.reset(token)


def _reduce_segments(v: Array, reduce: Any, across: Any, join: Any) -> Array:
    """Reduce each segment of a vector, then over the devices that hold its parts, then the segments."""
    segments = _SEGMENTS.get()
    if segments is None:
        return reduce(v)
    parts = zip(jnp.split(v, np.cumsum([size for size, _ in segments])[:-1]), segments, strict=True)
    return functools.reduce(join, [across(reduce(part), axes) if axes else reduce(part) for part, (_, axes) in parts])


def squared_norm(v: Float[Array, " p"]) -> Float[Array, ""]:
    """Return the squared Euclidean norm of a vector [p]."""
    return _reduce_segments(v * v, jnp.sum, jax.lax.psum, jnp.add)


def max_abs(v: Float[Array, " p"]) -> Float[Array, ""]:
    """Return the largest absolute value of a vector [p]."""
    return _reduce_segments(jnp.abs(v), jnp.max, jax.lax.pmax, jnp.maximum)
