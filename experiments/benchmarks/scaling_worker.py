"""What a process of `experiments.scaling` does: rounds, whole runs, memory and constants, as it is asked."""

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


def worker_main(rank: int, processes: int, port: int) -> None:
    """Join the others and answer."""
    if processes > 1:
        distributed.initialize_distributed(f"127.0.0.1:{port}", processes, rank)
    streams: dict[Any, Iterator[Any]] = {}
    jax.devices()  # starts the backend: not part of what is measured

    def respond(do: str, cell: dict[str, Any], **more: Any) -> Any:
        if do == "go":
            return time_chunk(streams, cell)
        return {
            "run": run,
            "bytes": count_collective_bytes,
            "memory": measure_peak_growth,
            "constants": measure_constants,
        }[do](cell, **more)

    process_group.serve(respond)


@cache
def load_mnist() -> datasets.Dataset:
    """MNIST, as it lies."""
    return datasets.load("mnist")


def make_problem(hidden: int | None) -> Any:
    """Softmax regression, or a network with so many hidden units."""
    return (
        laqjax.problems.TwoLayerNetwork(PIXELS, CLASSES, hidden, l2=0)
        if hidden
        else laqjax.problems.Softmax(PIXELS, CLASSES)
    )


def make_shards(first: int, last: int, rows: int) -> laqjax.Shards:
    """The images of some workers; from the beginning again where there are no more."""
    data, which = load_mnist(), np.arange(first * rows, last * rows) % len(load_mnist().x)
    x, y = data.x[which].reshape(last - first, rows, -1), data.y[which].reshape(last - first, rows)
    return laqjax.Shards(x, y, np.ones(y.shape, np.float32))


def make_run_arguments(
    workers: int, rows: int, hidden: int | None = None, collective: str = "all_gather", **_: Any
) -> dict[str, Any]:
    """What `laqjax.stream` takes: on one device without a mesh, on more with each process's own shards."""
    problem = make_problem(hidden)
    oracle = problem.oracle()
    lr = LR / workers / (10 if hidden else 1)  # a network in 4 bits diverges in time with the steps of the other
    alg = laqjax.algorithms.laq(oracle, lr=lr, num_workers=workers, bits=BITS)
    mesh = sharding.make_mesh() if jax.device_count() > 1 else None
    part = partial(make_shards, rows=rows)
    shards = part(0, workers) if mesh is None else sharding.load_local_shards(mesh, workers, part)
    given = {"alg": alg, "start": problem.init_vector(oracle), "shards": shards, "key": jax.random.key(0)}
    return given | {"mesh": mesh, "collective": collective}


def time_chunk(streams: dict[Any, Iterator[Any]], cell: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a round, by a chunk of rounds of a run that goes on with each call; and M and p of what ran."""
    name = tuple(cell.items())
    if name not in streams:
        options = {"chunk_size": cell["chunk"], "worker_batch_size": cell["at_once"]}
        streams[name] = laqjax.stream(**make_run_arguments(**cell), rounds=10**6, **options)
        next(streams[name])  # compiles
    begin = time.perf_counter()
    out = next(streams[name])
    seconds = (time.perf_counter() - begin) / len(out.info.loss)
    return {"seconds": seconds, "M": out.info.sent.shape[1], "p": out.state.params.size}


def run(cell: dict[str, Any], rounds: int) -> dict[str, Any]:
    """A whole run, compiled before: its seconds, and what a server would have received."""
    given = cached_run_arguments(**cell)
    laqjax.run(**given, rounds=1)
    begin = time.perf_counter()
    info = laqjax.run(**given, rounds=rounds).info
    seconds, sent = time.perf_counter() - begin, np.asarray(info.sent)
    bits = int(np.asarray(info.bits_up).sum(dtype=np.int64))
    return {"seconds": seconds, "active": int(sent.any(1).sum()), "uploads": int(sent.sum()), "bits_up": bits}


@cache
def cached_run_arguments(**cell: Any) -> dict[str, Any]:
    """`made`, once."""
    return make_run_arguments(**cell)


def count_collective_bytes(cell: dict[str, Any]) -> dict[str, Any]:
    """Bytes that a device receives in a round, by the compiled program, and by an all-gather of float32 gradients."""
    given = make_run_arguments(**cell)
    alg, mesh = given["alg"], given["mesh"]
    devices, slots = jax.device_count(), sharding.num_worker_slots(mesh, alg.num_workers)
    collective = sharding.resolve_collective(given["collective"], alg)
    state = sharding.shard_state(sharding.resize_workers(alg.init(given["start"]), slots), mesh)
    specs = sharding.state_partition_specs(mesh)

    def step(alg: Any, state: Any, shards: Any, key: Any) -> Any:
        return alg.step(state, shards, key, worker_batch_size=1, collective=collective)

    in_specs = P(), specs, specs.workers, P()
    split = jax.shard_map(step, mesh=mesh, in_specs=in_specs, out_specs=(specs, P()), check_vma=False)
    alg, key = sharding.device_put_global((alg, given["key"]), mesh, P())
    program = jax.jit(split).lower(alg, state, given["shards"], key).compile()
    floats = 4 * given["start"].size * slots * (devices - 1) / devices
    received = hlo_traffic.count_received_bytes(program.as_text() or "")
    return received | {"float32": floats, "p": int(given["start"].size)}


def measure_peak_growth(cell: dict[str, Any]) -> dict[str, Any]:
    """By how many bytes a run makes the peak of this process grow; to be asked of a new process, once."""
    jax.block_until_ready(jnp.ones(8) + 1)
    load_mnist()  # its arrays are there for all sizes alike
    before = peak_rss_bytes()
    given = make_run_arguments(**cell)
    for _ in laqjax.stream(
        **given, rounds=2 * cell["chunk"], chunk_size=cell["chunk"], worker_batch_size=cell["at_once"]
    ):
        pass
    return {"grown": peak_rss_bytes() - before, "peak": peak_rss_bytes(), "p": int(given["start"].size)}


# ---- constants of the model -------------------------------------------------------------------------------------


def measure_constants(cell: dict[str, Any], words: int, times: int) -> dict[str, Any]:
    """Seconds of an all-gather of one word, and of `words` words a device; of decoding and adding one number."""
    if jax.device_count() > 1:
        short, long = time_all_gather(1, 20 * times), time_all_gather(words, times)
        return {"short": short, "long": long}
    given = make_run_arguments(**cell)
    alg, like, workers = given["alg"], given["start"], 8
    collective = sharding.all_gather(alg)
    added = jax.jit(lambda every, sent: collective.sum_packed(alg, every, sent, like))
    size = collective.bytes_received(alg, 2) // 4  # the words of one message
    every, sent = jnp.ones((workers, size), jnp.uint32), jnp.ones(workers, bool)
    return {"decode": best_time(lambda: added(every, sent), times) / (workers * like.size)}


def time_all_gather(words: int, times: int) -> float:
    """Seconds of an all-gather of so many words from each device."""
    mesh = sharding.make_mesh()

    def many(a: Any) -> Any:
        def one(_: Any, a: Any) -> Any:
            every = jax.lax.all_gather(a, "workers", tiled=True)
            return every[: a.shape[0]] + every[-1]

        return jax.lax.fori_loop(0, times, one, a)

    there = sharding.device_put_global(np.ones(words * jax.device_count(), np.float32), mesh, P("workers"))
    call = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=P("workers"), out_specs=P("workers"), check_vma=False))
    return best_time(lambda: call(there), 5) / times


def best_time(call: Callable[[], Any], times: int) -> float:
    """Seconds of the fastest of some calls, after one that compiles."""
    seconds = []
    for _ in range(times + 1):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
