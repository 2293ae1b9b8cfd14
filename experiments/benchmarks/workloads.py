"""What `experiments.bench` measures: contestants, whose calls do so many rounds each, in groups."""

import os
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
from laqjax import compressors

GEMM = 2048  # rows and columns
STREAM = 2**26  # floats
CLASSES = 10
FLOPS = {"softmax": 4 * 60000 * 784 * 10, "network": 3.8e10}  # of one round: the products, forward and backward
BITS = {"softmax": 4, "network": 8}


@dataclass(frozen=True)
class Workload:
    """`call` does `saved_rounds` rounds of `flops` floating-point operations each, and returns when they are done."""

    call: Callable[[], Any]
    rounds: int = 1
    flops: float | None = None


# ---- contestants ----------------------------------------------------------------------------------------------------


def run_workload(shards: laqjax.Shards, kind: str, algorithm: str, rounds: int, **knobs: Any) -> Workload:
    """`laqjax.run`, with all that it does."""
    problem = getattr(laqjax.problems, {"network": "TwoLayerNetwork"}.get(kind, kind.capitalize()))(
        shards.x.shape[-1], CLASSES
    )
    oracle = problem.oracle()
    alg = getattr(laqjax.algorithms, algorithm)(oracle, lr=0.02, num_workers=len(shards.x), **knobs)
    theta0, key = problem.init_vector(oracle), jax.random.key(0)
    run = repeat(lambda: laqjax.run(alg, theta0, shards, rounds, key), 1)
    return Workload(run.call, rounds, FLOPS[kind])


def checkpoint_workload(shards: laqjax.Shards, every: int | None) -> Workload:
    """1000 rounds of LAQ on softmax regression, with a checkpoint every so many of them, or with none."""
    problem = laqjax.problems.Softmax(shards.x.shape[-1], CLASSES)
    alg = laqjax.algorithms.laq(problem.oracle(), lr=0.02, num_workers=len(shards.x), bits=BITS["softmax"])
    key = jax.random.key(0)

    def call() -> None:
        with TemporaryDirectory() as folder:
            place = folder if every else None
            laqjax.run(
                alg,
                problem.init_params(0),
                shards,
                1000,
                key,
                chunk_size=100,
                checkpoint_dir=place,
                checkpoint_every=every,
            )

    return Workload(call, 1000, FLOPS["softmax"])


def sweep_workload(shards: laqjax.Shards, kind: str, points: int, rounds: int) -> Workload:
    """`laqjax.sweep` over limits, with all that it does; a round is one round of one point."""
    problem = getattr(laqjax.problems, {"network": "TwoLayerNetwork"}.get(kind, kind.capitalize()))(
        shards.x.shape[-1], CLASSES
    )
    oracle = problem.oracle()
    knobs: dict[str, Any] = {"lr": 0.02, "num_workers": len(shards.x), "bits": BITS[kind]}
    algs = laqjax.stack_algorithms([laqjax.algorithms.laq(oracle, max_silence=10 + i, **knobs) for i in range(points)])
    theta0, keys = problem.init_vector(oracle), jax.random.split(jax.random.key(0), points)
    run = repeat(lambda: laqjax.sweep(algs, theta0, shards, rounds, keys, batch_size=points), 1)
    return Workload(run.call, rounds * points, FLOPS[kind])


def transposed_kernel_workload(shards: laqjax.Shards) -> Workload:
    """Softmax regression with its kernel stored [in, out] and pixels divided, as one writes it in flax."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = x.astype(jnp.float32) / 255 @ params["kernel"] + params["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    params = {"bias": jnp.zeros(CLASSES), "kernel": jnp.zeros((shards.x.shape[-1], CLASSES))}
    oracle = laqjax.oracles.from_loss(loss, params, l2=0.01)
    alg = laqjax.algorithms.laq(oracle, lr=0.02, num_workers=len(shards.x), bits=BITS["softmax"])
    run = repeat(lambda: laqjax.run(alg, params, shards, 20, jax.random.key(0)), 1)
    return Workload(run.call, 20, FLOPS["softmax"])


def cnn_workload(shards: laqjax.Shards, form: str) -> Workload:
    """Two 5x5 convolutions with stride 2 and two dense layers on 64 images a worker: LAQ, four points of it, or gradients."""
    import flax.linen as nn  # here: optional

    flatten = [lambda x: x.reshape(len(x), -1), nn.Dense(64), nn.relu, nn.Dense(CLASSES)]
    model = nn.Sequential([nn.Conv(16, (5, 5), 2), nn.relu, nn.Conv(32, (5, 5), 2), nn.relu, *flatten])
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = model.apply(params, x.reshape(-1, 28, 28, 1).astype(jnp.float32) / 255)
        return optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), y)

    few = laqjax.Shards(*(jnp.asarray(np.asarray(a)[:, :64]) for a in shards))
    workers, rounds, key = len(few.x), 10, jax.random.key(0)
    if form == "calls":  # the better of two plain forms: vmap takes more than twice as long
        gradient = jax.jit(jax.value_and_grad(lambda params, x, y: jnp.mean(loss(params, x, y))))
        data = list(zip(few.x, few.y, strict=True))
        return Workload(repeat(lambda: [gradient(params, x, y) for x, y in data], rounds).call, rounds)
    oracle, points = laqjax.oracles.from_loss(loss, params), 4
    algs = [laqjax.algorithms.laq(oracle, lr=0.01 * (i + 1), num_workers=workers) for i in range(points)]
    if form == "laq":
        return Workload(lambda: laqjax.run(algs[0], params, few, rounds, key, chunk_size=rounds), rounds)
    stacked, keys = laqjax.stack_algorithms(algs), jax.random.split(key, points)
    return Workload(lambda: laqjax.sweep(stacked, params, few, rounds, keys, chunk_size=rounds), rounds * points)


def large_model_workload(hidden: int, form: str) -> Workload:
    """784-hidden-10 on 8 workers of 32 rows: LAQ, GD, or a plain scan over the workers on the flat vector."""
    workers, rounds, rng = 8, 8, np.random.default_rng(0)
    problem = laqjax.problems.TwoLayerNetwork(784, CLASSES, hidden, l2=0)
    oracle, key = problem.oracle(), jax.random.key(0)
    x, y = rng.integers(0, 256, (workers, 32, 784)), rng.integers(0, CLASSES, (workers, 32))
    data = laqjax.Shards(jnp.asarray(x, jnp.uint8), jnp.asarray(y, jnp.int32), jnp.ones((workers, 32)))
    theta = problem.init_vector(oracle)
    if form != "plain":
        alg = getattr(laqjax.algorithms, form)(oracle, lr=0.02, num_workers=workers)
        holder: list[Any] = [alg.init(theta)]

        def call() -> None:  # from state to state, as in a long run: making one costs as much as a round
            for out in laqjax.stream(alg, holder[0], data, rounds, key, chunk_size=rounds):
                holder[0] = out.state

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


def repeat(call: Callable[[], Any], times: int, flops: float | None = None) -> Workload:
    """`call` does one round."""
    return Workload(lambda: [jax.block_until_ready(call()) for _ in range(times)], times, flops)


def wire_workload(form: str) -> Workload:
    """10^6 coordinates in 4 bits: encoded and packed into bytes, or read back from them."""
    scheme, target = compressors.grid(4), jnp.asarray(np.random.default_rng(0).standard_normal(10**6, np.float32))
    encode = jax.jit(lambda target: scheme.encode(target, None))
    data = compressors.to_bytes(scheme, encode(target), target)
    calls = {
        "pack": lambda: compressors.to_bytes(scheme, encode(target), target),
        "read": lambda: compressors.from_bytes(scheme, data, target),
    }
    return repeat(calls[form], 50)


def gemm() -> Workload:
    """A square product, the unit of rates."""
    a = jnp.asarray(np.random.default_rng(0).random((GEMM, GEMM), np.float32))
    product = jax.jit(jnp.matmul)
    return repeat(lambda: product(a, a), 4, 2 * GEMM**3)


def stream() -> Workload:
    """Read and write a large array, in place: fresh pages would cost more than the traffic."""
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    holder = [jnp.zeros(STREAM, jnp.float32)]

    def call() -> Any:
        holder[0] = add(holder[0])
        return holder[0]

    return repeat(call, 8)


def autodiff_baseline(shards: laqjax.Shards) -> Workload:
    """Losses and gradients alone, as one would write them: float32 images, vmap over the workers."""

    def loss(params: Any, x: Any, y: Any) -> Any:
        return -jnp.mean(jnp.sum(jax.nn.log_softmax(x @ params["weight"] + params["bias"]) * y, axis=-1))

    data = [jnp.asarray(a) for a in to_float_arrays(shards, np.float32)]
    params = {"bias": jnp.zeros(CLASSES), "weight": jnp.zeros((data[0].shape[-1], CLASSES))}
    grads = jax.jit(jax.vmap(jax.value_and_grad(loss), (None, 0, 0)))
    return repeat(lambda: grads(params, *data), 8)


def numpy_laq(shards: laqjax.Shards) -> Workload:
    """LAQ in NumPy, float64."""
    data, theta = to_float_arrays(shards, np.float64), init_params(shards)
    return Workload(lambda: laq_reference(np, *data, theta, rounds=3), 3)


def pytorch_laq(shards: laqjax.Shards) -> Workload:
    """LAQ in PyTorch, float32, on all cores."""
    import torch  # here: optional, and seconds to import

    torch.set_num_threads(num_available_cores())
    arrays = (*to_float_arrays(shards, np.float32), init_params(shards).astype(np.float32))
    images, onehot, theta = (torch.from_numpy(a) for a in arrays)
    return Workload(lambda: laq_reference(torch, images, onehot, theta, rounds=8), 8)


def laq_reference(xp: Any, images: Any, onehot: Any, theta: Any, rounds: int) -> list[tuple[Any, Any]]:
    """LAQ with softmax regression, vectorised over the workers, on `xp` = NumPy or PyTorch: (loss, sent) of each round.

    images [M, N, features], onehot [M, N, classes], theta [p] = bias, weight [classes, features]. Of the ways tried to
    write the two products, this is the fastest in both.
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
    """Images in 0..1 and one-hot labels."""
    return np.divide(shards.x, 255, dtype=dtype), np.eye(CLASSES, dtype=dtype)[np.asarray(shards.y)]


def init_params(shards: laqjax.Shards) -> np.ndarray:
    """The theta0 of softmax regression, float64."""
    params = laqjax.problems.Softmax(shards.x.shape[-1], CLASSES).init_params(0, np.float64)
    return np.concatenate([params["bias"], params["weight"].ravel()])


# A group takes turns with a GEMM of its own. The calls take half a second to a second each.
WORKLOAD_GROUPS: dict[str, dict[str, Callable[[laqjax.Shards], Workload]]] = {
    "softmax": {
        "stream": lambda shards: stream(),
        "laq": lambda shards: run_workload(shards, "softmax", "laq", 20, bits=BITS["softmax"]),
        "gd": lambda shards: run_workload(shards, "softmax", "gd", 20),
        "plain": autodiff_baseline,
        "numpy": numpy_laq,
        "pytorch": pytorch_laq,
    },
    "network": {
        "network-laq": lambda shards: run_workload(shards, "network", "laq", 2, bits=BITS["network"]),
        "network-gd": lambda shards: run_workload(shards, "network", "gd", 2),
    },
    "sweep": {
        "one": lambda shards: run_workload(shards, "softmax", "laq", 20, bits=BITS["softmax"]),
        "sweep-16": lambda shards: sweep_workload(shards, "softmax", 16, 8),
        "sweep-64": lambda shards: sweep_workload(shards, "softmax", 64, 4),
    },
    "kernel": {
        "out-in": lambda shards: run_workload(shards, "softmax", "laq", 20, bits=BITS["softmax"]),
        "in-out": transposed_kernel_workload,
    },
    "cnn": {f"cnn-{form}": partial(cnn_workload, form=form) for form in ("calls", "laq", "sweep")},
    "million": {
        f"million-{form}": lambda shards, form=form: large_model_workload(1258, form) for form in ("plain", "gd", "laq")
    },
    "ten": {
        f"ten-million-{form}": lambda shards, form=form: large_model_workload(12579, form)
        for form in ("plain", "gd", "laq")
    },
    "checkpoint": {
        "unsaved": lambda shards: checkpoint_workload(shards, None),
        "saved": lambda shards: checkpoint_workload(shards, 100),
    },
    "message": {f"message-{form}": lambda shards, form=form: wire_workload(form) for form in ("pack", "read")},
    "network-sweep": {"network-sweep-8": lambda shards: sweep_workload(shards, "network", 8, 2)},
}


def mnist() -> laqjax.Shards:
    """The reference data: 10 workers, 6000 images each."""
    data = datasets.load("mnist")
    return laqjax.partition_data(data.x, data.y, 10, "contiguous")


def num_available_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
