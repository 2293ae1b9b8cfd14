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

from laqjax._core.validation import suggest
from laqjax.types import Collective, Compressor, RoundKeys, Shards, WorkerUpload

WORD_BITS = 32


@dataclass(frozen=True)
class AllReduce:
    """Partial sums by an all-reduce, and what all exchanges share: which workers are here, and the gathering of facts."""

    axis: str
    vmap_axis: str | None = None  # the axis of a sweep's points, mapped over: they skip together
    accumulates_locally = True

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        """(number of the first, how many) of this device's workers; the numbers from num_workers on are padding."""
        count = shards.weight.shape[0]
        slots = count * lax.axis_size(self.axis)
        if not 0 <= slots - num_workers < slots or slots < num_workers:
            raise ValueError(
                f"shards of {count} workers on each of {slots // count} devices for num_workers = {num_workers}: expected "
                f"at least {num_workers} together"
            )
        return count * lax.axis_index(self.axis).astype(jnp.int32), count

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> Any:
        """What one worker contributes."""
        return upload.decoded

    def gather_metrics(self, facts: Any, num_workers: int) -> Any:
        """[m, ...] of this device's workers as [M, ...] of all, by one all-gather."""
        leaves, tree = jax.tree.flatten(facts)
        words = [to_words(leaf) for leaf in leaves]
        every = lax.all_gather(jnp.concatenate(words, axis=1), self.axis, tiled=True)[:num_workers]
        parts = jnp.split(every, np.cumsum([part.shape[1] for part in words])[:-1], axis=1)
        return jax.tree.unflatten(tree, [from_words(part, leaf) for part, leaf in zip(parts, leaves, strict=True)])

    def reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """The sum of what all workers sent; nothing moves where nobody sent."""
        some = jnp.any(sent)
        if self.vmap_axis is not None:
            some = lax.psum(some.astype(jnp.int32), self.vmap_axis) > 0
        return lax.cond(some, lambda: self._reduce(alg, messages, sent, like), lambda: jnp.zeros_like(like))

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """`total` in a round in which somebody sent."""
        return lax.psum(messages, self.axis)

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each: of a ring, which adds and hands on both halves."""
        return 2 * alg.oracle.size * alg.oracle.dtype.itemsize * (devices - 1) // devices


@dataclass(frozen=True)
class AllGather(AllReduce):
    """The packed messages by an all-gather; every device decodes and adds all of them, in worker order."""

    widths: tuple[int, ...] | None = None  # bits of each field; None: messages move as what they decode to
    accumulates_locally = False

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> tuple[Bool[Array, ""], list[Array]]:
        """Whether it is sent, and its numbers."""
        return upload.sent, field_values(alg.compressor, upload, self.widths)

    def _pack(self, numbers: list[Array]) -> UInt32[Array, " words"]:
        """What travels of a message."""
        return pack_message(numbers, self.widths)

    def _pack_all(self, messages: tuple[Bool[Array, " m"], list[Array]]) -> UInt32[Array, "m words"]:
        """Of the workers here, zeros where nothing was sent."""

        def one(message: Any) -> Array:
            sent, numbers = message
            if automatic_axes():
                return self._pack(numbers)
            return lax.cond(sent, lambda: self._pack(numbers), lambda: jnp.zeros_like(self._pack(numbers)))

        return lax.map(one, messages)

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        every = lax.all_gather(self._pack_all(messages), self.axis, tiled=True)[: sent.shape[0]]
        return sum_messages(lambda words: unpack_message(alg.compressor, words, like, self.widths), every, sent, like)

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each."""
        return 4 * num_message_words(alg, alg.oracle.size, self.widths) * (devices - 1)


@dataclass(frozen=True)
class AllToAll(AllGather):
    """Each device gets its part of every message by an all-to-all, decodes and adds it; the parts of the sum are gathered."""

    def _pack(self, numbers: list[Array]) -> UInt32[Array, "devices words"]:
        """What travels of a message to each device."""
        devices = lax.axis_size(self.axis)

        def cut(values: Array) -> Array:
            if values.ndim == 0:
                return jnp.broadcast_to(values, (devices,))
            length = self._chunk_size(values.shape[0])
            return jnp.pad(values, (0, devices * length - values.shape[0])).reshape(devices, length)

        return jax.vmap(super()._pack)([cut(values) for values in numbers])

    def _chunk_size(self, size: int) -> int:
        """Coordinates of a part: whole words of them, whatever b."""
        return WORD_BITS * math.ceil(size / (WORD_BITS * lax.axis_size(self.axis)))

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        packed = self._pack_all(messages)
        mine = lax.all_to_all(packed, self.axis, split_axis=1, concat_axis=0, tiled=True)[: sent.shape[0], 0]
        part = jax.ShapeDtypeStruct((self._chunk_size(like.shape[0]),), like.dtype)
        total = sum_messages(lambda words: unpack_message(alg.compressor, words, part, self.widths), mine, sent, part)
        return lax.all_gather(total, self.axis, tiled=True)[: like.shape[0]]

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Bytes that `moved` brings to a device with one worker on each."""
        length = WORD_BITS * math.ceil(alg.oracle.size / (WORD_BITS * devices))
        words = num_message_words(alg, length, self.widths)
        return (4 * words + length * alg.oracle.dtype.itemsize) * (devices - 1)


def all_reduce(alg: Any, axis: str = "workers") -> AllReduce:
    """Partial sums; any algorithm."""
    return AllReduce(axis)


def all_gather(alg: Any, axis: str = "workers") -> AllGather:
    """Packed messages.

    Args:
        alg: an algorithm with concrete numbers: a message's shape is compiled in, so b must be known. Of a `stack_algorithms`, all
            points must have one b.
        axis: of the mesh.

    Raises:
        ValueError: the points of a stack differ in the width of their messages.
    """
    return AllGather(axis, widths=field_widths(alg))


def all_to_all(alg: Any, axis: str = "workers") -> AllToAll:
    """Packed messages in parts.

    Args:
        alg: as for `messages`; its compressor works on each coordinate by itself, apart from a few numbers for all.
        axis: of the mesh.

    Raises:
        ValueError: as `messages`, or the compressor does not work coordinate by coordinate.
    """
    known = field_widths(alg)
    compressor = jax.tree.map(lambda number: np.ravel(number)[0], alg.compressor)  # that of the first point
    if known is not None and not _is_coordinatewise(compressor, alg.oracle.dtype):
        raise ValueError(
            f"all_to_all of {type(alg.compressor).__name__} messages: expected a compressor with a code for each "
            "coordinate, such as a grid; use collective='all_gather'"
        )
    return AllToAll(axis, widths=known)


COLLECTIVES = {"all_gather": all_gather, "all_reduce": all_reduce, "all_to_all": all_to_all}


def resolve_collective(collective: str | AllReduce, alg: Any, axis: str = "workers") -> AllReduce:
    """The exchange of this name for `alg`, or `collective` itself.

    Raises:
        ValueError: there is none of that name.
    """
    check_collective(collective)
    if not isinstance(collective, str):
        return collective
    with jax.ensure_compile_time_eval():  # the caller may be traced, the numbers of the algorithm are not
        return COLLECTIVES[collective](alg, axis)


def check_collective(collective: Any) -> None:
    """Raise ValueError unless `collective` is the name of a collective, or a collective itself."""
    if isinstance(collective, str) and collective not in COLLECTIVES:
        raise ValueError(
            f"collective = {collective!r}: expected one of {sorted(COLLECTIVES)}{suggest(collective, COLLECTIVES)}"
        )
    if not isinstance(collective, str) and (isinstance(collective, type) or not isinstance(collective, Collective)):
        known = sorted(COLLECTIVES)
        raise ValueError(
            f"collective = {collective!r}: expected one of {known}, or an instance of laqjax.types.Collective"
        )


def automatic_axes() -> tuple[str, ...]:
    """Return the axes with several devices that the enclosing `jax.shard_map` leaves to the compiler.

    The compiler may place collectives over these axes anywhere. In a branch that only some devices take they never complete.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1)


def with_vmap_axis(collective: AllReduce | None, axis: str) -> AllReduce | None:
    """`collective` for points that are mapped over under the axis name `axis`: they skip rounds together."""
    return None if collective is None else dataclasses.replace(collective, vmap_axis=axis)


# ---- messages as words ------------------------------------------------------------------------------------------


def field_widths(alg: Any) -> tuple[int, ...] | None:
    """Bits of each number of each field of a message, in order; None where only the run knows them."""
    like = jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)
    try:
        fields = list(alg.compressor.wire_fields({}, like))
    except KeyError:  # a width, or which numbers travel, is said in the message itself
        return None
    bits = [np.unique(np.asarray(field.bits)) for field in fields]
    for field, values in zip(fields, bits, strict=True):
        if values.size > 1:
            raise ValueError(
                f"messages of {', '.join(map(str, values))} bits per number of '{field.name}' in one sweep: expected one, "
                "since the shape of a message is compiled in; use collective='all_reduce', or a sweep for each b"
            )
    return tuple(int(values[0]) for values in bits)


def field_values(compressor: Compressor, upload: WorkerUpload, widths: tuple[int, ...] | None) -> list[Array]:
    """The numbers of each field of a message, or what it decodes to where widths are not known.

    In one or two bytes where they fit: they are written to memory before it is known whether they are sent.
    """
    if widths is None:
        return [upload.decoded]
    fields = compressor.wire_fields(upload.payload, jax.ShapeDtypeStruct(upload.decoded.shape, upload.decoded.dtype))
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
        return from_words(words[None], jax.ShapeDtypeStruct((1, *like.shape), like.dtype))[0]
    payload: dict[str, Any] = {}
    for field, bits in zip(compressor.wire_fields(payload, like), widths, strict=True):
        size = num_packed_words(field.like, bits)
        field.payload[field.name] = unpack(words[:size], bits, field.like)
        words = words[size:]
    return compressor.decode(payload, like)


def num_packed_words(like: Any, bits: int) -> int:
    """Words that `pack` makes."""
    if bits >= WORD_BITS:
        return like.size * bits // WORD_BITS
    group = WORD_BITS // math.gcd(bits, WORD_BITS)
    return -(-like.size // group) * group * bits // WORD_BITS


def num_message_words(alg: Any, size: int, widths: tuple[int, ...] | None) -> int:
    """Words of a packed message of `size` coordinates."""
    like = jax.ShapeDtypeStruct((size,), alg.oracle.dtype)
    if widths is None:
        return size * like.dtype.itemsize // 4
    return sum(
        num_packed_words(field.like, bits)
        for field, bits in zip(alg.compressor.wire_fields({}, like), widths, strict=True)
    )


def pack(values: Array, bits: int) -> UInt32[Array, " words"]:
    """Numbers of `bits` bits without gaps: g = 32 / gcd(b, 32) of them fill b / gcd(b, 32) words exactly.

    Floats of their full width as bit patterns, all else as whole numbers. The numbers of a group lie apart, g rows of
    neighbours, so that every row is moved as a vector.
    """
    if bits >= WORD_BITS:
        return to_words(values.reshape(1, -1))[0]
    rows, words = WORD_BITS // math.gcd(bits, WORD_BITS), bits // math.gcd(bits, WORD_BITS)
    codes = jnp.pad(values.reshape(-1).astype(jnp.uint32), (0, -values.size % rows)).reshape(rows, -1)
    packed = [jnp.zeros(codes.shape[1:], jnp.uint32)] * words
    for row in range(rows):
        first, offset = divmod(row * bits, WORD_BITS)
        packed[first] = packed[first] | codes[row] << np.uint32(offset)
        if offset + bits > WORD_BITS:
            packed[first + 1] = packed[first + 1] | codes[row] >> np.uint32(WORD_BITS - offset)
    return jnp.concatenate(packed)


def unpack(words: UInt32[Array, " words"], bits: int, like: Any) -> Array:
    """The numbers of `pack`, with the shape and dtype of `like`."""
    if bits >= WORD_BITS:
        return from_words(words[None], jax.ShapeDtypeStruct((1, *like.shape), like.dtype))[0]
    rows, count = WORD_BITS // math.gcd(bits, WORD_BITS), bits // math.gcd(bits, WORD_BITS)
    packed, codes = words.reshape(count, -1), []
    for row in range(rows):
        first, offset = divmod(row * bits, WORD_BITS)
        code = packed[first] >> np.uint32(offset)
        if offset + bits > WORD_BITS:
            code = code | packed[first + 1] << np.uint32(WORD_BITS - offset)
        codes.append(code & np.uint32(2**bits - 1))
    return jnp.concatenate(codes)[: like.size].reshape(like.shape).astype(like.dtype)


def to_words(values: Array) -> UInt32[Array, "m words"]:
    """[m, ...] as bit patterns."""
    wide = values.astype(jnp.uint32) if values.dtype.itemsize < 4 else values
    return lax.bitcast_convert_type(wide, jnp.uint32).reshape(values.shape[0], -1)


def from_words(words: UInt32[Array, "m words"], like: Any) -> Array:
    """The rows of `to_words`, with the shape of a row and the dtype of `like`."""
    shape = (words.shape[0], *like.shape[1:])
    if like.dtype.itemsize < 4:
        return words.reshape(shape).astype(like.dtype)
    return lax.bitcast_convert_type(words.reshape(shape if like.dtype.itemsize == 4 else (*shape, 2)), like.dtype)


def sum_messages(decode: Any, messages: Array, sent: Bool[Array, " M"], like: Any) -> Array:
    """The sum of the messages sent, in worker order, as one device adds them; others are not decoded."""

    def add(total: Array, message: Any) -> Any:
        words, sent = message
        return lax.cond(sent, lambda: total + decode(words), lambda: total), None

    return lax.scan(add, jnp.zeros(like.shape, like.dtype), (messages, sent))[0]


def _is_coordinatewise(compressor: Compressor, dtype: Any) -> bool:
    """Whether half of a message decodes to half of the vector; tried on a small one."""
    key = jax.random.key(0)
    keys = RoundKeys(key, key, key, jnp.int32(1), jnp.int32(0))
    target = jax.random.normal(key, (8,), dtype)
    try:
        payload = compressor.encode(target, keys)
        parts = [jax.tree.map(lambda a: a[half] if a.ndim else a, payload) for half in (slice(4), slice(4, 8))]  # noqa: B023
        decoded = [compressor.decode(part, jax.ShapeDtypeStruct((4,), dtype)) for part in parts]
    except (ValueError, TypeError, IndexError):
        return False
    whole = compressor.decode(payload, jax.ShapeDtypeStruct((8,), dtype))
    return all(part.shape == (4,) for part in decoded) and bool(jnp.array_equal(jnp.concatenate(decoded), whole))
