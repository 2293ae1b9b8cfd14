"""Baselines without a lazy rule: gradient descent, quantized or stochastic, and incremental aggregated gradient."""

from typing import Any

import optax

from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import oracle_dtype
from laqjax.algorithms._shared import check_smoothness
from laqjax.compressors import grid, identity
from laqjax.memories import NoMemory, make_innovation_memory
from laqjax.rules import Always, Cyclic, sample_one_worker
from laqjax.types import Oracle, Sampler


def gd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Gradient descent: theta -= lr sum_m g_m.

    Every worker sends its gradient in every round: 32 p bits, or 64 p bits in float64.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        >>> laqjax.algorithms.gd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Always(), NoMemory(), **server)


def qgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    bits: int = 4,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """QGD, quantized gradient descent: h_m += Q_b(g_m - h_m), theta -= lr sum_m h_m.

    Every worker sends in every round. It is `laq` without the lazy upload rule, and a baseline of the LAQ paper (Sun,
    Chen, Giannakis, Yang, NeurIPS 2019).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        bits: Number b of bits per coordinate of a message, from 1 to 16.
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
        >>> laqjax.algorithms.qgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, grid(bits), Always(), make_innovation_memory(oracle), **server)


def iag_cyclic(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Cyclic IAG, incremental aggregated gradient: h_m = g_m for m = round mod M, theta -= lr sum_m h_m.

    The server selects one worker in each round, in a fixed order.

    Reference: Blatt, Hero, Gauchman 2007.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        >>> laqjax.algorithms.iag_cyclic(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), Cyclic(), make_innovation_memory(oracle), **server)


def iag_random(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    smoothness: Any,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """Random IAG: h_m = g_m for one worker m, drawn with a probability proportional to L_m, theta -= lr sum_m h_m.

    The server selects one worker in each round. The method is Num-IAG in the LAG paper (Chen, Giannakis, Sun, Yin,
    NeurIPS 2018).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        smoothness: Smoothness constant L_m >= 0 of every worker's loss f_m, an array [M]. At least one of them must be
            positive.
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
        >>> laqjax.algorithms.iag_random(oracle, lr=0.1, num_workers=4, smoothness=[1.0, 2.0, 1.0, 2.0]).num_workers
        4
    """
    rule = sample_one_worker(check_smoothness(smoothness, oracle, num_workers), oracle_dtype(oracle))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, identity(), rule, make_innovation_memory(oracle), **server)


def sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """SGD, stochastic gradient descent: theta -= lr sum_m g_m, with g_m on a minibatch.

    It is `gd` with a `sampler`. Without a sampler it is `gd` itself.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
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
        >>> laqjax.algorithms.sgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    return gd(oracle, lr=lr, num_workers=num_workers, optimizer=optimizer, sampler=sampler)
