"""lazyapp: model, data and algorithm."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import laqjax

FOLDER = Path.home() / ".cache" / "lazyapp"  # of compiled programs, and of the final model
NUM_FEATURES, NUM_CLASSES, NUM_ROWS = 20, 3, 300


def init_params() -> dict[str, jax.Array]:
    """Return the initial model."""
    return {"weight": jnp.zeros((NUM_FEATURES, NUM_CLASSES)), "bias": jnp.zeros(NUM_CLASSES)}


def apply_model(params: Any, x: Any) -> jax.Array:
    """Return the logits [n, NUM_CLASSES] of rows [n, NUM_FEATURES]."""
    return x @ params["weight"] + params["bias"]


def loss_fn(params: Any, x: Any, y: Any) -> jax.Array:
    """Return the loss of each row."""
    return optax.softmax_cross_entropy_with_integer_labels(apply_model(params, x), y)


def make_algorithm(run_config: Any) -> laqjax.Algorithm:
    """Build the algorithm that server and clients share, with the settings of the run."""
    num_workers = run_config["num-workers"]
    return laqjax.algorithms.laq(
        laqjax.oracles.from_loss(loss_fn, init_params()),
        lr=run_config["learning-rate"] / num_workers,  # the step acts on the sum of the workers' gradients
        num_workers=num_workers,
        bits=run_config["bits"],
        max_silence=run_config["max-silence"],
    )


def draw_rows(seed: Any, shares: Any) -> dict[str, np.ndarray]:
    """Draw synthetic rows with given shares of the classes."""
    centers = np.random.default_rng(0).normal(size=(NUM_CLASSES, NUM_FEATURES))
    rng = np.random.default_rng(seed)
    y = rng.choice(NUM_CLASSES, NUM_ROWS, p=shares)
    return {"x": (centers[y] + 1.5 * rng.normal(size=(NUM_ROWS, NUM_FEATURES))).astype(np.float32), "y": y}


def load_data(partition_id: int, *, is_test: bool = False) -> laqjax.Shards:
    """Return the rows of one worker; each worker has other shares of the classes."""
    shares = np.random.default_rng(partition_id).dirichlet(np.ones(NUM_CLASSES))
    partition = draw_rows([partition_id, is_test], shares)  # or fds.load_partition(partition_id) of flwr-datasets
    return laqjax.partition.shards_from_partitions([partition], x="x", y="y")


def load_server_data() -> laqjax.Shards:
    """Return the rows on which the server evaluates."""
    return laqjax.partition.shards_from_partitions([draw_rows(1, np.full(NUM_CLASSES, 1 / NUM_CLASSES))], x="x", y="y")


def evaluate(params: Any, data: laqjax.Shards) -> tuple[float, float, int]:
    """Return loss, accuracy and number of rows of one worker."""
    x, y = data.x[0], data.y[0]
    accuracy = np.mean(np.argmax(apply_model(params, x), axis=-1) == y)
    return float(np.mean(loss_fn(params, x, y))), float(accuracy), len(y)
