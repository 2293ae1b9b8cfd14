"""A program of one process of a mesh, for test_mesh.py: runs a case on all devices and leaves what came out as .npz.

python tests/on_mesh.py CASE OUT DEVICES [PROCESSES RANK PORT]
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

CASE, OUT, DEVICES = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import numpy as np  # noqa: E402

import laqjax  # noqa: E402
from laqjax import algorithms, compressors, loop, mesh, problems  # noqa: E402
from laqjax.oracle import Blocks  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if len(sys.argv) > 4:
    mesh.initialize(f"127.0.0.1:{sys.argv[6]}", int(sys.argv[4]), int(sys.argv[5]), timeout=20, heartbeat=10)
KEY = jax.random.key(0)


MEMBERS = "laq", "two_laq", "slaq", "ef21"


def data(workers: int, rows: int) -> laqjax.Shards:
    from experiments import datasets

    train = datasets.load("mnist")
    return problems.partition(train.x[: rows * workers], train.y[: rows * workers], workers, "contiguous")


def members(workers: int, rows: int) -> dict[str, laqjax.Algorithm]:
    given: Any = {"lr": 0.02, "num_workers": workers}
    oracle = problems.Softmax(784, 10).oracle()
    return {
        "laq": algorithms.laq(oracle, **given),
        "two_laq": algorithms.two_laq(oracle, **given),
        "slaq": algorithms.slaq(oracle, **given, sampler=Blocks(rows // 12)),
        "ef21": algorithms.ef21(oracle, **given, compressor=compressors.top_k(50)),
    }


def facts(out: laqjax.Output, workers: int) -> dict[str, Any]:
    state = mesh.trim(out.state, workers)
    leaves = {f"state{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    return {"sent": out.info.sent, "loss": out.info.loss, "bits": out.info.bits_up, **leaves}


def compare(name: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    """Names of what is not bit for bit the same, into a file for each comparison."""
    differs = [key for key in one if not np.array_equal(one[key], many[key])]
    if jax.process_index() == 0:
        (OUT / name).write_text(" ".join(differs))


def reference(rows: int, rounds: int, counts: tuple[int, ...] = (10, 7), names: tuple[str, ...] = MEMBERS) -> None:
    """Every exchange that promises it is one device bit for bit, and a sum of floats is not."""
    everywhere = mesh.make()
    for workers in counts:
        shards = data(workers, rows)
        own = mesh.load(everywhere, workers, lambda first, last: jax.tree.map(lambda a: a[first:last], shards))  # noqa: B023
        for name in names:
            alg = members(workers, rows)[name]
            start = problems.Softmax(784, 10).start(0)
            alone = facts(laqjax.run(alg, start, shards, rounds, KEY), workers)
            for exchange in ("messages", "chunked") if name in ("laq", "two_laq") else ("messages",):
                out = laqjax.run(alg, start, own, rounds, KEY, mesh=everywhere, exchange=exchange)
                compare(f"{name}-{workers}-{exchange}", alone, facts(out, workers))
        alg = algorithms.laq(problems.Softmax(784, 10).oracle(), lr=0.02, num_workers=workers)
        out = laqjax.run(alg, problems.Softmax(784, 10).start(0), shards, 20, KEY, mesh=everywhere, exchange="sums")
        alone = laqjax.run(alg, problems.Softmax(784, 10).start(0), shards, 20, KEY)
        compare(f"sums-{workers}", {"sent": alone.info.sent}, {"sent": out.info.sent})
        assert np.allclose(out.info.loss, alone.info.loss, rtol=1e-5)


def family() -> None:
    """Every named algorithm on 4 workers, on 3 devices two of which have a row of padding."""
    import test_laws
    from conftest import make_toy

    toy = make_toy(np.float32)
    for name, row in test_laws.ROWS.items():
        alg = row.factory(toy.oracle, num_workers=4, **{"lr": 0.05} | row.knobs)
        options: Any = {"workers_at_once": 1}
        alone = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, **options)
        out = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, mesh=mesh.make(), **options)
        compare(name, facts(alone, 4), facts(out, 4))


def swept() -> None:
    """Points and workers on two axes at once, against one axis of points with as many points a device."""
    shards, oracle = data(6, 100), problems.Softmax(784, 10).oracle()
    algs = laqjax.stack([algorithms.laq(oracle, lr=0.02, num_workers=6, limit=limit) for limit in (2, 5, 20, 100)])
    keys, start = jax.random.split(KEY, 4), problems.Softmax(784, 10).start(0)
    options: Any = {"workers_at_once": 1, "record": ["worker_loss"]}
    alone = laqjax.sweep(
        algs, start, shards, 40, keys, mesh=jax.make_mesh((2,), ("sweep",), devices=jax.devices()[:2]), **options
    )
    for exchange in ("messages", "chunked"):
        both = laqjax.sweep(algs, start, shards, 40, keys, mesh=mesh.make(2, 2), exchange=exchange, **options)
        one, two = (
            {"sent": o.info.sent, "loss": o.info.loss, **o.info.extra, "params": o.state.params} for o in (alone, both)
        )
        compare(f"swept-{exchange}", one, two)


def refused() -> None:
    """What cannot work is said before anything runs."""
    shards, oracle = data(4, 20), problems.Softmax(784, 10).oracle()
    alg, start = algorithms.laq(oracle, lr=0.02, num_workers=4), problems.Softmax(784, 10).start(0)
    everywhere = mesh.make()

    def message(call: Any) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    other = jax.make_mesh((DEVICES,), ("model",))
    algs = laqjax.stack([algorithms.laq(oracle, lr=0.02, num_workers=4, bits=b) for b in (3, 4, 5, 6)])
    keys = jax.random.split(KEY, 4)
    top = algorithms.ef21(oracle, lr=0.02, num_workers=4, compressor=compressors.top_k(5))
    lines = [
        message(lambda: laqjax.run(alg, start, shards, 2, KEY, mesh=other)),
        message(lambda: laqjax.run(alg, start, data(3, 20), 2, KEY, mesh=everywhere)),
        message(lambda: laqjax.run(alg, start, shards, 2, KEY, mesh=everywhere, exchange="gossip")),
        message(lambda: laqjax.sweep(algs, start, shards, 2, keys, mesh=mesh.make(2, 2))),
        message(lambda: laqjax.run(top, start, shards, 2, KEY, mesh=everywhere, exchange="chunked")),
        message(lambda: mesh.make(3)),
    ]
    (OUT / "refused").write_text("\n".join(lines))


def resumed() -> None:
    """A long run with checkpoints, to be killed; `PACE` seconds between chunks."""
    shards, oracle = data(6, 50), problems.Softmax(784, 10).oracle()
    alg, everywhere = algorithms.laq(oracle, lr=0.02, num_workers=6), mesh.make()
    pace = float(os.environ.get("PACE", "0"))
    begun = loop.head

    def head(info: Any, rounds: int) -> Any:
        time.sleep(pace)
        return begun(info, rounds)

    loop.head = head
    out = laqjax.run(
        alg,
        problems.Softmax(784, 10).start(0),
        shards,
        200,
        KEY,
        mesh=everywhere,
        chunk=10,
        checkpoint=OUT / "checkpoints",
    )
    if jax.process_index() == 0:
        print("whole", flush=True)
    kept = facts(out, 6)
    if jax.process_index() == 0:
        np.savez(OUT / "resumed.npz", **kept)  # pyright: ignore[reportArgumentType]


def disagree() -> None:
    """Process 1 has another step size."""
    shards, oracle = data(4, 20), problems.Softmax(784, 10).oracle()
    alg = algorithms.laq(oracle, lr=0.02 + 0.01 * jax.process_index(), num_workers=4)
    laqjax.run(alg, problems.Softmax(784, 10).start(0), shards, 2, KEY, mesh=mesh.make())


if __name__ == "__main__":
    cases: dict[str, Any] = {
        "reference": lambda: reference(6000, 200),
        "short": lambda: reference(500, 60, (7,), ("laq", "ef21")),
        "swept": swept,
        "refused": refused,
        "family": family,
        "resumed": resumed,
        "disagree": disagree,
    }
    cases[CASE]()
