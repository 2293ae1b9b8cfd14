"""Admissible steps and Lyapunov functions: for default step sizes, and for property tests.

Steps are for f = sum_m f_m and theta -= lr sum_m (...), the convention of the lazy family; theorems stated for the mean
of the f_m are divided by M. L: smoothness of f, L_m: of f_m; `laqjax.problems`
has those of its linear models.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

__all__ = ["diana_step_size", "ef21_step_size", "lyapunov", "marina_step_size", "max_xi_sum", "unbiased_step_size"]


def max_xi_sum(lr: float, smoothness: float) -> float:
    """The largest sum of xi for which LAQ's Lyapunov function is proved to fall: (1 - lr L) / 2."""
    return max((1 - lr * smoothness) / 2, 0.0)


def lyapunov(loss: Any, motion: Float[Any, "*rounds window"], xi: Float[Any, " window"], lr: float) -> Any:
    """V = f + sum_d beta_d motion_d with beta_d = (1 / lr) sum_{j >= d} xi_j, motion newest first.

    V(k+1) <= V(k) - (lr / 2) ||grad f||^2 + lr M sum_m (4 error_sq_m + 3 last_error_sq_m) where sum xi <= (1 - lr L) / 2.
    """
    return loss + motion @ (np.cumsum(xi[::-1])[::-1] / lr)


def ef21_step_size(worker_smoothness: np.ndarray, smoothness: float, delta: float, zeta: float = 0.0) -> float:
    """EF21's step for a compressor of contraction `delta` (its Theorem 1), CLAG's for zeta > 0 (3PC, Theorem 5.5).

    The steps for general smooth f; the theorems with a linear rate put a 2 under the root.
    """
    workers, root = len(worker_smoothness), 1 - np.sqrt(1 - delta)
    ratio = max((1 - delta) / root, zeta) / root
    return 1 / (smoothness + workers * np.sqrt(np.mean(worker_smoothness**2)) * np.sqrt(ratio))


def diana_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float) -> float:
    """DIANA's step for convex f and an unbiased compressor of variance `omega`: 1 / (L + 6 omega max L_m).

    With damping 1 / (1 + omega).
    """
    return 1 / (smoothness + 6 * omega * float(np.max(worker_smoothness)))


def marina_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float, probability: float) -> float:
    """MARINA's step for general smooth f: 1 / (L + rms(L_m) sqrt(M (1 - p) omega / p)).

    Theorem 2.1 has rms(L_m) M, which is no less, for the first L too.
    """
    workers = len(worker_smoothness)
    return 1 / (
        smoothness + np.sqrt(np.mean(worker_smoothness**2)) * np.sqrt(workers * (1 - probability) * omega / probability)
    )


def unbiased_step_size(worker_smoothness: np.ndarray, smoothness: float, omega: float) -> float:
    """Step of compressed gradients without memory, for convex f: 1 / (L + 2 omega max L_m).

    It ends at the variance's floor.
    """
    return 1 / (smoothness + 2 * omega * float(np.max(worker_smoothness)))
