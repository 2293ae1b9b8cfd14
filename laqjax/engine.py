"""Run an algorithm: rounds as one compiled `lax.scan`, in chunks.

A chunk is one compiled program of a fixed length that does as many of its rounds as it is told; whatever way a run is
cut, the same program does every round, so a resumed run equals a straight one bit for bit. Progress, checkpoints and
early stops live between chunks: `stream` is a generator.
"""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from laqjax import core, oracle
from laqjax.core import Algorithm, Shards, State

CHUNK = 100  # rounds in one compiled program


class Info(NamedTuple):
    """Raw facts of K rounds, one row a round, on the host. Row k belongs to the model *before* step k."""

    loss: Float[Array | np.ndarray, " K"]  # mean over workers
    sent: Bool[Array | np.ndarray, "K M"]
    bits_up: Int[Array | np.ndarray, "K M"]  # of each worker's message, 0 where nothing was sent; sum them in int64
    bits_down: Int[Array | np.ndarray, " K"]
    extra: dict[str, Any]  # what `record` named, [K, ...]


class Output(NamedTuple):
    """`state` resumes the run."""

    info: Info
    state: State


class Diverged(FloatingPointError):
    """The loss stopped being finite. `round` is the first such round, `info` what came before it in this call."""

    def __init__(self, round: int, info: Info):
        grew = len(info.loss) > 1 and info.loss[-1] > info.loss[0]
        super().__init__(
            f"diverged: the loss is not finite from round {round} on, after it had grown; a smaller lr, or more bits, "
            "keeps the run stable"
            if grew
            else f"the loss is not finite in round {round}, and had not grown before: a 0 / 0 or a log(0) in the loss or in "
            "the data rather than a step too large; look at the loss of single examples"
        )
        self.round, self.info = round, info


def init(alg: Algorithm, params: Float[Array | np.ndarray, " p"], shards: Shards) -> State:
    """The state before round 0, as a plain pytree that may be changed before it is run (memories, motion, ...).

    Raises ValueError when parameters, data and algorithm do not fit each other.
    """
    _check(alg, params, shards)
    return core.init(alg, jnp.array(params))


def run(
    alg: Algorithm,
    start: Float[Array | np.ndarray, " p"] | State,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
) -> Output:
    """`rounds` rounds from `start` (parameters [p], or a state). See `stream` for the arguments and the errors."""
    infos: list[Info] = []
    state = None
    try:
        parts = stream(alg, start, shards, rounds, key, record=record, chunk=chunk, workers_at_once=workers_at_once)
        for part in parts:
            infos.append(part.info)
            state = part.state
    except Diverged as stop:
        raise Diverged(stop.round, join([*infos, stop.info])) from None
    assert state is not None
    return Output(join(infos), state)


def stream(
    alg: Algorithm,
    start: Float[Array | np.ndarray, " p"] | State,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
) -> Iterator[Output]:
    """The same as `run`, chunk after chunk: show progress, save, or leave the loop to stop early.

    A yielded state is donated to the next chunk: use it (save it, or copy it) before asking for the next one. What the
    caller passed is never donated.

    record: facts to keep of every round beside the info: of the workers "grad", "target_sq", "innovation_sq",
    "error_sq", "worker_loss" ([K, M, ...]), of the server "params", "direction_sq", "step_sq" ([K, ...]).
    chunk: rounds in one compiled program. workers_at_once: workers whose gradients are computed side by side; None is
    one after another on the CPU, where each tile then stays in cache, and all together elsewhere.
    Raises ValueError before anything is compiled when arguments and data do not fit, `Diverged` when the loss is no
    longer finite.
    """
    rounds, chunk, workers_at_once, names = _arguments(alg, rounds, chunk, workers_at_once, record)
    params = start.server.broadcast.params if isinstance(start, State) else start
    _check(alg, params, shards)
    # copies: the chunks consume their state
    state = _copy(start, partial(core.init, alg), jnp.asarray(params))
    shards = jax.tree.map(jnp.asarray, shards)
    first = int(state.server.broadcast.round)
    for done in range(0, rounds, chunk):
        count = min(chunk, rounds - done)
        state, info = _chunk(
            alg, state, shards, key, np.int32(count), length=chunk, record=names, at_once=workers_at_once
        )
        info = _head(info, count)
        if not np.all(np.isfinite(info.loss)):
            good = int(np.argmin(np.isfinite(info.loss)))
            raise Diverged(first + done + good, _head(info, good))
        yield Output(info, state)


# ---- many points --------------------------------------------------------------------------------------------------

# the axis of the points in a state: behind the workers', whose axis the round maps over; first everywhere else
POINTS = State(server=0, workers=1)  # pyright: ignore[reportArgumentType]


def stack(algs: Sequence[Algorithm]) -> Algorithm:
    """Algorithms of one structure as one algorithm whose numbers carry a leading axis of points, for `sweep`.

    Raises ValueError naming the first that differs in structure (another problem, other parts, another max_window).
    """
    first = jax.tree.structure(algs[0]), [np.shape(leaf) for leaf in jax.tree.leaves(algs[0])]
    for i, alg in enumerate(algs):
        if (jax.tree.structure(alg), [np.shape(leaf) for leaf in jax.tree.leaves(alg)]) != first:
            raise ValueError(
                f"algorithm {i} has another structure than algorithm 0: expected the same factory, oracle, optimizer and "
                "num_workers, and one max_window for all windows"
            )
    return jax.tree.map(lambda *leaves: np.stack(leaves), *algs)


def take(points: Any, which: Any, axes: Any = 0) -> Any:
    """Some points of a tree of points; `axes=POINTS` for a state. NumPy arrays stay on the host."""

    def pick(a: Any, axis: int) -> Any:
        return a[(slice(None),) * axis + (which,)]

    return jax.tree.map(lambda axis, tree: jax.tree.map(lambda a: pick(a, axis), tree), axes, points)


def sweep(
    algs: Algorithm,
    start: Float[Array | np.ndarray, "*points p"] | State,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    memory: float | None = None,
    batch: int | None = None,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
) -> Output:
    """`run` for S points side by side: every leaf of `algs` has a leading axis [S] (see `stack`), `keys` is [S].

    start: parameters [p] for all, [S, p], or a state of S points (its workers have the points behind their own axis:
    `POINTS`). The info has the points behind the rounds ([K, S], [K, S, M], ...). The data is read once a round for all
    points of a batch. Batches hold `batch` points, or what fits into `memory` bytes (None: half of what is free), all
    share one compiled program (the last is filled up), and each is spread over all devices. A point that diverges holds
    NaN and disturbs nobody. Equal batch sizes per device give equal bits; other sizes differ in the last ones.
    """
    points = keys.shape[0]
    batch = batch or batch_size(take(algs, 0), shards, memory)
    batch = min(batch, -(-points // jax.device_count()) * jax.device_count())
    outs: list[Output] = []
    for first in range(0, points, batch):
        which = np.minimum(np.arange(first, first + batch), points - 1)
        begin = (
            take(start, which, POINTS) if isinstance(start, State) else start if np.ndim(start) == 1 else start[which]
        )
        kept = np.arange(min(batch, points - first))
        infos = []
        state = None
        for out in sweep_stream(
            take(algs, which),
            begin,
            shards,
            rounds,
            keys[which],
            record=record,
            chunk=chunk,
            workers_at_once=workers_at_once,
        ):
            infos.append(out.info)
            state = out.state
        outs.append(Output(take(join(infos), kept, 1), take(state, kept, POINTS)))
    info = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *(out.info for out in outs))
    server = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(out.state.server for out in outs))
    workers = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *(out.state.workers for out in outs))
    return Output(info, State(server, workers))


def sweep_stream(
    algs: Algorithm,
    start: Float[Array | np.ndarray, "*points p"] | State,
    shards: Shards,
    rounds: int,
    keys: Key[Array, " S"],
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
) -> Iterator[Output]:
    """One batch of points, chunk after chunk; to `sweep` what `stream` is to `run`. The points fill the devices evenly."""
    rounds, chunk, workers_at_once, names = _arguments(algs, rounds, chunk, workers_at_once, record)
    points, devices = keys.shape[0], jax.device_count()
    if points % devices:
        raise ValueError(f"{points} points on {devices} devices: expected a multiple; fill up with copies of a point")
    params = start.server.broadcast.params if isinstance(start, State) else jnp.asarray(start)
    _check(algs, params if params.ndim == 1 else params[0], shards)
    begin = partial(jax.vmap(core.init, (0, 0), POINTS), algs)
    state = _copy(start, begin, jnp.broadcast_to(params, (points, params.shape[-1])))
    mesh = jax.make_mesh((devices,), ("sweep",), axis_types=(jax.sharding.AxisType.Auto,))
    # the state is placed anew for every chunk, which moves nothing: another placement would compile the chunk again
    first, second, everywhere = (jax.sharding.NamedSharding(mesh, spec) for spec in (P("sweep"), P(None, "sweep"), P()))
    algs, keys, shards = jax.device_put((algs, keys, shards), (first, first, everywhere))
    for done in range(0, rounds, chunk):
        count = min(chunk, rounds - done)
        state = State(jax.device_put(state.server, first), jax.device_put(state.workers, second))
        state, info = _chunk(
            algs, state, shards, keys, np.int32(count), length=chunk, record=names, at_once=workers_at_once, mesh=mesh
        )
        yield Output(_head(info, count), state)


def batch_size(alg: Algorithm, shards: Shards, memory: float | None = None, rounds: int = 0) -> int:
    """How many points of `alg` run side by side in `memory` bytes (None: half of what is free), a multiple of the devices.

    rounds: of which the caller keeps the info, on the host.
    """
    devices = jax.device_count()
    if memory is None:
        memory = free_memory() / 2
    state = jax.eval_shape(partial(core.init, alg), jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
    # a state comes in, goes out and is worked on (measured: 3.5 states of temporaries); a tile leaves its activations
    point = 6 * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    if isinstance(alg.oracle, oracle.TiledOracle):
        point += 2 * oracle.activations(alg.oracle, shards)
    point += rounds * 16 * (alg.num_workers + 3)
    fits = int(memory // point)
    if fits < 1:
        raise ValueError(
            f"memory = {memory / 2**20:.0f} MiB: expected at least the {point / 2**20:.1f} MiB of one point"
        )
    on_cpu = jax.default_backend() == "cpu"  # forced CPU devices share one memory, accelerators have their own
    return max(fits // devices, 1) * devices if on_cpu else fits * devices


def free_memory() -> int:
    """Bytes free on one device."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def join(infos: Sequence[Info]) -> Info:
    """Consecutive infos as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *infos)


def _head(info: Info, rounds: int) -> Info:
    """The first rounds, on the host."""
    return jax.tree.map(lambda a: np.asarray(a)[:rounds], info)


@partial(jax.jit, static_argnames=("length", "record", "at_once", "mesh"), donate_argnames="state")
def _chunk(
    alg: Algorithm,
    state: State,
    shards: Shards,
    key: PRNGKeyArray | Key[Array, " S"],
    count: Int[Array, ""],
    *,
    length: int,
    record: tuple[str, ...],
    at_once: int,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[State, Info]:
    """`count` <= `length` rounds; rows of the info from `count` on are zeros. With a mesh, of many points side by side."""

    def rounds(alg: Algorithm, state: State, shards: Shards, key: Any, count: Array) -> tuple[State, Info]:
        def step(state: State) -> tuple[State, Info]:
            one = partial(_round, shards=shards, record=record, at_once=at_once)
            return (jax.vmap(one, (0, POINTS, 0), (POINTS, 0)) if mesh else one)(alg, state, key)

        nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(step, state)[1])

        def body(state: State, i: Array) -> tuple[State, Info]:
            return jax.lax.cond(i < count, step, lambda state: (state, nothing), state)

        return jax.lax.scan(body, state, jnp.arange(length, dtype=jnp.int32))

    if mesh:
        rounds = jax.shard_map(
            rounds,
            mesh=mesh,
            in_specs=(P("sweep"), State(P("sweep"), P(None, "sweep")), P(), P("sweep"), P()),  # pyright: ignore[reportArgumentType]
            out_specs=(State(P("sweep"), P(None, "sweep")), P(None, "sweep")),  # pyright: ignore[reportArgumentType]
            check_vma=False,
        )
    return rounds(alg, state, shards, key, count)


def _round(
    alg: Algorithm, state: State, key: PRNGKeyArray, *, shards: Shards, record: tuple[str, ...], at_once: int
) -> tuple[State, Info]:
    """One round of all workers and the server. The one place where a worker becomes M of them."""
    server, workers = state
    round_key = jax.random.fold_in(key, server.broadcast.round)
    shared = jax.random.fold_in(round_key, alg.num_workers)

    def one(index_and_worker: tuple[Array, core.Worker]) -> Any:
        index, worker = index_and_worker
        keys = core.Keys(jax.random.fold_in(round_key, index), shared, key, server.broadcast.round)
        return core.worker_step(alg, worker, server.broadcast, shards, index, keys)

    indices = jnp.arange(alg.num_workers, dtype=jnp.int32)
    workers, uploads, facts = jax.lax.map(one, (indices, workers), batch_size=at_once if at_once > 1 else None)
    # a product: XLA on the CPU sums over a leading axis many times slower
    total = jnp.matmul(uploads.sent.astype(uploads.decoded.dtype), uploads.decoded, precision="highest")
    count = jnp.sum(uploads.sent, dtype=jnp.int32)
    keys = core.Keys(shared, shared, key, server.broadcast.round)
    server, bits_down, server_facts = core.server_step(alg, server, total, count, keys)
    facts = server_facts | facts | {"worker_loss": facts["loss"]}
    unknown = sorted(set(record) - set(facts))
    if unknown:
        raise ValueError(f"record = {unknown}: expected names among {sorted(facts)}")
    info = Info(
        loss=jnp.mean(facts["loss"]),
        sent=uploads.sent,
        bits_up=jnp.where(uploads.sent, uploads.bits, 0),
        bits_down=bits_down,
        extra={name: facts[name] for name in record},
    )
    return State(server, workers), info


def _arguments(
    alg: Algorithm, rounds: int, chunk: int, workers_at_once: int | None, record: Sequence[str]
) -> tuple[int, int, int, tuple[str, ...]]:
    """The arguments that `stream` and `sweep_stream` share, checked."""
    if workers_at_once is None:
        workers_at_once = 1 if jax.default_backend() == "cpu" else alg.num_workers
    given = {"rounds": rounds, "chunk": chunk, "workers_at_once": workers_at_once}
    checked = [int(core.number(name, value, np.int32, least=1)) for name, value in given.items()]
    return (*checked, tuple(sorted(set(record))))  # pyright: ignore[reportReturnType]


def _copy(start: Any, begin: Any, params: Any) -> State:
    """The state to start from, as arrays of our own: a chunk consumes its state. ValueError for another algorithm's."""
    state = start if isinstance(start, State) else begin(params)
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (jax.eval_shape(begin, params), state)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"state: expected one that `init` makes for this algorithm, {shapes[0]}; got {shapes[1]}")
    return jax.tree.map(partial(jnp.array, copy=True), state)


def _check(alg: Algorithm, params: Any, shards: Shards) -> None:
    """Raise ValueError when parameters, data and algorithm do not fit; only shapes and finiteness are looked at."""
    p, m = alg.oracle.size, alg.num_workers
    if np.shape(params) != (p,) or getattr(params, "dtype", None) != alg.oracle.dtype:
        raise ValueError(
            f"theta0 = {getattr(params, 'dtype', type(params))}{list(np.shape(params))}: expected {alg.oracle.dtype}[{p}], "
            "a vector from oracle.ravel(params)"
        )
    most = np.iinfo(np.int32).max // (m if alg.trigger.asks else 2) // alg.oracle.dtype.itemsize // 8
    if p > most:  # a message may be longer than the vector (indices), a server that asks sends one to each worker
        raise ValueError(f"theta0 of {p} parameters: expected at most {most}, a round's bits are counted in int32")
    x, y, weight = (np.shape(a) for a in shards)
    if len(x) < 2 or len(weight) != 2 or x[:2] != weight or y[:2] != weight:
        raise ValueError(
            f"shards: expected x [M, N, ...], y [M, N, ...] and weight [M, N], got {list(x)}, {list(y)}, {list(weight)}"
        )
    if x[0] != m:
        raise ValueError(f"shards of {x[0]} workers for an algorithm of num_workers = {m}: expected the same number")
    for name, array in zip(shards._fields, shards, strict=True):
        if not jnp.issubdtype(array.dtype, jnp.number):
            raise ValueError(
                f"shards.{name} of dtype {array.dtype}: expected numbers (uint8 images, int32 labels, float data)"
            )
        if jnp.issubdtype(array.dtype, jnp.floating) and not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"shards.{name} holds NaN or infinity: expected finite data; clean or drop those rows")
    total = np.asarray(shards.weight).sum(axis=1)
    bad = (total <= 0) | np.any(np.asarray(shards.weight) < 0, axis=1)
    if np.any(bad):
        worker = int(np.argmax(bad))
        raise ValueError(
            f"shards.weight of worker {worker} sums to {total[worker]:g}: expected weights >= 0, at least one of them > 0"
        )
    counts = np.asarray(shards.weight) > 0
    gap = np.any(counts[:, 1:] & ~counts[:, :-1], axis=1)
    if np.any(gap):
        worker = int(np.argmax(gap))
        row = int(np.argmin(counts[worker]))
        raise ValueError(
            f"shards.weight of worker {worker} is 0 at row {row} and not after it: expected padding at the end of a shard; "
            "move the rows that count to the front"
        )
    size = getattr(alg.sampler, "size", 1)
    if not 1 <= size <= weight[1]:
        raise ValueError(f"sampler of {size} rows for shards of {weight[1]}: expected 1 to {weight[1]}")
    if isinstance(alg.oracle, oracle.TiledOracle):
        oracle.check(alg.oracle, shards)
