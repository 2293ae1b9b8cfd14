"""A flax CNN on images, for any command:

    python -m experiments.sweep --problem experiments/examples/flax_cnn.py:make --dataset mnist \\
        --partition dirichlet:0.3 -b 2 4 8 -C 10 100 --lr 0.02 --target-accuracy 0.9 0.95 --out results/cnn
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (5, 5), strides=2)(x.reshape(-1, 28, 28, 1) / 255))
        x = nn.relu(nn.Conv(16, (5, 5), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def make(data):
    def logits(params, x) -> Any:
        return Net().apply(params, x)

    def loss(params, x, y):  # of each row
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)

    def start(seed):
        return Net().init(jax.random.key(seed), data.x[:1])

    def accuracy(params, x, y):
        return jnp.mean(logits(params, x).argmax(axis=1) == y)

    return loss, start, accuracy
