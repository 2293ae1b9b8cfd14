"""The oracle against `jax.grad` of the plain loss of the whole shard, without tiles, padding or flat vectors."""

import dataclasses
import re
import warnings
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import laqjax
from laqjax import Shards, oracles, samplers, types
from laqjax._core import cpu_layouts
from tests.support import KEY, Toy, keys_of, softmax_loss

pytestmark = pytest.mark.core


@partial(jax.jit, static_argnums=(0, 1))
def plain(loss_fn: Any, reduction: str, params: Any, x: Any, y: Any, weight: Any, l2: Any) -> tuple[Any, Any]:
    """Loss and gradient of the rows of one worker, by `jax.grad` of one expression."""

    def loss(params: Any) -> jax.Array:
        total = jnp.sum(loss_fn(params, x, y) * weight)
        squares = [jnp.sum(leaf**2) for leaf in jax.tree.leaves(params)]
        return (total / jnp.sum(weight) if reduction == "mean" else total) + l2 / 2 * sum(squares)

    return jax.value_and_grad(loss)(params)


@jax.jit
def tiled(tiled: oracles.TiledOracle, theta: Any, shards: Shards, worker: Any) -> tuple[Any, Any]:
    result = tiled(theta, shards, worker)
    return result.loss, result.grad


def check(given: oracles.TiledOracle, params: Any, shards: Shards, workers: int = 4) -> None:
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
    check(oracles.from_loss(softmax_loss, params, l2=0.3, reduction=reduction, tile=tile), params, toy64.shards)


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
    given = oracles.from_loss(softmax_loss, toy64.oracle.unravel(toy64.theta0), l2=0.3, reduction=reduction)
    one = jnp.int32(1)
    draw = jax.jit(lambda start: given(toy64.theta0, toy64.shards, one, samplers.ExampleSelection(4, start=start)))
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
    given = oracles.from_loss(softmax_loss, params)
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
        given = oracles.from_loss(loss_fn, params, l2=0.01, tile=5)
        assert given.size == 63
        loss, grad = tiled(given, given.ravel(params), toy.shards, np.int32(1))
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        for leaf in jax.tree.leaves(given.unravel(grad)):
            same = {(3,): gradient["bias"], (3, 20): gradient["weight"], (20, 3): gradient["weight"].T}[leaf.shape]
            np.testing.assert_allclose(leaf, same, rtol=1e-4, atol=1e-7)


# ---- local training -----------------------------------------------------------------------------------------------


def test_one_plain_local_step_is_the_plain_oracle(toy: Toy) -> None:
    """Bit for bit, on a minibatch."""
    local, rows = (
        oracles.with_local_steps(toy.oracle, steps=1, lr=0.3),
        samplers.ExampleSelection(4, start=jnp.int32(2)),
    )
    shards = jax.tree.map(jnp.asarray, toy.shards)
    evaluate = jax.jit(lambda given: given(toy.theta0, shards, jnp.int32(1), rows))
    jax.tree.map(np.testing.assert_array_equal, evaluate(local), evaluate(toy.oracle))


def test_a_local_schedule_reads_the_round_and_not_that_of_the_draws(toy: Toy) -> None:
    """They differ in a federation, where a worker that lost its state draws as in round 0."""
    local = oracles.with_local_steps(toy.oracle, 1, lambda step: 0.1 * (step + 1))
    local = dataclasses.replace(local, returns_difference=True)
    nothing: Any = None
    context = types.RoundContext(toy.theta0, keys_of(0, 1), nothing, 4, nothing, round=jnp.int32(4))
    shards = jax.tree.map(jnp.asarray, toy.shards)
    change = jax.jit(lambda local: local.evaluate(toy.theta0, shards, None, None, context).grad)(local)
    np.testing.assert_allclose(change, 0.5 * tiled(toy.oracle, toy.theta0, toy.shards, np.int32(1))[1], atol=1e-6)


def test_an_inner_optimizer_sees_the_pytree(toy: Toy) -> None:
    frozen = optax.masked(optax.set_to_zero(), {"bias": True, "weight": False})
    local = oracles.with_local_steps(toy.oracle, 2, optimizer=optax.chain(optax.sgd(0.1), frozen))
    evaluate = jax.jit(lambda given: given(toy.theta0, jax.tree.map(jnp.asarray, toy.shards), jnp.int32(1)).grad)
    change = local.unravel(evaluate(local))
    assert not np.any(change["bias"])
    assert np.any(change["weight"])


# ---- the form of gradients -----------------------------------------------------------------------------------------


class Convolutions(linen.Module):
    """Strides, dilation, groups, NCHW, a branch and a loop over layers: whatever a jaxpr may hold."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.relu(linen.Conv(4, (3, 3), strides=2)(x))
        x = linen.relu(linen.Conv(4, (3, 3), kernel_dilation=2, feature_group_count=2)(x))
        kernel = self.param("kernel", linen.initializers.normal(0.1), (6, 4, 3, 3))
        x = jax.lax.conv(jnp.moveaxis(x, -1, 1), kernel, (1, 1), "SAME")
        x = jax.lax.cond(jnp.sum(x) > 1e9, jnp.zeros_like, lambda x: x, x)
        layers = self.param("layers", linen.initializers.normal(0.1), (2, 6, 6, 3, 3))
        x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(jax.lax.conv(x, kernel, (1, 1), "SAME")), None), x, layers)
        return linen.Dense(3)(x.reshape(len(x), -1))


def test_gradients_in_the_form_of_the_fast_kernels_are_the_gradients(toy: Toy) -> None:
    """Rewritten equation by equation, and equal to what JAX gives as it stands; a model's kernels [in, out] among them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model, x = Convolutions(), jax.random.normal(jax.random.key(1), (6, 8, 8, 2))
        params = model.init(jax.random.key(0), x)

        def loss(params: Any, x: Any) -> Any:
            logits: Any = model.apply(params, x)
            return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

        both = jax.value_and_grad(loss)
        expected, given = (
            both(params, x),
            jax.jit(lambda p, x: cpu_layouts.with_canonical_layouts(both, p, x))(params, x),
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), given, expected)
        found: list[Any] = []

        def collect(jaxpr: Any) -> None:
            for eqn in jaxpr.eqns:
                if eqn.primitive is jax.lax.conv_general_dilated_p:
                    found.append(eqn.params["dimension_numbers"])
                for value in eqn.params.values():
                    for inner in cpu_layouts._sub_jaxprs(value):
                        collect(inner)

        collect(jax.make_jaxpr(lambda p, x: cpu_layouts.with_canonical_layouts(both, p, x))(params, x).jaxpr)
    assert len(found) >= 7  # forward and backward ones
    assert {(n.lhs_spec, n.rhs_spec, n.out_spec) for n in found} == {((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))}


def convolution_layouts(use_cpu_layouts: bool) -> set[str]:
    """Return the layouts of the convolutions in the program of two gradient steps of a model."""
    kernel = jnp.ones((3, 3, 2, 4))

    def loss(kernel: Any, x: Any, y: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        image = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=numbers)
        return jnp.sum(jnp.tanh(image), axis=(1, 2, 3))

    oracle = oracles.from_loss(loss, kernel, use_cpu_layouts=use_cpu_layouts)
    shards = Shards(jnp.ones((1, 6, 8, 8, 2)), jnp.zeros((1, 6)), jnp.ones((1, 6)))

    @jax.jit
    def train(params: Any) -> Any:
        return jax.lax.fori_loop(0, 2, lambda _, params: params - oracle(params, shards, jnp.int32(0)).grad, params)

    program = train.lower(oracle.ravel(kernel)).compile().as_text()
    assert program is not None
    return set(re.findall(r"dim_labels=(\S+?),", program))


NEEDLESS = "XLA itself brings convolutions inside loops into its fast form, so that laqjax._core.cpu_layouts may go"


@pytest.mark.filterwarnings(f"default:{NEEDLESS}")
def test_the_layouts_in_the_program_are_those_of_the_fast_kernels() -> None:
    fast = "b01f_01io->b01f"
    assert convolution_layouts(True) == {fast}
    if convolution_layouts(False) == {fast}:
        warnings.warn(NEEDLESS, stacklevel=1)


@pytest.mark.long
def test_points_of_convolutions_run_in_turn() -> None:
    """And are what they are alone."""
    model = linen.Sequential([linen.Conv(2, (3, 3)), lambda x: x.reshape(len(x), -1), linen.Dense(3)])
    x = np.random.default_rng(0).normal(size=(3, 4, 6, 6, 1)).astype(np.float32)
    shards = Shards(x, np.arange(12, dtype=np.int32).reshape(3, 4) % 3, np.ones((3, 4), np.float32))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        params = model.init(jax.random.key(0), x[0])

        def loss(params: Any, x: Any, y: Any) -> Any:
            logits: Any = model.apply(params, x)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1)[:, 0]

        given = oracles.from_loss(loss, params)
        assert given.prefers_sequential(shards)
        algs = [laqjax.algorithms.laq(given, lr=0.1, num_workers=3, bits=bits) for bits in (2, 4)]
        many = laqjax.sweep(laqjax.stack_algorithms(algs), params, shards, 8, jax.random.split(KEY, 2))
        for i, key in enumerate(jax.random.split(KEY, 2)):
            one = laqjax.run(algs[i], params, shards, 8, key)
            np.testing.assert_array_equal(one.info.sent, many.info.sent[:, i])
            np.testing.assert_allclose(
                one.state.params, laqjax.select_points(many.state, i).params, rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize(("backend", "loops"), [("cpu", 2), ("gpu", 0)])
def test_a_round_on_an_accelerator_has_no_loop_over_workers_or_tiles(
    monkeypatch: pytest.MonkeyPatch, backend: str, loops: int
) -> None:
    """The softmax round of MNIST as it is given to the compiler: on the CPU a loop over workers and one over tiles."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    problem = laqjax.problems.Softmax(784, 10)
    alg = laqjax.algorithms.laq(problem.oracle(), lr=0.02, num_workers=10)
    shapes = [((10, 6000, 784), np.uint8), ((10, 6000), np.int32), ((10, 6000), np.float32)]
    shards = laqjax.Shards(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    state = jax.eval_shape(alg.init, problem.init_params(0))
    platforms = ["cpu" if backend == "cpu" else "cuda"]
    exported = jax.export.export(jax.jit(alg.step), platforms=platforms)(state, shards, jax.random.key(0))
    text = exported.mlir_module()
    assert text.count("stablehlo.while") == loops
    large = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "784" in line]
    assert len(large) == 2  # the forward and the backward product


@pytest.mark.parametrize("rows", [2, 50])  # images fewer than outputs, and more
@pytest.mark.parametrize("name", ["softmax", "network"])
def test_bytes_are_pixels_in_0_to_1_however_few_they_are(name: str, rows: int) -> None:
    problems = {"softmax": laqjax.problems.Softmax(7, 3), "network": laqjax.problems.TwoLayerNetwork(7, 3, hidden=5)}
    problem: Any = problems[name]
    rng = np.random.default_rng(rows)
    x, y = rng.integers(0, 256, (1, rows, 7)).astype(np.uint8), rng.integers(0, 3, (1, rows)).astype(np.int32)
    given, weight = problem.oracle(), np.ones((1, rows), np.float32)
    theta = rng.normal(size=given.size).astype(np.float32)
    both = [tiled(given, theta, Shards(each, y, weight), np.int32(0)) for each in (x, x.astype(np.float32) / 255)]
    for a, b in zip(*both, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "rows", "at_once"), [(10**5, 2, 8), (10**6, 2, 1), (10**7, 2, 8), (10**3, 100, 1)])
def test_workers_take_turns_where_their_data_or_vectors_leave_the_cache(size: int, rows: int, at_once: int) -> None:
    given = oracles.from_loss(lambda params, x, y: x[:, 0] * params[0], jnp.zeros(size))
    alg = laqjax.algorithms.laq(given, lr=0.1, num_workers=8)
    x, row = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((8, rows, 1000), (8, rows)))
    assert alg.default_worker_batch_size(Shards(x, row, row)) == at_once
