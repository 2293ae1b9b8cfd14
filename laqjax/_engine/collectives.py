"""Collectives: how the messages of workers on many devices become one sum on every device.

A collective is an argument of `Algorithm.step`. In a round with an upload:

- `all_gather`, the default, moves the packed messages of all workers to each device, M p b / 8 bytes, by one
  all-gather. They are added in worker order, so the sum is bit-identical to that of one device. It suits few workers
  per device.
- `all_to_all` moves to each device its part of every message, M p b / (8 devices) bytes, by an all-to-all. The parts of
  the sum, 4 p bytes, are then gathered. The sum is bit-identical to that of one device too. It suits many workers and
  large models: the cost per device is O(p).
- `all_reduce` adds partial sums in floats, about 8 p bytes, by an all-reduce. They are added in the order of the
  devices, so the sum is not bit-identical to that of one device. It suits M far above the number of devices.

All three begin with an all-gather of a few words: the loss, the upload decision and the bytes of each worker. They skip
the rest entirely in rounds without an upload. Shapes are static, so a round with one upload moves the slots of all
workers. The layout of some messages is known at run time only: a b chosen for each message, a shared Bernoulli
variable, a bitmap. Such a message moves in decoded form, and so does that of a compressor which does not declare a
static layout (`laqjax.types.CompressorTraits`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, UInt32

from laqjax._core.validation import get_declaration, suggest
from laqjax._core.wire_format import decode_message
from laqjax.types import Collective, Compressor, CompressorTraits, Shards, WorkerUpload

WORD_BITS = 32


@dataclass(frozen=True)
class AllReduce:
    """Collective that adds the partial sums of the devices by an all-reduce.

    It is also the base class of the other collectives, which share its division of workers and its gathering of
    metrics.

    Attributes:
        axis: mesh axis over which the workers are spread.
        vmap_axis: name of the `vmap` axis of a sweep's points, which skip the communication together. None: no sweep.
        accumulates_locally: True, since each device adds the messages of its workers before `reduce`.
    """

    axis: str
    vmap_axis: str | None = None
    accumulates_locally = True

    def local_workers(self, num_workers: int, shards: Shards) -> tuple[Any, int]:
        """Return the index of this device's first worker and the number of its workers.

        Workers with an index of `num_workers` or more are padding.

        Raises:
            ValueError: the devices together hold fewer than `num_workers` workers.
        """
        count = shards.weight.shape[0]
        slots = count * lax.axis_size(self.axis)
        if slots < num_workers:
            raise ValueError(
                f"shards of {count} workers on each of {slots // count} devices: must be at least num_workers = "
                f"{num_workers} workers in total"
            )
        return count * lax.axis_index(self.axis).astype(jnp.int32), count

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> Any:
        """Return what one worker contributes to `reduce`: its decoded message [p]."""
        return upload.decoded

    def gather_metrics(self, metrics: Any, num_workers: int) -> Any:
        """Gather arrays [m, ...] of this device's workers into arrays [M, ...] of all workers, by one all-gather."""
        leaves, tree = jax.tree.flatten(metrics)
        words = [to_words(leaf) for leaf in leaves]
        every = lax.all_gather(jnp.concatenate(words, axis=1), self.axis, tiled=True)[:num_workers]
        parts = jnp.split(every, np.cumsum([part.shape[1] for part in words])[:-1], axis=1)
        return jax.tree.unflatten(tree, [from_words(part, leaf) for part, leaf in zip(parts, leaves, strict=True)])

    def reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """Sum the messages of all uploading workers on every device.

        Nothing is communicated in a round without an upload, and zeros are returned. In a sweep this holds if no
        point of the batch has an upload.

        Args:
            alg: the algorithm.
            messages: sum [p] of the local contributions if `accumulates_locally`, else the local contributions,
                stacked.
            sent: whether each of the M workers uploads.
            like: vector with the shape and dtype of the sum.

        Returns:
            The sum [p].
        """
        some = jnp.any(sent)
        if self.vmap_axis is not None:
            some = lax.psum(some.astype(jnp.int32), self.vmap_axis) > 0
        return lax.cond(some, lambda: self._reduce(alg, messages, sent, like), lambda: jnp.zeros_like(like))

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        """Sum the messages in a round with at least one upload; see `reduce`."""
        return lax.psum(messages, self.axis)

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Return the bytes that each device receives in `reduce`, with one worker per device."""
        return ring_bytes(jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype), devices)


@dataclass(frozen=True)
class AllGather(AllReduce):
    """Collective that gathers the packed messages; every device decodes all of them and adds them in worker order.

    Attributes:
        widths: bits per number of each field of a message. None: the widths are not known, and messages move in decoded
            form.
        accumulates_locally: False, since `reduce` needs each message.
    """

    widths: tuple[int, ...] | None = None
    accumulates_locally = False

    def worker_contribution(self, alg: Any, upload: WorkerUpload) -> tuple[Bool[Array, ""], list[Array]]:
        """Return whether a worker uploads, and the numbers of each field of its message."""
        return upload.sent, field_values(alg.compressor, upload, self.widths)

    def _pack(self, numbers: list[Array]) -> UInt32[Array, " words"]:
        """Pack the fields of one message into words."""
        return pack_message(numbers, self.widths)

    def _pack_all(self, messages: tuple[Bool[Array, " m"], list[Array]]) -> UInt32[Array, "m words"]:
        """Pack the messages of this device's workers, with zeros for workers without an upload."""

        def pack_one(message: Any) -> Array:
            sent, numbers = message
            if automatic_axes():  # a branch could deadlock
                return self._pack(numbers)
            return lax.cond(sent, lambda: self._pack(numbers), lambda: jnp.zeros_like(self._pack(numbers)))

        return lax.map(pack_one, messages)

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        every = lax.all_gather(self._pack_all(messages), self.axis, tiled=True)[: sent.shape[0]]
        return self.sum_packed(alg, every, sent, like)

    def sum_packed(self, alg: Any, messages: UInt32[Array, "M words"], sent: Bool[Array, " M"], like: Any) -> Array:
        """Decode the packed messages of all uploading workers and add them in worker order, as one device does.

        Args:
            alg: the algorithm.
            messages: packed messages of the M workers.
            sent: whether each of the M workers uploads. A message is not decoded if its worker does not.
            like: array or struct with the shape and dtype of the sum.

        Returns:
            The sum, of the shape of `like`.
        """

        def add(total: Array, message: Any) -> Any:
            words, sent = message
            decode = partial(unpack_message, alg.compressor, words, like, self.widths)
            return lax.cond(sent, lambda: total + decode(), lambda: total), None

        return lax.scan(add, jnp.zeros(like.shape, like.dtype), (messages, sent))[0]

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Return the bytes that each device receives in `reduce`, with one worker per device."""
        return 4 * num_message_words(alg, alg.oracle.size, self.widths) * (devices - 1)


@dataclass(frozen=True)
class AllToAll(AllGather):
    """Collective in which each device decodes and adds its part of every message.

    An all-to-all brings each device its part of every message. The parts of the sum are then gathered by an all-gather.
    """

    def _pack(self, numbers: list[Array]) -> UInt32[Array, "devices words"]:
        """Pack one message into a row of words for each device; fields with a single number go to all devices."""
        devices = lax.axis_size(self.axis)

        def split(values: Array) -> Array:
            if values.ndim == 0:
                return jnp.broadcast_to(values, (devices,))
            length = coordinates_per_device(values.shape[0], devices)
            return jnp.pad(values, (0, devices * length - values.shape[0])).reshape(devices, length)

        return jax.vmap(super()._pack)([split(values) for values in numbers])

    def _reduce(self, alg: Any, messages: Any, sent: Bool[Array, " M"], like: Float[Array, " p"]) -> Float[Array, " p"]:
        packed = self._pack_all(messages)
        mine = lax.all_to_all(packed, self.axis, split_axis=1, concat_axis=0, tiled=True)[: sent.shape[0], 0]
        part = jax.ShapeDtypeStruct((coordinates_per_device(like.shape[0], lax.axis_size(self.axis)),), like.dtype)
        total = self.sum_packed(alg, mine, sent, part)
        return lax.all_gather(total, self.axis, tiled=True)[: like.shape[0]]

    def bytes_received(self, alg: Any, devices: int) -> int:
        """Return the bytes that each device receives in `reduce`, with one worker per device."""
        length = coordinates_per_device(alg.oracle.size, devices)
        words = num_message_words(alg, length, self.widths)
        return (4 * words + length * alg.oracle.dtype.itemsize) * (devices - 1)


def coordinates_per_device(size: int, devices: int) -> int:
    """Return the coordinates of a device's part: a multiple of 32, so that it fills whole words for every b."""
    return WORD_BITS * math.ceil(size / (WORD_BITS * devices))


def ring_bytes(like: Any, devices: int) -> int:
    """Return the bytes that each device receives in a ring all-reduce: a reduce-scatter followed by an all-gather."""
    return 2 * like.size * like.dtype.itemsize * (devices - 1) // devices


def all_reduce(alg: Any, axis: str = "workers") -> AllReduce:
    """Create the collective that adds partial sums; it suits every algorithm.

    Args:
        alg: algorithm; not used.
        axis: mesh axis of the workers.

    Returns:
        An `AllReduce`.
    """
    return AllReduce(axis)


def all_gather(alg: Any, axis: str = "workers") -> AllGather:
    """Create the collective that gathers packed messages.

    Args:
        alg: algorithm with concrete numbers: the shape of a message is compiled in, so b must be known. The points of a
            `stack_algorithms` must have one b.
        axis: mesh axis of the workers.

    Returns:
        An `AllGather`.

    Raises:
        ValueError: the points of a stack differ in the width of their messages.
    """
    return AllGather(axis, widths=field_widths(alg))


def all_to_all(alg: Any, axis: str = "workers") -> AllToAll:
    """Create the collective that exchanges parts of packed messages.

    Args:
        alg: algorithm as for `all_gather`. Its compressor must encode each coordinate separately, apart from a few
            numbers for the whole message.
        axis: mesh axis of the workers.

    Returns:
        An `AllToAll`.

    Raises:
        ValueError: the points of a stack differ in the width of their messages, or the compressor does not encode each
            coordinate separately.
    """
    known = field_widths(alg)
    if known is not None and not get_declaration(alg.compressor, CompressorTraits, "is_coordinatewise"):
        raise ValueError(
            f"collective 'all_to_all' with compressor {type(alg.compressor).__name__}: must be a compressor with a "
            "code for each coordinate, such as a grid; use collective='all_gather'"
        )
    return AllToAll(axis, widths=known)


COLLECTIVES = {"all_gather": all_gather, "all_reduce": all_reduce, "all_to_all": all_to_all}


def resolve_collective(collective: str | Collective, alg: Any, axis: str = "workers") -> Any:
    """Return the collective of a given name for an algorithm.

    Args:
        collective: "all_gather", "all_to_all", "all_reduce", or a collective, which is returned unchanged.
        alg: algorithm, or the stacked algorithm of a sweep.
        axis: mesh axis of the workers.

    Returns:
        A collective for `Algorithm.step`.

    Raises:
        ValueError: there is no collective of that name, or it does not suit the algorithm.
    """
    check_collective(collective)
    if not isinstance(collective, str):
        return collective
    with jax.ensure_compile_time_eval():  # the caller may be traced, but the numbers of the algorithm are concrete
        return COLLECTIVES[collective](alg, axis)


def check_collective(collective: Any) -> None:
    """Raise ValueError unless `collective` is the name of a collective, or a collective itself."""
    is_name = isinstance(collective, str) and collective in COLLECTIVES
    if not is_name and (isinstance(collective, str | type) or not isinstance(collective, Collective)):
        raise ValueError(
            f"collective = {collective!r}: must be one of {sorted(COLLECTIVES)}, or an instance of "
            f"laqjax.types.Collective{suggest(collective, COLLECTIVES)}"
        )


def automatic_axes() -> tuple[str, ...]:
    """Return the axes with several devices that the enclosing `jax.shard_map` leaves to the compiler.

    The compiler may place collectives over these axes anywhere. In a branch that only some devices take they never
    complete.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1)


# ---- messages as words ------------------------------------------------------------------------------------------


def field_widths(alg: Any) -> tuple[int, ...] | None:
    """Return the bits per number of each field of a message, or None if the compressor declares no static layout.

    Raises:
        ValueError: the points of a stack differ in a width.
    """
    if not get_declaration(alg.compressor, CompressorTraits, "has_static_layout"):
        return None
    fields = list(alg.compressor.wire_fields({}, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)))
    bits = [np.unique(np.asarray(field.bits)) for field in fields]
    for field, values in zip(fields, bits, strict=True):
        if values.size > 1:
            raise ValueError(
                f"messages of {', '.join(map(str, values))} bits per number of '{field.name}' in one sweep: must be "
                "equal, since the shape of a message is compiled; use collective='all_reduce', or a sweep for each b"
            )
    return tuple(int(values[0]) for values in bits)


def field_values(compressor: Compressor, upload: WorkerUpload, widths: tuple[int, ...] | None) -> list[Array]:
    """Return the numbers of each field of a message, or the decoded message where the widths are not known.

    Numbers of at most 16 bits become unsigned integers of one or two bytes, floats of full width by their bit patterns:
    they are written to memory before it is known whether they are sent.
    """
    if widths is None:
        return [upload.decoded]
    fields = compressor.wire_fields(upload.payload, jax.ShapeDtypeStruct(upload.decoded.shape, upload.decoded.dtype))
    numbers = [field.payload[field.name] for field in fields]

    def shorten(values: Array, bits: int) -> Array:
        if bits > 16:
            return values
        whole = float_to_bits(values) if bits == 8 * values.dtype.itemsize else values
        return whole.astype(jnp.uint8 if bits <= 8 else jnp.uint16)

    return [shorten(values, bits) for values, bits in zip(numbers, widths, strict=True)]


def pack_message(numbers: list[Array], widths: tuple[int, ...] | None) -> UInt32[Array, " words"]:
    """Pack each field of a message into whole words and concatenate them."""
    if widths is None:
        return to_words(numbers[0][None])[0]
    return jnp.concatenate([pack(values, bits) for values, bits in zip(numbers, widths, strict=True)])


def unpack_message(
    compressor: Compressor, words: UInt32[Array, " words"], like: Any, widths: tuple[int, ...] | None
) -> Float[Array, " p"]:
    """Decode a packed message to a vector with the shape and dtype of `like`."""
    like = jax.ShapeDtypeStruct(like.shape, like.dtype)
    if widths is None:
        return from_words(words[None], jax.ShapeDtypeStruct((1, *like.shape), like.dtype))[0]
    payload: dict[str, Any] = {}
    for field, bits in zip(compressor.wire_fields(payload, like), widths, strict=True):
        size = num_packed_words(field.like, bits)
        field.payload[field.name] = unpack(words[:size], bits, field.like)
        words = words[size:]
    return decode_message(compressor, payload, like)


def num_packed_words(like: Any, bits: int) -> int:
    """Return the number of 32-bit words into which `pack` packs an array of the shape of `like`."""
    if bits >= WORD_BITS:
        return like.size * bits // WORD_BITS
    group = WORD_BITS // math.gcd(bits, WORD_BITS)
    return -(-like.size // group) * group * bits // WORD_BITS


def num_message_words(alg: Any, size: int, widths: tuple[int, ...] | None) -> int:
    """Return the number of words of a packed message of `size` coordinates."""
    like = jax.ShapeDtypeStruct((size,), alg.oracle.dtype)
    if widths is None:
        return size * max(like.dtype.itemsize, 4) // 4
    return sum(
        num_packed_words(field.like, bits)
        for field, bits in zip(alg.compressor.wire_fields({}, like), widths, strict=True)
    )


def pack(values: Array, bits: int) -> UInt32[Array, " words"]:
    """Pack numbers of `bits` bits into 32-bit words without gaps.

    A group of g = 32 / gcd(b, 32) numbers fills b / gcd(b, 32) words exactly. Floats of 32 or 64 bits are packed as bit
    patterns, all other numbers as whole numbers; `field_values` has converted shorter floats. The array is divided into g rows of neighbouring numbers, and a group
    takes one number of each row. Every row is therefore shifted as one vector.
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
    """Unpack the numbers that `field_values` and `pack` converted, with the shape and dtype of `like`."""
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
    whole = jnp.concatenate(codes)[: like.size].reshape(like.shape)
    return bits_to_float(whole, like.dtype) if bits == 8 * like.dtype.itemsize else whole.astype(like.dtype)


def float_to_bits(values: Array) -> Array:
    """Return the bit patterns of floats as unsigned integers of the same width; other numbers are returned unchanged."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    return lax.bitcast_convert_type(values, np.dtype(f"u{values.dtype.itemsize}"))


def bits_to_float(whole: Array, dtype: Any) -> Array:
    """Return the numbers of a dtype whose result of `float_to_bits` is given, in integers of any width."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return whole.astype(dtype)
    return lax.bitcast_convert_type(whole.astype(np.dtype(f"u{dtype.itemsize}")), dtype)


def to_words(values: Array) -> UInt32[Array, "m words"]:
    """Convert an array [m, ...] to bit patterns [m, words]; numbers of less than 4 bytes fill one word each."""
    wide = float_to_bits(values).astype(jnp.uint32) if values.dtype.itemsize < 4 else values
    return lax.bitcast_convert_type(wide, jnp.uint32).reshape(values.shape[0], -1)


def from_words(words: UInt32[Array, "m words"], like: Any) -> Array:
    """Convert the rows of `to_words` back, with the row shape and the dtype of `like`."""
    shape = (words.shape[0], *like.shape[1:])
    if like.dtype.itemsize < 4:
        return bits_to_float(words.reshape(shape), like.dtype)
    return lax.bitcast_convert_type(words.reshape(shape if like.dtype.itemsize == 4 else (*shape, 2)), like.dtype)
