"""Lazy methods: a worker sends only when a rule says that its change matters."""

from typing import Any

import numpy as np
import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import (
    add_shared_docs,
    check_smoothness,
    history_from_xi_or_c,
    history_kind,
    make_lazy_rule,
    with_max_silence,
)
from laqjax.compressors import grid, identity
from laqjax.downlinks import CompressedStep
from laqjax.memories import make_innovation_memory
from laqjax.rules import (
    ClagRule,
    InnovationChange,
    ServerLazyRule,
    SnapshotChange,
    StaleModelChange,
    make_history,
)
from laqjax.types import Compressor, Oracle, Sampler


@add_shared_docs
def lag_wk(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAG with the worker's rule: h_m = g_m iff ||g_m - h_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    Chen, Giannakis, Sun, Yin, "LAG: lazily aggregated gradient for communication-efficient distributed learning",
    NeurIPS 2018, eq. (15a). LAG has no bound on silence: `limit_silence=None` is the original.
    """
    past = make_history(
        xi,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind=history_kind(lr, optimizer),
    )
    rule = with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def lag_ps(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAG with the server's rule: it asks worker m iff L_m^2 ||theta - theta_hat_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2).

    LAG, eq. (15b). theta_hat_m is the model of m's last upload. Who is not asked neither gets the model nor computes a
    gradient: bits down and `gradients` count that.
    """
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(ServerLazyRule(past, check_smoothness(smoothness, oracle, num_workers)), max_silence, force_first_upload)  # pyright: ignore[reportArgumentType]  # fmt: skip
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def laq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ: h_m += Q_b(g_m - h_m) iff `rules.LazyRule` says so, or after `limit_silence` silent rounds.

    Sun, Chen, Giannakis, Yang, "Communication-efficient distributed learning via lazily aggregated quantized gradients",
    NeurIPS 2019, Algorithm 2. With a server that is not SGD of one lr, the history is made of what that server was given:
    see `rules.History`.
    """
    past = make_history(
        xi,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind=history_kind(lr, optimizer),
    )
    rule = with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, grid(bits), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def two_laq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    downlink_bits: int | None = None,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ with the model's step quantized on the way down too: theta += Q_b(-lr sum_m h_m), no error memory.

    From the authors' program.
    """
    past = make_history(
        xi,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind=history_kind(lr, optimizer),
    )
    rule = with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)
    downlink = CompressedStep(grid(bits if downlink_bits is None else downlink_bits))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler, "downlink": downlink}
    return assemble(oracle, grid(bits), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def laq_adaptive(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    min_bits: int = 3,
    max_bits: int = 16,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LAQ, its rule too, with b chosen for each upload and billed with it.

    The choice of b is AQUILA's (Zhao et al. 2023), clipped; the rule is LAQ's, not AQUILA's: see `compressors.AdaptiveGrid`.
    """
    past = make_history(
        xi,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind=history_kind(lr, optimizer),
    )
    rule = with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(
        oracle, compressors.adaptive_grid(min_bits, max_bits), rule, make_innovation_memory(oracle), **server
    )


@add_shared_docs
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
    rule = ClagRule(check_number("zeta", zeta, oracle_dtype(oracle), minimum=0))
    # exact: where the compressor loses nothing both sides of the rule are the same number in the round after an upload
    memory = make_innovation_memory(oracle, snap_when_lossless=True)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, rule, memory, **server)


@add_shared_docs
def slaq(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 3,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """SLAQ: LAQ on minibatches, by the paper's rule (the authors' script uses another one)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    knobs = {
        "xi": xi,
        "window": window,
        "max_silence": max_silence,
        "rescale_short_history": rescale_short_history,
        "force_first_upload": force_first_upload,
    }
    return laq(oracle, bits=bits, padded_window=padded_window, **knobs, **server)


@add_shared_docs
def lasg_wk1(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    period: int = 100,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-WK1: the change of g_m - (gradient of a snapshot, on the same rows), the snapshot renewed every `period`.

    Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed learning", 2020, eq. (7). The paper's
    single D is `period` = D and `limit_silence` = D - 1 (its staleness tau counts from 1), its d_max is `window`, its c is `c`.
    """
    change = SnapshotChange(check_number("period", period, np.int32, minimum=1))
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(make_lazy_rule(past, change), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def lasg_wk2(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-WK2: the change of the gradient between this model and that of the last upload, on the same rows.

    Chen, Sun, Yin 2020, eq. (10). The paper's D is `limit_silence` = D - 1, its d_max is `window`, its c is `c`.
    """
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(make_lazy_rule(past, StaleModelChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def lasg_ps(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    xi: Any = None,
    c: float | None = None,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """LASG-PS: LAG-PS on minibatches (Chen, Sun, Yin 2020). The paper's D is `limit_silence` = D - 1, its d_max is `window`."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    knobs = {
        "xi": xi,
        "c": c,
        "window": window,
        "max_silence": max_silence,
        "rescale_short_history": rescale_short_history,
        "force_first_upload": force_first_upload,
    }
    return lag_ps(oracle, smoothness=smoothness, padded_window=padded_window, **knobs, **server)


def amsgrad(lr: Any) -> optax.GradientTransformation:
    """AMSGrad as published, without bias correction (Reddi, Kale, Kumar 2018): the server of CADA."""
    return optax.amsgrad(lr, bias_correction_mu=False, bias_correction_nu=False)


@add_shared_docs
def cada1(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    c: float = 0.6,
    period: int = 100,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = amsgrad,
    sampler: Sampler | None = None,
) -> Algorithm:
    """CADA1: LASG-WK1's change >= c / D sum_d motion_d, AMSGrad at the server (Chen, Guo, Sun, Yin, AISTATS 2021, eq. (7)).

    The paper's single D is `period` = D and `limit_silence` = D - 1, its d_max is `window`.
    """
    change = SnapshotChange(check_number("period", period, np.int32, minimum=1))
    past = history_from_xi_or_c(None, c, window, oracle, padded_window, rescale_short_history, "absolute")
    rule = with_max_silence(make_lazy_rule(past, change), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def cada2(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    c: float = 0.6,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    optimizer: Any = amsgrad,
    sampler: Sampler | None = None,
) -> Algorithm:
    """CADA2: LASG-WK2's change >= c / D sum_d motion_d, AMSGrad at the server (eq. (10) of CADA). c = 0 is AMSGrad.

    The paper's D is `limit_silence` = D - 1, its d_max is `window`.
    """
    past = history_from_xi_or_c(None, c, window, oracle, padded_window, rescale_short_history, "absolute")
    rule = with_max_silence(make_lazy_rule(past, StaleModelChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)
