"""Placement of workers and of the points of a sweep on a mesh of devices, of one process or many.

A mesh has the axis `workers`, the axis `sweep`, or both. M workers on d devices take ceil(M / d) slots per device.
Slots beyond M are padding: copies of the last worker, which never upload and are never counted.
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
from laqjax.types import AlgorithmState, Shards

WORKER_AXIS, SWEEP_AXIS = "workers", "sweep"


def make_mesh(workers: int | None = None, sweep: int = 1) -> Mesh:
    """Create a mesh over the devices of all processes.

    Args:
        workers: number of devices along the axis `workers`. None: all devices that `sweep` leaves.
        sweep: number of devices along the axis `sweep`.

    Returns:
        A mesh with the axes (`sweep`, `workers`).

    Raises:
        ValueError: `sweep` times `workers` is not the number of devices.
    """
    devices = jax.device_count()
    workers = devices // sweep if workers is None else workers
    if workers < 1 or sweep < 1 or workers * sweep != devices:
        raise ValueError(f"mesh of {sweep} x {workers} devices: must be all {devices} available devices")
    return jax.make_mesh((sweep, workers), (SWEEP_AXIS, WORKER_AXIS), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def num_worker_slots(mesh: Mesh | None, num_workers: int) -> int:
    """Return the number of slots for workers on a mesh, including padding.

    Args:
        mesh: mesh with the axis `workers`, `sweep` or both. None: no mesh and no padding.
        num_workers: number of workers M.

    Returns:
        M, rounded up to a multiple of the devices along the axis `workers`.

    Raises:
        ValueError: the mesh has neither of the two axes.
    """
    if mesh is None:
        return num_workers
    if not {WORKER_AXIS, SWEEP_AXIS} & set(mesh.axis_names):
        raise ValueError(
            f"mesh with axes {mesh.axis_names}: must be '{WORKER_AXIS}', '{SWEEP_AXIS}' or both; build it with "
            "`laqjax.sharding.make_mesh()`"
        )
    devices = mesh.shape.get(WORKER_AXIS, 1)
    return -(-num_workers // devices) * devices


def partition_spec(mesh: Mesh, *axes: str | None) -> P:
    """Create a partition spec for consecutive array axes.

    Args:
        mesh: the mesh.
        *axes: mesh axis for each leading array axis. An array axis is not split if this is None or an axis that the
            mesh lacks.

    Returns:
        The partition spec.
    """
    return P(*(axis if axis in mesh.axis_names else None for axis in axes))


def device_put_global(tree: Any, mesh: Mesh, split: P) -> Any:
    """Place arrays on the devices of a mesh, as one array over all processes.

    Every process passes the whole arrays, and its devices get their part of them. Arrays that are already placed this
    way are not moved.

    Args:
        tree: pytree of arrays.
        mesh: the mesh.
        split: partition spec of all arrays.

    Returns:
        The pytree of placed arrays.
    """
    sharding = NamedSharding(mesh, split)

    def place(a: Any) -> Any:
        # equal, not only equivalent, since programs are compiled for the names of shardings
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        if not hasattr(a, "dtype"):
            a = np.asarray(a)
        if jax.process_count() == 1:
            return jax.device_put(a, sharding)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(a)), impl=jax.random.key_impl(a))
        host = np.asarray(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree)


def state_partition_specs(mesh: Mesh, *points: str) -> Any:
    """Return the partition specs of a state on a mesh.

    Args:
        mesh: the mesh.
        *points: mesh axis along which the points of a sweep are split, for a state of many points.

    Returns:
        An `AlgorithmState` of partition specs: workers are split along the axis `workers`, all else is the same on its
        devices.
    """
    whole: Any = partition_spec(mesh, *points)
    workers: Any = partition_spec(mesh, *points, WORKER_AXIS)
    return AlgorithmState(whole, whole, whole, whole, whole, whole, workers)


def shard_state(state: AlgorithmState, mesh: Mesh, *points: str) -> AlgorithmState:
    """Place a state on a mesh.

    Args:
        state: state with the padding workers that the mesh needs, see `resize_workers`.
        mesh: the mesh.
        *points: mesh axis along which the points of a sweep are split, for a state of many points.

    Returns:
        The state with the shardings of `state_partition_specs`.
    """
    parts = zip(state, state_partition_specs(mesh, *points), strict=True)
    return AlgorithmState(*(device_put_global(part, mesh, spec) for part, spec in parts))


def pad_workers(tree: Any, num_slots: int, axis: int = 0) -> Any:
    """Change the number of workers in all arrays, by adding or removing padding.

    Args:
        tree: pytree of arrays [M, ...].
        num_slots: number of workers of the result. Further ones are copies of the last one; those beyond are dropped.
        axis: array axis of the workers.

    Returns:
        The pytree of arrays [num_slots, ...].
    """

    def resize(a: Any) -> Any:
        if a.shape[axis] == num_slots:
            return a
        xp: Any = np if isinstance(a, np.ndarray) else jnp
        return xp.take(a, np.minimum(np.arange(num_slots), a.shape[axis] - 1), axis=axis)

    return jax.tree.map(resize, tree)


def load_local_shards(mesh: Mesh, num_workers: int, load: Callable[[int, int], Shards]) -> Shards:
    """Load the shards of all workers, where each process loads only its own.

    Args:
        mesh: mesh with the axis `workers`.
        num_workers: number of workers M.
        load: function (first, last) -> Shards of the workers first..last-1, each array [last - first, N, ...]. N,
            dtypes and further axes are the same on all processes.

    Returns:
        Shards for `run(..., mesh=mesh)`, with the padding that the mesh needs.

    Raises:
        ValueError: the loaded shards are not finite, have other shapes, or are not padded at the end.
    """
    slots = num_worker_slots(mesh, num_workers)
    sharding = NamedSharding(mesh, partition_spec(mesh, WORKER_AXIS))
    parts: Any = sharding.addressable_devices_indices_map((slots,)).values()
    here = sorted({index[0].indices(slots)[:2] for index in parts})
    first, last = here[0][0], here[-1][1]
    have = min(first, num_workers - 1), min(last, num_workers)
    mine = jax.tree.map(np.asarray, load(*have))
    check_shards(mine, have[1] - have[0])
    mine = pad_workers(mine, last - first)

    def assemble(a: np.ndarray) -> jax.Array:
        def read_shards(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(slots)
            return a[start - first : stop - first]

        return jax.make_array_from_callback((slots, *a.shape[1:]), sharding, read_shards)

    return jax.tree.map(assemble, mine)


def resize_workers(state: AlgorithmState, num_slots: int, axis: int = 0) -> AlgorithmState:
    """Change the number of workers in a state, by adding or removing padding.

    Args:
        state: the state.
        num_slots: number of workers of the result, including padding.
        axis: array axis of the workers: 0, or 1 for a state of many points.

    Returns:
        The state with that many workers.
    """
    return state._replace(workers=pad_workers(state.workers, num_slots, axis))


def to_host(tree: Any) -> Any:
    """Copy arrays to the host as whole arrays.

    Arrays that are spread over processes are gathered, so all processes must call this function.

    Args:
        tree: pytree of arrays.

    Returns:
        The pytree with NumPy arrays.
    """

    def copy(a: Any) -> Any:
        here = not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
        return jax.device_get(a) if here else multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(copy, tree)


def unpad_state(state: AlgorithmState, num_workers: int) -> AlgorithmState:
    """Copy a state to the host without padding workers, to save it or to continue it on other devices.

    Args:
        state: state from a run on a mesh.
        num_workers: number of workers M.

    Returns:
        The state of M workers, on the host.
    """
    return resize_workers(to_host(state), num_workers)
