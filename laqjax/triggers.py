"""Upload rules, each a stateless function of one `Evidence` record, and their combinators."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jaxtyping import Array, Bool, Float, Int

from laqjax.core import Evidence, Trigger, number, static


class Rule:
    """What a rule is unless it says otherwise."""

    skips = True
    asks = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset()


@register_dataclass
@dataclass(frozen=True)
class Always(Rule):
    """Send every round."""

    skips = False

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return jnp.asarray(True)


@register_dataclass
@dataclass(frozen=True)
class Lazy(Rule):
    """Send iff the change outweighs the model's recent motion and the errors of quantization (LAQ, eq. (7a)).

    change >= sum_d xi_d motion_d / (lr^2 M^2) + 3 (error_sq + last_error_sq)

    measure: what the change is. "innovation_sq": LAQ, and LAG where the compressor is the identity, without errors;
    "stale_sq": LASG-WK2, CADA2; "variance_sq": LASG-WK1, CADA1; "drift_sq": times L_m^2 with `smoothness` [M], and the
    server decides (LAG-PS, LASG-PS). absolute: xi is not divided by lr^2 M^2 (the c / d_max of CADA). `ramp`: while the
    history is shorter than the window, xi is scaled by window / max(round, 1), as in the authors' program.
    """

    xi: Float[Array, " window"]  # of the newest step first, zero beyond the window
    window: Int[Array, ""]
    ramp: Bool[Array, ""]
    smoothness: Float[Array, " M"] | None = None
    measure: str = static(default="innovation_sq")
    absolute: bool = static(default=False)

    @property
    def asks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.measure == "drift_sq"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({self.measure} - {"innovation_sq"})

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        short = self.window / jnp.clip(evidence.round, 1, self.window)
        scale = jnp.where(self.ramp, short, 1).astype(self.xi.dtype)
        if not self.absolute:
            scale = scale / (evidence.lr * evidence.num_workers) ** 2
        change = evidence[self.measure]
        if self.smoothness is not None:
            change = self.smoothness[evidence.worker] ** 2 * change
        threshold = scale * jnp.sum(self.xi * evidence.motion)
        return change >= threshold + 3 * (evidence.error_sq + evidence.last_error_sq)


@register_dataclass
@dataclass(frozen=True)
class Progress(Rule):
    """CLAG's rule: send iff ||target||^2 > zeta ||grad - last grad||^2 (3PC, Richtarik et al. 2022), and in round 0.

    Strictly: with the identity compressor and zeta = 1 both sides are equal in the round after an upload.
    """

    zeta: Float[Array, ""]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"progress_sq"})

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return (evidence.target_sq > self.zeta * evidence["progress_sq"]) | (evidence.round == 0)


@register_dataclass
@dataclass(frozen=True)
class Cyclic(Rule):
    """The server asks worker (round mod M) (cyclic IAG, Blatt et al. 2007)."""

    asks = True

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return evidence.worker == evidence.round % evidence.num_workers


@register_dataclass
@dataclass(frozen=True)
class OneOf(Rule):
    """The server asks one worker, drawn with the given probabilities (Num-IAG: proportional to L_m)."""

    probability: Float[Array, " M"]
    asks = True

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        draw = jax.random.uniform(evidence.shared, (), self.probability.dtype)
        return evidence.worker == jnp.searchsorted(jnp.cumsum(self.probability)[:-1], draw, side="right")


@register_dataclass
@dataclass(frozen=True)
class Patience(Rule):
    """Send when the rule says so, or after `limit` silent rounds (LAQ, eq. (7b)). limit = 0 sends always."""

    rule: Trigger
    limit: Int[Array, ""]

    @property
    def asks(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.asks

    @property
    def needs(self) -> frozenset[str]:
        return self.rule.needs

    def __call__(self, evidence: Evidence) -> Bool[Array, ""]:
        return self.rule(evidence) | (evidence.silence >= self.limit)


always = Always


def patience(rule: Trigger, limit: int) -> Patience:
    """`rule`, or after `limit` >= 0 silent rounds; raises ValueError."""
    return Patience(rule, number("limit", limit, np.int32, least=0))


def lazy(
    xi: Any,
    window: int,
    dtype: Any,
    *,
    max_window: int | None = None,
    ramp: bool = False,
    smoothness: Any = None,
    measure: str = "innovation_sq",
    absolute: bool = False,
) -> Lazy:
    """A `Lazy` rule with checked numbers: a scalar `xi` is the sum of equal weights, an array holds xi_d itself [window].

    max_window >= window pads the weights, so that rules of different windows share one shape. Raises ValueError.
    """
    window = int(number("window", window, np.int32, least=1))
    max_window = int(number("max_window", window if max_window is None else max_window, np.int32, least=window))
    weights = numbers(
        "xi", xi, dtype, ((), (window,)), f"one number >= 0 (the sum of the weights) or {window} of them (the window)"
    )
    padded = np.zeros(max_window, dtype)
    padded[:window] = weights if weights.ndim else weights / window
    if smoothness is not None:
        smoothness = numbers("smoothness", smoothness, dtype, None, "L_m >= 0 of every worker")
    if not isinstance(ramp, bool | np.bool_):
        raise ValueError(f"ramp = {ramp!r}: expected True or False")
    return Lazy(padded, number("window", window, np.int32), np.asarray(ramp, np.bool_), smoothness, measure, absolute)  # pyright: ignore[reportArgumentType]


def one_of(weights: Any, dtype: Any) -> OneOf:
    """A `OneOf` with probabilities proportional to `weights` [M] >= 0."""
    weights = numbers("weights", weights, np.float64, None, "numbers >= 0, one for each worker")
    if not weights.sum() > 0:
        raise ValueError(f"weights = {weights!r}: expected at least one > 0")
    return OneOf(np.asarray(weights / weights.sum(), dtype))  # pyright: ignore[reportArgumentType]


def numbers(name: str, value: Any, dtype: Any, shapes: Any, expected: str) -> np.ndarray:
    """A checked array of finite numbers >= 0 of one of the shapes (None: any vector)."""
    try:
        array = np.asarray(value, dtype)
    except (TypeError, ValueError):
        array = np.asarray(np.nan, np.float64)
    fits = array.ndim == 1 if shapes is None else array.shape in shapes
    if not fits or not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"{name} = {value!r}: expected {expected}")
    return array
