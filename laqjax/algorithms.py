"""The named algorithms: an equation, a reference, a few lines that put parts together.

Notation: g_m = grad f_m(theta), h_m the memory of worker m, C a compressor (Q unbiased, Q_b the grid of b bits), lr the
step size, M workers. The step is lr times a *sum* over workers, as in the papers of the lazy family. Arguments of one name
mean the same everywhere: they are explained once, in `ARGUMENTS`, and `help` of every function shows its own.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import optax

from laqjax import compressors
from laqjax.checks import number, numbers, oracle_dtype
from laqjax.compressors import grid, identity
from laqjax.memories import (
    CorrectedMomentum,
    Dasha,
    Difference,
    DirectionDown,
    ErrorFeedback,
    Innovation,
    ModelDown,
    Momentum,
    NoMemory,
    SameRows,
    StepDown,
)
from laqjax.oracle import local_steps
from laqjax.rules import (
    Always,
    Cyclic,
    History,
    InnovationChange,
    Lazy,
    MaxSilence,
    Progress,
    ServerLazy,
    SnapshotChange,
    StaleModelChange,
    history,
    max_silence,
    one_of,
    participation,
)
from laqjax.step import Algorithm, assemble
from laqjax.types import Compressor, Oracle, Rule, Sampler

Factory = TypeVar("Factory", bound=Callable[..., Algorithm])

ARGUMENTS = {
    "oracle": "loss and gradient of a worker, from `laqjax.oracle.from_loss`.",
    "lr": "step size > 0 on the sum over workers, or an optax schedule.",
    "num_workers": "M.",
    "bits": "b, bits per coordinate of a message, 1 to 16.",
    "bits_down": "bits per coordinate on the way down (None: `bits`).",
    "min_bits": "the least b that may be chosen.",
    "max_bits": "the largest b that may be chosen, at most 16.",
    "xi": "weights of the history: one number, the sum of equal weights xi_d, or the weights themselves [window], that of the "
    "newest step first. None, where there is a c too: 0.8 unless c is given.",
    "c": "weight of the history by the papers of LASG and CADA: the threshold is (c / D) sum_d motion_d, whatever lr and M. "
    "Where there is a xi too: None, or instead of it.",
    "window": "D, the rounds of motion that the rule looks back on.",
    "limit": "C, an upload is forced after so many silent rounds (None: never).",
    "ramp": "divide xi by the rounds seen so far until there are `window` of them, as the authors' program does.",
    "first_upload": '"forced": everybody sends in round 0; "rule": the rule decides there too, as in the authors\' program.',
    "max_window": "length of the history's buffer, at least window (None: window); algorithms of one length and different "
    "windows share one compiled program.",
    "smoothness": "L_m of every worker [M].",
    "period": "rounds from one snapshot of the model to the next.",
    "compressor": "C or Q, from `laqjax.compressors`.",
    "down": "the compressor of the way down, from `laqjax.compressors`.",
    "zeta": "how much progress a change must outweigh, >= 0.",
    "damping": "lambda in (0, 1], the part of the change by which the memories move.",
    "scaling": "nu in (0, 1], the part of the change that enters the direction at once.",
    "probability": "of the rounds in which everything is sent, in (0, 1].",
    "eta": "weight of the newest gradient in the momentum, in (0, 1].",
    "a": "momentum of the estimates, in (0, 1]; 1 / (2 omega + 1) in the paper.",
    "b": "momentum of DASHA-MVR, in (0, 1]; None: gradients as they are (full ones).",
    "momentum": "in [0, 1).",
    "levels": "parts of the norm beside zero, 1 to 65535.",
    "density": "the share of coordinates that stays, in (0, 1].",
    "k": "coordinates sent.",
    "steps": "local gradient steps a round.",
    "local_lr": "local step size.",
    "participants": "workers that take part in a round (None: all).",
    "optimizer": "the server: a function of the step size that gives an optax transformation, or a transformation, which then "
    "has a step size of its own. The default is plain SGD, the papers' server.",
    "sampler": "minibatches: `laqjax.oracle.Blocks(size)` or `Epochs(size)` (None: full gradients).",
}
EXAMPLES = {
    "compressor": "laqjax.compressors.top_k(5)",
    "down": "laqjax.compressors.top_k(5)",
    "smoothness": "[1.0, 2.0, 1.0, 2.0]",
    "k": "5",
    "damping": "0.5",
    "scaling": "0.5",
    "probability": "0.2",
    "a": "0.2",
    "lr": "0.1",
    "num_workers": "4",
    "local_lr": "0.1",
    "steps": "2",
}


def documented(factory: Factory) -> Factory:
    """Add what all factories share to the docstring: the arguments by name, and an example that runs."""
    parameters = inspect.signature(factory).parameters
    arguments = [f"        {name}: {ARGUMENTS[name]}" for name in parameters]
    needed = [name for name, p in parameters.items() if p.default is p.empty and name != "oracle"]
    call = ", ".join(f"{name}={EXAMPLES[name]}" for name in needed)
    lines = [
        "",
        "",
        "    Args:",
        *arguments,
        "",
        "    Returns:",
        "        The algorithm, a pytree with its numbers as leaves.",
    ]
    lines += ["", "    Raises:", "        ValueError: a number is out of its range, or the parts do not fit.", ""]
    lines += [
        "    Example:",
        "        >>> import laqjax",
        "        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()",
    ]
    lines += [f"        >>> laqjax.algorithms.{factory.__name__}(oracle, {call}).num_workers", "        4", "    "]
    factory.__doc__ = (factory.__doc__ or "").rstrip() + "\n".join(lines)
    return factory


# ---- full gradients ---------------------------------------------------------------------------------------------


@documented
def gd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Gradient descent: theta -= lr sum_m g_m. Every worker sends 32 p bits every round."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Always(), NoMemory(), **server)


@documented
def qgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Quantized gradient descent: h_m += Q_b(g_m - h_m), theta -= lr sum_m h_m. LAQ without laziness."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, grid(bits), Always(), innovation(oracle), **server)


@documented
def lag_wk(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAG with the worker's rule: h_m = g_m iff ||g_m - h_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    Chen, Giannakis, Sun, Yin, "LAG: lazily aggregated gradient for communication-efficient distributed learning",
    NeurIPS 2018, eq. (15a). LAG has no bound on silence: `limit=None` is the original.
    """
    past = history(xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=motion_of(lr, optimizer))
    rule = patient(lazy(past, InnovationChange()), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def lag_ps(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAG with the server's rule: it asks worker m iff L_m^2 ||theta - theta_hat_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    LAG, eq. (15b). theta_hat_m is the model of m's last upload. Who is not asked neither gets the model nor computes a
    gradient: bits down and `gradients` count that.
    """
    past = weighted(xi, c, window, oracle, max_window, ramp, motion_of(lr, optimizer))
    rule = patient(ServerLazy(past, each(smoothness, oracle, num_workers)), limit, first_upload)  # pyright: ignore[reportArgumentType]
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def iag_cyclic(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Cyclic incremental aggregated gradient: h_m = g_m for m = round mod M (Blatt, Hero, Gauchman 2007)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Cyclic(), innovation(oracle), **server)


@documented
def iag_random(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Incremental aggregated gradient of one worker a round, drawn proportionally to L_m (Num-IAG in the LAG paper)."""
    rule = one_of(each(smoothness, oracle, num_workers), oracle_dtype(oracle))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def laq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ: h_m += Q_b(g_m - h_m) iff `rules.Lazy` says so, or after `limit` silent rounds.

    Sun, Chen, Giannakis, Yang, "Communication-efficient distributed learning via lazily aggregated quantized gradients",
    NeurIPS 2019, Algorithm 2. With a server that is not SGD of one lr, the history is made of what that server was given:
    see `rules.History`.
    """
    past = history(xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=motion_of(lr, optimizer))
    rule = patient(lazy(past, InnovationChange()), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, grid(bits), rule, innovation(oracle), **server)


@documented
def two_laq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    bits_down: int | None = None,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ with the model's step quantized on the way down too: theta += Q_b(-lr sum_m h_m), no error memory.

    From the authors' program.
    """
    past = history(xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=motion_of(lr, optimizer))
    rule = patient(lazy(past, InnovationChange()), limit, first_upload)
    downlink = StepDown(grid(bits if bits_down is None else bits_down))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler, "downlink": downlink}
    return assemble(oracle, grid(bits), rule, innovation(oracle), **server)


@documented
def laq_adaptive(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    min_bits: int = 3,
    max_bits: int = 16,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ, its rule too, with b chosen for each upload and billed with it.

    The choice of b is AQUILA's (Zhao et al. 2023), clipped; the rule is LAQ's, not AQUILA's: see `compressors.AdaptiveGrid`.
    """
    past = history(xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=motion_of(lr, optimizer))
    rule = patient(lazy(past, InnovationChange()), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.adaptive_grid(min_bits, max_bits), rule, innovation(oracle), **server)


@documented
def ef21(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21: h_m += C(g_m - h_m), theta -= lr sum_m h_m, C contractive (Richtarik, Sokolov, Fatkhullin 2021)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), innovation(oracle), **server)


@documented
def ef21_sgdm(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    eta: float = 0.1,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21-SGDM: v_m = (1 - eta) v_m + eta g_m, h_m += C(v_m - h_m), theta -= lr sum_m h_m, v_m = g_m at first.

    Fatkhullin, Tyurin, Richtarik, "Momentum provably improves error feedback!", NeurIPS 2023, Algorithm 1.
    """
    memory = Momentum(number("eta", eta, oracle_dtype(oracle), above=0, most=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


@documented
def ef21_p(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    down: Compressor,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21 up, EF21-P down: h_m += C(g_m(w) - h_m), theta -= lr sum_m h_m, w += C_down(theta - w); workers have w.

    Gruntkowska, Tyurin, Richtarik, "EF21-P and friends", ICML 2023. `alg.params(state)` is w, `state.downlink` theta.
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), innovation(oracle), downlink=ModelDown(down), **server)


@documented
def ef_bv(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    damping: float,
    scaling: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF-BV: d_m = C(g_m - h_m), theta -= lr sum_m (h_m + scaling d_m), h_m += damping d_m.

    Condat, Yi, Richtarik, "EF-BV", NeurIPS 2022, Algorithm 1. EF21 is damping = scaling, DIANA scaling = 1.
    """
    memory = innovation(oracle, damping=damping, scaling=scaling)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


@documented
def clag(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    zeta: float = 1.0,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """CLAG: EF21's step iff ||g_m - h_m||^2 > zeta ||g_m - g_m of the round before||^2 (3PC, Richtarik et al. 2022)."""
    rule = Progress(number("zeta", zeta, oracle_dtype(oracle), least=0))
    # exact: where the compressor loses nothing both sides of the rule are the same number in the round after an upload
    memory = innovation(oracle, exact=True)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, rule, memory, **server)


@documented
def diana(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    damping: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DIANA: d_m = Q(g_m - h_m), theta -= lr sum_m (h_m + d_m), h_m += damping d_m, Q unbiased (Mishchenko et al. 2019).

    damping <= 1 / (1 + omega), with E ||Q(x) - x||^2 <= omega ||x||^2.
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), innovation(oracle, damping=damping), **server)


@documented
def marina(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    probability: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """MARINA: h_m += Q(g_m - g_m of the round before), or h_m = g_m when the shared coin says so, and in round 0.

    Gorbunov, Burlachenko, Li, Richtarik, ICML 2021, Algorithm 1. With a sampler VR-MARINA, Algorithm 2: both gradients on
    the same rows, and the full shard's in the rounds of the coin.
    """
    switch = compressors.coin(compressor, probability)
    memory = Difference(switch.probability) if sampler is None else SameRows(switch.probability)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, switch, Always(), memory, **server)


@documented
def dasha(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    a: float,
    b: float | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DASHA: e_m += Q(h_m - last h_m - a (e_m - last h_m)), theta -= lr sum_m e_m, h_m = g_m; no coin, no full messages.

    Tyurin, Richtarik, "DASHA", ICLR 2023, Algorithm 1. On minibatches DASHA-MVR: h_m = g_m(theta) + (1 - b)(last h_m -
    g_m(last theta)), both on the same rows. Estimates begin at zero, and h_m with the gradient of round 0.
    """
    if sampler is not None and b is None:
        raise ValueError(
            "b = None with a sampler: expected b in (0, 1]; on minibatches DASHA needs its momentum (DASHA-MVR)"
        )
    momentum = None if b is None else number("b", b, oracle_dtype(oracle), above=0, most=1)
    memory = Dasha(number("a", a, oracle_dtype(oracle), above=0, most=1), momentum)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


# ---- minibatches: pass sampler=oracle.Blocks(size), or Epochs(size) ----------------------------------------------


@documented
def sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Stochastic gradient descent: `gd` on minibatches."""
    return gd(oracle, lr=lr, num_workers=num_workers, optimizer=optimizer, sampler=sampler)


@documented
def qsgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    levels: int = 15,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """QSGD: theta -= lr sum_m Q(g_m), randomly rounded to `levels` parts of the norm (Alistarh et al. 2017)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.qsgd(levels), Always(), NoMemory(), **server)


@documented
def terngrad(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """TernGrad: theta -= lr sum_m Q(g_m), Q in {-1, 0, 1} max|g_m| (Wen et al. 2017)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.ternary(), Always(), NoMemory(), **server)


@documented
def ssgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    density: float = 0.05,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Sparsified SGD: coordinates kept with probabilities that minimise the variance (Wangni et al. 2018)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.sampled(density), Always(), NoMemory(), **server)


@documented
def sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """SignSGD with majority vote: theta -= lr sign(sum_m sign(g_m)), p bits a message, up and down (Bernstein et al. 2018).

    One bit has no zero: see `compressors.Sign` for what stands for it, on the way up and, where votes tie, down.
    """
    vote = compressors.sign(scaled=False)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, vote, Always(), NoMemory(), downlink=DirectionDown(vote), **server)


@documented
def ef_sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """EF-signSGD: scaled signs of gradient + error; what they lost is the next error (Karimireddy et al. 2019).

    The error is kept in units of the gradient: equal to the paper's for a constant lr.
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.sign(), Always(), ErrorFeedback(), **server)


@documented
def topk_ef(
    oracle: Oracle, *, lr: Any, num_workers: int, k: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Top-k with error feedback (Stich, Cordonnier, Jaggi 2018, Algorithm 1)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), ErrorFeedback(), **server)


@documented
def dgc(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    k: int,
    momentum: float = 0.9,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Deep gradient compression: u_m = momentum u_m + g_m, v_m += u_m, the k largest of v_m are sent; both begin anew there.

    Lin, Han, Mao, Wang, Dally, ICLR 2018, Algorithm 1 and section 3: momentum correction and factor masking, without
    clipping and warm-up.
    """
    memory = CorrectedMomentum(number("momentum", momentum, oracle_dtype(oracle), least=0, most=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), memory, **server)


@documented
def slaq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 3,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """SLAQ: LAQ on minibatches, by the paper's rule (the authors' script uses another one)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    knobs = {"xi": xi, "window": window, "limit": limit, "ramp": ramp, "first_upload": first_upload}
    return laq(oracle, bits=bits, max_window=max_window, **knobs, **server)


@documented
def lasg_wk1(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    period: int = 100,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-WK1: the change of g_m - (gradient of a snapshot, on the same rows), the snapshot renewed every `period`.

    Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed learning", 2020, eq. (7). The paper's
    single D is `period` = D and `limit` = D - 1 (its staleness tau counts from 1), its d_max is `window`, its c is `c`.
    """
    change = SnapshotChange(number("period", period, np.int32, least=1))
    past = weighted(xi, c, window, oracle, max_window, ramp, motion_of(lr, optimizer))
    rule = patient(lazy(past, change), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def lasg_wk2(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-WK2: the change of the gradient between this model and that of the last upload, on the same rows.

    Chen, Sun, Yin 2020, eq. (10). The paper's D is `limit` = D - 1, its d_max is `window`, its c is `c`.
    """
    past = weighted(xi, c, window, oracle, max_window, ramp, motion_of(lr, optimizer))
    rule = patient(lazy(past, StaleModelChange()), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def lasg_ps(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-PS: LAG-PS on minibatches (Chen, Sun, Yin 2020). The paper's D is `limit` = D - 1, its d_max is `window`."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    knobs = {"xi": xi, "c": c, "window": window, "limit": limit, "ramp": ramp, "first_upload": first_upload}
    return lag_ps(oracle, smoothness=smoothness, max_window=max_window, **knobs, **server)


def amsgrad(lr: Any) -> optax.GradientTransformation:
    """AMSGrad as published, without bias correction (Reddi, Kale, Kumar 2018): the server of CADA."""
    return optax.amsgrad(lr, bias_correction_mu=False, bias_correction_nu=False)


@documented
def cada1(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    c: float = 0.6,
    period: int = 100,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = amsgrad,
    sampler: Sampler | None = None,
) -> Algorithm:
    """CADA1: LASG-WK1's change >= c / D sum_d motion_d, AMSGrad at the server (Chen, Guo, Sun, Yin, AISTATS 2021, eq. (7)).

    The paper's single D is `period` = D and `limit` = D - 1, its d_max is `window`.
    """
    change = SnapshotChange(number("period", period, np.int32, least=1))
    past = weighted(None, c, window, oracle, max_window, ramp, "absolute")
    rule = patient(lazy(past, change), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


@documented
def cada2(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    c: float = 0.6,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    optimizer: Any = amsgrad,
    sampler: Sampler | None = None,
) -> Algorithm:
    """CADA2: LASG-WK2's change >= c / D sum_d motion_d, AMSGrad at the server (eq. (10) of CADA). c = 0 is AMSGrad.

    The paper's D is `limit` = D - 1, its d_max is `window`.
    """
    past = weighted(None, c, window, oracle, max_window, ramp, "absolute")
    rule = patient(lazy(past, StaleModelChange()), limit, first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, innovation(oracle), **server)


# ---- local steps --------------------------------------------------------------------------------------------------


@documented
def fedavg(
    oracle: Oracle,
    *,
    num_workers: int,
    steps: int,
    local_lr: float,
    lr: Any = None,
    participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedAvg: `steps` local steps, theta = the average of the local models of those who take part.

    McMahan, Moore, Ramage, Hampson, Arcas, AISTATS 2017, with equal weights. It is `gd` on `oracle.local_steps`, by default
    with the lr that makes the average, steps local_lr / participants; another lr or optimizer is a FedOpt server.
    """
    local, lr, rule = federated(oracle, num_workers, steps, local_lr, lr, participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, identity(), rule, NoMemory(), **server)


@documented
def fedpaq(
    oracle: Oracle,
    *,
    num_workers: int,
    steps: int,
    local_lr: float,
    lr: Any = None,
    levels: int = 15,
    participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedPAQ: FedAvg with quantized changes of the model and partial participation (Reisizadeh et al. 2020).

    It is `qsgd` on `oracle.local_steps`; lr as in `fedavg`.
    """
    local, lr, rule = federated(oracle, num_workers, steps, local_lr, lr, participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, compressors.qsgd(levels), rule, NoMemory(), **server)


@documented
def fedlaq(
    oracle: Oracle,
    *,
    num_workers: int,
    steps: int,
    local_lr: float,
    lr: Any = None,
    bits: int = 4,
    xi: Any = 0.8,
    window: int = 10,
    limit: int | None = 100,
    ramp: bool = False,
    first_upload: str = "forced",
    max_window: int | None = None,
    participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Lazy FedAvg: `laq` on `oracle.local_steps`, whose gradient is the change of the local model. Ours, from those parts.

    lr: by default steps local_lr / M, the average of the local models that the memories stand for.
    """
    local, lr, _ = federated(oracle, num_workers, steps, local_lr, lr, None)
    past = history(xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=motion_of(lr, optimizer))
    rule: Rule = patient(lazy(past, InnovationChange()), limit, first_upload)
    if participants is not None:
        rule = participation(rule, num_workers, count=participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, grid(bits), rule, innovation(oracle), **server)


# ---- pieces -------------------------------------------------------------------------------------------------------


def innovation(oracle: Oracle, *, damping: float = 1, scaling: float = 1, exact: bool = False) -> Innovation:
    """An `Innovation` memory with checked numbers, both in (0, 1]."""
    given = {"damping": damping, "scaling": scaling}
    checked = {name: number(name, value, oracle_dtype(oracle), above=0, most=1) for name, value in given.items()}
    return Innovation(**checked, exact=exact)


def lazy(past: History, change: Any) -> Lazy:
    """LAQ's rule over a history, with its 3 before the errors."""
    return Lazy(past, change, np.asarray(3, past.xi.dtype))  # pyright: ignore[reportArgumentType]


def patient(rule: Rule, limit: int | None, first_upload: str) -> MaxSilence:
    """`rules.max_silence`, with a limit >= 1: limit = 0 would be another algorithm."""
    checked = None if limit is None else int(number("limit", limit, np.int32, least=1))
    return max_silence(rule, checked, first_upload=first_upload)


def motion_of(lr: Any, optimizer: Any) -> str:
    """What the history is made of: the step itself for plain SGD of one lr, else the direction; see `rules.History`."""
    return "step" if optimizer is optax.sgd and not callable(lr) else "direction"


def weighted(
    xi: Any, c: float | None, window: int, oracle: Oracle, max_window: int | None, ramp: bool, of: str
) -> History:
    """Return a history by xi, 0.8 where neither is given, or by c."""
    if c is None:
        return history(0.8 if xi is None else xi, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of=of)
    if xi is not None:
        raise ValueError(
            f"xi = {xi!r} and c = {c!r}: expected one of them; c / window is each of the weights, without lr and M"
        )
    weight = number("c", c, oracle_dtype(oracle), least=0)
    return history(weight, window, oracle_dtype(oracle), max_window=max_window, ramp=ramp, of="absolute", name="c")


def each(smoothness: Any, oracle: Oracle, num_workers: int) -> np.ndarray:
    """L_m of each worker, checked."""
    return numbers(
        "smoothness", smoothness, oracle_dtype(oracle), ((num_workers,),), "L_m >= 0 of each of the num_workers workers"
    )


def federated(
    oracle: Oracle, num_workers: int, steps: int, local_lr: float, lr: Any, participants: int | None
) -> tuple[Oracle, Any, Rule]:
    """(oracle of local steps, the server's lr, who takes part) of the federated members."""
    local = local_steps(oracle, steps, local_lr)
    count = num_workers if participants is None else participants
    rule = Always() if participants is None else participation(Always(), num_workers, count=participants)
    return local, float(local.lr) * local.steps / count if lr is None else lr, rule
