"""LAQ and its variants: a worker sends quantized changes, if an upload rule finds its change large enough."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax.algorithms._shared import (
    make_innovation_rule,
)
from laqjax.compressors import grid
from laqjax.downlinks import CompressedStep
from laqjax.memories import make_innovation_memory
from laqjax.types import Oracle, Sampler


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
    """LAQ: h_m += Q_b(g_m - h_m) for the workers that send, theta -= lr sum_m h_m.

    Worker m sends iff ||Q_b(g_m - h_m)||^2 >= sum_d xi_d motion_d / (lr^2 M^2) + 3 (error_m + last_error_m), eq. (7a).
    It also sends after `max_silence` silent rounds, eq. (7b). motion_d is the squared norm of the d-th newest model
    step. error_m is the squared quantization error now, and last_error_m is that of the last upload. See
    `laqjax.rules.LazyRule`.

    If the server's optimizer is not SGD, or if `lr` is a schedule, motion_d is the squared norm of the direction that
    the optimizer received. The factor 1 / lr^2 is then left out, see `laqjax.rules.History`.

    Reference: Sun, Chen, Giannakis, Yang, "Communication-efficient distributed learning via lazily aggregated quantized
    gradients", NeurIPS 2019, Algorithm 2.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.laq(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    rule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, grid(bits), rule, make_innovation_memory(oracle), **server)


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
    """TWO-LAQ: LAQ with a quantized model step on the downlink too, theta += Q_b(-lr sum_m h_m).

    The server keeps no memory of the quantization error of its step. Uplink and upload rule are those of `laq`.

    Reference: the LAQ authors' program.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        bits: Number b of bits per coordinate of a message, from 1 to 16.
        downlink_bits: Number of bits per coordinate of the model step on the downlink, from 1 to 16 (None: `bits`).
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
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.two_laq(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    rule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    downlink = CompressedStep(grid(bits if downlink_bits is None else downlink_bits))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler, "downlink": downlink}
    return assemble(oracle, grid(bits), rule, make_innovation_memory(oracle), **server)


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
    """Adaptive LAQ: h_m += Q_b(g_m - h_m) with b chosen for each upload, theta -= lr sum_m h_m.

    The upload rule is that of `laq`. The formula for b is that of AQUILA (Zhao et al. 2023), clipped to `min_bits` and
    `max_bits`; the upload rule of AQUILA is not used. A message contains its b, and the bit counts include it. See
    `laqjax.compressors.AdaptiveGrid`.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        min_bits: Smallest number of bits per coordinate that may be chosen, at least 1.
        max_bits: Largest number of bits per coordinate that may be chosen, at most 16.
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
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.laq_adaptive(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    rule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(
        oracle, compressors.adaptive_grid(min_bits, max_bits), rule, make_innovation_memory(oracle), **server
    )


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
    """SLAQ: LAQ on minibatches, h_m += Q_b(g_m - h_m) for the workers that send, theta -= lr sum_m h_m.

    It is `laq` with a `sampler` and with 3 bits by default. The upload rule is that of the paper; the authors' script
    uses another one.

    Reference: Sun, Chen, Giannakis, Yang, NeurIPS 2019.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.slaq(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    knobs = {
        "xi": xi,
        "window": window,
        "max_silence": max_silence,
        "rescale_short_history": rescale_short_history,
        "force_first_upload": force_first_upload,
    }
    return laq(oracle, bits=bits, padded_window=padded_window, **knobs, **server)
