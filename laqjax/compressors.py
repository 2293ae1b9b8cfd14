"""Compressors, which turn a vector of p numbers into a short message and back.

A compressor implements `laqjax.types.Compressor`, which describes its methods, and declares the members of
`laqjax.types.CompressorTraits` that hold.

The size of a message is the sum over its fields, rounded up to a whole byte once. `message_bytes` computes it,
`to_bytes` serializes a message, and `from_bytes` reads it. Bit counts in this module are for float32. With float64,
each float that is sent counts 64 instead of 32.

Build every compressor with its function (`grid`, `top_k`, `identity`, ...), which checks its numbers. The classes are
the types of the results. They check nothing, because JAX rebuilds them with tracers or axes in the place of numbers.

Theorems distinguish two kinds of compressors:

- unbiased, E decode = target: `qsgd`, `ternary`, `rand_k`, `natural`, `optimal_sparsifier`;
- contractive, ||target - decode||^2 <= (1 - delta) ||target||^2: scaled `sign`, `top_k`, `chunked_top_k`, and
  `identity` with delta = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from laqjax._core.validation import check_compressor, check_number, get_declaration
from laqjax._core.wire_format import (
    bool_struct,
    float_bits,
    from_bytes,
    index_bits,
    message_bytes,
    scalar_struct,
    to_bytes,
)
from laqjax.types import (
    Compressor,
    CompressorTraits,
    WireField,
    max_abs,
    register_dataclass,
    shared_bernoulli,
    squared_norm,
    static_field,
)

__all__ = [
    "QSGD",
    "AdaptiveGrid",
    "BernoulliFull",
    "Blockwise",
    "ChunkedTopK",
    "Grid",
    "Identity",
    "NaturalCompressor",
    "OptimalSparsifier",
    "QuantizedValues",
    "Sign",
    "Sparse",
    "StatisticalGrid",
    "Ternary",
    "adaptive_grid",
    "bernoulli_full",
    "blockwise",
    "bool_struct",
    "chunked_top_k",
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
    "quantized_values",
    "rand_k",
    "scalar_struct",
    "sign",
    "statistical_grid",
    "ternary",
    "to_bytes",
    "top_k",
]


@register_dataclass
@dataclass(frozen=True)
class Identity:
    """Compressor that sends the vector unchanged, in 32 p bits (64 p in float64)."""

    is_coordinatewise = True
    has_static_layout = True

    def encode(self, target, keys):
        return {"values": target}

    def decode(self, payload, like):
        return payload["values"]

    def wire_fields(self, payload, like):
        yield WireField(payload, "values", like, float_bits(like))


@register_dataclass
@dataclass(frozen=True)
class Grid:
    """Quantizer to the b-bit uniform grid of 2^b points over [-radius, radius] (LAQ, eq. (5)-(6)): 32 + b p bits.

    The radius is max |target|, and step = 2 radius / (2^b - 1) is the distance between grid points:

        codes   = floor(target / step + 2^(b-1))
        decoded = step (codes - (2^b - 1) / 2),    |target - decoded| <= step / 2

    The codes are the paper's floor((target + radius) / step + 1/2), rewritten. For a coordinate that is exactly zero,
    the paper's form is a tie that float32 rounds arbitrarily. This form always gives 2^(b-1).

    For example, with bits = 2 the vector [1, 0.2, -1] has radius 1, step 2/3 and codes [3, 2, 0]. It is decoded as
    [1, 1/3, -1]. The message takes 32 + 2 * 3 = 38 bits, that is 5 bytes.

    Attributes:
        bits: b, bits per coordinate.
    """

    bits: Int[Array, ""]
    is_coordinatewise = True
    has_static_layout = True

    def encode(self, target, keys):
        radius = max_abs(target)
        return {"radius": radius, "codes": quantize_to_grid(target, radius, self.bits)}

    def decode(self, payload, like):
        return dequantize_from_grid(payload["codes"], payload["radius"], self.bits)

    def wire_fields(self, payload, like):
        yield WireField(payload, "radius", scalar_struct(like.dtype), float_bits(like))
        yield WireField(payload, "codes", like, self.bits)


@register_dataclass
@dataclass(frozen=True)
class AdaptiveGrid:
    """Quantizer to a `Grid` whose number of bits b is chosen for each message: 8 + 32 + b p bits.

    b = floor(log2(radius sqrt(p) / ||target||_2 + 1)), clipped to [min_bits, max_bits]. The message holds b in 8 bits.
    The formula is AQUILA's (Zhao et al. 2023), quoted from memory. Without the clipping it picks b = 1 nearly always
    and diverges. The clipping, and the use of `min_bits` bits for a zero target, are additions of this library.

    Attributes:
        min_bits: the fewest bits per coordinate.
        max_bits: the most bits per coordinate.
    """

    min_bits: Int[Array, ""]
    max_bits: Int[Array, ""]
    is_coordinatewise = True

    def encode(self, target, keys):
        radius, norm = max_abs(target), jnp.sqrt(squared_norm(target))
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

    A message holds the norm, and a sign and a level of fixed width for each coordinate. It takes
    32 + (1 + ceil(log2(levels + 1))) p bits. The paper's Elias code, which is not used here, is shorter for few levels.

    E ||decode - target||^2 <= min(p / levels^2, sqrt(p) / levels) ||target||^2.

    Attributes:
        levels: number of levels besides zero.
    """

    levels: Int[Array, ""]
    is_coordinatewise = True
    has_static_layout = True

    def encode(self, target, keys):
        norm = jnp.sqrt(squared_norm(target))
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

    It is unbiased. Each coordinate takes one of three values (one of them zero), which needs two bits.
    """

    is_coordinatewise = True
    has_static_layout = True

    def encode(self, target, keys):
        radius = max_abs(target)
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
    """Sign compressor: sign(target), times the mean of |target| if `scaled` (Karimireddy et al. 2019).

    A message takes 32 + p bits if scaled, and p bits otherwise.

    The scaled form is contractive with delta = ||target||_1^2 / (p ||target||^2) >= 1 / p. A zero coordinate counts as
    positive; with error feedback the error memory corrects it.

    In the unscaled form, one bit cannot encode the paper's sign(0) = 0. A zero coordinate therefore alternates between
    positive and negative, over rounds and over workers (the server counts as worker M). Its contributions cancel in the
    long run.

    Attributes:
        scaled: whether the signs are multiplied by the mean of |target|; static.
    """

    scaled: bool = static_field()
    is_coordinatewise = True
    has_static_layout = True

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
    """Sparsifier that sends k coordinates with their indices: (32 + ceil(log2 p)) k bits.

    - Top-k sends the k largest coordinates by magnitude. It is contractive with delta = k / p.
    - Rand-k sends k random coordinates, scaled by p / k. It is unbiased, with
      E ||decode - target||^2 = (p / k - 1) ||target||^2.

    Attributes:
        k: number of coordinates that are sent; static.
        random: True for rand-k, False for top-k; static.
    """

    k: int = static_field()
    random: bool = static_field()
    has_static_layout = True

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
class ChunkedTopK:
    """Sparsifier that sends the k largest coordinates of each chunk: 32 + ceil(log2 chunk) bits for each of them.

    A chunk is a range of `chunk` consecutive coordinates of the vector. The last one may be shorter, and sends at most
    all its coordinates. Indices count within a chunk. The compressor is contractive with delta = k / chunk.

    Source: SparseLoCo (Sarfi et al. 2025). Its program takes tiles of matrices as chunks.

    Attributes:
        chunk: coordinates of a chunk; static.
        k: coordinates that a chunk sends; static.
    """

    chunk: int = static_field()
    k: int = static_field()
    has_static_layout = True

    def encode(self, target, keys):
        whole = target.size - target.size % self.chunk
        parts = [target[:whole].reshape(-1, self.chunk), target[None, whole:]]
        kept = [jax.lax.top_k(jnp.abs(part), min(self.k, part.shape[1]))[1] for part in parts if part.size]
        index = jnp.concatenate([part.reshape(-1) for part in kept])
        return {"index": index, "values": target[index + self._chunk_starts(target.size)]}

    def decode(self, payload, like):
        return jnp.zeros_like(like).at[payload["index"] + self._chunk_starts(like.size)].set(payload["values"])

    def wire_fields(self, payload, like):
        kept = self._chunk_starts(like.size).shape
        yield WireField(payload, "index", jax.ShapeDtypeStruct(kept, np.int32), index_bits(self.chunk))
        yield WireField(payload, "values", jax.ShapeDtypeStruct(kept, like.dtype), float_bits(like))

    def _chunk_starts(self, size: int) -> np.ndarray:
        """Return the first coordinate of the chunk of each number that is sent."""
        starts = np.arange(0, size, self.chunk, dtype=np.int32)
        return np.repeat(starts, np.minimum(self.k, np.minimum(self.chunk, size - starts)))


@register_dataclass
@dataclass(frozen=True)
class OptimalSparsifier:
    """Random sparsifier that keeps coordinate i with probability min(1, c |target_i|).

    Source: Wangni et al. 2018, Algorithm 3. The constant c is such that about `density` p coordinates are kept on
    average. A kept coordinate is divided by its probability. This makes the compressor unbiased, with the least
    variance for that number of coordinates.

    A bitmap marks the kept coordinates. A message takes p bits for the bitmap and 32 bits for each coordinate kept, so
    its size differs from message to message.

    Attributes:
        density: share of the coordinates that are kept on average.
    """

    density: Float[Array, ""]
    is_coordinatewise = True

    def inclusion_probabilities(self, target: Float[Array, " p"]) -> Float[Array, " p"]:
        """Compute the probability of each coordinate to be kept.

        Args:
            target: the vector to compress, [p].

        Returns:
            The probabilities [p]. Their sum is density p, or less if fewer than density p coordinates are nonzero.
        """
        size = jnp.abs(target)
        budget = self.density.astype(target.dtype) * target.size

        def spread(chance: Array) -> Array:
            """Distribute the budget left by the certain coordinates among the others, in proportion to size."""
            free = chance < 1
            left = budget - jnp.sum(~free, dtype=target.dtype)
            others = jnp.sum(jnp.where(free, size, 0))
            return jnp.where(free, jnp.clip(left * size / jnp.where(others > 0, others, 1), 0, 1), 1)

        # Repeat until no further coordinate becomes certain: the probabilities then add up to the budget.
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
class QuantizedValues:
    """Sparsifier whose values are quantized by a second compressor, all values of a message together.

    With `grid`, n values take 32 + b n bits, plus the indices. The grid has no level at zero, so a value that is
    exactly zero decodes to half a step.

    Attributes:
        sparsifier: `Sparse` or `ChunkedTopK`, which chooses the coordinates.
        quantizer: compressor of their values.
    """

    sparsifier: Compressor
    quantizer: Compressor

    @property
    def has_static_layout(self) -> bool:
        """Return whether the layout of the quantized values is static."""
        return get_declaration(self.quantizer, CompressorTraits, "has_static_layout")

    def encode(self, target, keys):
        payload = self.sparsifier.encode(target, keys)
        return payload | {"values": self.quantizer.encode(payload["values"], keys)}

    def decode(self, payload, like):
        fields = self.sparsifier.wire_fields({}, like)
        values = next(field.like for field in fields if field.name == "values")
        return self.sparsifier.decode(payload | {"values": self.quantizer.decode(payload["values"], values)}, like)

    def wire_fields(self, payload, like):
        for field in self.sparsifier.wire_fields(payload, like):
            if field.name == "values":
                yield from self.quantizer.wire_fields(payload.setdefault("values", {}), field.like)
            else:
                yield field


@register_dataclass
@dataclass(frozen=True)
class StatisticalGrid:
    """Quantizer to 2^b bins of equal width over mean +- sigmas std (MuLoCo, Therien et al. 2025): b p + 32 * 2^b bits.

        width = 2 sigmas std / 2^b
        codes = floor((target - mean) / width + 2^(b-1)), clipped to 0, ..., 2^b - 1

    A code decodes to the mean of the target's values in its bin. These 2^b means travel with the message. std is the
    unbiased standard deviation. If it is zero, every coordinate decodes to the mean.

    The bins are symmetric about the mean. Those of MuLoCo's program lean by half a bin: there the mean is in the middle
    of a bin.

    Attributes:
        bits: b, bits per coordinate; static.
        sigmas: half of the width of all bins together, in standard deviations; 3 in MuLoCo's program.
    """

    sigmas: Float[Array, ""]
    bits: int = static_field()
    has_static_layout = True

    def encode(self, target, keys):
        count, mean = 2**self.bits, jnp.mean(target)
        centered = target - mean
        width = (
            2 / count * self.sigmas.astype(target.dtype) * jnp.sqrt(squared_norm(centered) / max(target.size - 1, 1))
        )
        codes = jnp.floor(centered / jnp.where(width > 0, width, 1) + count // 2)
        codes = jnp.clip(codes, 0, count - 1).astype(jnp.int32)
        sums, sizes = (jnp.zeros(count, target.dtype).at[codes].add(v) for v in (centered, jnp.ones_like(target)))
        return {"means": mean + sums / jnp.maximum(sizes, 1), "codes": codes}

    def decode(self, payload, like):
        return payload["means"][payload["codes"]]

    def wire_fields(self, payload, like):
        yield WireField(payload, "means", jax.ShapeDtypeStruct((2**self.bits,), like.dtype), float_bits(like))
        yield WireField(payload, "codes", jax.ShapeDtypeStruct(like.shape, np.int32), self.bits)


@register_dataclass
@dataclass(frozen=True)
class NaturalCompressor:
    """Unbiased random rounding to a power of two (Horvath et al. 2019): 9 p bits (12 p in float64).

    Each coordinate is rounded to one of the two nearest powers of two. A message holds its sign and exponent. Results
    below the smallest normal number become zero.

    E ||decode - target||^2 <= ||target||^2 / 8.
    """

    is_coordinatewise = True
    has_static_layout = True

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
    """Compressor that applies another one to each block of coordinates, for example with one radius per layer.

    A block is a range of consecutive coordinates.

    Attributes:
        compressor: the compressor of the blocks; it gets a different worker key for each block.
        sizes: number of coordinates in each block; they must add up to p.
    """

    compressor: Compressor
    sizes: tuple[int, ...] = static_field()

    @property
    def has_static_layout(self) -> bool:
        """Return whether the layout of a block's message is static."""
        return get_declaration(self.compressor, CompressorTraits, "has_static_layout")

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
            raise ValueError(f"blockwise sizes = {self.sizes}, sum {sum(self.sizes)}: must be of sum p = {like.size}")
        return [jax.ShapeDtypeStruct((size,), like.dtype) for size in self.sizes]


@register_dataclass
@dataclass(frozen=True)
class BernoulliFull:
    """Compressor that sends the whole vector with a given probability, and a compressed one otherwise (MARINA).

    All workers share one Bernoulli variable per round (`shared_bernoulli`), which is True in round 0. A message starts
    with one bit that tells which of the two forms follows.

    Attributes:
        compressor: the compressor of the other rounds.
        probability: probability of a round with whole vectors.
    """

    compressor: Compressor
    probability: Float[Array, ""]

    @property
    def is_coordinatewise(self) -> bool:
        """Return whether the compressor of the other rounds is."""
        return get_declaration(self.compressor, CompressorTraits, "is_coordinatewise")

    def encode(self, target, keys):
        full = shared_bernoulli(keys, self.probability)
        return {"full": full, "values": target, "inner": self.compressor.encode(target, keys)}

    def decode(self, payload, like):
        return jnp.where(payload["full"], payload["values"], self.compressor.decode(payload["inner"], like))

    def wire_fields(self, payload, like):
        yield WireField(payload, "full", scalar_struct(np.bool_), 1)
        full = jnp.asarray(payload["full"], jnp.int32)
        # A field of zero bits is not sent.
        yield WireField(payload, "values", like, float_bits(like) * full)
        for field in self.compressor.wire_fields(payload.setdefault("inner", {}), like):
            yield field._replace(bits=jnp.asarray(field.bits, jnp.int32) * (1 - full))


# ---- factories, which check their numbers ------------------------------------------------------------------------


def identity() -> Identity:
    """Build an `Identity` compressor, which sends the vector unchanged."""
    return Identity()


def ternary() -> Ternary:
    """Build a `Ternary` compressor (TernGrad)."""
    return Ternary()


def natural() -> NaturalCompressor:
    """Build a `NaturalCompressor`, which rounds to powers of two."""
    return NaturalCompressor()


def grid(bits: int) -> Grid:
    """Build a `Grid` quantizer.

    Args:
        bits: b, bits per coordinate, a whole number from 1 to 16.

    Returns:
        The compressor.

    Raises:
        ValueError: `bits` is out of its range.
    """
    return Grid(check_number("bits", bits, np.int32, minimum=1, maximum=16))


def adaptive_grid(min_bits: int = 3, max_bits: int = 16) -> AdaptiveGrid:
    """Build an `AdaptiveGrid` quantizer, which chooses its bits for each message.

    Args:
        min_bits: the fewest bits per coordinate, a whole number from 1 to 16.
        max_bits: the most bits per coordinate, a whole number from `min_bits` to 16.

    Returns:
        The compressor.

    Raises:
        ValueError: an argument is out of its range.
    """
    least = check_number("min_bits", min_bits, np.int32, minimum=1, maximum=16)
    return AdaptiveGrid(least, check_number("max_bits", max_bits, np.int32, minimum=int(least), maximum=16))


def qsgd(levels: int) -> QSGD:
    """Build a `QSGD` compressor.

    Args:
        levels: number of levels besides zero, a whole number from 1 to 65535.

    Returns:
        The compressor.

    Raises:
        ValueError: `levels` is out of its range.
    """
    return QSGD(check_number("levels", levels, np.int32, minimum=1, maximum=2**16 - 1))


def sign(scaled: bool = True) -> Sign:
    """Build a `Sign` compressor.

    Args:
        scaled: multiply the signs by the mean of |target|. This is static: another value compiles again.

    Returns:
        The compressor.
    """
    return Sign(scaled)


def top_k(k: int) -> Sparse:
    """Build a `Sparse` compressor that sends the k coordinates of largest magnitude.

    Args:
        k: number of coordinates, at least 1 and at most p. It is static: another k compiles again.

    Returns:
        The compressor.

    Raises:
        ValueError: `k` is not a whole number >= 1.
    """
    return Sparse(int(check_number("k", k, np.int32, minimum=1)), random=False)


def rand_k(k: int) -> Sparse:
    """Build a `Sparse` compressor that sends k random coordinates, scaled by p / k.

    Args:
        k: number of coordinates, at least 1 and at most p. It is static: another k compiles again.

    Returns:
        The compressor.

    Raises:
        ValueError: `k` is not a whole number >= 1.
    """
    return Sparse(int(check_number("k", k, np.int32, minimum=1)), random=True)


def chunked_top_k(chunk: int, k: int) -> ChunkedTopK:
    """Build a `ChunkedTopK` compressor, which sends the k largest coordinates of each chunk.

    Args:
        chunk: number of consecutive coordinates in a chunk, at least 2. It is static: another one compiles again.
        k: number of coordinates that a chunk sends, from 1 to `chunk`. It is static too.

    Returns:
        The compressor.

    Raises:
        ValueError: a number is out of its range.
    """
    size = int(check_number("chunk", chunk, np.int32, minimum=2))
    return ChunkedTopK(size, int(check_number("k", k, np.int32, minimum=1, maximum=size)))


def quantized_values(sparsifier: Compressor, quantizer: Compressor) -> QuantizedValues:
    """Build a `QuantizedValues` compressor, which quantizes the values that a sparsifier keeps.

    Args:
        sparsifier: `top_k`, `rand_k` or `chunked_top_k`.
        quantizer: compressor of the values, such as `grid(2)` or `statistical_grid(2, 3.0)`.

    Returns:
        The compressor.

    Raises:
        ValueError: `sparsifier` is another compressor, or `quantizer` is not a compressor.
    """
    if not isinstance(sparsifier, Sparse | ChunkedTopK):
        raise ValueError(f"sparsifier = {sparsifier!r}: must be top_k, rand_k or chunked_top_k")
    check_compressor(quantizer)
    return QuantizedValues(sparsifier, quantizer)


def statistical_grid(bits: int, sigmas: float = 3.0) -> StatisticalGrid:
    """Build a `StatisticalGrid` quantizer.

    Args:
        bits: b, bits per coordinate, a whole number from 1 to 8. It is static: another b compiles again.
        sigmas: half of the width of all bins together, in standard deviations, above 0.

    Returns:
        The compressor.

    Raises:
        ValueError: a number is out of its range.
    """
    size = int(check_number("bits", bits, np.int32, minimum=1, maximum=8))
    return StatisticalGrid(check_number("sigmas", sigmas, np.float32, above=0), size)


def optimal_sparsifier(density: float) -> OptimalSparsifier:
    """Build an `OptimalSparsifier`.

    Args:
        density: share of the coordinates to keep on average, above 0 and at most 1.

    Returns:
        The compressor.

    Raises:
        ValueError: `density` is out of its range.
    """
    return OptimalSparsifier(check_number("density", density, np.float32, above=0, maximum=1))


def blockwise(compressor: Compressor, sizes: Sequence[int]) -> Blockwise:
    """Build a `Blockwise` compressor, which applies `compressor` to each block of coordinates.

    Args:
        compressor: the compressor of each block.
        sizes: coordinates in each block, p in total, for example `[leaf.size for leaf in jax.tree.leaves(params)]`.

    Returns:
        The compressor.

    Raises:
        ValueError: `compressor` is not a compressor, or a size is not a whole number >= 1.
    """
    check_compressor(compressor)
    return Blockwise(compressor, tuple(int(check_number("size", size, np.int32, minimum=1)) for size in sizes))


def bernoulli_full(compressor: Compressor, probability: float) -> BernoulliFull:
    """Build a `BernoulliFull` compressor, which sends the whole vector in some rounds.

    Args:
        compressor: the compressor of the other rounds.
        probability: probability of a round with whole vectors, above 0 and at most 1.

    Returns:
        The compressor.

    Raises:
        ValueError: `compressor` is not a compressor, or `probability` is out of its range.
    """
    check_compressor(compressor)
    return BernoulliFull(compressor, check_number("probability", probability, np.float32, above=0, maximum=1))


# ---- shared pieces ----------------------------------------------------------------------------------------------


def quantize_to_grid(target: Float[Array, " p"], radius: Float[Array, ""], bits: Any) -> Float[Array, " p"]:
    """Quantize a vector to b bits per coordinate (LAQ, eq. (5)); see `Grid`.

    Args:
        target: the vector, [p].
        radius: max |target|.
        bits: b.

    Returns:
        The codes [p]: whole numbers from 0 to 2^b - 1, stored as floats.
    """
    step = _step(radius, bits)
    middle = jnp.left_shift(1, bits - 1).astype(target.dtype)
    # a zero radius has no grid: its codes are arbitrary and decode to zero
    return jnp.floor(target / jnp.where(step > 0, step, 1) + middle)


def dequantize_from_grid(codes: Float[Any, " p"], radius: Float[Any, ""], bits: Any) -> Float[Array, " p"]:
    """Return the grid points that belong to the codes (LAQ, eq. (6)); the inverse of `quantize_to_grid` up to step / 2.

    Args:
        codes: whole numbers from 0 to 2^b - 1, stored as floats, [p].
        radius: the radius that the vector was quantized with.
        bits: b.

    Returns:
        The decoded vector [p].
    """
    return _step(radius, bits) * (codes - _levels(bits, codes.dtype) / 2)


def _step(radius: Any, bits: Any) -> Any:
    """Return the distance between neighboring points of the b-bit grid."""
    return 2 * radius / _levels(bits, radius.dtype)


def _levels(bits: Any, dtype: Any) -> Array:
    """Return 2^bits - 1, the largest code of the grid."""
    return (jnp.left_shift(1, jnp.asarray(bits)) - 1).astype(dtype)
