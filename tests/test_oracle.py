"""The oracle against `jax.grad` of the plain loss of the whole shard, without tiles, padding or flat vectors."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import Toy, softmax_loss
from flax import linen, nnx

from laqjax import Shards, oracle


@partial(jax.jit, static_argnums=(0, 1))
def plain(loss_fn: Any, reduction: str, params: Any, x: Any, y: Any, weight: Any, l2: Any) -> tuple[Any, Any]:
    """Loss and gradient of the rows of one worker, by `jax.grad` of one expression."""

    def loss(params: Any) -> jax.Array:
        total = jnp.sum(loss_fn(params, x, y) * weight)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)]
        return (total / jnp.sum(weight) if reduction == "mean" else total) + l2 / 2 * sum(squares)

    return jax.value_and_grad(loss)(params)


@jax.jit
def tiled(tiled: oracle.TiledOracle, theta: Any, shards: Shards, worker: Any) -> tuple[Any, Any]:
    return tiled(theta, shards, worker)


def check(given: oracle.TiledOracle, params: Any, shards: Shards, workers: int = 4) -> None:
    for worker in range(workers):
        loss, grad = tiled(given, given.ravel(params), shards, np.int32(worker))
        own = np.asarray(shards.weight[worker]) > 0
        x, y, weight = (np.asarray(a)[worker][own] for a in shards)
        weight = weight.astype(given.dtype)
        expected, gradient = plain(given.loss_fn, given.reduction, params, x, y, weight, given.l2)
        np.testing.assert_allclose(loss, expected, rtol=1e-13)
        np.testing.assert_allclose(grad, given.ravel(gradient), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("tile", "reduction"), [(4, "mean"), (5, "mean"), (100, "mean"), (None, "mean"), (5, "sum")]
)  # of shards of 12 rows
def test_any_tile_gives_the_whole_shard(tile: int | None, reduction: str, toy64: Toy) -> None:
    params = toy64.oracle.unravel(toy64.theta0)
    check(oracle.from_loss(softmax_loss, params, l2=0.3, reduction=reduction, tile=tile), params, toy64.shards)


def test_weights_count_the_examples(toy64: Toy) -> None:
    """Weight 2 is the example twice; any positive weights make a mean."""
    params = toy64.oracle.unravel(toy64.theta0)
    rng = np.random.default_rng(0)
    weight = np.where(toy64.shards.weight > 0, rng.uniform(0.1, 3, (4, 12)), 0)
    check(toy64.oracle, params, toy64.shards._replace(weight=weight))
    twice = Shards(*(np.concatenate([a, a[:, :4]], axis=1) for a in toy64.shards))
    weight = np.array(toy64.shards.weight)
    weight[:, :4] *= 2
    loss, grad = tiled(toy64.oracle, toy64.theta0, toy64.shards._replace(weight=weight), np.int32(1))
    expected, gradient = tiled(toy64.oracle, toy64.theta0, twice, np.int32(1))
    np.testing.assert_allclose(loss, expected, rtol=1e-13)
    np.testing.assert_allclose(grad, gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_minibatches_estimate_the_whole_shard(reduction: str, toy64: Toy) -> None:
    """The mean over the blocks of a shard is the shard itself: data and l2 in the shares that they have there."""
    given = oracle.from_loss(softmax_loss, toy64.oracle.unravel(toy64.theta0), l2=0.3, reduction=reduction)
    one = jnp.int32(1)
    draw = jax.jit(lambda start: given(toy64.theta0, toy64.shards, one, oracle.Rows(4, start=start)))
    parts = [draw(np.int32(start)) for start in (0, 4, 8)]
    loss, grad = tiled(given, toy64.theta0, toy64.shards, np.int32(1))
    np.testing.assert_allclose(np.mean([part[0] for part in parts]), loss, rtol=1e-12)
    np.testing.assert_allclose(np.mean([part[1] for part in parts], axis=0), grad, rtol=1e-9, atol=1e-14)


def test_padding_does_not_matter(toy: Toy) -> None:
    padding = np.asarray(toy.shards.weight) == 0
    x, y = np.array(toy.shards.x), np.array(toy.shards.y)
    x[padding], y[padding] = 255, 2
    for worker in np.arange(4, dtype=np.int32):
        both = toy.shards, Shards(x, y, toy.shards.weight)
        one, other = (tiled(toy.oracle, toy.theta0, shards, worker) for shards in both)
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("stored", [np.int8, np.float32, np.float64])
def test_data_are_cast_from_any_storage(stored: type, toy64: Toy) -> None:
    params = toy64.oracle.unravel(toy64.theta0)
    shards = toy64.shards._replace(x=(np.asarray(toy64.shards.x) // 2).astype(stored))
    check(toy64.oracle, params, shards, workers=1)


def test_unravel_is_the_inverse_of_ravel(toy: Toy) -> None:
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.float32(7), jnp.arange(8.0, 10)], "c": ()}
    given = oracle.from_loss(softmax_loss, params)
    theta = given.ravel(params)
    np.testing.assert_array_equal(theta, np.arange(10.0)[[0, 1, 2, 3, 4, 5, 7, 8, 9]])
    back = given.unravel(theta)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    np.testing.assert_array_equal(toy.oracle.ravel(toy.oracle.unravel(toy.theta0)), toy.theta0)


def test_every_framework_gives_the_same_oracle(toy: Toy) -> None:
    """One model as a plain dict, flax.linen, flax.nnx and equinox: same loss, same gradient leaf by leaf."""
    tree = toy.oracle.unravel(toy.theta0)
    kernel, bias = tree["weight"].T, tree["bias"]

    def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]

    def pixels(x: jax.Array) -> jax.Array:
        return x.astype(np.float32) / 255

    apply: Any = linen.Dense(3).apply
    flax_params = {"params": {"kernel": kernel, "bias": bias}}

    layer = nnx.Linear(20, 3, rngs=nnx.Rngs(0))
    layer.kernel, layer.bias = nnx.Param(kernel), nnx.Param(bias)
    graph, state = nnx.split(layer)
    merge: Any = nnx.merge

    linear = eqx.nn.Linear(20, 3, key=jax.random.key(0))
    linear = eqx.tree_at(lambda m: (m.weight, m.bias), linear, (kernel.T, bias))
    arrays, static = eqx.partition(linear, eqx.is_inexact_array)

    models = {
        "linen": (lambda p, x, y: cross_entropy(apply(p, pixels(x)), y), flax_params),
        "nnx": (lambda p, x, y: cross_entropy(merge(graph, p)(pixels(x)), y), state),
        "equinox": (lambda p, x, y: cross_entropy(jax.vmap(eqx.combine(p, static))(pixels(x)), y), arrays),
    }
    expected, gradient = tiled(toy.oracle, toy.theta0, toy.shards, np.int32(1))
    gradient = toy.oracle.unravel(gradient)
    for loss_fn, params in models.values():
        given = oracle.from_loss(loss_fn, params, l2=0.01, tile=5)
        assert given.size == 63
        loss, grad = tiled(given, given.ravel(params), toy.shards, np.int32(1))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for leaf in jax.tree.leaves(given.unravel(grad)):
            same = {(3,): gradient["bias"], (3, 20): gradient["weight"], (20, 3): gradient["weight"].T}[leaf.shape]
            np.testing.assert_allclose(leaf, same, rtol=1e-4, atol=1e-7)
