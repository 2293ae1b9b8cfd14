"""The README's Python blocks run as they stand."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import laqjax
from laqjax import problems, types, wire

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def block(word: str) -> str:
    return next(block for block in BLOCKS if word in block)


@pytest.fixture(scope="module")
def used() -> dict[str, Any]:
    """The names of the first example, after it ran."""
    names: dict[str, Any] = {}
    exec(block("datasets.load").replace("rounds=200", "rounds=5"), names)  # it shows the same, however long it runs
    return names


def test_use_it(used: dict[str, Any], mnist: laqjax.Shards) -> None:
    assert int(used["out"].state.round) == 10
    assert used["params"]["weight"].shape == (10, 784)
    np.testing.assert_array_equal(used["shards"].x, mnist.x)


def test_a_loop_of_your_own(used: dict[str, Any]) -> None:
    names = dict(used)
    exec(block("step = jax.jit(alg.step)"), names)  # it asserts that the loop is the run
    assert int(names["state"].round) == 10


def test_your_own_model(used: dict[str, Any]) -> None:
    names = dict(used)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a user's, not the tests'
        exec(block("import flax"), names)
    assert jax.tree.structure(names["trained"]) == jax.tree.structure(names["params"])
    loss = names["out"].info.loss
    assert loss[-1] < 0.8 * loss[0]


def test_many_devices(used: dict[str, Any]) -> None:
    names = dict(used)
    exec(block("laqjax.mesh.make"), names)
    alone = laqjax.run(used["alg"], used["problem"].start(0), used["shards"], rounds=10, key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, names["state"], jax.device_get(alone.state))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(block("lazy_aggregate"), names)
    assert names["state"][0].sent.all()


def test_a_federation(used: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    from laqjax import loopback

    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    names = dict(used)
    text = block("flower.client_app").replace("rounds=100", "rounds=3")
    exec(text.replace(', programs=Path("results/programs")', ""), names)  # JAX's cache is one for the whole process
    grid = loopback.Loopback(names["client"], range(10))
    names["server"](grid, grid.contexts[100])
    assert Path("results/server.npz").exists()


def test_your_own_method() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (10, 12, 20)).astype(np.uint8), rng.integers(0, 3, (10, 12)).astype(np.int32)
    problem = problems.Softmax(20, 3)
    oracle = problem.oracle()
    names: dict[str, Any] = {"oracle": oracle, "theta0": problem.theta0(oracle)}
    names["shards"] = laqjax.Shards(x, y, np.ones((10, 12), np.float32))
    exec(block("class Half"), names)
    one, many, alg = names["one"], names["many"], names["algs"][0]
    np.testing.assert_array_equal(many.info.sent[:, 0], one.info.sent)
    assert 0 < one.info.sent[1:].mean() < 1
    assert set(one.info.bits_up[one.info.sent]) == {16 * oracle.size}
    like = names["theta0"]
    key = jax.random.key(0)
    keys = types.Keys(key, key, key, jax.numpy.int32(1), jax.numpy.int32(0))
    payload = alg.compressor.encode(like, keys)
    data = wire.to_bytes(alg.compressor, payload, like)
    assert 8 * len(data) == wire.message_bits(alg.compressor.wire(payload, like)) == 16 * oracle.size
    np.testing.assert_array_equal(wire.from_bytes(alg.compressor, data, like), alg.compressor.decode(payload, like))
