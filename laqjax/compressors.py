"""Compress a vector, bill it, and turn it into real bytes.

`encode(target, keys) -> payload` and `decode(payload, like) -> [p]` are pure and traced; `like` has the target's shape
and dtype. `wire(payload, like)` lists what travels as `core.Field`s: the bill of a message and its bytes both come from
that one list, so nothing is billed that is not sent. Bits are rounded up to a byte once per message. `unwire` reads the
fields back in their order and decodes them. `to_bytes` and `from_bytes` run on the host.

    unbiased     E decode = target                                        qsgd, ternary, rand_k, natural
    contractive  ||target - decode||^2 <= (1 - delta) ||target||^2        sign, top_k;  identity (delta = 1)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Float, Int, Integer, UInt8, UInt16

from laqjax.core import Compressor, Field, number, static, toss

Read = Callable[[int, int], np.ndarray]  # (how many, bits of each) -> uint64 [how many]


@register_dataclass
@dataclass(frozen=True)
class Identity:
    """The vector as it is: 32 p bits (64 p in float64)."""

    def encode(self, target, keys):
        return {"values": target}

    def decode(self, payload, like):
        return payload["values"]

    def wire(self, payload, like):
        return [Field(payload["values"], bits_of(like))]

    def unwire(self, read, like):
        return self.decode({"values": floats(read(like.size, bits_of(like)), like)}, like)


@register_dataclass
@dataclass(frozen=True)
class Grid:
    """The paper's b-bit uniform grid of 2^b points over [-radius, radius] (LAQ, eq. (5)-(6)): 32 + b p bits.

    codes = floor(target / step + 2^(b-1)), decoded = step (codes - (2^b - 1) / 2), |target - decoded| <= step / 2 with
    step = 2 radius / (2^b - 1). It is the paper's floor((target + radius) / step + 1/2) rewritten: for an exactly zero
    coordinate that form is a tie which float32 decides at random, this one always gives 2^(b-1).
    """

    bits: Int[Array, ""]

    def encode(self, target, keys):
        radius = jnp.max(jnp.abs(target))
        return {"radius": radius, "codes": codes_on_grid(target, radius, self.bits)}

    def decode(self, payload, like):
        return values_on_grid(payload["codes"], payload["radius"], self.bits)

    def wire(self, payload, like):
        return [Field(payload["radius"], bits_of(like)), Field(payload["codes"], self.bits)]

    def unwire(self, read, like):
        radius = floats(read(1, bits_of(like)), like)[0]
        return self.decode({"radius": radius, "codes": read(like.size, int(self.bits)).astype(like.dtype)}, like)


@register_dataclass
@dataclass(frozen=True)
class AdaptiveGrid:
    """`Grid` with b chosen for each message: floor(log2(radius sqrt(p) / ||target||_2 + 1)) clipped to [least, most].

    The formula is AQUILA's (Zhao et al. 2023), quoted from memory; left alone it picks b = 1 nearly always and
    diverges. The clipping, and `least` bits for a zero target, are ours. b travels too: 8 + 32 + b p bits.
    """

    least: Int[Array, ""]
    most: Int[Array, ""]

    def encode(self, target, keys):
        radius, norm = jnp.max(jnp.abs(target)), jnp.sqrt(jnp.sum(target * target))
        spread = radius * np.sqrt(target.size).astype(target.dtype) / jnp.where(norm > 0, norm, 1)
        bits = jnp.clip(jnp.floor(jnp.log2(spread + 1)).astype(jnp.int32), self.least, self.most)
        return {"bits": bits, "radius": radius, "codes": codes_on_grid(target, radius, bits)}

    def decode(self, payload, like):
        return values_on_grid(payload["codes"], payload["radius"], payload["bits"])

    def wire(self, payload, like):
        return [
            Field(payload["bits"], 8),
            Field(payload["radius"], bits_of(like)),
            Field(payload["codes"], payload["bits"]),
        ]

    def unwire(self, read, like):
        bits, radius = int(read(1, 8)[0]), floats(read(1, bits_of(like)), like)[0]
        return self.decode(
            {"bits": jnp.int32(bits), "radius": radius, "codes": read(like.size, bits).astype(like.dtype)}, like
        )


@register_dataclass
@dataclass(frozen=True)
class QSGD:
    """Unbiased random rounding to `levels` parts of the Euclidean norm (Alistarh et al. 2017, eq. (1)).

    A sign and a level of fixed width: 32 + (1 + ceil(log2(levels + 1))) p bits. The paper's Elias code is shorter for
    few levels; what is billed here is what is sent. E ||decode - target||^2 <= min(p / levels^2, sqrt(p) / levels) ||target||^2.
    """

    levels: Int[Array, ""]

    def encode(self, target, keys):
        norm = jnp.sqrt(jnp.sum(target * target))
        share = jnp.abs(target) / jnp.where(norm > 0, norm, 1) * self.levels.astype(target.dtype)
        level = jnp.floor(share + jax.random.uniform(keys.own, target.shape, target.dtype))
        return {
            "norm": norm,
            "level": jnp.minimum(level, self.levels.astype(target.dtype)),
            "negative": jnp.signbit(target),
        }

    def decode(self, payload, like):
        size = payload["norm"] / self.levels.astype(like.dtype) * payload["level"]
        return jnp.where(payload["negative"], -size, size)

    def wire(self, payload, like):
        return [
            Field(payload["norm"], bits_of(like)),
            Field(payload["negative"], 1),
            Field(payload["level"], self._width()),
        ]

    def unwire(self, read, like):
        norm, negative = floats(read(1, bits_of(like)), like)[0], read(like.size, 1).astype(bool)
        return self.decode(
            {"norm": norm, "negative": negative, "level": read(like.size, int(self._width())).astype(like.dtype)}, like
        )

    def _width(self):
        return 32 - jax.lax.clz(jnp.asarray(self.levels, jnp.int32))


@register_dataclass
@dataclass(frozen=True)
class Ternary:
    """TernGrad: max|target| sign(target) Bernoulli(|target| / max|target|) (Wen et al. 2017, eq. (4)): 32 + 2 p bits.

    Unbiased. Three values, zero among them, take two bits each.
    """

    def encode(self, target, keys):
        radius = jnp.max(jnp.abs(target))
        kept = jax.random.uniform(keys.own, target.shape, target.dtype) * radius < jnp.abs(target)
        return {"radius": radius, "codes": jnp.where(kept, jnp.sign(target), 0) + 1}

    def decode(self, payload, like):
        return payload["radius"] * (payload["codes"] - 1)

    def wire(self, payload, like):
        return [Field(payload["radius"], bits_of(like)), Field(payload["codes"], 2)]

    def unwire(self, read, like):
        return self.decode(
            {"radius": floats(read(1, bits_of(like)), like)[0], "codes": read(like.size, 2).astype(like.dtype)}, like
        )


@register_dataclass
@dataclass(frozen=True)
class Sign:
    """sign(target), times the mean of |target| when `scaled` (Karimireddy et al. 2019): 32 + p bits, or p bits.

    Scaled, it is contractive with delta = ||target||_1^2 / (p ||target||^2) >= 1 / p. A zero counts as positive.
    """

    scaled: bool = static()

    def encode(self, target, keys):
        scale = {"scale": jnp.mean(jnp.abs(target))} if self.scaled else {}
        return scale | {"negative": target < 0}

    def decode(self, payload, like):
        size = payload["scale"] if self.scaled else jnp.ones((), like.dtype)
        return jnp.where(payload["negative"], -size, size)

    def wire(self, payload, like):
        return [*([Field(payload["scale"], bits_of(like))] if self.scaled else []), Field(payload["negative"], 1)]

    def unwire(self, read, like):
        scale = {"scale": floats(read(1, bits_of(like)), like)[0]} if self.scaled else {}
        return self.decode(scale | {"negative": read(like.size, 1).astype(bool)}, like)


@register_dataclass
@dataclass(frozen=True)
class Sparse:
    """k coordinates, the largest ones or random ones scaled by p / k: (32 + ceil(log2 p)) k bits, indices included.

    The largest: contractive with delta = k / p. Random: unbiased, E ||decode - target||^2 = (p / k - 1) ||target||^2.
    """

    k: int = static()
    random: bool = static()

    def encode(self, target, keys):
        if self.random:
            index = jax.random.choice(keys.own, target.size, (self.k,), replace=False)
            return {"index": index, "values": target[index] * (target.size / self.k)}
        index = jax.lax.top_k(jnp.abs(target), self.k)[1]
        return {"index": index, "values": target[index]}

    def decode(self, payload, like):
        return jnp.zeros_like(like).at[payload["index"]].set(payload["values"])

    def wire(self, payload, like):
        return [Field(payload["index"], index_bits(like.size)), Field(payload["values"], bits_of(like))]

    def unwire(self, read, like):
        index = read(self.k, index_bits(like.size)).astype(np.int32)
        return self.decode({"index": index, "values": floats(read(self.k, bits_of(like)), like)}, like)


@register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Coordinate i is kept with probability min(1, c |target_i|) and divided by it, about `density` p of them stay.

    Unbiased with the least variance for that number (Wangni et al. 2018, Algorithm 3). A bitmap says which were kept:
    p + 32 kept bits, billed for each message.
    """

    density: Float[Array, ""]

    def encode(self, target, keys):
        size = jnp.abs(target)
        budget = self.density.astype(target.dtype) * target.size
        chance = jnp.minimum(budget * size / jnp.maximum(jnp.sum(size), jnp.finfo(target.dtype).tiny), 1)
        for _ in range(2):  # what the certain ones left over goes to the others
            free = chance < 1
            left = budget - jnp.sum(~free, dtype=target.dtype)
            share = left / jnp.maximum(jnp.sum(jnp.where(free, chance, 0)), jnp.finfo(target.dtype).tiny)
            chance = jnp.where(free, jnp.clip(chance * jnp.maximum(share, 1), 0, 1), 1)
        kept = jax.random.uniform(keys.own, target.shape, target.dtype) < chance
        return {"kept": kept, "values": jnp.where(kept, target / jnp.where(kept, chance, 1), 0)}

    def decode(self, payload, like):
        return payload["values"]

    def wire(self, payload, like):
        return [Field(payload["kept"], 1), Field(payload["values"], bits_of(like), payload["kept"])]

    def unwire(self, read, like):
        kept = read(like.size, 1).astype(bool)
        values = np.zeros(like.size, like.dtype)
        values[kept] = floats(read(int(kept.sum()), bits_of(like)), like)
        return self.decode({"kept": kept, "values": values}, like)


@register_dataclass
@dataclass(frozen=True)
class Natural:
    """Random rounding to a power of two (Horvath et al. 2019): a sign and the exponent, 9 p bits (12 p in float64).

    Unbiased, E ||decode - target||^2 <= ||target||^2 / 8. Below the smallest normal number it gives zero.
    """

    def encode(self, target, keys):
        fraction, exponent = jnp.frexp(jnp.abs(target))  # |target| = fraction 2^exponent, fraction in [1/2, 1)
        up = jax.random.uniform(keys.own, target.shape, target.dtype) < 2 * fraction - 1
        code = exponent - 1 + up.astype(exponent.dtype) + jnp.finfo(target.dtype).maxexp - 1
        code = jnp.clip(code, 0, 2 * (jnp.finfo(target.dtype).maxexp - 1))
        return {"negative": jnp.signbit(target), "exponent": jnp.where(target == 0, 0, code)}

    def decode(self, payload, like):
        power = jnp.ldexp(jnp.ones((), like.dtype), payload["exponent"] - (jnp.finfo(like.dtype).maxexp - 1))
        size = jnp.where(payload["exponent"] == 0, 0, power)
        return jnp.where(payload["negative"], -size, size)

    def wire(self, payload, like):
        return [Field(payload["negative"], 1), Field(payload["exponent"], jnp.finfo(like.dtype).nexp)]

    def unwire(self, read, like):
        negative = read(like.size, 1).astype(bool)
        return self.decode(
            {"negative": negative, "exponent": read(like.size, jnp.finfo(like.dtype).nexp).astype(np.int32)}, like
        )


@register_dataclass
@dataclass(frozen=True)
class Blockwise:
    """Each block of consecutive coordinates on its own (one radius per layer): `sizes` add up to p."""

    compressor: Compressor
    sizes: tuple[int, ...] = static()

    def encode(self, target, keys):
        blocks = jnp.split(target, np.cumsum([block.size for block in self._blocks(target)])[:-1])
        own = jax.random.split(keys.own, len(blocks))
        return {str(i): self.compressor.encode(b, keys._replace(own=own[i])) for i, b in enumerate(blocks)}

    def decode(self, payload, like):
        return jnp.concatenate([self.compressor.decode(payload[str(i)], b) for i, b in enumerate(self._blocks(like))])

    def wire(self, payload, like):
        blocks = self._blocks(like)
        return [field for i, b in enumerate(blocks) for field in self.compressor.wire(payload[str(i)], b)]

    def unwire(self, read, like):
        return jnp.concatenate([self.compressor.unwire(read, b) for b in self._blocks(like)])

    def _blocks(self, like):
        if sum(self.sizes) != like.size:
            raise ValueError(f"blockwise sizes = {self.sizes} add up to {sum(self.sizes)}: expected p = {like.size}")
        return [jax.ShapeDtypeStruct((size,), like.dtype) for size in self.sizes]


@register_dataclass
@dataclass(frozen=True)
class Coin:
    """The whole vector when the coin that all workers share says so, else the compressor's message (MARINA).

    One bit says which of the two follows.
    """

    compressor: Compressor
    probability: Float[Array, ""]

    def encode(self, target, keys):
        full = toss(keys, self.probability)
        return {"full": full, "values": target, "inner": self.compressor.encode(target, keys)}

    def decode(self, payload, like):
        return jnp.where(payload["full"], payload["values"], self.compressor.decode(payload["inner"], like))

    def wire(self, payload, like):
        full = jnp.asarray(payload["full"], jnp.int32)
        inner = self.compressor.wire(payload["inner"], like)
        # a field of no bits is not there
        fields = [
            Field(payload["values"], bits_of(like) * full),
            *(f._replace(bits=jnp.asarray(f.bits, jnp.int32) * (1 - full)) for f in inner),
        ]
        return [Field(full, 1), *fields]

    def unwire(self, read, like):
        full = bool(read(1, 1)[0])
        return floats(read(like.size, bits_of(like)), like) if full else self.compressor.unwire(read, like)


# ---- factories: numbers checked, ValueError otherwise -----------------------------------------------------------

identity = Identity
ternary = Ternary
natural = Natural


def grid(bits: int) -> Grid:
    """A `Grid` of whole `bits` in 1..16."""
    return Grid(number("bits", bits, np.int32, least=1, most=16))


def adaptive_grid(min_bits: int = 3, max_bits: int = 16) -> AdaptiveGrid:
    """An `AdaptiveGrid` of min_bits..max_bits, whole numbers in 1..16."""
    least = number("min_bits", min_bits, np.int32, least=1, most=16)
    return AdaptiveGrid(least, number("max_bits", max_bits, np.int32, least=int(least), most=16))


def qsgd(levels: int) -> QSGD:
    """A `QSGD` of 1..65535 levels beside zero."""
    return QSGD(number("levels", levels, np.int32, least=1, most=2**16 - 1))


def sign(scaled: bool = True) -> Sign:
    """A `Sign`, with or without its scale."""
    return Sign(scaled)


def top_k(k: int) -> Sparse:
    """The k largest coordinates; k is structure, another one compiles again."""
    return Sparse(int(number("k", k, np.int32, least=1)), random=False)


def rand_k(k: int) -> Sparse:
    """K coordinates at random; k is structure, another one compiles again."""
    return Sparse(int(number("k", k, np.int32, least=1)), random=True)


def sampled(density: float) -> Sampled:
    """A `Sampled` that keeps about a share `density` of the coordinates."""
    return Sampled(number("density", density, np.float32, above=0, most=1))


def blockwise(compressor: Compressor, sizes: Sequence[int]) -> Blockwise:
    """`compressor` on blocks of the given sizes, for example those of `oracle.block_sizes`."""
    return Blockwise(compressor, tuple(int(number("size", size, np.int32, least=1)) for size in sizes))


def coin(compressor: Compressor, probability: float) -> Coin:
    """`compressor`, but everything with that probability."""
    return Coin(compressor, number("probability", probability, np.float32, above=0, most=1))


# ---- shared pieces ----------------------------------------------------------------------------------------------


def codes_on_grid(target: Float[Array, " p"], radius: Float[Array, ""], bits: Any) -> Float[Array, " p"]:
    """Codes of the b-bit grid, whole numbers in 0 .. 2^b - 1 as floats."""
    step = _step(radius, bits)
    middle = jnp.left_shift(1, bits - 1).astype(target.dtype)
    # a zero radius has no grid: its codes are arbitrary and decode to zero
    return jnp.floor(target / jnp.where(step > 0, step, 1) + middle)


def values_on_grid(codes: Float[Any, " p"], radius: Float[Any, ""], bits: Any) -> Float[Array, " p"]:
    """What the codes stand for."""
    return _step(radius, bits) * (codes - _levels(bits, codes.dtype) / 2)


def _step(radius: Any, bits: Any) -> Any:
    return 2 * radius / _levels(bits, radius.dtype)


def _levels(bits: Any, dtype: Any) -> Array:
    return (jnp.left_shift(1, jnp.asarray(bits)) - 1).astype(dtype)


def bits_of(like: Any) -> int:
    """Bits of one float of this dtype."""
    return 8 * like.dtype.itemsize


def index_bits(size: int) -> int:
    """Bits of an index into `size` coordinates."""
    return max((size - 1).bit_length(), 1)


# ---- bytes ------------------------------------------------------------------------------------------------------


def to_bytes(compressor: Compressor, payload: Any, like: Any) -> bytes:
    """The message as it would travel; 8 x its length is what `core.bill` counted."""
    planes = []
    for array, bits, kept in compressor.wire(payload, like):
        if int(bits) == 0:
            continue
        values = np.atleast_1d(np.asarray(array))[slice(None) if kept is None else np.asarray(kept)]
        pattern = values.dtype.kind == "f" and int(bits) == 8 * values.itemsize
        whole = values.view(f"u{values.itemsize}") if pattern else values
        planes.append(_planes(whole.astype(np.uint64), int(bits)))
    return np.packbits(np.concatenate(planes)).tobytes()


def from_bytes(compressor: Compressor, data: bytes, like: Any) -> Float[Array, " p"]:
    """What the receiver decodes: bit for bit `compressor.decode(payload, like)`."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    at = 0

    def read(count: int, width: int) -> np.ndarray:
        nonlocal at
        at += count * width
        return _whole(bits[at - count * width : at].reshape(width, count))

    return jnp.asarray(compressor.unwire(read, like))


def pack(codes: Integer[Any, " p"], bits: int) -> UInt8[Array, " bytes"]:
    """Codes in 0 .. 2^bits - 1 as ceil(p bits / 8) bytes on the device, for any bits in 1..16. Bit planes, least
    significant first: whole planes move as vectors, where interleaved codes would move bit by bit.
    """
    return jnp.packbits(_planes(jnp.asarray(codes), bits))


def unpack(data: UInt8[Any, " bytes"], bits: int, size: int) -> UInt16[Array, " p"]:
    """The inverse of `pack`: `size` codes as uint16."""
    planes = jnp.unpackbits(jnp.asarray(data), count=bits * size).reshape(bits, size).astype(jnp.uint16)
    return jnp.sum(jnp.left_shift(planes, jnp.arange(bits, dtype=jnp.uint16)[:, None]), axis=0, dtype=jnp.uint16)


def _planes(codes: Any, bits: int) -> Any:
    """Whole numbers as their bits [bits p], one plane after another."""
    xp = codes.__array_namespace__()
    return (xp.right_shift(codes[None], xp.arange(bits, dtype=codes.dtype)[:, None]) & 1).astype(np.uint8).reshape(-1)


def _whole(planes: np.ndarray) -> np.ndarray:
    """The inverse of `_planes` on the host."""
    return np.bitwise_or.reduce(planes.astype(np.uint64) << np.arange(len(planes), dtype=np.uint64)[:, None], axis=0)


def floats(read: np.ndarray, like: Any) -> np.ndarray:
    """Floats from their bit patterns."""
    return read.astype(f"u{like.dtype.itemsize}").view(like.dtype)
