"""The named algorithms. Each function states its equation and reference and assembles an `Algorithm`.

Notation, with vectors [p]: theta is the model, g_m = grad f_m(theta) the gradient of worker m, and h_m the memory of
worker m. M is the number of workers. C is a compressor, Q an unbiased compressor, and Q_b the grid of b bits. The
learning rate is lr. The step is lr times a *sum* over workers, as in the papers of the lazy family.

Arguments of one name mean the same in every function. The sections from "Args" on are generated: edit the tables in
`docs/docstrings.py` and run `make docstrings`. CONTRIBUTING.md lists all places that a new method touches.
"""

from laqjax.algorithms._baselines import gd, iag_cyclic, iag_random, qgd, sgd
from laqjax.algorithms._compressed import dasha, diana, ef21, ef21_p, ef21_sgdm, ef_bv, marina
from laqjax.algorithms._diloco import diloco, lazy_diloco, sparse_loco
from laqjax.algorithms._lag import clag, lag_ps, lag_wk
from laqjax.algorithms._laq import laq, laq_adaptive, slaq, two_laq
from laqjax.algorithms._lasg_cada import cada1, cada2, lasg_ps, lasg_wk1, lasg_wk2
from laqjax.algorithms._local import fedadam, fedavg, fedlaq, fedpaq, fedyogi, scaffold
from laqjax.algorithms._stochastic import dgc, ef_sign_sgd, qsgd, sign_sgd, ssgd, terngrad, topk_ef

__all__ = [
    "cada1",
    "cada2",
    "clag",
    "dasha",
    "dgc",
    "diana",
    "diloco",
    "ef21",
    "ef21_p",
    "ef21_sgdm",
    "ef_bv",
    "ef_sign_sgd",
    "fedadam",
    "fedavg",
    "fedlaq",
    "fedpaq",
    "fedyogi",
    "gd",
    "iag_cyclic",
    "iag_random",
    "lag_ps",
    "lag_wk",
    "laq",
    "laq_adaptive",
    "lasg_ps",
    "lasg_wk1",
    "lasg_wk2",
    "lazy_diloco",
    "marina",
    "qgd",
    "qsgd",
    "scaffold",
    "sgd",
    "sign_sgd",
    "slaq",
    "sparse_loco",
    "ssgd",
    "terngrad",
    "topk_ef",
    "two_laq",
]
