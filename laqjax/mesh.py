"""Workers and points on the devices of a mesh, of one process or many: placing, loading, and agreeing.

A mesh has the axis `workers`, the axis `sweep`, or both. M workers on d devices take ceil(M / d) rows each; rows beyond M are
padding: copies of the last worker that never send and are never counted.
"""

import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from laqjax.checks import check_shards
from laqjax.types import Shards, State

WORKERS, POINTS = "workers", "sweep"


def make(workers: int | None = None, sweep: int = 1) -> Mesh:
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
    return jax.make_mesh((sweep, workers), (POINTS, WORKERS), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def slots(mesh: Mesh | None, num_workers: int) -> int:
    """Rows of workers on a mesh, padding included.

    Raises:
        ValueError: the mesh has no axis of workers or points.
    """
    if mesh is None:
        return num_workers
    if not {WORKERS, POINTS} & set(mesh.axis_names):
        raise ValueError(
            f"mesh with axes {mesh.axis_names}: expected '{WORKERS}', '{POINTS}' or both; `laqjax.mesh.make()` makes one"
        )
    devices = mesh.shape.get(WORKERS, 1)
    return -(-num_workers // devices) * devices


def spec(mesh: Mesh, *axes: str | None) -> P:
    """The axes that the mesh has; leading ones that it lacks are not split."""
    return P(*(axis if axis in mesh.axis_names else None for axis in axes))


def place(tree: Any, mesh: Mesh, split: P) -> Any:
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


def state_specs(mesh: Mesh, *points: str) -> Any:
    """How a state lies on the mesh: its workers along the axis of workers; a state of many points along theirs first."""
    whole: Any = spec(mesh, *points)
    workers: Any = spec(mesh, *points, WORKERS)
    return State(whole, whole, whole, whole, whole, whole, workers)


def place_state(state: State, mesh: Mesh, *points: str) -> State:
    """A state where `state_specs` says."""
    return State(*(place(part, mesh, at) for part, at in zip(state, state_specs(mesh, *points), strict=True)))


def padded(tree: Any, rows: int, axis: int = 0) -> Any:
    """Arrays [M, ...] with `rows` rows: the last one repeated, or the rows beyond left out."""

    def one(a: Any) -> Any:
        if a.shape[axis] == rows:
            return a
        xp: Any = np if isinstance(a, np.ndarray) else jnp
        return xp.take(a, np.minimum(np.arange(rows), a.shape[axis] - 1), axis=axis)

    return jax.tree.map(one, tree)


def load(mesh: Mesh, num_workers: int, load: Callable[[int, int], Shards]) -> Shards:
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
    rows = slots(mesh, num_workers)
    sharding = NamedSharding(mesh, spec(mesh, WORKERS))
    parts: Any = sharding.addressable_devices_indices_map((rows,)).values()
    here = sorted({index[0].indices(rows)[:2] for index in parts})
    first, last = here[0][0], here[-1][1]
    have = min(first, num_workers - 1), min(last, num_workers)
    mine = jax.tree.map(np.asarray, load(*have))
    check_shards(mine, have[1] - have[0])
    mine = padded(mine, last - first)

    def one(a: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(rows)
            return a[start - first : stop - first]

        return jax.make_array_from_callback((rows, *a.shape[1:]), sharding, part)

    return jax.tree.map(one, mine)


def rows_of(state: State, rows: int, axis: int = 0) -> State:
    """A state with so many rows of workers: padding added, or left out."""
    return state._replace(workers=padded(state.workers, rows, axis))


def host(tree: Any) -> Any:
    """Arrays whole on the host, also those that are spread over processes."""

    def one(a: Any) -> Any:
        here = not isinstance(a, jax.Array) or a.is_fully_addressable or a.is_fully_replicated
        return jax.device_get(a) if here else multihost_utils.process_allgather(a, tiled=True)

    return jax.tree.map(one, tree)


def trim(state: State, num_workers: int) -> State:
    """A state without the rows of padding, on the host: to save it, or to go on with it on other devices."""
    return rows_of(host(state), num_workers)


# ---- several processes ------------------------------------------------------------------------------------------


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 60,
    heartbeat: int = 30,
) -> None:
    """Join the processes of a run, before anything else of JAX is used.

    Args:
        coordinator: host:port of process 0 (None: as JAX finds it on TPU pods and under Slurm).
        num_processes: how many there are.
        process_id: the number of this one.
        timeout: seconds to wait for the coordinator.
        heartbeat: seconds after which a process that is gone is noticed.

    Raises:
        ValueError: some of the three are given and others not, or none and JAX does not find them.
        TimeoutError: nobody answers at the coordinator's address.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator = {coordinator}, num_processes = {num_processes}, process_id = {process_id}: expected all three, or "
            "none where JAX finds them itself (TPU pods, Slurm)"
        )
    if coordinator is not None and process_id:
        _wait_for(coordinator, timeout)
    options: Any = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": heartbeat}
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except ValueError as error:
        if any(given):
            raise
        raise ValueError(
            f"JAX finds no processes of Slurm or a TPU pod here ({error}): expected coordinator, num_processes and process_id"
        ) from None


def _wait_for(address: str, timeout: float) -> None:
    """TimeoutError where nobody answers."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator = {address!r}: expected host:port")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as problem:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"no answer from the coordinator {address} within {timeout:g} s ({problem}): expected process 0 there; is "
                    "it running, and is the port open?"
                ) from None
        time.sleep(0.2)


@contextmanager
def together() -> Iterator[None]:
    """Say in words that another process is gone, where a collective of this one fails.

    Raises:
        ConnectionError: instead of JAX's error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise ConnectionError(
            f"process {jax.process_index()} has lost another one of {jax.process_count()}, which was killed, has failed or "
            f"cannot be reached ({str(error).splitlines()[0][:200]}); start all of them again: a run with checkpoints goes on "
            "from the last one"
        ) from None


def agree(what: str, *values: Any) -> None:
    """Raise ValueError unless all processes have the same values (arrays, or pytrees of them), before long work begins."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(digest(values)), np.uint8)
    every = multihost_utils.process_allgather(mine)
    others = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if others:
        raise ValueError(
            f"{what}: process {others[0]} has another one than process 0; expected the same on all {len(every)} processes"
        )


def led(act: Callable[[], Any]) -> Any:
    """What `act` returns (JSON) in process 0, which alone calls it; in all processes.

    Raises:
        ValueError, OSError: where it fails, in all of them; in process 0 whatever it was.
    """
    if jax.process_count() == 1:
        return act()
    said, failed = b"", None
    if jax.process_index() == 0:
        try:
            said = json.dumps([act(), None, False]).encode()
        except Exception as error:
            failed = error
            said = json.dumps([None, str(error), isinstance(error, OSError)]).encode()
    with together():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
        text = multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(size), np.uint8))
    if failed:
        raise failed
    value, refused, by_system = json.loads(bytes(np.asarray(text, np.uint8)))
    if refused is not None:
        raise OSError(refused) if by_system else ValueError(refused)
    return value


def digest(tree: Any) -> str:
    """Of structure, shapes and numbers of a pytree; of arrays that are spread over processes the shapes only."""
    leaves, structure = jax.tree.flatten(tree)
    whole = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(structure)).encode())  # where functions lie in memory
    for leaf in leaves:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        known = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        array = np.asarray(leaf) if known else None
        whole.update(f"{np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf))}".encode())
        whole.update(b"" if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
