"""lazyapp: A Flower / laqjax app."""

from flwr.app import Context, Message, MetricRecord, RecordDict

from laqjax.federation import FederatedClient, arrays_to_params, client_app
from lazyapp import task


def client_fn(context: Context) -> FederatedClient:
    """Build the worker of a node."""
    return FederatedClient(task.make_algorithm(context.run_config), task.load_data)


# Flower ClientApp with the train function of laqjax; `mods=[...]` takes Flower's mods
app = client_app(client_fn, compilation_cache_dir=task.FOLDER)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the global model on local data."""
    params = arrays_to_params(message.content.array_records["arrays"], task.init_params())
    loss, accuracy, rows = task.evaluate(params, task.load_data(int(context.node_config["partition-id"]), is_test=True))
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": rows})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
