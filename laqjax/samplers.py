"""Samplers: which rows of its shard a worker uses in a round."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from laqjax.types import RoundKeys, Shards, register_dataclass, static_field

__all__ = ["BlockSampler", "RowSelection", "ShuffleSampler"]


@dataclass(frozen=True)
class RowSelection:
    """`size` rows of a shard: a run from `start`, or those of `index` [size]."""

    size: int
    start: Int[Array, ""] | None = None
    index: Int[Array, " size"] | None = None

    def slice(self, t: Any, size: int) -> "RowSelection":
        """The `size` of them from t size on."""
        if self.index is None:
            assert self.start is not None
            return RowSelection(size, start=self.start + t * size)
        return RowSelection(size, index=jax.lax.dynamic_slice(self.index, (t * size,), (size,)))


@register_dataclass
@dataclass(frozen=True)
class BlockSampler:
    """Minibatches as the authors draw them: one of the shard's fixed runs of `size` rows, at random, every round."""

    size: int = static_field()

    def __call__(self, keys: RoundKeys, shards: Shards) -> RowSelection:
        blocks = jnp.maximum(_num_valid_rows(shards, keys.shard) // self.size, 1)
        return RowSelection(
            self.size, start=self.size * jax.random.randint(_sampling_key(keys.worker_key), (), 0, blocks, jnp.int32)
        )


@register_dataclass
@dataclass(frozen=True)
class ShuffleSampler:
    """Minibatches without replacement: the shard in a new random order each epoch, `size` rows a round."""

    size: int = static_field()

    def __call__(self, keys: RoundKeys, shards: Shards) -> RowSelection:
        rows = _num_valid_rows(shards, keys.shard)
        rounds = jnp.maximum(rows // self.size, 1)
        key = jax.random.fold_in(jax.random.fold_in(_sampling_key(keys.run_key), keys.round // rounds), keys.worker)
        length = shards.weight.shape[1]
        place = jnp.where(
            jnp.arange(length, dtype=jnp.int32) < rows, jax.random.uniform(key, (length,), jnp.float32), 2
        )
        order = jnp.argsort(place)  # padding comes last
        return RowSelection(
            self.size, index=jax.lax.dynamic_slice(order, (keys.round % rounds * self.size,), (self.size,))
        )


def _num_valid_rows(shards: Shards, worker: Any) -> Int[Array, ""]:
    """Rows of a worker that are not padding (which stands at the end)."""
    return jnp.sum(shards.weight[worker] > 0, dtype=jnp.int32)


def _sampling_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """The sample's own stream: the compressor draws from the key itself."""
    return jax.random.fold_in(key, 0xFFFF5A5A)  # no round and no worker has this number
