"""Methods in which a worker takes several local steps between two messages."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax.algorithms._shared import (
    make_innovation_rule,
    make_local_oracle,
)
from laqjax.compressors import grid, identity
from laqjax.memories import NoMemory, make_innovation_memory
from laqjax.rules import partial_participation
from laqjax.types import Oracle, Sampler, UploadRule


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
    """FedAvg: theta -= lr sum_m u_m, with u_m = (theta - theta_m) / (num_local_steps local_lr).

    theta_m is the model of worker m after its local gradient steps. It is `gd` on `laqjax.oracles.with_local_steps`.
    The default `lr` makes the new model the average of the participants' local models, with equal weights. With another
    `lr` or optimizer the server is that of FedOpt.

    Reference: McMahan, Moore, Ramage, Hampson, Arcas, AISTATS 2017.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). The step acts on the SUM of
            the workers' vectors. None: num_local_steps * local_lr / (number of participants), which makes the new model
            the average of their local models.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients. `size` must be a multiple of `num_local_steps`,
            since local steps share no examples.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.fedavg(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local, lr, rule = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, identity(), rule, NoMemory(), **server)


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
    """FedPAQ: theta -= lr sum_m Q(u_m), with the model changes u_m of `fedavg` and the random rounding Q of `qsgd`.

    It is FedAvg with quantized model changes and partial participation: `qsgd` on `laqjax.oracles.with_local_steps`.

    Reference: Reisizadeh et al. 2020.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). The step acts on the SUM of
            the workers' vectors. None: num_local_steps * local_lr / (number of participants), which makes the new model
            the average of their local models.
        levels: Number of levels beside zero into which the norm is divided, from 1 to 65535.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients. `size` must be a multiple of `num_local_steps`,
            since local steps share no examples.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.fedpaq(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local, lr, rule = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, compressors.qsgd(levels), rule, NoMemory(), **server)


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
    """FedLAQ, lazy FedAvg: h_m += Q_b(u_m - h_m) for the workers that send, theta -= lr sum_m h_m.

    u_m is the model change of `fedavg`, and the upload rule is that of `laq`. It is `laq` on
    `laqjax.oracles.with_local_steps`. There is no paper: laqjax combines the two methods.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). The step acts on the SUM of
            the workers' vectors. None: num_local_steps * local_lr / M, which makes the new model the average of the
            local models that the memories represent.
        bits: Number b of bits per coordinate of a message, from 1 to 16.
        xi: Weights xi_d >= 0 of the last D model steps in the threshold. One number is the sum of D equal weights. An
            array [window] holds the weights themselves, newest step first.
        window: Number D of past rounds whose model steps enter the threshold, at least 1.
        max_silence: Number C of silent rounds in a row after which a worker must send, at least 1 (None: no limit).
            Only rounds in which the worker participates count.
        rescale_short_history: If True, scale the weights by window / max(round, 1) until `window` rounds have passed,
            as the authors' program does. The default is False.
        force_first_upload: If True, every worker sends in the first round in which it participates. If False, the rule
            decides there too. The default is True.
        padded_window: Length of the buffer for the history, at least `window` (None: `window`). Algorithms with buffers
            of one length share one compiled program, even if their windows differ.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients. `size` must be a multiple of `num_local_steps`,
            since local steps share no examples.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.fedlaq(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local, lr, _ = make_local_oracle(oracle, num_workers, num_local_steps, local_lr, lr, None)
    rule: UploadRule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    if num_participants is not None:
        rule = partial_participation(rule, num_workers, count=num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, grid(bits), rule, make_innovation_memory(oracle), **server)
