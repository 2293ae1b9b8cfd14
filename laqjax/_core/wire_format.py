"""Sizes, serialization and parsing of messages.

A compressor's `wire_fields(payload, like)` yields the parts of a message as `WireField`s. Counting, writing and reading
all use that one list. Therefore the reported size of a message is the size of its bytes.

A field may depend on the fields before it, because a reader fills the payload field by field. Bits are rounded up to a
whole byte once per message. `message_bytes` can be traced by JAX; `to_bytes` and `from_bytes` run on the host.
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

    The result is in bytes because the bits of a message of 2^26 float32 numbers exceed int32.

    Args:
        fields: what `compressor.wire_fields(payload, like)` yields.

    Returns:
        The number of bytes, an int32 scalar.
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
    """Serialize a message.

    Args:
        compressor: the compressor that encoded the message.
        payload: what `compressor.encode` returned.
        like: an array or struct with the shape [p] and dtype of the target.

    Returns:
        The bytes of the message; their number is `message_bytes(compressor.wire_fields(payload, like))`.
    """
    stream, filled = np.zeros(1, np.uint8), 0  # filled: bits of the last byte already used
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
    """Read a message and decode it, bit-identical to `compressor.decode(payload, like)`.

    Args:
        compressor: the compressor that encoded the message.
        data: the bytes, as `to_bytes` returned them.
        like: an array or struct with the shape [p] and dtype of the target.

    Returns:
        The decoded vector [p].

    Raises:
        ValueError: `data` is not a message of the compressor: it is too long or too short, or it has bits set after
            the last field.
    """
    return compressor.decode(read_payload(compressor, data, like), like)


def decode_message(compressor: Compressor, payload: Any, like: Any) -> Float[Array, " p"]:
    """Decode a message inside a compiled program.

    XLA may keep more digits of a 16-bit float than its type has, where a loop computes and reads it. The vector of a
    message is rounded here, so that all programs add and store the same numbers.
    """
    decoded = compressor.decode(payload, like)
    if decoded.dtype.itemsize >= 4:
        return decoded
    info, wide = jnp.finfo(decoded.dtype), decoded.astype(jnp.float32)
    rounded = jax.lax.reduce_precision(wide, info.nexp, info.nmant)
    if decoded.dtype == jnp.float16:  # `reduce_precision` flushes its subnormals to zero
        step = float(info.smallest_subnormal)
        rounded = jnp.where(jnp.abs(wide) < float(info.tiny), jnp.round(wide / step) * step, rounded)
    return rounded.astype(decoded.dtype)


def read_payload(compressor: Compressor, data: bytes, like: Any) -> dict[str, Any]:
    """Read the payload of a message; see `from_bytes`."""
    stream, at, payload = np.append(np.frombuffer(data, np.uint8), np.uint8(0)), 0, {}
    for field in compressor.wire_fields(payload, like):
        values = np.zeros(field.like.size, field.like.dtype)
        there, width = _sent_mask(field), int(field.bits)
        count, pattern = values[there].size, _wire_dtype(field)
        if width > 64 or at + width * count > 8 * len(data):
            raise ValueError(
                f"a message of {len(data)} bytes: must be longer, since its field {field.name!r} needs {width} bits "
                f"for each of {count} numbers from bit {at} on"
            )
        if count * width:
            last = -(-(at + width * count) // 8)
            piece = stream[at // 8 : last + 1]
            piece = piece[:-1] >> at % 8 | piece[1:] << 8 - at % 8 if at % 8 else piece[:-1]
            values[there] = _unpack_bits(piece, count, width, pattern).view(values.dtype)
        at += count * width
        field.payload[field.name] = jnp.asarray(values.reshape(field.like.shape))
    if -(-at // 8) != len(data) or (at % 8 and data[-1] >> at % 8):
        raise ValueError(
            f"a message of {len(data)} bytes: must be {-(-at // 8)} bytes, with zeros after its last field (bit {at})"
        )
    return payload


# Layout of a field of n numbers with 8 k + r bits each: first the k low bytes of every number, then the upper r bits of
# every number, with eight numbers in r bytes. The least significant bit comes first. The upper bits of eight numbers
# are packed at once, in the bytes of a 64-bit word.


def _pack_bits(values: np.ndarray, width: int) -> np.ndarray:
    """Pack numbers of `width` bits each into bytes, with zero bits after the last number."""
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
    for size in (8, 16, 32):  # join neighboring lanes of 8, then 16, then 32 bits
        lower, bits = _lane_mask(rest, size), size // 8 * rest
        words = words & lower | words >> np.uint64(size - bits) & lower << np.uint64(bits)
    upper = words.view(np.uint8).reshape(-1, 8)[:, :rest].reshape(-1)
    return np.concatenate([low, upper[: -(-values.size * rest // 8)]])


def _unpack_bits(data: np.ndarray, count: int, width: int, pattern: np.dtype) -> np.ndarray:
    """Unpack `count` numbers of `width` bits as dtype `pattern`, inverting `_pack_bits`; ignore bits after the last."""
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
    """Return the mask of the payload, size // 8 * rest bits, in the lower one of each pair of lanes of `size` bits."""
    return np.uint64(sum((2 ** (size // 8 * rest) - 1) << place for place in range(0, 64, 2 * size)))


def _sent_mask(field: WireField) -> Any:
    """Return the index, a slice or a boolean mask, of the numbers of a field that are sent."""
    return slice(None) if field.mask is None else np.asarray(field.mask)


def _wire_dtype(field: WireField) -> np.dtype:
    """Return the dtype whose bits are sent: an unsigned integer for floats of full width, else the field's dtype."""
    dtype = np.dtype(field.like.dtype)
    is_raw_float = jnp.issubdtype(dtype, jnp.floating) and int(field.bits) == 8 * dtype.itemsize
    return np.dtype(f"u{dtype.itemsize}") if is_raw_float else dtype


# ---- helpers for `wire_fields` ---------------------------------------------------------------------------------


def float_bits(like: Any) -> int:
    """Return the number of bits of one float of the dtype of `like`."""
    return 8 * like.dtype.itemsize


def scalar_struct(dtype: Any) -> jax.ShapeDtypeStruct:
    """Return the struct of a scalar of this dtype."""
    return jax.ShapeDtypeStruct((), dtype)


def bool_struct(like: Any) -> jax.ShapeDtypeStruct:
    """Return the struct of one boolean for each coordinate of `like`."""
    return jax.ShapeDtypeStruct(like.shape, np.bool_)


def index_bits(size: int) -> int:
    """Return the number of bits of an index into `size` coordinates: ceil(log2(size)), at least 1."""
    return max((size - 1).bit_length(), 1)
