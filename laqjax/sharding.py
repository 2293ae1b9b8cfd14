"""Workers and points on the devices of a mesh, of one process or many: placing, loading, and agreeing.

A mesh has the axis `workers`, the axis `sweep`, or both. M workers on d devices take ceil(M / d) rows each; rows beyond M are
padding: copies of the last worker that never send and are never counted.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from laqjax._core.validation import check_shards
from laqjax._engine.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    all_gather,
    all_reduce,
    all_to_all,
    field_widths,
    num_packed_words,
    resolve_collective,
    sum_messages,
    unpack_message,
)
from laqjax.types import AlgorithmState, Shards

__all__ = [
    "SWEEP_AXIS",
    "WORKER_AXIS",
    "AllGather",
    "AllReduce",
    "AllToAll",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "device_put_global",
    "field_widths",
    "load_local_shards",
    "make_mesh",
    "num_packed_words",
    "num_worker_slots",
    "pad_workers",
    "partition_spec",
    "resize_workers",
    "resolve_collective",
    "shard_state",
    "state_partition_specs",
    "sum_messages",
    "to_host",
    "unpack_message",
    "unpad_state",
]


WORKER_AXIS, SWEEP_AXIS = "workers", "sweep"


def make_mesh(workers: int | None = None, sweep: int = 1) -> Mesh:
    """A mesh over the devices of all processes.

    Args:
        workers: devices along the axis of workers (None: all that are left).
        sweep: devices along the axis of points.

    Raises:
        ValueError: there are not as many devices.
    """
    devices = jax.device_count()
    workers = devices // sweep if workers is None else workers
    if workers < 1 or sweep < 1 or workers * sweep != devices:
        raise ValueError(f"mesh of {sweep} x {workers} devices: expected all {devices} that are there")
    return jax.make_mesh((sweep, workers), (SWEEP_AXIS, WORKER_AXIS), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def num_worker_slots(mesh: Mesh | None, num_workers: int) -> int:
    """Rows of workers on a mesh, padding included.

    Raises:
        ValueError: the mesh has no axis of workers or points.
    """
    if mesh is None:
        return num_workers
    if not {WORKER_AXIS, SWEEP_AXIS} & set(mesh.axis_names):
        raise ValueError(
            f"mesh with axes {mesh.axis_names}: expected '{WORKER_AXIS}', '{SWEEP_AXIS}' or both; `laqjax.sharding.make_mesh()` makes one"
        )
    devices = mesh.shape.get(WORKER_AXIS, 1)
    return -(-num_workers // devices) * devices


def partition_spec(mesh: Mesh, *axes: str | None) -> P:
    """The axes that the mesh has; leading ones that it lacks are not split."""
    return P(*(axis if axis in mesh.axis_names else None for axis in axes))


def device_put_global(tree: Any, mesh: Mesh, split: P) -> Any:
    """Arrays as one array over all processes; every process has them whole and gives what its devices hold.

    Arrays that lie so already are not moved.
    """
    sharding = NamedSharding(mesh, split)

    def one(a: Any) -> Any:
        # equal, not equivalent: programs are compiled for shardings by their names
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        if not hasattr(a, "dtype"):
            a = np.asarray(a)
        if jax.process_count() == 1:
            return jax.device_put(a, sharding)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(a)), impl=jax.random.key_impl(a))
        host = np.asarray(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(one, tree)


def state_partition_specs(mesh: Mesh, *points: str) -> Any:
    """How a state lies on the mesh: its workers along the axis of workers; a state of many points along theirs first."""
    whole: Any = partition_spec(mesh, *points)
    workers: Any = partition_spec(mesh, *points, WORKER_AXIS)
    return AlgorithmState(whole, whole, whole, whole, whole, whole, workers)


def shard_state(state: AlgorithmState, mesh: Mesh, *points: str) -> AlgorithmState:
    """A state where `state_partition_specs` says."""
    return AlgorithmState(
        *(
            device_put_global(part, mesh, at)
            for part, at in zip(state, state_partition_specs(mesh, *points), strict=True)
        )
    )


def pad_workers(tree: Any, rows: int, axis: int = 0) -> Any:
    """Arrays [M, ...] with `rows` rows: the last one repeated, or the rows beyond left out."""

    def one(a: Any) -> Any:
        if a.shape[axis] == rows:
            return a
        xp: Any = np if isinstance(a, np.ndarray) else jnp
        return xp.take(a, np.minimum(np.arange(rows), a.shape[axis] - 1), axis=axis)

    return jax.tree.map(one, tree)


def load_local_shards(mesh: Mesh, num_workers: int, load: Callable[[int, int], Shards]) -> Shards:
    """The shards of all workers, each process loading its own only.

    Args:
        mesh: with an axis `workers`.
        num_workers: M.
        load: (first, last) -> Shards of the workers first..last-1, each array [last - first, N, ...]; N, dtypes and further
            axes are the same on all processes.

    Returns:
        Shards for `run(..., mesh=mesh)`, with the padding that the mesh needs.

    Raises:
        ValueError: what was loaded is not finite, has other shapes, or is not padded at the end.
    """
    rows = num_worker_slots(mesh, num_workers)
    sharding = NamedSharding(mesh, partition_spec(mesh, WORKER_AXIS))
    parts: Any = sharding.addressable_devices_indices_map((rows,)).values()
    here = sorted({index[0].indices(rows)[:2] for index in parts})
    first, last = here[0][0], here[-1][1]
    have = min(first, num_workers - 1), min(last, num_workers)
    mine = jax.tree.map(np.asarray, load(*have))
    check_shards(mine, have[1] - have[0])
    mine = pad_workers(mine, last - first)

    def one(a: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return a[start - first : stop - first]

        return jax.make_array_from_callback((rows, *a.shape[1:]), sharding, part)

    return jax.tree.map(one, mine)


def resize_workers(state: AlgorithmState, rows: int, axis: int = 0) -> AlgorithmState:
    """A state with so many rows of workers: padding added, or left out."""
    return state._replace(workers=pad_workers(state.workers, rows, axis))


def to_host(tree: Any) -> Any:
    """Arrays whole on the host, also those that are spread over processes."""

    def one(a: Any) -> Any:
        here = not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
        return jax.device_get(a) if here else multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(one, tree)


def unpad_state(state: AlgorithmState, num_workers: int) -> AlgorithmState:
    """A state without the rows of padding, on the host: to save it, or to go on with it on other devices."""
    return resize_workers(to_host(state), num_workers)
