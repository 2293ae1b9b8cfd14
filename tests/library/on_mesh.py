"""A program of one process of a mesh, for test_sharding.py: runs a case on all devices and leaves what came out as .npz.

python -m tests.library.on_mesh CASE OUT DEVICES [PROCESSES RANK PORT]
"""

import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

CASE, OUT, DEVICES = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
import orbax.checkpoint  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import laqjax  # noqa: E402
from laqjax import (  # noqa: E402
    algorithms,
    compressors,
    distributed,
    local_training,
    partition,
    problems,
    sharding,
)
from laqjax._engine import loop  # noqa: E402
from laqjax._engine.split_parameters import SplitCompressor  # noqa: E402
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


def narrow() -> None:
    """Messages and metrics of 16-bit floats, on four devices as on one."""
    from tests.support import Half

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 6, 5)).astype(np.float32), rng.normal(size=(4, 6)).astype(np.float32)
    shards, everywhere = laqjax.Shards(x, y, np.ones((4, 6), np.float32)), sharding.make_mesh()

    def oracle(dtype: Any) -> Any:
        def loss(params: Any, x: Any, y: Any) -> Any:
            return (x.astype(dtype) @ params - y.astype(dtype)) ** 2

        return laqjax.oracles.from_loss(loss, np.zeros(5, dtype))

    given: Any = {"lr": 0.05, "num_workers": 4}
    rule, memory = laqjax.rules.Always(), laqjax.memories.NoMemory()
    for name, alg in {
        "half": laqjax.assemble(oracle(np.float32), Half(), rule, memory, **given),
        "bfloat16": algorithms.laq(oracle(jax.numpy.bfloat16), **given),
    }.items():
        start = np.zeros(5, alg.oracle.dtype)
        alone = facts(laqjax.run(alg, start, shards, 4, KEY, worker_batch_size=1), 4)
        assert np.all(alone["state0"] != 0)
        for collective in ("all_gather", "all_to_all"):
            options: Any = {"mesh": everywhere, "collective": collective, "worker_batch_size": 1}
            compare(f"{name}-{collective}", alone, facts(laqjax.run(alg, start, shards, 4, KEY, **options), 4))


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


class Regression(NamedTuple):
    """Least squares of four workers, in float64 and NumPy."""

    x: Any
    y: Any
    params: Any

    def gradient(self, params: Any, worker: Any) -> Any:
        rest = self.x[worker] @ params["w"] + params["b"][None] - self.y[worker]
        return {"b": 2 * rest.sum(axis=0) / rest.size, "w": 2 * self.x[worker].T @ rest / rest.size}


def make_regression() -> Regression:
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 16, 8)), rng.normal(size=(4, 16, 6))
    return Regression(x, y, {"b": np.zeros(6), "w": rng.normal(size=(8, 6))})


def adamw(params: Any, moments: Any, grad: Any, step: int, lr: float = 1e-2) -> Any:
    """One step of AdamW on vectors, with the defaults of optax."""
    first, second = 0.9 * moments[0] + 0.1 * grad, 0.999 * moments[1] + 0.001 * grad**2
    scaled = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return params - lr * (scaled + 1e-4 * params), (first, second)


def laq_mean(deltas: Any, state: Any, bits: int, xi: float, window: int = 10) -> Any:
    """One round of LAQ on vectors [M, p]: the mean direction and who sent, with a history of directions."""
    memory, errors, history, margin = state
    innovation = deltas - memory
    step = 2 * np.abs(innovation).max(axis=1, keepdims=True) / (2**bits - 1)
    coded = step * (np.floor(innovation / step + 2 ** (bits - 1)) - (2**bits - 1) / 2)
    error = ((innovation - coded) ** 2).sum(axis=1)
    threshold = xi / window * sum(history[-window:]) / len(deltas) ** 2 + 3 * (error + errors)
    change = (coded**2).sum(axis=1)
    sent = (change >= threshold) | (not history)
    margin = min(margin, *np.abs(change - threshold)) if history else margin
    memory = np.where(sent[:, None], memory + coded, memory)
    total = memory.sum(axis=0)
    return total / len(deltas), sent, (memory, np.where(sent, error, errors), [*history, (total**2).sum()], margin)


def diloco_reference(problem: Regression, steps: int, sync_every: int, bits: int | None, xi: float) -> Any:
    """DiLoCo in NumPy: the parameters of every worker after each step, the outer model, and who sent."""
    start = np.concatenate([problem.params["b"], problem.params["w"].ravel()])
    outer, trace, here = start, np.zeros(54), [start] * 4
    moments: Any = [(np.zeros(54), np.zeros(54))] * 4
    state: Any = np.zeros((4, 54)), np.zeros(4), [], np.inf
    sent, all_params = [], []
    for step in range(1, steps + 1):
        for worker in range(4):
            tree = {"b": here[worker][:6], "w": here[worker][6:].reshape(8, 6)}
            grad = problem.gradient(tree, worker)
            vector = np.concatenate([grad["b"], grad["w"].ravel()])
            here[worker], moments[worker] = adamw(here[worker], moments[worker], vector, step)
        if step % sync_every == 0:
            deltas = outer - np.stack(here)
            mean, who, state = laq_mean(deltas, state, bits, xi) if bits else (deltas.mean(axis=0), [True] * 4, state)
            trace = mean + 0.9 * trace
            outer = outer - 0.7 * (mean + 0.9 * trace)
            here = [outer] * 4
            sent.append(who)
        all_params.append(np.stack(here))
    assert state[-1] > 1e-9  # a difference of who sent is no tie
    return np.stack(all_params), outer, np.array(sent)


def flat(params: Any) -> Any:
    """Parameters with the axis of the workers as vectors [M, p]."""
    return np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(params)], axis=1)


def local_loop(problem: Regression, tx: Any, along: Any) -> Any:
    """A compiled step of a loop with local training, its arguments, and where they are placed."""
    params = local_training.replicate(problem.params, 4)
    specs = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, params), "data")
    split = P("data")
    places = jax.tree.map(lambda spec: NamedSharding(along, spec), ({"b": split, "w": split}, specs))

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        grad = Regression(x, y, None).gradient(jax.tree.map(lambda a: a[0], params), 0)
        updates, state = tx.update(jax.tree.map(lambda a: a[None], grad), state, params)
        return optax.apply_updates(params, updates), state

    step = jax.shard_map(
        step, mesh=along, in_specs=(split, specs, split, split), out_specs=(split, specs), check_vma=False
    )
    return jax.jit(step), *jax.device_put((params, tx.init(params)), places), places


def diloco() -> None:
    """Local training in a loop of one's own is DiLoCo in NumPy; an interrupted loop goes on from its state."""
    problem = make_regression()
    along = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = jax.device_put((problem.x, problem.y), NamedSharding(along, P("data")))
    common: Any = {"axis": "data", "num_workers": 4}

    def train(tx: Any, steps: int) -> Any:
        step, params, state, places = local_loop(problem, tx, along)
        seen, states = [], []
        for _ in range(steps):
            params, state = step(params, state, *data)
            seen.append(flat(params))
            states.append(state)
        return np.stack(seen), states, (step, params, places)

    # one step of plain SGD between synchronizations is data-parallel training
    tx = laqjax.diloco_optimizer(optax.sgd(1.0), sync_every=1, algorithm=algorithms.gd, **common)
    seen, _, _ = train(tx, 5)
    plain, server = problem.params, optax.sgd(0.7, momentum=0.9, nesterov=True)
    outer_state = server.init(plain)
    for row in seen:
        grads = [problem.gradient(plain, worker) for worker in range(4)]
        mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *grads)
        updates, outer_state = server.update(mean, outer_state, plain)
        plain = jax.tree.map(np.asarray, optax.apply_updates(plain, updates))
        expected = np.concatenate([plain["b"], plain["w"].ravel()])
        np.testing.assert_allclose(row, np.stack([expected] * 4), rtol=1e-12, atol=1e-14)

    for bits, xi in ((None, 0.0), (4, 0.1)):
        sends: Any = {"algorithm": algorithms.gd} if bits is None else {"bits": bits, "xi": xi}
        tx = optax.chain(optax.identity(), laqjax.diloco_optimizer(optax.adamw(1e-2), sync_every=3, **sends, **common))
        seen, states, (step, _, places) = train(tx, 31)
        expected, outer, sent = diloco_reference(problem, 31, 3, bits, xi)
        np.testing.assert_allclose(seen, expected, rtol=1e-12, atol=1e-12)
        collapsed = local_training.collapse(states[-1])
        np.testing.assert_allclose(np.concatenate([collapsed["b"], np.ravel(collapsed["w"])]), outer, rtol=1e-12)
        masks = np.stack([state[-1].aggregate_state.sent for state in states])
        np.testing.assert_array_equal(masks[2::3], sent)
        assert not masks[0::3].any()
        assert not masks[1::3].any()
        size = 54 * 8 if bits is None else 8 + 27
        up = np.stack([state[-1].aggregate_state.bytes_up for state in states])
        np.testing.assert_array_equal(up, masks * size)
        for k in range(2, 31, 3):  # set, not added: bit for bit the outer model on every device
            model = local_training.collapse(states[k])
            vector = np.concatenate([model["b"], np.ravel(model["w"])])
            np.testing.assert_array_equal(seen[k], np.stack([vector] * 4))
    assert 0.2 < sent.mean() < 0.95, sent.mean()

    kept = unflat(seen[9]), states[9]  # between two synchronizations
    store = orbax.checkpoint.StandardCheckpointer()
    store.save(OUT / "checkpoint", kept)
    store.wait_until_finished()
    like = jax.tree.map(lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at), kept, places[:2])
    params, state = store.restore(OUT / "checkpoint", like)
    for k in range(10, 31):
        params, state = step(params, state, *data)
        np.testing.assert_array_equal(flat(params), seen[k])
    (OUT / "diloco").write_text("")


def split(more: bool = False) -> None:
    """Parameters that a second manual axis splits, and steps in which one of two workers sends; `more` methods."""
    problem = make_regression()
    kind, devices = jax.sharding.AxisType.Auto, jax.devices()
    whole = jax.make_mesh((2,), ("data",), (kind,), devices=devices[:2])
    both = jax.make_mesh((2, 2), ("data", "model"), (kind, kind), devices=devices[:4])
    param_specs = {"b": P(), "w": P(None, "model")}
    scales = np.array([[1, 1], [9, 1], [1, 1], [1, 9], [1, 1], [1, 1], [1, 3], [3, 1]], np.float64)

    def train(
        make: Any, parts: bool = False, is_split: bool = False, locally: bool = False, other: str = "", **options: Any
    ) -> Any:
        """Final parameters, who sent what in each step, and the state.

        The parameters are whole, two halves of "w" (`parts`), or split over the axis "model" (`is_split`); each worker
        has its own with local training. The compiler splits "w" over a third axis (`other`).
        """
        params, specs_of_params = problem.params, jax.tree.map(lambda leaf: P(), problem.params)
        if parts:
            params = {"b": params["b"], "w0": params["w"][:, :3], "w1": params["w"][:, 3:]}
            specs_of_params = jax.tree.map(lambda leaf: P(), params)
        if is_split:
            specs_of_params = param_specs
            options = options | {"param_specs": param_specs}
        tx, along = make(**options), both if is_split else whole
        manual = set(along.axis_names)
        if other:
            along = jax.make_mesh((2, 2, 2), ("data", "model", other), (kind,) * 3)
        if locally:
            params = local_training.replicate(params, 2)
            specs_of_params = jax.tree.map(lambda spec: P("data", *spec), specs_of_params)
        specs = laqjax.aggregation.partition_specs(
            jax.eval_shape(tx.init, params), "data", param_specs if is_split else None
        )

        def gradient(params: Any, x: Any, y: Any) -> Any:
            b, w = params["b"], jax.numpy.concatenate([params["w0"], params["w1"]], axis=1) if parts else params["w"]
            if is_split:
                b = jax.lax.dynamic_slice(b, (3 * jax.lax.axis_index("model"),), (3,))
            rest = 2 * (x @ w + b[None] - y) / (16 * 6)
            grad = {"b": rest.sum(axis=0), "w": x.T @ rest}
            if is_split:
                grad["b"] = jax.lax.all_gather(grad["b"], "model", tiled=True)
            return {"b": grad["b"], "w0": grad["w"][:, :3], "w1": grad["w"][:, 3:]} if parts else grad

        def step(params: Any, state: Any, x: Any, y: Any, scale: Any) -> Any:
            mine = jax.tree.map(lambda a: a[0], params) if locally else params
            grad = jax.tree.map(lambda a: a * scale[0], gradient(mine, x[0], y[0]))
            grad = jax.tree.map(lambda a: a[None], grad) if locally else grad
            updates, state = tx.update(grad, state, params)
            return optax.apply_updates(params, updates), state

        rows = P("data", None, "model") if is_split else P("data")
        step = jax.shard_map(
            step,
            mesh=along,
            axis_names=manual,
            in_specs=(specs_of_params, specs, P("data"), rows, P("data")),
            out_specs=(specs_of_params, specs),
            check_vma=False,
        )
        placed = specs_of_params | ({"w": P(other, "model")} if other else {})
        places = jax.tree.map(lambda spec: NamedSharding(along, spec), (placed, specs))
        params, state = jax.device_put((params, tx.init(params)), places)
        data = jax.device_put(problem.x[:2], NamedSharding(along, P("data")))
        targets = jax.device_put(problem.y[:2], NamedSharding(along, rows))
        step, seen = jax.jit(step, out_shardings=places), []
        for scale in scales:
            params, state = step(params, state, data, targets, jax.device_put(scale, NamedSharding(along, P("data"))))
            here = lazy_state(state)
            seen.append((np.asarray(here.sent), here.bits_up, int(here.bytes_received)))
        for copy in params["b"].addressable_shards:  # the same on all devices of a worker
            np.testing.assert_array_equal(copy.data, params["b"][copy.index])
        params = jax.device_get(params)
        if parts:
            params = {"b": params["b"], "w": np.concatenate([params["w0"], params["w1"]], axis=1)}
        return params, np.stack([sent for sent, _, _ in seen]), np.stack([bits for _, bits, _ in seen]), state

    def lazy_state(state: Any) -> Any:
        return state.aggregate_state if isinstance(state, local_training.DilocoState) else state[0]

    def lazily(method: Any, **settings: Any) -> Any:
        return lambda **options: optax.chain(
            laqjax.lazy_aggregate("data", 2, method, **settings, **options), optax.sgd(0.05, momentum=0.5)
        )

    def compare_runs(name: str, one: Any, two: Any) -> None:
        for leaf in one[0]:
            np.testing.assert_allclose(two[0][leaf], one[0][leaf], rtol=1e-9, atol=1e-9, err_msg=name)
        states = [lazy_state(run[-1]).algorithm_state for run in (one, two)]
        norms = [jax.tree.leaves((state.rule_state, state.workers.rule_state)) for state in states]
        for mine, other in zip(*norms, strict=True):  # of directions and of errors
            np.testing.assert_allclose(other, mine, rtol=1e-9, err_msg=name)
        compare(name, {"sent": one[1], "bits": one[2]}, {"sent": two[1], "bits": two[2]})

    laq = lazily(algorithms.laq, bits=4)
    alone = train(laq)
    assert {(True, False), (False, True), (False, False)} <= {(bool(a), bool(b)) for a, b in alone[1]}
    placed = {name: NamedSharding(both, spec) for name, spec in {"b": P(), "w": P("model")}.items()}
    otherwise = jax.device_put(problem.params, placed)
    with pytest.raises(ValueError, match="that is placed by"):
        laq(param_specs=param_specs).init(otherwise)
    for collective in ("all_to_all", "all_reduce") if more else ("all_gather",):
        here = train(laq, is_split=True, collective=collective)
        compare_runs(f"laq-{collective}", alone, here)
        memory = here[-1][0].algorithm_state.workers.memory_state.tree["w"]
        assert memory.shape == (2, 8, 6)
        assert memory.sharding.spec == P("data", None, "model")
    if not more:
        compare_runs("laq-beside", alone, train(laq, is_split=True, other="other"))
    methods = {
        "leaf": lazily(algorithms.laq, bits=4, quantizer_blocks="leaf"),
        "lag": lazily(algorithms.lag_wk),
        "small": lazily(algorithms.laq, bits=4, skip_small=7),
    }
    for name, make in methods.items() if more else [("qgd", lazily(algorithms.qgd, bits=3))]:
        compare_runs(name, train(make), train(make, is_split=True))
    if more:
        train(lazily(algorithms.qsgd, levels=3), is_split=True)
        draws = SplitCompressor(compressors.qsgd(3), (((40, ()),), ((40, ("model",)),)), ("model",))
        keys = laqjax.types.RoundKeys(KEY, KEY, KEY, jax.numpy.int32(1), jax.numpy.int32(0))

        def draw(target: Any) -> Any:
            payload = draws.encode(target, keys)
            return [payload[block]["level"] for block in "01"]

        draw = jax.shard_map(draw, mesh=both, in_specs=P(), out_specs=P("model"), check_vma=False)
        (first, same), (part, other) = ((level[:40], level[40:]) for level in draw(np.ones(80)))
        np.testing.assert_array_equal(first, same)  # a leaf that is not split
        assert not np.array_equal(part, other)
        return
    ef21 = lazily(algorithms.ef21, compressor=compressors.top_k(3))
    compare_runs("ef21", train(ef21, parts=True, quantizer_blocks="leaf"), train(ef21, is_split=True))

    def local(**options: Any) -> Any:
        common: Any = {"axis": "data", "num_workers": 2, "sync_every": 2, "bits": 4, "xi": 0.1}
        return laqjax.diloco_optimizer(optax.adamw(1e-2), **common, **options)

    one, two = train(local, locally=True), train(local, locally=True, is_split=True)
    compare_runs("diloco", one, two)
    model = local_training.collapse(two[-1])
    for name, leaf in two[0].items():
        np.testing.assert_array_equal(leaf, np.stack([model[name]] * 2))


def unflat(rows: Any) -> Any:
    """Vectors [M, p] as parameters with the axis of the workers."""
    return {"b": rows[:, :6], "w": rows[:, 6:].reshape(-1, 8, 6)}


def resumed(locally: bool = False) -> None:
    """A long run with checkpoints, to be killed; `PACE` seconds between chunks. It is of LAQ, or of DiLoCo (`locally`)."""
    shards, oracle = data(6, 50), problems.Softmax(784, 10).oracle()
    alg, everywhere = algorithms.laq(oracle, lr=0.02, num_workers=6), sharding.make_mesh()
    if locally:
        alg = algorithms.diloco(oracle, num_workers=6, num_local_steps=2, local_lr=1e-3)
    pace = float(os.environ.get("PACE", "0"))
    begun, computed = loop.truncate_info, []

    def head(info: Any, rounds: int) -> Any:
        time.sleep(pace)
        computed.append(rounds)
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
    if locally:  # AdamW of all workers has made every step
        np.testing.assert_array_equal(sharding.unpad_state(out.state, 6).workers.oracle_state[0].count, [400] * 6)
    if jax.process_index() == 0:
        np.savez(OUT / "resumed.npz", **kept)  # pyright: ignore[reportArgumentType]
        (OUT / "computed").write_text(str(sum(computed)))


def disagree() -> None:
    """Process 1 has another step size."""
    shards, oracle = data(4, 20), problems.Softmax(784, 10).oracle()
    alg = algorithms.laq(oracle, lr=0.02 + 0.01 * jax.process_index(), num_workers=4)
    laqjax.run(alg, problems.Softmax(784, 10).init_params(0), shards, 2, KEY, mesh=sharding.make_mesh())


if __name__ == "__main__":
    cases: dict[str, Any] = {
        "reference": lambda: reference(6000, 200),
        "smaller": lambda: reference(1000, 200),
        "short": lambda: (reference(500, 60, (7,), ("laq",)), narrow()),
        "swept": swept,
        "refused": refused,
        "family": family,
        "lazy": lazy,
        "beside": beside,
        "diloco": diloco,
        "split": split,
        "split_more": lambda: split(more=True),
        "resumed": resumed,
        "resumed_locally": lambda: resumed(locally=True),
        "disagree": disagree,
    }
    cases[CASE]()
