"""Run many points of an algorithm side by side.

A point is one setting of the numbers of an algorithm, with a PRNG key of its own. A sweep over points is one compiled
program, which reads the data once per round for all points.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Key

from laqjax._core.round import Algorithm
from laqjax._core.validation import (
    check_keys,
    check_not_traced,
    check_number,
    check_run_inputs,
    check_schedule,
    get_declaration,
)
from laqjax._engine import collectives, placement, processes
from laqjax._engine.loop import (
    DEFAULT_CHUNK_SIZE,
    RunResult,
    check_loop_arguments,
    concatenate_infos,
    copy_state,
    fori_rounds,
    truncate_info,
)
from laqjax.types import AlgorithmState, Collective, OracleHints, RoundInfo, Shards


def stack_algorithms(algs: Sequence[Algorithm]) -> Algorithm:
    """Stack algorithms of one structure into one algorithm for `sweep`.

    Args:
        algs: at least one algorithm. They may differ in their numbers (lr, bits, xi and so on), not in their structure.

    Returns:
        An algorithm in which every leaf has a leading axis of points [S]. The leaves are NumPy arrays.

    Raises:
        ValueError: the sequence is empty, or an algorithm has another structure than the first one: another problem,
            other parts or another padded_window. The message names the first algorithm that differs.
    """
    if not algs:
        raise ValueError(f"algs = {algs!r}: must be one algorithm or more")
    first = jax.tree.structure(algs[0]), [np.shape(leaf) for leaf in jax.tree.leaves(algs[0])]
    for i, alg in enumerate(algs):
        if (jax.tree.structure(alg), [np.shape(leaf) for leaf in jax.tree.leaves(alg)]) != first:
            raise ValueError(
                f"algorithm {i} differs in structure from algorithm 0: must be of the same factory, oracle, optimizer "
                "and num_workers, with one padded_window for all windows"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *algs)


def select_points(points: Any, which: Any) -> Any:
    """Select one or several points of a stacked algorithm or state.

    Args:
        points: pytree of arrays with a leading axis of points, such as an algorithm from `stack_algorithms` or the
            state of a `sweep`.
        which: index of a point, which removes the axis; or a slice or array of indices, which keeps it.

    Returns:
        The same pytree with the selected points. NumPy arrays stay on the host.
    """
    return jax.tree.map(lambda a: a[which], points)


def sweep(
    algs: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    memory_limit: float | None = None,
    batch_size: int | None = None,
    metrics: Sequence[str] = (),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    worker_batch_size: int | None = None,
    mesh: Mesh | None = None,
    collective: str | Collective = "all_gather",
) -> RunResult:
    """Run S points of an algorithm side by side, as `run` does for one.

    The data is read once per round for all points of a batch. All batches share one compiled program, for which the
    last batch is filled with copies of the last point. Each batch is spread over all devices. A diverging point yields
    NaN and does not affect the others. Results are bit-identical for equal batch sizes per device; for other batch
    sizes they differ in the last bits. If the oracle's `prefers_sequential` is True, the points of a batch run one
    after another.

    Args:
        algs: algorithm from `stack_algorithms`: every leaf has a leading axis [S].
        start: parameters of all points (a pytree or a flat vector [p]), parameters of each point [S, p], or a state of
            S points without padding workers from which the runs continue.
        shards: data of the workers, arrays [M, N, ...]; all points share it.
        rounds: number of rounds, at least 1.
        keys: typed PRNG keys [S], one for each point.
        memory_limit: bytes that a batch may take. None: half of the free memory.
        batch_size: number of points that run side by side, a multiple of the devices along the axis `sweep`. None: as
            many as fit in `memory_limit`.
        metrics: names of further metrics to record in every round, in `info.extra`; `Algorithm.step` lists them.
        chunk_size: number of rounds in one compiled program.
        worker_batch_size: number of workers whose gradients are computed side by side. None: the choice of
            `Algorithm.default_worker_batch_size`.
        mesh: mesh with the axis `sweep`, `workers` or both, over which points and workers are spread. None: points are
            spread over all devices.
        collective: how messages are summed over the axis `workers` of a mesh: "all_gather", "all_to_all", "all_reduce",
            or a collective of your own, see `laqjax.sharding`. "all_gather" and "all_to_all" need the same b for all
            points.

    Returns:
        `info` on the host with the axis of points after that of rounds: loss [K, S], sent [K, S, M] and so on. `state`
        has the points first in every array: `select_points(out.state, i)` is a state of point i. Where M is not a
        multiple of the devices along `workers`, the workers of the state include padding.

    Raises:
        ValueError: the arguments and data do not fit each other. Raised before anything is compiled.
        ConnectionError: another process of the mesh was lost.

    Example:
        A sweep over three values of b::

            algs = stack_algorithms([laq(oracle, lr=0.02, num_workers=10, bits=b) for b in (2, 4, 8)])
            out = sweep(algs, params, shards, 2000, jax.random.split(jax.random.key(0), 3))
            out.info.loss  # [2000, 3]
    """
    check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    mesh = make_sweep_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    devices = mesh.shape.get(placement.SWEEP_AXIS, 1)
    if batch_size is None:
        batch_size = max_batch_size(select_points(algs, 0), shards, memory_limit, devices=devices)
    batch_size = min(int(check_number("batch_size", batch_size, np.int32, minimum=1)), -(-points // devices) * devices)
    outs: list[RunResult] = []
    for first in range(0, points, batch_size):
        which = np.minimum(np.arange(first, first + batch_size), points - 1)
        begin = select_points(start if isinstance(start, AlgorithmState) else params, which)
        infos, state = [], None
        options: Any = {"metrics": metrics, "chunk_size": chunk_size, "worker_batch_size": worker_batch_size}
        options |= {"mesh": mesh, "collective": collective}
        for out in stream_sweep(select_points(algs, which), begin, shards, rounds, keys[which], **options):
            infos.append(out.info)
            state = out.state
        kept = slice(min(batch_size, points - first))
        outs.append(RunResult(jax.tree.map(lambda a: a[:, kept], concatenate_infos(infos)), select_points(state, kept)))  # noqa: B023
    info = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(out.info for out in outs))
    return RunResult(info, jax.tree.map(lambda *parts: jnp.concatenate(parts), *(out.state for out in outs)))


def stream_sweep(
    algs: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    metrics: Sequence[str] = (),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    worker_batch_size: int | None = None,
    mesh: Mesh | None = None,
    collective: str | Collective = "all_gather",
) -> Iterator[RunResult]:
    """Run one batch of points like `sweep`, but yield after each chunk of rounds.

    A yielded state is donated to the next chunk: use, save or copy it before you request the next one.

    Args:
        algs: algorithm from `stack_algorithms`: every leaf has a leading axis [S]. S must be a multiple of the devices
            along the axis `sweep` of the mesh.
        start: parameters of all points (a pytree or a flat vector [p]), parameters of each point [S, p], or a state of
            S points without padding workers from which the runs continue. It is copied, never donated.
        shards: data of the workers, arrays [M, N, ...]; all points share it.
        rounds: number of rounds, at least 1.
        keys: typed PRNG keys [S], one for each point.
        metrics: names of further metrics to record in every round, in `info.extra`; `Algorithm.step` lists them.
        chunk_size: number of rounds between two outputs; the last chunk may be shorter.
        worker_batch_size: number of workers whose gradients are computed side by side. None: the choice of
            `Algorithm.default_worker_batch_size`.
        mesh: mesh with the axis `sweep`, `workers` or both, over which points and workers are spread. None: points are
            spread over all devices.
        collective: how messages are summed over the axis `workers` of a mesh: "all_gather", "all_to_all", "all_reduce",
            or a collective of your own, see `laqjax.sharding`. "all_gather" and "all_to_all" need the same b for all
            points.

    Yields:
        `info` with the metrics of the chunk's rounds, on the host: loss [K, S], sent [K, S, M] and so on. `state` is
        the state after the chunk, with the points first in every array and the padding workers that the mesh needs.

    Raises:
        ValueError: the arguments and data do not fit each other. Raised when the first chunk is requested, before
            anything is compiled.
        ConnectionError: another process of the mesh was lost.
    """
    rounds, chunk_size, names = check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    mesh = make_sweep_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    one, devices = select_points(algs, 0), mesh.shape.get(placement.SWEEP_AXIS, 1)
    slots = placement.num_worker_slots(mesh, one.num_workers)
    if points % devices:
        raise ValueError(f"{points} points on {devices} devices: must be a multiple; fill up with copies of a point")
    begin = partial(jax.vmap(Algorithm.init), algs)
    state = copy_state(start if isinstance(start, AlgorithmState) else begin(params), begin, params)
    if mesh.is_multi_process:  # processes with separate meshes may run different sweeps
        processes.assert_same_on_all_processes("algorithms, start, data or keys", algs, state, shards, keys)
    # each chunk gets its state with these shardings, which moves no data: with others it would be compiled again
    specs = placement.state_partition_specs(mesh, placement.SWEEP_AXIS)
    algs, keys = placement.device_put_global((algs, keys), mesh, specs.params)
    shards = placement.device_put_global(
        placement.pad_workers(shards, slots), mesh, placement.partition_spec(mesh, placement.WORKER_AXIS)
    )
    at_once = worker_batch_size or one.default_worker_batch_size(shards)
    options: Any = {"length": chunk_size, "metrics": names, "worker_batch_size": at_once}
    if placement.WORKER_AXIS in mesh.axis_names:
        options["collective"] = collectives.resolve_collective(collective, algs)
    state = placement.resize_workers(state, slots, axis=1)
    for done in range(0, rounds, chunk_size):
        count = min(chunk_size, rounds - done)
        state = placement.shard_state(state, mesh, placement.SWEEP_AXIS)
        with processes.translate_lost_process_errors():
            state, info = run_sweep_chunk(algs, state, shards, keys, np.int32(count), mesh=mesh, **options)
            info = truncate_info(placement.to_host(info), count)
        yield RunResult(info, state)


def make_sweep_mesh() -> Mesh:
    """Create a mesh with all devices along the axis of points."""
    return jax.make_mesh((jax.device_count(),), (placement.SWEEP_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def check_sweep(algs: Algorithm, start: Any, shards: Shards, rounds: int, keys: Any, mesh: Mesh) -> tuple[int, Any]:
    """Return the number of points and their parameters [S, p].

    Raises:
        ValueError: algorithms, start, data and keys do not fit each other.
    """
    check_not_traced(algs, start, shards, keys)
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(algs)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "an algorithm of one point: must be a stack of algorithms; build it with laqjax.stack_algorithms"
        )
    (points,) = shapes.pop()
    check_keys("keys", keys, (points,))
    params = start.params if isinstance(start, AlgorithmState) else _broadcast_params(algs, start, points)
    if params.shape[0] != points:
        raise ValueError(f"start of {params.shape[0]} points: must be {points} points, as in the stack of algorithms")
    one = select_points(algs, 0)
    check_run_inputs(one, params[0], shards, placement.num_worker_slots(mesh, one.num_workers))
    first = int(np.max(placement.to_host(start.round))) if isinstance(start, AlgorithmState) else 0
    check_schedule(algs, first, rounds, points=True)
    return points, params


def _broadcast_params(algs: Algorithm, start: Any, points: int) -> Array:
    """Broadcast start parameters to [S, p]; parameters that are already [., p] are returned unchanged."""
    stacked = hasattr(start, "dtype") and np.ndim(start) == 2 and np.shape(start)[1] == algs.oracle.size
    if stacked:
        return start
    params = algs.oracle.ravel(start)
    return jnp.broadcast_to(params, (points, *np.shape(params)))


def max_batch_size(
    alg: Algorithm, shards: Shards, memory_limit: float | None = None, rounds: int = 0, *, devices: int | None = None
) -> int:
    """Estimate how many points of an algorithm fit in memory side by side.

    Args:
        alg: algorithm of one point.
        shards: data of the workers, which all points share.
        memory_limit: bytes that the points may take. None: half of the free memory.
        rounds: number of rounds whose info the caller keeps on the host.
        devices: number of devices that share the points. None: all devices.

    Returns:
        The number of points, a multiple of `devices`.

    Raises:
        ValueError: the memory does not suffice for one point, or the data do not fit the loss.
    """
    alg.oracle.validate(shards)
    devices = jax.device_count() if devices is None else devices
    if memory_limit is None:
        memory_limit = free_memory() / 2
    state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
    # 6 states: the input, the output and the temporaries (measured: 3.5 states); below, the activations of a tile
    point = 6 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    point += 2 * get_declaration(alg.oracle, OracleHints, "activation_bytes")(shards)
    point += rounds * 16 * (alg.num_workers + 3)
    fits = int(memory_limit // point)
    if fits < 1:
        raise ValueError(
            f"memory_limit = {memory_limit / 2**20:.0f} MiB: must be at least {point / 2**20:.1f} MiB for one point"
        )
    on_cpu = jax.default_backend() == "cpu"  # forced CPU devices share one memory; each accelerator has its own
    return max(fits // devices, 1) * devices if on_cpu else fits * devices


def free_memory() -> int:
    """Return the bytes that are free on one device; on the CPU, those of the host."""
    stats = jax.local_devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


@partial(
    jax.jit, static_argnames=("length", "metrics", "worker_batch_size", "mesh", "collective"), donate_argnames="state"
)
def run_sweep_chunk(
    algs: Algorithm,
    state: AlgorithmState,
    shards: Shards,
    keys: Key[Array, " S"],
    count: Int[Array, ""],
    *,
    length: int,
    metrics: tuple[str, ...],
    worker_batch_size: int | None,
    mesh: Mesh,
    collective: Any = None,
) -> tuple[AlgorithmState, RoundInfo]:
    """Run `count` <= `length` rounds of all points; rows of the info from `count` on are zeros."""
    # the round maps over the workers: with the points as the first axis, it would transpose them every time
    vmap_axes = AlgorithmState(*(0,) * (len(AlgorithmState._fields) - 1), workers=1)  # pyright: ignore[reportArgumentType]

    def run_round(
        shards: Shards, alg: Algorithm, state: AlgorithmState, key: Any, collective: Any = collective
    ) -> tuple[AlgorithmState, RoundInfo]:
        return alg.step(state, shards, key, metrics=metrics, worker_batch_size=worker_batch_size, collective=collective)

    def run_together(
        algs: Algorithm, state: AlgorithmState, shards: Shards, keys: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        # points under this `vmap` axis skip communication together
        together = collective and dataclasses.replace(collective, vmap_axis="points")

        def step(state: AlgorithmState) -> tuple[AlgorithmState, RoundInfo]:
            each = partial(run_round, shards, collective=together)
            return jax.vmap(each, (0, vmap_axes, 0), (vmap_axes, 0), axis_name="points")(algs, state, keys)

        state, info = fori_rounds(step, _swap_point_axis(state), count, length)
        return _swap_point_axis(state), info

    def run_serially(
        algs: Algorithm, state: AlgorithmState, shards: Shards, keys: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        def run_point(point: Any) -> tuple[AlgorithmState, RoundInfo]:
            alg, state, key = point
            return fori_rounds(lambda state: run_round(shards, alg, state, key), state, count, length)

        state, info = jax.lax.map(run_point, (algs, state, keys))
        return state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), info)

    specs = placement.state_partition_specs(mesh, placement.SWEEP_AXIS)
    split = jax.shard_map(
        run_serially if get_declaration(algs.oracle, OracleHints, "prefers_sequential")(shards) else run_together,
        mesh=mesh,
        in_specs=(specs.params, specs, placement.partition_spec(mesh, placement.WORKER_AXIS), specs.params, P()),
        out_specs=(specs, placement.partition_spec(mesh, None, placement.SWEEP_AXIS)),
        check_vma=False,
    )
    return split(algs, state, shards, keys, count)


def _swap_point_axis(state: AlgorithmState) -> AlgorithmState:
    """Swap the axes of points and workers in the workers' part of a state."""
    return state._replace(workers=jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), state.workers))
