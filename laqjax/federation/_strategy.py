"""Flower strategy of a federation: `LazyStrategy`, for a ServerApp of your own."""

import logging
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from jaxtyping import PRNGKeyArray

from laqjax._core.round import Algorithm
from laqjax.federation._polling import ReplyPoller
from laqjax.federation._roster import describe_error, one_line
from laqjax.federation._server import FederatedServer, RoundStats

MAX_UNANSWERED = 3  # evaluations in a row that a node may leave without a reply before it is asked no more
log = logging.getLogger("flwr")  # Flower's own logger, whose lines `flwr run --stream` shows


def _name_leaves(params: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, such as "dense/kernel"; a tree of one array has the name "params"."""
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") or "params": leaf for path, leaf in leaves}


def params_to_arrays(params: Any) -> ArrayRecord:
    """Convert a pytree of parameters into Flower's `ArrayRecord`, with the paths of the leaves as names."""
    return ArrayRecord({name: Array(np.asarray(leaf)) for name, leaf in _name_leaves(params).items()})


def arrays_to_params(arrays: ArrayRecord, like: Any) -> Any:
    """Convert an `ArrayRecord` from `params_to_arrays` back into a pytree of parameters.

    Args:
        arrays: the record.
        like: pytree of the same structure, for example the initial parameters.

    Returns:
        The parameters as NumPy arrays.

    Raises:
        ValueError: the record has other names than the leaves of `like`.
    """
    names = list(_name_leaves(like))
    if set(arrays) != set(names):
        raise ValueError(f"arrays named {sorted(arrays)}: must be {sorted(names)}, the leaves of the parameters")
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name].numpy() for name in names])


def _summarize(stats: RoundStats) -> MetricRecord:
    """Return what a round cost as Flower's metrics."""
    return MetricRecord({
        "train_loss": stats.loss,
        "workers": int(stats.accepted.sum()),
        "uploads": int(stats.sent.sum()),
        "bits-up": int(stats.bits_up.sum()),
        "bits-down": stats.bits_down,
        "bytes-up": int(stats.bytes_up.sum()),
        "bytes-down": int(stats.bytes_down.sum()),
        "rejections": stats.rejections,
    })  # fmt: skip


def _check_evaluation(reply: Message, weighted_by_key: str) -> MetricRecord:
    """Return the metrics of an evaluation; raise ValueError if the reply does not count."""
    if reply.has_error():
        raise ValueError(describe_error(reply))
    records = list(reply.content.metric_records.values())
    values = [value for record in records for value in record.values()]
    numbers = np.concatenate([np.ravel(value) for value in values] or [np.zeros(0)])
    weight = records[0].get(weighted_by_key) if len(records) == 1 else None
    if not isinstance(weight, int | float) or weight < 0 or not np.isfinite(numbers.astype(float)).all():
        found = f"MetricRecords {[dict(record) for record in records]}"
        raise ValueError(f"{found:.100}: must be one, with finite numbers and {weighted_by_key!r} >= 0")
    return records[0]


def _collect_evaluations(
    grid: Grid, messages: Iterable[Message], timeout: float, unanswered: Counter[int]
) -> list[Message]:
    """Send messages for evaluation, and return one reply of each node that answers in time.

    Args:
        grid: the Flower grid.
        messages: one message for each node.
        timeout: seconds to wait.
        unanswered: evaluations in a row that each node left without a reply; this function counts them.
    """
    sent, poller = list(messages), ReplyPoller()
    poller.send(grid, sent)
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in sent}
    replies: dict[int, Message] = {}
    end, remaining = time.monotonic() + timeout, timeout
    while remaining > 0:
        remaining = max(end - time.monotonic(), 0.0) if poller.waiting_nodes() else 0.0
        for reply in poller.receive(remaining):
            if asked.get(reply.metadata.reply_to_message_id) == reply.metadata.src_node_id:
                replies.setdefault(reply.metadata.src_node_id, reply)
    for node in asked.values():
        unanswered[node] = 0 if node in replies else unanswered[node] + 1
        if unanswered[node] == MAX_UNANSWERED:
            log.warning("node %s left %s evaluations without a reply: it is asked no more", node, MAX_UNANSWERED)
    return list(replies.values())


class LazyStrategy(Strategy):
    """Flower strategy that trains with an algorithm of this library, in a ServerApp of your own.

    It takes the place of Flower's `FedAvg`; the clients run `client_app`. `start` drives a `FederatedServer`, so that
    protocol, deadlines, rejections and checkpoint are those of `server_app`, and silent clients are no failures. Each
    round is one line in Flower's log.

    server: the server of the last `start`.
    """

    server: FederatedServer

    def __init__(
        self,
        alg: Algorithm,
        params: Any,
        key: PRNGKeyArray,
        *,
        fraction_evaluate: float = 1.0,
        weighted_by_key: str = "num-examples",
        evaluate_metrics_aggr_fn: Callable[[list[RecordDict], str], MetricRecord] = aggregate_metricrecords,
        workers: int | None = None,
        max_empty_rounds: int = 10,
        **options: Any,
    ) -> None:
        """Initialize the strategy.

        Args:
            alg: the algorithm; it must be the same as the workers'.
            params: initial model, a pytree or a flat vector [p].
            key: PRNG key of the run, as in `laqjax.run`.
            fraction_evaluate: share of the nodes that evaluate the model after each round. Each of them receives the
                whole model once more, as "arrays", and a "config" with "server-round". 0: no federated evaluation.
            weighted_by_key: name of the metric that weights the clients' metrics.
            evaluate_metrics_aggr_fn: function from the clients' replies and `weighted_by_key` to the metrics of a
                round.
            workers: number of workers to wait for before the first round (None: all).
            max_empty_rounds: number of deadlines without a valid reply after which the run fails.
            **options: further arguments of `FederatedServer`, such as `checkpoint_path` and `min_replies`.
                `round_timeout` is the argument `timeout` of `start`.
        """
        self._setup: tuple[Any, ...] = alg, params, key
        self._options, self._run_options = options, {"workers": workers, "max_empty_rounds": max_empty_rounds}
        self.fraction_evaluate, self.weighted_by_key = fraction_evaluate, weighted_by_key
        self.evaluate_metrics_aggr_fn = evaluate_metrics_aggr_fn
        self._unanswered = Counter[int]()  # evaluations in a row without a reply, by node

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 60.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the rounds of a federation.

        Args:
            grid: the Flower grid.
            initial_arrays: initial model in place of `params`, from `params_to_arrays`.
            num_rounds: total number of rounds, rounds before a checkpoint included.
            timeout: seconds that a round, and an evaluation, waits for replies.
            train_config: must be None or empty, because clients read their settings from `context.run_config`.
            evaluate_config: config for `@app.evaluate()` of the clients.
            evaluate_fn: function of the round and the model, called on the server before the first round and after
                each.

        Returns:
            The final model, and by round, counted from 1: the costs and the loss, the clients' metrics, and those of
            `evaluate_fn`. After a restart from a checkpoint, only the rounds since then.

        Raises:
            ValueError: `train_config` is not empty, `initial_arrays` has other names than the parameters, or an
                argument of the server is not valid.
            RuntimeError: too few workers registered, or no valid reply arrived, for `max_empty_rounds` deadlines; or all
                nodes, at least two, were rejected three times before a worker registered.
        """
        if train_config:
            raise ValueError(f"train_config = {dict(train_config)}: must be empty; put settings in the run config")
        alg, params, key = self._setup
        if initial_arrays is not None:
            params = arrays_to_params(initial_arrays, alg.params(alg.init(params)))
        self.server = FederatedServer(alg, params, key, round_timeout=timeout, **self._options)
        self.summary()
        result, config, done = Result(), evaluate_config or ConfigRecord(), int(self.server.state.round)

        def evaluate_on_server(round: int) -> MetricRecord | None:
            result.arrays = params_to_arrays(alg.params(self.server.state))
            metrics = evaluate_fn(round, result.arrays) if evaluate_fn else None
            if metrics is not None:
                result.evaluate_metrics_serverapp[round] = metrics
            return metrics

        if evaluated := evaluate_on_server(done):
            _log_round(done, num_rounds, server=evaluated)
        for stats in self.server.run(grid, num_rounds, **self._run_options):
            done = stats.round + 1
            result.train_metrics_clientapp[done], central = _summarize(stats), evaluate_on_server(done)
            messages = self.configure_evaluate(done, result.arrays, config, grid)
            replies = _collect_evaluations(grid, messages, timeout, self._unanswered)
            clients = self.aggregate_evaluate(done, replies)
            if clients is not None:
                result.evaluate_metrics_clientapp[done] = clients
            _log_round(done, num_rounds, train=result.train_metrics_clientapp[done], clients=clients, server=central)
        return result

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return the messages of an evaluation, to a random share of the nodes that were not absent in the last round."""
        roster = self.server._roster
        nodes = sorted(node for node, worker in roster.nodes.items() if not roster.absent[worker])
        nodes = [node for node in nodes if self._unanswered[node] < MAX_UNANSWERED]
        chosen = random.Random(server_round).sample(nodes, math.ceil(self.fraction_evaluate * len(nodes)))
        about = ConfigRecord({**config, "server-round": server_round})
        content = RecordDict({"arrays": arrays, "config": about})
        return [Message(content, node, MessageType.EVALUATE, ttl=self.server._timeout) for node in chosen]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of the metrics in the replies, one of each node, without damaged and unusual ones."""
        valid: dict[frozenset[str], list[RecordDict]] = defaultdict(list)  # by the names of the metrics
        for reply in replies:
            try:
                valid[frozenset(_check_evaluation(reply, self.weighted_by_key))].append(reply.content)
            except Exception as error:  # whatever a reply holds, only this reply is rejected
                log.warning("evaluation by node %s rejected: %s", reply.metadata.src_node_id, one_line(str(error)))
        try:
            return self.evaluate_metrics_aggr_fn(max(valid.values(), key=len), self.weighted_by_key) if valid else None
        except Exception as error:
            log.warning("evaluation of round %s has no result: %s", server_round, one_line(repr(error)))
        return None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Refuse, because a broadcast depends on what each worker has; `start` sends it."""
        raise NotImplementedError("LazyStrategy.configure_train: must not be called; call start, which runs the rounds")

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord, MetricRecord]:
        """Refuse, because a silent worker contributes what the server keeps of it; `start` adds up the replies."""
        raise NotImplementedError("LazyStrategy.aggregate_train: must not be called; call start, which runs the rounds")

    def summary(self) -> None:
        """Log the settings."""
        alg, memory = self._setup[0], "with" if self._setup[0].memory.is_persistent else "without"
        about = alg.num_workers, alg.oracle.size, type(alg.rule).__name__, type(alg.compressor).__name__, memory
        log.info("LazyStrategy: %d workers, %d parameters, %s, %s, %s memory on the server", *about)


def _log_round(round: int, num_rounds: int, **metrics: MetricRecord | None) -> None:
    """Log the metrics of a round as one line."""
    parts = [
        f"{part}: "
        + ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in record.items()
        )
        for part, record in metrics.items()
        if record
    ]
    log.info("[ROUND %d/%d] %s", round, num_rounds, one_line("; ".join(parts), 1000))
