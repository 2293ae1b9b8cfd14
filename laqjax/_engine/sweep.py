"""Many points of an algorithm side by side: a sweep over its numbers is one compiled program that reads the data once."""

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

from laqjax import distributed, sharding
from laqjax._core.round import Algorithm
from laqjax._core.validation import check_keys, check_not_traced, check_number, check_run_inputs, check_schedule
from laqjax._engine import collectives
from laqjax._engine.loop import (
    DEFAULT_CHUNK_SIZE,
    RunResult,
    check_loop_arguments,
    concatenate_infos,
    copy_state,
    fori_rounds,
    truncate_info,
)
from laqjax.types import AlgorithmState, RoundInfo, Shards


def stack_algorithms(algs: Sequence[Algorithm]) -> Algorithm:
    """Algorithms of one structure as one whose numbers carry a leading axis of points, for `sweep`.

    Args:
        algs: at least one.

    Raises:
        ValueError: there is none, or one differs in structure (another problem, other parts, another padded_window); the
            first of them is named.
    """
    if not algs:
        raise ValueError("stack of no algorithms: expected one or more")
    first = jax.tree.structure(algs[0]), [np.shape(leaf) for leaf in jax.tree.leaves(algs[0])]
    for i, alg in enumerate(algs):
        if (jax.tree.structure(alg), [np.shape(leaf) for leaf in jax.tree.leaves(alg)]) != first:
            raise ValueError(
                f"algorithm {i} has another structure than algorithm 0: expected the same factory, oracle, optimizer and "
                "num_workers, and one padded_window for all windows"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *algs)


def select_points(points: Any, which: Any) -> Any:
    """Some points, or one, of a stacked algorithm or state. NumPy arrays stay on the host."""
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
    collective: str | collectives.AllReduce = "all_gather",
) -> RunResult:
    """`run` for S points side by side; the data is read once a round for all points of a batch.

    All batches share one compiled program (the last is filled up), and each is spread over all devices. A point that
    diverges holds NaN and disturbs nobody. Equal batch sizes per device give equal bits; other sizes differ in the last
    ones.

    Args:
        algs: of `stack_algorithms`: every leaf has a leading axis [S].
        start: parameters for all (a pytree or [p]), [S, p], or a state of S points.
        shards: the data of the workers.
        rounds: how many.
        keys: one of each point.
        memory_limit: bytes that a batch may take (None: half of what is free).
        batch_size: points side by side (None: what fits into the memory).
        metrics: see `run`.
        chunk_size: see `run`.
        worker_batch_size: see `run`.
        mesh: with the axis `sweep`, `workers` or both: points and workers are spread over them. None: points over all devices.
        collective: see `run`; "all_gather" and "all_to_all" need one b for all points.

    Returns:
        `info` with the points behind the rounds ([K, S], [K, S, M], ...), and `state` with the points first everywhere:
        `select_points(out.state, i)` is a state of point i.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
    """
    check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    mesh = make_sweep_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    devices = mesh.shape.get(sharding.SWEEP_AXIS, 1)
    if batch_size is None:
        batch_size = max_batch_size(select_points(algs, 0), shards, memory_limit, devices=devices)
    batch_size = min(int(check_number("batch_size", batch_size, np.int32, minimum=1)), -(-points // devices) * devices)
    outs: list[RunResult] = []
    for first in range(0, points, batch_size):
        which = np.minimum(np.arange(first, first + batch_size), points - 1)
        begin = select_points(start if isinstance(start, AlgorithmState) else params, which)
        infos, state = [], None
        options: Any = dict(
            metrics=metrics,
            chunk_size=chunk_size,
            worker_batch_size=worker_batch_size,
            mesh=mesh,
            collective=collective,
        )
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
    collective: str | collectives.AllReduce = "all_gather",
) -> Iterator[RunResult]:
    """One batch of points, chunk after chunk; to `sweep` what `stream` is to `run`.

    Args:
        algs: see `sweep`, as all others. The points fill the devices evenly.
        start: see `sweep`.
        shards: see `sweep`.
        rounds: see `sweep`.
        keys: see `sweep`.
        metrics: see `sweep`.
        chunk_size: see `sweep`.
        worker_batch_size: see `sweep`.
        mesh: see `sweep`.
        collective: see `sweep`.

    Yields:
        `info` of the chunk's rounds, and the state after it; the state is donated to the next chunk.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
    """
    rounds, chunk_size, names = check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    mesh = make_sweep_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    one, devices = select_points(algs, 0), mesh.shape.get(sharding.SWEEP_AXIS, 1)
    rows = sharding.num_worker_slots(mesh, one.num_workers)
    if points % devices:
        raise ValueError(f"{points} points on {devices} devices: expected a multiple; fill up with copies of a point")
    begin = partial(jax.vmap(Algorithm.init), algs)
    state = copy_state(start if isinstance(start, AlgorithmState) else begin(params), begin, params)
    if mesh.is_multi_process:  # on a mesh of its own a process may run what it likes
        distributed.assert_same_on_all_processes("algorithms, start, data or keys", algs, state, shards, keys)
    # the state is placed anew for every chunk, which moves nothing: another placement would compile the chunk again
    specs = sharding.state_partition_specs(mesh, sharding.SWEEP_AXIS)
    algs, keys = sharding.device_put_global((algs, keys), mesh, specs.params)
    shards = sharding.device_put_global(
        sharding.pad_workers(shards, rows), mesh, sharding.partition_spec(mesh, sharding.WORKER_AXIS)
    )
    options: Any = {
        "length": chunk_size,
        "metrics": names,
        "worker_batch_size": worker_batch_size or one.default_worker_batch_size(shards),
    }
    if sharding.WORKER_AXIS in mesh.axis_names:
        options["collective"] = collectives.resolve_collective(collective, algs)
    state = sharding.resize_workers(state, rows, axis=1)
    for done in range(0, rounds, chunk_size):
        count = min(chunk_size, rounds - done)
        state = sharding.shard_state(state, mesh, sharding.SWEEP_AXIS)
        with distributed.translate_lost_process_errors():
            state, info = run_sweep_chunk(algs, state, shards, keys, np.int32(count), mesh=mesh, **options)
            info = truncate_info(sharding.to_host(info), count)
        yield RunResult(info, state)


def make_sweep_mesh() -> Mesh:
    """All devices along the axis of points."""
    return jax.make_mesh((jax.device_count(),), (sharding.SWEEP_AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def check_sweep(algs: Algorithm, start: Any, shards: Shards, rounds: int, keys: Any, mesh: Mesh) -> tuple[int, Any]:
    """Return the number of points and their parameters [S, p].

    Raises:
        ValueError: algorithms, start, data and keys do not fit each other.
    """
    check_not_traced(algs, start, shards, keys)
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(algs)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError(
            "an algorithm of one point: expected a stack of them; `laqjax.stack_algorithms([alg, ...])` makes one"
        )
    (points,) = shapes.pop()
    check_keys("keys", keys, (points,))
    params = start.params if isinstance(start, AlgorithmState) else _broadcast_params(algs, start, points)
    if params.shape[0] != points:
        raise ValueError(f"start of {params.shape[0]} points for an algorithm of {points}: expected the same number")
    one = select_points(algs, 0)
    check_run_inputs(one, params[0], shards, sharding.num_worker_slots(mesh, one.num_workers))
    check_schedule(
        algs,
        int(np.max(sharding.to_host(start.round))) if isinstance(start, AlgorithmState) else 0,
        rounds,
        points=True,
    )
    return points, params


def _broadcast_params(algs: Algorithm, start: Any, points: int) -> Array:
    """Start parameters as [S, p]."""
    stacked = hasattr(start, "dtype") and np.ndim(start) == 2 and np.shape(start)[1] == algs.oracle.size
    if stacked:
        return start
    params = algs.oracle.ravel(start)
    return jnp.broadcast_to(params, (points, *np.shape(params)))


def max_batch_size(
    alg: Algorithm, shards: Shards, memory_limit: float | None = None, rounds: int = 0, *, devices: int | None = None
) -> int:
    """How many points of `alg` run side by side, a multiple of the devices.

    Args:
        alg: one point.
        shards: the data, which the points share.
        memory_limit: bytes (None: half of what is free).
        rounds: of which the caller keeps the info, on the host.
        devices: that share the points (None: all).

    Raises:
        ValueError: not even one fits, or the data do not fit the loss.
    """
    alg.oracle.validate(shards)
    devices = jax.device_count() if devices is None else devices
    if memory_limit is None:
        memory_limit = free_memory() / 2
    state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
    # a state comes in, goes out and is worked on (measured: 3.5 states of temporaries); a tile leaves its activations
    point = 6 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    point += 2 * alg.oracle.activation_bytes(shards) + rounds * 16 * (alg.num_workers + 3)
    fits = int(memory_limit // point)
    if fits < 1:
        raise ValueError(
            f"memory_limit = {memory_limit / 2**20:.0f} MiB: expected at least the {point / 2**20:.1f} MiB of one point"
        )
    on_cpu = jax.default_backend() == "cpu"  # forced CPU devices share one memory, accelerators have their own
    return max(fits // devices, 1) * devices if on_cpu else fits * devices


def free_memory() -> int:
    """Bytes free on one device."""
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
    collective: collectives.AllReduce | None = None,
) -> tuple[AlgorithmState, RoundInfo]:
    """`count` <= `length` rounds of all points; rows of the info from `count` on are zeros."""
    # inside, the points stand behind the workers, whose axis the round maps over: in front, each round would transpose
    behind = AlgorithmState(*(0,) * (len(AlgorithmState._fields) - 1), workers=1)  # pyright: ignore[reportArgumentType]

    def one(
        shards: Shards, alg: Algorithm, state: AlgorithmState, key: Any, collective: Any = collective
    ) -> tuple[AlgorithmState, RoundInfo]:
        return alg.step(state, shards, key, metrics=metrics, worker_batch_size=worker_batch_size, collective=collective)

    def together(
        algs: Algorithm, state: AlgorithmState, shards: Shards, keys: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        def step(state: AlgorithmState) -> tuple[AlgorithmState, RoundInfo]:
            each = partial(one, shards, collective=collectives.with_vmap_axis(collective, "points"))
            return jax.vmap(each, (0, behind, 0), (behind, 0), axis_name="points")(algs, state, keys)

        state, info = fori_rounds(step, _swap_point_axis(state), count, length)
        return _swap_point_axis(state), info

    def in_turn(
        algs: Algorithm, state: AlgorithmState, shards: Shards, keys: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        def rounds(point: Any) -> tuple[AlgorithmState, RoundInfo]:
            alg, state, key = point
            return fori_rounds(lambda state: one(shards, alg, state, key), state, count, length)

        state, info = jax.lax.map(rounds, (algs, state, keys))
        return state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), info)

    specs = sharding.state_partition_specs(mesh, sharding.SWEEP_AXIS)
    split = jax.shard_map(
        in_turn if algs.oracle.prefers_sequential(shards) else together,
        mesh=mesh,
        in_specs=(specs.params, specs, sharding.partition_spec(mesh, sharding.WORKER_AXIS), specs.params, P()),
        out_specs=(specs, sharding.partition_spec(mesh, None, sharding.SWEEP_AXIS)),
        check_vma=False,
    )
    return split(algs, state, shards, keys, count)


def _swap_point_axis(state: AlgorithmState) -> AlgorithmState:
    """With the axes of points and workers changed over."""
    return state._replace(workers=jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), state.workers))
