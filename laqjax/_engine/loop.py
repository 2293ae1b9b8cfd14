"""Run an algorithm in compiled chunks of rounds.

A chunk is one compiled program of a fixed length, which runs as many rounds as it is given, up to that length. The same
program computes every round, however a run is cut into chunks. A resumed run is therefore bit-identical to an
uninterrupted one. `stream` is a generator, so progress reports, checkpoints and early stops happen between chunks.
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

from laqjax._core.round import Algorithm
from laqjax._core.validation import check_keys, check_not_traced, check_number, check_run_inputs, check_schedule
from laqjax._engine import collectives, placement, processes
from laqjax._engine.checkpoint import RunCheckpointer
from laqjax.types import AlgorithmState, Collective, RoundInfo, Shards

DEFAULT_CHUNK_SIZE = 100  # rounds in one compiled program


class RunResult(NamedTuple):
    """Metrics and final state of a run, or of one of its chunks.

    Attributes:
        info: metrics of K rounds on the host: loss [K], sent [K, M] and so on. `sweep` adds an axis of points after K.
        state: state after the last of these rounds. Pass it as `start` to continue the run.
    """

    info: RoundInfo
    state: AlgorithmState


class DivergenceError(FloatingPointError):
    """Error of a run whose loss is no longer finite.

    Attributes:
        round: index of the first round without a finite loss. A resumed run continues the count of its state.
        info: metrics of the earlier rounds of this call. `run` includes the rounds that it read from a checkpoint.
    """

    def __init__(self, round: int, info: RoundInfo):
        grew = len(info.loss) > 1 and info.loss[-1] > info.loss[0]
        super().__init__(
            f"the loss is not finite from round {round} on, after it had grown: the run diverged; use a smaller lr, or "
            "more bits"
            if grew
            else f"the loss is not finite in round {round}, and had not grown before: probably a 0 / 0 or a log(0) in "
            "the loss or in the data, not a large step; check the loss of single examples"
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
    collective: str | Collective = "all_gather",
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
) -> RunResult:
    """Run an algorithm for a number of rounds.

    Args:
        alg: algorithm, from a function of `laqjax.algorithms` or from `laqjax.assemble`.
        start: parameters (a pytree or a flat vector [p]), or an `AlgorithmState` from which the run continues. It is
            copied, never donated.
        shards: data of the workers, arrays [M, N, ...].
        rounds: number of rounds, at least 1. With `checkpoint_dir` it includes the rounds in the checkpoints.
        key: typed PRNG key of the run. A resumed run needs the same key.
        metrics: names of further metrics to record in every round, in `info.extra`; `Algorithm.step` lists them.
        chunk_size: number of rounds in one compiled program.
        worker_batch_size: number of workers whose gradients are computed side by side. None: the choice of
            `Algorithm.default_worker_batch_size`.
        mesh: devices of one or several processes that share the workers, from `laqjax.sharding.make_mesh()`. Each
            process then calls this function with the same arguments, or with shards from
            `laqjax.sharding.load_local_shards`. None: one device.
        collective: how messages are summed over the devices of a mesh: "all_gather", "all_to_all", "all_reduce", or a
            `laqjax.types.Collective`. See `laqjax.sharding`.
        checkpoint_dir: folder for the checkpoints of this run only, visible to all processes. After an interruption the
            same call continues from the last checkpoint, and a call with more rounds continues from the end. Both
            results are those of an uninterrupted run.
        checkpoint_every: rounds between two checkpoints. None: `chunk_size`.

    Returns:
        `info` with the metrics of all rounds, on the host, and the final `state`. On a mesh the workers of the state
        are spread over the devices, with padding workers after the M-th (`laqjax.sharding.unpad_state` removes them).

    Raises:
        ValueError: the arguments and data do not fit each other, or the checkpoints belong to another run. Raised
            before anything is compiled.
        ImportError: `checkpoint_dir` is given, but orbax is not installed.
        DivergenceError: the loss is no longer finite.
        ConnectionError: another process of the mesh was lost.

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
        every = chunk_size if checkpoint_every is None else checkpoint_every
        checkpoint_every = int(check_number("checkpoint_every", every, np.int32, minimum=1))
        chunk_size = min(chunk_size, checkpoint_every)
        contents = {"algorithm": alg, "start": begin, "data": shards, "key": key, "metrics": sorted(set(metrics))}
        saved = RunCheckpointer(checkpoint_dir, contents)
        params = begin.params if isinstance(begin, AlgorithmState) else begin
        done, state, arrays = saved.restore_latest(jax.eval_shape(alg.init, params), rounds, mesh)
        if state is not None:
            infos, begin = [RoundInfo(**arrays)], state if mesh else placement.resize_workers(state, alg.num_workers)
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
    collective: str | Collective = "all_gather",
) -> Iterator[RunResult]:
    """Run an algorithm like `run`, but yield after each chunk of rounds.

    Use it to show progress, to save states, or to stop early by leaving the loop. A yielded state is donated to the
    next chunk: use, save or copy it before you request the next one.

    Args:
        alg: algorithm, from a function of `laqjax.algorithms` or from `laqjax.assemble`.
        start: parameters (a pytree or a flat vector [p]), or an `AlgorithmState` from which the run continues. It is
            copied, never donated.
        shards: data of the workers, arrays [M, N, ...].
        rounds: number of rounds, at least 1.
        key: typed PRNG key of the run. A resumed run needs the same key.
        metrics: names of further metrics to record in every round, in `info.extra`; `Algorithm.step` lists them.
        chunk_size: number of rounds between two outputs; the last chunk may be shorter.
        worker_batch_size: number of workers whose gradients are computed side by side. None: the choice of
            `Algorithm.default_worker_batch_size`.
        mesh: devices of one or several processes that share the workers, from `laqjax.sharding.make_mesh()`. None: one
            device.
        collective: how messages are summed over the devices of a mesh: "all_gather", "all_to_all", "all_reduce", or a
            `laqjax.types.Collective`. See `laqjax.sharding`.

    Yields:
        `info` with the metrics of the chunk's rounds, on the host, and the `state` after the chunk.

    Raises:
        ValueError: the arguments and data do not fit each other. Raised when the first chunk is requested, before
            anything is compiled.
        DivergenceError: the loss is no longer finite.
        ConnectionError: another process of the mesh was lost.
    """
    check_not_traced(alg, start, shards, key)
    rounds, chunk_size, names = check_loop_arguments(rounds, chunk_size, metrics, worker_batch_size, collective)
    check_keys("key", key, ())
    params = start.params if isinstance(start, AlgorithmState) else alg.oracle.ravel(start)
    check_run_inputs(alg, params, shards, placement.num_worker_slots(mesh, alg.num_workers))
    check_schedule(alg, int(start.round) if isinstance(start, AlgorithmState) else 0, rounds)
    at_once = worker_batch_size or alg.default_worker_batch_size(shards)
    options: Any = {"length": chunk_size, "metrics": names, "worker_batch_size": at_once}
    if mesh is None:
        state = copy_state(start if isinstance(start, AlgorithmState) else alg.init(params), alg.init, params)
        shards = jax.tree.map(jnp.asarray, shards)
    else:
        processes.assert_same_on_all_processes("algorithm, start, data or key", alg, start, shards, key)
        options["collective"] = collectives.resolve_collective(collective, alg)
        state, shards = shard_inputs(alg, start, params, shards, mesh)
        alg, key = placement.device_put_global((alg, key), mesh, P())
    first = int(state.round)
    for done in range(0, rounds, chunk_size):
        count = min(chunk_size, rounds - done)
        if mesh is not None:  # moves no data; with another sharding the chunk would be compiled again
            state = placement.shard_state(state, mesh)
        with processes.translate_lost_process_errors():
            state, info = run_chunk(alg, state, shards, key, np.int32(count), mesh=mesh, **options)
            info = truncate_info(info, count)
        if not np.all(np.isfinite(info.loss)):
            good = int(np.argmin(np.isfinite(info.loss)))
            raise DivergenceError(first + done + good, truncate_info(info, good))
        yield RunResult(info, state)


def concatenate_infos(infos: Sequence[RoundInfo]) -> RoundInfo:
    """Concatenate the metrics of consecutive chunks along the axis of rounds.

    Args:
        infos: at least one, each with a leading axis of rounds.

    Returns:
        One `RoundInfo` of NumPy arrays with all rounds.
    """
    return jax.tree.map(lambda *parts: np.concatenate(parts), *infos)


def truncate_info(info: RoundInfo, rounds: int) -> RoundInfo:
    """Copy the metrics of the first `rounds` rounds to the host."""
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
    rounds = int(check_number("rounds", rounds, np.int32, minimum=1))
    chunk_size = int(check_number("chunk_size", chunk_size, np.int32, minimum=1))
    return rounds, chunk_size, tuple(sorted(set(metrics)))


def copy_state(state: AlgorithmState, init: Callable[[Any], AlgorithmState], params: Any) -> AlgorithmState:
    """Copy a state, since a chunk donates its input state.

    Raises:
        ValueError: the shapes or dtypes are not those of `init(params)`.
    """
    check_state(state, jax.eval_shape(init, params))
    return jax.tree.map(partial(jnp.array, copy=True), state)


def check_state(state: AlgorithmState, expected: AlgorithmState) -> None:
    """Raise ValueError unless a state has the shapes and dtypes of another."""
    shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (expected, state)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"state of {shapes[1]}: must be {shapes[0]}, as `init` of the algorithm returns it")


def shard_inputs(alg: Algorithm, start: Any, params: Any, shards: Shards, mesh: Mesh) -> tuple[AlgorithmState, Shards]:
    """Place the initial state and the shards on the devices of a mesh, with the padding workers that it needs.

    Raises:
        ValueError: `start` is a state whose shapes or dtypes do not fit the algorithm.
    """
    slots, specs = placement.num_worker_slots(mesh, alg.num_workers), placement.state_partition_specs(mesh)
    if isinstance(start, AlgorithmState):
        unpadded = jax.eval_shape(partial(placement.resize_workers, num_slots=alg.num_workers), start)
        check_state(unpadded, jax.eval_shape(alg.init, params))
        placed = placement.shard_state(placement.resize_workers(start, slots), mesh)
        state = jax.jit(partial(jax.tree.map, jnp.copy))(placed)  # a chunk donates its input state
    else:
        at = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        init = jax.jit(lambda alg, params: placement.resize_workers(alg.init(params), slots), out_shardings=at)
        state = init(alg, params)
    return state, placement.device_put_global(placement.pad_workers(shards, slots), mesh, specs.workers)


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
    """Run `count` <= `length` rounds as one compiled program; rows of the info from `count` on are zeros."""

    def run_rounds(
        alg: Algorithm, state: AlgorithmState, shards: Shards, key: Any, count: Array
    ) -> tuple[AlgorithmState, RoundInfo]:
        options: Any = {"metrics": metrics, "worker_batch_size": worker_batch_size, "collective": collective}
        return fori_rounds(partial(alg.step, shards=shards, key=key, **options), state, count, length)

    if mesh is not None:
        specs = placement.state_partition_specs(mesh)
        in_specs = P(), specs, specs.workers, P(), P()
        run_rounds = jax.shard_map(run_rounds, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=False)
    return run_rounds(alg, state, shards, key, count)


def fori_rounds(
    step: Callable[[AlgorithmState], Any], state: AlgorithmState, count: Int[Array, ""], length: int
) -> tuple[AlgorithmState, RoundInfo]:
    """Apply `step`, a function state -> (state, info), in `count` <= `length` rounds; stack the info to [length, ...].

    `count` may be traced. The rows of the info from `count` on are zeros.
    """
    one = jax.eval_shape(step, state)[1]
    rows = jax.tree.map(lambda s: jnp.zeros((length, *s.shape), s.dtype), one)

    def body(i: Array, carry: tuple[AlgorithmState, RoundInfo]) -> tuple[AlgorithmState, RoundInfo]:
        state, info = step(carry[0])
        return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), carry[1], info)

    return jax.lax.fori_loop(0, count, body, (state, rows))
