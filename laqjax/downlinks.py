"""Downlinks: they define what the server broadcasts to the workers, and the model that the workers then have.

    FullModelDownlink, CompressedStep, CompressedDirection, CompressedModel

`broadcast` applies the optimizer. It returns the workers' model [p], the server state of the downlink, the optimizer
state and the bytes of the message.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from laqjax._core.wire_format import float_bits, message_bytes
from laqjax.types import Compressor, register_dataclass

__all__ = ["CompressedDirection", "CompressedModel", "CompressedStep", "FullModelDownlink"]


@register_dataclass
@dataclass(frozen=True)
class FullModelDownlink:
    """Downlink that sends the uncompressed model: 32 p bits in float32."""

    def init(self, params):
        return None

    def broadcast(self, server_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        return _apply_step(params, step), None, optimizer, jnp.int32(params.size * float_bits(params) // 8)


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

    def broadcast(self, server_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        step, size = _compress_and_count_bits(self.compressor, step, keys)
        return _apply_step(params, step), None, optimizer, size


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

    def broadcast(self, server_state, params, direction, optimize, keys):
        direction, size = _compress_and_count_bits(self.compressor, direction, keys)
        step, optimizer = optimize(direction, params)
        return _apply_step(params, step), None, optimizer, size


@register_dataclass
@dataclass(frozen=True)
class CompressedModel:
    """Downlink that compresses the difference of two models (EF21-P, Gruntkowska, Tyurin, Richtarik 2023).

        x += step
        theta += C(x - theta)

    The workers have theta. The server keeps the exact model x [p], so later rounds correct the compression error.

    Attributes:
        compressor: C.
    """

    compressor: Compressor

    def init(self, params):
        return params

    def broadcast(self, server_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, server_state)
        exact = _apply_step(server_state, step)
        change, size = _compress_and_count_bits(self.compressor, exact - params, keys)
        return params + change, exact, optimizer, size


def _apply_step(params: Float[Array, " p"], step: Any) -> Float[Array, " p"]:
    """Apply an optax update to the model and keep the dtype of the model."""
    moved: Any = optax.apply_updates(params, step)
    return moved


def _compress_and_count_bits(
    compressor: Compressor, target: Float[Array, " p"], keys: Any
) -> tuple[Float[Array, " p"], Int[Array, ""]]:
    """Compress `target`, and return the decoded vector [p] and the bytes of the message."""
    payload = compressor.encode(target, keys)
    like = jax.ShapeDtypeStruct(target.shape, target.dtype)
    return compressor.decode(payload, like), message_bytes(compressor.wire_fields(payload, like))
