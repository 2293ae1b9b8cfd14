"""Workloads of `experiments.bench`, in groups that take turns."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import laqjax
from experiments.harness import datasets
from experiments.harness.processes import count_available_cores
from laqjax import compressors

GEMM = 2048  # rows and columns
STREAM = 2**26  # floats
CLASSES = 10
FLOPS = {"softmax": 4 * 60000 * 784 * 10, "network": 3.8e10}  # of one round: the products, forward and backward
BITS = {"softmax": 4, "network": 8}
PROBLEMS = {"softmax": laqjax.problems.Softmax, "network": laqjax.problems.TwoLayerNetwork}


@dataclass(frozen=True)
class Workload:
    """Call that runs some rounds of `flops` floating-point operations each and returns when they are done."""

    call: Callable[[], Any]
    rounds: int = 1
    flops: float | None = None


def repeat(call: Callable[[], Any], times: int, flops: float | None = None) -> Workload:
    """Create a workload from a call that runs one round."""
    return Workload(lambda: [jax.block_until_ready(call()) for _ in range(times)], times, flops)


# ---- laqjax ---------------------------------------------------------------------------------------------------------


def run_workload(shards: laqjax.Shards, kind: str, rounds: int, algorithm: str = "laq") -> Workload:
    """Create a workload of `laqjax.run`."""
    problem = PROBLEMS[kind](shards.x.shape[-1], CLASSES)
    oracle, knobs = problem.oracle(), {"bits": BITS[kind]} if algorithm == "laq" else {}
    alg = getattr(laqjax.algorithms, algorithm)(oracle, lr=0.02, num_workers=len(shards.x), **knobs)
    theta0, key = problem.init_vector(oracle), jax.random.key(0)
    return Workload(lambda: laqjax.run(alg, theta0, shards, rounds, key), rounds, FLOPS[kind])


def sweep_workload(shards: laqjax.Shards, kind: str, points: int, rounds: int) -> Workload:
    """Create a workload of `laqjax.sweep` over limits; its round is one round of one point."""
    problem = PROBLEMS[kind](shards.x.shape[-1], CLASSES)
    oracle = problem.oracle()
    knobs: dict[str, Any] = {"lr": 0.02, "num_workers": len(shards.x), "bits": BITS[kind]}
    algs = laqjax.stack_algorithms([laqjax.algorithms.laq(oracle, max_silence=10 + i, **knobs) for i in range(points)])
    theta0, keys = problem.init_vector(oracle), jax.random.split(jax.random.key(0), points)
    call = partial(laqjax.sweep, algs, theta0, shards, rounds, keys, batch_size=points)
    return Workload(call, rounds * points, FLOPS[kind])


def checkpoint_workload(shards: laqjax.Shards, every: int | None) -> Workload:
    """Create a workload of 1000 rounds of LAQ on softmax regression, with a checkpoint every so many or without."""
    problem = laqjax.problems.Softmax(shards.x.shape[-1], CLASSES)
    alg = laqjax.algorithms.laq(problem.oracle(), lr=0.02, num_workers=len(shards.x), bits=BITS["softmax"])
    run = partial(laqjax.run, alg, problem.init_params(0), shards, 1000, jax.random.key(0), chunk_size=100)

    def call() -> None:
        with TemporaryDirectory() as folder:
            run(checkpoint_dir=folder if every else None, checkpoint_every=every)

    return Workload(call, 1000, FLOPS["softmax"])


def flax_kernel_workload(shards: laqjax.Shards) -> Workload:
    """Create a workload of softmax regression with a kernel [in, out] and scaled pixels, as in flax."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = x.astype(jnp.float32) / 255 @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    params = {"bias": jnp.zeros(CLASSES), "kernel": jnp.zeros((shards.x.shape[-1], CLASSES))}
    oracle = laqjax.oracles.from_loss(loss, params, l2=0.01)
    alg = laqjax.algorithms.laq(oracle, lr=0.02, num_workers=len(shards.x), bits=BITS["softmax"])
    return Workload(lambda: laqjax.run(alg, params, shards, 20, jax.random.key(0)), 20, FLOPS["softmax"])


def cnn_workload(shards: laqjax.Shards, form: str) -> Workload:
    """Create a workload of a small CNN on 64 images a worker: LAQ, a sweep of four points, or plain gradients."""
    import flax.linen as nn  # here: optional

    flatten = [lambda x: x.reshape(len(x), -1), nn.Dense(64), nn.relu, nn.Dense(CLASSES)]
    model = nn.Sequential([nn.Conv(16, (5, 5), 2), nn.relu, nn.Conv(32, (5, 5), 2), nn.relu, *flatten])
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = model.apply(params, x.reshape(-1, 28, 28, 1).astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), y)

    few = laqjax.Shards(*(jnp.asarray(np.asarray(a)[:, :64]) for a in shards))
    workers, rounds, key = len(few.x), 10, jax.random.key(0)
    if form == "calls":  # vmap, the other plain form, takes more than twice as long
        gradient = jax.jit(jax.value_and_grad(lambda params, x, y: jnp.mean(loss(params, x, y))))
        data = list(zip(few.x, few.y, strict=True))
        return repeat(lambda: [gradient(params, x, y) for x, y in data], rounds)
    oracle, points = laqjax.oracles.from_loss(loss, params), 4
    algs = [laqjax.algorithms.laq(oracle, lr=0.01 * (i + 1), num_workers=workers) for i in range(points)]
    if form == "laq":
        return Workload(lambda: laqjax.run(algs[0], params, few, rounds, key, chunk_size=rounds), rounds)
    stacked, keys = laqjax.stack_algorithms(algs), jax.random.split(key, points)
    return Workload(lambda: laqjax.sweep(stacked, params, few, rounds, keys, chunk_size=rounds), rounds * points)


def large_model_workload(_: laqjax.Shards, hidden: int, form: str) -> Workload:
    """Create a workload of a 784-hidden-10 network on 8 workers of 32 rows: LAQ, GD, or a plain scan over workers."""
    workers, rounds, rng = 8, 8, np.random.default_rng(0)
    problem = laqjax.problems.TwoLayerNetwork(784, CLASSES, hidden, l2=0)
    oracle, key = problem.oracle(), jax.random.key(0)
    x, y = rng.integers(0, 256, (workers, 32, 784)), rng.integers(0, CLASSES, (workers, 32))
    data = laqjax.Shards(jnp.asarray(x, jnp.uint8), jnp.asarray(y, jnp.int32), jnp.ones((workers, 32)))
    theta = problem.init_vector(oracle)
    if form != "plain":
        alg = getattr(laqjax.algorithms, form)(oracle, lr=0.02, num_workers=workers)
        state = alg.init(theta)

        def call() -> None:  # continues from the last state, as a long run does: a new state costs as much as a round
            nonlocal state
            for out in laqjax.stream(alg, state, data, rounds, key, chunk_size=rounds):
                state = out.state

        return Workload(call, rounds)

    @jax.jit
    def plain(theta: Any, data: Any) -> Any:
        def one(theta: Any, _: Any) -> Any:
            def worker(total: Any, m: Any) -> Any:
                loss, grad, _ = oracle(theta, data, m)
                return total + grad, loss

            total, losses = jax.lax.scan(worker, jnp.zeros_like(theta), jnp.arange(workers, dtype=jnp.int32))
            return theta - 0.02 * total, jnp.mean(losses)

        return jax.lax.scan(one, theta, length=rounds)

    return Workload(lambda: jax.block_until_ready(plain(theta, data)), rounds)


def wire_workload(_: laqjax.Shards, form: str) -> Workload:
    """Create a workload that encodes 10^6 coordinates in 4 bits and packs them into bytes, or reads them back."""
    scheme, target = compressors.grid(4), jnp.asarray(np.random.default_rng(0).standard_normal(10**6, np.float32))
    encode = jax.jit(lambda target: scheme.encode(target, None))
    data = compressors.to_bytes(scheme, encode(target), target)
    calls = {
        "pack": lambda: compressors.to_bytes(scheme, encode(target), target),
        "read": lambda: compressors.from_bytes(scheme, data, target),
    }
    return repeat(calls[form], 50)


def federation_workload(shards: laqjax.Shards, form: str) -> Workload:
    """Create a workload of LAQ with one image a worker: federation rounds in one process, or their gradients alone."""
    from laqjax import federation  # here: optional
    from laqjax.federation.testing import InProcessGrid

    few, problem = jax.tree.map(lambda array: np.asarray(array)[:, :1], shards), laqjax.problems.Softmax(784, CLASSES)
    oracle = problem.oracle()
    alg = laqjax.algorithms.laq(oracle, lr=0.02, num_workers=len(few.x), bits=BITS["softmax"])
    if form == "gradients":  # one call a worker, as its client makes one
        gradient = jax.jit(lambda params, data: oracle(params, data, jnp.int32(0)))
        params = problem.init_vector(oracle)
        data = [jax.tree.map(lambda array, m=m: jnp.asarray(array[m : m + 1]), few) for m in range(alg.num_workers)]
        return Workload(lambda: [jax.block_until_ready(gradient(params, one)) for one in data * 40], 40)
    client = federation.client_app(alg, lambda m: jax.tree.map(lambda array: array[m : m + 1], few))
    server = federation.FederatedServer(alg, problem.init_params(0), jax.random.key(0))
    nodes = InProcessGrid(client, range(alg.num_workers))
    next(server.run(nodes, 1))  # registers the workers
    return Workload(lambda: [server.run_round(nodes) for _ in range(40)], 40)


# ---- baselines ------------------------------------------------------------------------------------------------------


def gemm() -> Workload:
    """Create a workload of a square matrix product, the unit of rates."""
    a = jnp.asarray(np.random.default_rng(0).random((GEMM, GEMM), np.float32))
    product = jax.jit(jnp.matmul)
    return repeat(lambda: product(a, a), 4, 2 * GEMM**3)


def stream(_: laqjax.Shards) -> Workload:
    """Create a workload that reads and writes a large array in place: new pages would cost more than the traffic."""
    add, array = jax.jit(lambda a: a + 1, donate_argnums=0), jnp.zeros(STREAM, jnp.float32)

    def call() -> Any:
        nonlocal array
        array = add(array)
        return array

    return repeat(call, 8)


def autodiff_baseline(shards: laqjax.Shards) -> Workload:
    """Create a workload of plain losses and gradients: float32 images, vmap over the workers."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(x @ params["weight"] + params["bias"]) * y, axis=-1))

    data = [jnp.asarray(a) for a in to_float_arrays(shards, np.float32)]
    params = {"bias": jnp.zeros(CLASSES), "weight": jnp.zeros((data[0].shape[-1], CLASSES))}
    grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))
    return repeat(lambda: grads(params, *data), 8)


def numpy_laq(shards: laqjax.Shards) -> Workload:
    """Create a workload of LAQ in NumPy, float64."""
    data, theta = to_float_arrays(shards, np.float64), init_params(shards)
    return Workload(lambda: laq_reference(np, *data, theta, rounds=3), 3)


def pytorch_laq(shards: laqjax.Shards) -> Workload:
    """Create a workload of LAQ in PyTorch, float32, on all cores."""
    import torch  # here: optional, and seconds to import

    torch.set_num_threads(count_available_cores())
    arrays = (*to_float_arrays(shards, np.float32), init_params(shards).astype(np.float32))
    images, onehot, theta = (torch.from_numpy(a) for a in arrays)
    return Workload(lambda: laq_reference(torch, images, onehot, theta, rounds=8), 8)


def laq_reference(xp: Any, images: Any, onehot: Any, theta: Any, rounds: int) -> list[tuple[Any, Any]]:
    """Run LAQ on softmax regression with `xp` = NumPy or PyTorch; return (loss, sent [M]) of each round.

    Shapes: images [M, N, features], onehot [M, N, classes], theta [p] = bias, weight [classes, features]. The two
    products have the fastest form of those tried in both libraries.
    """
    workers, n, classes = onehot.shape
    lr, l2, xi, window, max_silence, half = 0.02, 0.01, 0.8, 10, 100, 2 ** (BITS["softmax"] - 1)
    memory, aggregate, motion = xp.stack([0 * theta] * workers), 0 * theta, [0.0] * window
    last_error, silence = memory[:, 0], memory[:, 0] + max_silence
    history = []
    for _ in range(rounds):
        logits = images @ theta[classes:].reshape(classes, -1).T + theta[:classes]
        logits = logits - xp.amax(logits, 2)[..., None]
        exps = xp.exp(logits)
        sums = exps.sum(2)[..., None]
        losses = (xp.log(sums).sum((1, 2)) - (logits * onehot).sum((1, 2))) / n + l2 / 2 * (theta**2).sum()
        residual = (exps / sums - onehot) / n
        products = (residual.swapaxes(1, 2) @ images).reshape(workers, -1)
        target = xp.concatenate([residual.sum(1), products], 1) + l2 * theta - memory
        step = 2 * xp.amax(xp.abs(target), 1)[:, None] / (2 * half - 1)
        innovation = step * (xp.floor(target / step + half) - half + 0.5)
        error = ((target - innovation) ** 2).sum(1)
        threshold = xi / window * sum(motion) / (lr * workers) ** 2 + 3 * (error + last_error)
        sent = ((innovation**2).sum(1) >= threshold) | (silence >= max_silence)
        innovation = innovation * sent[:, None]
        memory, aggregate = memory + innovation, aggregate + innovation.sum(0)
        last_error, silence = xp.where(sent, error, last_error), xp.where(sent, 0 * silence, silence + 1)
        theta = theta - lr * aggregate
        motion = [float(((lr * aggregate) ** 2).sum()), *motion[:-1]]
        history.append((losses.mean(), sent))
    return history


def to_float_arrays(shards: laqjax.Shards, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """Convert shards to images in 0..1 and one-hot labels."""
    return np.divide(shards.x, 255, dtype=dtype), np.eye(CLASSES, dtype=dtype)[np.asarray(shards.y)]


def init_params(shards: laqjax.Shards) -> np.ndarray:
    """Return the initial parameters of softmax regression as a float64 vector."""
    params = laqjax.problems.Softmax(shards.x.shape[-1], CLASSES).init_params(0, np.float64)
    return np.concatenate([params["bias"], params["weight"].ravel()])


def load_mnist() -> laqjax.Shards:
    """Load the reference data: 10 workers, 6000 images each."""
    data = datasets.load("mnist")
    return laqjax.partition_data(data.x, data.y, 10, "contiguous")


def make_forms(prefix: str, make: Callable[..., Workload], *forms: str, **options: Any) -> dict[str, Any]:
    """Return workloads of one function, by the prefix and the form of each."""
    return {f"{prefix}-{form}": partial(make, form=form, **options) for form in forms}


# Each group takes turns with a GEMM of its own. A call takes half a second to a second.
WORKLOAD_GROUPS: dict[str, dict[str, Callable[[laqjax.Shards], Workload]]] = {
    "softmax": {
        "stream": stream,
        "laq": partial(run_workload, kind="softmax", rounds=20),
        "gd": partial(run_workload, kind="softmax", rounds=20, algorithm="gd"),
        "plain": autodiff_baseline,
        "numpy": numpy_laq,
        "pytorch": pytorch_laq,
    },
    "network": {
        "network-laq": partial(run_workload, kind="network", rounds=2),
        "network-gd": partial(run_workload, kind="network", rounds=2, algorithm="gd"),
    },
    "sweep": {
        "one": partial(run_workload, kind="softmax", rounds=20),
        "sweep-16": partial(sweep_workload, kind="softmax", points=16, rounds=8),
        "sweep-64": partial(sweep_workload, kind="softmax", points=64, rounds=4),
    },
    "kernel": {"out-in": partial(run_workload, kind="softmax", rounds=20), "in-out": flax_kernel_workload},
    "cnn": make_forms("cnn", cnn_workload, "calls", "laq", "sweep"),
    "million": make_forms("million", large_model_workload, "plain", "gd", "laq", hidden=1258),
    "ten": make_forms("ten-million", large_model_workload, "plain", "gd", "laq", hidden=12579),
    "checkpoint": {
        "unsaved": partial(checkpoint_workload, every=None),
        "saved": partial(checkpoint_workload, every=100),
    },
    "message": make_forms("message", wire_workload, "pack", "read"),
    "federation": make_forms("federation", federation_workload, "round", "gradients"),
    "network-sweep": {"network-sweep-8": partial(sweep_workload, kind="network", points=8, rounds=2)},
}
