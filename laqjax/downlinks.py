"""Downlinks: they define what the server broadcasts to the workers, and the model that the workers then have.

    FullModelDownlink, CompressedStep, CompressedDirection, CompressedModel

`broadcast` applies the optimizer. It returns a `laqjax.types.Broadcast`: the workers' model [p], the states of downlink
and optimizer, and the payload and bytes of the message.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from laqjax._core.wire_format import decode_message, float_bits, message_bytes
from laqjax.types import Broadcast, Compressor, register_dataclass, static_field

__all__ = ["CompressedDirection", "CompressedModel", "CompressedStep", "FullModelDownlink"]


@register_dataclass
@dataclass(frozen=True)
class FullModelDownlink:
    """Downlink that sends the uncompressed model: 32 p bits in float32 for each vector.

    Attributes:
        num_vectors: vectors [p] that travel; 2 if the workers also need the aggregate of the server; static.
    """

    num_vectors: int = static_field(default=1)

    def init(self, params):
        return None

    def broadcast(self, downlink_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        size = jnp.int32(self.num_vectors * params.size * float_bits(params) // 8)
        return Broadcast(_apply_step(params, step), None, optimizer, payload=None, bytes=size)


@register_dataclass
@dataclass(frozen=True)
class CompressedStep:
    """Downlink that compresses the step of the optimizer: theta += C(step) (TWO-LAQ, the authors' program).

    The compression error is not corrected in later rounds.

    Attributes:
        compressor: C.
    """

    compressor: Compressor

    def init(self, params):
        return None

    def broadcast(self, downlink_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        payload, step, size = _compress(self.compressor, step, keys)
        return Broadcast(_apply_step(params, step), None, optimizer, payload, size)


@register_dataclass
@dataclass(frozen=True)
class CompressedDirection:
    """Downlink that compresses the direction; every worker then makes the optimizer's step from it (majority vote).

    Attributes:
        compressor: the compressor of the direction.
    """

    compressor: Compressor

    def init(self, params):
        return None

    def broadcast(self, downlink_state, params, direction, optimize, keys):
        payload, direction, size = _compress(self.compressor, direction, keys)
        step, optimizer = optimize(direction, params)
        return Broadcast(_apply_step(params, step), None, optimizer, payload, size)


@register_dataclass
@dataclass(frozen=True)
class CompressedModel:
    """Downlink that compresses the difference of two models (EF21-P, Gruntkowska, Tyurin, Richtarik 2023).

        x += step
        w += C(x - w)

    The workers have w. The server keeps the exact model x [p], so later rounds correct the compression error.

    Attributes:
        compressor: C.
    """

    compressor: Compressor

    def init(self, params):
        return params

    def broadcast(self, downlink_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, downlink_state)
        exact = _apply_step(downlink_state, step)
        payload, change, size = _compress(self.compressor, exact - params, keys)
        return Broadcast(params + change, exact, optimizer, payload, size)


def _apply_step(params: Float[Array, " p"], step: Any) -> Float[Array, " p"]:
    """Apply an optax update to the model and keep the dtype of the model."""
    moved: Any = optax.apply_updates(params, step)
    return moved


def _compress(
    compressor: Compressor, target: Float[Array, " p"], keys: Any
) -> tuple[Any, Float[Array, " p"], Int[Array, ""]]:
    """Compress `target`, and return the payload, the decoded vector [p] and the bytes of the message."""
    payload = compressor.encode(target, keys)
    decoded = decode_message(compressor, payload, target)
    return payload, decoded, message_bytes(compressor.wire_fields(payload, target))
