"""Encode, decode and bill a vector; pack its codes into real bytes.

`encode(target, key) -> Message`, `decode(message, like) -> [p]`, both pure and traced. `pack(message) -> bytes` runs on
the host: the length of what it gives, times 8, is `message.bits`. No compressor bills what it does not send.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Int, Integer, UInt8, UInt16

from laqjax.core import Message, number


@register_dataclass
@dataclass(frozen=True)
class Identity:
    """The vector as it is: 32 p bits (64 p in float64)."""

    def encode(self, target, key):
        return Message({"values": target}, jnp.int32(target.size * target.dtype.itemsize * 8))

    def decode(self, message, like):
        return message.payload["values"]

    def pack(self, message):
        return np.asarray(message.payload["values"]).tobytes()

    def unpack(self, data, like):
        return Message({"values": jnp.asarray(np.frombuffer(data, like.dtype))}, jnp.int32(8 * len(data)))


@register_dataclass
@dataclass(frozen=True)
class Grid:
    """The paper's b-bit uniform grid of 2^b points over [-radius, radius] (LAQ, eq. (5)-(6)): 32 + b p bits.

    codes = floor(target / step + 2^(b-1)), decoded = step (codes - (2^b - 1) / 2), |target - decoded| <= step / 2 with
    step = 2 radius / (2^b - 1). It is the paper's floor((target + radius) / step + 1/2) rewritten: for an exactly zero
    coordinate that form is a tie which float32 decides at random, this one always gives 2^(b-1).
    """

    bits: Int[Array, ""]

    def encode(self, target, key):
        radius = jnp.max(jnp.abs(target))
        step = self._step(radius)
        middle = jnp.left_shift(1, self.bits - 1).astype(target.dtype)
        # a zero radius has no grid: its codes are arbitrary and decode to zero
        codes = jnp.floor(target / jnp.where(step > 0, step, 1) + middle)
        bits = 8 * radius.dtype.itemsize + self.bits * target.size
        return Message({"radius": radius, "codes": codes}, (bits + 7) // 8 * 8)

    def decode(self, message, like):
        return self._step(message.payload["radius"]) * (message.payload["codes"] - self._levels(like.dtype) / 2)

    def pack(self, message):
        codes = np.asarray(message.payload["codes"]).astype(np.uint16)
        return np.asarray(message.payload["radius"]).tobytes() + np.asarray(pack(codes, int(self.bits))).tobytes()

    def unpack(self, data, like):
        head = like.dtype.itemsize
        codes = unpack(np.frombuffer(data[head:], np.uint8), int(self.bits), like.size)
        payload = {"radius": jnp.asarray(np.frombuffer(data[:head], like.dtype)[0]), "codes": codes.astype(like.dtype)}
        return Message(payload, jnp.int32(8 * len(data)))

    def _levels(self, dtype):
        return (jnp.left_shift(1, self.bits) - 1).astype(dtype)

    def _step(self, radius):
        return 2 * radius / self._levels(radius.dtype)


identity = Identity


def grid(bits: int) -> Grid:
    """A `Grid` of whole `bits` in 1..16; raises ValueError otherwise."""
    return Grid(number("bits", bits, np.int32, least=1, most=16))


def pack(codes: Integer[Any, " p"], bits: int) -> UInt8[Array, " bytes"]:
    """Codes in 0 .. 2^bits - 1 as ceil(p bits / 8) bytes, for any bits in 1..16. Bit planes, least significant first:
    whole planes move as vectors, where interleaved codes would move bit by bit.
    """
    planes = jnp.right_shift(jnp.asarray(codes)[None], jnp.arange(bits, dtype=codes.dtype)[:, None]) & 1
    return jnp.packbits(planes.astype(jnp.uint8).reshape(-1))


def unpack(data: UInt8[Any, " bytes"], bits: int, size: int) -> UInt16[Array, " p"]:
    """The inverse of `pack`: `size` codes as uint16."""
    planes = jnp.unpackbits(jnp.asarray(data), count=bits * size).reshape(bits, size).astype(jnp.uint16)
    return jnp.sum(jnp.left_shift(planes, jnp.arange(bits, dtype=jnp.uint16)[:, None]), axis=0, dtype=jnp.uint16)
