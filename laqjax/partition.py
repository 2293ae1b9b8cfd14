"""Shards of M workers: from one data set, evenly, by label or in unequal sizes, or from partitions that exist already."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from laqjax._core.validation import suggest
from laqjax.types import Shards

__all__ = ["partition_data", "shards_from_partitions"]


def partition_data(x: Any, y: Any, num_workers: int, scheme: str, seed: int = 0) -> Shards:
    """Split n samples into the shards of M workers.

    The schemes are:

    - `contiguous`: the samples in file order, floor(n / M) for each worker. The rest is dropped, as in the LAQ paper's
      program. The data are not copied.
    - `shuffled`: as `contiguous`, after a random permutation.
    - `sorted`: as `contiguous`, after a stable sort by label, so that a worker has only a class or two.
    - `dirichlet:ALPHA`: each class is split in proportions drawn from Dirichlet(ALPHA, ..., ALPHA). A smaller ALPHA
      gives more uneven splits. All samples are used, and every worker gets at least one.
    - `unequal:RATIO`: a random permutation, in shards whose sizes form a geometric progression. The last shard is RATIO
      times as large as the first. All samples are used.

    Args:
        x: the inputs, [n, ...], or a pytree of such arrays.
        y: the targets, likewise; `sorted` and `dirichlet` need class labels [n].
        num_workers: M, from 1 to n.
        scheme: one of the schemes above, for example "dirichlet:0.1".
        seed: seed of the random schemes; the same seed gives the same shards.

    Returns:
        x [M, N, ...], y [M, N, ...] and weight [M, N] in float32, where N is the size of the largest shard. The weight
        is 1 for samples. Shorter shards are padded at the end with zeros in all three.

    Raises:
        ValueError: an argument is out of its range, x and y differ in length, or a worker would get no samples.

    Example:
        >>> import numpy as np, laqjax
        >>> laqjax.partition_data(np.zeros((10, 3)), np.arange(10), 2, "contiguous").weight.shape
        (2, 5)
    """
    lengths = {len(leaf) for leaf in jax.tree.leaves((x, y))}
    if len(lengths) != 1:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves((x, y))]
        raise ValueError(f"x and y of shapes {shapes}: must be of one length, with one label for each row of x")
    (n,) = lengths
    if not 1 <= num_workers <= n:
        raise ValueError(f"num_workers = {num_workers}: must be 1 to {n}, the number of samples")
    rng = np.random.default_rng(seed)
    match scheme.partition(":")[:2]:
        case "contiguous", "":
            return _equal_shards(x, y, num_workers)
        case "shuffled", "":
            return _equal_shards(x, y, num_workers, rng.permutation(n))
        case "sorted", "":
            return _equal_shards(x, y, num_workers, np.argsort(_require_labels(y, scheme), kind="stable"))
        case "dirichlet", _:
            alpha = _parse_scheme_value(scheme, "dirichlet:ALPHA, ALPHA finite and above 0", lambda alpha: alpha > 0)
            return _pad_shards(x, y, _dirichlet(_require_labels(y, scheme), num_workers, alpha, rng))
        case "unequal", _:
            ratio = _parse_scheme_value(scheme, "unequal:RATIO, RATIO finite and at least 1", lambda ratio: ratio >= 1)
            return _pad_shards(x, y, _unequal(n, num_workers, ratio, rng))
    known = "contiguous, shuffled, sorted, dirichlet:ALPHA or unequal:RATIO"
    close = suggest(scheme.partition(":")[0], ("contiguous", "shuffled", "sorted", "dirichlet", "unequal"))
    raise ValueError(f"scheme = {scheme!r}: must be {known}{close}")


def shards_from_partitions(
    partitions: Sequence[Any], x: str | Sequence[str] = "image", y: str | Sequence[str] = "label"
) -> Shards:
    """Convert the partitions of M workers into shards.

    A partition is one of these:

    - an object with `with_format("numpy")`, such as the `datasets.Dataset` from `load_partition` of `flwr-datasets`
    - a mapping from names to columns, each a sequence with one entry for each sample
    - a list of rows, each a mapping from names to values

    Args:
        partitions: one partition for each worker; a worker of a federation gives `[partition]`, its own.
        x: name of the column with the inputs, or several names. Several names make `x` a dictionary of arrays.
        y: name of the column with the targets, likewise.

    Returns:
        x [M, N, ...], y [M, N, ...] and weight [M, N] as from `partition_data`, in the dtypes of the columns.

    Raises:
        ValueError: there is no partition, a partition has no rows or lacks a column, or the rows of a column differ in
            shape or dtype.

    Example:
        >>> import laqjax
        >>> rows = [{"image": [0.0, 1.0], "label": 1}, {"image": [2.0, 3.0], "label": 0}]
        >>> laqjax.partition.shards_from_partitions([rows, rows[:1]]).weight.tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    names = {name: None for part in (x, y) for name in ([part] if isinstance(part, str) else part)}
    columns = [_read_columns(partition, tuple(names), f"partition {i}") for i, partition in enumerate(partitions)]
    if not columns:
        raise ValueError("partitions of length 0: must be one partition for each worker")
    joined = {name: _concatenate(name, [column[name] for column in columns]) for name in names}
    ends = np.cumsum([len(column[next(iter(names))]) for column in columns])
    inputs, targets = (joined[part] if isinstance(part, str) else {n: joined[n] for n in part} for part in (x, y))
    return _pad_shards(inputs, targets, np.split(np.arange(ends[-1]), ends[:-1]))


def _read_columns(partition: Any, names: tuple[str, ...], label: str) -> dict[str, np.ndarray]:
    """Return the named columns of a partition as arrays of one length."""
    if hasattr(partition, "with_format"):
        partition = partition.with_format("numpy")[:]
    is_mapping = isinstance(partition, Mapping)
    known = list(partition) if is_mapping else list(partition[0] if len(partition) else {})
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"{label} with the columns {known}: must have {missing} and a row; give its names as x and y")
    try:
        values = {name: partition[name] if is_mapping else [row[name] for row in partition] for name in names}
        columns = {
            name: column if isinstance(column, np.ndarray) else np.stack([np.asarray(value) for value in column])
            for name, column in values.items()
        }
    except (ValueError, KeyError) as error:
        raise ValueError(f"{label} ({error}): must have a row, and rows of one shape with the same columns") from None
    lengths, kinds = {len(column) for column in columns.values()}, {column.dtype.kind for column in columns.values()}
    if len(lengths) != 1 or 0 in lengths or kinds - set("biuf"):
        about = {name: f"{column.dtype}{list(column.shape)}" for name, column in columns.items()}
        raise ValueError(f"{label} with {about}: must be numbers, with one entry in each column for each row")
    return columns


def _concatenate(name: str, parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate the columns of all workers, which must agree in shape and dtype."""
    if len({(part.shape[1:], part.dtype) for part in parts}) != 1:
        about = sorted({f"{part.dtype}{list(part.shape[1:])}" for part in parts})
        raise ValueError(
            f"column {name!r} with rows {', '.join(about)}: must be of one shape and dtype in all partitions"
        )
    return np.concatenate(parts)


def _require_labels(y: Any, scheme: str) -> np.ndarray:
    """Return `y` if it holds one label per example, [n]; raise ValueError otherwise."""
    if not hasattr(y, "shape") or len(y.shape) != 1:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(y)]
        raise ValueError(f"scheme = {scheme!r} with y of shape {shapes}: must be one label for each row, y [n]")
    return y


def _parse_scheme_value(scheme: str, allowed: str, valid: Callable[[float], bool]) -> float:
    """Parse the number after the colon of a scheme; raise ValueError unless it is finite and valid."""
    try:
        value = float(scheme.partition(":")[2])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and valid(value)):
        raise ValueError(f"scheme = {scheme!r}: must be {allowed}")
    return value


def _equal_shards(x: Any, y: Any, num_workers: int, order: np.ndarray | None = None) -> Shards:
    """Build shards of floor(n / M) samples each, in the given order of example indices or in file order."""
    shape = (num_workers, len(jax.tree.leaves(x)[0]) // num_workers)
    kept = slice(math.prod(shape)) if order is None else order[: math.prod(shape)]
    x, y = jax.tree.map(lambda a: a[kept].reshape(shape + a.shape[1:]), (x, y))
    return Shards(x, y, np.ones(shape, np.float32))


def _pad_shards(x: Any, y: Any, groups: list[np.ndarray]) -> Shards:
    """Build shards of unequal sizes from the example indices of each worker, padded at the end."""
    shape = (len(groups), max(map(len, groups)))
    own = np.arange(shape[1]) < np.array([len(examples) for examples in groups])[:, None]

    def fill(a: np.ndarray) -> np.ndarray:
        shards = np.zeros(shape + a.shape[1:], a.dtype)
        shards[own] = a[np.concatenate(groups)]
        return shards

    return Shards(jax.tree.map(fill, x), jax.tree.map(fill, y), own.astype(np.float32))


def _dirichlet(y: np.ndarray, num_workers: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the example indices of each worker for the scheme `dirichlet`."""
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y of dtype {y.dtype}: must be integer labels, since scheme 'dirichlet' splits classes")
    owner = np.empty(len(y), int)
    for label in np.unique(y):
        examples = rng.permutation(np.flatnonzero(y == label))
        shares = rng.dirichlet(np.full(num_workers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(examples)).astype(int)
        for worker, part in enumerate(np.split(examples, cuts)):
            owner[part] = worker
    for worker in range(num_workers):
        if not (owner == worker).any():
            donor = np.bincount(owner).argmax()  # it has at least two: M <= n, and this worker has none
            owner[np.flatnonzero(owner == donor)[0]] = worker
    return [np.flatnonzero(owner == worker) for worker in range(num_workers)]


def _unequal(n: int, num_workers: int, ratio: float, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the example indices of each worker for the scheme `unequal`."""
    ends = np.cumsum(np.geomspace(1, ratio, num_workers))
    cuts = np.round(ends / ends[-1] * n).astype(int)
    groups = np.split(rng.permutation(n), cuts[:-1])
    if min(map(len, groups)) == 0:
        raise ValueError(
            f"scheme = 'unequal:{ratio:g}' for {n} samples, {num_workers} workers: must be a smaller ratio, since a "
            "worker would get no sample"
        )
    return groups
