"""Bits and bytes of a message.

A compressor's `wire_fields(payload, like)` yields what travels as `WireField`s: the bill of a message, its bytes and how they are
read all come from that one list, so nothing is billed that is not sent. A field may depend on those before it: a reader
fills the payload on the way. Bits are rounded up to a byte once per message. `to_bytes` and `from_bytes` run on the host.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax.types import Compressor, WireField


def message_bytes(fields: Iterable[WireField]) -> Int[Array, ""]:
    """Count the bytes of a message on the wire: the bits of its fields, rounded up to whole bytes once.

    Counted in bytes, because the bits of a message of 2^26 float32 numbers exceed int32.
    """
    whole, rest = jnp.int32(0), jnp.int32(0)
    for piece in fields:
        count = piece.like.size if piece.mask is None else jnp.sum(piece.mask, dtype=jnp.int32)
        count, bits = jnp.asarray(count, jnp.int32), jnp.asarray(piece.bits, jnp.int32)
        odd = count % 8 * bits
        whole += count // 8 * bits + odd // 8
        rest += odd % 8
    return whole + (rest + 7) // 8


def to_bytes(compressor: Compressor, payload: Any, like: Any) -> bytes:
    """The message as it would travel; its length is what `serialized_size` counted."""
    stream, filled = np.zeros(1, np.uint8), 0  # filled: bits of the last byte that are taken
    for field in compressor.wire_fields(payload, like):
        values = np.asarray(field.payload[field.name], field.like.dtype).reshape(-1)
        values, width = values[_sent_mask(field)].view(_wire_dtype(field)), int(field.bits)
        if not values.size * width:
            continue
        piece = _pack_bits(values, width)
        if filled:
            piece = np.append(piece, np.uint8(0))
            carried = piece >> (8 - filled)
            piece <<= filled
            piece[1:] |= carried[:-1]
            piece[0] |= stream[-1]
        filled += values.size * width
        stream, filled = np.concatenate([stream[:-1], piece[: -(-filled // 8)]]), filled % 8
        if not filled:
            stream = np.append(stream, np.uint8(0))
    return (stream if filled else stream[:-1]).tobytes()


def from_bytes(compressor: Compressor, data: bytes, like: Any) -> Float[Array, " p"]:
    """What the receiver decodes: bit for bit `compressor.decode(payload, like)`.

    Raises:
        ValueError: these bytes are no message of the compressor: too many, too few, or bits set behind the last field.
    """
    stream, at, payload = np.append(np.frombuffer(data, np.uint8), np.uint8(0)), 0, {}
    for field in compressor.wire_fields(payload, like):
        values = np.zeros(field.like.size, field.like.dtype)
        there, width = _sent_mask(field), int(field.bits)
        count, pattern = values[there].size, _wire_dtype(field)
        if width > 64 or at + width * count > 8 * len(data):
            raise ValueError(
                f"a message of {len(data)} bytes: expected {width} bits for each of {count} numbers of its field "
                f"{field.name!r}, from bit {at} on"
            )
        if count * width:
            last = -(-(at + width * count) // 8)
            piece = stream[at // 8 : last + 1]
            piece = piece[:-1] >> at % 8 | piece[1:] << 8 - at % 8 if at % 8 else piece[:-1]
            values[there] = _unpack_bits(piece, count, width, pattern).view(
                field.like.dtype if _is_raw_float(field) else pattern
            )
        at += count * width
        field.payload[field.name] = jnp.asarray(values.reshape(field.like.shape))
    if -(-at // 8) != len(data) or (at % 8 and data[-1] >> at % 8):
        raise ValueError(
            f"a message of {len(data)} bytes: expected {-(-at // 8)}, and no bits set behind its last field (of {at} bits)"
        )
    return compressor.decode(payload, like)


# The stream of a field of n numbers of 8 k + r bits: their k low bytes, number after number, then their upper r bits, eight
# numbers in r bytes; the least significant bit first. Eight numbers move at once, in the bytes of a 64-bit word.


def _pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """The bytes of numbers of `width` bits each; the bits behind the last one are zero."""
    whole, rest = divmod(width, 8)
    if not whole and values.dtype != np.bool_:
        values = values.astype(np.uint8)
    elif values.dtype.kind == "f":
        values = values.astype(np.uint32 if width <= 32 else np.uint64)
    each = values.view(np.uint8).reshape(values.size, -1)
    low = each[:, :whole].reshape(-1)
    if not rest:
        return low.copy()
    words = np.zeros(-(-values.size // 8), "<u8")
    words.view(np.uint8)[: values.size] = each[:, whole]
    for size in (8, 16, 32):  # pairs of bytes, of pairs, of fours
        lower, bits = _lane_mask(rest, size), size // 8 * rest
        words = words & lower | words >> np.uint64(size - bits) & lower << np.uint64(bits)
    upper = words.view(np.uint8).reshape(-1, 8)[:, :rest].reshape(-1)
    return np.concatenate([low, upper[: -(-values.size * rest // 8)]])


def _unpack_bits(data: np.ndarray, count: int, width: int, pattern: np.dtype) -> np.ndarray:
    """The inverse of `_pack_bits`, of the type `pattern`; bits behind the last number are not looked at."""
    whole, rest = divmod(width, 8)
    kind = np.dtype(f"u{next(size for size in (1, 2, 4, 8) if 8 * size >= width)}")
    values = np.zeros(count, kind)
    each = values.view(np.uint8).reshape(count, kind.itemsize)
    each[:, :whole] = data[: count * whole].reshape(count, whole)
    if rest:
        upper = data[count * whole :]
        words = np.zeros(-(-count // 8), "<u8")
        padded = np.zeros(len(words) * rest, np.uint8)
        padded[: -(-count * rest // 8)] = upper[: -(-count * rest // 8)]
        words.view(np.uint8).reshape(-1, 8)[:, :rest] = padded.reshape(-1, rest)
        for size in (32, 16, 8):
            lower, bits = _lane_mask(rest, size), size // 8 * rest
            words = words & lower | words << np.uint64(size - bits) & lower << np.uint64(size)
        each[:, whole] = words.view(np.uint8)[:count]
    return values.astype(pattern, copy=False)


def _lane_mask(rest: int, size: int) -> np.uint64:
    """Of each pair of `size` bits in a 64-bit word, what the lower one carries where a byte carries `rest` bits."""
    return np.uint64(sum((2 ** (size // 8 * rest) - 1) << place for place in range(0, 64, 2 * size)))


def _sent_mask(field: WireField) -> Any:
    """Which of a field's numbers travel."""
    return slice(None) if field.mask is None else np.asarray(field.mask)


def _is_raw_float(field: WireField) -> bool:
    """Whether it is of floats of their full width, which travel as bit patterns; everything else as whole numbers."""
    dtype = np.dtype(field.like.dtype)
    return jnp.issubdtype(dtype, jnp.floating) and int(field.bits) == 8 * dtype.itemsize


def _wire_dtype(field: WireField) -> np.dtype:
    """The type in which its numbers travel."""
    dtype = np.dtype(field.like.dtype)
    return np.dtype(f"u{dtype.itemsize}") if _is_raw_float(field) else dtype


# ---- pieces of messages ----------------------------------------------------------------------------------------


def float_bits(like: Any) -> int:
    """Bits of one float of this dtype."""
    return 8 * like.dtype.itemsize


def scalar_struct(dtype: Any) -> jax.ShapeDtypeStruct:
    """A single number."""
    return jax.ShapeDtypeStruct((), dtype)


def bool_struct(like: Any) -> jax.ShapeDtypeStruct:
    """A yes or no for each coordinate."""
    return jax.ShapeDtypeStruct(like.shape, np.bool_)


def index_bits(size: int) -> int:
    """Bits of an index into `size` coordinates."""
    return max((size - 1).bit_length(), 1)
