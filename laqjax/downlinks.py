"""Downlinks: how the server sends the model to the workers.

Downlinks  FullModelDownlink, CompressedStep, CompressedDirection, CompressedModel
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
    """The model as it is: 32 p bits."""

    def init(self, params):
        return None

    def broadcast(self, server_state, params, direction, optimize, keys):
        step, optimizer = optimize(direction, params)
        return _apply_step(params, step), None, optimizer, jnp.int32(params.size * float_bits(params) // 8)


@register_dataclass
@dataclass(frozen=True)
class CompressedStep:
    """The step is compressed, and what is lost is lost: theta += C(step) (TWO-LAQ, the authors' program)."""

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
    """The direction is compressed, and every worker makes the server's step of it (majority vote)."""

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
    """x += step, and theta += C(x - theta) for the workers (EF21-P, Gruntkowska, Tyurin, Richtarik 2023).

    The server remembers its own model x, and nothing is lost for good.
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
    """The model after an optax update, in the model's dtype."""
    moved: Any = optax.apply_updates(params, step)
    return moved


def _compress_and_count_bits(
    compressor: Compressor, target: Float[Array, " p"], keys: Any
) -> tuple[Float[Array, " p"], Int[Array, ""]]:
    """(what arrives of `compression_target`, bytes of the message)."""
    payload = compressor.encode(target, keys)
    like = jax.ShapeDtypeStruct(target.shape, target.dtype)
    return compressor.decode(payload, like), message_bytes(compressor.wire_fields(payload, like))
