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

from laqjax import distributed, sharding
from laqjax._core.round import Algorithm
from laqjax._core.validation import check_keys, check_not_traced, check_number, check_run_inputs, check_schedule
from laqjax._engine import collectives
from laqjax._engine.checkpoint import RunCheckpointer
from laqjax.types import AlgorithmState, Collective, RoundInfo, Shards

DEFAULT_CHUNK_SIZE = 100  # rounds in one compiled program


class RunResult(NamedTuple):
    """What a run gives: `state` resumes it."""

    info: RoundInfo
    state: AlgorithmState


class DivergenceError(FloatingPointError):
    """The loss stopped being finite. `run_round` is the first such round, `info` what came before it in this call."""

    def __init__(self, round: int, info: RoundInfo):
        grew = len(info.loss) > 1 and info.loss[-1] > info.loss[0]
        super().__init__(
            f"diverged: the loss is not finite from round {round} on, after it had grown; a smaller lr, or more bits, "
            "keeps the run stable"
            if grew
            else f"the loss is not finite in round {round}, and had not grown before: a 0 / 0 or a log(0) in the loss or in "
            "the data rather than a step too large; look at the loss of single examples"
        )
        self.round, self.info = round, info


def run(
    alg: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    metrics: Sequence[str] = (),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    worker_batch_size: int | None = None,
    mesh: Mesh | None = None,
    collective: str | collectives.AllReduce = "all_gather",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> RunResult:
    """`saved_rounds` rounds.

    Args:
        alg: the algorithm.
        start: parameters (a pytree, or a flat vector [p]), or a state, which is resumed. Never donated.
        shards: the data of the workers.
        rounds: how many.
        key: typed PRNG key of the run; a resumed run needs the same.
        metrics: facts to keep of every round in `info.extra`, see `Algorithm.step`.
        chunk_size: rounds in one compiled program.
        worker_batch_size: workers whose gradients are computed side by side, see `Algorithm.step`.
        mesh: devices, of this process or of many, that share the workers (`laqjax.sharding.make_mesh()`). Each process then calls
            this with the same arguments, or with shards of `laqjax.sharding.load_local_shards`. None: one device.
        collective: on a mesh: "all_gather", "all_to_all", "all_reduce", or one of one's own, see `laqjax.sharding`.
        checkpoint_dir: a folder of this run's own, which all processes see. The same call goes on from there after it was
            stopped, and the same call for more rounds goes on from the end; the result is that of a run without a stop.
        checkpoint_every: rounds between two checkpoints (None: `chunk_size`).

    Returns:
        `info`, the facts of all rounds on the host, and `state`; on a mesh its workers are spread over the devices, with
        rows of padding behind the M-th (`laqjax.sharding.unpad_state`).

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit, or the checkpoints are of another run.
        DivergenceError: the loss is no longer finite.

    Example:
        >>> import jax, numpy as np, laqjax
        >>> problem = laqjax.problems.Ridge(3)
        >>> oracle = problem.oracle()
        >>> shards = laqjax.Shards(np.ones((2, 5, 3), np.float32), np.ones((2, 5), np.float32), np.ones((2, 5)))
        >>> alg = laqjax.algorithms.laq(oracle, lr=0.01, num_workers=2)
        >>> out = laqjax.run(alg, problem.init_params(0), shards, 20, jax.random.key(0))
        >>> bool(out.info.loss[-1] < out.info.loss[0])
        True
    """
    infos: list[RoundInfo] = []
    rounds, chunk_size, _ = check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    check_keys("key", key, ())
    state, done, saved = None, 0, None
    begin = start if isinstance(start, AlgorithmState) else alg.oracle.ravel(start)
    if checkpoint_dir is not None:
        checkpoint_every = int(
            check_number(
                "checkpoint_every", chunk_size if checkpoint_every is None else checkpoint_every, np.int32, minimum=1
            )
        )
        chunk_size = min(chunk_size, checkpoint_every)
        contents = {"algorithm": alg, "start": begin, "data": shards, "key": key, "metrics": sorted(set(metrics))}
        saved = RunCheckpointer(checkpoint_dir, contents)
        params = begin.params if isinstance(begin, AlgorithmState) else begin
        done, state, facts = saved.restore_latest(jax.eval_shape(alg.init, params), rounds, mesh)
        if state is not None:
            infos, begin = [RoundInfo(**facts)], state if mesh else sharding.resize_workers(state, alg.num_workers)
    written = done
    try:
        options: Any = {"metrics": metrics, "chunk_size": chunk_size, "worker_batch_size": worker_batch_size}
        rest = rounds - done
        for part in stream(alg, begin, shards, rest, key, **options, mesh=mesh, collective=collective) if rest else ():
            infos.append(part.info)
            state, done = part.state, done + len(part.info.loss)
            if saved and (done - written >= (checkpoint_every or 1) or done == rounds):
                infos, written = [concatenate_infos(infos)], done
                saved.save(done, state, infos[0]._asdict())
    except DivergenceError as stop:
        raise DivergenceError(stop.round, concatenate_infos([*infos, stop.info])) from None
    finally:
        if saved:
            saved.close()
    assert state is not None
    return RunResult(concatenate_infos(infos), state)


def stream(
    alg: Algorithm,
    start: Any,
    shards: Shards,
    rounds: int,
    key: PRNGKeyArray,
    *,
    metrics: Sequence[str] = (),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    worker_batch_size: int | None = None,
    mesh: Mesh | None = None,
    collective: str | collectives.AllReduce = "all_gather",
) -> Iterator[RunResult]:
    """The same as `run`, chunk after chunk: show progress, save, or leave the loop to stop early.

    A yielded state is donated to the next chunk: use it (save it, or copy it) before asking for the next one.

    Args:
        alg: see `run`, as all others.
        start: see `run`.
        shards: see `run`.
        rounds: see `run`.
        key: see `run`.
        metrics: see `run`.
        chunk_size: rounds between two outputs.
        worker_batch_size: see `run`.
        mesh: see `run`.
        collective: see `run`.

    Yields:
        `info` of the chunk's rounds, and the state after it.

    Raises:
        ValueError: before anything is compiled, when arguments and data do not fit.
        DivergenceError: the loss is no longer finite.
    """
    check_not_traced(alg, start, shards, key)
    rounds, chunk_size, names = check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    check_keys("key", key, ())
    params = start.params if isinstance(start, AlgorithmState) else alg.oracle.ravel(start)
    check_run_inputs(alg, params, shards, rows=sharding.num_worker_slots(mesh, alg.num_workers))
    check_schedule(alg, int(start.round) if isinstance(start, AlgorithmState) else 0, rounds)
    options: Any = {
        "length": chunk_size,
        "metrics": names,
        "worker_batch_size": worker_batch_size or alg.default_worker_batch_size(shards),
    }
    if mesh is None:
        # copies: the chunks consume their state
        state = copy_state(start if isinstance(start, AlgorithmState) else alg.init(params), alg.init, params)
        shards = jax.tree.map(jnp.asarray, shards)
    else:
        distributed.assert_same_on_all_processes("algorithm, start, data or key", alg, start, shards, key)
        options["collective"] = collectives.resolve_collective(collective, alg)
        state, shards = shard_inputs(alg, start, params, shards, mesh)
        alg, key = sharding.device_put_global((alg, key), mesh, P())
    first = int(state.round)
    for done in range(0, rounds, chunk_size):
        count = min(chunk_size, rounds - done)
        if mesh is not None:  # moves nothing: another placement would compile the chunk again
            state = sharding.shard_state(state, mesh)
        with distributed.translate_lost_process_errors():
            state, info = run_chunk(alg, state, shards, key, np.int32(count), mesh=mesh, **options)
            info = truncate_info(info, count)
        if not np.all(np.isfinite(info.loss)):
            good = int(np.argmin(np.isfinite(info.loss)))
            raise DivergenceError(first + done + good, truncate_info(info, good))
        yield RunResult(info, state)


def concatenate_infos(infos: Sequence[RoundInfo]) -> RoundInfo:
    """Consecutive infos as one."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *infos)


def truncate_info(info: RoundInfo, rounds: int) -> RoundInfo:
    """The first rounds, on the host."""
    return jax.tree.map(lambda a: np.asarray(a)[:rounds], info)


def check_loop_arguments(
    rounds: int, chunk_size: int, metrics: Sequence[str], worker_batch_size: int | None, collective: Any
) -> tuple[int, int, tuple[str, ...]]:
    """Check the arguments that `run`, `stream`, `sweep` and `stream_sweep` share.

    Returns:
        (rounds, chunk_size, sorted names of the metrics without duplicates).

    Raises:
        ValueError: an argument is out of range, or there is no such collective.
    """
    collectives.check_collective(collective)
    if worker_batch_size is not None:
        check_number("worker_batch_size", worker_batch_size, np.int32, minimum=1)
    checked = [
        int(check_number(name, value, np.int32, minimum=1))
        for name, value in (("rounds", rounds), ("chunk_size", chunk_size))
    ]
    return checked[0], checked[1], tuple(sorted(set(metrics)))


def copy_state(state: AlgorithmState, init: Callable[[Any], AlgorithmState], params: Any) -> AlgorithmState:
    """The state as arrays of our own, since a chunk consumes its state. ValueError for another algorithm's."""
    check_state(state, jax.eval_shape(init, params))
    return jax.tree.map(partial(jnp.array, copy=True), state)


def check_state(state: AlgorithmState, expected: AlgorithmState) -> None:
    """ValueError unless the state has these shapes and dtypes."""
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (expected, state)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"state: expected one that `init` makes for this algorithm, {shapes[0]}; got {shapes[1]}")


def shard_inputs(alg: Algorithm, start: Any, params: Any, shards: Shards, mesh: Mesh) -> tuple[AlgorithmState, Shards]:
    """(a state of our own, shards) over the devices of a mesh, with rows of padding where M is no multiple of them."""
    rows, specs = sharding.num_worker_slots(mesh, alg.num_workers), sharding.state_partition_specs(mesh)
    if isinstance(start, AlgorithmState):
        check_state(
            jax.eval_shape(partial(sharding.resize_workers, rows=alg.num_workers), start),
            jax.eval_shape(alg.init, params),
        )
        # a copy: the chunks consume their state
        state = jax.jit(partial(jax.tree.map, jnp.copy))(
            sharding.shard_state(sharding.resize_workers(start, rows), mesh)
        )
    else:
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))
        state = jax.jit(lambda alg, params: sharding.resize_workers(alg.init(params), rows), out_shardings=at)(
            alg, params
        )
    return state, sharding.device_put_global(sharding.pad_workers(shards, rows), mesh, specs.workers)


@partial(
    jax.jit, static_argnames=("length", "metrics", "worker_batch_size", "mesh", "collective"), donate_argnames="state"
)
def run_chunk(
    alg: Algorithm,
    state: AlgorithmState,
    shards: Shards,
    key: PRNGKeyArray,
    count: Int[Array, ""],
    *,
    length: int,
    metrics: tuple[str, ...],
    worker_batch_size: int | None,
    mesh: Mesh | None = None,
    collective: Collective | None = None,
) -> tuple[AlgorithmState, RoundInfo]:
    """`count` <= `length` rounds; rows of the info from `count` on are zeros."""

    def rounds(
        alg: Algorithm, state: AlgorithmState, shards: Shards, key: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        options: Any = {"metrics": metrics, "worker_batch_size": worker_batch_size, "collective": collective}
        return fori_rounds(partial(alg.step, shards=shards, key=key, **options), state, count, length)

    if mesh is not None:
        specs = sharding.state_partition_specs(mesh)
        in_specs = P(), specs, specs.workers, P(), P()
        rounds = jax.shard_map(rounds, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=False)
    return rounds(alg, state, shards, key, count)


def fori_rounds(
    step: Callable[[AlgorithmState], Any], state: AlgorithmState, count: Int[Array, ""], length: int
) -> tuple[AlgorithmState, RoundInfo]:
    """`count` <= `length` rounds; the rows of the info behind them are zeros."""
    one = jax.eval_shape(step, state)[1]
    rows = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), one)

    def body(i: Array, carry: tuple[AlgorithmState, RoundInfo]) -> tuple[AlgorithmState, RoundInfo]:
        state, info = step(carry[0])
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), carry[1], info)

    return jax.lax.fori_loop(0, count, body, (state, rows))
