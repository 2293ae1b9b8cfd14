"""Input validation, which runs before anything is compiled.

Each error message has the form "<what was given>: must be <what is allowed>; <what to do>".
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from laqjax.types import Compressor, DownlinkTraits, OracleHints, OracleResult, Shards


def check_number(
    name: str, value: Any, dtype: Any, *, minimum: float = -np.inf, above: float = -np.inf, maximum: float = np.inf
) -> Any:
    """Check a number and convert it to a NumPy scalar array, so that Python, NumPy and JAX numbers trace alike.

    Args:
        name: name of the argument, for the error message.
        value: the number; booleans, strings and arrays with a shape are rejected.
        dtype: dtype of the result. An integer dtype requires a whole number.
        minimum: least value allowed.
        above: the value must be greater than this.
        maximum: largest value allowed; for an integer dtype by default the largest number that it can hold.

    Returns:
        An array of shape () and dtype `dtype`.

    Raises:
        ValueError: the value is not allowed. The message names the argument, the value and what is allowed.
    """
    whole = np.issubdtype(dtype, np.integer)
    try:
        given = np.asarray(np.nan if isinstance(value, str | bytes) else value, np.float64)
    except (TypeError, ValueError):
        given = np.asarray(np.nan)
    if whole and maximum == np.inf and np.any(given > np.iinfo(dtype).max):  # named only if exceeded
        maximum = np.iinfo(dtype).max
    bounds = (
        [f">= {minimum:g}"] * (minimum > -np.inf)
        + [f"> {above:g}"] * (above > -np.inf)
        + [f"<= {maximum:.10g}"] * (maximum < np.inf)
    )
    allowed = f"a {'whole' if whole else 'finite'} number {' and '.join(bounds)}".rstrip()
    valid = given.shape == () and np.isfinite(given) and minimum <= given <= maximum and given > above
    if not valid or isinstance(value, bool | np.bool_) or (whole and given != np.floor(given)):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")
    return np.asarray(given, dtype)


def check_nonnegative_array(name: str, value: Any, dtype: Any, shapes: Any, allowed: str) -> np.ndarray:
    """Convert numbers to a NumPy array; raise ValueError unless they are finite, >= 0 and of one of these shapes.

    `shapes` is a tuple of tuples, or None for any vector. `allowed` is what is allowed, for the error message.
    """
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError):
        array = np.asarray(np.nan, np.float64)
    fits = array.ndim == 1 if shapes is None else array.shape in shapes
    if not fits or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")
    return array


def as_schedule(value: Any, dtype: Any, name: str = "lr") -> Any:
    """Convert a learning rate, or a schedule of learning rates, to a pytree whose leaves are NumPy numbers.

    Args:
        value: a learning rate > 0, or a function of the round. If the function is a pytree, its numbers are traced, so
            that other numbers do not compile again.
        dtype: dtype of the learning rate and of the schedule's floating-point numbers; integers become int32.
        name: name of the argument, for the error message.

    Raises:
        ValueError: `value` is neither a number > 0 nor callable.
    """
    return _as_partial(value, dtype) if callable(value) else check_number(name, value, dtype, above=0.0)


def _as_partial(function: Callable[..., Any], dtype: Any) -> Any:
    """Convert a function to a pytree whose leaves are NumPy numbers; one without numbers becomes a `Partial`."""
    if jax.tree_util.all_leaves([function]):
        function = jax.tree_util.Partial(function)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf, np.int32 if np.issubdtype(np.asarray(leaf).dtype, np.integer) else dtype),
        function,
    )


def as_optimizer_factory(value: Any, dtype: Any, name: str = "optimizer") -> Any:
    """Convert an optimizer argument to a factory `lr -> optax transformation`.

    Args:
        value: a factory, such as `optax.adam`, or a transformation, such as `optax.adam(1e-3)`. The numbers of a
            `jax.tree_util.Partial` are traced, so that other numbers do not compile again.
        dtype: dtype of the floating-point numbers of a `Partial`.
        name: name of the argument, for the error message.

    Raises:
        ValueError: `value` is neither a transformation nor callable.
    """
    if isinstance(value, optax.GradientTransformation):
        value = _ConstantFactory(value)
    if not callable(value):
        raise ValueError(
            f"{name} = {value!r}: must be a function of the learning rate that returns an optax transformation, "
            "such as optax.adam, or a transformation, such as optax.adam(1e-3)"
        )
    return _as_partial(value, dtype)


@dataclass(frozen=True)
class _ConstantFactory:
    """Factory that returns the same transformation for every learning rate.

    Factories of the same transformation are equal, so that they share one compiled program.
    """

    transformation: optax.GradientTransformation

    def __call__(self, lr: Any) -> optax.GradientTransformation:
        """Return the transformation; the learning rate is ignored."""
        return self.transformation


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" if a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def is_readable(array: Any) -> bool:
    """Return whether this process can read all numbers of an array: it is not traced or spread over processes."""
    known = isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_fully_addressable
    return known or isinstance(array, np.ndarray)


def oracle_dtype(oracle: Any) -> np.dtype:
    """Return the dtype of an oracle's parameters.

    Raises:
        ValueError: `oracle` is not an oracle, but for example a problem or a loss function.
    """
    if isinstance(oracle, type) or not all(hasattr(oracle, name) for name in ("size", "dtype", "ravel", "unravel")):
        problem = hasattr(oracle, "oracle") and not isinstance(oracle, type)
        how = "problem.oracle()" if problem else "laqjax.oracles.from_loss(loss_fn, params)"
        raise ValueError(f"oracle = {oracle!r}: must be an oracle; pass {how}")
    return oracle.dtype


def get_declaration(part: Any, protocol: type, name: str) -> Any:
    """Return a member of a part, or where the part lacks it the default that the protocol defines."""
    default = getattr(protocol, name)
    return getattr(part, name, partial(default, part) if callable(default) else default)


def check_oracle_result(oracle: Any, result: Any, state: Any = None) -> OracleResult:
    """Return `result`; raise ValueError unless it is an `OracleResult` whose state has the form of `state`."""
    if not isinstance(result, OracleResult):
        raise ValueError(
            f"oracle {type(oracle).__name__} returned a {type(result).__name__}: must be "
            "laqjax.types.OracleResult(loss, grad)"
        )
    given, needed = (jax.tree.map(lambda a: (jnp.shape(a), a.dtype), tree) for tree in (result.state, state))
    if given != needed:
        raise ValueError(
            f"oracle {type(oracle).__name__} returned the state {given}: must be {needed}, as its `init_state` gives it"
        )
    return result


def check_evaluates_anywhere(oracle: Any) -> None:
    """Raise ValueError if an oracle declares that it has gradients at the model of the round only."""
    if not get_declaration(oracle, OracleHints, "evaluates_anywhere"):
        raise ValueError(
            "a method that needs gradients at other models (MARINA and DASHA on minibatches, LASG, CADA, local steps), with the oracle "
            f"{type(oracle).__name__}, which has those at the current model only: must be a method that needs no others, "
            "such as laq, lag_wk, ef21, diana"
        )


def check_minibatch(size: int, num_local_steps: int) -> None:
    """Raise ValueError unless a minibatch of `size` rows can be split into equal parts, one for each local step."""
    if size % num_local_steps:
        raise ValueError(
            f"minibatches of {size} rows: must be a multiple of num_local_steps = {num_local_steps}, since every local "
            "step uses its own part"
        )


def check_implements(name: str, value: Any, protocol: type, allowed: str) -> None:
    """Raise ValueError unless `value` is an instance (not a class) with the members of a protocol."""

    def lacks(member: str, wanted: Any) -> bool:
        return not hasattr(value, member) or (callable(wanted) and not callable(getattr(value, member)))

    members = {name: wanted for name, wanted in vars(protocol).items() if name[0] != "_" or name == "__call__"}
    missing = ", ".join(member for member, wanted in members.items() if lacks(member, wanted))
    if isinstance(value, type) or missing:
        raise ValueError(f"{name} = {value!r}: must be {allowed}{missing and f'; it lacks {missing}'}")


def check_compressor(value: Any) -> None:
    """Raise ValueError unless the argument `compressor` of a function is a compressor."""
    check_implements("compressor", value, Compressor, "a compressor, such as compressors.top_k(10)")


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} = {value!r}: must be True or False")


def check_not_traced(*trees: Any) -> None:
    """Raise ValueError if a leaf of the trees is traced, since a run is a loop on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees)):
        raise ValueError(
            "run, stream or sweep inside jit, vmap, grad or scan: must be called outside, since they loop on the "
            "host; call alg.step(state, shards, key), one round as a pure function, inside"
        )


def check_keys(name: str, keys: Any, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `keys` are typed PRNG keys of this shape: (), or (S,) for the points of a sweep."""
    dtype = getattr(keys, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key) or keys.shape != shape:
        given = repr(keys) if dtype is None else f"{dtype}{list(keys.shape)}"
        how = "jax.random.key(0)"
        wanted = "one typed key"
        if shape:
            wanted, how = f"{shape[0]} typed keys, one for each point", f"jax.random.split({how}, {shape[0]})"
        raise ValueError(f"{name} = {given}: must be {wanted}; pass {how}")


def check_schedule(alg: Any, first: int, rounds: int, *, points: bool = False) -> None:
    """Raise ValueError if a schedule yields a learning rate < 0, NaN or infinity in a round or a local step of the run.

    At most 102 evenly spaced rounds and steps are checked, including the first and the last. With `points`, `alg` is a
    stack of algorithms, all of which are checked.
    """
    steps, local = (get_declaration(alg.oracle, OracleHints, name) for name in ("num_local_steps", "local_schedule"))
    server = jax.tree_util.Partial(type(alg).learning_rate_at, alg) if callable(alg.lr) else None
    for name, unit, schedule, per_round in (
        ("learning rate of the local steps", "step", local, steps),
        ("lr", "round", server, 1),
    ):
        if schedule is None:
            continue
        at = np.unique(np.linspace(first * per_round, (first + rounds) * per_round - 1, 102).astype(np.int32))
        sizes = np.asarray(_learning_rates(schedule, at, points=points))
        bad = ~(np.isfinite(sizes) & (sizes >= 0))
        if np.any(bad):
            where = tuple(np.argwhere(bad)[0])
            raise ValueError(
                f"{name} = {sizes[where]:g} in {unit} {at[where[0]]}: must be finite and >= 0 in every {unit}; correct the "
                "schedule, or run fewer rounds"
            )


@partial(jax.jit, static_argnames="points")
def _learning_rates(schedule: Any, at: Any, *, points: bool) -> Any:
    """Return the learning rates of a schedule in K rounds or steps [K], or those of a stack of schedules [K, S]."""
    if points:
        return jax.vmap(lambda k: jax.vmap(lambda one: one(k))(schedule))(at)
    return jax.vmap(schedule)(at)


def check_run_inputs(alg: Any, params: Any, shards: Shards, num_slots: int = 0) -> None:
    """Raise ValueError if parameters, data and algorithm do not fit each other.

    Of the data, only shapes, dtypes, finiteness and weights are checked. `params` is a vector [p]. `num_slots` is the
    number of workers in `shards` including padding workers, where those are allowed; 0 otherwise.
    """
    p, m = alg.oracle.size, alg.num_workers
    if not callable(alg.lr) and np.ndim(alg.lr):
        raise ValueError(
            "an algorithm of many points (`stack_algorithms`): must be an algorithm of one point; run it with `sweep`"
        )
    if np.shape(params) != (p,) or getattr(params, "dtype", None) != alg.oracle.dtype:
        raise ValueError(
            f"params = {getattr(params, 'dtype', type(params))}{list(np.shape(params))}: must be "
            f"{alg.oracle.dtype}[{p}], a vector from oracle.ravel(params), or the pytree itself"
        )
    # With indices, a message may be longer than the vector. A server that selects workers sends one message to each.
    down = get_declaration(alg.downlink, DownlinkTraits, "num_vectors") * (m if alg.rule.server_selects else 1)
    most = np.iinfo(np.int32).max // max(down, 2) // alg.oracle.dtype.itemsize
    if p > most:
        raise ValueError(f"params of {p} parameters: must be <= {most}, since a round's bytes are counted in int32")
    check_shards(shards, m, num_slots)
    if alg.sampler is not None and not 1 <= alg.sampler.size <= shards.weight.shape[1]:
        length = shards.weight.shape[1]
        raise ValueError(f"sampler.size = {alg.sampler.size}: must be 1 to {length}, the rows of a shard")
    if alg.sampler is not None:
        check_minibatch(alg.sampler.size, get_declaration(alg.oracle, OracleHints, "num_local_steps"))
    alg.oracle.validate(shards)


def check_shards_type(shards: Any) -> None:
    """Raise ValueError unless `shards` is an instance of `Shards`; a plain tuple is rejected."""
    if not isinstance(shards, Shards):
        raise ValueError(
            f"shards of type {type(shards).__name__}: must be laqjax.Shards(x, y, weight), where weight [M, N] is 1 for rows "
            "that count and 0 for padding; build them with laqjax.partition_data(x, y, num_workers, scheme)"
        )


def check_shards(shards: Shards, num_workers: int, num_slots: int = 0) -> None:
    """Raise ValueError unless the shards hold finite numbers, with the padding at the end of each shard.

    They must be of `num_workers` workers, or of `num_slots` with padding workers.
    """
    check_shards_type(shards)
    for name, tree in zip(Shards._fields, shards, strict=True):
        for array in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, list)):
            if not hasattr(array, "dtype"):
                raise ValueError(
                    f"shards.{name} holds {type(array)}: must be arrays [M, N, ...] of numbers; use np.asarray"
                )
    x, y, weight = ([np.shape(a) for a in jax.tree.leaves(tree)] for tree in shards)
    shape = weight[0] if len(weight) == 1 else ()
    if len(shape) != 2 or not x or any(a[:2] != shape for a in (*x, *y)):
        x, y, weight = (", ".join(str(list(a)) for a in shapes) for shapes in (x, y, weight))
        raise ValueError(f"shards of shapes {x}, {y}, {weight}: must be x [M, N, ...], y [M, N, ...] and weight [M, N]")
    if shape[0] not in (num_workers, num_slots):
        raise ValueError(
            f"shards of {shape[0]} workers: must be {num_workers} workers, the num_workers of the algorithm"
        )
    for name, tree in zip(Shards._fields, shards, strict=True):
        for array in jax.tree.leaves(tree):
            if np.dtype(array.dtype).kind in "SUT":
                raise ValueError(
                    f"shards.{name} holds strings (dtype {array.dtype}): must be numbers; number the classes with "
                    "np.unique(y, return_inverse=True)[1]"
                )
            if not jnp.issubdtype(array.dtype, jnp.number) and (name == "weight" or array.dtype != np.bool_):
                raise ValueError(
                    f"shards.{name} of dtype {array.dtype}: must be numbers (uint8 images, int32 labels, float data)"
                )
            if jnp.issubdtype(array.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(array))):
                raise ValueError(f"shards.{name} holds NaN or infinity: must be finite; correct or drop those rows")
    if is_readable(shards.weight):  # otherwise each process has checked its own shards
        _check_weights(np.asarray(shards.weight))


def _check_weights(weight: np.ndarray) -> None:
    """Raise ValueError unless the weights [M, N] are >= 0, positive somewhere, and zero only at the end of a shard."""
    total = weight.sum(axis=1)
    bad = (total <= 0) | np.any(weight < 0, axis=1)
    if np.any(bad):
        worker = int(np.argmax(bad))
        raise ValueError(
            f"shards.weight of worker {worker} sums to {total[worker]:g}: must be weights >= 0, at least one > 0"
        )
    counts = weight > 0
    gap = np.any(counts[:, 1:] & ~counts[:, :-1], axis=1)
    if np.any(gap):
        worker = int(np.argmax(gap))
        row = int(np.argmin(counts[worker]))
        raise ValueError(
            f"shards.weight of worker {worker} is 0 at row {row} and > 0 in a later row: must be 0 (padding) only at "
            "the end of a shard; move the rows that count to the front"
        )


def check_inputs(alg: Any, params: Any, shards: Shards) -> None:
    """Raise ValueError unless the algorithm, its parameters and the data fit each other.

    Args:
        alg: the algorithm.
        params: the model, a pytree or a flat vector [p].
        shards: the data of the workers. Only shapes, dtypes, finiteness and weights are checked.

    Raises:
        ValueError: the algorithm, its parameters and the data do not fit each other.
    """
    check_run_inputs(alg, alg.oracle.ravel(params), shards)
