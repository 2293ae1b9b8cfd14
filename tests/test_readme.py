"""The README's Python blocks run as they stand."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

import laqjax
from laqjax import problems, types, wire

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_use_it(mnist: laqjax.Shards) -> None:
    names: dict[str, Any] = {}
    first = next(block for block in BLOCKS if "datasets.load" in block)
    exec(first.replace("rounds=200", "rounds=5"), names)  # what it shows does not depend on how long it runs
    out = names["out"]
    assert int(out.state.round) == 10
    np.testing.assert_array_equal(names["shards"].x, mnist.x)


def test_your_own_method() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (10, 12, 20)).astype(np.uint8), rng.integers(0, 3, (10, 12)).astype(np.int32)
    problem = problems.Softmax(20, 3)
    oracle = problem.oracle()
    names: dict[str, Any] = {"oracle": oracle, "theta0": problem.theta0(oracle)}
    names["shards"] = laqjax.Shards(x, y, np.ones((10, 12), np.float32))
    exec(next(block for block in BLOCKS if "Adding" in block or "class Half" in block), names)
    one, many, alg = names["one"], names["many"], names["algs"][0]
    np.testing.assert_array_equal(many.info.sent[:, 0], one.info.sent)
    assert 0 < one.info.sent.mean() < 1
    assert set(one.info.bits_up[one.info.sent]) == {16 * oracle.size}
    like = names["theta0"]
    key = jax.random.key(0)
    keys = types.Keys(key, key, key, jax.numpy.int32(1), jax.numpy.int32(0))
    payload = alg.compressor.encode(like, keys)
    data = wire.to_bytes(alg.compressor, payload, like)
    assert 8 * len(data) == wire.message_bits(alg.compressor.wire(payload, like)) == 16 * oracle.size
    np.testing.assert_array_equal(wire.from_bytes(alg.compressor, data, like), alg.compressor.decode(payload, like))
