# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   language_info:
#     name: python
# ---

# %% [markdown]
# # LAQ, lazily aggregated quantized gradients
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/laqjax/laqjax/blob/main/experiments/notebook/laqjax_colab.ipynb)
#
# Workers hold data, a server holds the model. Gradient descent sends every worker's gradient up in every round; LAQ ([Sun, Chen, Giannakis, Yang, NeurIPS 2019](https://papers.nips.cc/paper/2019/hash/4e87337f366f72daa424dae11df0538c-Abstract.html)) sends the *change* of a gradient, in b bits a coordinate, and only when that change matters. It gets to the same loss in about as many rounds, with a hundredth of the bits. This notebook explains it beside the lines of laqjax that are it, runs it on MNIST, sweeps its parameters, and trains a model of your own.
#
# Runtime > Change runtime type chooses TPU, GPU or CPU; then Runtime > Run all. The first cell installs laqjax where it cannot be imported, into the JAX that is here: Colab's fits its driver and its TPU. On a CPU the settings are those of three minutes on two cores, on a TPU or GPU larger ones.

# %%
REPOSITORY = "https://github.com/laqjax/laqjax"

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

if Path("laqjax_colab.ipynb").exists():  # opened in a checkout
    sys.path.insert(0, str(Path("../..").resolve()))
if any(importlib.util.find_spec(name) is None for name in ("laqjax", "experiments")):
    checkout = Path("laqjax-checkout").resolve()  # the experiments are in no package: they run from here
    if not checkout.exists():
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(checkout)], check=True)
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    kept = [name for name in installed if name in ("jax", "jaxlib", "libtpu") or name.startswith("jax-")]
    Path("constraints.txt").write_text("".join(f"{name}=={installed[name]}\n" for name in kept))
    wanted = f"{checkout}[experiments]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", wanted], check=True)
    sys.path.insert(0, str(checkout))

# %%
import os

import jax

backend = jax.default_backend()
print(f"{backend.upper()}: JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

ROWS, ROUNDS, BITS, LIMITS, WINDOWS = 6000, 1000, (2, 3, 4, 5, 6, 8), (5, 10, 30, 100, 300), (1, 3, 10, 30)
if backend == "cpu":
    ROUNDS, BITS, LIMITS, WINDOWS = 300, (3, 4, 6, 8), (10, 30, 100), (1, 10)
if os.environ.get("LAQJAX_SMOKE") == "1":  # does everything work here?
    ROWS, ROUNDS, BITS, LIMITS, WINDOWS = 200, 60, (4, 8), (5, 20), (1, 10)

# %% [markdown]
# ## The algorithm
#
# M workers make $f(\theta) = \sum_{m=1}^M f_m(\theta)$ small. The server holds a memory $Q_m(\hat\theta)$ of each worker's gradient, and steps along the sum of all memories. What worker m may send in round k is the *innovation*, its gradient less that memory, quantized. The memory changes only where something was sent, on worker and server alike: a silent worker counts with its last upload.
#
# The cells below show the library's own lines beside the equations.

# %%
import inspect
import textwrap

import altair as alt
import jax.numpy as jnp
import numpy as np
import polars as pl
from IPython.display import Markdown, display

import laqjax
from laqjax import compressors, memories, rules, worker_step

alt.data_transformers.disable_max_rows()


def show(*pieces):
    """Show the source of functions of the library, as they are imported here."""
    for piece in pieces:
        code = textwrap.dedent(inspect.getsource(piece))
        display(Markdown(f"`{piece.__module__}.{piece.__qualname__}`\n\n```python\n{code}```"))


# %% [markdown]
# ### 1. Quantize the change
#
# The target is $\nabla f_m(\theta^k) - Q_m(\hat\theta^{k-1})$, its radius $R_m^k$ the largest absolute coordinate. It is rounded to a grid of $2^b$ points over $[-R_m^k, R_m^k]$, with steps $2 R_m^k / (2^b - 1)$:
#
# $$q_i = \left\lfloor \frac{\text{target}_i}{\text{step}} + 2^{b-1} \right\rfloor, \qquad \delta Q_{m,i}^k = \text{step} \cdot \left( q_i - \frac{2^b - 1}{2} \right)$$
#
# A message is the radius and p codes of b bits: $32 + b p$ bits, where a gradient has $32 p$. The grid has no zero; a coordinate is off by half a step at most, and the largest one sets the step for all.

# %%
show(
    memories.Innovation.compression_target,
    compressors.Grid.encode,
    compressors.quantize_to_grid,
    compressors.dequantize_from_grid,
)

# %%
target = jnp.linspace(-1, 1, 1001)
steps = []
for bits in (1, 2, 4):
    grid = compressors.grid(bits)
    decoded = np.asarray(grid.decode(grid.encode(target, None), target))
    steps.append(pl.DataFrame({"target": np.asarray(target), "decoded": decoded}).with_columns(b=pl.lit(bits)))
alt.Chart(pl.concat(steps)).mark_line().encode(
    alt.X("target:Q", title="coordinate of the target / R"),
    alt.Y("decoded:Q", title="decoded / R"),
    alt.Color("b:N", title="b, bits a coordinate"),
)

# %% [markdown]
# ### 2. Send, or stay silent
#
# With the errors of quantization $\varepsilon_m^k$ now and $\hat\varepsilon_m$ at the last upload, worker m sends iff
#
# $$\lVert \delta Q_m^k \rVert^2 \;\ge\; \frac{1}{\alpha^2 M^2} \sum_{d=1}^{D} \xi_d \lVert \theta^{k+1-d} - \theta^{k-d} \rVert^2 + 3 \left( \lVert \varepsilon_m^k \rVert^2 + \lVert \hat\varepsilon_m \rVert^2 \right) \quad\text{or}\quad t_m \ge \bar t.$$
#
# The sum is the model's recent motion, weighted by $\xi_d$: while the model moves a lot, small changes of a gradient do not matter. $\bar t = C$ bounds the rounds of silence $t_m$.

# %%
show(rules.LazyRule.should_send, rules.History.threshold, rules.MaxSilence.should_send)

# %% [markdown]
# ### 3. Remember, and step
#
# The memories of those who sent move by what was decoded, and the server's sum of all memories with them:
#
# $$Q_m(\hat\theta^k) = Q_m(\hat\theta^{k-1}) + \delta Q_m^k, \qquad \nabla^k = \nabla^{k-1} + \sum_{m \text{ sent}} \delta Q_m^k, \qquad \theta^{k+1} = \theta^k - \alpha \nabla^k$$
#
# A worker's whole round is one function, the same for all methods of the library: LAQ is the grid, the lazy rule and the memory, put together.

# %%
show(memories.Innovation.update, memories.Innovation.update_aggregate, worker_step, laqjax.algorithms.laq)

# %% [markdown]
# ## LAQ against gradient descent
#
# Softmax regression on the MNIST images that come with laqjax, split over ten workers. An algorithm is a pytree of numbers; `laqjax.run` compiles its rounds into one loop.

# %%
from experiments.harness import datasets

data = datasets.load("mnist")
shards = laqjax.partition_data(data.x, data.y, 10, "contiguous")  # x [10, 6000, 784] bytes, y, weight
shards = laqjax.Shards(*(array[:, :ROWS] for array in shards))
problem = laqjax.problems.Softmax(features=784, classes=10)
oracle, start, key = problem.oracle(), problem.init_params(0), jax.random.key(0)
server = {"lr": 0.02, "num_workers": 10}

methods = {
    "LAQ": laqjax.algorithms.laq(oracle, bits=4, max_silence=100, window=10, xi=0.8, **server),
    "GD": laqjax.algorithms.gd(oracle, **server),
}
runs = {name: laqjax.run(method, start, shards, ROUNDS, key) for name, method in methods.items()}


def mbit_up(info):
    """Mbit sent up before each round, as the loss of a round is that of the model before its step."""
    bits = info.bits_up.sum(axis=-1)
    return (np.cumsum(bits, axis=0) - bits) / 1e6


for name, (info, state) in runs.items():
    right = problem.accuracy(methods[name].params(state), data.x_test, data.y_test)
    uploads, megabits = info.sent.sum(), info.bits_up.sum() / 1e6
    print(f"{name}: loss {info.loss[0]:.3f} -> {info.loss[-1]:.3f}, test accuracy {right:.1%}", end=", ")
    print(f"{uploads} of {info.sent.size} uploads, {megabits:.4g} Mbit up")


# %%
def curves(runs):
    """Draw the loss against rounds and against bits."""
    rows = [
        pl.DataFrame({"round": np.arange(len(info.loss)), "loss": np.asarray(info.loss), "Mbit": mbit_up(info)})
        .filter(pl.col("round") > 0)
        .with_columns(method=pl.lit(name))
        for name, (info, _) in runs.items()
    ]
    loss = alt.Y("loss:Q", title="loss, mean of the workers", scale=alt.Scale(type="log", nice=False))
    panels = alt.Chart(pl.concat(rows)).mark_line().encode(loss, alt.Color("method:N"), alt.StrokeDash("method:N"))
    bits = alt.X("Mbit:Q", title="Mbit up, all workers", scale=alt.Scale(type="log"), axis=alt.Axis(format="~g"))
    return panels.encode(alt.X("round:Q", title="rounds")) | panels.encode(bits)


curves(runs)

# %% [markdown]
# Who sends when: a mark is an upload. All send in the first round; then each worker speaks when its data have something to say.

# %%
sent = np.asarray(runs["LAQ"].info.sent)
uploads = pl.DataFrame(dict(zip(("round", "worker"), np.nonzero(sent), strict=True)))
alt.Chart(uploads, title=f"LAQ: {sent.sum()} of {sent.size} uploads", width=700).mark_tick(height=12).encode(
    alt.X("round:Q", scale=alt.Scale(domain=[0, len(sent)])), alt.Y("worker:O")
)

# %% [markdown]
# ## A sweep over b, C and D
#
# Numbers are traced, so algorithms that differ in numbers alone are *stacked* and run side by side: one compiled program that reads the data once a round for all of them, spread over all devices. How many Mbit does each setting need to the loss that GD has halfway? A dash below: it does not get there.

# %%
import itertools

grid = list(itertools.product(BITS, LIMITS, WINDOWS))
longest = max(WINDOWS)  # of one shape for all
algorithms = [
    laqjax.algorithms.laq(oracle, bits=b, max_silence=c, window=d, padded_window=longest, xi=0.8, **server)
    for b, c, d in grid
]
points = laqjax.sweep(laqjax.stack_algorithms(algorithms), start, shards, ROUNDS, jax.random.split(key, len(grid)))

goal = runs["GD"].info.loss[ROUNDS // 2]
reached = points.info.loss <= goal  # [rounds, points]
first = reached.argmax(axis=0)
cost = np.where(reached.any(axis=0), mbit_up(points.info)[first, np.arange(len(grid))], np.nan)
b, c, d = grid[np.nanargmin(cost)]
print(f"{len(grid)} settings, {reached.any(axis=0).sum()} of them at loss {goal:.3f} within {ROUNDS} rounds")
print(f"fewest bits: b = {b}, C = {c}, D = {d} with {np.nanmin(cost):.4g} Mbit up", end=", ")
print(f"GD {mbit_up(runs['GD'].info)[ROUNDS // 2]:.4g} Mbit")

# %%
cells = pl.DataFrame([(*setting, None if np.isnan(mbit) else mbit) for setting, mbit in zip(grid, cost, strict=True)],
                     schema=["b", "C", "D", "Mbit"], orient="row")  # fmt: skip
cells = cells.with_columns(text=pl.Series("-" if np.isnan(mbit) else f"{mbit:.3g}" for mbit in cost))
maps = alt.Chart().encode(alt.X("C:O", title="C, rounds"), alt.Y("b:O", title="b, bits a coordinate"))
colors = alt.Color("Mbit:Q", title=f"Mbit up to loss {goal:.3f}", scale=alt.Scale(scheme="viridis", reverse=True))
boxes = maps.mark_rect(opacity=0.6).encode(colors, tooltip=["b", "C", "D", "Mbit"])
alt.layer(boxes, maps.mark_text().encode(text="text"), data=cells).properties(
    width=45 * len(LIMITS), height=30 * len(BITS)
).facet(column="D:O")

# %% [markdown]
# A longer sweep is better run as a command in the checkout, which is safe after each batch and goes on after a disconnection: `!cd laqjax-checkout && python -m experiments.sweep -b 2 4 8 -C 10 100 -D 1 10 --seeds 0 1 2 --lr 0.02`.
#
# ## Your own model
#
# A loss for each example, on any pytree of parameters; `from_loss` makes it the workers' oracle. Here a flax CNN where flax is installed, else a network in plain JAX.

# %%
import optax


def network(params, x):
    return jax.nn.relu(x.reshape(-1, 784) @ params["in"]) @ params["out"]


params, apply = {"in": jax.random.normal(jax.random.key(0), (784, 64)) / 28, "out": jnp.zeros((64, 10))}, network
if importlib.util.find_spec("flax"):
    import flax.linen as nn

    model = nn.Sequential([nn.Conv(8, (5, 5), strides=2), nn.relu, lambda x: x.reshape(len(x), -1), nn.Dense(10)])
    params, apply = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1))), model.apply


def loss(params, x, y):
    """Return the loss of each example: x [n, 784] bytes, y [n] -> losses [n]."""
    logits = jnp.asarray(apply(params, x.reshape(-1, 28, 28, 1).astype(jnp.float32) / 255))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


# %% [markdown]
# The server may be any optax optimizer. With Adam the lazy rule compares with what Adam was given, $\lVert \nabla^k \rVert^2$: its steps have another scale. Stale gradients cost it more than plain descent, so $\xi$ is smaller here.

# %%
own = laqjax.oracles.from_loss(loss, params)
some = laqjax.Shards(*(array[:, : ROWS // 20] for array in shards))
adam = {"lr": 0.003, "num_workers": 10, "optimizer": optax.adam}
methods = {
    "LAQ + Adam": laqjax.algorithms.laq(own, bits=8, xi=0.3, **adam),
    "GD + Adam": laqjax.algorithms.gd(own, **adam),
}
runs = {name: laqjax.run(method, params, some, ROUNDS // 3, key) for name, method in methods.items()}

for name, (info, state) in runs.items():
    logits = apply(methods[name].params(state), data.x_test.reshape(-1, 28, 28, 1).astype(np.float32) / 255)
    right = np.mean(jnp.asarray(logits).argmax(axis=1) == data.y_test)
    print(f"{name}: loss {info.loss[-1]:.3f}, test accuracy {right:.1%}, {info.sent.sum()} uploads")
curves(runs)

# %% [markdown]
# ## Where to go next
#
# In the repository:
# - [docs/algorithm.md](../../docs/algorithm.md): all of the above, and the family: LAG, TWO-LAQ, EF21, MARINA, CADA and others, each a few lines.
# - [docs/own.md](../../docs/own.md): models, data, compressors, rules and methods of your own.
# - [docs/sweeps.md](../../docs/sweeps.md): sweeps, comparisons and searches as commands.
# - [docs/mesh.md](../../docs/mesh.md), [docs/federation.md](../../docs/federation.md): many devices and processes; a real federation, where silent workers send a few bytes.
# - [docs/reproduction.md](../../docs/reproduction.md): the published tables.
