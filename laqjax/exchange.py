"""How the messages of workers on many devices become one sum on every device: an argument of `Algorithm.step`.

exchange   moves to each device, per round with an upload     sum                        for
---------  -------------------------------------------------  -------------------------  ---------------------------
messages   the packed messages of all workers: M p b / 8      in worker order,           the default: few workers a
           bytes, by one all-gather                           bit for bit one device's   device
chunked    its part of every message, M p b / (8 devices)     in worker order,           many workers, large models:
           bytes, by an all-to-all; then the sums, 4 p bytes  bit for bit one device's   cost per device O(p)
sums       partial sums in floats, about 8 p bytes, by an     in the order of devices,   M far above the number of
           all-reduce                                         not one device's bits      devices

All three begin with an all-gather of a few words (loss, sent, bits of each worker), and skip the rest, as a whole, in
rounds in which nobody sends. Shapes are static: a round with one sender moves the slots of all, and a message of fields
whose width is known in the run only (a b that is chosen for each message, a coin, a bitmap) moves as what it decodes to.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from laqjax.checks import suggest
from laqjax.types import Compressor, Exchange, Keys, Shards, Upload

WORD = 32


@dataclass(frozen=True)
class Sums:
    """Partial sums by an all-reduce, and what all exchanges share: which workers are here, and the gathering of facts."""

    axis: str
    points: str | None = None  # the axis of a sweep's points, mapped over: they skip together
    adds = True

    def workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        """(number of the first, how many) of this device's workers; the numbers from num_workers on are padding."""
        count = shards.weight.shape[0]
        slots = count * lax.axis_size(self.axis)
        if not 0 <= slots - num_workers < slots or slots < num_workers:
            raise ValueError(
                f"shards of {count} workers on each of {slots // count} devices for num_workers = {num_workers}: expected "
                f"at least {num_workers} together"
            )
        return count * lax.axis_index(self.axis).astype(jnp.int32), count

    def message(self, alg: Any, upload: Upload) -> Any:
        """What one worker contributes."""
        return upload.decoded

    def gather(self, facts: Any, num_workers: int) -> Any:
        """[m, ...] of this device's workers as [M, ...] of all, by one all-gather."""
        leaves, tree = jax.tree.flatten(facts)
        words = [to_words(leaf) for leaf in leaves]
        every = lax.all_gather(jnp.concatenate(words, axis=1), self.axis, tiled=True)[:num_workers]
        parts = jnp.split(every, np.cumsum([part.shape[1] for part in words])[:-1], axis=1)
        return jax.tree.unflatten(tree, [of_words(part, leaf) for part, leaf in zip(parts, leaves, strict=True)])

    def total(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """The sum of what all workers sent; nothing moves where nobody sent."""
        some = jnp.any(sent)
        if self.points is not None:
            some = lax.psum(some.astype(jnp.int32), self.points) > 0
        return lax.cond(some, lambda: self.moved(alg, messages, sent, like), lambda: jnp.zeros_like(like))

    def moved(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """`total` in a round in which somebody sent."""
        return lax.psum(messages, self.axis)

    def received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each: of a ring, which adds and hands on both halves."""
        return 2 * alg.oracle.size * alg.oracle.dtype.itemsize * (devices - 1) // devices


@dataclass(frozen=True)
class Messages(Sums):
    """The packed messages by an all-gather; every device decodes and adds all of them, in worker order."""

    widths: tuple[int, ...] | None = None  # bits of each field; None: messages move as what they decode to
    adds = False

    def message(self, alg: Any, upload: Upload) -> tuple[Bool[Array, ""], list[Array]]:
        """Whether it is sent, and its numbers."""
        return upload.sent, numbers_of(alg.compressor, upload, self.widths)

    def words(self, numbers: list[Array]) -> UInt32[Array, " words"]:
        """What travels of a message."""
        return pack_message(numbers, self.widths)

    def packed(self, messages: tuple[Bool[Array, " m"], list[Array]]) -> UInt32[Array, "m words"]:
        """Of the workers here, zeros where nothing was sent."""

        def one(message: Any) -> Array:
            sent, numbers = message
            if automatic_axes():
                return self.words(numbers)
            return lax.cond(sent, lambda: self.words(numbers), lambda: jnp.zeros_like(self.words(numbers)))

        return lax.map(one, messages)

    def moved(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        every = lax.all_gather(self.packed(messages), self.axis, tiled=True)[: sent.shape[0]]
        return added(lambda words: unpack_message(alg.compressor, words, like, self.widths), every, sent, like)

    def received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each."""
        return 4 * message_words(alg, alg.oracle.size, self.widths) * (devices - 1)


@dataclass(frozen=True)
class Chunked(Messages):
    """Each device gets its part of every message by an all-to-all, decodes and adds it; the parts of the sum are gathered."""

    def words(self, numbers: list[Array]) -> UInt32[Array, "devices words"]:
        """What travels of a message to each device."""
        devices = lax.axis_size(self.axis)

        def cut(values: Array) -> Array:
            if values.ndim == 0:
                return jnp.broadcast_to(values, (devices,))
            length = self.length(values.shape[0])
            return jnp.pad(values, (0, devices * length - values.shape[0])).reshape(devices, length)

        return jax.vmap(super().words)([cut(values) for values in numbers])

    def length(self, size: int) -> int:
        """Coordinates of a part: whole words of them, whatever b."""
        return WORD * math.ceil(size / (WORD * lax.axis_size(self.axis)))

    def moved(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        packed = self.packed(messages)
        mine = lax.all_to_all(packed, self.axis, split_axis=1, concat_axis=0, tiled=True)[: sent.shape[0], 0]
        part = jax.ShapeDtypeStruct((self.length(like.shape[0]),), like.dtype)
        total = added(lambda words: unpack_message(alg.compressor, words, part, self.widths), mine, sent, part)
        return lax.all_gather(total, self.axis, tiled=True)[: like.shape[0]]

    def received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each."""
        length = WORD * math.ceil(alg.oracle.size / (WORD * devices))
        words = message_words(alg, length, self.widths)
        return (4 * words + length * alg.oracle.dtype.itemsize) * (devices - 1)


def sums(alg: Any, axis: str = "workers") -> Sums:
    """Partial sums; any algorithm."""
    return Sums(axis)


def messages(alg: Any, axis: str = "workers") -> Messages:
    """Packed messages.

    Args:
        alg: an algorithm with concrete numbers: a message's shape is compiled in, so b must be known. Of a `stack`, all
            points must have one b.
        axis: of the mesh.

    Raises:
        ValueError: the points of a stack differ in the width of their messages.
    """
    return Messages(axis, widths=widths(alg))


def chunked(alg: Any, axis: str = "workers") -> Chunked:
    """Packed messages in parts.

    Args:
        alg: as for `messages`; its compressor works on each coordinate by itself, apart from a few numbers for all.
        axis: of the mesh.

    Raises:
        ValueError: as `messages`, or the compressor does not work coordinate by coordinate.
    """
    known = widths(alg)
    compressor = jax.tree.map(lambda number: np.ravel(number)[0], alg.compressor)  # that of the first point
    if known is not None and not _by_coordinate(compressor, alg.oracle.dtype):
        raise ValueError(
            f"chunked exchange of {type(alg.compressor).__name__} messages: expected a compressor with a code for each "
            "coordinate, such as a grid; use exchange='messages'"
        )
    return Chunked(axis, widths=known)


EXCHANGES = {"messages": messages, "sums": sums, "chunked": chunked}


def named(exchange: str | Sums, alg: Any, axis: str = "workers") -> Sums:
    """The exchange of this name for `alg`, or `exchange` itself.

    Raises:
        ValueError: there is none of that name.
    """
    check_exchange(exchange)
    if not isinstance(exchange, str):
        return exchange
    with jax.ensure_compile_time_eval():  # the caller may be traced, the numbers of the algorithm are not
        return EXCHANGES[exchange](alg, axis)


def check_exchange(exchange: Any) -> None:
    """Raise ValueError unless this is the name of an exchange, or an exchange itself."""
    if isinstance(exchange, str) and exchange not in EXCHANGES:
        raise ValueError(f"exchange = {exchange!r}: expected one of {sorted(EXCHANGES)}{suggest(exchange, EXCHANGES)}")
    if not isinstance(exchange, str) and (isinstance(exchange, type) or not isinstance(exchange, Exchange)):
        known = sorted(EXCHANGES)
        raise ValueError(f"exchange = {exchange!r}: expected one of {known}, or an instance of laqjax.types.Exchange")


def automatic_axes() -> tuple[str, ...]:
    """Return the axes with several devices that the enclosing `jax.shard_map` leaves to the compiler.

    The compiler may place collectives over these axes anywhere. In a branch that only some devices take they never complete.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1)


def beside_points(exchange: Sums | None, points: str) -> Sums | None:
    """`exchange` for points that are mapped over under the axis name `points`: they skip rounds together."""
    return None if exchange is None else dataclasses.replace(exchange, points=points)


# ---- messages as words ------------------------------------------------------------------------------------------


def widths(alg: Any) -> tuple[int, ...] | None:
    """Bits of each number of each field of a message, in order; None where only the run knows them."""
    like = jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)
    try:
        fields = list(alg.compressor.wire({}, like))
    except KeyError:  # a width, or which numbers travel, is said in the message itself
        return None
    bits = [np.unique(np.asarray(field.bits)) for field in fields]
    for field, values in zip(fields, bits, strict=True):
        if values.size > 1:
            raise ValueError(
                f"messages of {', '.join(map(str, values))} bits per number of '{field.name}' in one sweep: expected one, "
                "since the shape of a message is compiled in; use exchange='sums', or a sweep for each b"
            )
    return tuple(int(values[0]) for values in bits)


def numbers_of(compressor: Compressor, upload: Upload, widths: tuple[int, ...] | None) -> list[Array]:
    """The numbers of each field of a message, or what it decodes to where widths are not known.

    In one or two bytes where they fit: they are written to memory before it is known whether they are sent.
    """
    if widths is None:
        return [upload.decoded]
    fields = compressor.wire(upload.payload, jax.ShapeDtypeStruct(upload.decoded.shape, upload.decoded.dtype))
    numbers = [field.payload[field.name] for field in fields]
    narrow = [jnp.uint8 if bits <= 8 else jnp.uint16 if bits <= 16 else None for bits in widths]
    return [values if dtype is None else values.astype(dtype) for values, dtype in zip(numbers, narrow, strict=True)]


def pack_message(numbers: list[Array], widths: tuple[int, ...] | None) -> UInt32[Array, " words"]:
    """The fields of a message, each packed to whole words."""
    if widths is None:
        return to_words(numbers[0][None])[0]
    return jnp.concatenate([pack(values, bits) for values, bits in zip(numbers, widths, strict=True)])


def unpack_message(
    compressor: Compressor, words: UInt32[Array, " words"], like: Any, widths: tuple[int, ...] | None
) -> Float[Array, " p"]:
    """What the receiver decodes of a packed message."""
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    if widths is None:
        return of_words(words[None], jax.ShapeDtypeStruct((1, *like.shape), like.dtype))[0]
    payload: dict[str, Any] = {}
    for field, bits in zip(compressor.wire(payload, like), widths, strict=True):
        size = packed_words(field.like, bits)
        field.payload[field.name] = unpack(words[:size], bits, field.like)
        words = words[size:]
    return compressor.decode(payload, like)


def packed_words(like: Any, bits: int) -> int:
    """Words that `pack` makes."""
    if bits >= WORD:
        return like.size * bits // WORD
    group = WORD // math.gcd(bits, WORD)
    return -(-like.size // group) * group * bits // WORD


def message_words(alg: Any, size: int, widths: tuple[int, ...] | None) -> int:
    """Words of a packed message of `size` coordinates."""
    like = jax.ShapeDtypeStruct((size,), alg.oracle.dtype)
    if widths is None:
        return size * like.dtype.itemsize // 4
    return sum(
        packed_words(field.like, bits) for field, bits in zip(alg.compressor.wire({}, like), widths, strict=True)
    )


def pack(values: Array, bits: int) -> UInt32[Array, " words"]:
    """Numbers of `bits` bits without gaps: g = 32 / gcd(b, 32) of them fill b / gcd(b, 32) words exactly.

    Floats of their full width as bit patterns, all else as whole numbers. The numbers of a group lie apart, g rows of
    neighbours, so that every row is moved as a vector.
    """
    if bits >= WORD:
        return to_words(values.reshape(1, -1))[0]
    rows, words = WORD // math.gcd(bits, WORD), bits // math.gcd(bits, WORD)
    codes = jnp.pad(values.reshape(-1).astype(jnp.uint32), (0, -values.size % rows)).reshape(rows, -1)
    packed = [jnp.zeros(codes.shape[1:], jnp.uint32)] * words
    for row in range(rows):
        first, offset = divmod(row * bits, WORD)
        packed[first] = packed[first] | codes[row] << np.uint32(offset)
        if offset + bits > WORD:
            packed[first + 1] = packed[first + 1] | codes[row] >> np.uint32(WORD - offset)
    return jnp.concatenate(packed)


def unpack(words: UInt32[Array, " words"], bits: int, like: Any) -> Array:
    """The numbers of `pack`, with the shape and dtype of `like`."""
    if bits >= WORD:
        return of_words(words[None], jax.ShapeDtypeStruct((1, *like.shape), like.dtype))[0]
    rows, count = WORD // math.gcd(bits, WORD), bits // math.gcd(bits, WORD)
    packed, codes = words.reshape(count, -1), []
    for row in range(rows):
        first, offset = divmod(row * bits, WORD)
        code = packed[first] >> np.uint32(offset)
        if offset + bits > WORD:
            code = code | packed[first + 1] << np.uint32(WORD - offset)
        codes.append(code & np.uint32(2**bits - 1))
    return jnp.concatenate(codes)[: like.size].reshape(like.shape).astype(like.dtype)


def to_words(values: Array) -> UInt32[Array, "m words"]:
    """[m, ...] as bit patterns."""
    wide = values.astype(jnp.uint32) if values.dtype.itemsize < 4 else values
    return lax.bitcast_convert_type(wide, jnp.uint32).reshape(values.shape[0], -1)


def of_words(words: UInt32[Array, "m words"], like: Any) -> Array:
    """The rows of `to_words`, with the shape of a row and the dtype of `like`."""
    shape = (words.shape[0], *like.shape[1:])
    if like.dtype.itemsize < 4:
        return words.reshape(shape).astype(like.dtype)
    return lax.bitcast_convert_type(words.reshape(shape if like.dtype.itemsize == 4 else (*shape, 2)), like.dtype)


def added(decode: Any, messages: Array, sent: Bool[Array, " M"], like: Any) -> Array:
    """The sum of the messages sent, in worker order, as one device adds them; others are not decoded."""

    def add(total: Array, message: Any) -> Any:
        words, sent = message
        return lax.cond(sent, lambda: total + decode(words), lambda: total), None

    return lax.scan(add, jnp.zeros(like.shape, like.dtype), (messages, sent))[0]


def _by_coordinate(compressor: Compressor, dtype: Any) -> bool:
    """Whether half of a message decodes to half of the vector; tried on a small one."""
    key = jax.random.key(0)
    keys = Keys(key, key, key, jnp.int32(1), jnp.int32(0))
    target = jax.random.normal(key, (8,), dtype)
    try:
        payload = compressor.encode(target, keys)
        parts = [jax.tree.map(lambda a: a[half] if a.ndim else a, payload) for half in (slice(4), slice(4, 8))]  # noqa: B023
        decoded = [compressor.decode(part, jax.ShapeDtypeStruct((4,), dtype)) for part in parts]
    except (ValueError, TypeError, IndexError):
        return False
    whole = compressor.decode(payload, jax.ShapeDtypeStruct((8,), dtype))
    return all(part.shape == (4,) for part in decoded) and bool(jnp.array_equal(jnp.concatenate(decoded), whole))
