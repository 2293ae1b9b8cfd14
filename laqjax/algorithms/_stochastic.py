"""Methods that compress stochastic gradients, with or without error feedback."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.downlinks import CompressedDirection
from laqjax.memories import ErrorFeedback, MomentumCorrection, NoMemory
from laqjax.rules import Always
from laqjax.types import Oracle, Sampler


def qsgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    levels: int = 15,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """QSGD: theta -= lr sum_m Q(g_m), with Q random rounding to `levels` parts of the norm.

    Reference: Alistarh et al. 2017.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        levels: Number of levels beside zero into which the norm is divided, from 1 to 65535.
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
        >>> laqjax.algorithms.qsgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.qsgd(levels), Always(), NoMemory(), **server)


def terngrad(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """TernGrad: theta -= lr sum_m Q(g_m), with Q random rounding to {-1, 0, 1} max|g_m|.

    Reference: Wen et al. 2017.

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
        >>> laqjax.algorithms.terngrad(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.ternary(), Always(), NoMemory(), **server)


def ssgd(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    density: float = 0.05,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """SSGD, sparsified SGD: theta -= lr sum_m Q(g_m), with Q an unbiased random choice of coordinates.

    The probabilities of keeping a coordinate minimize the variance.

    Reference: Wangni et al. 2018.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        density: Expected share of the coordinates that a message keeps, in (0, 1].
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
        >>> laqjax.algorithms.ssgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.optimal_sparsifier(density), Always(), NoMemory(), **server)


def sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """SignSGD with majority vote: theta -= lr sign(sum_m sign(g_m)).

    A message has p bits, on the uplink and on the downlink. One bit cannot represent zero. `laqjax.compressors.Sign`
    explains what replaces a zero on the uplink, and a tied vote on the downlink.

    Reference: Bernstein et al. 2018.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SIGN of the SUM over
            workers, whatever M is.
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
        >>> laqjax.algorithms.sign_sgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    vote = compressors.sign(scaled=False)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, vote, Always(), NoMemory(), downlink=CompressedDirection(vote), **server)


def ef_sign_sgd(
    oracle: Oracle, *, lr: Any, num_workers: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """EF-signSGD: d_m = C(g_m + e_m), theta -= lr sum_m d_m, e_m += g_m - d_m, with C the scaled sign.

    The error e_m is what compression lost. It is kept in units of the gradient, which equals the paper's method for a
    constant `lr`.

    Reference: Karimireddy et al. 2019.

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
        >>> laqjax.algorithms.ef_sign_sgd(oracle, lr=0.1, num_workers=4).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.sign(), Always(), ErrorFeedback(), **server)


def topk_ef(
    oracle: Oracle, *, lr: Any, num_workers: int, k: int, optimizer: Any = optax.sgd, sampler: Sampler | None = None
) -> Algorithm:
    """Top-k with error feedback: d_m = top_k(g_m + e_m), theta -= lr sum_m d_m, e_m += g_m - d_m.

    The error e_m is what compression lost. It is kept in units of the gradient, as in `ef_sign_sgd`.

    Reference: Stich, Cordonnier, Jaggi 2018, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        k: Number of coordinates in a message, at least 1. Another number compiles another program.
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
        >>> laqjax.algorithms.topk_ef(oracle, lr=0.1, num_workers=4, k=5).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), ErrorFeedback(), **server)


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
    """DGC, deep gradient compression: u_m = momentum u_m + g_m, v_m += u_m, theta -= lr sum_m top_k(v_m).

    The coordinates that were sent are set to zero in u_m and v_m. Momentum correction and factor masking are those of
    the paper; gradient clipping and warm-up are left out.

    Reference: Lin, Han, Mao, Wang, Dally, ICLR 2018, Algorithm 1 and section 3.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        k: Number of coordinates in a message, at least 1. Another number compiles another program.
        momentum: Momentum factor of u_m, in [0, 1].
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
        >>> laqjax.algorithms.dgc(oracle, lr=0.1, num_workers=4, k=5).num_workers
        4
    """
    memory = MomentumCorrection(check_number("momentum", momentum, oracle_dtype(oracle), minimum=0, maximum=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressors.top_k(k), Always(), memory, **server)
