"""Theoretical step sizes and Lyapunov functions of the papers, to choose learning rates and to test convergence.

Step sizes are for f = sum_m f_m and theta -= lr sum_m (...), the convention of the lazy methods. Step sizes of theorems
for the mean of the f_m are divided by M. L is the smoothness constant of f, and L_m that of f_m. `laqjax.problems`
computes both for its linear models (`problem.smoothness_constants(shards)`).
"""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["diana_step_size", "ef21_step_size", "lyapunov", "marina_step_size", "max_xi_sum", "unbiased_step_size"]


def max_xi_sum(lr: float, smoothness: float) -> float:
    """Return the largest sum of xi for which LAQ's Lyapunov function is proved to decrease: (1 - lr L) / 2.

    Args:
        lr: the learning rate.
        smoothness: L.

    Returns:
        The bound on sum_d xi_d, or 0 if lr > 1 / L.
    """
    return max((1 - lr * smoothness) / 2, 0.0)


def lyapunov(loss: Any, motion: Float[Any, "*rounds window"], xi: Float[Any, " window"], lr: float) -> Any:
    """Compute LAQ's Lyapunov function V = f + sum_d beta_d motion_d with beta_d = (1 / lr) sum_{j >= d} xi_j.

    If sum_d xi_d <= (1 - lr L) / 2 (see `max_xi_sum`), it satisfies

        V(k+1) <= V(k) - (lr / 2) ||grad f||^2 + lr M sum_m (4 error_sq_m + 3 last_error_sq_m).

    Here error_sq_m is the squared quantization error of worker m in round k, and last_error_sq_m that of its last
    upload before round k.

    Args:
        loss: f, one number or one for each round [rounds].
        motion: squared norms of the last steps of the model, the newest first, [window] or [rounds, window].
        xi: the weights of the upload rule, that of the newest step first, [window].
        lr: the learning rate.

    Returns:
        V, with the shape of `loss`.
    """
    return loss + motion @ (np.cumsum(xi[::-1])[::-1] / lr)


def ef21_step_size(worker_smoothness: np.ndarray, smoothness: float, delta: float, zeta: float = 0.0) -> float:
    """Return the step size of EF21 (its Theorem 1), or of CLAG if zeta > 0 (3PC, Theorem 5.5).

    Both are for general smooth f. The theorems with a linear rate have an additional factor 2 under the root.

    Args:
        worker_smoothness: L_m of each worker, [M].
        smoothness: L.
        delta: contraction of the compressor, ||x - C(x)||^2 <= (1 - delta) ||x||^2; k / p for `top_k`.
        zeta: CLAG's threshold; 0 for EF21.

    Returns:
        The step size, at most 1 / L.
    """
    workers, root = len(worker_smoothness), 1 - np.sqrt(1 - delta)
    ratio = max((1 - delta) / root, zeta) / root
    return 1 / (smoothness + workers * np.sqrt(np.mean(worker_smoothness**2)) * np.sqrt(ratio))


def diana_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float) -> float:
    """Return the step size of DIANA for convex f and an unbiased compressor: 1 / (L + 6 omega max L_m).

    It holds for damping 1 / (1 + omega).

    Args:
        worker_smoothness: L_m of each worker, [M].
        smoothness: L.
        omega: relative variance of the compressor, E ||Q(x) - x||^2 <= omega ||x||^2; p / k - 1 for `rand_k`.

    Returns:
        The step size, at most 1 / L.
    """
    return 1 / (smoothness + 6 * omega * float(np.max(worker_smoothness)))


def marina_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float, probability: float) -> float:
    """Return the step size of MARINA for general smooth f: 1 / (L + rms(L_m) sqrt(M (1 - p) omega / p)).

    Theorem 2.1 of the paper has M rms(L_m), which is at least L, in place of the first L.

    Args:
        worker_smoothness: L_m of each worker, [M].
        smoothness: L.
        omega: relative variance of the compressor, E ||Q(x) - x||^2 <= omega ||x||^2; p / k - 1 for `rand_k`.
        probability: p of the formula, the probability of a round with whole gradients.

    Returns:
        The step size, at most 1 / L.
    """
    workers = len(worker_smoothness)
    return 1 / (
        smoothness + np.sqrt(np.mean(worker_smoothness**2)) * np.sqrt(workers * (1 - probability) * omega / probability)
    )


def unbiased_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float) -> float:
    """Return the step size of compressed gradients without memory, for convex f: 1 / (L + 2 omega max L_m).

    With a constant step size, such a method stops improving at a level that the variance of the compressor sets.

    Args:
        worker_smoothness: L_m of each worker, [M].
        smoothness: L.
        omega: relative variance of the compressor, E ||Q(x) - x||^2 <= omega ||x||^2.

    Returns:
        The step size, at most 1 / L.
    """
    return 1 / (smoothness + 2 * omega * float(np.max(worker_smoothness)))
