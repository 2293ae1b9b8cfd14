"""Numbers and arguments checked before anything is compiled: what was given, what was expected, what to do."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from laqjax.types import Shards


def number(
    name: str, value: Any, dtype: Any, *, least: float = -np.inf, above: float = -np.inf, most: float = np.inf
) -> Any:
    """`value` as a NumPy scalar array of `dtype`, so that Python, NumPy and JAX numbers trace alike.

    Raises:
        ValueError: naming the argument, the value and what was expected.
    """
    whole = np.issubdtype(dtype, np.integer)
    try:
        given = np.asarray(np.nan if isinstance(value, str | bytes) else value, np.float64)
    except (TypeError, ValueError):
        given = np.asarray(np.nan)
    if whole and most == np.inf and np.any(given > np.iinfo(dtype).max):  # said only where it matters
        most = np.iinfo(dtype).max
    bounds = (
        [f">= {least:g}"] * (least > -np.inf)
        + [f"> {above:g}"] * (above > -np.inf)
        + [f"<= {most:.10g}"] * (most < np.inf)
    )
    expected = " and ".join([f"one {'whole' if whole else 'finite'} number", *bounds])
    valid = given.shape == () and np.isfinite(given) and least <= given <= most and given > above
    if not valid or isinstance(value, bool | np.bool_) or (whole and given != np.floor(given)):
        raise ValueError(f"{name} = {value!r}: expected {expected}")
    return np.asarray(given, dtype)


def numbers(name: str, value: Any, dtype: Any, shapes: Any, expected: str) -> np.ndarray:
    """A checked array of finite numbers >= 0 of one of the shapes (None: any vector).

    Raises:
        ValueError: naming the argument, the value and what was expected.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError):
        array = np.asarray(np.nan, np.float64)
    fits = array.ndim == 1 if shapes is None else array.shape in shapes
    if not fits or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} = {value!r}: expected {expected}")
    return array


def step_size(value: Any, dtype: Any) -> Any:
    """A step size > 0, or a schedule: a function of the round that is a pytree, its numbers of `dtype` as leaves.

    Raises:
        ValueError: for anything else.
    """
    if not callable(value):
        return number("lr", value, dtype, above=0.0)
    if jax.tree_util.all_leaves([value]):
        value = jax.tree_util.Partial(value)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.int32 if np.issubdtype(np.asarray(leaf).dtype, np.integer) else dtype), value
    )


def server_optimizer(value: Any) -> Callable[[Any], Any]:
    """A factory `lr -> optax transformation`; a transformation itself stands for the factory that always gives it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, optax.GradientTransformation):
        return Given(value)
    if not callable(value):
        raise ValueError(
            f"optimizer = {value!r}: expected a function of the step size that gives an optax transformation, as "
            "optax.adam, or a transformation, as optax.adam(1e-3)"
        )
    return value


@dataclass(frozen=True)
class Given:
    """The factory that always gives this transformation; equal ones are equal, so they are one compiled program."""

    transformation: optax.GradientTransformation

    def __call__(self, lr: Any) -> optax.GradientTransformation:
        """The transformation, whatever the step size."""
        return self.transformation


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" where a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def part(name: str, value: Any, methods: tuple[str, ...], expected: str) -> None:
    """Raise ValueError unless `value` is an instance (not a class) with these methods."""
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        raise ValueError(f"{name} = {value!r}: expected {expected}")


def no_tracers(*trees: Any) -> None:
    """Raise ValueError when called while JAX traces: a run is a loop on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise ValueError(
            "run, stream and sweep loop on the host and cannot be called inside jit, vmap, grad or scan: call "
            "alg.step(state, shards, key) there, one round as a pure function"
        )


def run_arguments(alg: Any, params: Any, shards: Shards, rows: int = 0) -> None:
    """Raise ValueError when parameters, data and algorithm do not fit; only shapes and finiteness are looked at.

    rows: of the shards, where padding workers are allowed.
    """
    p, m = alg.oracle.size, alg.num_workers
    if not callable(alg.lr) and np.ndim(alg.lr):
        raise ValueError("an algorithm of many points (`stack`): expected one algorithm; run it with `sweep`")
    if np.shape(params) != (p,) or getattr(params, "dtype", None) != alg.oracle.dtype:
        raise ValueError(
            f"params = {getattr(params, 'dtype', type(params))}{list(np.shape(params))}: expected {alg.oracle.dtype}[{p}], "
            "a vector from oracle.ravel(params), or the pytree itself"
        )
    most = np.iinfo(np.int32).max // (m if alg.rule.server_decides else 2) // alg.oracle.dtype.itemsize // 8
    if p > most:  # a message may be longer than the vector (indices), a server that asks sends one to each worker
        raise ValueError(f"params of {p} parameters: expected at most {most}, a round's bits are counted in int32")
    check_shards(shards, m, rows)
    if alg.sampler is not None and not 1 <= alg.sampler.size <= shards.weight.shape[1]:
        rows = shards.weight.shape[1]
        raise ValueError(f"sampler of {alg.sampler.size} rows for shards of {rows}: expected 1 to {rows}")
    alg.oracle.check(shards)


def check_shards(shards: Shards, num_workers: int, rows: int = 0) -> None:
    """Raise ValueError unless these are finite numbers of `num_workers` workers (or `rows`), padded at the end."""
    for name, tree in zip(Shards._fields, shards, strict=True):
        for array in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, list)):
            if not hasattr(array, "dtype"):
                raise ValueError(
                    f"shards.{name} holds {type(array)}: expected arrays [M, N, ...] of numbers (np.asarray)"
                )
    x, y, weight = ([np.shape(a) for a in jax.tree.leaves(tree)] for tree in shards)
    shape = weight[0] if len(weight) == 1 else ()
    if len(shape) != 2 or not x or any(a[:2] != shape for a in (*x, *y)):
        x, y, weight = (", ".join(str(list(a)) for a in shapes) for shapes in (x, y, weight))
        raise ValueError(f"shards: expected x [M, N, ...], y [M, N, ...] and weight [M, N], got {x}, {y}, {weight}")
    if shape[0] not in (num_workers, rows):
        raise ValueError(
            f"shards of {shape[0]} workers for an algorithm of num_workers = {num_workers}: expected the same number"
        )
    for name, tree in zip(Shards._fields, shards, strict=True):
        for array in jax.tree.leaves(tree):
            if not jnp.issubdtype(array.dtype, jnp.number) and (name == "weight" or array.dtype != np.bool_):
                raise ValueError(
                    f"shards.{name} of dtype {array.dtype}: expected numbers (uint8 images, int32 labels, float data)"
                )
            if jnp.issubdtype(array.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(array))):
                raise ValueError(f"shards.{name} holds NaN or infinity: expected finite data; clean or drop those rows")
    if not isinstance(shards.weight, jax.Array) or shards.weight.is_fully_addressable:  # else each process saw its own
        _check_weights(np.asarray(shards.weight))


def _check_weights(weight: np.ndarray) -> None:
    total = weight.sum(axis=1)
    bad = (total <= 0) | np.any(weight < 0, axis=1)
    if np.any(bad):
        worker = int(np.argmax(bad))
        raise ValueError(
            f"shards.weight of worker {worker} sums to {total[worker]:g}: expected weights >= 0, at least one of them > 0"
        )
    counts = weight > 0
    gap = np.any(counts[:, 1:] & ~counts[:, :-1], axis=1)
    if np.any(gap):
        worker = int(np.argmax(gap))
        row = int(np.argmin(counts[worker]))
        raise ValueError(
            f"shards.weight of worker {worker} is 0 at row {row} and not after it: expected padding at the end of a shard; "
            "move the rows that count to the front"
        )
