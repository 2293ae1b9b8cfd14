"""The named algorithms: an equation, a reference, a few lines that put parts together.

Notation: g_m = grad f_m(theta), h_m the memory of worker m, Q_b the grid of b bits, lr the step size, M workers.
Every function takes `lr`, `num_workers` and `optimizer` (lr -> optax transformation; sgd is the paper's server) and
raises ValueError for a number that cannot work.
"""

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np
import optax

from laqjax.compressors import grid, identity
from laqjax.core import Algorithm, Compressor, Fresh, Innovation, Oracle, assemble, number
from laqjax.triggers import always, lazy, patience

NEVER = np.iinfo(np.int32).max  # a limit that no run reaches


class Server(TypedDict, total=False):
    """lr: step size (required). num_workers: M (required). optimizer: lr -> optax transformation (sgd)."""

    lr: float
    num_workers: int
    optimizer: Callable[[Any], optax.GradientTransformation]


class Laziness(Server, total=False):
    """The knobs of the lazy family, beside the server's."""

    xi: Any  # 0.8: the sum of equal weights xi_d, or an array of them [window]
    window: int  # 10: D, the rounds of motion that the rule looks back on
    limit: int | None  # 100: C, an upload is forced after so many silent rounds; None: never
    ramp: bool  # False: divide xi by the rounds seen so far until there are `window` of them, as the authors' program does
    first_upload: str  # "forced": everybody sends in round 0; "rule": round 0 obeys the rule (the authors')
    max_window: int | None  # None: window; more gives algorithms of different windows one shape


def gd(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """Gradient descent: theta -= lr sum_m g_m. Every worker sends 32 p bits every round."""
    return assemble(oracle, identity(), always(), Fresh(), **server)


def qgd(oracle: Oracle, *, bits: int = 4, **server: Unpack[Server]) -> Algorithm:
    """Quantized gradient descent: h_m += Q_b(g_m - h_m), theta -= lr sum_m h_m. LAQ without laziness."""
    return assemble(oracle, grid(bits), always(), Innovation.undamped(oracle), **server)


def lag_wk(oracle: Oracle, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAG with the worker's rule: h_m = g_m iff ||g_m - h_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    Chen, Giannakis, Sun, Yin, "LAG: lazily aggregated gradient for communication-efficient distributed learning",
    NeurIPS 2018, eq. (15a). LAG has no bound on silence: `limit=None` is the original.
    """
    return _lazy(oracle, identity(), **knobs)


def laq(oracle: Oracle, *, bits: int = 4, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAQ: h_m += Q_b(g_m - h_m) iff `triggers.Lazy` says so, or after `limit` silent rounds.

    Sun, Chen, Giannakis, Yang, NeurIPS 2019, Algorithm 2.
    """
    return _lazy(oracle, grid(bits), **knobs)


def _lazy(
    oracle: Oracle,
    compressor: Compressor,
    *,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    **server: Unpack[Server],
) -> Algorithm:
    """Innovation memory under the lazy rule with patience."""
    if first_upload not in ("forced", "rule"):
        raise ValueError(f"first_upload = {first_upload!r}: expected 'forced' or 'rule'")
    limit = NEVER if limit is None else int(number("limit", limit, np.int32, least=1))
    rule = lazy(xi, window, oracle.dtype, max_window=max_window, ramp=ramp)
    return assemble(
        oracle,
        compressor,
        patience(rule, limit),
        Innovation.undamped(oracle),
        initial_silence=limit if first_upload == "forced" else 0,
        max_window=rule.xi.size,
        **server,
    )
