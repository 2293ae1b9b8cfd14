"""A program of one process of a mesh, for test_sharding.py: runs a case on all devices and leaves what came out as .npz.

python -m tests.library.on_mesh CASE OUT DEVICES [PROCESSES RANK PORT]
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

CASE, OUT, DEVICES = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import laqjax  # noqa: E402
from laqjax import (  # noqa: E402
    algorithms,
    compressors,
    distributed,
    partition,
    problems,
    sharding,
)
from laqjax._engine import loop  # noqa: E402
from laqjax.samplers import BlockSampler  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
if len(sys.argv) > 4:
    distributed.initialize_distributed(
        f"127.0.0.1:{sys.argv[6]}", int(sys.argv[4]), int(sys.argv[5]), timeout=20, heartbeat=10
    )
KEY = jax.random.key(0)


MEMBERS = "laq", "two_laq", "slaq", "ef21"


def data(workers: int, rows: int) -> laqjax.Shards:
    from experiments.harness import datasets

    train = datasets.load("mnist")
    return partition.partition_data(train.x[: rows * workers], train.y[: rows * workers], workers, "contiguous")


def members(workers: int, rows: int) -> dict[str, laqjax.Algorithm]:
    given: Any = {"lr": 0.02, "num_workers": workers}
    oracle = problems.Softmax(784, 10).oracle()
    return {
        "laq": algorithms.laq(oracle, **given),
        "two_laq": algorithms.two_laq(oracle, **given),
        "slaq": algorithms.slaq(oracle, **given, sampler=BlockSampler(rows // 12)),
        "ef21": algorithms.ef21(oracle, **given, compressor=compressors.top_k(50)),
    }


def facts(out: laqjax.RunResult, workers: int) -> dict[str, Any]:
    state = sharding.unpad_state(out.state, workers)
    leaves = {f"state{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    return {"sent": out.info.sent, "loss": out.info.loss, "bits": out.info.bits_up, **leaves}


def compare(name: str, one: dict[str, Any], many: dict[str, Any]) -> None:
    """Names of what is not bit for bit the same, into a file for each comparison."""
    differs = [key for key in one if not np.array_equal(one[key], many[key])]
    if jax.process_index() == 0:
        (OUT / name).write_text(" ".join(differs))


def reference(rows: int, rounds: int, counts: tuple[int, ...] = (10, 7), names: tuple[str, ...] = MEMBERS) -> None:
    """Every collective that promises it is one device bit for bit, and a sum of floats is not."""
    everywhere = sharding.make_mesh()
    for workers in counts:
        shards = data(workers, rows)
        own = sharding.load_local_shards(
            everywhere,
            workers,
            lambda first, last: jax.tree.map(lambda a: a[first:last], shards),  # noqa: B023
        )
        for name in names:
            alg = members(workers, rows)[name]
            start = problems.Softmax(784, 10).init_params(0)
            alone = facts(laqjax.run(alg, start, shards, rounds, KEY), workers)
            for collective in ("all_gather", "all_to_all") if name in ("laq", "two_laq") else ("all_gather",):
                out = laqjax.run(alg, start, own, rounds, KEY, mesh=everywhere, collective=collective)
                compare(f"{name}-{workers}-{collective}", alone, facts(out, workers))
        alg = algorithms.laq(problems.Softmax(784, 10).oracle(), lr=0.02, num_workers=workers)
        out = laqjax.run(
            alg, problems.Softmax(784, 10).init_params(0), shards, 20, KEY, mesh=everywhere, collective="all_reduce"
        )
        alone = laqjax.run(alg, problems.Softmax(784, 10).init_params(0), shards, 20, KEY)
        compare(f"sums-{workers}", {"sent": alone.info.sent}, {"sent": out.info.sent})
        assert np.allclose(out.info.loss, alone.info.loss, rtol=1e-5)


def family() -> None:
    """Every named algorithm on 4 workers, on 3 devices two of which have a row of padding."""
    from tests.laws import registry
    from tests.support import make_toy

    toy = make_toy(np.float32)
    for name in registry.ROWS:
        alg = registry.make(name, toy)
        options: Any = {"worker_batch_size": 1}
        alone = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, **options)
        out = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, mesh=sharding.make_mesh(), **options)
        compare(name, facts(alone, 4), facts(out, 4))


def swept() -> None:
    """Points and workers on two axes at once, against one axis of points with as many points a device."""
    shards, oracle = data(6, 100), problems.Softmax(784, 10).oracle()
    algs = laqjax.stack_algorithms(
        [algorithms.laq(oracle, lr=0.02, num_workers=6, max_silence=max_silence) for max_silence in (2, 5, 20, 100)]
    )
    keys, start = jax.random.split(KEY, 4), problems.Softmax(784, 10).init_params(0)
    options: Any = {"worker_batch_size": 1, "metrics": ["worker_loss"]}
    alone = laqjax.sweep(
        algs, start, shards, 40, keys, mesh=jax.make_mesh((2,), ("sweep",), devices=jax.devices()[:2]), **options
    )
    for collective in ("all_gather", "all_to_all"):
        both = laqjax.sweep(
            algs, start, shards, 40, keys, mesh=sharding.make_mesh(2, 2), collective=collective, **options
        )
        one, two = (
            {"sent": o.info.sent, "loss": o.info.loss, **o.info.extra, "params": o.state.params} for o in (alone, both)
        )
        compare(f"swept-{collective}", one, two)


def refused() -> None:
    """Leave the refusals of what cannot work, one a line; check the shards that a process loads."""
    shards, oracle = data(4, 20), problems.Softmax(784, 10).oracle()
    alg, start = algorithms.laq(oracle, lr=0.02, num_workers=4), problems.Softmax(784, 10).init_params(0)
    everywhere = sharding.make_mesh()

    def message(call: Any) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        return ""

    six = data(6, 20)

    def few(first: int, last: int) -> laqjax.Shards:
        return laqjax.Shards(*(a[first:last] for a in six))

    other = jax.make_mesh((DEVICES,), ("model",))
    algs = laqjax.stack_algorithms([algorithms.laq(oracle, lr=0.02, num_workers=4, bits=b) for b in (3, 4, 5, 6)])
    keys = jax.random.split(KEY, 4)
    top = algorithms.ef21(oracle, lr=0.02, num_workers=4, compressor=compressors.top_k(5))
    lines = [
        message(lambda: laqjax.run(alg, start, shards, 2, KEY, mesh=other)),
        message(lambda: laqjax.run(alg, start, data(3, 20), 2, KEY, mesh=everywhere)),
        message(lambda: laqjax.run(alg, start, shards, 2, KEY, mesh=everywhere, collective="gossip")),
        message(lambda: laqjax.sweep(algs, start, shards, 2, keys, mesh=sharding.make_mesh(2, 2))),
        message(lambda: laqjax.run(top, start, shards, 2, KEY, mesh=everywhere, collective="all_to_all")),
        message(lambda: sharding.make_mesh(3)),
        message(
            lambda: sharding.load_local_shards(
                everywhere, 6, lambda first, last: few(first, last)._replace(weight=np.zeros((last - first, 20)))
            )
        ),
    ]
    loaded = sharding.load_local_shards(everywhere, 6, few)  # 6 workers on 4 devices: the last two rows are padding
    assert len(loaded.x.addressable_shards) == DEVICES
    assert {part.data.shape[0] for part in loaded.x.addressable_shards} == {2}
    for mine, theirs in zip(loaded, six, strict=True):
        assert np.array_equal(np.asarray(mine)[:6], theirs)
    (OUT / "refused").write_text("\n".join(lines))


def lazy() -> None:
    """A training loop of one's own is `run` bit for bit; parameters of several dtypes."""
    workers, oracle, start = 4, problems.Softmax(784, 10).oracle(), problems.Softmax(784, 10).init_params(0)
    shards, along = data(workers, 100), jax.make_mesh((workers,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def train(tx: Any, params: Any, gradient: Any, steps: int) -> Any:
        specs = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, params), "data")
        places = jax.tree.map(lambda spec: NamedSharding(along, spec), specs)
        state = jax.jit(tx.init, out_shardings=places)(params)
        assert all(leaf.size for leaf in jax.tree.leaves(state))  # orbax, which saves such loops, refuses empty arrays

        def step(params: Any, state: Any, shards: Any) -> Any:
            updates, state = tx.update(gradient(params, shards), state, params)
            return optax.apply_updates(params, updates), state

        step = jax.shard_map(
            step, mesh=along, in_specs=(P(), specs, P("data")), out_specs=(P(), specs), check_vma=False
        )
        step, facts = jax.jit(step), []
        for _ in range(steps):
            params, state = step(params, state, shards)
            facts.append(jax.device_get(state[0])._replace(algorithm_state=None))
        return params, facts

    def flat(params: Any, shards: Any) -> Any:
        return oracle(params, shards, jax.numpy.int32(0)).grad

    def tree(params: Any, shards: Any) -> Any:
        def loss(params: Any) -> Any:
            whole = jax.tree.map(lambda a: a.astype(np.float32), params)
            return oracle(oracle.ravel(whole), shards, jax.numpy.int32(0)).loss

        with jax.numpy_dtype_promotion("standard"):
            return jax.grad(loss)(params)

    vector = oracle.ravel(start)
    for collective in ("all_gather", "all_to_all"):
        tx = optax.chain(
            laqjax.lazy_aggregate("data", workers, bits=4, collective=collective, mean=False), optax.sgd(0.02)
        )
        params, facts = train(tx, vector, flat, 40)
        alg = algorithms.laq(oracle, lr=0.02, num_workers=workers, bits=4, optimizer=optax.sgd(0.02))
        out = laqjax.run(alg, vector, shards, 40, KEY, worker_batch_size=1)
        assert np.allclose(params, out.state.params, rtol=1e-5, atol=1e-6)  # steps are rounded in another place
        mine = {
            "sent": np.stack([fact.sent for fact in facts]),
            "bits": np.stack([fact.bits_up for fact in facts]),
        }
        compare(f"lazy-{collective}", {"sent": out.info.sent, "bits": out.info.bits_up}, mine)
        words = {"all_gather": 3 * (1 + 982), "all_to_all": 3 * (1 + 248 + 1984)}[collective]
        assert [int(fact.bytes_received) for fact in facts] == [4 * words * bool(fact.sent.any()) for fact in facts]
        assert int(facts[-1].total_uploads) == out.info.sent.sum()
    mixed = {"weight": start["weight"].astype(jax.numpy.bfloat16), "bias": start["bias"]}
    tx = optax.chain(laqjax.lazy_aggregate("data", workers, bits=8, quantizer_blocks="leaf"), optax.sgd(0.08))
    params, facts = train(tx, mixed, tree, 10)
    assert jax.tree.map(lambda a: a.dtype, params) == jax.tree.map(lambda a: a.dtype, mixed)
    assert int(facts[0].bits_up[0]) == 2 * 32 + 8 * 7850


def beside() -> None:
    """Parameters split over a second axis, and steps in which one of two workers sends."""
    rng = np.random.default_rng(0)
    params = {"b": np.zeros(6, np.float32), "w": np.ones((8, 6), np.float32)}
    x, y = (rng.normal(size=(16, n)).astype(np.float32) for n in (8, 6))
    scales = np.asarray([[1, 1], [9, 1], [1, 1], [1, 9], [1, 1], [1, 1]], np.float32)

    def train(along: Any, collective: str, cut: Any) -> dict[str, Any]:
        tx = laqjax.lazy_aggregate("data", 2, collective=collective)
        specs = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, params), "data")

        def step(params: Any, state: Any, x: Any, y: Any, scale: Any) -> Any:
            def loss(params: Any) -> Any:
                return jax.numpy.mean((x @ params["w"] + params["b"][None] - y) ** 2) * scale[0]

            direction, state = tx.update(jax.grad(loss)(params), state, params)
            return jax.tree.map(lambda a, step: a - 0.05 * step, params, direction), state

        split = P("data")
        step = jax.shard_map(
            step,
            mesh=along,
            axis_names={"data"},
            in_specs=(P(), specs, split, split, split),
            out_specs=(P(), specs),
            check_vma=False,
        )
        places = jax.tree.map(lambda spec: NamedSharding(along, spec), ({"b": P(), "w": cut}, specs, split))
        now = jax.device_put(params, places[0])
        state = jax.jit(tx.init, out_shardings=places[1])(now)
        step, sent = jax.jit(step, out_shardings=places[:2]), []
        for scale in scales:
            now, state = step(now, state, *jax.device_put((x, y, scale), places[2]))
            sent.append(np.asarray(state.sent))
        return {"sent": np.stack(sent), **jax.device_get(now)}

    kinds, devices = jax.sharding.AxisType, jax.devices()
    alone = train(jax.make_mesh((2,), ("data",), (kinds.Auto,), devices=devices[:2]), "all_gather", P())
    assert {(True, False), (False, True), (False, False)} <= {(bool(a), bool(b)) for a, b in alone["sent"]}
    for kind in (kinds.Auto, kinds.Explicit):  # the compiler splits, or the types say how arrays are split
        along = jax.make_mesh((2, 2), ("data", "model"), (kind, kind))
        for collective in ("all_gather", "all_to_all", "all_reduce") if kind == kinds.Auto else ("all_gather",):
            split = train(along, collective, P(None, "model"))
            assert all(np.allclose(alone[name], split[name], rtol=1e-5, atol=1e-6) for name in params)
            compare(f"beside-{collective}-{kind.name}", {"sent": alone["sent"]}, split)


def resumed() -> None:
    """A long run with checkpoints, to be killed; `PACE` seconds between chunks."""
    shards, oracle = data(6, 50), problems.Softmax(784, 10).oracle()
    alg, everywhere = algorithms.laq(oracle, lr=0.02, num_workers=6), sharding.make_mesh()
    pace = float(os.environ.get("PACE", "0"))
    begun = loop.truncate_info

    def head(info: Any, rounds: int) -> Any:
        time.sleep(pace)
        return begun(info, rounds)

    loop.truncate_info = head
    out = laqjax.run(
        alg,
        problems.Softmax(784, 10).init_params(0),
        shards,
        200,
        KEY,
        mesh=everywhere,
        chunk_size=10,
        checkpoint_dir=OUT / "checkpoints",
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
    laqjax.run(alg, problems.Softmax(784, 10).init_params(0), shards, 2, KEY, mesh=sharding.make_mesh())


if __name__ == "__main__":
    cases: dict[str, Any] = {
        "reference": lambda: reference(6000, 200),
        "smaller": lambda: reference(1000, 200),
        "short": lambda: reference(500, 60, (7,), ("laq",)),
        "swept": swept,
        "refused": refused,
        "family": family,
        "lazy": lazy,
        "beside": beside,
        "resumed": resumed,
        "disagree": disagree,
    }
    cases[CASE]()
