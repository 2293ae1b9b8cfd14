"""Methods that compress stochastic gradients."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import add_shared_docs
from laqjax.downlinks import CompressedDirection
from laqjax.memories import (
    ErrorFeedback,
    MomentumCorrection,
    NoMemory,
)
from laqjax.rules import (
    Always,
)
from laqjax.types import Oracle, Sampler


@add_shared_docs
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


@add_shared_docs
def terngrad(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """TernGrad: theta -= lr sum_m Q(g_m), Q in {-1, 0, 1} max|g_m| (Wen et al. 2017)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.ternary(), Always(), NoMemory(), **server)


@add_shared_docs
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
    return assemble(oracle, compressors.optimal_sparsifier(density), Always(), NoMemory(), **server)


@add_shared_docs
def sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """SignSGD with majority vote: theta -= lr sign(sum_m sign(g_m)), p bits a message, up and down (Bernstein et al. 2018).

    One bit has no zero: see `compressors.Sign` for what stands for it, on the way up and, where votes tie, down.
    """
    vote = compressors.sign(scaled=False)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, vote, Always(), NoMemory(), downlink=CompressedDirection(vote), **server)


@add_shared_docs
def ef_sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """EF-signSGD: scaled signs of gradient + error; what they lost is the next error (Karimireddy et al. 2019).

    The error is kept in units of the gradient: equal to the paper's for a constant lr.
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.sign(), Always(), ErrorFeedback(), **server)


@add_shared_docs
def topk_ef(
    oracle: Oracle, *, lr: Any, num_workers: int, k: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Top-k with error feedback (Stich, Cordonnier, Jaggi 2018, Algorithm 1)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), ErrorFeedback(), **server)


@add_shared_docs
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
    memory = MomentumCorrection(check_number("momentum", momentum, oracle_dtype(oracle), minimum=0, maximum=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), memory, **server)
