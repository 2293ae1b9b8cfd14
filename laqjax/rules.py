"""When a worker sends. A rule owns what it remembers: what it shares with all workers, and what each worker keeps of it.

Rules        Always, Cyclic, OneOf, Lazy, ServerLazy, Progress
Combinators  MaxSilence, Participation
History      the last D model steps, which the lazy rules compare with
Changes      InnovationChange, StaleModelChange, SnapshotChange: what `Lazy` compares

Of your own: a frozen dataclass derived from `Rule`, registered as a pytree, with `decide`, and `init` and `observe` if it
remembers something. The README has one with a memory.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from laqjax import types
from laqjax.checks import number, numbers
from laqjax.types import Evidence, Round, Step, register_dataclass, square, static

NEVER = np.iinfo(np.int32).max  # a limit that no run reaches


class Rule:
    """What a rule is unless it says otherwise: it remembers nothing, and everybody is asked."""

    may_skip = True
    server_decides = False
    renews_in_silence = False

    def init(self, params: Float[Array, " p"]) -> tuple[Any, Any]:
        """(what is shared with all workers, what each of them keeps) before round 0."""
        return None, None

    def asked(self, shared: Any, own: Any, now: Round) -> Bool[Array, ""]:
        """Whether the server asks this worker."""
        return jnp.asarray(True)

    def decide(self, shared: Any, own: Any, now: Evidence) -> tuple[Bool[Array, ""], Any, Any]:
        """(whether a worker that was asked sends, what it keeps if it sends, what it keeps if not)."""
        return jnp.asarray(True), own, own

    def observe(self, shared: Any, step: Step) -> Any:
        """What is shared after the server's step."""
        return shared


# ---- rules without a history ------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Always(Rule):
    """Send every round."""

    may_skip = False


@register_dataclass
@dataclass(frozen=True)
class Cyclic(Rule):
    """The server asks worker (round mod M) (cyclic IAG, Blatt et al. 2007)."""

    server_decides = True

    def asked(self, shared, own, now):
        return now.keys.worker == now.keys.round % now.num_workers


@register_dataclass
@dataclass(frozen=True)
class OneOf(Rule):
    """The server asks one worker, drawn with the given probabilities (Num-IAG: proportional to L_m)."""

    probability: Float[Array, " M"]
    server_decides = True

    def asked(self, shared, own, now):
        draw = jax.random.uniform(now.keys.shared, (), self.probability.dtype)
        return now.keys.worker == jnp.searchsorted(jnp.cumsum(self.probability)[:-1], draw, side="right")


@register_dataclass
@dataclass(frozen=True)
class Progress(Rule):
    """CLAG's rule: send iff ||target||^2 > zeta ||grad - last grad||^2 (3PC, Richtarik et al. 2022), and at first.

    Strictly: with the identity compressor and zeta = 1 both sides are equal in the round after an upload. A worker keeps
    the gradient of its last round, and whether it had one.
    """

    zeta: Float[Array, ""]
    renews_in_silence = True

    def init(self, params):
        return None, (jnp.zeros_like(params), jnp.asarray(False))

    def decide(self, shared, own, now):
        last, begun = own
        after = now.grad, jnp.asarray(True)
        return (now.target_sq > self.zeta * square(now.grad - last)) | ~begun, after, after


# ---- lazy rules -------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class History:
    """The last D model steps, and the threshold that they set.

    of   motion_d (the newest is d = 1)             threshold
    ---  -----------------------------------------  --------------------------------------
    step       the squared step really taken        sum_d xi_d motion_d / (lr^2 M^2)      SGD of one lr: LAG, LAQ, eq. (7a)
    direction  ||direction||^2, what the server's   sum_d xi_d motion_d / M^2             any other server, any schedule
               optimizer was given
    absolute   the squared step really taken        sum_d xi_d motion_d                   c / D of LASG and CADA

    The first two are the same for SGD of one lr, up to rounding. A momentum server makes steps 1 / (1 - momentum) times as
    long, and Adam's have another scale altogether: measured by them the rule would skip what matters.
    `ramp`: while the history is shorter than the window, xi is scaled by window / max(round, 1), as in the authors' program.
    """

    xi: Float[Array, " window"]  # of the newest step first, zero beyond the window
    window: Int[Array, ""]
    ramp: Bool[Array, ""]
    of: str = static(default="step")

    def init(self) -> Float[Array, " window"]:
        """A ring buffer: motion of round k stands at k mod its length."""
        return jnp.zeros(self.xi.shape, self.xi.dtype)

    def threshold(self, motion: Float[Array, " window"], now: Round) -> Float[Array, ""]:
        """What a change must reach."""
        k, size = now.keys.round, motion.shape[0]
        newest_first = motion[(k - 1 - jnp.arange(size, dtype=jnp.int32)) % size]
        short = self.window / jnp.clip(k, 1, self.window)
        scale = jnp.where(self.ramp, short, 1).astype(self.xi.dtype)
        if self.of != "absolute":
            scale = scale / ((now.lr if self.of == "step" else 1) * now.num_workers) ** 2
        return scale * jnp.sum(self.xi * newest_first)

    def observe(self, motion: Float[Array, " window"], step: Step) -> Float[Array, " window"]:
        """With the step just made."""
        newest = step.direction_sq if self.of == "direction" else step.step_sq
        return motion.at[step.round % motion.shape[0]].set(newest.astype(motion.dtype))


@register_dataclass
@dataclass(frozen=True)
class InnovationChange:
    """||decoded||^2: LAQ, and LAG where the compressor is the identity."""

    def init(self, params):
        return None, None

    def measure(self, shared, own, now):
        return now.innovation_sq, None

    def observe(self, shared, step):
        return None


@register_dataclass
@dataclass(frozen=True)
class StaleModelChange:
    """||g_m(theta) - g_m(theta of m's last upload)||^2 on the same rows: LASG-WK2, CADA2. A worker keeps that theta."""

    def init(self, params):
        return None, params

    def measure(self, shared, own, now):
        return square(now.grad - now.gradient_at(own)), now.params

    def observe(self, shared, step):
        return None


@register_dataclass
@dataclass(frozen=True)
class SnapshotChange:
    """||d_m - d_m at m's last upload||^2, d_m = g_m(theta) - g_m(snapshot) on the same rows: LASG-WK1, CADA1.

    The snapshot, shared by all, is the model of the last round that is a multiple of `period`.
    """

    period: Int[Array, ""]

    def init(self, params):
        return params, jnp.zeros_like(params)

    def measure(self, shared, own, now):
        reduced = now.grad - now.gradient_at(shared)
        return square(reduced - own), reduced

    def observe(self, shared, step):
        return jnp.where((step.round + 1) % self.period == 0, step.after, shared)


@register_dataclass
@dataclass(frozen=True)
class Lazy(Rule):
    """Send iff the change outweighs the model's recent motion and the errors of quantization (LAQ, eq. (7a)).

    change >= threshold of the history + 3 (error_sq + error_sq at the last upload)
    """

    history: History
    change: Any  # InnovationChange, StaleModelChange or SnapshotChange, or a class like them
    errors: Float[Array, ""]  # the 3

    def init(self, params):
        shared, own = self.change.init(params)
        return (self.history.init(), shared), (jnp.zeros((), params.dtype), own)

    def decide(self, shared, own, now):
        motion, reference = shared
        last_error_sq, kept = own
        change, renewed = self.change.measure(reference, kept, now)
        threshold = self.history.threshold(motion, now) + self.errors * (now.error_sq + last_error_sq)
        return change >= threshold, (now.error_sq, renewed), own

    def observe(self, shared, step):
        motion, reference = shared
        return self.history.observe(motion, step), self.change.observe(reference, step)


@register_dataclass
@dataclass(frozen=True)
class ServerLazy(Rule):
    """The server asks worker m iff L_m^2 ||theta - theta of m's last upload||^2 >= threshold (LAG-PS, LASG-PS)."""

    history: History
    smoothness: Float[Array, " M"]
    server_decides = True

    def init(self, params):
        return self.history.init(), params

    def asked(self, shared, own, now):
        change = self.smoothness[now.keys.worker] ** 2 * square(now.params - own)
        return change >= self.history.threshold(shared, now)

    def decide(self, shared, own, now):
        return jnp.asarray(True), now.params, own

    def observe(self, shared, step):
        return self.history.observe(shared, step)


# ---- combinators ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class MaxSilence(Rule):
    """Send when the rule says so, or after `limit` silent rounds (LAQ, eq. (7b)). limit = 0 sends always.

    A worker keeps its rounds since the last upload, which begin at `start`: at `limit`, round 0 sends.
    """

    rule: types.Rule
    limit: Int[Array, ""]
    start: Int[Array, ""]

    @property
    def server_decides(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.server_decides

    @property
    def renews_in_silence(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.renews_in_silence

    def init(self, params):
        shared, own = self.rule.init(params)
        return shared, (jnp.asarray(self.start), own)

    def asked(self, shared, own, now):
        return self.rule.asked(shared, own[1], now) | (own[0] >= self.limit)

    def decide(self, shared, own, now):
        silence, inner = own
        send, sent, silent = self.rule.decide(shared, inner, now)
        longer = jnp.minimum(silence, NEVER - 1) + 1
        return send | (silence >= self.limit), (jnp.zeros_like(silence), sent), (longer, silent)

    def observe(self, shared, step):
        return self.rule.observe(shared, step)


@register_dataclass
@dataclass(frozen=True)
class Participation(Rule):
    """`count` workers take part in a round, drawn without replacement, the same draw for all; they follow `rule`.

    The others neither get the model nor compute, and what they keep stays as it is: a limit counts the rounds in which a
    worker takes part.
    """

    rule: types.Rule
    count: Int[Array, ""]
    server_decides = True

    @property
    def may_skip(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.may_skip

    @property
    def renews_in_silence(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.renews_in_silence

    def drawn(self, now: Round) -> Bool[Array, ""]:
        """Whether this worker is among the `count` smallest of M draws."""
        # a stream of its own: compressors and coins draw from the shared key itself
        draws = jax.random.uniform(jax.random.fold_in(now.keys.shared, 0x9A47), (now.num_workers,), jnp.float32)
        rank = jnp.argsort(jnp.argsort(draws))[now.keys.worker]
        return rank.astype(jnp.int32) < self.count

    def init(self, params):
        return self.rule.init(params)

    def asked(self, shared, own, now):
        return self.drawn(now) & self.rule.asked(shared, own, now)

    def decide(self, shared, own, now):
        send, sent, silent = self.rule.decide(shared, own, now)
        there = self.drawn(now)
        return send, sent, jax.tree.map(lambda a, b: jnp.where(there, a, b), silent, own)

    def observe(self, shared, step):
        return self.rule.observe(shared, step)


# ---- factories: numbers checked, ValueError otherwise -----------------------------------------------------------


def history(
    xi: Any,
    window: int,
    dtype: Any,
    *,
    max_window: int | None = None,
    ramp: bool = False,
    of: str = "step",
    name: str = "xi",
) -> History:
    """A `History` with checked numbers.

    Args:
        xi: one number, the sum of equal weights, or the weights xi_d themselves [window], that of the newest step first.
        window: D, rounds >= 1.
        dtype: of the weights.
        max_window: length of the buffer, >= window (None: window); histories of one length share one compiled program.
        ramp: see `History`.
        of: "step", "direction" or "absolute", see `History`.
        name: of the weights, for errors.

    Raises:
        ValueError: a number is out of its range.
    """
    window = int(number("window", window, np.int32, least=1))
    max_window = int(number("max_window", window if max_window is None else max_window, np.int32, least=window))
    weights = numbers(
        name, xi, dtype, ((), (window,)), f"one number >= 0 (the sum of the weights) or {window} of them (the window)"
    )
    padded = np.zeros(max_window, dtype)
    padded[:window] = weights if weights.ndim else weights / window
    if not isinstance(ramp, bool | np.bool_):
        raise ValueError(f"ramp = {ramp!r}: expected True or False")
    return History(padded, number("window", window, np.int32), np.asarray(ramp, np.bool_), of)  # pyright: ignore[reportArgumentType]


def max_silence(rule: types.Rule, limit: int | None, *, first_upload: str = "rule") -> MaxSilence:
    """`rule`, or after `limit` >= 0 silent rounds (None: never).

    Args:
        rule: what decides otherwise.
        limit: C, rounds.
        first_upload: "forced": everybody sends in its first round; "rule": the rule decides there too.

    Raises:
        ValueError: limit is no whole number >= 0, first_upload is another word.
    """
    if first_upload not in ("forced", "rule"):
        raise ValueError(f"first_upload = {first_upload!r}: expected 'forced' or 'rule'")
    most = number("limit", NEVER if limit is None else limit, np.int32, least=0)
    return MaxSilence(rule, most, most if first_upload == "forced" else np.zeros_like(most))


def participation(
    rule: types.Rule, num_workers: int, *, count: int | None = None, share: float | None = None
) -> Participation:
    """`count` workers, or the share of them rounded to a whole number >= 1, take part in a round and follow `rule`.

    Raises:
        ValueError: not exactly one of count (1 to num_workers) and share (above 0, at most 1) is given.
    """
    if (count is None) == (share is None):
        raise ValueError(f"count = {count!r}, share = {share!r}: expected one of them")
    if count is None:
        part = number("share", share, np.float64, above=0, most=1)
        count = max(1, round(float(part) * num_workers))
    return Participation(rule, number("count", count, np.int32, least=1, most=num_workers))


def one_of(weights: Any, dtype: Any) -> OneOf:
    """A `OneOf` with probabilities proportional to `weights` [M] >= 0.

    Raises:
        ValueError: a weight is negative, or none is positive.
    """
    weights = numbers("weights", weights, np.float64, None, "numbers >= 0, one for each worker")
    if not weights.sum() > 0:
        raise ValueError(f"weights = {weights!r}: expected at least one > 0")
    return OneOf(np.asarray(weights / weights.sum(), dtype))  # pyright: ignore[reportArgumentType]
