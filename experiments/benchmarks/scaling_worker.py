"""Worker process of `experiments.scaling`: runs rounds, whole runs, and measurements of memory and constants."""

import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import laqjax
from experiments.benchmarks import hlo_traffic, process_group
from experiments.benchmarks.speed import peak_rss_bytes
from experiments.harness import datasets
from laqjax import distributed, sharding

BITS, LR, CLASSES, PIXELS = 4, 0.2, 10, 784  # lr M: steps on the mean of the workers' losses
streams: dict[Any, Iterator[Any]] = {}  # runs that `time_chunk` continues


def worker_main(rank: int, processes: int, port: int) -> None:
    """Join the other processes of the group and answer requests."""
    if processes > 1:
        distributed.initialize_distributed(f"127.0.0.1:{port}", processes, rank)
    jax.devices()  # starts the backend before anything is measured
    commands: dict[str, Callable[..., Any]] = {
        "go": time_chunk,
        "run": time_run,
        "bytes": count_collective_bytes,
        "memory": measure_peak_growth,
        "constants": measure_constants,
    }
    process_group.serve(lambda do, cell, **more: commands[do](cell, **more))


@cache
def load_mnist() -> datasets.Dataset:
    """Load MNIST."""
    return datasets.load("mnist")


def make_shards(first: int, last: int, rows: int) -> laqjax.Shards:
    """Return the images of some workers; they repeat where MNIST has too few."""
    data, which = load_mnist(), np.arange(first * rows, last * rows) % len(load_mnist().x)
    x, y = data.x[which].reshape(last - first, rows, -1), data.y[which].reshape(last - first, rows)
    return laqjax.Shards(x, y, np.ones(y.shape, np.float32))


@cache
def make_run_arguments(
    workers: int, rows: int, hidden: int | None = None, collective: str = "all_gather", **_: Any
) -> dict[str, Any]:
    """Return arguments of `laqjax.stream`: without a mesh on one device, else with the shards of this process."""
    problems = laqjax.problems
    problem: Any = problems.Softmax(PIXELS, CLASSES)
    if hidden:
        problem = problems.TwoLayerNetwork(PIXELS, CLASSES, hidden, l2=0)
    oracle = problem.oracle()
    lr = LR / workers / (10 if hidden else 1)  # a network in 4 bits diverges with the steps of the other problem
    alg = laqjax.algorithms.laq(oracle, lr=lr, num_workers=workers, bits=BITS)
    mesh = sharding.make_mesh() if jax.device_count() > 1 else None
    part = partial(make_shards, rows=rows)
    shards = part(0, workers) if mesh is None else sharding.load_local_shards(mesh, workers, part)
    arguments = {"alg": alg, "start": problem.init_vector(oracle), "shards": shards, "key": jax.random.key(0)}
    return arguments | {"mesh": mesh, "collective": collective}


def time_chunk(cell: dict[str, Any]) -> dict[str, Any]:
    """Time the next chunk of a run that continues from call to call; return seconds of a round, and M and p."""
    name = tuple(cell.items())
    if name not in streams:
        options = {"chunk_size": cell["chunk"], "worker_batch_size": cell["at_once"]}
        streams[name] = laqjax.stream(**make_run_arguments(**cell), rounds=10**6, **options)
        next(streams[name])  # compiles
    begin = time.perf_counter()
    out = next(streams[name])
    seconds = (time.perf_counter() - begin) / len(out.info.loss)
    return {"seconds": seconds, "M": out.info.sent.shape[1], "p": out.state.params.size}


def time_run(cell: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time a whole run without compilation; return its seconds and what a server would receive."""
    arguments = make_run_arguments(**cell)
    laqjax.run(**arguments, rounds=1)
    begin = time.perf_counter()
    info = laqjax.run(**arguments, rounds=rounds).info
    seconds, sent = time.perf_counter() - begin, np.asarray(info.sent)
    bits = int(np.asarray(info.bits_up).sum(dtype=np.int64))
    return {"seconds": seconds, "active": int(sent.any(1).sum()), "uploads": int(sent.sum()), "bits_up": bits}


def count_collective_bytes(cell: dict[str, Any]) -> dict[str, Any]:
    """Count the bytes that a device receives in a round, and those of an all-gather of float32 gradients."""
    arguments = make_run_arguments(**cell)
    alg, mesh, start = arguments["alg"], arguments["mesh"], arguments["start"]
    slots, devices = sharding.num_worker_slots(mesh, alg.num_workers), jax.device_count()
    collective = sharding.resolve_collective(arguments["collective"], alg)
    state = sharding.shard_state(sharding.resize_workers(alg.init(start), slots), mesh)
    specs = sharding.state_partition_specs(mesh)

    def step(alg: Any, state: Any, shards: Any, key: Any) -> Any:
        return alg.step(state, shards, key, worker_batch_size=1, collective=collective)

    in_specs = P(), specs, specs.workers, P()
    split = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=False)
    alg, key = sharding.device_put_global((alg, arguments["key"]), mesh, P())
    program = jax.jit(split).lower(alg, state, arguments["shards"], key).compile()
    float32 = 4 * start.size * slots * (devices - 1) / devices
    return hlo_traffic.count_received_bytes(program.as_text() or "") | {"float32": float32, "p": int(start.size)}


def measure_peak_growth(cell: dict[str, Any]) -> dict[str, Any]:
    """Measure by how many bytes a run raises the peak memory of this process; valid once in a new process."""
    jax.block_until_ready(jnp.ones(8) + 1)
    load_mnist()  # all sizes share these arrays
    before, arguments = peak_rss_bytes(), make_run_arguments(**cell)
    options = {"chunk_size": cell["chunk"], "worker_batch_size": cell["at_once"]}
    for _ in laqjax.stream(**arguments, rounds=2 * cell["chunk"], **options):
        pass
    return {"grown": peak_rss_bytes() - before, "peak": peak_rss_bytes()}


# ---- constants of the model -------------------------------------------------------------------------------------


def measure_constants(cell: dict[str, Any], words: int, times: int) -> dict[str, Any]:
    """Time an all-gather of one word and of `words` words a device; on one device, decoding and adding one number."""
    if jax.device_count() > 1:
        return {"short": time_all_gather(1, 20 * times), "long": time_all_gather(words, times)}
    arguments = make_run_arguments(**cell)
    alg, like, workers = arguments["alg"], arguments["start"], 8
    collective = sharding.all_gather(alg)
    add = jax.jit(lambda every, sent: collective.sum_packed(alg, every, sent, like))
    size = collective.bytes_received(alg, 2) // 4  # the words of one message
    every, sent = jnp.ones((workers, size), jnp.uint32), jnp.ones(workers, bool)
    return {"decode": best_time(lambda: add(every, sent), times) / (workers * like.size)}


def time_all_gather(words: int, times: int) -> float:
    """Return the seconds of an all-gather of `words` words from each device."""
    mesh = sharding.make_mesh()

    def gather(_: Any, a: Any) -> Any:
        every = jax.lax.all_gather(a, "workers", tiled=True)
        return every[: a.shape[0]] + every[-1]

    spec, ones = P("workers"), np.ones(words * jax.device_count(), np.float32)
    many = partial(jax.lax.fori_loop, 0, times, gather)
    call = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    placed = sharding.device_put_global(ones, mesh, spec)
    return best_time(lambda: call(placed), 5) / times


def best_time(call: Callable[[], Any], times: int) -> float:
    """Return the seconds of the fastest of some calls, after one that compiles."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
