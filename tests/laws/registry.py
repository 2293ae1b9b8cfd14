"""The named algorithms as tests make them: a row for each, and several for one that has variants."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from laqjax import Algorithm, algorithms, compressors, rules, samplers, types
from tests.laws import local_twins, twins
from tests.support import Toy, keys_of


@dataclass(frozen=True)
class Twin:
    """A NumPy twin of a method, and the arguments of the runs that are compared.

    both: arguments of the method and of its twin. ours, theirs: those that the two name or take differently.
    """

    run: Callable[..., twins.History]
    both: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    lr: float | None = 0.05


class Row(NamedTuple):
    """A named algorithm: its arguments in the laws, and five other values of its numbers, of every type.

    twin: None where the draws of a method are no part of a paper. long: other rows have its parts, so `make test` leaves
    it to `make test-long`.
    """

    factory: Callable[..., Algorithm]
    arguments: dict[str, Any]
    other_values: dict[str, tuple[Any, ...]]
    twin: Twin | None = None
    long: bool = False


def run_marina_twin(problem: twins.Problem, rounds: int, *, probability: float, **given: Any) -> twins.History:
    """Run the twin of MARINA, or of VR-MARINA on minibatches, with the library's draws of full rounds."""
    share = np.asarray(probability, np.float32)
    coins = [bool(types.shared_bernoulli(keys_of(k, 0, problem.num_workers), share)) for k in range(rounds)]
    run = twins.marina if problem.rows(0, 0) is None else twins.vr_marina
    return run(problem, rounds, coins=np.array(coins), **given)


@cache
def draw_participants(num_workers: int, rounds: int, count: int) -> np.ndarray:
    """Return which workers the library selects in each round, [rounds, M]."""
    rule, nothing = rules.partial_participation(rules.Always(), num_workers, count=count), None

    def draw(round: Any, worker: Any) -> Any:
        keys: Any = keys_of(round, worker, num_workers)
        return rule.is_participating(types.RoundContext(nothing, keys, nothing, num_workers, nothing, round=round))  # pyright: ignore[reportArgumentType]

    each_worker = jax.vmap(draw, (None, 0))
    return np.asarray(jax.jit(jax.vmap(each_worker, (0, None)))(np.arange(rounds), np.arange(num_workers)))


def with_participants(run: Callable[..., twins.History]) -> Callable[..., twins.History]:
    """Return the twin of a method with local training, with the library's draws of participants."""

    def run_twin(problem: twins.Problem, rounds: int, *, num_participants: int, **given: Any) -> twins.History:
        return run(problem, rounds, asked=draw_participants(problem.num_workers, rounds, num_participants), **given)

    return run_twin


LR = {"lr": (0.03, np.float64(0.01), np.float32(0.07), jnp.float32(0.02), 1)}
BITS = {"bits": (2, np.int64(5), np.uint8(16), jnp.int32(1), 7)}
MOTION = {
    "window": (2, np.int64(4), 3, 6, jnp.int32(5)),
    "max_silence": (3, np.int32(9), jnp.int32(4), None, 1),
    "rescale_short_history": (True, False, np.bool_(True), False, True),
    "force_first_upload": (False, True, False, False, True),
}
LAZY = MOTION | {"xi": (0.5, np.float64(0.1), np.ones(3) / 10, [0.1, 0, 0.2, 0, 0.3, 0], jnp.float32(0.3))}
CADA = MOTION | {"c": (0.5, np.float64(0.1), 0, np.int32(1), jnp.float32(0.3))}
SMOOTH = {"smoothness": ([1, 2, 3, 4], np.ones(4), np.arange(4), [0.1, 0, 1e3, 1], jnp.ones(4, np.float32))}
SHARE = {"probability": (0.1, np.float64(0.2), np.float32(0.3), jnp.float32(0.4), 1)}
DAMPING = {"damping": SHARE["probability"]}
ZETA = {"zeta": (0, np.float64(0.2), np.float32(0.3), jnp.float32(4), 1)}
PERIOD = {"period": BITS["bits"]}
LAZY_KNOBS = dict(xi=0.4, window=4, max_silence=6, padded_window=6)
CADA_KNOBS = dict(c=0.5, window=4, max_silence=6, padded_window=6)
EACH = dict(smoothness=[1.0, 2.0, 0.5, 1.5])
BLOCKS, EPOCHS = dict(sampler=samplers.BlockSampler(4)), dict(sampler=samplers.ShuffleSampler(4))
TOP, RANDOM = dict(compressor=compressors.top_k(3)), dict(compressor=compressors.rand_k(3))
LOCAL = dict(num_local_steps=2, local_lr=0.1)
LOCAL_LR = {"local_lr": LR["lr"]}
TWIN_LOCAL: tuple[Any, ...] = (dict(num_local_steps=2), dict(steps=2))
# with these the rules of the twins skip, and ask for uploads before the bound on silence does
TWIN_LAZY: dict[str, Any] = dict(xi=0.07, window=4, max_silence=9)
TWIN_CADA: dict[str, Any] = dict(window=4, max_silence=10)
TOP_7, TWIN_TOP_7 = dict(compressor=compressors.top_k(7)), dict(compressor=twins.top_k(7))
TWIN_EACH = dict(smoothness=np.array([1.0, 2.0, 0.5]))


ROWS = {
    "gd": Row(algorithms.gd, {}, LR, Twin(twins.gd)),
    "qgd": Row(algorithms.qgd, dict(bits=3), LR | BITS, Twin(twins.qgd, dict(bits=3)), long=True),
    "lag_wk": Row(algorithms.lag_wk, LAZY_KNOBS, LR | LAZY, Twin(twins.lag_wk, TWIN_LAZY), long=True),
    "lag_ps": Row(
        algorithms.lag_ps,
        LAZY_KNOBS | EACH,
        LR | LAZY | SMOOTH,
        Twin(twins.lag_ps, TWIN_LAZY | TWIN_EACH),
        long=True,
    ),
    "iag_cyclic": Row(algorithms.iag_cyclic, {}, LR, Twin(twins.iag_cyclic), long=True),
    "iag_random": Row(algorithms.iag_random, EACH, LR | SMOOTH),
    "laq": Row(
        algorithms.laq,
        LAZY_KNOBS | dict(bits=3),
        LR | BITS | LAZY,
        Twin(twins.laq, TWIN_LAZY | dict(bits=3)),
    ),
    "two_laq": Row(
        algorithms.two_laq,
        LAZY_KNOBS | dict(bits=3, downlink_bits=5),
        LR | BITS | LAZY,
        Twin(twins.two_laq, TWIN_LAZY | dict(bits=3), dict(downlink_bits=5), dict(bits_down=5)),
    ),
    "laq_adaptive": Row(algorithms.laq_adaptive, LAZY_KNOBS, LR | {"min_bits": BITS["bits"]} | LAZY),
    "ef21": Row(algorithms.ef21, TOP, LR, Twin(twins.ef21, {}, TOP_7, TWIN_TOP_7), long=True),
    "clag": Row(algorithms.clag, TOP | dict(zeta=200.0), LR | ZETA, Twin(twins.clag, dict(zeta=30), TOP_7, TWIN_TOP_7)),
    "diana": Row(
        algorithms.diana,
        RANDOM | dict(damping=0.5),
        LR | DAMPING,
        Twin(twins.diana, dict(damping=0.6), TOP_7, TWIN_TOP_7),
        long=True,
    ),
    "marina": Row(
        algorithms.marina,
        RANDOM | dict(probability=0.4),
        LR | SHARE,
        Twin(run_marina_twin, dict(probability=0.3), TOP_7, TWIN_TOP_7),
    ),
    "marina_natural": Row(
        algorithms.marina,
        dict(compressor=compressors.natural(), probability=0.4),
        LR | SHARE,
        long=True,
    ),
    "vr_marina": Row(algorithms.marina, EPOCHS | RANDOM | dict(probability=0.4), LR | SHARE, long=True),
    "ef21_sgdm": Row(
        algorithms.ef21_sgdm,
        BLOCKS | TOP | dict(eta=0.3),
        LR | {"eta": SHARE["probability"]},
        Twin(twins.ef21_sgdm, {}, TOP_7 | dict(eta=0.3), TWIN_TOP_7 | dict(momentum=0.3)),
        long=True,
    ),
    "ef21_p": Row(
        algorithms.ef21_p,
        TOP | dict(downlink_compressor=compressors.top_k(4)),
        LR,
        Twin(
            twins.ef21_p,
            {},
            TOP_7 | dict(downlink_compressor=compressors.top_k(11)),
            TWIN_TOP_7 | dict(down=twins.top_k(11)),
        ),
    ),
    "ef_bv": Row(
        algorithms.ef_bv,
        TOP | dict(damping=0.5, scaling=0.8),
        LR | DAMPING,
        Twin(twins.ef_bv, dict(damping=0.6, scaling=0.8), TOP_7, TWIN_TOP_7),
        long=True,
    ),
    "dasha": Row(
        algorithms.dasha,
        RANDOM | dict(estimate_momentum=0.2),
        LR | {"estimate_momentum": SHARE["probability"]},
        Twin(twins.dasha, {}, TOP_7 | dict(estimate_momentum=0.4), TWIN_TOP_7 | dict(a=0.4)),
        long=True,
    ),
    "dasha_mvr": Row(
        algorithms.dasha,
        EPOCHS | RANDOM | dict(estimate_momentum=0.2, mvr_momentum=0.3),
        LR | {"mvr_momentum": SHARE["probability"]},
        Twin(
            twins.dasha,
            {},
            TOP_7 | dict(estimate_momentum=0.4, mvr_momentum=0.3),
            TWIN_TOP_7 | dict(a=0.4, momentum=0.3),
        ),
    ),
    "sgd": Row(algorithms.sgd, BLOCKS, LR, long=True),
    "qsgd": Row(algorithms.qsgd, EPOCHS | dict(levels=5), LR | {"levels": BITS["bits"]}, long=True),
    "terngrad": Row(algorithms.terngrad, BLOCKS, LR, long=True),
    "ssgd": Row(algorithms.ssgd, EPOCHS | dict(density=0.3), LR | {"density": SHARE["probability"]}, long=True),
    "sign_sgd": Row(algorithms.sign_sgd, BLOCKS, LR, Twin(twins.sign_sgd)),
    "ef_sign_sgd": Row(algorithms.ef_sign_sgd, BLOCKS, LR, Twin(twins.ef_sign_sgd), long=True),
    "topk_ef": Row(algorithms.topk_ef, EPOCHS | dict(k=3), LR, Twin(twins.topk_ef, dict(k=7)), long=True),
    "dgc": Row(
        algorithms.dgc,
        EPOCHS | dict(k=3, momentum=0.5),
        LR | {"momentum": (0, 0.9, np.float32(0.3), 0.1, 0.5)},
        Twin(twins.dgc, dict(k=7, momentum=0.6)),
    ),
    "fedavg": Row(
        algorithms.fedavg,
        LOCAL,
        LR | LOCAL_LR,
        Twin(twins.fedavg, dict(local_lr=0.05), *TWIN_LOCAL, lr=None),
        long=True,
    ),
    "fedpaq": Row(algorithms.fedpaq, EPOCHS | LOCAL | dict(levels=5), LR | {"levels": BITS["bits"]}, long=True),
    "fedlaq": Row(
        algorithms.fedlaq,
        LAZY_KNOBS | LOCAL | dict(num_participants=3),
        LR | BITS | LAZY,
        Twin(twins.fedlaq, TWIN_LAZY | dict(local_lr=0.1, bits=4), dict(num_local_steps=2), dict(steps=2)),
    ),
    "scaffold": Row(
        algorithms.scaffold,
        LOCAL | dict(num_participants=3),
        LR | LOCAL_LR,
        Twin(with_participants(local_twins.scaffold), dict(local_lr=0.1, num_participants=2), *TWIN_LOCAL, lr=None),
    ),
    "scaffold_full": Row(
        algorithms.scaffold,
        LOCAL,
        LR | LOCAL_LR,
        Twin(local_twins.scaffold, dict(local_lr=0.1), *TWIN_LOCAL),
        long=True,
    ),
    "fedadam": Row(
        algorithms.fedadam,
        LOCAL,
        LR | LOCAL_LR | {"tau": LR["lr"], "b1": SHARE["probability"], "b2": SHARE["probability"]},
        Twin(partial(local_twins.fed_adaptive, kind="adam"), dict(local_lr=0.1, tau=0.01), *TWIN_LOCAL),
        long=True,
    ),
    "fedyogi": Row(
        algorithms.fedyogi,
        LOCAL | dict(num_participants=3),
        LR | LOCAL_LR | {"tau": LR["lr"]},
        Twin(
            with_participants(partial(local_twins.fed_adaptive, kind="yogi")),
            dict(local_lr=0.1, tau=0.01, num_participants=2),
            *TWIN_LOCAL,
        ),
        long=True,
    ),
    "diloco": Row(
        algorithms.diloco,
        LOCAL,
        LR | LOCAL_LR,
        Twin(local_twins.diloco, dict(local_lr=0.01), *TWIN_LOCAL, lr=None),
        long=True,
    ),
    "diloco_ef": Row(
        algorithms.diloco,
        LOCAL | dict(compressor=compressors.statistical_grid(2), decay=0.9, num_participants=3),
        LR | LOCAL_LR | {"decay": SHARE["probability"]},
        Twin(
            with_participants(local_twins.diloco),
            dict(local_lr=0.01, decay=0.9, num_participants=2),
            TWIN_LOCAL[0] | dict(compressor=compressors.statistical_grid(2)),
            TWIN_LOCAL[1] | dict(compressor=local_twins.statistical_grid(2, 3.0)),
        ),
    ),
    "sparse_loco": Row(
        algorithms.sparse_loco,
        LOCAL | dict(chunk=10, k=2),
        LR | LOCAL_LR | BITS | {"decay": SHARE["probability"]},
        Twin(local_twins.sparse_loco, dict(local_lr=0.01, chunk=10, k=3, bits=2, decay=0.9), *TWIN_LOCAL, lr=None),
        long=True,
    ),
    "lazy_diloco": Row(
        algorithms.lazy_diloco,
        LAZY_KNOBS | LOCAL,
        LR | LOCAL_LR | BITS | LAZY,
        Twin(local_twins.lazy_diloco, TWIN_LAZY | dict(local_lr=0.01, bits=4), *TWIN_LOCAL),
        long=True,
    ),
    "slaq": Row(
        algorithms.slaq,
        EPOCHS | LAZY_KNOBS,
        LR | BITS | LAZY,
        Twin(twins.slaq, TWIN_LAZY | dict(bits=3)),
        long=True,
    ),
    "lasg_wk1": Row(
        algorithms.lasg_wk1,
        BLOCKS | LAZY_KNOBS | dict(period=5),
        LR | LAZY | PERIOD,
        Twin(twins.lasg_wk1, TWIN_LAZY | dict(period=7)),
    ),
    "lasg_wk2": Row(algorithms.lasg_wk2, EPOCHS | LAZY_KNOBS, LR | LAZY, Twin(twins.lasg_wk2, TWIN_LAZY), long=True),
    "lasg_ps": Row(
        algorithms.lasg_ps,
        BLOCKS | LAZY_KNOBS | EACH,
        LR | LAZY | SMOOTH,
        Twin(twins.lasg_ps, TWIN_CADA | TWIN_EACH | dict(c=9)),
        long=True,
    ),
    "cada1": Row(
        algorithms.cada1,
        BLOCKS | CADA_KNOBS | dict(period=5),
        LR | CADA | PERIOD,
        Twin(twins.cada1, TWIN_CADA | dict(c=2.5, period=7)),
        long=True,
    ),
    "cada2": Row(algorithms.cada2, EPOCHS | CADA_KNOBS, LR | CADA, Twin(twins.cada2, TWIN_CADA | dict(c=2.5))),
}


def named_algorithms() -> dict[str, Callable[..., Algorithm]]:
    """Return the factories that the library exports."""
    public = {name: getattr(algorithms, name) for name in algorithms.__all__}
    return {name: f for name, f in public.items() if inspect.signature(f).return_annotation is Algorithm}


def parametrize_rows(quick: Sequence[str] | None = None) -> list[Any]:
    """Return the rows as parameters of a test; in `make test` those in `quick`, or (None) those not marked as long."""
    left = {name: row.long if quick is None else name not in quick for name, row in ROWS.items()}
    return [pytest.param(name, marks=[pytest.mark.long] * long) for name, long in left.items()]


def make(name: str, toy: Toy, **changes: Any) -> Algorithm:
    """Return the algorithm of a row with its arguments in the laws, or changed ones."""
    row = ROWS[name]
    return row.factory(toy.oracle, **{"lr": 0.05, "num_workers": 4, **row.arguments, **changes})


def points_of(name: str, toy: Toy) -> list[Algorithm]:
    """Return five settings of a row, as the points of a sweep."""
    others = ROWS[name].other_values
    return [make(name, toy, **{k: v[i] for k, v in others.items()} | {"lr": 0.02 * (i + 1)}) for i in range(5)]
