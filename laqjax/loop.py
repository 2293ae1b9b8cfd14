"""Run an algorithm: rounds as one compiled loop, in chunks.

A chunk is one compiled program of a fixed length that does as many of its rounds as it is told; whatever way a run is
cut, the same program does every round, so a resumed run equals a straight one bit for bit. Progress, checkpoints and
early stops live between chunks: `stream` is a generator.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray

from laqjax import exchange as exchanges
from laqjax import mesh as meshes
from laqjax.checkpoint import Checkpoints
from laqjax.checks import check_keys, check_schedule, no_tracers, number, run_arguments
from laqjax.step import Algorithm
from laqjax.types import Exchange, Info, Shards, State

CHUNK = 100  # rounds in one compiled program


class Output(NamedTuple):
    """What a run gives: `state` resumes it."""

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


def init(alg: Algorithm, params: Any, shards: Shards) -> State:
    """The state before round 0, after a check that all fits.

    Args:
        alg: the algorithm.
        params: the model, a pytree or a flat vector [p].
        shards: the data; only looked at.

    Returns:
        A plain pytree that may be changed before it is run (memories, history, ...).

    Raises:
        ValueError: parameters, data and algorithm do not fit each other.
    """
    params = alg.oracle.ravel(params)
    run_arguments(alg, params, shards)
    return alg.init(params)


def step(alg: Algorithm, state: State, shards: Shards, key: PRNGKeyArray, **options: Any) -> tuple[State, Info]:
    """One round as a pure function: `alg.step`, for a loop of one's own."""
    return alg.step(state, shards, key, **options)


def run(
    alg: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
    mesh: Mesh | None = None,
    exchange: str | exchanges.Sums = "messages",
    checkpoint: str | Path | None = None,
    every: int | None = None,
) -> Output:
    """`rounds` rounds.

    Args:
        alg: the algorithm.
        start: parameters (a pytree, or a flat vector [p]), or a state, which is resumed. Never donated.
        shards: the data of the workers.
        rounds: how many.
        key: typed PRNG key of the run; a resumed run needs the same.
        record: facts to keep of every round in `info.extra`, see `Algorithm.step`.
        chunk: rounds in one compiled program.
        workers_at_once: workers whose gradients are computed side by side, see `Algorithm.step`.
        mesh: devices, of this process or of many, that share the workers (`laqjax.mesh.make()`). Each process then calls
            this with the same arguments, or with shards of `laqjax.mesh.load`. None: one device.
        exchange: on a mesh: "messages", "chunked", "sums", or one of one's own, see `laqjax.exchange`.
        checkpoint: a folder of this run's own, which all processes see. The same call goes on from there after it was
            stopped, and the same call for more rounds goes on from the end; the result is that of a run without a stop.
        every: rounds between two checkpoints (None: `chunk`).

    Returns:
        `info`, the facts of all rounds on the host, and `state`; on a mesh its workers are spread over the devices, with
        rows of padding behind the M-th (`laqjax.mesh.trim`).

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit, or the checkpoints are of another run.
        Diverged: the loss is no longer finite.

    Example:
        >>> import jax, numpy as np, laqjax
        >>> problem = laqjax.problems.Ridge(3)
        >>> oracle = problem.oracle()
        >>> shards = laqjax.Shards(np.ones((2, 5, 3), np.float32), np.ones((2, 5), np.float32), np.ones((2, 5)))
        >>> alg = laqjax.algorithms.laq(oracle, lr=0.01, num_workers=2)
        >>> out = laqjax.run(alg, problem.start(0), shards, 20, jax.random.key(0))
        >>> bool(out.info.loss[-1] < out.info.loss[0])
        True
    """
    infos: list[Info] = []
    rounds, chunk, _ = arguments(rounds, chunk, record, workers_at_once, exchange)
    check_keys("key", key, ())
    state, done, saved = None, 0, None
    begin = start if isinstance(start, State) else alg.oracle.ravel(start)
    if checkpoint is not None:
        every = int(number("every", chunk if every is None else every, np.int32, least=1))
        chunk = min(chunk, every)
        contents = {"algorithm": alg, "start": begin, "data": shards, "key": key, "record": sorted(set(record))}
        saved = Checkpoints(checkpoint, contents)
        params = begin.params if isinstance(begin, State) else begin
        done, state, facts = saved.latest(jax.eval_shape(alg.init, params), rounds, mesh)
        if state is not None:
            infos, begin = [Info(**facts)], state if mesh else meshes.rows_of(state, alg.num_workers)
    written = done
    try:
        options: Any = {"record": record, "chunk": chunk, "workers_at_once": workers_at_once}
        rest = rounds - done
        for part in stream(alg, begin, shards, rest, key, **options, mesh=mesh, exchange=exchange) if rest else ():
            infos.append(part.info)
            state, done = part.state, done + len(part.info.loss)
            if saved and (done - written >= (every or 1) or done == rounds):
                infos, written = [join(infos)], done
                saved.save(done, state, infos[0]._asdict())
    except Diverged as stop:
        raise Diverged(stop.round, join([*infos, stop.info])) from None
    finally:
        if saved:
            saved.close()
    assert state is not None
    return Output(join(infos), state)


def stream(
    alg: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    record: Sequence[str] = (),
    chunk: int = CHUNK,
    workers_at_once: int | None = None,
    mesh: Mesh | None = None,
    exchange: str | exchanges.Sums = "messages",
) -> Iterator[Output]:
    """The same as `run`, chunk after chunk: show progress, save, or leave the loop to stop early.

    A yielded state is donated to the next chunk: use it (save it, or copy it) before asking for the next one.

    Args:
        alg: see `run`, as all others.
        start: see `run`.
        shards: see `run`.
        rounds: see `run`.
        key: see `run`.
        record: see `run`.
        chunk: rounds between two outputs.
        workers_at_once: see `run`.
        mesh: see `run`.
        exchange: see `run`.

    Yields:
        `info` of the chunk's rounds, and the state after it.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
        Diverged: the loss is no longer finite.
    """
    no_tracers(alg, start, shards, key)
    rounds, chunk, names = arguments(rounds, chunk, record, workers_at_once, exchange)
    check_keys("key", key, ())
    params = start.params if isinstance(start, State) else alg.oracle.ravel(start)
    run_arguments(alg, params, shards, rows=meshes.slots(mesh, alg.num_workers))
    check_schedule(alg, int(start.round) if isinstance(start, State) else 0, rounds)
    options: Any = {"length": chunk, "record": names, "workers_at_once": workers_at_once or alg.workers_at_once(shards)}
    if mesh is None:
        # copies: the chunks consume their state
        state = own_state(start if isinstance(start, State) else alg.init(params), alg.init, params)
        shards = jax.tree.map(jnp.asarray, shards)
    else:
        meshes.agree("algorithm, start, data or key", alg, start, shards, key)
        options["exchange"] = exchanges.named(exchange, alg)
        state, shards = spread(alg, start, params, shards, mesh)
        alg, key = meshes.place((alg, key), mesh, P())
    first = int(state.round)
    for done in range(0, rounds, chunk):
        count = min(chunk, rounds - done)
        if mesh is not None:  # moves nothing: another placement would compile the chunk again
            state = meshes.place_state(state, mesh)
        with meshes.together():
            state, info = compiled_chunk(alg, state, shards, key, np.int32(count), mesh=mesh, **options)
            info = head(info, count)
        if not np.all(np.isfinite(info.loss)):
            good = int(np.argmin(np.isfinite(info.loss)))
            raise Diverged(first + done + good, head(info, good))
        yield Output(info, state)


def join(infos: Sequence[Info]) -> Info:
    """Consecutive infos as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *infos)


def head(info: Info, rounds: int) -> Info:
    """The first rounds, on the host."""
    return jax.tree.map(lambda a: np.asarray(a)[:rounds], info)


def arguments(
    rounds: int, chunk: int, record: Sequence[str], workers_at_once: int | None, exchange: Any
) -> tuple[int, int, tuple[str, ...]]:
    """Check the arguments that all loops share."""
    exchanges.check_exchange(exchange)
    if workers_at_once is not None:
        number("workers_at_once", workers_at_once, np.int32, least=1)
    checked = [int(number(name, value, np.int32, least=1)) for name, value in (("rounds", rounds), ("chunk", chunk))]
    return checked[0], checked[1], tuple(sorted(set(record)))


def own_state(state: State, init: Callable[[Any], State], params: Any) -> State:
    """The state as arrays of our own, since a chunk consumes its state. ValueError for another algorithm's."""
    check_state(state, jax.eval_shape(init, params))
    return jax.tree.map(partial(jnp.array, copy=True), state)


def check_state(state: State, expected: State) -> None:
    """ValueError unless the state has these shapes and dtypes."""
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (expected, state)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"state: expected one that `init` makes for this algorithm, {shapes[0]}; got {shapes[1]}")


def spread(alg: Algorithm, start: Any, params: Any, shards: Shards, mesh: Mesh) -> tuple[State, Shards]:
    """(a state of our own, shards) over the devices of a mesh, with rows of padding where M is no multiple of them."""
    rows, specs = meshes.slots(mesh, alg.num_workers), meshes.state_specs(mesh)
    if isinstance(start, State):
        check_state(
            jax.eval_shape(partial(meshes.rows_of, rows=alg.num_workers), start), jax.eval_shape(alg.init, params)
        )
        # a copy: the chunks consume their state
        state = jax.jit(partial(jax.tree.map, jnp.copy))(meshes.place_state(meshes.rows_of(start, rows), mesh))
    else:
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))
        state = jax.jit(lambda alg, params: meshes.rows_of(alg.init(params), rows), out_shardings=at)(alg, params)
    return state, meshes.place(meshes.padded(shards, rows), mesh, specs.workers)


@partial(jax.jit, static_argnames=("length", "record", "workers_at_once", "mesh", "exchange"), donate_argnames="state")
def compiled_chunk(
    alg: Algorithm,
    state: State,
    shards: Shards,
    key: PRNGKeyArray,
    count: Int[Array, ""],
    *,
    length: int,
    record: tuple[str, ...],
    workers_at_once: int | None,
    mesh: Mesh | None = None,
    exchange: Exchange | None = None,
) -> tuple[State, Info]:
    """`count` <= `length` rounds; rows of the info from `count` on are zeros."""

    def rounds(alg: Algorithm, state: State, shards: Shards, key: Any, count: Array) -> tuple[State, Info]:
        options: Any = {"record": record, "workers_at_once": workers_at_once, "exchange": exchange}
        return rounds_of(partial(alg.step, shards=shards, key=key, **options), state, count, length)

    if mesh is not None:
        specs = meshes.state_specs(mesh)
        in_specs = P(), specs, specs.workers, P(), P()
        rounds = jax.shard_map(rounds, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=False)
    return rounds(alg, state, shards, key, count)


def rounds_of(step: Callable[[State], Any], state: State, count: Int[Array, ""], length: int) -> tuple[State, Info]:
    """`count` <= `length` rounds; the rows of the info behind them are zeros."""
    one = jax.eval_shape(step, state)[1]
    rows = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), one)

    def body(i: Array, carry: tuple[State, Info]) -> tuple[State, Info]:
        state, info = step(carry[0])
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), carry[1], info)

    return jax.lax.fori_loop(0, count, body, (state, rows))
