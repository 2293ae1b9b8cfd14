"""Samplers: minibatches, that is, the examples of its shard that a worker uses in a round.

A sampler implements `laqjax.types.Sampler`. It keeps no state: its draws depend on the key of the run, the round and
the worker. A resumed run therefore selects the same examples.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from laqjax.types import RoundKeys, Shards, register_dataclass, static_field

__all__ = ["BlockSampler", "ExampleSelection", "ShuffleSampler"]


@dataclass(frozen=True)
class ExampleSelection:
    """Selection of `size` examples of a shard: consecutive ones from `start` on, or those listed in `index`.

    Attributes:
        size: number of examples.
        start: first of the consecutive examples, an integer scalar. None where `index` is given.
        index: numbers of the examples in the shard, [size]. None where `start` is given.
    """

    size: int
    start: Int[Array, ""] | None = None
    index: Int[Array, " size"] | None = None

    def slice(self, t: Any, size: int) -> "ExampleSelection":
        """Return part `t` of the selection, cut into parts of `size` examples.

        Args:
            t: number of the part, counted from 0; may be traced.
            size: examples of a part.

        Returns:
            The examples `t size` to `(t + 1) size - 1` of this selection.
        """
        if self.index is None:
            assert self.start is not None
            return ExampleSelection(size, start=self.start + t * size)
        return ExampleSelection(size, index=jax.lax.dynamic_slice(self.index, (t * size,), (size,)))


@register_dataclass
@dataclass(frozen=True)
class BlockSampler:
    """Sampler that draws one of the fixed blocks of a shard in every round, as the authors' program does.

    A shard is cut into blocks of `size` consecutive examples. Examples after the last full block are never drawn.

    Attributes:
        size: examples of a minibatch.
    """

    size: int = static_field()

    def __call__(self, keys: RoundKeys, shards: Shards) -> ExampleSelection:
        blocks = jnp.maximum(_num_valid_examples(shards, keys.shard) // self.size, 1)
        block = jax.random.randint(_sampling_key(keys.worker_key), (), 0, blocks, jnp.int32)
        return ExampleSelection(self.size, start=self.size * block)


@register_dataclass
@dataclass(frozen=True)
class ShuffleSampler:
    """Sampler without replacement: it shuffles the shard in each epoch and takes `size` further examples in each round.

    An epoch has as many rounds as there are full minibatches in the shard. The examples that are left over are skipped.

    Attributes:
        size: examples of a minibatch.
    """

    size: int = static_field()

    def __call__(self, keys: RoundKeys, shards: Shards) -> ExampleSelection:
        count = _num_valid_examples(shards, keys.shard)
        rounds = jnp.maximum(count // self.size, 1)
        key = jax.random.fold_in(jax.random.fold_in(_sampling_key(keys.run_key), keys.round // rounds), keys.worker)
        length = shards.weight.shape[1]
        draws = jax.random.uniform(key, (length,), jnp.float32)
        place = jnp.where(jnp.arange(length, dtype=jnp.int32) < count, draws, 2)
        order = jnp.argsort(place)  # padding comes last, because its key 2 is above every uniform draw
        first = keys.round % rounds * self.size
        return ExampleSelection(self.size, index=jax.lax.dynamic_slice(order, (first,), (self.size,)))


def _num_valid_examples(shards: Shards, shard: Any) -> Int[Array, ""]:
    """Return the number of examples of a shard that are not padding (padding comes at the end of a shard)."""
    return jnp.sum(shards.weight[shard] > 0, dtype=jnp.int32)


def _sampling_key(key: PRNGKeyArray) -> PRNGKeyArray:
    """Derive the key of the sampler, because the compressor draws from `key` itself."""
    return jax.random.fold_in(key, 0xFFFF5A5A)  # larger than the number of any round or worker
