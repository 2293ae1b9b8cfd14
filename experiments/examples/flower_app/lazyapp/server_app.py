"""lazyapp: A Flower / laqjax app."""

from typing import Any

import jax
import numpy as np
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from laqjax.federation import LazyStrategy, arrays_to_params
from lazyapp import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with LAQ, print the result, and save the final model."""
    config: Any = context.run_config
    strategy = LazyStrategy(
        task.make_algorithm(config),
        task.init_params(),
        key=jax.random.key(0),
        fraction_evaluate=config["fraction-evaluate"],
        authenticated_nodes=config["authenticated-nodes"],
    )
    result = strategy.start(grid=grid, num_rounds=config["num-server-rounds"], evaluate_fn=evaluate)
    print(result)
    task.FOLDER.mkdir(parents=True, exist_ok=True)
    path = task.FOLDER / "final_model.npz"
    arrays: Any = {name: array.numpy() for name, array in result.arrays.items()}
    np.savez(path, **arrays)
    print(f"The final model is in {path}")


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the global model on rows of the server."""
    params = arrays_to_params(arrays, task.init_params())
    loss, accuracy, _ = task.evaluate(params, task.load_server_data())
    return MetricRecord({"eval_loss": loss, "eval_acc": accuracy})
