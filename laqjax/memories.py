"""What is compressed, what a worker and the server remember of it, and how the model comes back down.

Uplink    NoMemory, Innovation, Difference, SameRows, Momentum, ErrorFeedback, CorrectedMomentum
Downlink  Model, StepDown, DirectionDown, ModelDown

`target` gives what is compressed and what the worker remembers if it then stays silent, `update` what it remembers if it
sends. Equations: h_m is what the server holds for worker m, C the compressor, g_m the gradient.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from laqjax.types import Compressor, register_dataclass, shared_bernoulli, static
from laqjax.wire import float_bits, message_bytes

# ---- uplink -----------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class NoMemory:
    """The gradient itself is compressed, the server uses this round's messages alone (GD, QSGD)."""

    persists = False

    def init(self, params):
        return None

    def target(self, own, grad, now):
        return grad, None

    def update(self, own, grad, target, decoded):
        return None

    def aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class Innovation:
    """d_m = C(g_m - h_m), direction = sum_m (h_m + scaling d_m), h_m += damping d_m, on worker and server alike.

    Both 1: LAG, LAQ, EF21. scaling 1: DIANA. Else: EF-BV (Condat, Yi, Richtarik 2022).
    """

    damping: Float[Array, ""]
    scaling: Float[Array, ""]
    exact: bool = static(default=False)  # a coordinate that lost nothing is remembered as g_m, not as h_m + (g_m - h_m)
    persists = True

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, own, grad, now):
        return grad - own, own

    def update(self, own, grad, target, decoded):
        moved = own + self.damping * decoded
        return jnp.where(decoded == target, grad, moved) if self.exact else moved

    def aggregate(self, aggregate, total):
        return aggregate + self.scaling * total, aggregate + self.damping * total


class Estimates:
    """What the memories share whose server adds up changes as they come."""

    persists = True

    def init(self, params: Float[Array, " p"]) -> Any:
        """(estimate, gradient or model of the round before), zeros."""
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def aggregate(self, aggregate, total):
        return aggregate + total, aggregate + total


@register_dataclass
@dataclass(frozen=True)
class Difference(Estimates):
    """h_m += C(g_m - last g_m), or h_m = g_m in the rounds of the shared coin (MARINA, Gorbunov et al. 2021, Algorithm 1).

    The coin always falls in round 0. A worker remembers (h_m, last g_m).
    """

    probability: Float[Array, ""]

    def target(self, own, grad, now):
        estimate, last = own
        coin = shared_bernoulli(now.keys, self.probability)
        return grad - jnp.where(coin, estimate, last), (estimate, grad)

    def update(self, own, grad, target, decoded):
        return own[0] + decoded, own[1]


@register_dataclass
@dataclass(frozen=True)
class SameRows(Estimates):
    """MARINA on minibatches (VR-MARINA, Gorbunov et al. 2021, Algorithm 2).

    h_m += C(g_m(theta; rows) - g_m(last theta; rows)) on the same rows, or h_m = the gradient of the full shard in the
    rounds of the shared coin, round 0 among them. A worker remembers (h_m, last theta).
    """

    probability: Float[Array, ""]

    def target(self, own, grad, now):
        estimate, last = own
        coin = shared_bernoulli(now.keys, self.probability)
        full = now.gradient_at(now.params, full=True, when=coin)
        there = now.gradient_at(last, when=~coin)
        return jnp.where(coin, full - estimate, grad - there), (estimate, now.params)

    def update(self, own, grad, target, decoded):
        return own[0] + decoded, own[1]


@register_dataclass
@dataclass(frozen=True)
class Momentum(Estimates):
    """v_m = (1 - eta) v_m + eta g_m, v_m = g_m at first; h_m += C(v_m - h_m) (EF21-SGDM, Fatkhullin et al. 2023).

    A worker remembers (h_m, v_m, whether it has a v_m).
    """

    eta: Float[Array, ""]

    def init(self, params):
        return (*super().init(params), jnp.asarray(False))

    def target(self, own, grad, now):
        estimate, average, begun = own
        average = jnp.where(begun, (1 - self.eta) * average + self.eta * grad, grad)
        return average - estimate, (estimate, average, jnp.asarray(True))

    def update(self, own, grad, target, decoded):
        return own[0] + decoded, *own[1:]


@register_dataclass
@dataclass(frozen=True)
class Dasha(Estimates):
    """h_m = g_m, or h_m = g_m + (1 - b)(last h_m - g_m(last theta; same rows)) with `momentum` b (DASHA-MVR).

    estimate_m += C(h_m - last h_m - a (estimate_m - last h_m)) (Tyurin, Richtarik 2022, Algorithm 1). A worker remembers
    (estimate_m, h_m), and with a momentum the last theta and whether there was one.
    """

    a: Float[Array, ""]
    momentum: Float[Array, ""] | None = None

    def init(self, params):
        past = () if self.momentum is None else (params, jnp.asarray(False))
        return (*super().init(params), *past)

    def target(self, own, grad, now):
        estimate, last, *past = own
        new = grad
        if self.momentum is not None:
            correction = (1 - self.momentum) * (last - now.gradient_at(past[0], when=past[1]))
            new = jnp.where(past[1], grad + correction, grad)
            past = [now.params, jnp.asarray(True)]
        return new - last - self.a * (estimate - last), (estimate, new, *past)

    def update(self, own, grad, target, decoded):
        return own[0] + decoded, *own[1:]


@register_dataclass
@dataclass(frozen=True)
class ErrorFeedback:
    """What compression lost is added to the next gradient (Seide et al. 2014; Karimireddy et al. 2019)."""

    persists = False

    def init(self, params):
        return jnp.zeros_like(params)

    def target(self, own, grad, now):
        return own + grad, own

    def update(self, own, grad, target, decoded):
        return target - decoded

    def aggregate(self, aggregate, total):
        return total, None


@register_dataclass
@dataclass(frozen=True)
class CorrectedMomentum:
    """u_m = momentum u_m + g_m, v_m += u_m; C(v_m) is sent, u_m and v_m begin anew there (DGC, Lin et al. 2018)."""

    momentum: Float[Array, ""]
    persists = False

    def init(self, params):
        return jnp.zeros_like(params), jnp.zeros_like(params)

    def target(self, own, grad, now):
        velocity = self.momentum * own[0] + grad
        return own[1] + velocity, (velocity, own[1] + velocity)

    def update(self, own, grad, target, decoded):
        return jnp.where(decoded == 0, own[0], 0), target - decoded

    def aggregate(self, aggregate, total):
        return total, None


# ---- downlink ---------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Model:
    """The model as it is: 32 p bits."""

    def init(self, params):
        return None

    def send(self, own, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        return apply(params, step), None, optimizer, jnp.int32(params.size * float_bits(params) // 8)


@register_dataclass
@dataclass(frozen=True)
class StepDown:
    """The step is compressed, and what is lost is lost: theta += C(step) (TWO-LAQ, the authors' program)."""

    compressor: Compressor

    def init(self, params):
        return None

    def send(self, own, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        step, size = transmitted(self.compressor, step, keys)
        return apply(params, step), None, optimizer, size


@register_dataclass
@dataclass(frozen=True)
class DirectionDown:
    """The direction is compressed, and every worker makes the server's step of it (majority vote)."""

    compressor: Compressor

    def init(self, params):
        return None

    def send(self, own, params, direction, optimize, keys):
        direction, size = transmitted(self.compressor, direction, keys)
        step, optimizer = optimize(direction, params)
        return apply(params, step), None, optimizer, size


@register_dataclass
@dataclass(frozen=True)
class ModelDown:
    """x += step, and theta += C(x - theta) for the workers (EF21-P, Gruntkowska, Tyurin, Richtarik 2023).

    The server remembers its own model x, and nothing is lost for good.
    """

    compressor: Compressor

    def init(self, params):
        return params

    def send(self, own, params, direction, optimize, keys):
        step, optimizer = optimize(direction, own)
        exact = apply(own, step)
        change, size = transmitted(self.compressor, exact - params, keys)
        return params + change, exact, optimizer, size


def apply(params: Float[Array, " p"], step: Any) -> Float[Array, " p"]:
    """The model after an optax update, in the model's dtype."""
    moved: Any = optax.apply_updates(params, step)
    return moved


def transmitted(
    compressor: Compressor, target: Float[Array, " p"], keys: Any
) -> tuple[Float[Array, " p"], Int[Array, ""]]:
    """(what arrives of `target`, bytes of the message)."""
    payload = compressor.encode(target, keys)
    like = jax.ShapeDtypeStruct(target.shape, target.dtype)
    return compressor.decode(payload, like), message_bytes(compressor.wire(payload, like))
