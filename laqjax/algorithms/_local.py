"""Methods with several local steps between two messages."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import oracle_dtype
from laqjax.algorithms._shared import add_shared_docs, history_kind, make_lazy_rule, make_local_oracle, with_max_silence
from laqjax.compressors import grid, identity
from laqjax.memories import (
    NoMemory,
    make_innovation_memory,
)
from laqjax.rules import (
    InnovationChange,
    make_history,
    partial_participation,
)
from laqjax.types import Oracle, Sampler, UploadRule


@add_shared_docs
def fedavg(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: float,
    lr: Any = None,
    num_participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedAvg: `num_local_steps` local steps, theta = the average of the local models of those who take part.

    McMahan, Moore, Ramage, Hampson, Arcas, AISTATS 2017, with equal weights. It is `gd` on `oracles.with_local_steps`, by default
    with the lr that makes the average, steps local_lr / participants; another lr or optimizer is a FedOpt server.
    """
    local, lr, rule = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, identity(), rule, NoMemory(), **server)


@add_shared_docs
def fedpaq(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: float,
    lr: Any = None,
    levels: int = 15,
    num_participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedPAQ: FedAvg with quantized changes of the model and partial participation (Reisizadeh et al. 2020).

    It is `qsgd` on `oracles.with_local_steps`; lr as in `fedavg`.
    """
    local, lr, rule = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, compressors.qsgd(levels), rule, NoMemory(), **server)


@add_shared_docs
def fedlaq(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: float,
    lr: Any = None,
    bits: int = 4,
    xi: Any = 0.8,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    num_participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Lazy FedAvg: `laq` on `oracles.with_local_steps`, whose gradient is the change of the local model. Ours, from those parts.

    lr: by default steps local_lr / M, the average of the local models that the memories stand for.
    """
    local, lr, _ = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, None)
    past = make_history(
        xi,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind=history_kind(lr, optimizer),
    )
    rule: UploadRule = with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)
    if num_participants is not None:
        rule = partial_participation(rule, num_workers, count=num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, grid(bits), rule, make_innovation_memory(oracle), **server)
