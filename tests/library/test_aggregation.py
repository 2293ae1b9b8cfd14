"""`lazy_aggregate` and `diloco_optimizer` refuse in one sentence what cannot work; test_sharding.py runs them on devices."""

import inspect
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import laqjax
from laqjax import algorithms, compressors, local_training, oracles
from laqjax.samplers import BlockSampler

PARAMS = {"b": jnp.zeros(6), "w": jnp.ones((8, 6))}
WHOLE = P()
SPECS = {"b": P(), "w": P(None, "model")}
WORKERS = local_training.replicate(PARAMS, 4)
LOCALLY: Any = {"axis": "data", "num_workers": 4, "sync_every": 3}
DILOCO = laqjax.diloco_optimizer(optax.adamw(1e-3), bits=4, **LOCALLY)
TOP = compressors.top_k(3)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (algorithms.laq, {"bits": 0}, "bits = 0: "),
        (algorithms.laq, {"bits": "4"}, "bits = '4': "),
        (algorithms.laq, {"max_silence": -1}, "max_silence = -1: "),
        (
            algorithms.laq,
            {"quantizer_blocks": "layers"},
            "quantizer_blocks = 'layers': must be None, 'leaf', or a sequence",
        ),
        (algorithms.laq, {"quantizer_blocks": (54, 0)}, "quantizer_blocks = (54, 0): must be"),
        (algorithms.laq, {"quantizer_blocks": (27.0, 27.0)}, "quantizer_blocks = (27.0, 27.0): must be"),
        (algorithms.laq, {"quantizer_blocks": ()}, "quantizer_blocks = (): must be"),
        (algorithms.laq, {"quantizer_blocks": 54}, "quantizer_blocks = 54: must be"),
        (algorithms.laq, {"collective": "all_gathr"}, "collective = 'all_gathr': must be one of"),
        (algorithms.laq, {"collective": "all_gathr"}, "did you mean 'all_gather'?"),
        (algorithms.laq, {"bit": 4}, "lazy_aggregate(bit=...) with laq: must be one of bits, xi,"),
        (algorithms.laq, {"bit": 4}, "did you mean 'bits'?"),
        (algorithms.laq, {"colective": "all_reduce"}, "did you mean 'collective'?"),
        (algorithms.laq, {"lr": 0.1}, "lazy_aggregate(lr=...): must not be given"),
        (algorithms.laq, {"optimizer": optax.adam}, "lazy_aggregate(optimizer=...): must not be given"),
        (algorithms.laq, {"oracle": None}, "lazy_aggregate(oracle=...): must not be given"),
        (
            algorithms.ef21,
            {},
            "lazy_aggregate with ef21 but without compressor: must be given, for example compressor=",
        ),
        (
            algorithms.fedadam,
            {},
            "algorithm = fedadam, which takes no optimizer: must be a method that takes one, such as",
        ),
        ("laq", {}, "algorithm = 'laq': must be a function, such as laqjax.algorithms.laq"),
        ("ef21", {}, "such as laqjax.algorithms.ef21"),
        (None, {}, "algorithm = None: must be a function"),
        (algorithms.laq, {"param_specs": {"w": P("data")}}, "must not name 'data', the axis of the workers"),
        (algorithms.laq, {"param_specs": {"w": "model"}}, "param_specs with a leaf 'model': must be a pytree of"),
        (
            algorithms.laq,
            {"param_specs": SPECS, "quantizer_blocks": (54,)},
            "quantizer_blocks = (54,) with param_specs: must be None or 'leaf'",
        ),
        (algorithms.lag_ps, {"smoothness": np.ones(4), "c": 0.1}, "with a history of kind 'absolute', such as `c`"),
        (algorithms.laq, {"skip_small": -1}, "skip_small = -1: must be a whole number >= 0"),
        (algorithms.laq, {"memory_dtype": jnp.bfloat16}, "with the memory Innovation: must be None, since worker and"),
        (algorithms.qsgd, {"memory_dtype": jnp.bfloat16}, "with the memory NoMemory: must be None, since worker and"),
        (algorithms.topk_ef, {"k": 3, "memory_dtype": "int8"}, "memory_dtype = 'int8': must be a floating dtype"),
        (algorithms.topk_ef, {"k": 3, "memory_dtype": "half a byte"}, "must be a floating dtype, such as jnp.bfloat16"),
    ],
)
def test_arguments_are_checked_in_the_constructor(method: Any, settings: Any, message: str) -> None:
    construct = inspect.unwrap(laqjax.lazy_aggregate)  # without the type checks of the tests, which come first
    with pytest.raises(ValueError, match=re.escape(message)):
        construct("data", 4, method, **settings)


def fraction(oracle: Any, **settings: Any) -> laqjax.Algorithm:
    """A method of one's own, whose k depends on p."""
    return algorithms.topk_ef(oracle, k=oracle.size // 18, **settings)


def traced(
    tx: Any,
    mesh: Any = None,
    specs: Any = None,
    init: Any = None,
    params: Any = PARAMS,
    split: Any = WHOLE,
    specs_of: Any = None,
    applied: bool = False,
    **given: Any,
) -> Any:
    """Shapes after an update inside `jax.shard_map`, on devices that need not exist."""
    state = jax.eval_shape(tx.init if init is None else init, params)
    specs = laqjax.aggregation.partition_specs(state, "data", specs_of) if specs is None else specs
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,)) if mesh is None else mesh
    options: Any = {"check_vma": False} | given

    def update(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates) if applied else updates, state

    step: Any = jax.shard_map(update, mesh=mesh, in_specs=(split, specs, split), out_specs=(split, specs), **options)
    return jax.eval_shape(step, params, state, params)


TWO_AXES = AbstractMesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def split_laq(param_specs: Any = SPECS, **settings: Any) -> Any:
    """LAQ with parameters that the axis "model" splits."""
    return laqjax.lazy_aggregate("data", 4, param_specs=param_specs, **settings)


@pytest.mark.parametrize(
    ("tx", "options"),
    [
        (laqjax.lazy_aggregate("data", 4, bits=4), {}),
        (laqjax.lazy_aggregate("data", 4, fraction), {}),
        (laqjax.lazy_aggregate("data", 4, partial(algorithms.ef21, compressor=TOP), quantizer_blocks=[27, 27]), {}),
        (
            laqjax.lazy_aggregate("data", 4, algorithms.ef21, compressor=compressors.optimal_sparsifier(0.2)),
            {"mesh": TWO_AXES},
        ),
        (split_laq(), {"mesh": TWO_AXES, "specs_of": SPECS, "split": SPECS}),
    ],
    ids=["laq", "k of p", "partial", "two manual axes", "split"],
)
def test_what_can_work_is_not_refused(tx: Any, options: Any) -> None:
    direction, state = traced(tx, **options)
    assert jax.tree.map(jnp.shape, direction) == jax.tree.map(jnp.shape, PARAMS)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.algorithm_state.workers)} == {4}


def fedavg(oracle: Any, *, lr: Any, num_workers: int, optimizer: Any) -> laqjax.Algorithm:
    """Local steps on the server's learning rate."""
    local = oracles.with_local_steps(oracle, 1, 0.1)
    return algorithms.gd(local, lr=lr, num_workers=num_workers, optimizer=optimizer)


def test_specs_follow_the_parameters() -> None:
    """The state of the workers and the moments of Adam are split as the parameters are."""
    tx = optax.chain(split_laq(skip_small=7), optax.adam(1e-3))
    state = jax.eval_shape(tx.init, PARAMS)
    lazy, (adam, _) = laqjax.aggregation.partition_specs(state, "data", SPECS)
    assert adam.mu == adam.nu == SPECS
    assert adam.count == P()
    assert lazy.algorithm_state.workers.memory_state.tree == {"b": None, "w": P("data", None, "model")}
    assert lazy.algorithm_state.aggregate.tree == {"b": None, "w": P(None, "model")}
    assert lazy.sent == P()
    tx = laqjax.diloco_optimizer(optax.adam(1e-3), param_specs=SPECS, **LOCALLY)
    own = laqjax.aggregation.partition_specs(jax.eval_shape(tx.init, WORKERS), "data", SPECS)
    assert own.inner_state[0].mu == {"b": P("data"), "w": P("data", None, "model")}
    assert own.inner_state[0].count == P("data")
    assert own.outer_state[0].trace == own.params == SPECS
    one = laqjax.lazy_aggregate("data", 4, param_specs=P("model"))  # a single array: no other vector is mistaken for it
    own = laqjax.aggregation.partition_specs(jax.eval_shape(one.init, jnp.zeros(4)), "data", P("model"))
    assert own.sent == own.algorithm_state.rule_state[0] == P()
    assert own.algorithm_state.aggregate.tree == P("model")


def on_one_device(tx: Any, *gradients: Any) -> Any:
    """Directions and the last state of updates of a single worker."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    state, directions = tx.init(PARAMS), []
    specs = laqjax.aggregation.partition_specs(state, "data")
    step: Any = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(WHOLE, specs, WHOLE), out_specs=(WHOLE, specs), check_vma=False
    )
    step = jax.jit(step)
    for gradient in gradients:
        direction, state = step(gradient, state, PARAMS)
        directions.append(direction)
    return directions, state


def test_small_leaves_are_averaged_in_every_step() -> None:
    tx = laqjax.lazy_aggregate("data", 1, bits=4, skip_small=7, max_silence=10)
    first, second = {"b": jnp.arange(6.0), "w": jnp.ones((8, 6))}, {"b": -jnp.arange(6.0), "w": jnp.ones((8, 6))}
    directions, state = on_one_device(tx, first, second)
    np.testing.assert_array_equal(directions[0]["b"], first["b"])
    np.testing.assert_array_equal(directions[1]["b"], second["b"])
    np.testing.assert_array_equal(directions[0]["w"], first["w"])  # all at the radius of the grid
    assert state.algorithm_state.aggregate.shape == (48,)
    assert not state.sent.any()
    assert state.bits_up.tolist() == [6 * 32]  # silent, apart from the small leaf
    assert int(state.total_uploads) == 1
    with pytest.raises(ValueError, match="skip_small = 49 with parameters of at most 48 numbers in a leaf: must leave"):
        laqjax.lazy_aggregate("data", 1, skip_small=49).init(PARAMS)


def test_the_error_of_error_feedback_is_kept_in_a_smaller_dtype() -> None:
    tx = laqjax.lazy_aggregate("data", 1, algorithms.topk_ef, k=3, memory_dtype=jnp.bfloat16)
    gradient = {"b": jnp.linspace(0, 1, 6), "w": jnp.linspace(1, 2, 48).reshape(8, 6)}
    directions, state = on_one_device(tx, gradient)
    error = state.algorithm_state.workers.memory_state
    left = jnp.concatenate([gradient[name].ravel() - directions[0][name].ravel() for name in "bw"])
    assert error.dtype == jnp.bfloat16
    np.testing.assert_array_equal(error[0], left.astype(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(directions)} == {np.dtype(np.float32)}


LAQ = laqjax.lazy_aggregate("data", 4)
SAMPLED = laqjax.lazy_aggregate("data", 4, algorithms.ef21, compressor=compressors.optimal_sparsifier(0.2))
LOCAL = laqjax.lazy_aggregate("data", 4, fedavg)
OTHER = laqjax.lazy_aggregate("data", 4, algorithms.lasg_wk2, sampler=BlockSampler(10))


@pytest.mark.parametrize(
    ("tx", "options", "message"),
    [
        (LAQ, {"specs": P()}, "an array [4, 54] of the workers' state on each device: must be one row"),
        (LAQ, {"check_vma": True}, "with check_vma=True, its default: must be check_vma=False"),
        (LAQ, {"mesh": TWO_AXES, "split": {"b": P(), "w": P("model")}}, "an array [54] in its state where"),
        (split_laq({"w": P()}), {}, "param_specs of the structure PyTreeDef({'w': *}) for parameters of the structure"),
        (split_laq(SPECS | {"b": P(None, "model")}), {}, "for a leaf of shape [6]: must have at most 1 entries"),
        (
            split_laq(),
            {"mesh": TWO_AXES, "axis_names": {"data"}, "specs_of": {"b": P(), "w": P()}},
            "param_specs with the axis 'model', which is not manual here",
        ),
        (
            split_laq(),
            {"mesh": TWO_AXES, "specs_of": SPECS},
            "split as param_specs says; pass param_specs to partition_specs",
        ),
        (
            split_laq(SPECS | {"w": P("model")}),
            {"mesh": TWO_AXES, "specs_of": SPECS | {"w": P("model")}, "split": SPECS},
            "an array [4, 6] in its state where these parameters need [8, 3]",
        ),
        (split_laq(), {}, "param_specs = None for a state of lazy_aggregate(param_specs=...): must be one"),
        (
            split_laq(),
            {"specs_of": {"w": P()}},
            "for a state of lazy_aggregate(param_specs=...): must be one PartitionSpec",
        ),
        (LAQ, {"init": laqjax.lazy_aggregate("data", 4, fraction).init}, "with the state of another method"),
        (
            SAMPLED,
            {"mesh": TWO_AXES, "axis_names": {"data"}},
            "with the other axes ('model',): must be a method without",
        ),
        (optax.apply_if_finite(LAQ, 3), {}, "optax.apply_if_finite around lazy_aggregate: must be behind it"),
        (laqjax.lazy_aggregate("data", 8), {}, "num_workers = 8 on the axis 'data' of 4 devices"),
        (OTHER, {}, "a method that needs gradients at other models"),
        (LOCAL, {}, "a method that needs gradients at other models"),
        (laqjax.lazy_aggregate("data", 4, quantizer_blocks=(1, 2)), {}, "sum 3: must be of sum p = 54"),
    ],
)
def test_an_update_that_cannot_work_is_refused(tx: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        traced(tx, **options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sync_every": 0}, "sync_every = 0: must be a whole number >= 1"),
        ({"sync_every": 2.5}, "sync_every = 2.5: must be a whole number >= 1"),
        ({"num_workers": 0}, "num_workers = 0: must be a whole number >= 1"),
        ({"inner": optax.adamw}, "inner = <function adamw"),
        ({"outer": 0.7}, "outer = 0.7: must be an optax transformation"),
        ({"lr": 0.1}, "lazy_aggregate(lr=...): must not be given"),
        ({"bit": 4}, "did you mean 'bits'?"),
    ],
)
def test_arguments_of_local_training_are_checked_in_the_constructor(changed: Any, message: str) -> None:
    construct = inspect.unwrap(laqjax.diloco_optimizer)
    with pytest.raises(ValueError, match=re.escape(message)):
        construct(**{"inner": optax.adamw(1e-3)} | LOCALLY | changed)


def locally(tx: Any = DILOCO, **options: Any) -> Any:
    """Shapes after a step of local training."""
    split = P("data")
    return traced(tx, **{"params": WORKERS, "split": split, "applied": True} | options)


def test_local_training_keeps_the_axis_of_the_workers() -> None:
    params, state = locally()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, WORKERS)
    assert jax.tree.map(jnp.shape, local_training.collapse(state)) == jax.tree.map(jnp.shape, PARAMS)
    model = WORKERS | {"activation": None}  # as `equinox.partition` leaves it
    assert locally(params=model)[0]["activation"] is None
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), WORKERS)
    assert {leaf.dtype for leaf in jax.tree.leaves(locally(params=half)[0])} == {np.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("tx", "options", "message"),
    [
        (DILOCO, {"params": PARAMS}, "parameters of shape [6] in init: must be [4], with the axis of the workers"),
        (DILOCO, {"split": WHOLE}, "parameters of shape [4, 6] on each device: must be [1, 6], with the axis"),
        (laqjax.diloco_optimizer(optax.adamw(1e-3), **LOCALLY | {"num_workers": 2}), {}, "of shape [4, 6] in init"),
        (DILOCO, {"check_vma": True}, "diloco_optimizer inside jax.shard_map with check_vma=True"),
        (optax.chain(DILOCO, optax.scale(0.5)), {}, "must be the last one of optax.chain, with none around it"),
        (optax.apply_if_finite(DILOCO, 3), {}, "such as optax.apply_if_finite"),
        (optax.MultiSteps(DILOCO, 2), {}, "must be the last one of optax.chain, with none around it"),
        (
            laqjax.diloco_optimizer(optax.lbfgs(), bits=4, **LOCALLY),
            {},
            "inner optimizer whose update fails with",
        ),
    ],
)
def test_local_training_that_cannot_work_is_refused(tx: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        locally(tx, **options)


def test_the_outer_model_is_found_in_a_chain_only_if_there_is_one() -> None:
    assert local_training.collapse(optax.chain(optax.identity(), DILOCO).init(WORKERS))["w"].shape == (8, 6)
    with pytest.raises(ValueError, match="must be a state of diloco_optimizer"):
        local_training.collapse(LAQ.init(PARAMS))


def test_an_update_outside_of_shard_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"axis 'data', which is not bound here: must be called inside"):
        jax.jit(LAQ.update)(PARAMS, LAQ.init(PARAMS), PARAMS)
    with pytest.raises(
        ValueError, match=r"diloco_optimizer on the axis 'data', which is not bound here: must be called"
    ):
        jax.jit(DILOCO.update)(WORKERS, DILOCO.init(WORKERS), WORKERS)
    with pytest.raises(TypeError, match="axis"):  # no default: a wrong axis would be found late, or never
        laqjax.aggregation.partition_specs(LAQ.init(PARAMS))  # pyright: ignore[reportCallIssue]
