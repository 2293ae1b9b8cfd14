"""LAG and CLAG: a worker sends an uncompressed or compressed vector, if an upload rule finds its change large enough."""

from typing import Any

import optax

from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import (
    check_smoothness,
    history_from_xi_or_c,
    history_kind,
    make_innovation_rule,
    with_max_silence,
)
from laqjax.compressors import identity
from laqjax.memories import make_innovation_memory
from laqjax.rules import ClagRule, ServerLazyRule
from laqjax.types import Compressor, Oracle, Sampler


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
    """LAG-WK: h_m = g_m iff ||g_m - h_m||^2 >= sum_d xi_d motion_d / (lr^2 M^2), theta -= lr sum_m h_m.

    The worker decides whether it sends. motion_d is the squared norm of the d-th newest model step, see
    `laqjax.rules.History`. LAG does not limit the silence of a worker: `max_silence=None` is the original method.

    Reference: Chen, Giannakis, Sun, Yin, "LAG: lazily aggregated gradient for communication-efficient distributed
    learning", NeurIPS 2018, eq. (15a).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        >>> laqjax.algorithms.lag_wk(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    rule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


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
    """Server-side LAG (LAG-PS): h_m = g_m iff L_m^2 ||theta - theta_hat_m||^2 >= threshold, theta -= lr sum_m h_m.

    The threshold is sum_d xi_d motion_d / (lr^2 M^2), or (c / window) sum_d motion_d if `c` is given. The server
    selects the workers that send. theta_hat_m is the model of worker m's last upload, and motion_d is the squared norm
    of the d-th newest model step. A worker that is not selected neither receives the model nor computes a gradient. The
    downlink bits and the metric "gradients" count that. LAG does not limit the silence of a worker: `max_silence=None`
    is the original method.

    Reference: Chen, Giannakis, Sun, Yin, "LAG: lazily aggregated gradient for communication-efficient distributed
    learning", NeurIPS 2018, eq. (15b).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        smoothness: Smoothness constant L_m >= 0 of every worker's loss f_m, an array [M].
        xi: Weights xi_d >= 0 of the last D model steps in the threshold. One number is the sum of D equal weights. An
            array [window] holds the weights themselves, newest step first. None: 0.8, or unused if `c` is given.
        c: Weight >= 0 of the threshold (c / window) sum_d motion_d of the LASG and CADA papers. `lr` and M do not
            change it. It replaces `xi`, so give one of them only. None: the threshold uses `xi`.
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
        ValueError: A number is out of its range, `oracle` is not an oracle, the parts cannot be combined, or both `xi`
            and `c` are given.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.lag_ps(oracle, lr=0.1, num_workers=4, smoothness=[1.0, 2.0, 1.0, 2.0]).num_workers
        4
    """
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(ServerLazyRule(past, check_smoothness(smoothness, oracle, num_workers)), max_silence, force_first_upload)  # pyright: ignore[reportArgumentType]  # fmt: skip
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


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
    """CLAG: h_m += C(g_m - h_m) iff ||g_m - h_m||^2 > zeta ||g_m - previous g_m||^2, theta -= lr sum_m h_m.

    An upload is a step of EF21. Every worker sends in round 0.

    Reference: Richtarik et al. 2022 (3PC).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Contractive compressor C of the uplink, such as `laqjax.compressors.top_k(k)`.
        zeta: Factor >= 0 of the gradient's change in the rule. A larger value means fewer uploads.
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
        >>> laqjax.algorithms.clag(oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.top_k(5)).num_workers
        4
    """
    rule = ClagRule(check_number("zeta", zeta, oracle_dtype(oracle), minimum=0))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, rule, make_innovation_memory(oracle), **server)
