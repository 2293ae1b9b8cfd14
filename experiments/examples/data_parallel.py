"""Train a flax network data-parallel in a loop of your own, in three ways.

On 4 devices (forced ones on a CPU): gradients by pmean, lazily aggregated quantized ones (LAQ), and the largest 1 % with error feedback.

    python -m experiments.examples.data_parallel --steps 300 --out results/parallel
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
import tyro
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import laqjax
from experiments.figures import style
from experiments.harness import cli, datasets, grid
from laqjax import check_number
from laqjax.algorithms import topk_ef

DEVICES = 4
model = nn.Sequential([nn.Dense(1024), nn.relu, nn.Dense(1024), nn.relu, nn.Dense(1024), nn.relu, nn.Dense(10)])


def loss(params, x, y):
    logits: Any = model.apply(params, x.astype(jnp.float32) / 255)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def trainer(tx, params, mesh):
    """Return (step, state): a training step in which `tx` alone decides how gradients travel, and its state."""
    specs = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, params), "data")
    state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))(params)

    def step(params, state, x, y):
        value, gradients = jax.value_and_grad(loss)(params, x, y)  # of this device's rows
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, jax.lax.pmean(value, "data")

    split = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), specs, P("data"), P("data")), out_specs=(P(), specs, P()), check_vma=False
    )
    return jax.jit(split), state


def smooth(losses):
    """Return the means of 10 losses in a row; of all of them where there are fewer."""
    width = min(10, len(losses))
    return np.convolve(losses, np.ones(width) / width, "valid")


def milliseconds(ways, start, mesh, row, turns=20):
    """Return the milliseconds of a step, the best of some turns."""
    made = {name: trainer(optax.chain(way, optax.sgd(0.1)), start, mesh) for name, way in ways.items()}
    best = dict.fromkeys(ways, np.inf)
    for turn in range(turns + 2):
        for name, (step, state) in made.items():
            began = time.perf_counter()
            _, state, _ = jax.block_until_ready(step(start, state, *row))
            made[name] = step, state
            best[name] = min(best[name], time.perf_counter() - began) if turn > 1 else np.inf
    return ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in best.items())


def main(steps: int = 300, batch: int = 1024, lr: float = 0.1, out: Path = Path("results/parallel")) -> None:
    check_number("steps", steps, np.int32, minimum=1)
    grid.set_cpu_devices(DEVICES)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    data, rng = datasets.load("mnist"), np.random.default_rng(0)
    start = model.init(jax.random.key(0), jnp.zeros((1, 784)))
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    mean: Any = optax.stateless(lambda gradients, params: jax.lax.pmean(gradients, "data"))
    ways = {
        "pmean": mean,
        # on minibatches the noise alone is change: who skips is brought back soon (C), or the loss suffers
        "LAQ, b = 4": laqjax.lazy_aggregate("data", DEVICES, bits=4, xi=10, max_silence=2, quantizer_blocks="leaf"),
        "top 1 % with error feedback": laqjax.lazy_aggregate("data", DEVICES, topk_ef, k=size // 100),
    }
    curves = []
    rows = [rng.integers(0, len(data.y), batch) for _ in range(steps)]  # the same for all
    for name, way in ways.items():
        step, state = trainer(optax.chain(way, optax.sgd(lr)), start, mesh)
        params, losses, moved, times = start, [], [], []
        for row in rows:
            began = time.perf_counter()
            params, state, value = step(params, state, data.x[row], data.y[row])
            losses.append(float(value))
            times.append(time.perf_counter() - began)
            # what each device receives; a ring's all-reduce for pmean
            lazy = isinstance(state[0], laqjax.aggregation.LazyAggregateState)
            moved.append(int(state[0].bytes_received) if lazy else 2 * 4 * size * (DEVICES - 1) // DEVICES)
        smooth_losses = smooth(losses)
        megabytes = np.cumsum(moved)[-len(smooth_losses) :] / 1e6
        curve = pl.DataFrame(
            {"step": np.arange(1, len(smooth_losses) + 1), "megabytes": megabytes, "loss": smooth_losses}
        )
        curves.append(curve.with_columns(name=pl.lit(name), line=pl.lit(name)))
        print(
            f"{name}: loss {smooth_losses[-1]:.4f}, {sum(moved) / 1e6:,.0f} MB to each device, {1e3 * min(times):.0f} ms a step"
        )
    y = style.Axis("loss", f"loss, mean of {min(10, steps)} steps")
    axes = style.Axis("step", "step", log=False), style.Axis("megabytes", "MB received by each device")
    looks = style.assign_looks({name: name for name in ways})
    panels = [style.build_line_panel(pl.concat(curves), x, y, looks, {}, (300, 230)) for x in axes]
    style.save(style.Figure("Loss against steps and traffic", style.concat_panels(panels, 2)), out / "parallel")
    never = laqjax.lazy_aggregate("data", DEVICES, bits=4, xi=1e6, force_first_upload=False, quantizer_blocks="leaf")
    for examples in (batch, 4 * batch):  # what it adds is the same, whatever the batch
        row = rng.integers(0, len(data.y), examples)
        said = milliseconds({"pmean": mean, "lazy_aggregate": never}, start, mesh, (data.x[row], data.y[row]))
        print(f"ms a step of {examples} examples where nobody sends: {said}")
    print(f"p = {size:,}; figure: {out}/parallel.png")


if __name__ == "__main__":
    with cli.exit_on_user_error():
        tyro.cli(main)
