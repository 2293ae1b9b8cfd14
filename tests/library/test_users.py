"""What users bring: loops, models, data, servers and schedules of their own."""

import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import laqjax
from laqjax import Shards, algorithms, compressors, downlinks, memories, oracles, problems, rules, samplers
from laqjax.types import Decision, register_dataclass
from tests.laws.registry import make
from tests.support import KEY, Toy, identical, keys_of, programs, softmax_loss

# ---- a loop of one's own ----------------------------------------------------------------------------------------


def test_a_step_under_vmap_is_a_sweep(toy64: Toy) -> None:
    algs, keys = laqjax.stack_algorithms([make("laq", toy64, bits=b) for b in (2, 5)]), jax.random.split(KEY, 2)
    shards = Shards(*map(jnp.asarray, toy64.shards))
    state = jax.vmap(lambda alg: alg.init(toy64.theta0))(algs)
    step = jax.jit(jax.vmap(laqjax.Algorithm.step, (0, 0, None, 0)))
    for _ in range(9):
        state, _ = step(algs, state, shards, keys)
    many = laqjax.sweep(algs, toy64.theta0, toy64.shards, 9, keys)
    np.testing.assert_allclose(state.params, many.state.params, rtol=1e-10)


def test_parameters_go_in_and_come_out_as_a_pytree(toy: Toy) -> None:
    alg, tree = make("laq", toy), toy.oracle.unravel(toy.theta0)
    flat, nested = (laqjax.run(alg, start, toy.shards, 5, KEY) for start in (toy.theta0, tree))
    identical(flat, nested)
    back = alg.params(nested.state)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    np.testing.assert_array_equal(toy.oracle.ravel(back), flat.state.params)


def test_equal_problems_are_one_program(toy: Toy) -> None:
    def run() -> None:
        problem = problems.Softmax(20, 3)
        alg = algorithms.laq(problem.oracle(), lr=0.1, num_workers=4)
        laqjax.run(alg, problem.init_params(0), toy.shards, 2, KEY)

    run()
    compiled = programs()
    run()
    assert programs() == compiled


# ---- data and dtypes of one's own -------------------------------------------------------------------------------


def test_data_may_be_any_pytree() -> None:
    """Tokens with a mask: the loss is that of the same data in one array."""
    rng = np.random.default_rng(0)
    tokens, mask = rng.integers(0, 7, (3, 8, 5), np.int32), rng.random((3, 8, 5)) < 0.7
    label = rng.normal(size=(3, 8)).astype(np.float32)

    def loss(params: Any, x: Any, y: Any) -> Any:
        word = jnp.where(x["mask"], params["embedding"][x["tokens"]], 0).sum(axis=1)
        return (word - y["label"]) ** 2

    def packed(params: Any, x: Any, y: Any) -> Any:
        return loss(params, {"tokens": jnp.abs(x), "mask": x >= 0}, {"label": y})

    params, weight = {"embedding": jnp.linspace(-1, 1, 7)}, np.ones((3, 8), np.float32)
    whole = Shards({"tokens": tokens, "mask": mask}, {"label": label}, weight)
    one = Shards(np.where(mask, tokens, -np.maximum(tokens, 1)), label, weight)
    for sampler in (None, samplers.ShuffleSampler(4)):
        outs = []
        for loss_fn, shards in ((loss, whole), (packed, one)):
            alg = algorithms.laq(oracles.from_loss(loss_fn, params, tile=3), lr=0.01, num_workers=3, sampler=sampler)
            outs.append(laqjax.run(alg, params, shards, 10, KEY))
        np.testing.assert_allclose(outs[0].info.loss, outs[1].info.loss, rtol=1e-6)
        assert sampler or outs[0].info.loss[-1] < outs[0].info.loss[0]


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    [
        "laq",
        *(
            pytest.param(n, marks=pytest.mark.long)
            for n in ("marina_natural", "sign_sgd", "ef21", "qsgd", "ssgd", "lag_ps")
        ),
    ],
)
def test_half_precision(name: str, dtype: Any, toy: Toy) -> None:
    """Runs, learns, stays in its dtype, and bills 16 bits where it billed 32."""
    params = jax.tree.map(lambda a: a.astype(dtype), toy.oracle.unravel(toy.theta0))
    half = Toy(oracles.from_loss(softmax_loss, params, l2=0.01, tile=5), params, toy.shards)
    alg = make(name, half, **({"lr": 0.003} if name == "sign_sgd" else {}))
    out = laqjax.run(alg, params, toy.shards, 40, KEY)
    assert out.state.params.dtype == dtype
    assert out.info.loss[-5:].mean() < out.info.loss[:5].mean()
    full = laqjax.run(make(name, toy), toy.theta0, toy.shards, 1, KEY).info.bits_up.max()
    ours = out.info.bits_up[0].max()
    scalars = {"laq": 16, "qsgd": 16}.get(name)
    assert ours == full - scalars if scalars else ours <= full


# ---- servers and schedules of one's own -------------------------------------------------------------------------

SERVERS: dict[str, Any] = {
    "momentum": partial(optax.sgd, momentum=0.9),
    "nesterov": partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("name", ["laq", pytest.param("lag_wk", marks=pytest.mark.long)])
def test_lazy_rules_follow_any_server(name: str, server: str, toy64: Toy) -> None:
    """They end within 1e-3 of QGD's residual on the same server, with fewer uploads.

    SGD's effective step is 0.5 / L, with momentum 0.9 as well.
    """
    problem = problems.Softmax(20, 3)
    smooth = problem.smoothness_constants(toy64.shards)[1]
    lr = 0.01 if server == "adam" else 0.5 / smooth * 0.1
    given, rounds = problem.oracle(np.float64), 1500
    knobs: dict[str, Any] = dict(lr=lr, num_workers=4, optimizer=SERVERS[server])
    lazy = getattr(algorithms, name)(given, **knobs)
    qgd = algorithms.qgd(given, bits=4, **knobs)
    start = problem.init_vector(given)
    ours, theirs = (laqjax.run(alg, start, toy64.shards, rounds, KEY, chunk_size=500).info for alg in (lazy, qgd))
    gained = theirs.loss[0] - theirs.loss[-1]
    assert gained > 0.05
    assert abs(ours.loss[-1] - theirs.loss[-1]) < 1e-3 * gained
    assert ours.sent.sum() < 0.8 * theirs.sent.sum()


def test_a_transformation_is_a_server_too(toy: Toy) -> None:
    """With a step size of its own; the same as the factory at that step size."""
    given, made = (make("laq", toy, lr=0.03, optimizer=server) for server in (optax.adam(0.03), optax.adam))
    identical(*(laqjax.run(alg, toy.theta0, toy.shards, 20, KEY) for alg in (given, made)))
    server = optax.adam(0.03)
    laqjax.stack_algorithms([make("laq", toy, optimizer=server, bits=bits) for bits in (2, 4)])  # one structure


@pytest.mark.parametrize("name", ["laq", pytest.param("lasg_wk2", marks=pytest.mark.long)])
def test_a_constant_schedule_is_the_constant(name: str, toy64: Toy) -> None:
    """Up to the rounding of motion / lr^2; other numbers do not recompile."""
    schedule = jax.tree_util.Partial(lambda lr, k: lr * jnp.ones_like(k, jnp.float64), 0.05)
    scheduled, constant = (make(name, toy64, lr=lr) for lr in (schedule, 0.05))
    a, b = (laqjax.run(alg, toy64.theta0, toy64.shards, 30, KEY) for alg in (scheduled, constant))
    np.testing.assert_array_equal(a.info.sent, b.info.sent)
    np.testing.assert_allclose(a.state.params, b.state.params, rtol=1e-9)
    compiled = programs()
    laqjax.run(make(name, toy64, lr=jax.tree_util.Partial(schedule.func, 0.02)), toy64.theta0, toy64.shards, 3, KEY)
    assert programs() == compiled


def test_the_server_follows_the_schedule(toy64: Toy) -> None:
    decay = optax.exponential_decay(0.1, 5, 0.5)
    info = laqjax.run(
        make("gd", toy64, lr=decay), toy64.theta0, toy64.shards, 12, KEY, metrics=["direction_sq", "step_sq"]
    ).info
    expected = [0.1 * 0.5 ** (k / 5) for k in range(12)]
    np.testing.assert_allclose(np.sqrt(info.extra["step_sq"] / info.extra["direction_sq"]), expected, rtol=1e-6)


# ---- local steps and partial participation ----------------------------------------------------------------------


def test_one_local_step_is_none(toy64: Toy) -> None:
    local = algorithms.fedavg(toy64.oracle, num_workers=4, num_local_steps=1, local_lr=0.2, lr=0.05)
    a, b = (laqjax.run(alg, toy64.theta0, toy64.shards, 20, KEY) for alg in (local, make("gd", toy64)))
    np.testing.assert_allclose(a.state.params, b.state.params, rtol=1e-12)


def test_fedavg_averages_the_local_models_of_those_who_take_part(toy64: Toy) -> None:
    alg = algorithms.fedavg(toy64.oracle, num_workers=4, num_local_steps=3, local_lr=0.2, num_participants=2)
    shards = jax.tree.map(jnp.asarray, toy64.shards)
    out = laqjax.run(alg, toy64.theta0, shards, 6, KEY, metrics=["params", "gradients"])
    gradient = jax.jit(lambda model, worker: toy64.oracle(model, shards, worker).grad)
    for k in range(5):
        theta, local = out.info.extra["params"][k], []
        for m in np.flatnonzero(out.info.sent[k]):
            model = jnp.asarray(theta)
            for _ in range(3):
                model = model - 0.2 * gradient(model, jnp.int32(m))
            local.append(model)
        assert len(local) == 2
        np.testing.assert_allclose(out.info.extra["params"][k + 1], np.mean(local, axis=0), rtol=1e-10)
    np.testing.assert_array_equal(out.info.extra["gradients"] > 0, out.info.sent)
    np.testing.assert_array_equal(out.info.bits_down, 2 * 64 * 63)


def test_a_share_takes_part_and_every_count_is_one_program(toy: Toy) -> None:
    def alg(**who: Any) -> laqjax.Algorithm:
        rule = rules.partial_participation(rules.Always(), 4, **who)
        return laqjax.assemble(
            toy.oracle, compressors.grid(3), rule, memories.make_innovation_memory(toy.oracle), lr=0.05, num_workers=4
        )

    compiled = None
    for who, count in ((dict(share=0.5), 2), (dict(count=1), 1), (dict(share=0.01), 1), (dict(count=4), 4)):
        info = laqjax.run(alg(**who), toy.theta0, toy.shards, 40, KEY).info
        np.testing.assert_array_equal(info.sent.sum(axis=1), count)
        compiled = compiled or programs()
        assert programs() == compiled
    for who in (dict(), dict(count=1, share=0.5), dict(count=5), dict(count=0), dict(share=0.0), dict(share=2)):
        with pytest.raises(ValueError, match=r"(count|share) = .*: must be "):
            alg(**who)


# ---- zeros ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [3, 4])
def test_a_dead_pixel_does_not_drift_under_signs(workers: int, toy: Toy) -> None:
    """Its gradient is exactly zero at all workers, and one bit has no zero."""
    flat = oracles.from_loss(softmax_loss, toy.oracle.unravel(toy.theta0))  # no l2: the last pixel is dead
    shards = Shards(*(np.asarray(a)[:workers] for a in toy.shards))
    alg = algorithms.sign_sgd(flat, lr=0.01, num_workers=workers)
    info, state = laqjax.run(alg, toy.theta0, shards, 400, KEY, metrics=["params"])
    path = np.array([flat.unravel(jnp.asarray(p))["weight"][:, -1] for p in [*info.extra["params"][::7], state.params]])
    assert np.abs(path - path[0]).max() < 0.011
    assert np.abs(path[-1] - path[0]).max() < 1e-6
    np.testing.assert_array_equal(info.bits_down, 64)  # the vote is p = 63 bits, in whole bytes


@pytest.mark.parametrize(
    "scheme", [compressors.identity(), compressors.grid(3), compressors.top_k(2), compressors.sign()]
)
def test_zero_and_its_sign_are_zero(scheme: Any) -> None:
    """-0.0 is no negative number: what goes up for it moves nothing."""
    for zero in (jnp.zeros(5), -jnp.zeros(5)):
        assert not np.any(scheme.decode(scheme.encode(zero, keys_of(0, 0)), zero))
    vote: Any = compressors.sign(scaled=False)
    both = [vote.encode(zero, keys_of(0, 1))["negative"] for zero in (jnp.zeros(5), -jnp.zeros(5))]
    np.testing.assert_array_equal(*both)


# ---- members that cannot be, and what is said ---------------------------------------------------------------------


@pytest.fixture
def _without_a_type_checker() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("_without_a_type_checker")
def test_what_is_no_part_is_said_before_anything_runs(toy: Toy) -> None:
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    laq: Any = algorithms.laq
    wrong: list[tuple[Any, str]] = [
        (lambda: laq(toy.oracle, optimizer="adam", **good), "optimizer = 'adam': must be a function of the learning rate"),
        (lambda: laqjax.stack_algorithms([]), "algs = []: must be one algorithm or more"),
        (lambda: algorithms.ef21(toy.oracle, compressor="top_k:5", **good), "compressor = 'top_k:5': must be a compressor"),  # pyright: ignore[reportArgumentType]
        (lambda: algorithms.marina(toy.oracle, compressor="x", probability=0.1, **good), "compressor = 'x': must be a c"),  # pyright: ignore[reportArgumentType]
        (lambda: laq(toy.oracle, sampler=4, **good), "sampler = 4: must be a sampler, such as samplers.BlockSampler(10), or None"),
        (lambda: laq(toy.oracle, sampler=samplers.BlockSampler, **good), "must be a sampler, such as samplers.BlockSampler(10), or None"),
        (lambda: laq(toy.oracle, sampler=samplers.BlockSampler(2.5), **good), "sampler.size = 2.5: must be a whole number"),  # pyright: ignore[reportArgumentType]
        (lambda: laq(toy.oracle, max_silence=2**31, **good), "max_silence = 2147483648: must be a whole number >= 1 and <= 2147483647"),
        (lambda: algorithms.dasha(toy.oracle, compressor=compressors.top_k(3), estimate_momentum=0.1, sampler=samplers.BlockSampler(4), **good), "mvr_momentum = None with a sampler"),
        (lambda: algorithms.lasg_wk2(toy.oracle, xi=0.5, c=0.5, **good), "xi = 0.5 and c = 0.5: must be only one"),
        (lambda: laqjax.run(laqjax.stack_algorithms([laq(toy.oracle, **good)]), toy.theta0, toy.shards, 3, KEY), "run it with `sweep`"),
        (lambda: laqjax.sweep(laq(toy.oracle, **good), toy.theta0, toy.shards, 3, jax.random.split(KEY, 2)), "an algorithm of one point"),
        (
            lambda: laqjax.sweep(laqjax.stack_algorithms([laq(toy.oracle, **good)] * 2), toy.theta0, toy.shards, 3, jax.random.split(KEY, 3)),
            "keys = key<fry>[3]: must be 2 typed keys",
        ),
        (
            lambda: laqjax.run(laq(toy.oracle, **good), toy.theta0, Shards(*(np.asarray(a).tolist() for a in toy.shards)), 3, KEY),
            "shards.x holds <class 'list'>: must be arrays [M, N, ...]",
        ),
        (
            lambda: jax.jit(lambda theta: laqjax.run(laq(toy.oracle, **good), theta, toy.shards, 3, KEY))(toy.theta0),
            "inside jit, vmap, grad or scan: must be called outside",
        ),
        (
            lambda: laqjax.assemble(
                toy.oracle, compressors.identity(), rules.Cyclic(), memories.make_innovation_memory(toy.oracle),
                downlink=downlinks.CompressedStep(compressors.grid(4)), **good
            ),
            "downlink CompressedStep with rule Cyclic, which selects workers: must be None",
        ),
        (lambda: laqjax.assemble(toy.oracle, compressors.identity(), None, memories.NoMemory(), **good), "rule = None: must be an upload rule"),  # pyright: ignore[reportArgumentType]
        (lambda: laqjax.assemble(toy.oracle, compressors.identity(), rules.Always(), memories.NoMemory, **good), "must be a memory, such as"),  # pyright: ignore[reportArgumentType]
        (lambda: laqjax.assemble(toy.oracle, compressors.identity(), rules.Always(), memories.NoMemory(), downlink=compressors.grid(4), **good), "must be a downlink, such as"),  # pyright: ignore[reportArgumentType]
    ]  # fmt: skip
    for call, message in wrong:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call()
        assert message in str(error.value)
    with pytest.raises(TypeError, match=r"laq\(\) missing 1 required keyword-only argument: 'lr'"):
        laq(toy.oracle, num_workers=4)


# ---- a rule of one's own, with a memory ---------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Doubling(rules.BaseUploadRule):
    """Wait 1, 2, 4, ... rounds between uploads: a worker keeps (rounds to wait, rounds waited); all share a count of rounds."""

    most: Any

    def init(self, params: Any) -> Any:
        return jnp.int32(0), (jnp.int32(0), jnp.int32(0))

    def should_send(self, shared_state: Any, worker_state: Any, context: Any) -> Any:
        wait, waited = worker_state
        begin_again = jnp.minimum(2 * wait + 1, self.most), jnp.int32(0)
        return Decision(waited >= wait, if_sent=begin_again, if_silent=(wait, waited + 1))

    def update(self, shared_state: Any, step: Any) -> Any:
        return shared_state + 1


def test_a_rule_with_a_memory_from_outside(toy: Toy) -> None:
    def alg(most: int) -> laqjax.Algorithm:
        memory = memories.make_innovation_memory(toy.oracle)
        return laqjax.assemble(
            toy.oracle, compressors.grid(4), Doubling(np.int32(most)), memory, lr=0.05, num_workers=4
        )

    out = laqjax.run(alg(7), toy.theta0, toy.shards, 24, KEY)
    assert np.flatnonzero(out.info.sent[:, 0]).tolist() == [0, 2, 6, 14, 22]
    assert int(out.state.rule_state) == 24
    many = laqjax.sweep(laqjax.stack_algorithms([alg(7), alg(1)]), toy.theta0, toy.shards, 24, jax.random.split(KEY, 2))
    np.testing.assert_array_equal(many.info.sent[:, 0], out.info.sent)
    assert np.flatnonzero(many.info.sent[:, 1, 0]).tolist() == list(range(0, 24, 2))


# ---- docstrings ---------------------------------------------------------------------------------------------------


EXPLAINED = (
    "_baselines",
    "_compressed",
    "_lag",
    "_laq",
    "_lasg_cada",
    "_local",
    "_stochastic",
    "aggregation",
    "loop",
    "oracles",
    "partition",
    "types",
)


@pytest.mark.parametrize("name", [info.name for info in pkgutil.walk_packages(laqjax.__path__, "laqjax.")])
def test_the_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert not result.failed
    assert result.attempted or name.split(".")[-1] not in EXPLAINED


def test_help_shows_every_argument() -> None:
    returned = {name: inspect.signature(f).return_annotation for name, f in vars(algorithms).items() if callable(f)}
    factories = [name for name, kind in returned.items() if kind is laqjax.Algorithm and name != "assemble"]
    assert {"gd", "laq", "cada2", "fedlaq"} <= set(factories)
    for name in factories:
        factory = getattr(algorithms, name)
        text = inspect.getdoc(factory) or ""  # without the indent, which Python 3.13 removes itself
        arguments = text.partition("Args:\n")[2].partition("Returns:\n")[0]
        described = re.findall(r"^ {4}(\w+): \S", arguments, re.MULTILINE)
        assert described == list(inspect.signature(factory).parameters), name
        assert "\nRaises:\n" in text, name
    assert "bits: Number b of bits per coordinate of a message, from 1 to 16." in (algorithms.laq.__doc__ or "")
