"""Methods that compress the difference between a gradient and the memory that the server holds of it."""

from typing import Any

import optax

from laqjax import compressors
from laqjax._core.round import Algorithm, assemble
from laqjax._core.validation import check_number, oracle_dtype
from laqjax.downlinks import CompressedModel
from laqjax.memories import DashaMemory, MarinaMemory, MomentumMemory, VrMarinaMemory, make_innovation_memory
from laqjax.rules import Always
from laqjax.types import Compressor, Oracle, Sampler


def ef21(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21: h_m += C(g_m - h_m), theta -= lr sum_m h_m, with a contractive compressor C.

    Reference: Richtarik, Sokolov, Fatkhullin 2021.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Contractive compressor C of the uplink, such as `laqjax.compressors.top_k(k)`.
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
        >>> laqjax.algorithms.ef21(oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.top_k(5)).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), make_innovation_memory(oracle), **server)


def ef21_sgdm(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    eta: float = 0.1,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21-SGDM: v_m = (1 - eta) v_m + eta g_m, h_m += C(v_m - h_m), theta -= lr sum_m h_m.

    The momentum starts with the first gradient: v_m = g_m in round 0.

    Reference: Fatkhullin, Tyurin, Richtarik, "Momentum provably improves error feedback!", NeurIPS 2023, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Contractive compressor C of the uplink, such as `laqjax.compressors.top_k(k)`.
        eta: Weight of the newest gradient in the momentum v_m, in (0, 1].
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
        >>> laqjax.algorithms.ef21_sgdm(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.top_k(5)
        ... ).num_workers
        4
    """
    memory = MomentumMemory(check_number("eta", eta, oracle_dtype(oracle), above=0, maximum=1))
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


def ef21_p(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    downlink_compressor: Compressor,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF21-P with EF21: h_m += C(g_m(w) - h_m), x -= lr sum_m h_m, w += C_down(x - w).

    The uplink is EF21, and the downlink is EF21-P. The workers hold the model w. `alg.params(state)` is w, and
    `state.downlink_state` is the server's own model x.

    Reference: Gruntkowska, Tyurin, Richtarik, "EF21-P and friends", ICML 2023.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Contractive compressor C of the uplink, such as `laqjax.compressors.top_k(k)`.
        downlink_compressor: Contractive compressor C_down of the downlink, such as `laqjax.compressors.top_k(k)`.
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
        >>> laqjax.algorithms.ef21_p(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.top_k(5),
        ...     downlink_compressor=laqjax.compressors.top_k(5)
        ... ).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    downlink = CompressedModel(downlink_compressor)
    return assemble(oracle, compressor, Always(), make_innovation_memory(oracle), downlink=downlink, **server)


def ef_bv(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    damping: float,
    scaling: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """EF-BV: d_m = C(g_m - h_m), theta -= lr sum_m (h_m + scaling d_m), h_m += damping d_m.

    EF21 is the case damping = scaling, and DIANA is the case scaling = 1.

    Reference: Condat, Yi, Richtarik, "EF-BV", NeurIPS 2022, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Compressor C of the uplink, contractive or unbiased, from `laqjax.compressors`.
        damping: Factor lambda in (0, 1] of d_m in the update of the memory h_m.
        scaling: Factor nu in (0, 1] of d_m in the direction of the step.
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
        >>> laqjax.algorithms.ef_bv(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.top_k(5), damping=0.5, scaling=0.5
        ... ).num_workers
        4
    """
    memory = make_innovation_memory(oracle, damping=damping, scaling=scaling)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)


def diana(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    damping: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DIANA: d_m = Q(g_m - h_m), theta -= lr sum_m (h_m + d_m), h_m += damping d_m, with an unbiased compressor Q.

    The damping should be at most 1 / (1 + omega), where omega bounds the variance: E ||Q(x) - x||^2 <= omega ||x||^2.

    Reference: Mishchenko et al. 2019.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Unbiased compressor Q of the uplink, such as `laqjax.compressors.qsgd(levels)`.
        damping: Factor lambda in (0, 1] of d_m in the update of the memory h_m.
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
        >>> laqjax.algorithms.diana(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.qsgd(15), damping=0.5
        ... ).num_workers
        4
    """
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), make_innovation_memory(oracle, damping=damping), **server)


def marina(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    probability: float,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """MARINA: h_m += Q(g_m - previous g_m), or h_m = g_m in a full round, theta -= lr sum_m h_m.

    Round 0 is full. A shared Bernoulli variable with the given probability makes a later round full for all workers.
    With a `sampler` the method is VR-MARINA. It computes both gradients on the same examples, and a full round uses the
    gradient of the full shard.

    Reference: Gorbunov, Burlachenko, Li, Richtarik, ICML 2021, Algorithm 1 (VR-MARINA: Algorithm 2).

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Unbiased compressor Q of the uplink, such as `laqjax.compressors.qsgd(levels)`.
        probability: Probability of a full round, in (0, 1].
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
        >>> laqjax.algorithms.marina(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.qsgd(15), probability=0.2
        ... ).num_workers
        4
    """
    switch = compressors.bernoulli_full(compressor, probability)
    memory = MarinaMemory(switch.probability) if sampler is None else VrMarinaMemory(switch.probability)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, switch, Always(), memory, **server)


def dasha(
    oracle: Oracle,
    *,
    lr: Any,
    num_workers: int,
    compressor: Compressor,
    estimate_momentum: float,
    mvr_momentum: float | None = None,
    optimizer: Any = optax.sgd,
    sampler: Sampler | None = None,
) -> Algorithm:
    """DASHA: e_m += Q(h_m - previous h_m - a (e_m - previous h_m)), theta -= lr sum_m e_m, with h_m = g_m.

    The number a is `estimate_momentum`. DASHA needs neither full messages nor a shared Bernoulli variable, unlike
    MARINA. The estimates e_m start at zero, and h_m starts with the gradient of round 0.

    On minibatches the method is DASHA-MVR, h_m = g_m(theta) + (1 - b) (previous h_m - g_m(previous theta)). The number
    b is `mvr_momentum`, and both gradients use the same examples.

    Reference: Tyurin, Richtarik, "DASHA", ICLR 2023, Algorithm 1.

    Args:
        oracle: Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.
        lr: Learning rate > 0, or an optax schedule (a function of the round). The step acts on the SUM of the workers'
            vectors, not on their mean. With SGD, divide a learning rate that is meant for the mean by M.
        num_workers: Number M of workers, at least 1.
        compressor: Unbiased compressor Q of the uplink, such as `laqjax.compressors.qsgd(levels)`.
        estimate_momentum: Momentum a of the estimates, in (0, 1]. The paper uses 1 / (2 omega + 1), where omega bounds
            the variance of the compressor: E ||Q(x) - x||^2 <= omega ||x||^2.
        mvr_momentum: Momentum b of DASHA-MVR, in (0, 1]. A `sampler` requires it. None: h_m is the gradient.
        optimizer: Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`,
            or a transformation. A transformation uses its own learning rate instead of `lr`. The default is plain SGD,
            as in the papers.
        sampler: Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with
            `size` examples per worker and round. None: full gradients.

    Returns:
        The algorithm, a pytree whose leaves are its numbers.

    Raises:
        ValueError: A number is out of its range, `oracle` is not an oracle, the parts cannot be combined, or `sampler`
            is given without `mvr_momentum`.

    Example:
        >>> import laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.algorithms.dasha(
        ...     oracle, lr=0.1, num_workers=4, compressor=laqjax.compressors.qsgd(15), estimate_momentum=0.2
        ... ).num_workers
        4
    """
    if sampler is not None and mvr_momentum is None:
        raise ValueError(
            "mvr_momentum = None with a sampler: must be a number > 0 and <= 1, since DASHA needs its momentum on "
            "minibatches (DASHA-MVR)"
        )
    dtype = oracle_dtype(oracle)
    momentum = None if mvr_momentum is None else check_number("mvr_momentum", mvr_momentum, dtype, above=0, maximum=1)
    memory = DashaMemory(check_number("estimate_momentum", estimate_momentum, dtype, above=0, maximum=1), momentum)
    server = {"lr": lr, "num_workers": num_workers, "optimizer": optimizer, "sampler": sampler}
    return assemble(oracle, compressor, Always(), memory, **server)
