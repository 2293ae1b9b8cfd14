"""Upload rules, each a stateless function of one `Evidence` record, and their combinators."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from laqjax.core import Evidence, Trigger, number


@register_dataclass
@dataclass(frozen=True)
class Always:
    """Send every round."""

    skips = False

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return jnp.asarray(True)


@register_dataclass
@dataclass(frozen=True)
class Lazy:
    """Send iff the innovation outweighs the model's recent motion and the errors of quantization (LAQ, eq. (7a)):

    ||innovation||^2 >= sum_d xi_d motion_d / (lr^2 M^2) + 3 (error_sq + last_error_sq)

    With the identity compressor the errors vanish and this is LAG's rule. `ramp`: while the history is shorter than the
    window, the weights are scaled by window / max(round, 1), as in the authors' program.
    """

    xi: Float[Array, " window"]  # of the newest step first, zero beyond the window
    window: Int[Array, ""]
    ramp: Bool[Array, ""]
    skips = True

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        short = self.window / jnp.clip(evidence.round, 1, self.window)
        scale = jnp.where(self.ramp, short, 1).astype(self.xi.dtype) / (evidence.lr * evidence.num_workers) ** 2
        threshold = scale * jnp.sum(self.xi * evidence.motion)
        return evidence.innovation_sq >= threshold + 3 * (evidence.error_sq + evidence.last_error_sq)


@register_dataclass
@dataclass(frozen=True)
class Patience:
    """Send when the rule says so, or after `limit` silent rounds (LAQ, eq. (7b)). limit = 0 sends always."""

    rule: Trigger
    limit: Int[Array, ""]
    skips = True

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return self.rule(evidence) | (evidence.silence >= self.limit)


always = Always


def patience(rule: Trigger, limit: int) -> Patience:
    """`rule`, or after `limit` >= 0 silent rounds; raises ValueError."""
    return Patience(rule, number("limit", limit, np.int32, least=0))


def lazy(xi: Any, window: int, dtype: Any, *, max_window: int | None = None, ramp: bool = False) -> Lazy:
    """A `Lazy` rule with checked numbers: a scalar `xi` is the sum of equal weights, an array holds xi_d itself [window].

    max_window >= window pads the weights, so that rules of different windows share one shape. Raises ValueError.
    """
    window = int(number("window", window, np.int32, least=1))
    max_window = int(number("max_window", window if max_window is None else max_window, np.int32, least=window))
    try:
        weights = np.asarray(xi, dtype)
    except (TypeError, ValueError):
        weights = np.asarray(np.nan, dtype)
    if weights.shape not in ((), (window,)) or not np.all(np.isfinite(weights)) or np.any(weights < 0):
        raise ValueError(
            f"xi = {xi!r}: expected one number >= 0 (the sum of the weights) or {window} of them (window = {window})"
        )
    padded = np.zeros(max_window, dtype)
    padded[:window] = weights if weights.ndim else weights / window
    return Lazy(padded, number("window", window, np.int32), np.asarray(ramp, np.bool_))  # pyright: ignore[reportArgumentType]
