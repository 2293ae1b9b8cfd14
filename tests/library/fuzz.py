"""atheris over the decoder: `make fuzz`. No bytes may raise anything but ValueError, and what is read has the right shape."""

import sys

import atheris  # pyright: ignore[reportMissingModuleSource]

with atheris.instrument_imports(include=["laqjax"]):  # pyright: ignore[reportAttributeAccessIssue]
    import jax.numpy as jnp

    from laqjax import compressors
    from laqjax._core import wire_format

LIKE = jnp.zeros(21)
SCHEMES = [
    *(compressors.grid(bits) for bits in (1, 3, 4, 8, 13, 16)),
    compressors.adaptive_grid(1, 16),
    compressors.qsgd(7),
    compressors.ternary(),
    compressors.sign(),
    compressors.natural(),
    compressors.top_k(5),
    compressors.optimal_sparsifier(0.3),
    compressors.bernoulli_full(compressors.top_k(5), 0.5),
    compressors.blockwise(compressors.grid(3), (4, 17)),
]


def one(data: bytes) -> None:
    """The first byte chooses the compressor."""
    scheme = SCHEMES[data[0] % len(SCHEMES) if data else 0]
    try:
        decoded = wire_format.from_bytes(scheme, data[1:], LIKE)
    except ValueError:
        return
    assert decoded.shape == LIKE.shape


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
