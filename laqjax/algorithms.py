"""The named algorithms: an equation, a reference, a few lines that put parts together.

Notation: g_m = grad f_m(theta), h_m the memory of worker m, Q a compressor (Q_b: the grid of b bits), lr the step size,
M workers. Every function takes the keywords of `Server`, the lazy ones those of `Laziness` too; all raise ValueError for
a number that cannot work. The step is lr times a *sum* over workers, as in the papers of the lazy family.
"""

from collections.abc import Callable
from typing import Any, TypedDict, Unpack

import numpy as np
import optax

from laqjax import compressors
from laqjax.compressors import grid, identity
from laqjax.core import (
    Algorithm,
    Compressor,
    ErrorFeedback,
    Estimate,
    Fresh,
    Innovation,
    Oracle,
    Sampler,
    assemble,
    number,
)
from laqjax.triggers import Cyclic, Lazy, Progress, always, lazy, numbers, one_of, patience

NEVER = np.iinfo(np.int32).max  # a limit that no run reaches


class Server(TypedDict, total=False):
    """What every algorithm takes."""

    lr: float  # step size; required
    num_workers: int  # M; required
    optimizer: Callable[[Any], optax.GradientTransformation]  # lr -> optax transformation; sgd is the papers' server
    sampler: Sampler | None  # None: full gradients; oracle.Blocks(size) or oracle.Epochs(size): minibatches


class Patient(Server, total=False):
    """The knobs of a rule with a window and a bound on silence, beside the server's."""

    window: int  # 10: D, the rounds of motion that the rule looks back on
    limit: int | None  # 100: C, an upload is forced after so many silent rounds; None: never
    ramp: bool  # False: divide xi by the rounds seen so far until there are `window` of them, as the authors' program does
    first_upload: str  # "forced": everybody sends in round 0; "rule": round 0 obeys the rule (the authors')
    max_window: int | None  # None: window; more gives algorithms of different windows one shape


class Laziness(Patient, total=False):
    """The knobs of the lazy family."""

    xi: Any  # 0.8: the sum of equal weights xi_d, or an array of them [window]


# ---- full gradients ---------------------------------------------------------------------------------------------


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


def lag_ps(oracle: Oracle, *, smoothness: Any, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAG with the server's rule: it asks worker m iff L_m^2 ||theta - theta_hat_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    LAG, eq. (15b). theta_hat_m is the model of m's last upload, `smoothness` the L_m [M]. Who is not asked neither gets
    the model nor computes a gradient: bits down and `gradients` count that.
    """
    return _lazy(oracle, identity(), smoothness=smoothness, measure="drift_sq", **knobs)


def iag_cyclic(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """Cyclic incremental aggregated gradient: h_m = g_m for m = round mod M (Blatt, Hero, Gauchman 2007)."""
    return assemble(oracle, identity(), Cyclic(), Innovation.undamped(oracle), **server)


def iag_random(oracle: Oracle, *, smoothness: Any, **server: Unpack[Server]) -> Algorithm:
    """Incremental aggregated gradient of one worker a round, drawn proportionally to L_m (Num-IAG in the LAG paper)."""
    rule = one_of(_each(smoothness, oracle, server), oracle.dtype)
    return assemble(oracle, identity(), rule, Innovation.undamped(oracle), **server)


def laq(oracle: Oracle, *, bits: int = 4, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAQ: h_m += Q_b(g_m - h_m) iff `triggers.Lazy` says so, or after `limit` silent rounds.

    Sun, Chen, Giannakis, Yang, NeurIPS 2019, Algorithm 2.
    """
    return _lazy(oracle, grid(bits), **knobs)


def two_laq(oracle: Oracle, *, bits: int = 4, bits_down: int | None = None, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAQ with the model's step quantized on the way down too: theta += Q_b(-lr sum_m h_m), no error memory.

    From the authors' program; `bits_down` is `bits` unless given.
    """
    return _lazy(oracle, grid(bits), downlink=grid(bits if bits_down is None else bits_down), **knobs)


def laq_adaptive(oracle: Oracle, *, min_bits: int = 3, max_bits: int = 16, **knobs: Unpack[Laziness]) -> Algorithm:
    """LAQ with b chosen for each upload, billed with it; see `compressors.AdaptiveGrid` for what is whose."""
    return _lazy(oracle, compressors.adaptive_grid(min_bits, max_bits), **knobs)


def ef21(oracle: Oracle, *, compressor: Compressor, **server: Unpack[Server]) -> Algorithm:
    """EF21: h_m += C(g_m - h_m), theta -= lr sum_m h_m, C contractive (Richtarik, Sokolov, Fatkhullin 2021)."""
    return assemble(oracle, compressor, always(), Innovation.undamped(oracle), **server)


def clag(oracle: Oracle, *, compressor: Compressor, zeta: float = 1.0, **server: Unpack[Server]) -> Algorithm:
    """CLAG: EF21's step iff ||g_m - h_m||^2 > zeta ||g_m - g_m of the round before||^2 (3PC, Richtarik et al. 2022)."""
    rule = Progress(number("zeta", zeta, oracle.dtype, least=0))
    # exact: where the compressor loses nothing both sides of the rule are the same number in the round after an upload
    return assemble(oracle, compressor, rule, Innovation.undamped(oracle, exact=True), **server)


def diana(oracle: Oracle, *, compressor: Compressor, damping: float, **server: Unpack[Server]) -> Algorithm:
    """DIANA: d_m = Q(g_m - h_m), theta -= lr sum_m (h_m + d_m), h_m += damping d_m, Q unbiased (Mishchenko et al. 2019).

    damping <= 1 / (1 + omega), with E ||Q(x) - x||^2 <= omega ||x||^2.
    """
    memory = Innovation(number("damping", damping, oracle.dtype, above=0, most=1))
    return assemble(oracle, compressor, always(), memory, **server)


def marina(oracle: Oracle, *, compressor: Compressor, probability: float, **server: Unpack[Server]) -> Algorithm:
    """MARINA: h_m += Q(g_m - g_m of the round before), or h_m = g_m when the shared coin says so (Gorbunov et al. 2021)."""
    switch = compressors.coin(compressor, probability)
    return assemble(oracle, switch, always(), Estimate(switch.probability), **server)


# ---- minibatches: pass sampler=oracle.Blocks(size), or Epochs(size) ----------------------------------------------


def sgd(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """Stochastic gradient descent: `gd` on minibatches."""
    return gd(oracle, **server)


def qsgd(oracle: Oracle, *, levels: int = 15, **server: Unpack[Server]) -> Algorithm:
    """QSGD: theta -= lr sum_m Q(g_m), randomly rounded to `levels` parts of the norm (Alistarh et al. 2017)."""
    return assemble(oracle, compressors.qsgd(levels), always(), Fresh(), **server)


def terngrad(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """TernGrad: theta -= lr sum_m Q(g_m), Q in {-1, 0, 1} max|g_m| (Wen et al. 2017)."""
    return assemble(oracle, compressors.ternary(), always(), Fresh(), **server)


def ssgd(oracle: Oracle, *, density: float = 0.05, **server: Unpack[Server]) -> Algorithm:
    """Sparsified SGD: coordinates kept with probabilities that minimise the variance (Wangni et al. 2018)."""
    return assemble(oracle, compressors.sampled(density), always(), Fresh(), **server)


def sign_sgd(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """SignSGD with majority vote: theta -= lr sign(sum_m sign(g_m)), p bits a message (Bernstein et al. 2018)."""
    server.setdefault("optimizer", optax.sign_sgd)
    return assemble(oracle, compressors.sign(scaled=False), always(), Fresh(), **server)


def ef_sign_sgd(oracle: Oracle, **server: Unpack[Server]) -> Algorithm:
    """EF-signSGD: scaled signs of gradient + error; what they lost is the next error (Karimireddy et al. 2019).

    The error is kept in units of the gradient: equal to the paper's for a constant lr.
    """
    return assemble(oracle, compressors.sign(), always(), ErrorFeedback(), **server)


def topk_ef(oracle: Oracle, *, k: int, **server: Unpack[Server]) -> Algorithm:
    """Top-k with error feedback (Stich, Cordonnier, Jaggi 2018, Algorithm 1)."""
    return assemble(oracle, compressors.top_k(k), always(), ErrorFeedback(), **server)


def slaq(oracle: Oracle, *, bits: int = 3, **knobs: Unpack[Laziness]) -> Algorithm:
    """SLAQ: LAQ on minibatches, by the paper's rule (the authors' script uses another one)."""
    return laq(oracle, bits=bits, **knobs)


def lasg_wk1(oracle: Oracle, *, period: int = 100, **knobs: Unpack[Laziness]) -> Algorithm:
    """LASG-WK1: the change of g_m - (gradient of a snapshot, on the same sample), the snapshot renewed every `period`.

    Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed learning", 2020.
    """
    return _lazy(oracle, identity(), measure="variance_sq", period=period, **knobs)


def lasg_wk2(oracle: Oracle, **knobs: Unpack[Laziness]) -> Algorithm:
    """LASG-WK2: the change of the gradient between this model and that of the last upload, on the same sample."""
    return _lazy(oracle, identity(), measure="stale_sq", **knobs)


def lasg_ps(oracle: Oracle, *, smoothness: Any, **knobs: Unpack[Laziness]) -> Algorithm:
    """LASG-PS: LAG-PS on minibatches."""
    return lag_ps(oracle, smoothness=smoothness, **knobs)


def _amsgrad(lr: Any) -> optax.GradientTransformation:
    """AMSGrad as published, without bias correction (Reddi, Kale, Kumar 2018): the server of CADA."""
    return optax.amsgrad(lr, bias_correction_mu=False, bias_correction_nu=False)


def cada1(oracle: Oracle, *, c: float = 0.6, period: int = 100, **knobs: Unpack[Patient]) -> Algorithm:
    """CADA1: LASG-WK1's change >= c / D sum_d motion_d, AMSGrad at the server (Chen, Guo, Sun, Yin, AISTATS 2021)."""
    return _cada(oracle, "variance_sq", c, period, **knobs)


def cada2(oracle: Oracle, *, c: float = 0.6, **knobs: Unpack[Patient]) -> Algorithm:
    """CADA2: LASG-WK2's change >= c / D sum_d motion_d, AMSGrad at the server. c = 0 is AMSGrad."""
    return _cada(oracle, "stale_sq", c, 1, **knobs)


def _cada(oracle: Oracle, measure: str, c: float, period: int, **knobs: Unpack[Patient]) -> Algorithm:
    knobs.setdefault("optimizer", _amsgrad)
    xi = number("c", c, oracle.dtype, least=0)
    return _lazy(oracle, identity(), xi=xi, measure=measure, absolute=True, period=period, **knobs)


def _each(smoothness: Any, oracle: Oracle, server: Server) -> np.ndarray:
    """L_m of each worker, checked."""
    shapes = ((server.get("num_workers"),),)
    return numbers("smoothness", smoothness, oracle.dtype, shapes, "L_m >= 0 of each of the num_workers workers")


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
    downlink: Compressor | None = None,
    smoothness: Any = None,
    measure: str = "innovation_sq",
    absolute: bool = False,
    period: int = 1,
    **server: Unpack[Server],
) -> Algorithm:
    """Innovation memory under the lazy rule with patience."""
    if first_upload not in ("forced", "rule"):
        raise ValueError(f"first_upload = {first_upload!r}: expected 'forced' or 'rule'")
    if smoothness is not None:
        smoothness = _each(smoothness, oracle, server)
    limit = NEVER if limit is None else int(number("limit", limit, np.int32, least=1))
    rule: Lazy = lazy(
        xi,
        window,
        oracle.dtype,
        max_window=max_window,
        ramp=ramp,
        smoothness=smoothness,
        measure=measure,
        absolute=absolute,
    )
    return assemble(
        oracle,
        compressor,
        patience(rule, limit),
        Innovation.undamped(oracle),
        initial_silence=limit if first_upload == "forced" else 0,
        period=period,
        max_window=rule.xi.size,
        downlink=downlink,
        **server,
    )
