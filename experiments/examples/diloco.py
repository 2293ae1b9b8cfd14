"""Train a small language model with DiLoCo on 4 devices; compare eight methods.

The devices are forced ones on a CPU. Each has its own topics of Python's help texts, see `language_model.py`.

    python -m experiments.examples.diloco              one seed, ten minutes on two cores
    python -m experiments.examples.diloco --seeds 3    three seeds, half an hour
    python -m experiments.examples.diloco --quick      a few steps, to try the installation

A stopped command resumes: each method and seed is a file in the folder `runs`.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import polars as pl
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import laqjax
from experiments.examples import language_model
from experiments.figures import style
from experiments.harness import cli, results, storage
from experiments.harness.grid import set_cpu_devices
from laqjax import check_number
from laqjax.algorithms import gd, topk_ef
from laqjax.compressors import chunked_top_k, grid, quantized_values
from laqjax.local_training import collapse, diloco_optimizer, replicate

M = 4  # devices, one worker each
PERIODS = 1, 10, 30  # H
EVERY_STEP = "AdamW each step", "top 1 % each step"
LOW_BIT = "DiLoCo, 4 bits", "lazy DiLoCo, 4 bits", "SparseLoCo, 2 bits"
SIZE = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(language_model.init_params, 0)))


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison."""

    steps: int = 600
    """Steps of each device."""
    batch: int = 8
    """Rows of 64 bytes in a step of a device."""
    lr: float = 3e-3
    """Learning rate of AdamW, after a warm-up and before a cosine decay to a tenth."""
    momentum: float = 0.5
    """Momentum of DiLoCo's outer optimizer. 0.9, as in the paper, is slower in so few steps."""
    xi: float = 0.1
    """Threshold of lazy DiLoCo."""
    max_silence: int = 2
    """Silent synchronizations of lazy DiLoCo in a row, at most."""
    seeds: int = 1
    """Number of seeds of the parameters and of the order of the data."""
    out: Path = Path("results/diloco")
    """Folder for the results."""
    quick: bool = False
    """Take 10 steps, to try the installation."""


def error_feedback(oracle, *, compressor, decay=1.0, **server: Any):
    """Return the method whose workers send a compressed vector and add what was lost to the next one."""
    memory = laqjax.memories.ErrorFeedback(jnp.float32(decay))
    return laqjax.assemble(oracle, compressor, laqjax.rules.Always(), memory, **server)


def make_optimizer(name: str, period: int, settings: Settings) -> tuple[optax.GradientTransformation, bool]:
    """Return the optimizer of a method, and whether the parameters differ between the devices."""
    warmup = min(20, settings.steps // 4)
    lr = optax.warmup_cosine_decay_schedule(0.0, settings.lr, warmup, settings.steps, settings.lr / 10)
    inner = optax.adamw(lr, weight_decay=0.1)
    values = quantized_values(chunked_top_k(1024, 32), grid(2))
    ways: dict[str, Any] = {
        EVERY_STEP[1]: {"algorithm": topk_ef, "k": SIZE // 100},
        LOW_BIT[0]: {"algorithm": error_feedback, "compressor": grid(4), "quantizer_blocks": "leaf"},
        LOW_BIT[1]: {"bits": 4, "xi": settings.xi, "max_silence": settings.max_silence, "quantizer_blocks": "leaf"},
        LOW_BIT[2]: {"algorithm": error_feedback, "compressor": values, "decay": 0.95, "outer": optax.sgd(1.0)},
    }
    sends = ways.get(name, {"algorithm": gd, "collective": "all_reduce"})
    if name in EVERY_STEP:
        return optax.chain(laqjax.lazy_aggregate("data", M, **sends), inner), False
    sends = {"outer": optax.sgd(0.7, momentum=settings.momentum, nesterov=True)} | sends
    return diloco_optimizer(inner, axis="data", num_workers=M, sync_every=period, **sends), True


def mean_loss(params, x, y):
    """Return the mean loss of a batch."""
    return language_model.loss(params, x, y).mean()


def train(name: str, period: int, seed: int, settings: Settings, console: Console) -> pl.DataFrame:
    """Train with one method, and return the test loss against its costs."""
    x, y, *test = language_model.load()
    test = [rows[::3] for rows in test]
    rows = np.array_split(np.arange(len(x)), M)  # consecutive rows are about the same topics
    rng = np.random.default_rng(seed)
    mesh = jax.make_mesh((M,), ("data",), axis_types=(AxisType.Auto,))
    tx, differ = make_optimizer(name, period, settings)
    start: Any = jax.jit(language_model.init_params)(seed)
    params = replicate(start, M) if differ else start
    specs = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, params), "data")
    place = P("data") if differ else P()
    state = jax.jit(tx.init, out_shardings=jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))(params)
    params = jax.device_put(params, NamedSharding(mesh, place))

    def step(params, state, x, y):
        def loss(params):
            return mean_loss(jax.tree.map(lambda leaf: leaf[0], params) if differ else params, x, y)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    split = (place, specs)
    step = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(*split, P("data"), P("data")), out_specs=split, check_vma=False)
    )
    found, moved, billed = [], 0, 0
    began = time.perf_counter()
    for number in range(settings.steps):
        batch = np.concatenate([rng.choice(own, settings.batch) for own in rows])
        params, state = step(params, state, x[batch], y[batch])
        sent = state.aggregate_state if differ else state[0]
        moved, billed = moved + int(sent.bytes_received), billed + int(sent.bits_up.sum())
        if (number + 1) % max(settings.steps // 10, 5) == 0 or number + 1 == settings.steps:
            loss = float(jax.jit(mean_loss)(jax.device_get(collapse(state) if differ else params), *test))
            found.append(
                (number + 1, billed / 1e6, moved / 1e6, loss, int(sent.total_uploads), time.perf_counter() - began)
            )
            console.print(f"{name}, seed {seed}: step {number + 1}, test loss {loss:.4f}", highlight=False)
    columns = ["step", "megabits", "megabytes", "loss", "uploads", "seconds"]
    return pl.DataFrame(found, columns, orient="row").with_columns(name=pl.lit(name), seed=seed)


def main(settings: Settings) -> None:
    """Train with all methods; write the curves, a table and a figure."""
    for name in ("steps", "batch", "seeds"):
        check_number(name, getattr(settings, name), np.int32, minimum=1)
    set_cpu_devices(M)
    periods = PERIODS
    if settings.quick:
        jax.config.update("jax_disable_most_optimizations", True)  # nearly all of a quick run is compilation
        periods = PERIODS[1:2]  # one of them, of as many steps as are taken
        settings = replace(settings, steps=10, batch=2, out=Path(f"{settings.out}-quick"))
    console, out = Console(), settings.out
    about = {name: value for name, value in asdict(settings).items() if name not in ("out", "quick", "seeds")}
    with storage.lock_results_dir(out, {"experiment": "diloco", "text": language_model.text_digest(), **about}):

        def read_or_train(name: str, period: int = 0) -> pl.DataFrame:
            parts = []
            for seed in range(settings.seeds):
                path = out / "runs" / f"{name.replace(' ', '-').replace('%', 'percent')}-{period}-{seed}.parquet"
                if not path.exists():
                    path.parent.mkdir(exist_ok=True)
                    storage.save_frame(train(name, period, seed, settings, console), path.with_suffix(""))
                parts.append(pl.read_parquet(path))
            return pl.concat(parts)

        curves = [read_or_train(EVERY_STEP[0])]
        curves += [read_or_train(f"DiLoCo, H = {period}", period) for period in periods]
        ends = [one.filter(pl.col("step") == pl.col("step").max())["loss"].to_numpy().mean() for one in curves[1:]]
        best = periods[int(np.argmin(ends))]
        curves += [read_or_train(name, best) for name in LOW_BIT] + [read_or_train(EVERY_STEP[1])]
        report(pl.concat(curves), best, out, console)


def report(curves: pl.DataFrame, best: int, out: Path, console: Console) -> None:
    """Write and print the table and the figure."""
    storage.save_frame(curves, out / "curves", csv=True)
    means = curves.group_by("name", "step", maintain_order=True).agg(pl.col("megabits", "megabytes", "loss").mean())
    y = style.Axis("loss", "test loss, nats per byte", log=False)
    looks = style.assign_looks({name: name for name in means["name"]})
    titles = {"step": "step", "megabits": "Mbit up, billed, all devices", "megabytes": "MB received by each device"}
    rows = means.with_columns(line="name", mark=pl.lit(True))
    panels = [
        style.build_line_panel(rows, style.Axis(x, title, x != "step"), y, looks, {}, (250, 230))
        for x, title in titles.items()
    ]
    seeds = curves["seed"].n_unique()
    note = (
        f"The 4-bit and 2-bit methods synchronize every {best} step(s). All of them but the lazy one, and top 1 %, have "
        f"error feedback. Mean of {seeds} seed(s)."
    )
    title = "Test loss of the language model against steps and traffic"
    style.save(style.Figure(title, style.concat_panels(panels, 3), note), out / "diloco")
    last = curves.filter(pl.col("step") == pl.col("step").max())
    spread = last.group_by("name", maintain_order=True).agg(
        pl.col("loss").mean(), pl.col("loss").std().alias("±"), pl.col("megabits").mean().alias("Mbit billed"),
        pl.col("megabytes").mean().alias("MB to each"), pl.col("uploads").mean(), pl.col("seconds").mean().round().cast(pl.Int64),
    )  # fmt: skip
    storage.save_frame(spread, out / "table", csv=True)
    facts = {"text": language_model.text_digest(), "parameters": SIZE}
    storage.write_json(out / "run.json", storage.provenance() | facts)
    results.report_result(console, out, {f"{SIZE:,} parameters, {last['step'][0]} steps": spread}, [note])


if __name__ == "__main__":
    with cli.command_line() as given:
        main(cli.parse_cli(Settings, given, __doc__))
