"""Methods in which a worker takes several plain gradient steps between two messages."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.algorithms._shared import (
    averaging_lr,
    make_innovation_rule,
    make_local_steps,
    make_participation,
)
from laqjax.compressors import grid, identity
from laqjax.downlinks import FullModelDownlink
from laqjax.memories import Innovation, NoMemory, make_innovation_memory
from laqjax.rules import partial_participation
from laqjax.types import Oracle, Sampler, UploadRule


def fedavg(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
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
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
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
    local = make_local_steps(oracle, num_local_steps, local_lr)
    count, rule = make_participation(num_workers, num_participants)
    lr = averaging_lr(local, count) if lr is None else lr
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, identity(), rule, NoMemory(), **server)


def fedpaq(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
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
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
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
    local = make_local_steps(oracle, num_local_steps, local_lr)
    count, rule = make_participation(num_workers, num_participants)
    lr = averaging_lr(local, count) if lr is None else lr
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, compressors.qsgd(levels), rule, NoMemory(), **server)


def fedlaq(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
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
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
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
    local = make_local_steps(oracle, num_local_steps, local_lr)
    lr = averaging_lr(local, num_workers) if lr is None else lr
    rule: UploadRule = make_innovation_rule(
        oracle, lr, optimizer, xi, window, max_silence, rescale_short_history, force_first_upload, padded_window
    )
    if num_participants is not None:
        rule = partial_participation(rule, num_workers, count=num_participants)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(local, grid(bits), rule, make_innovation_memory(oracle), **server)


def scaffold(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = None,
    num_participants: int | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """SCAFFOLD: FedAvg whose local steps are y -= local_lr (grad f_m(y) - c_m + c), with c the mean of all c_m.

    The new c_m is the mean u_m of the worker's local gradients, as in option II of the paper. A worker sends one
    vector, u_m - c_m. The server adds it to its sum of all c_m, and theta -= lr (sum_m c_m + (M / S) sum (u_m - c_m)).
    Here c_m are the vectors before the round, and the second sum is over the S participants.

    Down, one broadcast of the model is counted if all workers participate, the server is plain SGD and `lr` is a
    number: the workers then compute c from two models in a row. Otherwise the model and c are counted.

    Reference: Karimireddy, Kale, Mohri, Reddi, Stich, Suresh, ICML 2020, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). The step acts on the SUM of
            the workers' vectors. None: num_local_steps * local_lr / M, which makes the new model the average of the
            participants' local models.
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
        >>> laqjax.algorithms.scaffold(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    local = make_local_steps(oracle, num_local_steps, local_lr)
    lr = averaging_lr(local, num_workers) if lr is None else lr
    count, rule = make_participation(num_workers, num_participants)
    damping, scaling = np.asarray([1, num_workers / count], oracle_dtype(oracle))
    is_model_enough = num_participants is None and optimizer is optax.sgd and not callable(lr)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    downlink = FullModelDownlink(1 if is_model_enough else 2)
    local = dataclasses.replace(local, has_control_variates=True)
    return assemble(local, identity(), rule, Innovation(damping, scaling), downlink=downlink, **server)


def fedadam(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = 0.1,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    num_participants: int | None = None,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedAdam: FedAvg whose server makes Adam steps: theta -= lr m / (sqrt(v) + tau).

    d is the mean of theta - theta_m over the participants, with the local models theta_m of `fedavg`. The moments are
    m = b1 m + (1 - b1) d and v = b2 v + (1 - b2) d^2. They begin at 0 and tau^2, and have no bias correction, unlike
    those of `optax.adam`. tau has the unit of d, a change of the model.

    Reference: Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithm 2.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). It acts on m / (sqrt(v) +
            tau), whatever M is.
        b1: Decay of the first moment m, in [0, 1].
        b2: Decay of the second moment v, in [0, 1].
        tau: Term > 0 beside the root of v, in units of a change of the model.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
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
        >>> laqjax.algorithms.fedadam(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    numbers = {"b1": b1, "b2": b2, "tau": tau}
    return _fedopt(_fedadam, oracle, num_workers, num_local_steps, local_lr, lr, numbers, num_participants, sampler)


def fedyogi(
    oracle: Oracle,
    *,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any = 0.1,
    b1: float = 0.9,
    b2: float = 0.99,
    tau: float = 1e-3,
    num_participants: int | None = None,
    sampler: Sampler | None = None,
) -> Algorithm:
    """FedYogi: `fedadam` with v -= (1 - b2) d^2 sign(v - d^2), which changes v by at most (1 - b2) d^2.

    `optax.yogi` has another start of v and bias correction.

    Reference: Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithm 2.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        num_workers: Number M of workers, at least 1.
        num_local_steps: Number of local gradient steps per round, at least 1.
        local_lr: Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps +
            t.
        lr: Learning rate > 0 of the server, or an optax schedule (a function of the round). It acts on m / (sqrt(v) +
            tau), whatever M is.
        b1: Decay of the first moment m, in [0, 1].
        b2: Decay of the second moment v, in [0, 1].
        tau: Term > 0 beside the root of v, in units of a change of the model.
        num_participants: Number of workers that participate in a round, from 1 to `num_workers`. They are drawn without
            replacement. None: all workers.
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
        >>> laqjax.algorithms.fedyogi(oracle, num_workers=4, num_local_steps=2, local_lr=0.1).num_workers
        4
    """
    numbers = {"b1": b1, "b2": b2, "tau": tau}
    return _fedopt(_fedyogi, oracle, num_workers, num_local_steps, local_lr, lr, numbers, num_participants, sampler)


def _fedopt(
    server: Any,
    oracle: Oracle,
    num_workers: int,
    num_local_steps: int,
    local_lr: Any,
    lr: Any,
    numbers: dict[str, Any],
    num_participants: int | None,
    sampler: Sampler | None,
) -> Algorithm:
    """Assemble FedAdam or FedYogi.

    Raises:
        ValueError: a number is out of its range, or `oracle` is not an oracle.
    """
    local = make_local_steps(oracle, num_local_steps, local_lr, returns_difference=True)
    count, rule = make_participation(num_workers, num_participants)
    dtype = oracle_dtype(oracle)
    checked = {name: check_number(name, numbers[name], dtype, minimum=0, maximum=1) for name in ("b1", "b2")}
    checked["tau"] = check_number("tau", numbers["tau"], dtype, above=0)
    optimizer = Partial(server, **checked, count=np.asarray(count, dtype))
    return assemble(
        local, identity(), rule, NoMemory(), lr=lr, num_workers=num_workers, optimizer=optimizer, sampler=sampler
    )


def _fedadam(lr: Any, **numbers: Any) -> optax.GradientTransformation:
    """Build the server optimizer of FedAdam; see `_adaptive_server`."""
    return _adaptive_server(lr, lambda v, square, b2: b2 * v + (1 - b2) * square, **numbers)


def _fedyogi(lr: Any, **numbers: Any) -> optax.GradientTransformation:
    """Build the server optimizer of FedYogi; see `_adaptive_server`."""
    return _adaptive_server(lr, lambda v, square, b2: v - (1 - b2) * square * jnp.sign(v - square), **numbers)


def _adaptive_server(lr: Any, next_v: Any, b1: Any, b2: Any, tau: Any, count: Any) -> optax.GradientTransformation:
    """Build an optimizer with moments m and v of the mean change, without bias correction.

    Args:
        lr: learning rate.
        next_v: function (v, squared mean change, b2) -> next v.
        b1: decay of m.
        b2: decay of v.
        tau: term beside the root; v begins at tau^2.
        count: number of participants, by which the sum over the workers is divided.
    """

    def update(total: Any, state: Any, params: Any = None) -> Any:
        m, v = state
        mean = total / count
        m, v = b1 * m + (1 - b1) * mean, next_v(v, mean**2, b2)
        return -lr * m / (jnp.sqrt(v) + tau), (m, v)

    return optax.GradientTransformation(lambda params: (jnp.zeros_like(params), jnp.full_like(params, tau**2)), update)  # pyright: ignore[reportArgumentType]
