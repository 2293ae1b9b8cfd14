"""Algorithm 1 in plain NumPy float64, worker by worker: to be held beside the paper (LAQ, NeurIPS 2019, Algorithm 2).

`quantize` and `lazy` switch its two ideas: GD has neither, QGD quantizes, LAG is lazy, LAQ is both.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# the settings of the authors' program
AUTHORS: dict[str, Any] = dict(
    lr=0.02, bits=4, xi=0.8, window=10, max_silence=100, rescale_short_history=True, force_first_upload=False
)
AUTHORS_L2 = 0.01


class History(NamedTuple):
    loss: np.ndarray  # [K] mean over workers, before each step
    sent: np.ndarray  # [K, M]
    theta: np.ndarray  # [p] after the last step


def softmax_regression(theta: np.ndarray, x: np.ndarray, y: np.ndarray, classes: int, l2: float):
    """Mean cross-entropy + (l2 / 2) ||theta||^2 and its gradient; theta = bias [classes], weight [classes, pixels]."""
    bias, weight = theta[:classes], theta[classes:].reshape(classes, -1)
    logits = x @ weight.T + bias
    logits -= logits.max(axis=1, keepdims=True)
    probability = np.exp(logits)
    probability /= probability.sum(axis=1, keepdims=True)
    mine = np.arange(len(y)), y
    loss = -np.log(probability[mine]).mean() + l2 / 2 * theta @ theta
    probability[mine] -= 1
    grad = np.concatenate([probability.sum(axis=0), (x.T @ probability).T.ravel()]) / len(y)
    return loss, grad + l2 * theta


def quantized(target: np.ndarray, bits: int) -> np.ndarray:
    """The nearest points of a grid of 2^bits points over [-radius, radius]."""
    radius = np.abs(target).max()
    if radius == 0:
        return np.zeros_like(target)
    step = 2 * radius / (2**bits - 1)
    codes = np.floor(target / step + 2 ** (bits - 1))
    return step * (codes - (2**bits - 1) / 2)


def run(
    theta: np.ndarray,
    workers: Sequence[tuple[np.ndarray, np.ndarray]],  # (x [n, pixels] in 0..1, y [n]) of each
    rounds: int,
    *,
    lr: float,
    classes: int,
    l2: float = AUTHORS_L2,
    quantize: bool = True,
    lazy: bool = True,
    bits: int = 4,
    xi: Any = 0.8,  # weights xi_d, or one number: the sum of equal ones
    window: int = 10,
    max_silence: float = 100,
    rescale_short_history: bool = False,
    force_first_upload: bool = True,
) -> History:
    num_workers = len(workers)
    memory = np.zeros((num_workers, theta.size))
    last_error_sq = np.zeros(num_workers)
    silence = np.full(num_workers, max_silence if force_first_upload else 0)
    weights = np.array(xi) if np.ndim(xi) else np.full(window, xi / window)
    motion: list[float] = []  # ||theta^{k+1-d} - theta^{k-d}||^2, d = 1 first
    losses, masks = [], []
    for k in range(rounds):
        scale = window / np.clip(k, 1, window) if rescale_short_history else 1
        recent = scale * sum(w * m for w, m in zip(weights, motion, strict=False)) / (lr * num_workers) ** 2
        loss, sent = np.zeros(num_workers), np.zeros(num_workers, bool)
        for m, (x, y) in enumerate(workers):
            loss[m], grad = softmax_regression(theta, x, y, classes, l2)
            target = grad - memory[m]
            innovation = quantized(target, bits) if quantize else target
            error_sq = np.sum((target - innovation) ** 2)
            worthwhile = np.sum(innovation**2) >= recent + 3 * (error_sq + last_error_sq[m])
            sent[m] = not lazy or worthwhile or silence[m] >= max_silence
            if sent[m]:
                memory[m] += innovation
                last_error_sq[m] = error_sq
                silence[m] = 0
            else:
                silence[m] += 1
        step = -lr * memory.sum(axis=0)
        theta = theta + step
        motion.insert(0, step @ step)
        losses.append(loss.mean())
        masks.append(sent)
    return History(np.array(losses), np.array(masks), theta)


def authors(theta: np.ndarray, workers: Sequence[tuple[np.ndarray, np.ndarray]], rounds: int) -> History:
    """The authors' run on MNIST."""
    return run(theta, workers, rounds, classes=10, **AUTHORS)
