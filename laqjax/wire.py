"""Bits and bytes of a message.

A compressor's `wire(payload, like)` yields what travels as `Field`s: the bill of a message, its bytes and how they are
read all come from that one list, so nothing is billed that is not sent. A field may depend on those before it: a reader
fills the payload on the way. Bits are rounded up to a byte once per message. `to_bytes` and `from_bytes` run on the host.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax.types import Compressor, Field


def message_bits(fields: Iterable[Field]) -> Int[Array, ""]:
    """Bits of a message on the wire: its fields, rounded up to whole bytes once."""
    total = jnp.int32(0)
    for piece in fields:
        count = piece.like.size if piece.kept is None else jnp.sum(piece.kept, dtype=jnp.int32)
        total += jnp.asarray(count, jnp.int32) * jnp.asarray(piece.bits, jnp.int32)
    return (total + 7) // 8 * 8


def to_bytes(compressor: Compressor, payload: Any, like: Any) -> bytes:
    """The message as it would travel; 8 x its length is what `message_bits` counted."""
    planes = []
    for field in compressor.wire(payload, like):
        values = np.asarray(field.payload[field.name], field.like.dtype).reshape(-1)
        whole = values[_transmitted(field)].view(_pattern(field)).astype(np.uint64)
        # bit planes, the least significant first: whole planes move as vectors, interleaved codes would move bit by bit
        places = np.arange(int(field.bits), dtype=np.uint64)[:, None]
        planes.append((whole[None] >> places & np.uint64(1)).astype(np.uint8).reshape(-1))
    return np.packbits(np.concatenate(planes)).tobytes()


def from_bytes(compressor: Compressor, data: bytes, like: Any) -> Float[Array, " p"]:
    """What the receiver decodes: bit for bit `compressor.decode(payload, like)`."""
    bits, payload = np.unpackbits(np.frombuffer(data, np.uint8)), {}
    for field in compressor.wire(payload, like):
        values = np.zeros(field.like.size, field.like.dtype)
        there, width = _transmitted(field), int(field.bits)
        count = values[there].size
        planes, bits = bits[: width * count].reshape(width, count), bits[width * count :]
        whole = np.bitwise_or.reduce(planes.astype(np.uint64) << np.arange(width, dtype=np.uint64)[:, None], axis=0)
        values[there] = whole.astype(_pattern(field)).view(field.like.dtype)
        field.payload[field.name] = jnp.asarray(values.reshape(field.like.shape))
    return compressor.decode(payload, like)


def _transmitted(field: Field) -> Any:
    """Which of a field's numbers travel."""
    return slice(None) if field.kept is None else np.asarray(field.kept)


def _pattern(field: Field) -> np.dtype:
    """Floats of their full width travel as bit patterns, everything else as whole numbers."""
    dtype = np.dtype(field.like.dtype)
    full = jnp.issubdtype(dtype, jnp.floating) and int(field.bits) == 8 * dtype.itemsize
    return np.dtype(f"u{dtype.itemsize}") if full else dtype


# ---- pieces of messages ----------------------------------------------------------------------------------------


def float_bits(like: Any) -> int:
    """Bits of one float of this dtype."""
    return 8 * like.dtype.itemsize


def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    """A single number."""
    return jax.ShapeDtypeStruct((), dtype)


def flags(like: Any) -> jax.ShapeDtypeStruct:
    """A yes or no for each coordinate."""
    return jax.ShapeDtypeStruct(like.shape, np.bool_)


def index_bits(size: int) -> int:
    """Bits of an index into `size` coordinates."""
    return max((size - 1).bit_length(), 1)
