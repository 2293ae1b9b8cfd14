"""A decoder-only transformer on the bytes of Python's own help texts, as data and problem for any command:

    python -m experiments.sweep --problem experiments/examples/language_model.py:make --dataset experiments/examples/language_model.py:load \\
        --partition contiguous --workers 4 --algorithm diloco --lr 0.7 --rounds 20 --out results/language

The text is `pydoc_data.topics`, which is part of CPython. Its topics are cut into rows of 64 bytes, in the order of their
names, so consecutive rows are about the same topic. The last tenth of each topic is test data.
"""

import hashlib
import pydoc_data.topics

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 128, 64, 64, 4, 4
TEXTS = [text for _, text in sorted(pydoc_data.topics.topics.items())]


def text_digest():
    """Return 12 digits of the hash of the text, which differs between versions of Python."""
    return hashlib.sha256("".join(TEXTS).encode()).hexdigest()[:12]


def load():
    """Return bytes [N, 64] and the bytes that follow them [N, 64], of the training rows and of the test rows."""
    train, test = [], []
    for text in TEXTS:
        tokens = np.minimum(np.frombuffer(text.encode(), np.uint8), VOCABULARY - 1)
        rows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT + 1)[::CONTEXT]
        held_out = len(rows) // 10
        train.append(rows[: len(rows) - held_out])
        test.append(rows[len(rows) - held_out :])
    train_rows, test_rows = (np.concatenate(rows).astype(np.int32) for rows in (train, test))
    return train_rows[:, :-1], train_rows[:, 1:], test_rows[:, :-1], test_rows[:, 1:]


class Block(eqx.Module):
    heads: eqx.nn.MultiheadAttention
    network: eqx.nn.MLP
    norms: list

    def __init__(self, key):
        keys = jax.random.split(key)
        self.heads = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0])
        self.network = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=keys[1])
        self.norms = [eqx.nn.LayerNorm(WIDTH) for _ in range(2)]

    def __call__(self, h):
        now = jax.vmap(self.norms[0])(h)
        h = h + self.heads(now, now, now, mask=jnp.tril(jnp.ones((len(h), len(h)), bool)))
        return h + jax.vmap(lambda a: self.network(self.norms[1](a)))(h)


class LanguageModel(eqx.Module):
    embedding: jax.Array
    positions: jax.Array
    blocks: Block  # of all layers, stacked: each leaf has an axis of layers in front
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jax.random.split(key, LAYERS + 2)
        self.embedding = 0.1 * jax.random.normal(keys[0], (VOCABULARY, WIDTH))
        self.positions = 0.1 * jax.random.normal(keys[1], (CONTEXT, WIDTH))
        self.blocks = eqx.filter_vmap(Block)(keys[2:])
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, tokens):
        layers, functions = eqx.partition(self.blocks, eqx.is_array)

        def apply(h, layer):
            return eqx.combine(layer, functions)(h), None

        h, _ = jax.lax.scan(apply, self.embedding[tokens] + self.positions, layers)
        return jax.vmap(self.norm)(h) @ self.embedding.T


def init_params(seed):
    return eqx.partition(LanguageModel(jax.random.key(seed)), eqx.is_array)[0]


def loss(params, x, y):
    """Return the mean cross-entropy of the bytes of each row, in nats per byte."""
    model = eqx.combine(params, eqx.filter_eval_shape(LanguageModel, jax.random.key(0)))  # with its functions
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(axis=1)


def make(data):
    return loss, init_params
