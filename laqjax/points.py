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

from laqjax import exchange as exchanges
from laqjax import mesh as meshes
from laqjax.checks import check_keys, check_schedule, no_tracers, number, run_arguments
from laqjax.loop import CHUNK, Output, arguments, head, join, own_state, rounds_of
from laqjax.step import Algorithm
from laqjax.types import Info, Shards, State


def stack(algs: Sequence[Algorithm]) -> Algorithm:
    """Algorithms of one structure as one whose numbers carry a leading axis of points, for `sweep`.

    Args:
        algs: at least one.

    Raises:
        ValueError: there is none, or one differs in structure (another problem, other parts, another max_window); the
            first of them is named.
    """
    if not algs:
        raise ValueError("stack of no algorithms: expected one or more")
    first = jax.tree.structure(algs[0]), [np.shape(leaf) for leaf in jax.tree.leaves(algs[0])]
    for i, alg in enumerate(algs):
        if (jax.tree.structure(alg), [np.shape(leaf) for leaf in jax.tree.leaves(alg)]) != first:
            raise ValueError(
                f"algorithm {i} has another structure than algorithm 0: expected the same factory, oracle, optimizer and "
                "num_workers, and one max_window for all windows"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *algs)


def take(points: Any, which: Any) -> Any:
    """Some points, or one, of a stacked algorithm or state. NumPy arrays stay on the host."""
    return jax.tree.map(lambda a: a[which], points)


def sweep(
    algs: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    memory: float | None = None,
    batch: int | None = None,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
    mesh: Mesh | None = None,
    exchange: str | exchanges.Sums = "messages",
) -> Output:
    """`run` for S points side by side; the data is read once a round for all points of a batch.

    All batches share one compiled program (the last is filled up), and each is spread over all devices. A point that
    diverges holds NaN and disturbs nobody. Equal batch sizes per device give equal bits; other sizes differ in the last
    ones.

    Args:
        algs: of `stack`: every leaf has a leading axis [S].
        start: parameters for all (a pytree or [p]), [S, p], or a state of S points.
        shards: the data of the workers.
        rounds: how many.
        keys: one of each point.
        memory: bytes that a batch may take (None: half of what is free).
        batch: points side by side (None: what fits into the memory).
        record: see `run`.
        chunk: see `run`.
        workers_at_once: see `run`.
        mesh: with the axis `sweep`, `workers` or both: points and workers are spread over them. None: points over all devices.
        exchange: see `run`; "messages" and "chunked" need one b for all points.

    Returns:
        `info` with the points behind the rounds ([K, S], [K, S, M], ...), and `state` with the points first everywhere:
        `take(out.state, i)` is a state of point i.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
    """
    arguments(rounds, chunk, record, workers_at_once, exchange)
    mesh = points_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    devices = mesh.shape.get(meshes.POINTS, 1)
    if batch is None:
        batch = batch_size(take(algs, 0), shards, memory, devices=devices)
    batch = min(int(number("batch", batch, np.int32, least=1)), -(-points // devices) * devices)
    outs: list[Output] = []
    for first in range(0, points, batch):
        which = np.minimum(np.arange(first, first + batch), points - 1)
        begin = take(start if isinstance(start, State) else params, which)
        infos, state = [], None
        options: Any = dict(record=record, chunk=chunk, workers_at_once=workers_at_once, mesh=mesh, exchange=exchange)
        for out in sweep_stream(take(algs, which), begin, shards, rounds, keys[which], **options):
            infos.append(out.info)
            state = out.state
        kept = slice(min(batch, points - first))
        outs.append(Output(jax.tree.map(lambda a: a[:, kept], join(infos)), take(state, kept)))  # noqa: B023
    info = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(out.info for out in outs))
    return Output(info, jax.tree.map(lambda *parts: jnp.concatenate(parts), *(out.state for out in outs)))


def sweep_stream(
    algs: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
    mesh: Mesh | None = None,
    exchange: str | exchanges.Sums = "messages",
) -> Iterator[Output]:
    """One batch of points, chunk after chunk; to `sweep` what `stream` is to `run`.

    Args:
        algs: see `sweep`, as all others. The points fill the devices evenly.
        start: see `sweep`.
        shards: see `sweep`.
        rounds: see `sweep`.
        keys: see `sweep`.
        record: see `sweep`.
        chunk: see `sweep`.
        workers_at_once: see `sweep`.
        mesh: see `sweep`.
        exchange: see `sweep`.

    Yields:
        `info` of the chunk's rounds, and the state after it; the state is donated to the next chunk.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
    """
    rounds, chunk, names = arguments(rounds, chunk, record, workers_at_once, exchange)
    mesh = points_mesh() if mesh is None else mesh
    points, params = check_sweep(algs, start, shards, rounds, keys, mesh)
    one, devices = take(algs, 0), mesh.shape.get(meshes.POINTS, 1)
    rows = meshes.slots(mesh, one.num_workers)
    if points % devices:
        raise ValueError(f"{points} points on {devices} devices: expected a multiple; fill up with copies of a point")
    begin = partial(jax.vmap(Algorithm.init), algs)
    state = own_state(start if isinstance(start, State) else begin(params), begin, params)
    if mesh.is_multi_process:  # on a mesh of its own a process may run what it likes
        meshes.agree("algorithms, start, data or keys", algs, state, shards, keys)
    # the state is placed anew for every chunk, which moves nothing: another placement would compile the chunk again
    specs = meshes.state_specs(mesh, meshes.POINTS)
    algs, keys = meshes.place((algs, keys), mesh, specs.params)
    shards = meshes.place(meshes.padded(shards, rows), mesh, meshes.spec(mesh, meshes.WORKERS))
    options: Any = {"length": chunk, "record": names, "workers_at_once": workers_at_once or one.workers_at_once(shards)}
    if meshes.WORKERS in mesh.axis_names:
        options["exchange"] = exchanges.named(exchange, algs)
    state = meshes.rows_of(state, rows, axis=1)
    for done in range(0, rounds, chunk):
        count = min(chunk, rounds - done)
        state = meshes.place_state(state, mesh, meshes.POINTS)
        with meshes.together():
            state, info = compiled_chunk(algs, state, shards, keys, np.int32(count), mesh=mesh, **options)
            info = head(meshes.host(info), count)
        yield Output(info, state)


def points_mesh() -> Mesh:
    """All devices along the axis of points."""
    return jax.make_mesh((jax.device_count(),), (meshes.POINTS,), axis_types=(jax.sharding.AxisType.Auto,))


def check_sweep(algs: Algorithm, start: Any, shards: Shards, rounds: int, keys: Any, mesh: Mesh) -> tuple[int, Any]:
    """Return the number of points and their parameters [S, p].

    Raises:
        ValueError: algorithms, start, data and keys do not fit each other.
    """
    no_tracers(algs, start, shards, keys)
    shapes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(algs)}
    if len(shapes) != 1 or () in shapes:
        raise ValueError("an algorithm of one point: expected a stack of them; `laqjax.stack([alg, ...])` makes one")
    (points,) = shapes.pop()
    check_keys("keys", keys, (points,))
    params = start.params if isinstance(start, State) else _vectors(algs, start, points)
    if params.shape[0] != points:
        raise ValueError(f"start of {params.shape[0]} points for an algorithm of {points}: expected the same number")
    one = take(algs, 0)
    run_arguments(one, params[0], shards, meshes.slots(mesh, one.num_workers))
    check_schedule(algs, int(np.max(meshes.host(start.round))) if isinstance(start, State) else 0, rounds, points=True)
    return points, params


def _vectors(algs: Algorithm, start: Any, points: int) -> Array:
    """Start parameters as [S, p]."""
    stacked = hasattr(start, "dtype") and np.ndim(start) == 2 and np.shape(start)[1] == algs.oracle.size
    if stacked:
        return start
    params = algs.oracle.ravel(start)
    return jnp.broadcast_to(params, (points, *np.shape(params)))


def batch_size(
    alg: Algorithm, shards: Shards, memory: float | None = None, rounds: int = 0, *, devices: int | None = None
) -> int:
    """How many points of `alg` run side by side, a multiple of the devices.

    Args:
        alg: one point.
        shards: the data, which the points share.
        memory: bytes (None: half of what is free).
        rounds: of which the caller keeps the info, on the host.
        devices: that share the points (None: all).

    Raises:
        ValueError: not even one fits, or the data do not fit the loss.
    """
    alg.oracle.check(shards)
    devices = jax.device_count() if devices is None else devices
    if memory is None:
        memory = free_memory() / 2
    state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
    # a state comes in, goes out and is worked on (measured: 3.5 states of temporaries); a tile leaves its activations
    point = 6 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    point += 2 * alg.oracle.working_bytes(shards) + rounds * 16 * (alg.num_workers + 3)
    fits = int(memory // point)
    if fits < 1:
        raise ValueError(
            f"memory = {memory / 2**20:.0f} MiB: expected at least the {point / 2**20:.1f} MiB of one point"
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


@partial(jax.jit, static_argnames=("length", "record", "workers_at_once", "mesh", "exchange"), donate_argnames="state")
def compiled_chunk(
    algs: Algorithm,
    state: State,
    shards: Shards,
    keys: Key[Array, " S"],
    count: Int[Array, ""],
    *,
    length: int,
    record: tuple[str, ...],
    workers_at_once: int | None,
    mesh: Mesh,
    exchange: exchanges.Sums | None = None,
) -> tuple[State, Info]:
    """`count` <= `length` rounds of all points; rows of the info from `count` on are zeros."""
    # inside, the points stand behind the workers, whose axis the round maps over: in front, each round would transpose
    behind = State(*(0,) * (len(State._fields) - 1), workers=1)  # pyright: ignore[reportArgumentType]

    def one(shards: Shards, alg: Algorithm, state: State, key: Any, exchange: Any = exchange) -> tuple[State, Info]:
        return alg.step(state, shards, key, record=record, workers_at_once=workers_at_once, exchange=exchange)

    def together(algs: Algorithm, state: State, shards: Shards, keys: Any, count: Array) -> tuple[State, Info]:
        def step(state: State) -> tuple[State, Info]:
            each = partial(one, shards, exchange=exchanges.beside_points(exchange, "points"))
            return jax.vmap(each, (0, behind, 0), (behind, 0), axis_name="points")(algs, state, keys)

        state, info = rounds_of(step, _swapped(state), count, length)
        return _swapped(state), info

    def in_turn(algs: Algorithm, state: State, shards: Shards, keys: Any, count: Array) -> tuple[State, Info]:
        def rounds(point: Any) -> tuple[State, Info]:
            alg, state, key = point
            return rounds_of(lambda state: one(shards, alg, state, key), state, count, length)

        state, info = jax.lax.map(rounds, (algs, state, keys))
        return state, jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), info)

    specs = meshes.state_specs(mesh, meshes.POINTS)
    split = jax.shard_map(
        in_turn if algs.oracle.one_by_one(shards) else together,
        mesh=mesh,
        in_specs=(specs.params, specs, meshes.spec(mesh, meshes.WORKERS), specs.params, P()),
        out_specs=(specs, meshes.spec(mesh, None, meshes.POINTS)),
        check_vma=False,
    )
    return split(algs, state, shards, keys, count)


def _swapped(state: State) -> State:
    """With the axes of points and workers changed over."""
    return state._replace(workers=jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), state.workers))
