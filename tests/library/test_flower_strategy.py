"""A federation as Flower users write it: their strategy, mods, evaluation and partitions."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from laqjax import partition
from tests.laws.registry import make
from tests.support import KEY, Toy, make_toy

pytest.importorskip("flwr")
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp.mod import message_size_mod
from flwr.serverapp.strategy import Result, Strategy

from laqjax import federation
from laqjax.federation import LazyStrategy
from laqjax.federation.testing import InProcessGrid


@pytest.fixture(scope="module")
def toy() -> Toy:
    return make_toy(np.float32)


@pytest.fixture(scope="module")
def alg(toy: Toy) -> Any:
    return make("laq", toy)


class App:
    """A client app with `@app.evaluate()`, and the evaluations that it was asked for."""

    def __init__(self, toy: Toy, alg: Any, **options: Any) -> None:
        self.asked: list[tuple[int, dict[str, Any]]] = []
        self.answers: dict[int, MetricRecord] = {}
        self.app = federation.client_app(
            alg, lambda worker: jax.tree.map(lambda a: a[worker : worker + 1], toy.shards), **options
        )

        @self.app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            worker = int(context.node_config["partition-id"])
            self.asked.append((worker, dict(message.content.config_records["config"])))
            vector = next(iter(message.content.array_records["arrays"].values())).numpy()
            usual = MetricRecord({"norm": float(np.abs(vector).sum()), "worker": worker, "num-examples": 1 + worker})
            return Message(RecordDict({"metrics": self.answers.get(worker, usual)}), reply_to=message)


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """What Flower's logger says."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("flwr")
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def start(alg: Any, toy: Toy, grid: Any, rounds: int = 4, **given: Any) -> Result:
    options = {name: given.pop(name) for name in ("evaluate_config", "evaluate_fn", "timeout") if name in given}
    return LazyStrategy(alg, toy.theta0, KEY, **given).start(grid, num_rounds=rounds, **options)


# ---- strategy ---------------------------------------------------------------------------------------------------


def test_a_strategy_runs_the_rounds_of_the_server(toy: Toy, alg: Any, lines: list[str]) -> None:
    server = federation.FederatedServer(alg, toy.theta0, KEY)
    stats = list(server.run(InProcessGrid(App(toy, alg).app, range(4)), 4))
    app, seen = App(toy, alg), []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord | None:
        seen.append(round)
        return MetricRecord({"accuracy": 0.5}) if round else None

    config = ConfigRecord({"batch-size": 8})
    result = start(alg, toy, InProcessGrid(app.app, range(4)), evaluate_fn=evaluate, evaluate_config=config)
    params = alg.params(server.state)
    final = federation.arrays_to_params(result.arrays, params)
    jax.tree.map(np.testing.assert_array_equal, final, params)
    metrics = result.train_metrics_clientapp
    assert [metrics[round]["uploads"] for round in range(1, 5)] == [one.sent.sum() for one in stats]
    assert [metrics[round]["bits-up"] for round in range(1, 5)] == [one.bits_up.sum() for one in stats]
    assert [metrics[round]["train_loss"] for round in range(1, 5)] == [one.loss for one in stats]
    assert seen == [0, 1, 2, 3, 4]
    assert result.evaluate_metrics_serverapp == {round: {"accuracy": 0.5} for round in range(1, 5)}
    assert sorted(app.asked[-4:]) == [(worker, {"batch-size": 8, "server-round": 4}) for worker in range(4)]
    assert dict(config) == {"batch-size": 8}
    found = result.evaluate_metrics_clientapp[4]
    assert found["worker"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3 + 3 * 4) / 10)
    assert found["norm"] == pytest.approx(float(np.abs(final["bias"]).sum()), rel=1e-5)
    assert [line[:10] for line in lines if "[ROUND" in line] == [f"[ROUND {round}/4" for round in range(1, 5)]
    assert all("\n" not in line for line in lines)
    assert re.search(r"uploads \d.*norm 0\.\d+.*accuracy 0\.5", lines[-1])


def test_an_evaluation_that_fails_ends_no_run(toy: Toy, alg: Any, lines: list[str]) -> None:
    answers: list[tuple[Any, str | None]] = [
        ({"worker": float("nan"), "norm": 1.0, "num-examples": 1}, "must be one, with finite numbers"),
        ({"norm": 1.0}, "'num-examples' >= 0"),
        ({"norm": 1.0, "num-examples": [1]}, "'num-examples' >= 0"),
        ({"more": 1.0, "num-examples": 1}, None),  # other metrics than the rest
    ]
    for answer, reason in answers:
        app = App(toy, alg)
        app.answers[2] = MetricRecord(answer)
        grid = InProcessGrid(app.app, range(4), uplink_fault=lose_evaluation_of_worker_3)
        result = start(alg, toy, grid, rounds=1)
        assert result.evaluate_metrics_clientapp[1]["worker"] == pytest.approx((0 * 1 + 1 * 2) / 3)
        assert reason is None or any(reason in line and "102" in line for line in lines)
    lines.clear()
    app = App(toy, alg)
    app.answers = {worker: MetricRecord({"a\nb" * 500: 1.0, "num-examples": 1}) for worker in range(4)}
    assert start(alg, toy, InProcessGrid(app.app, range(4)), rounds=1).evaluate_metrics_clientapp
    assert len([line for line in lines if "\n" in line or len(line) > 1020]) == 0
    app = App(toy, alg)
    app.answers = {worker: MetricRecord({"a": 1.0, "num-examples": 0}) for worker in range(4)}
    assert not start(alg, toy, InProcessGrid(app.app, range(4)), rounds=1).evaluate_metrics_clientapp
    assert any("evaluation of round 1 has no result" in line for line in lines)


def lose_evaluation_of_worker_3(message: Message) -> list[Message]:
    is_lost = message.metadata.message_type == "evaluate" and message.metadata.src_node_id == 103
    return [] if is_lost else [message]


def test_a_share_of_the_nodes_evaluates(toy: Toy, alg: Any) -> None:
    app = App(toy, alg)
    start(alg, toy, InProcessGrid(app.app, range(4)), fraction_evaluate=0.5)
    assert len(app.asked) == 4 * 2
    assert len({worker for worker, _ in app.asked}) > 2
    app.asked.clear()
    result = start(alg, toy, InProcessGrid(app.app, range(4)), fraction_evaluate=0.0)
    assert (app.asked, result.evaluate_metrics_clientapp) == ([], {})


def test_a_node_that_answers_no_evaluation_is_asked_no_more(toy: Toy, alg: Any, lines: list[str]) -> None:
    app = App(toy, alg)
    start(alg, toy, InProcessGrid(app.app, range(4), uplink_fault=lose_evaluation_of_worker_3), rounds=5)
    assert [sum(worker == one for one, _ in app.asked) for worker in range(4)] == [5, 5, 5, 3]
    assert any("node 103 left 3 evaluations without a reply" in line for line in lines)


def test_a_worker_that_missed_the_round_is_not_asked_to_evaluate(toy: Toy, alg: Any) -> None:
    def lose(message: Message) -> list[Message]:
        is_lost = message.metadata.message_type == "train" and message.metadata.src_node_id == 101
        return [] if is_lost else [message]

    app = App(toy, alg)
    start(alg, toy, InProcessGrid(app.app, range(4), uplink_fault=lose), rounds=2)
    assert {worker for worker, _ in app.asked} == {0, 2, 3}


def test_a_strategy_resumes_from_a_checkpoint(toy: Toy, alg: Any, tmp_path: Path) -> None:
    grid, given = InProcessGrid(App(toy, alg).app, range(4)), dict[str, Any](checkpoint_path=tmp_path / "server.npz")
    whole = start(alg, toy, InProcessGrid(App(toy, alg).app, range(4)))
    start(alg, toy, grid, rounds=2, **given)
    rest = start(alg, toy, grid, **given)
    assert list(rest.train_metrics_clientapp) == [3, 4]
    np.testing.assert_array_equal(rest.arrays["weight"].numpy(), whole.arrays["weight"].numpy())


def test_the_initial_model_may_be_arrays(toy: Toy, alg: Any) -> None:
    strategy = LazyStrategy(alg, toy.theta0, KEY, fraction_evaluate=0.0)
    assert isinstance(strategy, Strategy)
    grid, other = InProcessGrid(App(toy, alg).app, range(4)), alg.oracle.unravel(jax.numpy.ones(63))
    found = strategy.start(grid, federation.params_to_arrays(other), num_rounds=0).arrays
    jax.tree.map(np.testing.assert_array_equal, federation.arrays_to_params(found, other), other)
    with pytest.raises(ValueError, match=r"train_config = \{'lr': 1.0\}: must be empty"):
        strategy.start(grid, train_config=ConfigRecord({"lr": 1.0}))
    with pytest.raises(NotImplementedError, match=r"configure_train.*call start"):
        strategy.configure_train(1, found, ConfigRecord(), grid)
    with pytest.raises(NotImplementedError, match=r"aggregate_train.*call start"):
        strategy.aggregate_train(1, [])


def test_arrays_are_named_by_path() -> None:
    params = {"dense": [np.zeros(2, np.float32), np.ones((2, 3), np.float32)]}
    arrays = federation.params_to_arrays(params)
    assert list(arrays) == ["dense/0", "dense/1"]
    jax.tree.map(np.testing.assert_array_equal, federation.arrays_to_params(arrays, params), params)
    with pytest.raises(ValueError, match=r"arrays named \['dense/0', 'dense/1'\]: must be \['params'\]"):
        federation.arrays_to_params(arrays, np.zeros(8))


# ---- client -----------------------------------------------------------------------------------------------------


def test_mods_wrap_every_function(toy: Toy, alg: Any) -> None:
    types = []

    def count(message: Message, context: Context, call_next: Any) -> Message:
        types.append(message.metadata.message_type)
        return call_next(message, context)

    app = App(toy, alg, mods=[count, message_size_mod])
    plain = start(alg, toy, InProcessGrid(App(toy, alg).app, range(4)), rounds=2)
    modded = start(alg, toy, InProcessGrid(app.app, range(4)), rounds=2)
    assert modded.train_metrics_clientapp == plain.train_metrics_clientapp
    assert {kind: types.count(kind) for kind in types} == {"query": 4, "train": 8, "evaluate": 8}


def test_a_client_is_built_from_the_context(toy: Toy, alg: Any) -> None:
    built = []

    def client_fn(context: Context) -> federation.FederatedClient:
        built.append((context.node_id, context.run_config["scale"]))
        return federation.FederatedClient(
            alg, lambda worker: jax.tree.map(lambda a: a[worker : worker + 1], toy.shards)
        )

    grid = InProcessGrid(federation.client_app(client_fn), range(4))
    for context in grid.contexts.values():
        context.run_config = {"scale": 2.0}
    result = start(alg, toy, grid, fraction_evaluate=0.0)
    whole = start(alg, toy, InProcessGrid(App(toy, alg).app, range(4)), fraction_evaluate=0.0)
    assert result.train_metrics_clientapp[4]["uploads"] == whole.train_metrics_clientapp[4]["uploads"]
    assert sorted(built) == [(node, 2.0) for node in range(100, 104)]  # once for each node


@pytest.mark.parametrize("config", [{"partition-id": 0, "num-partitions": 2}, {}])
def test_other_numbers_of_partitions_are_refused(
    config: dict[str, int], toy: Toy, alg: Any, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(toy, alg)
    grid = InProcessGrid(app.app, range(4))
    for context in list(grid.contexts.values())[1:]:
        context.node_config["num-partitions"] = 4
    grid.contexts[100].node_config = config  # pyright: ignore[reportAttributeAccessIssue]
    result = start(alg, toy, grid, rounds=1, workers=3)
    assert result.train_metrics_clientapp[1]["workers"] == 3
    assert "must have partition-id, and num-partitions = 4, the number of workers" in caplog.text


# ---- partitions -------------------------------------------------------------------------------------------------


class Columns:
    """A stand-in for `datasets.Dataset`: values without a format, arrays with the format "numpy"."""

    def __init__(self, rows: list[dict[str, Any]], form: str | None = None) -> None:
        self.rows, self.form = rows, form

    def with_format(self, form: str) -> "Columns":
        return Columns(self.rows, form)

    def __getitem__(self, index: slice) -> dict[str, Any]:
        assert (self.form, index) == ("numpy", slice(None))
        return {name: np.asarray([row[name] for row in self.rows]) for name in self.rows[0]}


class EveryNth:
    """A stand-in for a partitioner of flwr-datasets."""

    def __init__(self, rows: list[dict[str, Any]], num_partitions: int) -> None:
        self.rows, self.num_partitions = rows, num_partitions

    def load_partition(self, number: int) -> Columns:
        return Columns(self.rows[number :: self.num_partitions])


ROWS = [{"image": np.full((2, 2), i, np.uint8), "label": i % 3, "age": 10.0 * i} for i in range(5)]


def test_partitions_become_shards() -> None:
    partitions = [EveryNth(ROWS, 2).load_partition(number) for number in range(2)]
    shards = partition.shards_from_partitions(partitions)
    assert (shards.x.shape, shards.x.dtype) == ((2, 3, 2, 2), np.uint8)
    np.testing.assert_array_equal(shards.x[:, :, 0, 0], [[0, 2, 4], [1, 3, 0]])
    np.testing.assert_array_equal(shards.y, [[0, 2, 1], [1, 0, 0]])
    np.testing.assert_array_equal(shards.weight, [[1, 1, 1], [1, 1, 0]])
    columns = [{name: [row[name] for row in part.rows] for name in ROWS[0]} for part in partitions]
    for same in ([part.rows for part in partitions], columns):
        jax.tree.map(np.testing.assert_array_equal, partition.shards_from_partitions(same), shards)
    table = partition.shards_from_partitions([ROWS], x=["age", "label"], y="age")
    assert table.x.keys() == {"age", "label"}
    np.testing.assert_array_equal(table.x["age"], [[0, 10, 20, 30, 40]])


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ([], "partitions of length 0: must be one partition for each worker"),
        ([ROWS, []], r"partition 1 with the columns \[\]: must have \['image', 'label'\] and a row"),
        ([{"img": [1], "label": [1]}], r"columns \['img', 'label'\]: must have \['image'\]"),
        ([{"image": [], "label": []}], "partition 0 .*: must have a row"),
        ([{"image": [1, 2], "label": [1]}], "must be numbers, with one entry in each column for each row"),
        ([{"image": ["a"], "label": [1]}], "must be numbers"),
        ([{"image": [[1, 2], [1]], "label": [1, 1]}], "must have a row, and rows of one shape"),
        ([ROWS, [{"image": np.zeros(3), "label": 1}]], r"rows float64\[3\], uint8\[2, 2\]: must be of one shape and dtype"),
    ],
)  # fmt: skip
def test_bad_partitions_are_refused(partitions: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        partition.shards_from_partitions(partitions)


def test_a_partition_of_datasets() -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list([{"image": row["image"].tolist(), "label": row["label"]} for row in ROWS])
    shards = partition.shards_from_partitions([whole.shard(2, number) for number in range(2)])
    np.testing.assert_array_equal(shards.y, [[0, 1, 2], [0, 1, 0]])
    assert shards.x.shape == (2, 3, 2, 2)
