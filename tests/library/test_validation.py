"""What cannot work is refused before anything is compiled, in words: the argument, its value, what was expected.

A run that diverges stops and says where.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import laqjax
from laqjax import algorithms, compressors, memories, oracles, rules
from laqjax._core import validation
from laqjax.algorithms import _shared
from tests.laws.registry import named_algorithms
from tests.support import KEY, Toy, programs, softmax_loss


@pytest.fixture(autouse=True)
def _without_a_type_checker() -> Iterator[None]:
    """As for a user: what the library itself refuses."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def refused(call: Callable[[], Any], message: str) -> None:
    """`message` is a part of the error, as it stands."""
    compiled = programs()
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
    assert programs() == compiled


def test_a_close_name_is_suggested() -> None:
    assert validation.suggest("mesages", ["sums", "messages"]) == "; did you mean 'messages'?"
    assert validation.suggest("hope", ["sums", "messages"]) == ""
    assert validation.suggest(3, {"sums": 1}) == ""


KNOBS: list[Any] = [
    *(("bits", bad, "must be a whole number >= 1 and <= 16") for bad in (0, 17, 2.5, True, None, [4, 4])),
    *(("lr", bad, "must be a finite number > 0") for bad in (0, -1, np.nan, np.inf, "fast", [0.1, 0.1])),
    *(("num_workers", bad, "must be a whole number >= 1") for bad in (0, -4, 1.5)),
    *(("max_silence", bad, "must be a whole number >= 1") for bad in (0, -1, 2.5, np.nan, True)),
    *(("window", bad, "must be a whole number >= 1") for bad in (0, -1, 2.5)),
    *(("padded_window", bad, "must be a whole number >= 10") for bad in (0, 9, 10.5)),
    *(("xi", bad, "must be a number >= 0") for bad in (-0.1, np.nan, np.inf, "much", [0.1] * 9, [[0.1] * 10])),
    ("xi", [0.1] * 9 + [-0.1], "must be a number >= 0"),
    ("xi", [0.1] * 9 + [np.nan], "must be a number >= 0"),
    ("bits", np.True_, "must be a whole number >= 1 and <= 16"),
    ("force_first_upload", "maybe", "must be True or False"),
    ("rescale_short_history", "no", "must be True or False"),
    ("bits", "4", "must be a whole number >= 1 and <= 16"),
]


def test_smoothness_is_one_number_a_worker(toy: Toy) -> None:
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    for factory in (algorithms.lag_ps, algorithms.lasg_ps, algorithms.iag_random):
        for bad in ([1.0, 2.0], [1.0] * 5, 1.0, [1.0, 1.0, 1.0, -1.0]):
            refused(lambda f=factory, b=bad: f(toy.oracle, smoothness=b, **good), "must be num_workers numbers")
    refused(lambda: algorithms.iag_random(toy.oracle, smoothness=[0.0] * 4, **good), "must be numbers with at least")


def test_the_weight_of_cada_is_c(toy: Toy) -> None:
    make: Any = algorithms.cada2
    with pytest.raises(TypeError, match="xi"):
        make(toy.oracle, lr=0.1, num_workers=4, xi=0.5)
    for make in (algorithms.cada1, algorithms.cada2):
        refused(lambda m=make: m(toy.oracle, lr=0.1, num_workers=4, c=None), "c = None: must be a finite number >= 0")


@pytest.mark.parametrize("name", named_algorithms())
def test_an_oracle_is_no_problem_and_no_loss(name: str) -> None:
    make: Any = named_algorithms()[name]
    problem = laqjax.problems.Softmax(20, 3)
    needed = [key for key, p in inspect.signature(make).parameters.items() if p.default is p.empty and key != "oracle"]
    given = {key: eval(_shared.EXAMPLE_ARGUMENTS[key]) for key in needed}
    refused(lambda: make(problem, **given), f"oracle = {problem!r}: must be an oracle; pass problem.oracle()")
    message = f"oracle = {softmax_loss!r}: must be an oracle; pass laqjax.oracles.from_loss(loss_fn, params)"
    refused(lambda: make(softmax_loss, **given), message)
    refused(lambda: make(laqjax.problems.Softmax, **given), "must be an oracle; pass laqjax.oracles.from_loss")
    assert make(problem.oracle(), **given).num_workers == 4


def test_xi_or_c(toy: Toy) -> None:
    """An xi that is the default's number is given too."""
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    both: list[tuple[Any, dict[str, Any]]] = [
        (algorithms.lag_ps, good | {"smoothness": [1.0] * 4}),
        (algorithms.lasg_ps, good | {"smoothness": [1.0] * 4}),
        (algorithms.lasg_wk1, good),
        (algorithms.lasg_wk2, good),
    ]
    for make, given in both:
        for xi in (0.8, 0, 0.5, [0.08] * 10):
            refused(lambda m=make, g=given, x=xi: m(toy.oracle, xi=x, c=0.6, **g), f"xi = {xi!r} and c = 0.6: must be")
        same = [make(toy.oracle, **given | more) for more in ({}, {"xi": None}, {"xi": 0.8})]
        for other in same[1:]:
            jax.tree.map(np.testing.assert_array_equal, same[0], other)


@pytest.mark.parametrize(("knob", "bad", "expected"), KNOBS)
def test_knobs(knob: str, bad: Any, expected: str, toy: Toy) -> None:
    good: dict[str, Any] = dict(lr=0.1, num_workers=4)
    message = f"{knob} = {bad!r}: {expected}"
    refused(lambda: algorithms.laq(toy.oracle, **good | {knob: bad}), message)
    if knob != "bits":
        refused(lambda: algorithms.lag_wk(toy.oracle, **good | {knob: bad}), message)
    if knob in ("lr", "num_workers"):
        refused(lambda: algorithms.gd(toy.oracle, **good | {knob: bad}), message)
    if knob in ("lr", "num_workers", "bits"):
        refused(lambda: algorithms.qgd(toy.oracle, **good | {knob: bad}), message)


def test_patience_may_be_zero_but_not_less() -> None:
    rule = _shared.make_lazy_rule(rules.make_history(0.8, 10, np.float32), rules.InnovationChange())
    rules.limit_silence(rule, 0)
    refused(lambda: rules.limit_silence(rule, -1), "max_silence = -1: must be a whole number >= 0")
    assert rules.limit_silence(rule, 3).needs_persistent_memory
    assert not rules.limit_silence(rules.Always(), 3).needs_persistent_memory
    refused(lambda: rules.make_history(0.8, 3, np.float32, kind="stpe"), "kind = 'stpe': must be one of ('step', ")


class OddWorkers(rules.BaseUploadRule):
    """A rule that defines `is_selected` and no more."""

    def is_selected(self, shared_state: Any, worker_state: Any, context: Any) -> Any:
        return context.keys.worker % 2 == 1


class HalfARule:
    """A rule that lacks two declarations."""

    init = is_selected = should_send = update = None

    def __init__(self) -> None:
        self.init = self.is_selected = self.should_send = self.update = lambda *given: None


def test_a_rule_that_selects_is_known_to_select(toy: Toy) -> None:
    """A federation calls `is_selected` of no other rule."""
    assert OddWorkers().server_selects
    assert rules.limit_silence(OddWorkers(), 3).server_selects
    assert not rules.Always().server_selects
    assert not rules.limit_silence(rules.Always(), 3).server_selects
    parts: Any = toy.oracle, compressors.identity(), HalfARule(), memories.make_innovation_memory(toy.oracle)
    lacks = "must be an upload rule, such as rules.Always(); it lacks needs_persistent_memory, server_selects"
    refused(lambda: laqjax.assemble(*parts, lr=0.1, num_workers=4), lacks)
    parts[2].should_send = None
    refused(lambda: laqjax.assemble(*parts, lr=0.1, num_workers=4), "server_selects, should_send")


ORACLE: list[tuple[dict[str, Any], str]] = [
    (dict(reduction="median"), "reduction = 'median': must be 'mean' or 'sum'; did you mean 'mean'?"),
    (dict(reduction="avg"), "reduction = 'avg': must be 'mean' or 'sum'"),
    (dict(l2=-0.1), "l2 = -0.1: must be a finite number >= 0"),
    (dict(l2=np.nan), "l2 = nan: must be a finite number >= 0"),
    (dict(l2=np.inf), "l2 = inf: must be a finite number >= 0"),
    (dict(tile=0), "tile = 0: must be a whole number >= 1"),
    (dict(use_cpu_layouts="no"), "use_cpu_layouts = 'no': must be True or False"),
    (dict(tile=2.5), "tile = 2.5: must be a whole number >= 1"),
]


@pytest.mark.parametrize(("wrong", "message"), ORACLE)
def test_the_oracle(wrong: dict[str, Any], message: str) -> None:
    refused(lambda: oracles.from_loss(softmax_loss, jnp.zeros(3), **wrong), message)


READY = "that is a transformation: must be None, since the transformation has its own step size"
GRADIENT = "must be a transformation that needs the gradients, its state and the parameters only, such as optax.adamw"
LOCAL_STEPS: list[tuple[dict[str, Any], str]] = [
    (dict(steps=0), "steps = 0: must be a whole number >= 1"),
    (dict(lr=0), "lr = 0: must be a finite number > 0"),
    (dict(lr=None), "lr = None: must be a finite number > 0"),
    (dict(proximal=-1), "proximal = -1: must be a finite number >= 0"),
    (dict(keep_optimizer_state="no"), "keep_optimizer_state = 'no': must be True or False"),
    (dict(optimizer="adam"), "optimizer = 'adam': must be a function of the learning rate"),
    (dict(optimizer=optax.adamw(0.1)), f"lr = 0.1 with an optimizer {READY}"),
    (dict(optimizer=optax.polyak_sgd), "missing 1 required keyword-only argument: 'value')"),
    (dict(optimizer=optax.polyak_sgd), GRADIENT),
    (dict(optimizer=optax.lbfgs(), lr=None), GRADIENT),
    (dict(optimizer=jax.tree_util.Partial(optax.sgd, momentum=0.9, nesterov=True)), "optimizer = Partial("),
]


@pytest.mark.parametrize(("wrong", "message"), LOCAL_STEPS)
def test_local_steps(wrong: dict[str, Any], message: str, toy: Toy) -> None:
    """The error begins with the argument that was given."""
    given: dict[str, Any] = dict(steps=2, lr=0.1) | wrong
    refused(lambda: oracles.with_local_steps(toy.oracle, **given), message)
    with pytest.raises(ValueError, match=f"^({'|'.join(given)}) = "):
        oracles.with_local_steps(toy.oracle, **given)


def test_local_steps_need_an_oracle_without_a_state(toy: Toy) -> None:
    """And minibatches of equal parts."""
    local = oracles.with_local_steps(toy.oracle, 2, 0.1, optimizer=optax.adam)
    message = "oracle LocalStepsOracle with a state of each worker: must be an oracle without one"
    refused(lambda: oracles.with_local_steps(local, 2, 0.1), message)
    alg = algorithms.diloco(
        toy.oracle, num_workers=4, num_local_steps=3, local_lr=0.1, sampler=laqjax.samplers.BlockSampler(4)
    )
    message = "minibatches of 4 rows: must be a multiple of num_local_steps = 3"
    refused(lambda: laqjax.run(alg, toy.theta0, toy.shards, 3, KEY), message)


MADE = laqjax.compressors
WRONG: Any = 4
SCHEMES: list[tuple[Callable[[], Any], str]] = [
    (lambda: MADE.chunked_top_k(1, 1), "chunk = 1: must be a whole number >= 2"),
    (lambda: MADE.chunked_top_k(4, 5), "k = 5: must be a whole number >= 1 and <= 4"),
    (lambda: MADE.statistical_grid(9), "bits = 9: must be a whole number >= 1 and <= 8"),
    (lambda: MADE.statistical_grid(2, 0), "sigmas = 0: must be a finite number > 0"),
    (lambda: MADE.quantized_values(MADE.grid(2), MADE.grid(2)), "must be top_k, rand_k or chunked_top_k"),
    (lambda: MADE.quantized_values(MADE.top_k(2), WRONG), "compressor = 4: must be a compressor"),
]


@pytest.mark.parametrize(("build", "message"), SCHEMES)
def test_compressors(build: Callable[[], Any], message: str) -> None:
    refused(build, message)


def test_numbers_of_local_methods(toy: Toy) -> None:
    given: dict[str, Any] = dict(num_workers=4, num_local_steps=2, local_lr=0.1)
    for name, wrong, message in (
        ("diloco", dict(decay=1.5), "decay = 1.5: must be a finite number >= 0 and <= 1"),
        ("diloco", dict(local_lr=None), "local_lr = None: must be a finite number > 0"),
        ("lazy_diloco", dict(inner="adam"), "inner = 'adam': must be a function of the learning rate"),
        ("sparse_loco", dict(inner=optax.adam(0.1)), f"local_lr = 0.1 with an optimizer {READY}"),
        ("diloco", dict(inner=optax.polyak_sgd), "inner = <function polyak_sgd"),
        ("fedavg", dict(num_local_steps=0), "num_local_steps = 0: must be a whole number >= 1"),
        ("scaffold", dict(local_lr=0), "local_lr = 0: must be a finite number > 0"),
        ("fedadam", dict(tau=0), "tau = 0: must be a finite number > 0"),
        ("fedyogi", dict(b2=2), "b2 = 2: must be a finite number >= 0 and <= 1"),
        ("scaffold", dict(num_participants=5), "count = 5: must be a whole number >= 1 and <= 4"),
    ):
        refused(lambda n=name, w=wrong: getattr(algorithms, n)(toy.oracle, **given | w), message)


@pytest.mark.parametrize(
    ("params", "got"),
    [
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float64)}, "['float32', 'float64']"),
        ({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.int32)}, "['float32', 'int32']"),
        (np.zeros(2, np.int32), "['int32']"),
        ({}, "[]"),
    ],
)
def test_the_parameters_dtype(params: Any, got: str) -> None:
    refused(lambda: oracles.from_loss(softmax_loss, params), f"params of dtypes {got}: must be arrays of one")


def labelled(labels: Any, index: Any, value: int) -> np.ndarray:
    """Return a copy of integer labels with one changed."""
    labels = np.array(labels)
    labels[index] = value
    return labels


def changed(array: Any, index: Any, value: float) -> np.ndarray:
    array = np.array(array, np.float32)
    array[index] = value
    return array


SHARDS: list[Any] = [
    (lambda s: s._replace(y=s.y[:, :-1]), "shards of shapes [4, 12, 20], [4, 11], [4, 12]: must be x [M, N, ...]"),
    (lambda s: s._replace(weight=s.weight[:, :-1]), "[4, 12], [4, 11]: must be x [M, N, ...]"),
    (lambda s: s._replace(weight=s.weight[0]), "shards of shapes [4, 12, 20], [4, 12], [12]: must be"),
    (lambda s: laqjax.Shards(*(a[:3] for a in s)), "shards of 3 workers: must be 4"),
    (lambda s: laqjax.Shards(*(a[:, :0] for a in s)), "shards.weight of worker 0 sums to 0"),
    (lambda s: s._replace(weight=changed(s.weight, 2, 0)), "shards.weight of worker 2 sums to 0: must be weights >= 0"),
    (lambda s: s._replace(weight=changed(s.weight, (3, 1), -1)), "shards.weight of worker 3 sums to 10: must be weights >= 0"),
    (lambda s: s._replace(weight=changed(s.weight, (3, 1), np.nan)), "shards.weight holds NaN or infinity"),
    (lambda s: s._replace(weight=changed(s.weight, (1, 3), 0)), "shards.weight of worker 1 is 0 at row 3"),
    (lambda s: s._replace(weight=s.weight[:, ::-1]), "of worker 0 is 0 at row 0"),
    (lambda s: s._replace(x=changed(s.x, (1, 2, 3), np.nan)), "shards.x holds NaN or infinity: must be finite"),
    (lambda s: s._replace(x=changed(s.x, (1, 2, 3), np.inf)), "shards.x holds NaN or infinity: must be finite"),
    (lambda s: s._replace(y=changed(s.y, (1, 2), -np.inf)), "shards.y holds NaN or infinity: must be finite"),
    (lambda s: s._replace(x=np.asarray(s.x).astype(str)), "shards.x holds strings (dtype <U3): must be numbers"),
    (lambda s: s._replace(y=np.asarray(s.y).astype(str)), "np.unique(y, return_inverse=True)[1]"),
    (lambda s: tuple(s), "shards of type tuple: must be laqjax.Shards(x, y, weight)"),
    (lambda s: (s.x, s.y), "shards of type tuple: must be laqjax.Shards(x, y, weight)"),
    (lambda s: s._asdict(), "laqjax.partition_data(x, y, num_workers, scheme)"),
    (lambda s: s._replace(weight=np.asarray(s.weight) > 0), "shards.weight of dtype bool: must be numbers"),
    (lambda s: s._replace(y=np.asarray(s.y).astype(object)), "shards.y of dtype object: must be numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), SHARDS)
def test_the_shards(wrong: Callable[[laqjax.Shards], laqjax.Shards], message: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    shards = wrong(toy.shards)
    refused(lambda: laqjax.run(alg, toy.theta0, shards, 3, KEY), message)
    refused(lambda: laqjax.check_inputs(alg, toy.theta0, shards), message)
    state = alg.init(toy.theta0)
    refused(lambda: laqjax.run(alg, state, shards, 3, KEY), message)
    refused(
        lambda: laqjax.sweep(laqjax.stack_algorithms([alg]), toy.theta0, shards, 3, jax.random.split(KEY, 1)), message
    )


def every_start(alg: Any, start: Any, shards: Any, **more: Any) -> list[Callable[[], Any]]:
    """Return a call of each function that starts a run."""
    one: Any = {"rounds": 3, "key": KEY} | more
    many: Any = {"rounds": 3, "keys": jax.random.split(KEY, 1)} | more
    return [
        lambda: laqjax.run(alg, start, shards, **one),
        lambda: next(laqjax.stream(alg, start, shards, **one)),
        lambda: laqjax.sweep(laqjax.stack_algorithms([alg]), start, shards, **many),
        lambda: next(laqjax.stream_sweep(laqjax.stack_algorithms([alg]), start, shards, **many)),
    ]


PROBLEMS: dict[str, Any] = {
    "softmax": laqjax.problems.Softmax(20, 3),
    "network": laqjax.problems.TwoLayerNetwork(20, 3, hidden=2),
    "logistic": laqjax.problems.Logistic(20),
    "ridge": laqjax.problems.Ridge(20),
}
RANGE, BINARY = "must be a whole number from 0 to 2", "must be 0 or 1"
BOTH = ("softmax", "network")
LABELS: list[Any] = [
    *((name, lambda s: s._replace(y=labelled(s.y, (1, 3), 3)), f"of worker 1 is 3 at row 3: {RANGE}") for name in BOTH),
    *((name, lambda s: s._replace(y=labelled(s.y, (2, 0), -1)), f"of worker 2 is -1 at row 0: {RANGE}") for name in BOTH),
    *((name, lambda s: s._replace(y=changed(s.y, (2, 0), 0.5)), f"of worker 2 is 0.5 at row 0: {RANGE}") for name in BOTH),
    ("softmax", lambda s: s._replace(y=jnp.asarray(labelled(s.y, (0, 4), 255), np.uint8)), f"is 255 at row 4: {RANGE}"),
    ("logistic", lambda s: s._replace(y=labelled(s.y % 2, (1, 1), 2)), f"of worker 1 is 2 at row 1: {BINARY}"),
    ("logistic", lambda s: s._replace(y=labelled(s.y % 2, (1, 1), -1)), f"of worker 1 is -1 at row 1: {BINARY}"),
    *((name, lambda s: s._replace(y=np.eye(3)[s.y]), "shards.y of shape [4, 12, 3]: must be [4, 12]") for name in PROBLEMS),
    *((name, lambda s: s._replace(y=(s.y, s.y)), "shards.y of shape [4, 12], [4, 12]: must be [4, 12]") for name in PROBLEMS),
    *((name, lambda s: s._replace(x=s.x[..., 1:]), "shards.x of shape [4, 12, 19]: must be [4, 12, 20]") for name in PROBLEMS),
    *((name, lambda s: s._replace(x=s.x.reshape(4, 12, 4, 5)), "shape [4, 12, 4, 5]: must be [4, 12, 20]") for name in PROBLEMS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "message"), LABELS)
def test_data_fit_the_problem(name: str, wrong: Any, message: str, toy: Toy) -> None:
    problem, shards = PROBLEMS[name], wrong(toy.shards)
    alg = algorithms.laq(problem.oracle(), lr=0.1, num_workers=4)
    for call in every_start(alg, problem.init_params(0), shards):
        refused(call, message)
    refused(lambda: laqjax.check_inputs(alg, problem.init_params(0), shards), message)
    refused(
        lambda: laqjax.max_batch_size(
            laqjax.algorithms.fedavg(problem.oracle(), num_workers=4, num_local_steps=2, local_lr=0.1), shards
        ),
        message,
    )


def test_labels_that_are_right_are_taken(toy: Toy) -> None:
    """Labels of padding are not read, class ids may be stored as floats, and real labels of `Logistic` are used as they are."""
    weight = np.asarray(toy.shards.weight)
    padding = np.where(weight > 0, toy.shards.y, 99)
    for name in BOTH:
        for y in (toy.shards.y, padding, padding.astype(np.float32), jnp.asarray(padding, np.uint8)):
            PROBLEMS[name].oracle().validate(toy.shards._replace(y=y))
    for y in (padding % 2, np.linspace(-1, 1, 48).reshape(4, 12), toy.shards.y == 1):
        PROBLEMS["logistic"].oracle().validate(toy.shards._replace(y=np.where(weight > 0, y, y.dtype.type(9))))
    PROBLEMS["ridge"].oracle().validate(toy.shards)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), toy.shards)
    PROBLEMS["softmax"].oracle().validate(shapes)


def test_bool_labels_of_logistic_regression_are_classes(toy: Toy) -> None:
    x, y = jnp.asarray(toy.shards.x[0]), jnp.arange(12, dtype=jnp.int32) % 2
    params = {"weight": jnp.linspace(-0.1, 0.1, 20, dtype=jnp.float32)}
    losses = [PROBLEMS["logistic"](params, x, labels) for labels in (y, y == 1)]
    np.testing.assert_array_equal(*losses)


KEYS: list[tuple[Any, str]] = [
    (0, "0: must be"),
    (np.zeros(2, np.uint32), "uint32[2]: must be"),
    (None, "None: must be"),
]


@pytest.mark.parametrize(("bad", "given"), KEYS)
def test_the_key(bad: Any, given: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    one = every_start(alg, toy.theta0, toy.shards, key=bad)[:2]
    many = every_start(alg, toy.theta0, toy.shards, keys=bad)[2:]
    for call in one:
        refused(call, f"key = {given} one typed key; pass jax.random.key(0)")
    for call in many:
        refused(call, f"keys = {given} 1 typed keys, one for each point; pass jax.random.split(jax.random.key(0), 1)")


def test_one_key_is_not_many(toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    keys = jax.random.split(KEY, 3)
    for call in every_start(alg, toy.theta0, toy.shards, key=keys)[:2]:
        refused(call, "key = key<fry>[3]: must be one typed key; pass jax.random.key(0)")
    for call in every_start(alg, toy.theta0, toy.shards, keys=KEY)[2:]:
        refused(call, "keys = key<fry>[]: must be 1 typed keys")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("all_gathr", "collective = 'all_gathr': must be one of ['all_gather', 'all_reduce', 'all_to_all'], or"),
        ("all_gathr", "an instance of laqjax.types.Collective; did you mean 'all_gather'?"),
        (3, "collective = 3: must be one of ['all_gather', 'all_reduce', 'all_to_all'], or"),
        (laqjax.sharding.AllReduce, "must be one of ['all_gather', 'all_reduce', 'all_to_all'], or"),
    ],
)
def test_the_collective(bad: Any, message: str, toy: Toy) -> None:
    """Also where no mesh needs one."""
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    for call in every_start(alg, toy.theta0, toy.shards, collective=bad):
        refused(call, message)


SCHEDULES: list[tuple[Any, str]] = [
    (optax.linear_schedule(0.1, -0.1, 397), "in round 199: must be finite and >= 0 in every round"),
    (optax.constant_schedule(-0.1), "lr = -0.1 in round 0"),
    (lambda k: 1 / (199.0 - k), "lr = inf in round 199"),
    (jax.tree_util.Partial(lambda lr, k: lr * (k < 50), np.nan), "lr = nan in round 0"),
]


@pytest.mark.parametrize(("lr", "message"), SCHEDULES)
def test_a_schedule_gives_steps(lr: Any, message: str, toy: Toy) -> None:
    alg = algorithms.gd(toy.oracle, lr=lr, num_workers=4)
    for call in every_start(alg, toy.theta0, toy.shards, rounds=200):
        refused(call, message)


def test_every_point_has_its_schedule(toy: Toy) -> None:
    schedule = jax.tree_util.Partial(lambda lr, k: lr * jnp.ones_like(k, jnp.float32), 0.1)
    algs = [algorithms.gd(toy.oracle, lr=jax.tree_util.Partial(schedule.func, lr), num_workers=4) for lr in (0.1, -0.2)]
    refused(
        lambda: laqjax.sweep(laqjax.stack_algorithms(algs), toy.theta0, toy.shards, 3, jax.random.split(KEY, 2)),
        "lr = -0.2 in",
    )


def test_a_local_schedule_gives_steps(toy: Toy) -> None:
    """It is read in steps, 2 a round, also from a later round and for each point of a sweep."""
    schedule = jax.tree_util.Partial(lambda lr, step: lr * (100.0 - step), 0.01)
    given: dict[str, Any] = dict(num_workers=4, num_local_steps=2)
    alg, other = (
        algorithms.diloco(toy.oracle, local_lr=jax.tree_util.Partial(schedule.func, lr), **given)
        for lr in (0.01, -0.01)
    )
    message = "learning rate of the local steps = -0.01 in step 101: must be finite and >= 0 in every step"
    fedavg = algorithms.fedavg(toy.oracle, local_lr=schedule, **given)
    for call in [
        *every_start(alg, toy.theta0, toy.shards, rounds=51),
        lambda: validation.check_schedule(fedavg, 0, 51),
    ]:
        refused(call, message)
    validation.check_schedule(alg, 0, 50)
    validation.check_schedule(alg, 40, 10)
    late = alg.init(toy.theta0)._replace(round=jnp.int32(45))
    for call in every_start(alg, late, toy.shards, rounds=6)[:2]:
        refused(call, message)
    refused(
        lambda: laqjax.sweep(
            laqjax.stack_algorithms([alg, other]), toy.theta0, toy.shards, 3, jax.random.split(KEY, 2)
        ),
        "learning rate of the local steps = -1 in step 0",
    )


def test_a_schedule_may_end_at_zero(toy: Toy) -> None:
    validation.check_schedule(algorithms.gd(toy.oracle, lr=optax.cosine_decay_schedule(0.1, 99), num_workers=4), 0, 100)
    late = algorithms.gd(toy.oracle, lr=optax.linear_schedule(0.1, -0.1, 100), num_workers=4)
    validation.check_schedule(late, 0, 51)
    state = late.init(toy.theta0)._replace(round=jnp.int32(50))
    for call in every_start(late, state, toy.shards, rounds=2)[:2]:
        refused(call, "lr = -0.002 in round 51")


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        (lambda theta: theta[:-1], "float32[62]"),
        (lambda theta: theta.reshape(3, 21), "float32[3, 21]"),
        (lambda theta: theta.astype(np.float16), "float16[63]"),
        (lambda theta: np.asarray(theta, np.float64), "float64[63]"),
        (lambda theta: np.ones(63, int), "int64[63]"),
        (lambda theta: np.ones(63).tolist(), "<class 'list'>"),
    ],
)
def test_the_start(wrong: Any, got: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    start = wrong(toy.theta0)
    refused(lambda: laqjax.run(alg, start, toy.shards, 3, KEY), f"params = {got}: must be float32[63]")


def test_a_state_of_another_window(toy: Toy) -> None:
    short, long = (algorithms.laq(toy.oracle, lr=0.1, num_workers=4, window=window) for window in (5, 10))
    state = long.init(toy.theta0)
    refused(lambda: laqjax.run(short, state, toy.shards, 3, KEY), "must be AlgorithmState(params=((63,)")


RUN: list[tuple[dict[str, Any], str]] = [
    *((dict(rounds=bad), f"rounds = {bad!r}: must be a whole number >= 1") for bad in (0, -1, 2.5, None, True)),
    *((dict(chunk_size=bad), f"chunk_size = {bad!r}: must be a whole number >= 1") for bad in (0, 2.5)),
    (dict(worker_batch_size=0), "worker_batch_size = 0: must be a whole number >= 1"),
]


@pytest.mark.parametrize(("wrong", "message"), RUN)
def test_the_arguments_of_a_run(wrong: dict[str, Any], message: str, toy: Toy) -> None:
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    arguments: Any = dict(rounds=3, key=KEY) | wrong
    refused(lambda: laqjax.run(alg, toy.theta0, toy.shards, **arguments), message)


def test_an_unknown_record(toy: Toy) -> None:
    # found while tracing: only there is it known what this algorithm has to tell
    alg = algorithms.laq(toy.oracle, lr=0.1, num_workers=4)
    with pytest.raises(ValueError, match=r"metrics = \['hope', 'pain'\]: must be names among .*'decoded_sq', .*'grad'"):
        laqjax.run(alg, toy.theta0, toy.shards, 3, KEY, metrics=["pain", "grad", "hope"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda losses: jnp.mean(losses), "must be per-example losses of shape [2]"),
        (lambda losses: losses[:, None], "must be per-example losses of shape [2]"),
        (lambda losses: (losses, losses), "must be per-example losses of shape [2]"),
        (lambda losses: losses.astype(np.float16), "returned float16 losses: must be float32"),
        (lambda losses: losses.astype(np.int32), "returned int32 losses: must be float32"),
    ],
)
def test_the_loss(wrong: Any, message: str, toy: Toy) -> None:
    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        return wrong(softmax_loss(params, x, y))

    given = replace(toy.oracle, loss_fn=loss_fn)
    alg = algorithms.laq(given, lr=0.1, num_workers=4)
    for call in every_start(alg, toy.theta0, toy.shards):
        refused(call, message)
    refused(lambda: laqjax.max_batch_size(alg, toy.shards), message)
    refused(
        lambda: laqjax.sweep(laqjax.stack_algorithms([alg]), toy.theta0, toy.shards, 3, KEY[None], batch_size=1),
        message,
    )
    # before any check, and on whole tiles
    everywhere = message.replace("[2]", "[")[: message.index("[2]") + 1] if "[2]" in message else message
    refused(lambda: jax.eval_shape(alg.oracle, toy.theta0, toy.shards, jnp.int32(0)), everywhere)
    refused(lambda: given.prefers_sequential(toy.shards), message)
    refused(lambda: given.activation_bytes(toy.shards), everywhere)


def test_a_diverging_run_says_where(toy: Toy) -> None:
    """Twice the largest stable step: losses grow a hundredfold a round, until float32 overflows."""
    flat = oracles.from_loss(lambda params, x, y: 1e3 * params[0] ** 2 + 0 * y.astype(np.float32), jnp.ones(1))
    alg = algorithms.gd(flat, lr=0.01, num_workers=4)
    theta0 = jnp.ones(1)
    with pytest.raises(laqjax.DivergenceError) as whole:
        laqjax.run(alg, theta0, toy.shards, 50, KEY, chunk_size=4)
    stop = whole.value.round
    assert 4 < stop < 50
    assert f"from round {stop} on, after it had grown" in str(whole.value)
    losses = whole.value.info.loss
    assert losses.shape == (stop,)
    assert whole.value.info.sent.shape == (stop, 4)
    assert np.all(np.isfinite(losses))
    # every round before is good, the round itself is not
    good = laqjax.run(alg, theta0, toy.shards, stop, KEY, chunk_size=4)
    np.testing.assert_array_equal(good.info.loss, losses)
    # rounds are counted from the very start, infos from the start of the call
    state = laqjax.run(alg, theta0, toy.shards, 3, KEY, chunk_size=4).state
    with pytest.raises(laqjax.DivergenceError) as resumed:
        laqjax.run(alg, state, toy.shards, 50, KEY, chunk_size=4)
    assert resumed.value.round == stop
    np.testing.assert_array_equal(resumed.value.info.loss, losses[3:])


def test_a_loss_that_is_nan_is_no_step_too_large(toy: Toy) -> None:
    zero_by_zero = oracles.from_loss(lambda params, x, y: params[0] * 0 / (0 * y.astype(np.float32)), jnp.ones(1))
    alg = algorithms.gd(zero_by_zero, lr=0.01, num_workers=4)
    with pytest.raises(laqjax.DivergenceError, match="not finite in round 0, and had not grown before"):
        laqjax.run(alg, jnp.ones(1), toy.shards, 5, KEY, chunk_size=4)
