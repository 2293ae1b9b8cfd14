"""What parts return has names, and what a part does not declare has a default."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import laqjax
from laqjax import compressors, downlinks, memories, oracles, rules, types
from laqjax._core.validation import get_declaration
from laqjax.types import register_dataclass
from tests.support import KEY, Toy

P, WORKERS = 5, 3
KEYS = types.RoundKeys(KEY, jax.random.key(1), KEY, jnp.int32(2), jnp.int32(1))
VECTOR = jnp.arange(1, P + 1, dtype=jnp.float32)
HISTORY = rules.make_history(0.8, 3, np.float32)
HALF = np.float32(0.5)


def lazy(change_measure: Any) -> rules.LazyRule:
    return rules.LazyRule(HISTORY, change_measure, np.float32(3))  # pyright: ignore[reportArgumentType]


RULES: list[Any] = [
    rules.Always(),
    rules.Cyclic(),
    rules.sample_one_worker(np.ones(WORKERS), np.float32),
    rules.ClagRule(HALF),  # pyright: ignore[reportArgumentType]
    lazy(rules.InnovationChange()),
    lazy(rules.StaleModelChange()),
    lazy(rules.SnapshotChange(np.int32(4))),  # pyright: ignore[reportArgumentType]
    rules.ServerLazyRule(HISTORY, np.ones(WORKERS, np.float32)),  # pyright: ignore[reportArgumentType]
    rules.limit_silence(rules.Always(), 3),
    rules.partial_participation(rules.Always(), WORKERS, count=2),
]


def make_context(**changed: Any) -> types.UploadContext:
    """The context of a worker whose message is its gradient."""
    known: dict[str, Any] = dict(
        params=VECTOR, keys=KEYS, round=KEYS.round, lr=jnp.float32(0.1), num_workers=WORKERS, gradient_at=lambda params, **_: params,
        grad=2 * VECTOR, target=2 * VECTOR, decoded=2 * VECTOR,
        target_sq=jnp.float32(220), decoded_sq=jnp.float32(220), error_sq=jnp.float32(0),
    )  # fmt: skip
    return types.UploadContext(**known | changed)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_returns_a_decision(rule: Any) -> None:
    """With one state for each outcome, of the structure of the state before."""
    shared, own = rule.init(VECTOR)
    decision = rule.should_send(shared, own, make_context())
    assert isinstance(decision, types.Decision)
    assert jnp.shape(decision.send) == ()
    assert jax.tree.structure(decision.if_sent) == jax.tree.structure(decision.if_silent) == jax.tree.structure(own)


def test_all_rules_are_in_the_list() -> None:
    listed = {type(rule) for rule in RULES}
    public = [getattr(rules, name) for name in rules.__all__]
    kinds = {kind for kind in public if isinstance(kind, type) and issubclass(kind, rules.BaseUploadRule)}
    assert kinds - {rules.BaseUploadRule} == listed


def optimize(direction: Any, params: Any) -> Any:
    """Gradient descent with lr 0.5."""
    return -HALF * direction, ("optimizer state",)


DOWNLINKS: dict[str, tuple[Any, Any]] = {  # the downlink, and the vector that it compresses below
    "full": (downlinks.FullModelDownlink(), None),
    "step": (downlinks.CompressedStep(compressors.grid(3)), -HALF * VECTOR),
    "direction": (downlinks.CompressedDirection(compressors.grid(3)), VECTOR),
    "model": (downlinks.CompressedModel(compressors.grid(3)), -HALF * VECTOR),
}


@pytest.mark.parametrize("name", DOWNLINKS)
def test_a_downlink_returns_a_broadcast_with_its_payload(name: str) -> None:
    downlink, target = DOWNLINKS[name]
    sent = downlink.broadcast(downlink.init(2 * VECTOR), 2 * VECTOR, VECTOR, optimize, KEYS)
    assert isinstance(sent, types.Broadcast)
    assert sent.params.shape == VECTOR.shape
    assert sent.optimizer_state == ("optimizer state",)
    assert jax.tree.structure(sent.downlink_state) == jax.tree.structure(downlink.init(VECTOR))
    if target is None:
        assert sent.payload is None
        assert sent.bytes == 4 * P
    else:
        jax.tree.map(np.testing.assert_array_equal, sent.payload, downlink.compressor.encode(target, KEYS))
        assert sent.bytes == len(laqjax.compressors.to_bytes(downlink.compressor, sent.payload, VECTOR))


def test_the_server_passes_the_payload_on(toy: Toy) -> None:
    alg = laqjax.algorithms.two_laq(toy.oracle, lr=0.1, num_workers=4, bits=3)
    state, total = alg.init(toy.theta0), jnp.ones_like(toy.theta0)
    result = laqjax.server_step(alg, state, total, jnp.int32(4), KEYS)
    assert isinstance(result, types.ServerResult)
    decoded = alg.downlink.compressor.decode(result.payload, total)  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(result.state.params, toy.theta0 + decoded)
    assert set(result.metrics) == {"direction_sq", "step_sq", "params"}


@register_dataclass
@dataclass(frozen=True)
class OwnOracle:
    """An oracle of the user's around another one, with the required members only."""

    inner: Any
    convert: Any = types.static_field()  # applied to what the inner oracle returns

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    def ravel(self, params: Any) -> Any:
        return self.inner.ravel(params)

    def unravel(self, params: Any) -> Any:
        return self.inner.unravel(params)

    def validate(self, shards: Any) -> None:
        self.inner.validate(shards)

    def __call__(self, params: Any, shards: Any, shard: Any, rows: Any = None) -> Any:
        return self.convert(self.inner(params, shards, shard, rows))


def evaluate(oracle: Any, toy: Toy) -> Any:
    """The shapes of what an oracle returns."""
    return jax.eval_shape(oracle, toy.theta0, toy.shards, jnp.int32(0))


def test_an_oracle_returns_loss_gradient_and_no_state(toy: Toy) -> None:
    for oracle in (toy.oracle, oracles.with_local_steps(toy.oracle, 2, 0.1)):
        result = evaluate(oracle, toy)
        assert isinstance(result, types.OracleResult)
        assert (result.loss.shape, result.grad.shape, result.state) == ((), toy.theta0.shape, None)


@pytest.mark.parametrize("returned", [tuple, lambda result: (result.loss, result.grad), lambda result: result.grad])
def test_an_oracle_without_names_is_refused(returned: Any, toy: Toy) -> None:
    own: Any = OwnOracle(toy.oracle, returned)
    alg = laqjax.algorithms.gd(own, lr=0.1, num_workers=4)
    expected = r"oracle OwnOracle returned a \w+: must be laqjax\.types\.OracleResult\(loss, grad\)"
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(alg.step, alg.init(toy.theta0), toy.shards, KEY)
    with pytest.raises(ValueError, match=expected):
        evaluate(oracles.with_local_steps(own, 2, 0.1), toy)


@register_dataclass
@dataclass(frozen=True)
class CountingOracle(OwnOracle):
    """An oracle that counts the rounds of a worker, and has the loss of that count; `convert` is of the next state."""

    def init_state(self, params: Any) -> Any:
        return jnp.int32(0)

    def evaluate(self, params: Any, shards: Any, rows: Any, state: Any, context: types.RoundContext) -> Any:
        result = self.inner(params, shards, context.keys.shard, rows)
        return result._replace(loss=state.astype(result.loss.dtype), state=self.convert(state + 1))


def test_an_oracle_may_have_a_state(toy: Toy) -> None:
    """It counts the rounds in which a worker participates, and no other."""
    own: Any = CountingOracle(toy.oracle, keep)
    alg = laqjax.algorithms.iag_cyclic(own, lr=0.1, num_workers=4)
    out = laqjax.run(alg, toy.theta0, toy.shards, 6, KEY, metrics=["worker_loss"])
    np.testing.assert_array_equal(out.state.workers.oracle_state, [2, 2, 1, 1])
    np.testing.assert_array_equal(out.info.extra["worker_loss"][4], [1, 1, 1, 1])


def test_another_state_of_an_oracle_is_refused(toy: Toy) -> None:
    own: Any = CountingOracle(toy.oracle, lambda state: (state,))
    alg = laqjax.algorithms.gd(own, lr=0.1, num_workers=4)
    with pytest.raises(
        ValueError, match=r"oracle CountingOracle returned the state .*: must be .* as its `init_state`"
    ):
        jax.eval_shape(alg.step, alg.init(toy.theta0), toy.shards, KEY)


def replace_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of another scale in their one place, and wherever a module has imported them from there."""
    others = {
        "squared_norm": lambda v: 100 * jnp.sum(v * v),
        "max_abs": lambda v: 100 * jnp.max(jnp.abs(v)),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith("laqjax.")]:
        for name, other in others.items():
            if getattr(module, name, None) is not None and module is not types:
                assert getattr(module, name) is getattr(types, name), module
                monkeypatch.setattr(module, name, other)
    for name, other in others.items():
        monkeypatch.setattr(types, name, other)


def test_norms_have_one_place(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm of compressors, rules and server changes with the two functions of `laqjax.types`."""
    assert (types.squared_norm(VECTOR), types.max_abs(-VECTOR)) == (55, 5)
    clag: Any = rules.ClagRule(HALF)  # pyright: ignore[reportArgumentType]
    state = -VECTOR, jnp.asarray(True)  # the target is 2 VECTOR, and the gradient has changed by VECTOR
    selects: Any = rules.ServerLazyRule(HISTORY, np.ones(WORKERS, np.float32))  # pyright: ignore[reportArgumentType]
    motion = jnp.ones(3), 0 * VECTOR
    assert clag.should_send(None, state, make_context()).send  # 220 > 55 / 2
    assert not selects.is_selected(motion[0], VECTOR + HALF, make_context())  # 5 / 4 < 0.8 / 0.09
    replace_norms(monkeypatch)
    context = make_context()
    assert (context.squared_norm(VECTOR), context.max_abs(VECTOR)) == (5500, 500)
    assert selects.is_selected(motion[0], VECTOR + HALF, context)
    for measure in (rules.StaleModelChange(), rules.SnapshotChange(np.int32(4))):  # pyright: ignore[reportArgumentType]
        assert (
            measure.measure(VECTOR, 0 * VECTOR if isinstance(measure, rules.SnapshotChange) else VECTOR, context)[0]
            == 5500
        )
    for compressor in (compressors.grid(3), compressors.ternary(), compressors.adaptive_grid(1, 9)):
        payload = compressor.encode(VECTOR, KEYS)
        assert payload["radius"] == 500
    assert payload["bits"] == 4  # floor(log2(500 sqrt(5) / sqrt(5500) + 1)), where it was 1
    np.testing.assert_allclose(compressors.qsgd(3).encode(VECTOR, KEYS)["norm"], 5500**0.5, rtol=1e-6)
    alg = laqjax.algorithms.gd(toy.oracle, lr=1.0, num_workers=4)
    metrics = laqjax.server_step(alg, alg.init(toy.theta0), jnp.ones_like(toy.theta0), jnp.int32(4), KEYS).metrics
    assert metrics["direction_sq"] == 6300
    np.testing.assert_allclose(metrics["step_sq"], 6300, rtol=1e-5)
    monkeypatch.setattr(types, "squared_norm", lambda v: -jnp.sum(v * v))
    assert not clag.should_send(None, state, make_context()).send


def keep(result: Any) -> Any:
    return result


@register_dataclass
@dataclass(frozen=True)
class CurrentOracle(OwnOracle):
    """One that has the gradient at the model of the round only."""

    evaluates_anywhere = False


def test_an_oracle_needs_no_hints(toy: Toy, quick_compilation: None) -> None:
    """Nor one of local steps around it; a hint that is there is used."""
    own: Any = OwnOracle(toy.oracle, keep)
    assert isinstance(own, types.Oracle)
    for oracle in (own, oracles.with_local_steps(own, 2, 0.1)):
        alg = laqjax.algorithms.gd(oracle, lr=0.1, num_workers=4)
        assert alg.default_worker_batch_size(toy.shards) == 4
        assert laqjax.max_batch_size(alg, toy.shards, memory_limit=2**20, devices=1) > 0
    algs = [laqjax.algorithms.gd(own, lr=lr, num_workers=4) for lr in (0.1, 0.2)]
    many = laqjax.sweep(laqjax.stack_algorithms(algs), toy.theta0, toy.shards, 2, jax.random.split(KEY, 2))
    assert np.isfinite(many.info.loss).all()


def test_what_a_part_does_not_declare_has_a_default(toy: Toy) -> None:
    own: Any = OwnOracle(toy.oracle, keep)
    local, half = oracles.with_local_steps(toy.oracle, 3, lambda step: 0.1 * step), compressors.grid(3)
    for part, protocol, name, value in (
        (own, types.OracleHints, "num_local_steps", 1),
        (local, types.OracleHints, "num_local_steps", 3),
        (own, types.OracleHints, "local_schedule", None),
        (downlinks.CompressedStep(half), types.DownlinkTraits, "num_vectors", 1),
        (downlinks.FullModelDownlink(2), types.DownlinkTraits, "num_vectors", 2),
    ):
        assert get_declaration(part, protocol, name) == value
    np.testing.assert_allclose(
        get_declaration(local, types.OracleHints, "local_schedule")(jnp.int32(2)), 0.2, rtol=1e-6
    )


def test_hints_of_an_oracle_are_used(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnOracle, "prefers_sequential", lambda self, shards: True, raising=False)
    monkeypatch.setattr(OwnOracle, "activation_bytes", lambda self, shards: 2**20, raising=False)
    own: Any = OwnOracle(toy.oracle, keep)
    for oracle in (own, oracles.with_local_steps(own, 2, 0.1)):
        alg = laqjax.algorithms.gd(oracle, lr=0.1, num_workers=4)
        assert alg.default_worker_batch_size(toy.shards) == 1
        with pytest.raises(ValueError, match="memory_limit = 2 MiB: must be at least"):
            laqjax.max_batch_size(alg, toy.shards, memory_limit=2**21, devices=1)


def test_other_models_are_refused_where_the_oracle_has_the_current_one_only(toy: Toy) -> None:
    own: Any = CurrentOracle(toy.oracle, keep)
    settings: dict[str, Any] = {"lr": 0.1, "num_workers": 4}
    block, algorithms = laqjax.samplers.BlockSampler(3), laqjax.algorithms

    def trace(alg: laqjax.Algorithm) -> Any:
        return jax.eval_shape(alg.step, alg.init(toy.theta0), toy.shards, KEY)

    trace(algorithms.laq(own, **settings))
    for alg in (
        algorithms.lasg_wk2(own, sampler=block, **settings),
        algorithms.marina(own, sampler=block, compressor=compressors.rand_k(3), probability=0.5, **settings),
        algorithms.fedavg(own, num_workers=4, num_local_steps=1, local_lr=0.1),
    ):
        with pytest.raises(ValueError, match="a method that needs gradients at other models"):
            trace(alg)
    with pytest.raises(ValueError, match="a method that needs gradients at other models"):  # the whole shard, here
        trace(dataclasses.replace(algorithms.gd(own, **settings), memory=WholeShard()))


@register_dataclass
@dataclass(frozen=True)
class WholeShard(memories.NoMemory):
    """A memory that asks for the gradient of the whole shard at the model of the round."""

    def compression_target(self, memory_state: Any, grad: Any, context: Any) -> Any:
        return context.gradient_at(context.params, full=True), None
