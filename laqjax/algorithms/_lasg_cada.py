"""LASG and CADA: lazy methods for minibatches, whose rules compare two gradients on the same examples."""

from typing import Any

import numpy as np
import optax

from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number
from laqjax.algorithms._lag import lag_ps
from laqjax.algorithms._shared import history_from_xi_or_c, history_kind, make_lazy_rule, with_max_silence
from laqjax.compressors import identity
from laqjax.memories import make_innovation_memory
from laqjax.optimizers import amsgrad
from laqjax.rules import SnapshotChange, StaleModelChange
from laqjax.types import Oracle, Sampler


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
    """LASG-WK1: h_m = g_m iff ||d_m - last sent d_m||^2 >= threshold, with d_m = g_m(theta) - g_m(snapshot).

    Both gradients use the same examples. The snapshot is the model of the last round that is a multiple of `period`.
    The step is theta -= lr sum_m h_m.

    The threshold is sum_d xi_d motion_d / (lr^2 M^2), or (c / window) sum_d motion_d if `c` is given. motion_d is the
    squared norm of the d-th newest model step, see `laqjax.rules.History`.

    In the notation of the paper, `period` = D, `max_silence` = D - 1 (its staleness tau counts from 1), `window` =
    d_max and `c` = c.

    Reference: eq. (7) of Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed learning",
    2020.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        period: Number of rounds from one snapshot of the model to the next, at least 1.
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
        >>> laqjax.algorithms.lasg_wk1(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    change = SnapshotChange(check_number("period", period, np.int32, minimum=1))
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(make_lazy_rule(past, change), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


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
    """LASG-WK2: h_m = g_m iff ||g_m(theta) - g_m(theta_hat_m)||^2 >= threshold, theta -= lr sum_m h_m.

    theta_hat_m is the model of worker m's last upload, and both gradients use the same examples.

    The threshold is sum_d xi_d motion_d / (lr^2 M^2), or (c / window) sum_d motion_d if `c` is given. motion_d is the
    squared norm of the d-th newest model step, see `laqjax.rules.History`.

    In the notation of the paper, `max_silence` = D - 1, `window` = d_max and `c` = c.

    Reference: eq. (10) of Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed
    learning", 2020.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        >>> laqjax.algorithms.lasg_wk2(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    past = history_from_xi_or_c(
        xi, c, window, oracle, padded_window, rescale_short_history, history_kind(lr, optimizer)
    )
    rule = with_max_silence(make_lazy_rule(past, StaleModelChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


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
    """Server-side LASG (LASG-PS): h_m = g_m iff L_m^2 ||theta - theta_hat_m||^2 >= threshold, theta -= lr sum_m h_m.

    It is `lag_ps` on minibatches, with the same threshold.

    In the notation of the paper, `max_silence` = D - 1 and `window` = d_max.

    Reference: Chen, Sun, Yin, "Communication-adaptive stochastic gradient methods for distributed learning", 2020.

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
        >>> laqjax.algorithms.lasg_ps(oracle, lr=0.1, num_workers=4, smoothness=[1.0, 2.0, 1.0, 2.0]).num_workers
        4
    """
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
    """CADA1: h_m = g_m iff ||d_m - last sent d_m||^2 >= (c / window) sum_d motion_d, theta by AMSGrad.

    AMSGrad gets sum_m h_m. The change d_m = g_m(theta) - g_m(snapshot) is that of `lasg_wk1`. motion_d is the squared
    norm of the d-th newest model step.

    The paper's single D is `period` = D and `max_silence` = D - 1, and its d_max is `window`.

    Reference: Chen, Guo, Sun, Yin, AISTATS 2021, eq. (7).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        c: Weight >= 0 of the threshold (c / window) sum_d motion_d of the LASG and CADA papers. `lr` and M do not
            change it.
        period: Number of rounds from one snapshot of the model to the next, at least 1.
        window: Number D of past rounds whose model steps enter the threshold, at least 1.
        max_silence: Number C of consecutive silent rounds after which a worker must send, at least 1 (None: no limit).
        rescale_short_history: If True, scale the weights by window / max(round, 1) until `window` rounds have passed,
            as the authors' program does. The default is False.
        force_first_upload: If True, every worker sends in round 0. If False, the rule decides in round 0 too, as in the
            authors' program. The default is True.
        padded_window: Length of the buffer for the history, at least `window` (None: `window`). Algorithms with buffers
            of one length share one compiled program, even if their windows differ.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is AMSGrad
            without bias correction, as in the paper.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.cada1(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    change = SnapshotChange(check_number("period", period, np.int32, minimum=1))
    past = history_from_xi_or_c(None, c, window, oracle, padded_window, rescale_short_history, "absolute")
    rule = with_max_silence(make_lazy_rule(past, change), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


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
    """CADA2: h_m = g_m iff ||g_m(theta) - g_m(theta_hat_m)||^2 >= (c / window) sum_d motion_d, theta by AMSGrad.

    AMSGrad gets sum_m h_m. theta_hat_m is the model of worker m's last upload. Both gradients use the same examples, as
    in `lasg_wk2`. motion_d is the squared norm of the d-th newest model step. With c = 0 the method is AMSGrad.

    In the notation of the paper, `max_silence` = D - 1 and `window` = d_max.

    Reference: Chen, Guo, Sun, Yin, AISTATS 2021, eq. (10).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        c: Weight >= 0 of the threshold (c / window) sum_d motion_d of the LASG and CADA papers. `lr` and M do not
            change it.
        window: Number D of past rounds whose model steps enter the threshold, at least 1.
        max_silence: Number C of consecutive silent rounds after which a worker must send, at least 1 (None: no limit).
        rescale_short_history: If True, scale the weights by window / max(round, 1) until `window` rounds have passed,
            as the authors' program does. The default is False.
        force_first_upload: If True, every worker sends in round 0. If False, the rule decides in round 0 too, as in the
            authors' program. The default is True.
        padded_window: Length of the buffer for the history, at least `window` (None: `window`). Algorithms with buffers
            of one length share one compiled program, even if their windows differ.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is AMSGrad
            without bias correction, as in the paper.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, or the parts cannot be combined.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.cada2(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    past = history_from_xi_or_c(None, c, window, oracle, padded_window, rescale_short_history, "absolute")
    rule = with_max_silence(make_lazy_rule(past, StaleModelChange()), max_silence, force_first_upload)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)
