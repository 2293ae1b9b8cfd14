"""Every compressor: what it may lose, and that its bytes are all that travels."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laqjax import compressors, types
from laqjax._core import wire_format
from tests.laws import local_twins
from tests.support import KEY

pytestmark = pytest.mark.core

BITS = st.integers(1, 16)
SIZES = [1, 7, 8, 63]
vectors = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.integers(-28, 28))
KEYS = types.RoundKeys(KEY, jax.random.key(1), KEY, jnp.int32(1), jnp.int32(0))

encode = jax.jit(lambda scheme, target, keys=KEYS: scheme.encode(target, keys))
decode = jax.jit(lambda scheme, payload, like: scheme.decode(payload, like))


def vector(seed: int, size: int, scale: int, dtype: type = np.float32) -> np.ndarray:
    """Heavy tails, some exact zeros, of magnitude 10^scale."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, size) * 10.0**scale
    return np.where(rng.random(size) < 0.3, 0, values).astype(dtype)


# ---- the grid ----------------------------------------------------------------------------------------------------


@given(BITS, vectors)
def test_the_grid_is_within_half_a_step(bits: int, drawn: tuple[int, int, int]) -> None:
    check_grid(bits, vector(*drawn))


@given(BITS, vectors)
def test_the_grid_is_within_half_a_step_in_float64(bits: int, drawn: tuple[int, int, int]) -> None:
    with jax.enable_x64(True):
        check_grid(bits, vector(*drawn, np.float64))


def check_grid(bits: int, target: np.ndarray) -> None:
    grid = compressors.grid(bits)
    payload = encode(grid, target)
    codes, radius = np.asarray(payload["codes"]), payload["radius"]
    decoded = np.asarray(decode(grid, payload, target))
    assert decoded.dtype == codes.dtype == target.dtype
    assert radius == np.abs(target).max()
    if radius == 0:
        assert not decoded.any()
        return
    assert np.all((codes >= 0) & (codes <= 2**bits - 1) & (codes == np.floor(codes)))
    # a zero stands between the two middle points: a tie, always broken upwards
    assert np.all(codes[target == 0] == 2 ** (bits - 1))
    # the quotient and the product round, relative to the radius
    slack = 4 * np.finfo(target.dtype).eps * float(radius)
    error = np.abs(target.astype(np.float64) - decoded)
    assert np.all(error <= float(radius) / (2**bits - 1) + slack)
    # the extreme coordinate is a point of the grid
    assert error[np.abs(target).argmax()] <= slack


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 4e37])
@pytest.mark.parametrize("bits", [1, 4, 16])
def test_the_grid_at_the_ends_of_float32(value: float, bits: int) -> None:
    """Denormal numbers may vanish, nothing becomes infinite or NaN. (Above 4e37 XLA loses the reciprocal of the step.)"""
    target = np.array([value, -value, 0, value / 2], np.float32)
    grid = compressors.grid(bits)
    decoded = np.asarray(decode(grid, encode(grid, target), target), np.float64)
    assert np.all(np.abs(decoded - target) <= value / (2**bits - 1) * (1 + 1e-3) + np.finfo(np.float32).tiny)


def test_the_grid_by_hand() -> None:
    """2 bits over [-3, 3]: the points -3, -1, 1, 3 in steps of 2; a tie goes up."""
    target = jnp.array([3, -3, 0, 0.1, -0.1, 1.9, 2, -2])
    grid = compressors.grid(2)
    payload = grid.encode(target, KEYS)
    np.testing.assert_array_equal(payload["codes"], [3, 0, 2, 2, 1, 2, 3, 1])
    np.testing.assert_array_equal(grid.decode(payload, target), [3, -3, 1, 1, -1, 1, 3, -1])
    assert 8 * wire_format.message_bytes(grid.wire_fields(payload, target)) == 32 + 16


@given(vectors, st.integers(1, 16), st.integers(0, 15))
def test_the_adaptive_grid_chooses_between_its_bounds(drawn: Any, least: int, more: int) -> None:
    target, most = vector(*drawn), min(least + more, 16)
    scheme = compressors.adaptive_grid(least, most)
    payload = encode(scheme, target)
    bits = int(payload["bits"])
    assert least <= bits <= most
    assert bits == least or target.any()
    assert (
        8 * wire_format.message_bytes(scheme.wire_fields(payload, target)) == -(-(8 + 32 + bits * target.size) // 8) * 8
    )
    np.testing.assert_array_equal(decode(scheme, payload, target), decode(compressors.grid(bits), payload, target))


def test_the_adaptive_grid_takes_more_bits_for_a_spike() -> None:
    """radius sqrt(p) / norm is 1 for a flat vector and sqrt(p) = 64 for a single spike."""
    scheme = compressors.adaptive_grid(1, 16)
    flat, spike = np.ones(4096, np.float32), np.eye(1, 4096, dtype=np.float32)[0]
    assert [int(scheme.encode(jnp.asarray(v), KEYS)["bits"]) for v in (flat, spike)] == [1, 6]


# ---- unbiased, contractive ---------------------------------------------------------------------------------------

P = 21
UNBIASED: dict[str, tuple[Any, Any]] = {  # and omega: E ||decode - target||^2 <= omega ||target||^2
    "qsgd-1": (compressors.qsgd(1), np.sqrt(P)),
    "qsgd-5": (compressors.qsgd(5), P / 25),
    "ternary": (compressors.ternary(), None),
    "rand_k": (compressors.rand_k(4), P / 4 - 1),
    "natural": (compressors.natural(), 1 / 8),
    "sampled": (compressors.optimal_sparsifier(0.3), None),
    "blockwise": (compressors.blockwise(compressors.natural(), (4, 17)), 1 / 8),
}
DRAWS = 4000


@jax.jit
def draws(scheme: Any, target: Any) -> Any:
    """Decoded messages of as many keys."""
    own = jax.random.split(KEY, DRAWS)
    return jax.vmap(
        lambda key: scheme.decode(
            scheme.encode(target, types.RoundKeys(key, key, key, jnp.int32(1), jnp.int32(0))), target
        )
    )(own)


@pytest.mark.parametrize("name", UNBIASED)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1), scale=st.integers(-8, 8))
def test_the_mean_of_many_messages_is_the_vector(name: str, seed: int, scale: int) -> None:
    """Each coordinate's mean is within 6 of its standard errors, and the variance within its bound."""
    scheme, omega = UNBIASED[name]
    target = vector(seed, P, scale)
    decoded = np.asarray(draws(scheme, target), np.float64)
    assert not decoded[:, target == 0].any()
    error = decoded - target
    # what is hardly ever sent may have a sample without spread: no less than one message in DRAWS
    spread = np.maximum(decoded.std(axis=0), np.abs(decoded).max() / np.sqrt(DRAWS))
    assert np.all(np.abs(error.mean(axis=0)) <= 6 * spread / np.sqrt(DRAWS) + 1e-6 * np.abs(target))
    if omega is not None:
        lost = np.sum(error**2, axis=1)
        assert lost.mean() <= omega * np.sum(target.astype(np.float64) ** 2) + 6 * lost.std() / np.sqrt(DRAWS)


def test_the_variance_of_rand_k_is_its_bound() -> None:
    target = vector(0, P, 0)
    lost = np.sum((np.asarray(draws(compressors.rand_k(4), target), np.float64) - target) ** 2, axis=1)
    np.testing.assert_allclose(lost.mean(), (P / 4 - 1) * np.sum(target**2), rtol=0.1)


@given(vectors, st.sampled_from([1, 5]))
def test_what_is_lost_is_less_than_there_was(drawn: Any, k: int) -> None:
    """top_k: delta = k / p. sign: ||target||_1^2 / (p ||target||^2), exactly where there is no zero."""
    target = vector(drawn[0], drawn[1], 0)
    k = min(k, target.size)
    size = np.sum(target.astype(np.float64) ** 2)
    top, sign = compressors.top_k(k), compressors.sign()
    lost = [np.sum((target.astype(np.float64) - decode(s, encode(s, target), target)) ** 2) for s in (top, sign)]
    assert lost[0] <= (1 - k / target.size) * size * (1 + 1e-6)
    assert lost[1] <= size - np.sum(np.abs(target)) ** 2 / target.size + 1e-5 * size


def test_the_largest_are_kept_as_they_are() -> None:
    target = jnp.array([1.0, -5, 0, 3, -2])
    decoded = compressors.top_k(2).decode(compressors.top_k(2).encode(target, KEYS), target)
    np.testing.assert_array_equal(decoded, [0, -5, 0, 3, 0])


def test_the_largest_of_each_chunk_are_kept() -> None:
    """Of equal ones the first; of the short last chunk what it has; zeros where a chunk has nothing else."""
    target = jnp.array([1.0, -1, 1, 1, 0, 0, 0, 0, 3])
    top = compressors.chunked_top_k(4, 2)
    payload = top.encode(target, KEYS)
    np.testing.assert_array_equal(payload["index"], [0, 1, 0, 1, 0])
    np.testing.assert_array_equal(top.decode(payload, target), [1, -1, 0, 0, 0, 0, 0, 0, 3])
    # one radius for all values; the grid has no zero, so a chunk of zeros sends half a step
    low = compressors.quantized_values(top, compressors.grid(2))
    decoded = low.decode(low.encode(target, KEYS), target)
    np.testing.assert_array_equal(decoded, [1, -1, 0, 0, 1, 1, 0, 0, 3])


@pytest.mark.parametrize(("bits", "sigmas", "size"), [(1, 1.5, 21), (2, 3.0, 1), (8, 2.0, 63)])
def test_bins_are_those_of_the_equations(bits: int, sigmas: float, size: int) -> None:
    with jax.enable_x64(True):
        scheme, twin = compressors.statistical_grid(bits, sigmas), local_twins.statistical_grid(bits, sigmas)
        for target in (vector(5, size, 0, np.float64), np.full(size, 0.3)):
            decoded = scheme.decode(scheme.encode(jnp.asarray(target), KEYS), target)
            np.testing.assert_allclose(decoded, twin(target), rtol=1e-12, atol=1e-15)
            np.testing.assert_allclose(np.mean(decoded), np.mean(target), rtol=1e-12)  # bin means keep it


@given(st.integers(0, 2**32 - 1))
def test_ternary_has_three_values(seed: int) -> None:
    target = vector(seed, 63, 0)
    decoded = np.asarray(decode(compressors.ternary(), encode(compressors.ternary(), target), target))
    assert set(np.unique(decoded)) <= {np.abs(target).max(), 0, -np.abs(target).max()}
    assert np.sum(decoded == 0) > np.sum(target == 0)
    assert decoded.any() == target.any()


@given(vectors)
def test_natural_gives_powers_of_two(drawn: Any) -> None:
    """The two around each coordinate, and the coordinate itself only where it is one."""
    target = np.append(vector(*drawn), np.ldexp(np.float32(1), np.arange(-20, 20)))
    decoded = np.asarray(decode(compressors.natural(), encode(compressors.natural(), target), target))
    there = (target != 0) & (np.abs(target) >= np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(np.sign(decoded[there]), np.sign(target[there]))
    fraction, _ = np.frexp(np.abs(decoded[there]))
    assert np.all(fraction == 0.5)
    ratio = np.abs(decoded[there].astype(np.float64) / target[there])
    assert np.all((ratio > 0.5) & (ratio < 2))
    power = np.frexp(np.abs(target[there]))[0] == 0.5  # is sent as it is
    np.testing.assert_array_equal(decoded[there] == target[there], power)


@given(st.integers(0, 2**32 - 1))
def test_sampled_keeps_about_its_share(seed: int) -> None:
    """On average the density, no matter how heavy the tail; the largest is not scaled down."""
    target = np.random.default_rng(seed).standard_t(3, P).astype(np.float32)
    kept = np.asarray(draws(compressors.optimal_sparsifier(0.3), target)) != 0
    assert abs(kept.sum(axis=1).mean() / (0.3 * P) - 1) < 0.15


@jax.jit
def chances(scheme: compressors.OptimalSparsifier, target: jax.Array) -> jax.Array:
    return scheme.inclusion_probabilities(target)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6, 0.9])
@given(st.integers(0, 2**32 - 1))
def test_the_chances_of_sampled_add_up_to_its_share(density: float, seed: int) -> None:
    """On heavy tails too, where most of the budget goes to coordinates that are certain."""
    target = jnp.asarray(np.random.default_rng(seed).standard_cauchy(200), jnp.float32)
    chance = chances(compressors.optimal_sparsifier(density), target)
    assert float(jnp.sum(chance)) == pytest.approx(density * 200, rel=1e-5)
    free = np.asarray(chance) < 1
    share = np.asarray(chance)[free] / np.abs(np.asarray(target))[free]
    np.testing.assert_allclose(share, share[0], rtol=1e-4)  # the others in proportion to their size
    assert np.abs(target)[~free].min(initial=np.inf) * share[0] >= 1 - 1e-4  # and nobody is certain without need


def test_each_block_has_its_own_radius() -> None:
    target = jnp.array([1.0, -1, 0.5, 100, -50, 1, 1])
    scheme = compressors.blockwise(compressors.grid(4), (3, 4))
    payload = scheme.encode(target, KEYS)
    assert [float(payload[i]["radius"]) for i in ("0", "1")] == [1, 100]
    decoded = scheme.decode(payload, target)
    assert np.abs(decoded - target)[:3].max() <= 1 / 15 + 1e-6
    assert 8 * wire_format.message_bytes(scheme.wire_fields(payload, target)) == -(-(2 * 32 + 4 * 7) // 8) * 8
    with pytest.raises(ValueError, match=r"blockwise sizes = \(3, 3\), sum 6: must be of sum p = 7"):
        compressors.blockwise(compressors.grid(4), (3, 3)).encode(target, KEYS)


def test_blocks_draw_on_their_own() -> None:
    scheme = compressors.blockwise(compressors.rand_k(3), (30, 30))
    payload = scheme.encode(jnp.ones(60), KEYS)
    assert set(np.asarray(payload["0"]["index"])) != set(np.asarray(payload["1"]["index"]))


# ---- bills -------------------------------------------------------------------------------------------------------


def kept_of_chunks(size: int) -> int:
    """Return how many numbers 2 of each 4 are, of which the last may be fewer."""
    return 2 * (size // 4) + min(2, size % 4)


SCHEMES: dict[str, tuple[Any, Any]] = {  # and its bits before they are rounded up to bytes: of p, float bits f
    "identity": (compressors.identity(), lambda p, f: f * p),
    **{f"grid-{bits}": (compressors.grid(bits), lambda p, f, b=bits: f + b * p) for bits in range(1, 17)},
    "adaptive": (compressors.adaptive_grid(5, 5), lambda p, f: 8 + f + 5 * p),
    "qsgd-1": (compressors.qsgd(1), lambda p, f: f + 2 * p),
    "qsgd-7": (compressors.qsgd(7), lambda p, f: f + 4 * p),
    "qsgd-8": (compressors.qsgd(8), lambda p, f: f + 5 * p),
    "qsgd-65535": (compressors.qsgd(65535), lambda p, f: f + 17 * p),
    "ternary": (compressors.ternary(), lambda p, f: f + 2 * p),
    "sign": (compressors.sign(), lambda p, f: f + p),
    "sign-alone": (compressors.sign(scaled=False), lambda p, f: p),
    "natural": (compressors.natural(), lambda p, f: (9 if f == 32 else 12) * p),
    "top_k": (compressors.top_k(1), lambda p, f: f + max(int(np.ceil(np.log2(p))), 1)),
    "rand_k": (compressors.rand_k(1), lambda p, f: f + max(int(np.ceil(np.log2(p))), 1)),
    "chunked_top_k": (compressors.chunked_top_k(4, 2), lambda p, f: (f + 2) * kept_of_chunks(p)),
    "chunks-of-5": (compressors.chunked_top_k(5, 5), lambda p, f: (f + 3) * p),
    "values-2": (
        compressors.quantized_values(compressors.chunked_top_k(4, 2), compressors.grid(2)),
        lambda p, f: f + (2 + 2) * kept_of_chunks(p),
    ),
    "values-bins": (
        compressors.quantized_values(compressors.top_k(1), compressors.statistical_grid(3, 2.0)),
        lambda p, f: 8 * f + 3 + max(int(np.ceil(np.log2(p))), 1),
    ),
    "bins-1": (compressors.statistical_grid(1), lambda p, f: 2 * f + p),
    "bins-4": (compressors.statistical_grid(4, 1.5), lambda p, f: 16 * f + 4 * p),
    "sampled": (compressors.optimal_sparsifier(0.3), None),
    "coin-never": (compressors.bernoulli_full(compressors.grid(3), 1e-9), lambda p, f: 1 + f + 3 * p),
    "coin-always": (compressors.bernoulli_full(compressors.grid(3), 1), lambda p, f: 1 + f * p),
    "coin-natural": (compressors.bernoulli_full(compressors.natural(), 1), lambda p, f: 1 + f * p),
    "coin-top_k": (compressors.bernoulli_full(compressors.top_k(1), 1), lambda p, f: 1 + f * p),
    "coin-sampled": (compressors.bernoulli_full(compressors.optimal_sparsifier(0.5), 1), lambda p, f: 1 + f * p),
}


@pytest.mark.parametrize(("size", "dtype"), [(1, np.float32), (21, np.float32), (21, np.float64)])
@pytest.mark.parametrize("name", SCHEMES)
def test_the_bytes_are_the_message(name: str, size: int, dtype: type) -> None:
    """As many as billed, no more than the scheme says, and what they decode to is what the sender decoded."""
    scheme, formula = SCHEMES[name]
    with jax.enable_x64(dtype is np.float64):
        for like in (vector(3, size, 0, dtype), np.zeros(size, dtype)):
            target = jnp.asarray(like)
            payload = scheme.encode(target, KEYS)
            data = wire_format.to_bytes(scheme, payload, target)
            assert len(data) == wire_format.message_bytes(scheme.wire_fields(payload, target))
            if formula:
                assert len(data) == -(-formula(size, 8 * like.itemsize) // 8)
            decoded = np.asarray(scheme.decode(payload, target))
            np.testing.assert_array_equal(
                np.asarray(wire_format.from_bytes(scheme, data, target)), decoded, strict=True
            )
            assert decoded.dtype == dtype
            assert np.all(np.isfinite(decoded))
            if not like.any() and name != "sign-alone":  # one bit has no zero
                assert not decoded.any()


@settings(max_examples=60)
@given(st.sampled_from(sorted(SCHEMES)), st.sampled_from([1, 21]), st.binary(max_size=60))
def test_other_bytes_are_refused_in_words(name: str, size: int, data: bytes) -> None:
    """What is no message raises ValueError and nothing else."""
    scheme, like = SCHEMES[name][0], jnp.zeros(size)
    with contextlib.suppress(ValueError):
        assert wire_format.from_bytes(scheme, data, like).shape == like.shape
    target = jnp.asarray(vector(0, size, 0))
    message = wire_format.to_bytes(scheme, scheme.encode(target, KEYS), target)
    for wrong in (message + b"\0", message[:-1]):
        with pytest.raises(ValueError, match="a message of"):
            wire_format.from_bytes(scheme, wrong, like)


class Fields:
    """Whole numbers of given widths; what is read is left in `read`."""

    def __init__(self, widths: tuple[int, ...], counts: tuple[int, ...]) -> None:
        self.widths, self.counts, self.read = widths, counts, {}

    def encode(self, target: Any, keys: Any) -> Any:
        return {str(i): jnp.zeros(n, jnp.int32) for i, n in enumerate(self.counts)}

    def wire_fields(self, payload: Any, like: Any) -> Any:
        for i, (width, count) in enumerate(zip(self.widths, self.counts, strict=True)):
            yield types.WireField(payload, str(i), jax.ShapeDtypeStruct((count,), np.int32), width)

    def decode(self, payload: Any, like: Any) -> Any:
        self.read = payload
        return jnp.zeros(1)


@pytest.mark.parametrize("first", range(1, 9))
def test_fields_stand_bit_by_bit(first: int) -> None:
    """A field of any width after one that ends within a byte: all numbers come back, and no bit is lost between them."""
    rng, counts = np.random.default_rng(first), (first, 13, 1, 21)
    for width in range(1, 32):
        scheme = Fields((1, width, 3, 7), counts)
        numbers = {str(i): rng.integers(0, 2**w, n) for i, (w, n) in enumerate(zip(scheme.widths, counts, strict=True))}
        data = wire_format.to_bytes(scheme, numbers, None)
        assert len(data) == -(-sum(w * n for w, n in zip(scheme.widths, counts, strict=True)) // 8)
        wire_format.from_bytes(scheme, data, None)
        for name, expected in numbers.items():
            np.testing.assert_array_equal(scheme.read[name], expected)


def test_a_sampled_message_bills_what_it_holds() -> None:
    scheme, target = compressors.optimal_sparsifier(0.3), jnp.asarray(vector(0, 63, 0))
    bills = set()
    for key in jax.random.split(KEY, 6):
        payload = encode(scheme, target, types.RoundKeys(key, key, key, jnp.int32(1), jnp.int32(0)))
        kept = int(np.sum(np.asarray(payload["kept"])))
        bills.add(int(8 * wire_format.message_bytes(scheme.wire_fields(payload, target))))
        assert 8 * wire_format.message_bytes(scheme.wire_fields(payload, target)) == 64 + 32 * kept
    assert len(bills) > 1


@pytest.mark.parametrize("size", [63, 7850])
def test_nothing_is_sent_of_nothing(size: int) -> None:
    """A zero vector is its bitmap, a spike the bitmap and one number: what is certain leaves nothing to share out."""
    scheme = compressors.optimal_sparsifier(0.3)
    for target, kept in ((jnp.zeros(size), 0), (jnp.zeros(size).at[3].set(5), 1)):
        payload = scheme.encode(target, KEYS)
        assert 8 * wire_format.message_bytes(scheme.wire_fields(payload, target)) == -(-size // 8) * 8 + 32 * kept
        np.testing.assert_array_equal(scheme.decode(payload, target), target)


def test_any_float_travels_as_it_is() -> None:
    target = jnp.asarray([1.5, 0.3, -7.0], jnp.bfloat16)
    scheme = compressors.identity()
    data = wire_format.to_bytes(scheme, scheme.encode(target, KEYS), target)
    assert len(data) == 6
    np.testing.assert_array_equal(wire_format.from_bytes(scheme, data, target), target)


def test_indices_are_billed() -> None:
    """17 coordinates need 5 bits each to be named, 16 need 4."""
    for size, width in ((16, 4), (17, 5), (7850, 13)):
        target = jnp.arange(1.0, size + 1)
        for scheme in (compressors.top_k(8), compressors.rand_k(8)):
            assert 8 * wire_format.message_bytes(scheme.wire_fields(scheme.encode(target, KEYS), target)) == 8 * (
                32 + width
            )
