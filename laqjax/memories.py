"""What is compressed, what a worker and the server remember of it, and how the model comes back down.

Uplink    NoMemory, Innovation, Difference, SameRows, Momentum, ErrorFeedback, CorrectedMomentum
Downlink  Model, StepDown, DirectionDown, ModelDown

`compression_target` gives what is compressed and what the worker remembers if it then stays silent, `update` what it remembers if it
sends. Equations: h_m is what the server holds for worker m, C the compressor, g_m the gradient.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from laqjax._core.validation import check_number, oracle_dtype
from laqjax.types import Oracle, register_dataclass, shared_bernoulli, static_field

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


# ---- uplink -----------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class NoMemory:
    """The gradient itself is compressed, the server uses this round's messages alone (GD, QSGD)."""

    is_persistent = False

    def init(self, params):
        return None

    def compression_target(self, worker_state, grad, context):
        return grad, None

    def update(self, worker_state, grad, target, decoded):
        return None

    def update_aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class Innovation:
    """d_m = C(g_m - h_m), direction = sum_m (h_m + scaling d_m), h_m += damping d_m, on worker and server alike.

    Both 1: LAG, LAQ, EF21. scaling 1: DIANA. Else: EF-BV (Condat, Yi, Richtarik 2022).
    """

    damping: Float[Array, ""]
    scaling: Float[Array, ""]
    snap_when_lossless: bool = static_field(
        default=False
    )  # a coordinate that lost nothing is remembered as g_m, not as h_m + (g_m - h_m)
    is_persistent = True

    def init(self, params):
        return jnp.zeros_like(params)

    def compression_target(self, worker_state, grad, context):
        return grad - worker_state, worker_state

    def update(self, worker_state, grad, target, decoded):
        moved = worker_state + self.damping * decoded
        return jnp.where(decoded == target, grad, moved) if self.snap_when_lossless else moved

    def update_aggregate(self, aggregate, total):
        return aggregate + self.scaling * total, aggregate + self.damping * total


class _EstimateMemory:
    """What the memories share whose server adds up changes as they come."""

    is_persistent = True

    def init(self, params: Float[Array, " p"]) -> Any:
        """(estimate, gradient or model of the round before), zeros."""
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def update_aggregate(self, aggregate, total):
        return aggregate + total, aggregate + total


@register_dataclass
@dataclass(frozen=True)
class MarinaMemory(_EstimateMemory):
    """h_m += C(g_m - last g_m), or h_m = g_m in the rounds of the shared coin (MARINA, Gorbunov et al. 2021, Algorithm 1).

    The coin always falls in round 0. A worker remembers (h_m, last g_m).
    """

    probability: Float[Array, ""]

    def compression_target(self, worker_state, grad, context):
        estimate, last = worker_state
        coin = shared_bernoulli(context.keys, self.probability)
        return grad - jnp.where(coin, estimate, last), (estimate, grad)

    def update(self, worker_state, grad, target, decoded):
        return worker_state[0] + decoded, worker_state[1]


@register_dataclass
@dataclass(frozen=True)
class VrMarinaMemory(_EstimateMemory):
    """MARINA on minibatches (VR-MARINA, Gorbunov et al. 2021, Algorithm 2).

    h_m += C(g_m(theta; rows) - g_m(last theta; rows)) on the same rows, or h_m = the gradient of the full shard in the
    rounds of the shared coin, round 0 among them. A worker remembers (h_m, last theta).
    """

    probability: Float[Array, ""]

    def compression_target(self, worker_state, grad, context):
        estimate, last = worker_state
        coin = shared_bernoulli(context.keys, self.probability)
        full = context.gradient_at(context.params, full=True, when=coin)
        there = context.gradient_at(last, when=~coin)
        return jnp.where(coin, full - estimate, grad - there), (estimate, context.params)

    def update(self, worker_state, grad, target, decoded):
        return worker_state[0] + decoded, worker_state[1]


@register_dataclass
@dataclass(frozen=True)
class MomentumMemory(_EstimateMemory):
    """v_m = (1 - eta) v_m + eta g_m, v_m = g_m at first; h_m += C(v_m - h_m) (EF21-SGDM, Fatkhullin et al. 2023).

    A worker remembers (h_m, v_m, whether it has a v_m).
    """

    eta: Float[Array, ""]

    def init(self, params):
        return (*super().init(params), jnp.asarray(False))

    def compression_target(self, worker_state, grad, context):
        estimate, average, begun = worker_state
        average = jnp.where(begun, (1 - self.eta) * average + self.eta * grad, grad)
        return average - estimate, (estimate, average, jnp.asarray(True))

    def update(self, worker_state, grad, target, decoded):
        return worker_state[0] + decoded, *worker_state[1:]


@register_dataclass
@dataclass(frozen=True)
class DashaMemory(_EstimateMemory):
    """h_m = g_m, or h_m = g_m + (1 - b)(last h_m - g_m(last theta; same rows)) with `mvr_momentum` b (DASHA-MVR).

    estimate_m += C(h_m - last h_m - a (estimate_m - last h_m)) (Tyurin, Richtarik 2022, Algorithm 1). A worker remembers
    (estimate_m, h_m), and with a momentum the last theta and whether there was one.
    """

    estimate_momentum: Float[Array, ""]
    mvr_momentum: Float[Array, ""] | None = None

    def init(self, params):
        past = () if self.mvr_momentum is None else (params, jnp.asarray(False))
        return (*super().init(params), *past)

    def compression_target(self, worker_state, grad, context):
        estimate, last, *past = worker_state
        new = grad
        if self.mvr_momentum is not None:
            correction = (1 - self.mvr_momentum) * (last - context.gradient_at(past[0], when=past[1]))
            new = jnp.where(past[1], grad + correction, grad)
            past = [context.params, jnp.asarray(True)]
        return new - last - self.estimate_momentum * (estimate - last), (estimate, new, *past)

    def update(self, worker_state, grad, target, decoded):
        return worker_state[0] + decoded, *worker_state[1:]


@register_dataclass
@dataclass(frozen=True)
class ErrorFeedback:
    """What compression lost is added to the next gradient (Seide et al. 2014; Karimireddy et al. 2019)."""

    is_persistent = False

    def init(self, params):
        return jnp.zeros_like(params)

    def compression_target(self, worker_state, grad, context):
        return worker_state + grad, worker_state

    def update(self, worker_state, grad, target, decoded):
        return target - decoded

    def update_aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class MomentumCorrection:
    """u_m = momentum u_m + g_m, v_m += u_m; C(v_m) is sent, u_m and v_m begin anew there (DGC, Lin et al. 2018)."""

    momentum: Float[Array, ""]
    is_persistent = False

    def init(self, params):
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def compression_target(self, worker_state, grad, context):
        velocity = self.momentum * worker_state[0] + grad
        return worker_state[1] + velocity, (velocity, worker_state[1] + velocity)

    def update(self, worker_state, grad, target, decoded):
        return jnp.where(decoded == 0, worker_state[0], 0), target - decoded

    def update_aggregate(self, aggregate, total):
        return total, None


def make_innovation_memory(
    oracle: Oracle, *, damping: float = 1, scaling: float = 1, snap_when_lossless: bool = False
) -> Innovation:
    """An `Innovation` memory with checked numbers, both in (0, 1]."""
    given = {"damping": damping, "scaling": scaling}
    checked = {
        name: check_number(name, value, oracle_dtype(oracle), above=0, maximum=1) for name, value in given.items()
    }
    return Innovation(**checked, snap_when_lossless=snap_when_lossless)
