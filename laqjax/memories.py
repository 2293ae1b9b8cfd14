"""Memories: they define which vector a worker compresses, and the state that workers and server keep between rounds.

    NoMemory, Innovation, MarinaMemory, VrMarinaMemory, MomentumMemory, DashaMemory, ErrorFeedback, MomentumCorrection

`laqjax.types.Memory` describes their methods. The classes check nothing; the functions of `laqjax.algorithms` and
`make_innovation_memory` check their numbers.

Notation: g_m is the gradient of worker m, h_m the vector that the server holds for worker m, C the compressor. All
vectors have shape [p].
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from laqjax._core.validation import check_number, oracle_dtype
from laqjax.types import Oracle, register_dataclass, shared_bernoulli

__all__ = [
    "DashaMemory",
    "ErrorFeedback",
    "Innovation",
    "MarinaMemory",
    "MomentumCorrection",
    "MomentumMemory",
    "NoMemory",
    "VrMarinaMemory",
    "make_innovation_memory",
]


# ---- memories ---------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class NoMemory:
    """Memory without state: workers compress the gradient, and the server sums the messages of the round (GD, QSGD)."""

    is_persistent = False

    def init(self, params):
        return None

    def compression_target(self, memory_state, grad, context):
        return grad, None

    def update(self, memory_state, grad, target, decoded):
        return None

    def update_aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class Innovation:
    """Memory that compresses the innovation: the difference between the gradient and the vector h_m.

        d_m = C(g_m - h_m)
        direction = sum_m (h_m + scaling d_m)
        h_m += damping d_m

    h_m begins at zero, and worker and server update it alike. It is the memory state; the server's aggregate is the sum
    of all h_m. LAG, LAQ and EF21 have damping = scaling = 1, and DIANA has scaling = 1. SCAFFOLD has damping = 1, and
    scaling = M / S for S participants. The general case is EF-BV (Condat, Yi, Richtarik 2022).

    Attributes:
        damping: share of d_m that is added to h_m, in (0, 1].
        scaling: share of d_m that enters the direction of the same round, > 0; above 1 in SCAFFOLD alone.
    """

    damping: Float[Array, ""]
    scaling: Float[Array, ""]
    is_persistent = True

    def init(self, params):
        return jnp.zeros_like(params)

    def compression_target(self, memory_state, grad, context):
        return grad - memory_state, memory_state

    def update(self, memory_state, grad, target, decoded):
        return memory_state + self.damping * decoded

    def update_aggregate(self, aggregate, total):
        return aggregate + self.scaling * total, aggregate + self.damping * total


class _EstimateMemory:
    """Base class for memories whose server adds the messages of each round to its aggregate.

    The first entry of a memory state is the estimate, to which the worker adds the messages that it sends. The
    aggregate is the sum of the workers' estimates, and is the direction for the optimizer.
    """

    is_persistent = True

    def init(self, params: Float[Array, " p"]) -> Any:
        """Return zeros [p] for the estimate and for a second vector: the gradient or model of the round before."""
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def update(self, memory_state, grad, target, decoded):
        return memory_state[0] + decoded, *memory_state[1:]

    def update_aggregate(self, aggregate, total):
        return aggregate + total, aggregate + total


@register_dataclass
@dataclass(frozen=True)
class MarinaMemory(_EstimateMemory):
    """Memory of MARINA, which compresses the change of the gradient (Gorbunov et al. 2021, Algorithm 1).

    - h_m = g_m where the shared Bernoulli variable is True, which includes round 0
    - h_m += C(g_m - last g_m) in all other rounds

    The memory state is (h_m, last g_m). Combine it with `compressors.bernoulli_full` of the same probability, which
    sends uncompressed vectors where the shared Bernoulli variable is True.

    Attributes:
        probability: probability that the shared Bernoulli variable is True, in (0, 1].
    """

    probability: Float[Array, ""]

    def compression_target(self, memory_state, grad, context):
        estimate, last = memory_state
        coin = shared_bernoulli(context.keys, self.probability)
        return grad - jnp.where(coin, estimate, last), (estimate, grad)


@register_dataclass
@dataclass(frozen=True)
class VrMarinaMemory(_EstimateMemory):
    """Memory of VR-MARINA, which is MARINA on minibatches (Gorbunov et al. 2021, Algorithm 2).

    - h_m = gradient of the full shard where the shared Bernoulli variable is True, which includes round 0
    - h_m += C(g_m(theta) - g_m(last theta)) in all other rounds, with both gradients on the same examples

    The memory state is (h_m, last theta). Combine it with `compressors.bernoulli_full` of the same probability.

    Attributes:
        probability: probability that the shared Bernoulli variable is True, in (0, 1].
    """

    probability: Float[Array, ""]

    def compression_target(self, memory_state, grad, context):
        estimate, last = memory_state
        coin = shared_bernoulli(context.keys, self.probability)
        full = context.gradient_at(context.params, full=True, when=coin)
        there = context.gradient_at(last, when=~coin)
        return jnp.where(coin, full - estimate, grad - there), (estimate, context.params)


@register_dataclass
@dataclass(frozen=True)
class MomentumMemory(_EstimateMemory):
    """Memory of EF21-SGDM, which compresses the innovation of a momentum average (Fatkhullin et al. 2023).

        v_m = (1 - eta) v_m + eta g_m    (v_m = g_m in the first round)
        h_m += C(v_m - h_m)

    The memory state is (h_m, v_m, whether v_m has a value).

    Attributes:
        eta: weight of the newest gradient, in (0, 1].
    """

    eta: Float[Array, ""]

    def init(self, params):
        return (*super().init(params), jnp.asarray(False))

    def compression_target(self, memory_state, grad, context):
        estimate, average, begun = memory_state
        average = jnp.where(begun, (1 - self.eta) * average + self.eta * grad, grad)
        return average - estimate, (estimate, average, jnp.asarray(True))


@register_dataclass
@dataclass(frozen=True)
class DashaMemory(_EstimateMemory):
    """Memory of DASHA and DASHA-MVR (Tyurin, Richtarik 2022, Algorithm 1).

        estimate_m += C(h_m - last h_m - a (estimate_m - last h_m))

    - DASHA, and the first round of DASHA-MVR: h_m = g_m
    - DASHA-MVR: h_m = g_m + (1 - b)(last h_m - g_m(last theta)), with both gradients on the same examples

    The memory state of DASHA is (estimate_m, h_m). DASHA-MVR adds the last theta, and whether there was one.

    Attributes:
        estimate_momentum: a, in (0, 1].
        mvr_momentum: b, in (0, 1]; None for DASHA.
    """

    estimate_momentum: Float[Array, ""]
    mvr_momentum: Float[Array, ""] | None = None

    def init(self, params):
        past = () if self.mvr_momentum is None else (params, jnp.asarray(False))
        return (*super().init(params), *past)

    def compression_target(self, memory_state, grad, context):
        estimate, last, *past = memory_state
        new = grad
        if self.mvr_momentum is not None:
            correction = (1 - self.mvr_momentum) * (last - context.gradient_at(past[0], when=past[1]))
            new = jnp.where(past[1], grad + correction, grad)
            past = [context.params, jnp.asarray(True)]
        return new - last - self.estimate_momentum * (estimate - last), (estimate, new, *past)


@register_dataclass
@dataclass(frozen=True)
class ErrorFeedback:
    """Memory that adds the compression error to the next gradient (Seide et al. 2014; Karimireddy et al. 2019).

        target_m = decay e_m + g_m
        e_m = target_m - C(target_m)

    The memory state is e_m, which begins at zero. A worker that is not selected keeps it undecayed. The direction is
    the sum of the messages of the round.

    Attributes:
        decay: share of the error that is kept, in [0, 1] (SparseLoCo). None: all of it, without a number.
    """

    decay: Float[Array, ""] | None = None
    is_persistent = False

    def init(self, params):
        return jnp.zeros_like(params)

    def compression_target(self, memory_state, grad, context):
        return (memory_state if self.decay is None else self.decay * memory_state) + grad, memory_state

    def update(self, memory_state, grad, target, decoded):
        return target - decoded

    def update_aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class MomentumCorrection:
    """Memory of DGC, which accumulates a momentum until it is sent (Lin et al. 2018).

        u_m = momentum u_m + g_m
        v_m += u_m
        v_m -= C(v_m), and u_m = 0 in the coordinates that were sent

    The message is C(v_m), and the memory state is (u_m, v_m). The direction is the sum of the messages of the round.

    Attributes:
        momentum: in [0, 1].
    """

    momentum: Float[Array, ""]
    is_persistent = False

    def init(self, params):
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def compression_target(self, memory_state, grad, context):
        velocity = self.momentum * memory_state[0] + grad
        return memory_state[1] + velocity, (velocity, memory_state[1] + velocity)

    def update(self, memory_state, grad, target, decoded):
        return jnp.where(decoded == 0, memory_state[0], 0), target - decoded

    def update_aggregate(self, aggregate, total):
        return total, None


def make_innovation_memory(oracle: Oracle, *, damping: float = 1, scaling: float = 1) -> Innovation:
    """Build an `Innovation` memory from checked numbers.

    Args:
        oracle: the oracle whose dtype the numbers get.
        damping: share of the compressed innovation that is added to h_m, in (0, 1].
        scaling: share of the compressed innovation that enters the direction of the same round, in (0, 1].

    Returns:
        The memory.

    Raises:
        ValueError: a number is out of its range.
    """
    given = {"damping": damping, "scaling": scaling}
    checked = {
        name: check_number(name, value, oracle_dtype(oracle), above=0, maximum=1) for name, value in given.items()
    }
    return Innovation(**checked)
