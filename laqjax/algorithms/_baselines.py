"""Methods that always send: gradient descent, quantized gradient descent, incremental aggregated gradient."""

from typing import Any

import optax

from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import oracle_dtype
from laqjax.algorithms._shared import add_shared_docs, check_smoothness
from laqjax.compressors import grid, identity
from laqjax.memories import (
    NoMemory,
    make_innovation_memory,
)
from laqjax.rules import (
    Always,
    Cyclic,
    sample_one_worker,
)
from laqjax.types import Oracle, Sampler


@add_shared_docs
def gd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Gradient descent: theta -= lr sum_m g_m. Every worker sends 32 p bits every round."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Always(), NoMemory(), **server)


@add_shared_docs
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
    return assemble(oracle, grid(bits), Always(), make_innovation_memory(oracle), **server)


@add_shared_docs
def iag_cyclic(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Cyclic incremental aggregated gradient: h_m = g_m for m = round mod M (Blatt, Hero, Gauchman 2007)."""
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Cyclic(), make_innovation_memory(oracle), **server)


@add_shared_docs
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
    rule = sample_one_worker(check_smoothness(smoothness, oracle, num_workers), oracle_dtype(oracle))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


@add_shared_docs
def sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Stochastic gradient descent: `gd` on minibatches."""
    return gd(oracle, lr=lr, num_workers=num_workers, optimizer=optimizer, sampler=sampler)
