"""Every compressor: what it may lose, and that its bytes are all that travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KEY
from hypothesis import given, settings
from hypothesis import strategies as st

from laqjax import compressors

BITS = st.integers(1, 16)
SIZES = [1, 7, 8, 63]
vectors = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from(SIZES), st.integers(-28, 28))

encode = jax.jit(lambda scheme, target: scheme.encode(target, KEY))
decode = jax.jit(lambda scheme, message, like: scheme.decode(message, like))
pack = jax.jit(compressors.pack, static_argnums=1)  # jitted for speed: each new size compiles
unpack = jax.jit(compressors.unpack, static_argnums=(1, 2))


def vector(seed: int, size: int, scale: int, dtype: type = np.float32) -> np.ndarray:
    """Heavy tails, some exact zeros, of magnitude 10^scale."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, size) * 10.0**scale
    return np.where(rng.random(size) < 0.3, 0, values).astype(dtype)


@given(BITS, vectors)
def test_the_grid_is_within_half_a_step(bits: int, drawn: tuple[int, int, int]) -> None:
    check_grid(bits, vector(*drawn))


@given(BITS, vectors)
def test_the_grid_is_within_half_a_step_in_float64(bits: int, drawn: tuple[int, int, int]) -> None:
    with jax.enable_x64(True):
        check_grid(bits, vector(*drawn, np.float64))


def check_grid(bits: int, target: np.ndarray) -> None:
    grid = compressors.grid(bits)
    message = encode(grid, target)
    codes, radius = np.asarray(message.payload["codes"]), message.payload["radius"]
    decoded = np.asarray(decode(grid, message, target))
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
    message = grid.encode(target, KEY)
    np.testing.assert_array_equal(message.payload["codes"], [3, 0, 2, 2, 1, 2, 3, 1])
    np.testing.assert_array_equal(grid.decode(message, target), [3, -3, 1, 1, -1, 1, 3, -1])
    assert message.bits == 32 + 16


@settings(max_examples=30)
@given(BITS, st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_pack_is_dense_and_unpack_its_inverse(bits: int, size: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(np.uint16)
    codes[:2] = [0, 2**bits - 1][:size]
    data = pack(codes, bits)
    assert data.dtype == np.uint8
    assert data.size == -(-size * bits // 8)
    np.testing.assert_array_equal(unpack(data, bits, size), codes)


SCHEMES = {"identity": compressors.identity()} | {f"grid-{bits}": compressors.grid(bits) for bits in (3, 16)}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [1, 21])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bytes_are_the_message(name: str, size: int, dtype: type) -> None:
    with jax.enable_x64(dtype is np.float64):
        scheme, like = SCHEMES[name], vector(0, size, 0, dtype)
        message = encode(scheme, like)
        data = scheme.pack(message)
        back = scheme.unpack(data, like)
        assert 8 * len(data) == message.bits == back.bits
        for key, sent in message.payload.items():
            np.testing.assert_array_equal(np.asarray(sent), np.asarray(back.payload[key]), strict=True)
        np.testing.assert_array_equal(decode(scheme, back, like), decode(scheme, message, like))
