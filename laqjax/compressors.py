"""Compress a vector.

`encode(target, keys) -> payload` and `decode(payload, like) -> [p]` are pure and traced; `like` has the target's shape
and dtype. `wire_fields(payload, like)` yields what travels, see `laqjax.compressors`. A class is a compressor, the function of its name
makes one from checked numbers: JAX rebuilds the class with tracers and axes in the place of numbers, so it checks nothing.

    unbiased     E decode = target                                        qsgd, ternary, rand_k, natural
    contractive  ||target - decode||^2 <= (1 - delta) ||target||^2        sign, top_k;  identity (delta = 1)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax._core.validation import check_implements, check_number
from laqjax._core.wire_format import (
    bool_struct,
    float_bits,
    from_bytes,
    index_bits,
    message_bytes,
    scalar_struct,
    to_bytes,
)
from laqjax.types import Compressor, WireField, register_dataclass, shared_bernoulli, static_field

__all__ = [
    "QSGD",
    "AdaptiveGrid",
    "BernoulliFull",
    "Blockwise",
    "Grid",
    "Identity",
    "NaturalCompressor",
    "OptimalSparsifier",
    "Sign",
    "Sparse",
    "Ternary",
    "adaptive_grid",
    "bernoulli_full",
    "blockwise",
    "bool_struct",
    "dequantize_from_grid",
    "float_bits",
    "from_bytes",
    "grid",
    "identity",
    "index_bits",
    "message_bytes",
    "natural",
    "optimal_sparsifier",
    "qsgd",
    "quantize_to_grid",
    "rand_k",
    "scalar_struct",
    "sign",
    "ternary",
    "to_bytes",
    "top_k",
]


@register_dataclass
@dataclass(frozen=True)
class Identity:
    """The vector as it is: 32 p bits (64 p in float64)."""

    def encode(self, target, keys):
        return {"values": target}

    def decode(self, payload, like):
        return payload["values"]

    def wire_fields(self, payload, like):
        yield WireField(payload, "values", like, float_bits(like))


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
        return {"radius": radius, "codes": quantize_to_grid(target, radius, self.bits)}

    def decode(self, payload, like):
        return dequantize_from_grid(payload["codes"], payload["radius"], self.bits)

    def wire_fields(self, payload, like):
        yield WireField(payload, "radius", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "codes", like, self.bits)


@register_dataclass
@dataclass(frozen=True)
class AdaptiveGrid:
    """`Grid` with b chosen for each message: floor(log2(radius sqrt(p) / ||target||_2 + 1)) clipped to [least, most].

    The formula is AQUILA's (Zhao et al. 2023), quoted from memory; left alone it picks b = 1 nearly always and
    diverges. The clipping, and `min_bits` bits for a zero target, are ours. b travels too: 8 + 32 + b p bits.
    """

    min_bits: Int[Array, ""]
    max_bits: Int[Array, ""]

    def encode(self, target, keys):
        radius, norm = jnp.max(jnp.abs(target)), jnp.sqrt(jnp.sum(target * target))
        spread = radius * np.sqrt(target.size).astype(target.dtype) / jnp.where(norm > 0, norm, 1)
        bits = jnp.clip(jnp.floor(jnp.log2(spread + 1)).astype(jnp.int32), self.min_bits, self.max_bits)
        return {"bits": bits, "radius": radius, "codes": quantize_to_grid(target, radius, bits)}

    def decode(self, payload, like):
        return dequantize_from_grid(payload["codes"], payload["radius"], payload["bits"])

    def wire_fields(self, payload, like):
        yield WireField(payload, "bits", scalar_struct(np.int32), 8)
        yield WireField(payload, "radius", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "codes", like, payload["bits"])


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
        level = jnp.floor(share + jax.random.uniform(keys.worker_key, target.shape, target.dtype))
        return {
            "norm": norm,
            "level": jnp.minimum(level, self.levels.astype(target.dtype)),
            "negative": jnp.signbit(target),
        }

    def decode(self, payload, like):
        size = payload["norm"] / self.levels.astype(like.dtype) * payload["level"]
        return jnp.where(payload["negative"], -size, size)

    def wire_fields(self, payload, like):
        yield WireField(payload, "norm", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "negative", bool_struct(like), 1)
        yield WireField(payload, "level", like, 32 - jax.lax.clz(jnp.asarray(self.levels, jnp.int32)))


@register_dataclass
@dataclass(frozen=True)
class Ternary:
    """TernGrad: max|target| sign(target) Bernoulli(|target| / max|target|) (Wen et al. 2017, eq. (4)): 32 + 2 p bits.

    Unbiased. Three values, zero among them, take two bits each.
    """

    def encode(self, target, keys):
        radius = jnp.max(jnp.abs(target))
        kept = jax.random.uniform(keys.worker_key, target.shape, target.dtype) * radius < jnp.abs(target)
        return {"radius": radius, "codes": jnp.where(kept, jnp.sign(target), 0) + 1}

    def decode(self, payload, like):
        return payload["radius"] * (payload["codes"] - 1)

    def wire_fields(self, payload, like):
        yield WireField(payload, "radius", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "codes", like, 2)


@register_dataclass
@dataclass(frozen=True)
class Sign:
    """sign(target), times the mean of |target| when `scaled` (Karimireddy et al. 2019): 32 + p bits, or p bits.

    Scaled, it is contractive with delta = ||target||_1^2 / (p ||target||^2) >= 1 / p, and a zero counts as positive: the
    error remembers it. Unscaled, one bit has no zero, where the paper has sign(0) = 0: a zero counts as positive and as
    negative in turn, from round to round and from worker to worker, so that it moves nothing in the long run.
    """

    scaled: bool = static_field()

    def encode(self, target, keys):
        if self.scaled:
            return {"scale": jnp.mean(jnp.abs(target)), "negative": target < 0}
        odd = (keys.round + keys.worker) % 2 == 1
        return {"negative": jnp.where(target == 0, odd, target < 0)}

    def decode(self, payload, like):
        size = payload["scale"] if self.scaled else jnp.ones((), like.dtype)
        return jnp.where(payload["negative"], -size, size)

    def wire_fields(self, payload, like):
        if self.scaled:
            yield WireField(payload, "scale", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "negative", bool_struct(like), 1)


@register_dataclass
@dataclass(frozen=True)
class Sparse:
    """k coordinates, the largest ones or random ones scaled by p / k: (32 + ceil(log2 p)) k bits, indices included.

    The largest: contractive with delta = k / p. Random: unbiased, E ||decode - target||^2 = (p / k - 1) ||target||^2.
    """

    k: int = static_field()
    random: bool = static_field()

    def encode(self, target, keys):
        if self.random:
            index = jax.random.choice(keys.worker_key, target.size, (self.k,), replace=False)
            return {"index": index, "values": target[index] * (target.size / self.k)}
        index = jax.lax.top_k(jnp.abs(target), self.k)[1]
        return {"index": index, "values": target[index]}

    def decode(self, payload, like):
        return jnp.zeros_like(like).at[payload["index"]].set(payload["values"])

    def wire_fields(self, payload, like):
        yield WireField(payload, "index", jax.ShapeDtypeStruct((self.k,), np.int32), index_bits(like.size))
        yield WireField(payload, "values", jax.ShapeDtypeStruct((self.k,), like.dtype), float_bits(like))


@register_dataclass
@dataclass(frozen=True)
class OptimalSparsifier:
    """Coordinate i is kept with probability min(1, c |target_i|) and divided by it, about `density` p of them stay.

    Unbiased with the least variance for that number (Wangni et al. 2018, Algorithm 3). A bitmap says which were kept:
    p + 32 kept bits, billed for each message.
    """

    density: Float[Array, ""]

    def inclusion_probabilities(self, target: Float[Array, " p"]) -> Float[Array, " p"]:
        """The probabilities of being kept; they add up to density p."""
        size = jnp.abs(target)
        budget = self.density.astype(target.dtype) * target.size

        def spread(chance: Array) -> Array:
            """What the certain coordinates leave over goes to the others in proportion to their size."""
            free = chance < 1
            left = budget - jnp.sum(~free, dtype=target.dtype)
            others = jnp.sum(jnp.where(free, size, 0))
            return jnp.where(free, jnp.clip(left * size / jnp.where(others > 0, others, 1), 0, 1), 1)

        # until no further coordinate becomes certain: then the chances add up to the budget
        _, chance = jax.lax.while_loop(
            lambda pair: jnp.sum(pair[1] >= 1) > jnp.sum(pair[0] >= 1),
            lambda pair: (pair[1], spread(pair[1])),
            (jnp.zeros_like(size), spread(jnp.zeros_like(size))),
        )
        return chance

    def encode(self, target, keys):
        chance = self.inclusion_probabilities(target)
        kept = jax.random.uniform(keys.worker_key, target.shape, target.dtype) < chance
        return {"kept": kept, "values": jnp.where(kept, target / jnp.where(kept, chance, 1), 0)}

    def decode(self, payload, like):
        return payload["values"]

    def wire_fields(self, payload, like):
        yield WireField(payload, "kept", bool_struct(like), 1)
        yield WireField(payload, "values", like, float_bits(like), payload["kept"])


@register_dataclass
@dataclass(frozen=True)
class NaturalCompressor:
    """Random rounding to a power of two (Horvath et al. 2019): a sign and the exponent, 9 p bits (12 p in float64).

    Unbiased, E ||decode - target||^2 <= ||target||^2 / 8. Below the smallest normal number it gives zero.
    """

    def encode(self, target, keys):
        fraction, exponent = jnp.frexp(jnp.abs(target))  # |target| = fraction 2^exponent, fraction in [1/2, 1)
        up = jax.random.uniform(keys.worker_key, target.shape, target.dtype) < 2 * fraction - 1
        code = exponent - 1 + up.astype(exponent.dtype) + jnp.finfo(target.dtype).maxexp - 1
        code = jnp.clip(code, 0, 2 * (jnp.finfo(target.dtype).maxexp - 1))
        return {"negative": jnp.signbit(target), "exponent": jnp.where(target == 0, 0, code)}

    def decode(self, payload, like):
        power = jnp.ldexp(jnp.ones((), like.dtype), payload["exponent"] - (jnp.finfo(like.dtype).maxexp - 1))
        size = jnp.where(payload["exponent"] == 0, 0, power)
        return jnp.where(payload["negative"], -size, size)

    def wire_fields(self, payload, like):
        yield WireField(payload, "negative", bool_struct(like), 1)
        yield WireField(payload, "exponent", jax.ShapeDtypeStruct(like.shape, np.int32), jnp.finfo(like.dtype).nexp)


@register_dataclass
@dataclass(frozen=True)
class Blockwise:
    """Each block of consecutive coordinates on its own (one radius per layer): `sizes` add up to p."""

    compressor: Compressor
    sizes: tuple[int, ...] = static_field()

    def encode(self, target, keys):
        blocks = jnp.split(target, np.cumsum([block.size for block in self._blocks(target)])[:-1])
        own = jax.random.split(keys.worker_key, len(blocks))
        return {str(i): self.compressor.encode(b, keys._replace(worker_key=own[i])) for i, b in enumerate(blocks)}

    def decode(self, payload, like):
        return jnp.concatenate([self.compressor.decode(payload[str(i)], b) for i, b in enumerate(self._blocks(like))])

    def wire_fields(self, payload, like):
        for i, block in enumerate(self._blocks(like)):
            yield from self.compressor.wire_fields(payload.setdefault(str(i), {}), block)

    def _blocks(self, like):
        if sum(self.sizes) != like.size:
            raise ValueError(f"blockwise sizes = {self.sizes} add up to {sum(self.sizes)}: expected p = {like.size}")
        return [jax.ShapeDtypeStruct((size,), like.dtype) for size in self.sizes]


@register_dataclass
@dataclass(frozen=True)
class BernoulliFull:
    """The whole vector when the coin that all workers share says so, else the compressor's message (MARINA).

    One bit says which of the two follows.
    """

    compressor: Compressor
    probability: Float[Array, ""]

    def encode(self, target, keys):
        full = shared_bernoulli(keys, self.probability)
        return {"full": full, "values": target, "inner": self.compressor.encode(target, keys)}

    def decode(self, payload, like):
        return jnp.where(payload["full"], payload["values"], self.compressor.decode(payload["inner"], like))

    def wire_fields(self, payload, like):
        yield WireField(payload, "full", scalar_struct(np.bool_), 1)
        full = jnp.asarray(payload["full"], jnp.int32)
        # a field of no bits is not there
        yield WireField(payload, "values", like, float_bits(like) * full)
        for field in self.compressor.wire_fields(payload.setdefault("inner", {}), like):
            yield field._replace(bits=jnp.asarray(field.bits, jnp.int32) * (1 - full))


# ---- factories: numbers checked, ValueError otherwise -----------------------------------------------------------

identity = Identity
ternary = Ternary
natural = NaturalCompressor


def grid(bits: int) -> Grid:
    """A `Grid` of whole `bits` in 1..16."""
    return Grid(check_number("bits", bits, np.int32, minimum=1, maximum=16))


def adaptive_grid(min_bits: int = 3, max_bits: int = 16) -> AdaptiveGrid:
    """An `AdaptiveGrid` of min_bits..max_bits, whole numbers in 1..16."""
    least = check_number("min_bits", min_bits, np.int32, minimum=1, maximum=16)
    return AdaptiveGrid(least, check_number("max_bits", max_bits, np.int32, minimum=int(least), maximum=16))


def qsgd(levels: int) -> QSGD:
    """A `QSGD` of 1..65535 levels beside zero."""
    return QSGD(check_number("levels", levels, np.int32, minimum=1, maximum=2**16 - 1))


def sign(scaled: bool = True) -> Sign:
    """A `Sign`, with or without its scale."""
    return Sign(scaled)


def top_k(k: int) -> Sparse:
    """The k largest coordinates; k is structure, another one compiles again."""
    return Sparse(int(check_number("k", k, np.int32, minimum=1)), random=False)


def rand_k(k: int) -> Sparse:
    """K coordinates at random; k is structure, another one compiles again."""
    return Sparse(int(check_number("k", k, np.int32, minimum=1)), random=True)


def optimal_sparsifier(density: float) -> OptimalSparsifier:
    """A `OptimalSparsifier` that keeps about a share `density` of the coordinates."""
    return OptimalSparsifier(check_number("density", density, np.float32, above=0, maximum=1))


def blockwise(compressor: Compressor, sizes: Sequence[int]) -> Blockwise:
    """`compressor` on blocks of the given sizes, for example `[leaf.size for leaf in jax.tree.leaves(params)]`."""
    check_implements(
        "compressor", compressor, ("encode", "decode", "wire_fields"), "a compressor, as laqjax.compressors.top_k(10)"
    )
    return Blockwise(compressor, tuple(int(check_number("size", size, np.int32, minimum=1)) for size in sizes))


def bernoulli_full(compressor: Compressor, probability: float) -> BernoulliFull:
    """`compressor`, but everything with that probability."""
    check_implements(
        "compressor", compressor, ("encode", "decode", "wire_fields"), "a compressor, as laqjax.compressors.top_k(10)"
    )
    return BernoulliFull(compressor, check_number("probability", probability, np.float32, above=0, maximum=1))


# ---- shared pieces ----------------------------------------------------------------------------------------------


def quantize_to_grid(target: Float[Array, " p"], radius: Float[Array, ""], bits: Any) -> Float[Array, " p"]:
    """Codes of the b-bit grid, whole numbers in 0 .. 2^b - 1 as floats."""
    step = _step(radius, bits)
    middle = jnp.left_shift(1, bits - 1).astype(target.dtype)
    # a zero radius has no grid: its codes are arbitrary and decode to zero
    return jnp.floor(target / jnp.where(step > 0, step, 1) + middle)


def dequantize_from_grid(codes: Float[Any, " p"], radius: Float[Any, ""], bits: Any) -> Float[Array, " p"]:
    """What the codes stand for."""
    return _step(radius, bits) * (codes - _levels(bits, codes.dtype) / 2)


def _step(radius: Any, bits: Any) -> Any:
    return 2 * radius / _levels(bits, radius.dtype)


def _levels(bits: Any, dtype: Any) -> Array:
    return (jnp.left_shift(1, jnp.asarray(bits)) - 1).astype(dtype)
