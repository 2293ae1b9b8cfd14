"""An equinox transformer that learns to copy: after a separator, the tokens before it. Data, model and problem of your own:

    python -m experiments.sweep --problem experiments/examples/equinox_transformer.py:make --dataset experiments/examples/equinox_transformer.py:load \\
        --partition unequal:4 -b 2 4 8 -C 10 100 --lr 0.05 --target-accuracy 0.5 --out results/tokens
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

WORDS, HALF, SIZE = 16, 8, 32


def load():
    tokens = np.random.default_rng(0).integers(1, WORDS, (1200, HALF)).astype(np.int32)
    row = np.concatenate([tokens, 0 * tokens[:, :1], tokens[:, :-1]], axis=1)
    x = {"tokens": row, "mask": np.broadcast_to(np.arange(2 * HALF) >= HALF, row.shape)}
    y = np.concatenate([0 * tokens, tokens], axis=1)
    parts = [jax.tree.map(lambda a, s=s: a[s], (x, y)) for s in (slice(1000), slice(1000, None))]
    return *parts[0], *parts[1]


class Block(eqx.Module):
    embed: jax.Array
    place: jax.Array
    heads: eqx.nn.MultiheadAttention
    out: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = 0.3 * jax.random.normal(keys[0], (WORDS, SIZE))
        self.place = 0.3 * jax.random.normal(keys[1], (2 * HALF, SIZE))
        self.heads = eqx.nn.MultiheadAttention(4, SIZE, key=keys[2])
        self.out = eqx.nn.MLP(SIZE, WORDS, 2 * SIZE, 1, key=keys[3])

    def __call__(self, tokens):
        h = self.embed[tokens] + self.place
        return jax.vmap(self.out)(h + self.heads(h, h, h, mask=jnp.tril(jnp.ones((2 * HALF, 2 * HALF), bool))))


def make(data):
    static = eqx.partition(Block(jax.random.key(0)), eqx.is_array)[1]

    def logits(params, x):
        return jax.vmap(eqx.combine(params, static))(x["tokens"])

    def loss(params, x, y):  # of each row
        each = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)
        return jnp.sum(jnp.where(x["mask"], each, 0), axis=1) / HALF

    def start(seed):
        return eqx.partition(Block(jax.random.key(seed)), eqx.is_array)[0]

    def accuracy(params, x, y):
        return jnp.mean(logits(params, x).argmax(-1) == y, where=x["mask"])

    return loss, start, accuracy
