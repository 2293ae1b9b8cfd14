"""The named algorithms as tests make them: a row for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from laqjax import Algorithm, algorithms, compressors, samplers
from tests.support import Toy


class Row(NamedTuple):
    """A named algorithm, knobs to test it with, and other values of all of them in every kind of number."""

    factory: Callable[..., Algorithm]
    knobs: dict[str, Any]
    others: dict[str, tuple[Any, ...]]


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
ROWS = {
    "gd": Row(algorithms.gd, {}, LR),
    "qgd": Row(algorithms.qgd, dict(bits=3), LR | BITS),
    "lag_wk": Row(algorithms.lag_wk, LAZY_KNOBS, LR | LAZY),
    "lag_ps": Row(algorithms.lag_ps, LAZY_KNOBS | EACH, LR | LAZY | SMOOTH),
    "iag_cyclic": Row(algorithms.iag_cyclic, {}, LR),
    "iag_random": Row(algorithms.iag_random, EACH, LR | SMOOTH),
    "laq": Row(algorithms.laq, LAZY_KNOBS | dict(bits=3), LR | BITS | LAZY),
    "two_laq": Row(algorithms.two_laq, LAZY_KNOBS | dict(bits=3, downlink_bits=5), LR | BITS | LAZY),
    "laq_adaptive": Row(algorithms.laq_adaptive, LAZY_KNOBS, LR | {"min_bits": BITS["bits"]} | LAZY),
    "ef21": Row(algorithms.ef21, TOP, LR),
    "clag": Row(algorithms.clag, TOP | dict(zeta=200.0), LR | ZETA),
    "diana": Row(algorithms.diana, RANDOM | dict(damping=0.5), LR | DAMPING),
    "marina": Row(algorithms.marina, RANDOM | dict(probability=0.4), LR | SHARE),
    "marina_natural": Row(algorithms.marina, dict(compressor=compressors.natural(), probability=0.4), LR | SHARE),
    "vr_marina": Row(algorithms.marina, EPOCHS | RANDOM | dict(probability=0.4), LR | SHARE),
    "ef21_sgdm": Row(algorithms.ef21_sgdm, BLOCKS | TOP | dict(eta=0.3), LR | {"eta": SHARE["probability"]}),
    "ef21_p": Row(algorithms.ef21_p, TOP | dict(downlink_compressor=compressors.top_k(4)), LR),
    "ef_bv": Row(algorithms.ef_bv, TOP | dict(damping=0.5, scaling=0.8), LR | DAMPING),
    "dasha": Row(
        algorithms.dasha, RANDOM | dict(estimate_momentum=0.2), LR | {"estimate_momentum": SHARE["probability"]}
    ),
    "dasha_mvr": Row(
        algorithms.dasha,
        EPOCHS | RANDOM | dict(estimate_momentum=0.2, mvr_momentum=0.3),
        LR | {"mvr_momentum": SHARE["probability"]},
    ),
    "sgd": Row(algorithms.sgd, BLOCKS, LR),
    "qsgd": Row(algorithms.qsgd, EPOCHS | dict(levels=5), LR | {"levels": BITS["bits"]}),
    "terngrad": Row(algorithms.terngrad, BLOCKS, LR),
    "ssgd": Row(algorithms.ssgd, EPOCHS | dict(density=0.3), LR | {"density": SHARE["probability"]}),
    "sign_sgd": Row(algorithms.sign_sgd, BLOCKS, LR),
    "ef_sign_sgd": Row(algorithms.ef_sign_sgd, BLOCKS, LR),
    "topk_ef": Row(algorithms.topk_ef, EPOCHS | dict(k=3), LR),
    "dgc": Row(
        algorithms.dgc, EPOCHS | dict(k=3, momentum=0.5), LR | {"momentum": (0, 0.9, np.float32(0.3), 0.1, 0.5)}
    ),
    "fedavg": Row(algorithms.fedavg, LOCAL, LR | {"local_lr": LR["lr"]}),
    "fedpaq": Row(algorithms.fedpaq, EPOCHS | LOCAL | dict(levels=5), LR | {"levels": BITS["bits"]}),
    "fedlaq": Row(algorithms.fedlaq, LAZY_KNOBS | LOCAL | dict(num_participants=3), LR | BITS | LAZY),
    "slaq": Row(algorithms.slaq, EPOCHS | LAZY_KNOBS, LR | BITS | LAZY),
    "lasg_wk1": Row(algorithms.lasg_wk1, BLOCKS | LAZY_KNOBS | dict(period=5), LR | LAZY | PERIOD),
    "lasg_wk2": Row(algorithms.lasg_wk2, EPOCHS | LAZY_KNOBS, LR | LAZY),
    "lasg_ps": Row(algorithms.lasg_ps, BLOCKS | LAZY_KNOBS | EACH, LR | LAZY | SMOOTH),
    "cada1": Row(algorithms.cada1, BLOCKS | CADA_KNOBS | dict(period=5), LR | CADA | PERIOD),
    "cada2": Row(algorithms.cada2, EPOCHS | CADA_KNOBS, LR | CADA),
}


def make(name: str, toy: Toy, **knobs: Any) -> Algorithm:
    row = ROWS[name]
    return row.factory(toy.oracle, **{"lr": 0.05, "num_workers": 4, **row.knobs, **knobs})


def points_of(name: str, toy: Toy) -> list[Algorithm]:
    others = ROWS[name].others
    return [make(name, toy, **{k: v[i] for k, v in others.items()} | {"lr": 0.02 * (i + 1)}) for i in range(5)]
