"""DiLoCo and its variants: local training with an inner optimizer, and an outer optimizer for the changes of the model."""

from typing import Any

import optax

from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import make_innovation_rule, make_local_steps, make_participation
from laqjax.compressors import chunked_top_k, grid, identity, quantized_values
from laqjax.memories import ErrorFeedback, NoMemory, make_innovation_memory
from laqjax.optimizers import nesterov
from laqjax.types import Compressor, Memory, Oracle, Sampler


def diloco(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = None,
    inner: Any = optax.adamw,
    compressor: Compressor | None = None,
    decay: float = 1.0,
    keep_optimizer_state: bool = True,
    num_participants: int | None = None,
    optimizer: Any = nesterov,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DiLoCo: theta = Nesterov(theta, sum_m d_m), with d_m = theta - theta_m after local steps of AdamW.

    With a compressor C, worker m sends C(decay e_m + d_m), and e_m is what the compression lost: the error feedback of
    MuLoCo and SparseLoCo. MuLoCo's C is `laqjax.compressors.statistical_grid(bits)`. Unlike its program, the mean of
    the messages is not quantized again, and the outer learning rate is not applied to d_m.

    Reference: Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023, Algorithm 1;
    Therien et al., "MuLoCo", 2025.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the inner optimizer, or a schedule: a function of the step round *
            num_local_steps + t. None for an `inner` that is a transformation.
        lr: Learning rate > 0 of the outer optimizer, or an optax schedule (a function of the round). It acts on the SUM
            of the workers' vectors. None: 0.7 / (number of participants), the step of the paper on their mean.
        inner: Inner optimizer of the local steps: a function from the step size to an optax transformation, such as
            `optax.adamw`, or a transformation; see `laqjax.oracles.with_local_steps`.
        compressor: Compressor C of the uplink, with error feedback, such as
            `laqjax.compressors.statistical_grid(bits)`. None: full precision, without error feedback.
        decay: Share of the compression error that a worker keeps, in [0, 1]. Without a compressor it is not used.
        keep_optimizer_state: If True, a worker keeps the state of its inner optimizer from round to round. If False, it
            starts anew in every round. The default is True.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is SGD with
            Nesterov momentum 0.9, as in the paper.
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
        >>> laqjax.algorithms.diloco(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local = make_local_steps(oracle, num_local_steps, local_lr, inner, keep_optimizer_state, returns_difference=True)
    count, rule = make_participation(num_workers, num_participants)
    kept = check_number("decay", decay, oracle_dtype(oracle), minimum=0, maximum=1)
    memory: Memory = NoMemory() if compressor is None else ErrorFeedback(kept)
    server = {"lr": 0.7 / count if lr is None else lr, "num_workers": num_workers, "optimizer": optimizer}
    return assemble(local, compressor or identity(), rule, memory, sampler=sampler, **server)


def sparse_loco(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = None,
    inner: Any = optax.adamw,
    chunk: int = 4096,
    k: int = 64,
    bits: int = 2,
    decay: float = 0.95,
    keep_optimizer_state: bool = True,
    num_participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """SparseLoCo: theta -= lr sum_m Q_b(TopK(e_m)), with e_m = decay e_m + theta - theta_m, less what was sent.

    It is `diloco` with plain SGD as the outer optimizer. TopK keeps k coordinates of each chunk, and Q_b is the grid of
    LAQ over all kept values; the authors' program has a statistical grid. A coordinate counts as zero for the workers
    that do not send it, while the program divides by the number of those that send.

    Reference: Sarfi et al., "Communication efficient LLM pre-training with SparseLoCo", 2025, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the inner optimizer, or a schedule: a function of the step round *
            num_local_steps + t. None for an `inner` that is a transformation.
        lr: Learning rate > 0 of the outer optimizer, or an optax schedule (a function of the round). It acts on the SUM
            of the workers' vectors. None: 1 / (number of participants).
        inner: Inner optimizer of the local steps: a function from the step size to an optax transformation, such as
            `optax.adamw`, or a transformation; see `laqjax.oracles.with_local_steps`.
        chunk: Number of consecutive coordinates in a chunk, at least 2. Another number compiles another program.
        k: Number of coordinates that a chunk sends, from 1 to `chunk`. Another number compiles another program.
        bits: Number b of bits of each value that is sent, from 1 to 16.
        decay: Share of the compression error that a worker keeps, in [0, 1].
        keep_optimizer_state: If True, a worker keeps the state of its inner optimizer from round to round. If False, it
            starts anew in every round. The default is True.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the paper.
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
        >>> laqjax.algorithms.sparse_loco(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    count, _ = make_participation(num_workers, num_participants)
    return diloco(
        oracle,
        num_workers=num_workers,
        num_local_steps=num_local_steps,
        local_lr=local_lr,
        lr=1 / count if lr is None else lr,
        inner=inner,
        compressor=quantized_values(chunked_top_k(chunk, k), grid(bits)),
        decay=decay,
        keep_optimizer_state=keep_optimizer_state,
        num_participants=num_participants,
        optimizer=optimizer,
        sampler=sampler,
    )


def lazy_diloco(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = None,
    inner: Any = optax.adamw,
    bits: int = 4,
    xi: Any = 0.05,
    window: int = 10,
    max_silence: int | None = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
    padded_window: int | None = None,
    keep_optimizer_state: bool = True,
    optimizer: Any = nesterov,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Lazy DiLoCo: h_m += Q_b(theta - theta_m - h_m) for the workers that send, theta = Nesterov(theta, sum_m h_m).

    theta_m is the local model of `diloco`, and the upload rule is that of `laq`. The motion in the threshold is the
    squared norm of sum_m h_m, not of the model step. Momentum makes the steps about ten times as long; a silent worker
    would then lengthen them further, and the threshold with them. The useful range of `xi` is 0.02 to 0.2, below the
    default of `laq`. There is no paper: laqjax combines the two methods.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the inner optimizer, or a schedule: a function of the step round *
            num_local_steps + t. None for an `inner` that is a transformation.
        lr: Learning rate > 0 of the outer optimizer, or an optax schedule (a function of the round). It acts on the SUM
            of the workers' vectors. None: 0.7 / M, the step of the paper on their mean.
        inner: Inner optimizer of the local steps: a function from the step size to an optax transformation, such as
            `optax.adamw`, or a transformation; see `laqjax.oracles.with_local_steps`.
        bits: Number b of bits per coordinate of a message, from 1 to 16.
        xi: Weights xi_d >= 0 of the last D model steps in the threshold. One number is the sum of D equal weights. An
            array [window] holds the weights themselves, newest step first.
        window: Number D of past rounds whose model steps enter the threshold, at least 1.
        max_silence: Number C of consecutive silent rounds after which a worker must send, at least 1 (None: no limit).
        rescale_short_history: If True, scale the weights by window / max(round, 1) until `window` rounds have passed,
            as the authors' program does. The default is False.
        force_first_upload: If True, every worker sends in round 0. If False, the rule decides in round 0 too, as in the
            authors' program. The default is True.
        padded_window: Length of the buffer for the history, at least `window` (None: `window`). Algorithms with buffers
            of one length share one compiled program, even if their windows differ.
        keep_optimizer_state: If True, a worker keeps the state of its inner optimizer from round to round. If False, it
            starts anew in every round. The default is True.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is SGD with
            Nesterov momentum 0.9, as in the paper.
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
        >>> laqjax.algorithms.lazy_diloco(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local = make_local_steps(oracle, num_local_steps, local_lr, inner, keep_optimizer_state, returns_difference=True)
    lr = 0.7 / num_workers if lr is None else lr
    rule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, grid(bits), rule, make_innovation_memory(oracle), **server)
