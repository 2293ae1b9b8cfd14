"""Methods that compress a difference to what the server already holds."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import add_shared_docs
from laqjax.downlinks import CompressedModel
from laqjax.memories import (
    DashaMemory,
    MarinaMemory,
    MomentumMemory,
    VrMarinaMemory,
    make_innovation_memory,
)
from laqjax.rules import (
    Always,
)
from laqjax.types import Compressor, Oracle, Sampler


@add_shared_docs
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
    return assemble(oracle, compressor, Always(), make_innovation_memory(oracle), **server)


@add_shared_docs
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
    memory = MomentumMemory(check_number("eta", eta, oracle_dtype(oracle), above=0, maximum=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


@add_shared_docs
def ef21_p(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    downlink_compressor: Compressor,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21 up, EF21-P down: h_m += C(g_m(w) - h_m), theta -= lr sum_m h_m, w += C_down(theta - w); workers have w.

    Gruntkowska, Tyurin, Richtarik, "EF21-P and friends", ICML 2023. `alg.params(state)` is w, `state.downlink` theta.
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(
        oracle,
        compressor,
        Always(),
        make_innovation_memory(oracle),
        downlink=CompressedModel(downlink_compressor),
        **server,
    )


@add_shared_docs
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
    memory = make_innovation_memory(oracle, damping=damping, scaling=scaling)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


@add_shared_docs
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
    return assemble(oracle, compressor, Always(), make_innovation_memory(oracle, damping=damping), **server)


@add_shared_docs
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
    switch = compressors.bernoulli_full(compressor, probability)
    memory = MarinaMemory(switch.probability) if sampler is None else VrMarinaMemory(switch.probability)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, switch, Always(), memory, **server)


@add_shared_docs
def dasha(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    estimate_momentum: float,
    mvr_momentum: float | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DASHA: e_m += Q(h_m - last h_m - a (e_m - last h_m)), theta -= lr sum_m e_m, h_m = g_m; no coin, no full messages.

    Tyurin, Richtarik, "DASHA", ICLR 2023, Algorithm 1. On minibatches DASHA-MVR: h_m = g_m(theta) + (1 - b)(last h_m -
    g_m(last theta)), both on the same rows. Estimates begin at zero, and h_m with the gradient of round 0.
    """
    if sampler is not None and mvr_momentum is None:
        raise ValueError(
            "mvr_momentum = None with a sampler: expected a number in (0, 1]; on minibatches DASHA needs its momentum (DASHA-MVR)"
        )
    momentum = (
        None
        if mvr_momentum is None
        else check_number("mvr_momentum", mvr_momentum, oracle_dtype(oracle), above=0, maximum=1)
    )
    memory = DashaMemory(
        check_number("estimate_momentum", estimate_momentum, oracle_dtype(oracle), above=0, maximum=1), momentum
    )
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)
