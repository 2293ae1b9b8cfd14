"""When a worker sends. A rule owns what it remembers: what it shares with all workers, and what each worker keeps of it.

Rules        Always, Cyclic, OneOf, Lazy, ServerLazy, Progress
Combinators  MaxSilence, Participation
History      the last D model steps, which the lazy rules compare with
Changes      InnovationChange, StaleModelChange, SnapshotChange: what `LazyRule` compares

Of your own: a frozen dataclass derived from `BaseUploadRule`, registered as a pytree, with `should_send`, and `init` and `update` if it
remembers something. The README has one with a memory.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from laqjax import types
from laqjax._core.validation import check_nonnegative_array, check_number
from laqjax.types import RoundContext, ServerStep, UploadContext, register_dataclass, squared_norm, static_field

__all__ = [
    "Always",
    "BaseUploadRule",
    "ClagRule",
    "Cyclic",
    "History",
    "InnovationChange",
    "LazyRule",
    "MaxSilence",
    "PartialParticipation",
    "SampleOneWorker",
    "ServerLazyRule",
    "SnapshotChange",
    "StaleModelChange",
    "limit_silence",
    "make_history",
    "partial_participation",
    "sample_one_worker",
]


_NO_LIMIT = np.iinfo(np.int32).max  # a limit that no run reaches


class BaseUploadRule:
    """What a rule is unless it says otherwise: it remembers nothing, and everybody is asked."""

    can_skip = True
    server_selects = False
    renews_in_silence = False

    def init(self, params: Float[Array, " p"]) -> tuple[Any, Any]:
        """(what is shared with all workers, what each of them keeps) before round 0."""
        return None, None

    def is_selected(self, shared_state: Any, worker_state: Any, context: RoundContext) -> Bool[Array, ""]:
        """Whether the server asks this worker."""
        return jnp.asarray(True)

    def should_send(
        self, shared_state: Any, worker_state: Any, context: UploadContext
    ) -> tuple[Bool[Array, ""], Any, Any]:
        """(whether a worker that was asked sends, what it keeps if it sends, what it keeps if not)."""
        return jnp.asarray(True), worker_state, worker_state

    def update(self, shared_state: Any, step: ServerStep) -> Any:
        """What is shared after the server's step."""
        return shared_state


# ---- rules without a history ------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Always(BaseUploadRule):
    """Send every round."""

    can_skip = False


@register_dataclass
@dataclass(frozen=True)
class Cyclic(BaseUploadRule):
    """The server asks worker (round mod M) (cyclic IAG, Blatt et al. 2007)."""

    server_selects = True

    def is_selected(self, shared_state, worker_state, context):
        return context.keys.worker == context.keys.round % context.num_workers


@register_dataclass
@dataclass(frozen=True)
class SampleOneWorker(BaseUploadRule):
    """The server asks one worker, drawn with the given probabilities (Num-IAG: proportional to L_m)."""

    probability: Float[Array, " M"]
    server_selects = True

    def is_selected(self, shared_state, worker_state, context):
        draw = jax.random.uniform(context.keys.shared_key, (), self.probability.dtype)
        return context.keys.worker == jnp.searchsorted(jnp.cumsum(self.probability)[:-1], draw, side="right")


@register_dataclass
@dataclass(frozen=True)
class ClagRule(BaseUploadRule):
    """CLAG's rule: send iff ||target||^2 > zeta ||grad - last grad||^2 (3PC, Richtarik et al. 2022), and at first.

    Strictly: with the identity compressor and zeta = 1 both sides are equal in the round after an upload. A worker keeps
    the gradient of its last round, and whether it had one.
    """

    zeta: Float[Array, ""]
    renews_in_silence = True

    def init(self, params):
        return None, (jnp.zeros_like(params), jnp.asarray(False))

    def should_send(self, shared_state, worker_state, context):
        last, begun = worker_state
        after = context.grad, jnp.asarray(True)
        return (context.target_sq > self.zeta * squared_norm(context.grad - last)) | ~begun, after, after


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
    `rescale_short_history`: while the history is shorter than the window, xi is scaled by window / max(round, 1), as in the authors' program.
    """

    xi: Float[Array, " window"]  # of the newest step first, zero beyond the window
    window: Int[Array, ""]
    rescale_short_history: Bool[Array, ""]
    kind: str = static_field(default="step")

    def init(self) -> Float[Array, " window"]:
        """A ring buffer: motion of round k stands at k mod its length."""
        return jnp.zeros(self.xi.shape, self.xi.dtype)

    def threshold(self, motion: Float[Array, " window"], context: RoundContext) -> Float[Array, ""]:
        """What a change must reach."""
        k, size = context.keys.round, motion.shape[0]
        newest_first = motion[(k - 1 - jnp.arange(size, dtype=jnp.int32)) % size]
        short = self.window / jnp.clip(k, 1, self.window)
        scale = jnp.where(self.rescale_short_history, short, 1).astype(self.xi.dtype)
        if self.kind != "absolute":
            scale = scale / ((context.lr if self.kind == "step" else 1) * context.num_workers) ** 2
        return scale * jnp.sum(self.xi * newest_first)

    def push(self, motion: Float[Array, " window"], step: ServerStep) -> Float[Array, " window"]:
        """With the step just made."""
        newest = step.direction_sq if self.kind == "direction" else step.step_sq
        return motion.at[step.round % motion.shape[0]].set(newest.astype(motion.dtype))


@register_dataclass
@dataclass(frozen=True)
class InnovationChange:
    """||decoded||^2: LAQ, and LAG where the compressor is the identity."""

    def init(self, params):
        return None, None

    def measure(self, shared_state, worker_state, context):
        return context.innovation_sq, None

    def update(self, shared_state, step):
        return None


@register_dataclass
@dataclass(frozen=True)
class StaleModelChange:
    """||g_m(theta) - g_m(theta of m's last upload)||^2 on the same rows: LASG-WK2, CADA2. A worker keeps that theta."""

    def init(self, params):
        return None, params

    def measure(self, shared_state, worker_state, context):
        return squared_norm(context.grad - context.gradient_at(worker_state)), context.params

    def update(self, shared_state, step):
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

    def measure(self, shared_state, worker_state, context):
        reduced = context.grad - context.gradient_at(shared_state)
        return squared_norm(reduced - worker_state), reduced

    def update(self, shared_state, step):
        return jnp.where((step.round + 1) % self.period == 0, step.after, shared_state)


@register_dataclass
@dataclass(frozen=True)
class LazyRule(BaseUploadRule):
    """Send iff the change outweighs the model's recent motion and the errors of quantization (LAQ, eq. (7a)).

    change >= threshold of the history + 3 (error_sq + error_sq at the last upload)
    """

    history: History
    change_measure: Any  # InnovationChange, StaleModelChange or SnapshotChange, or a class like them
    error_weight: Float[Array, ""]  # the 3

    def init(self, params):
        shared, own = self.change_measure.init(params)
        return (self.history.init(), shared), (jnp.zeros((), params.dtype), own)

    def should_send(self, shared_state, worker_state, context):
        motion, reference = shared_state
        last_error_sq, kept = worker_state
        change, renewed = self.change_measure.measure(reference, kept, context)
        threshold = self.history.threshold(motion, context) + self.error_weight * (context.error_sq + last_error_sq)
        return change >= threshold, (context.error_sq, renewed), worker_state

    def update(self, shared_state, step):
        motion, reference = shared_state
        return self.history.push(motion, step), self.change_measure.update(reference, step)


@register_dataclass
@dataclass(frozen=True)
class ServerLazyRule(BaseUploadRule):
    """The server asks worker m iff L_m^2 ||theta - theta of m's last upload||^2 >= threshold (LAG-PS, LASG-PS)."""

    history: History
    smoothness: Float[Array, " M"]
    server_selects = True

    def init(self, params):
        return self.history.init(), params

    def is_selected(self, shared_state, worker_state, context):
        change = self.smoothness[context.keys.worker] ** 2 * squared_norm(context.params - worker_state)
        return change >= self.history.threshold(shared_state, context)

    def should_send(self, shared_state, worker_state, context):
        return jnp.asarray(True), context.params, worker_state

    def update(self, shared_state, step):
        return self.history.push(shared_state, step)


# ---- combinators ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class MaxSilence(BaseUploadRule):
    """Send when the rule says so, or after `limit_silence` silent rounds (LAQ, eq. (7b)). max_silence = 0 sends always.

    A worker keeps its rounds since the last upload, which begin at `initial_silence`: at `limit_silence`, round 0 sends.
    """

    rule: types.UploadRule
    max_silence: Int[Array, ""]
    initial_silence: Int[Array, ""]

    @property
    def server_selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.server_selects

    @property
    def renews_in_silence(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.renews_in_silence

    def init(self, params):
        shared, own = self.rule.init(params)
        return shared, (jnp.asarray(self.initial_silence), own)

    def is_selected(self, shared_state, worker_state, context):
        return self.rule.is_selected(shared_state, worker_state[1], context) | (worker_state[0] >= self.max_silence)

    def should_send(self, shared_state, worker_state, context):
        silence, inner = worker_state
        send, sent, silent = self.rule.should_send(shared_state, inner, context)
        longer = jnp.minimum(silence, _NO_LIMIT - 1) + 1
        return send | (silence >= self.max_silence), (jnp.zeros_like(silence), sent), (longer, silent)

    def update(self, shared_state, step):
        return self.rule.update(shared_state, step)


@register_dataclass
@dataclass(frozen=True)
class PartialParticipation(BaseUploadRule):
    """`count` workers take part in a round, drawn without replacement, the same draw for all; they follow `rule`.

    The others neither get the model nor compute, and what they keep stays as it is: a bound counts the rounds in which a
    worker takes part.
    """

    rule: types.UploadRule
    count: Int[Array, ""]
    server_selects = True

    @property
    def can_skip(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.can_skip

    @property
    def renews_in_silence(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.renews_in_silence

    def is_participating(self, context: RoundContext) -> Bool[Array, ""]:
        """Whether this worker is among the `count` smallest of M draws."""
        # a stream of its own: compressors and coins draw from the shared key itself
        draws = jax.random.uniform(
            jax.random.fold_in(context.keys.shared_key, 0x9A47), (context.num_workers,), jnp.float32
        )
        rank = jnp.argsort(jnp.argsort(draws))[context.keys.worker]
        return rank.astype(jnp.int32) < self.count

    def init(self, params):
        return self.rule.init(params)

    def is_selected(self, shared_state, worker_state, context):
        return self.is_participating(context) & self.rule.is_selected(shared_state, worker_state, context)

    def should_send(self, shared_state, worker_state, context):
        send, sent, silent = self.rule.should_send(shared_state, worker_state, context)
        there = self.is_participating(context)
        return send, sent, jax.tree.map(lambda a, b: jnp.where(there, a, b), silent, worker_state)

    def update(self, shared_state, step):
        return self.rule.update(shared_state, step)


# ---- factories: numbers checked, ValueError otherwise -----------------------------------------------------------


def make_history(
    xi: Any,
    window: int,
    dtype: Any,
    *,
    padded_window: int | None = None,
    rescale_short_history: bool = False,
    kind: str = "step",
    name: str = "xi",
) -> History:
    """A `History` with checked numbers.

    Args:
        xi: one number, the sum of equal weights, or the weights xi_d themselves [window], that of the newest step first.
        window: D, rounds >= 1.
        dtype: of the weights.
        padded_window: length of the buffer, >= window (None: window); histories of one length share one compiled program.
        rescale_short_history: see `History`.
        kind: "step", "direction" or "absolute", see `History`.
        name: of the weights, for errors.

    Raises:
        ValueError: a number is out of its range.
    """
    window = int(check_number("window", window, np.int32, minimum=1))
    padded_window = int(
        check_number("padded_window", window if padded_window is None else padded_window, np.int32, minimum=window)
    )
    weights = check_nonnegative_array(
        name, xi, dtype, ((), (window,)), f"one number >= 0 (the sum of the weights) or {window} of them (the window)"
    )
    padded = np.zeros(padded_window, dtype)
    padded[:window] = weights if weights.ndim else weights / window
    if not isinstance(rescale_short_history, bool | np.bool_):
        raise ValueError(f"rescale_short_history = {rescale_short_history!r}: expected True or False")
    return History(padded, check_number("window", window, np.int32), np.asarray(rescale_short_history, np.bool_), kind)  # pyright: ignore[reportArgumentType]


def limit_silence(rule: types.UploadRule, max_silence: int | None, *, force_first_upload: bool = False) -> MaxSilence:
    """`rule`, or after `limit_silence` >= 0 silent rounds (None: never).

    Args:
        rule: what decides otherwise.
        max_silence: C, rounds.
        force_first_upload: "forced": everybody sends in its first round; "rule": the rule decides there too.

    Raises:
        ValueError: max_silence is no whole number >= 0, force_first_upload is not a bool.
    """
    if not isinstance(force_first_upload, bool | np.bool_):
        raise ValueError(f"force_first_upload = {force_first_upload!r}: expected True or False")
    most = check_number("max_silence", _NO_LIMIT if max_silence is None else max_silence, np.int32, minimum=0)
    return MaxSilence(rule, most, most if force_first_upload else np.zeros_like(most))


def partial_participation(
    rule: types.UploadRule, num_workers: int, *, count: int | None = None, share: float | None = None
) -> PartialParticipation:
    """`count` workers, or the share of them rounded to a whole number >= 1, take part in a round and follow `rule`.

    Raises:
        ValueError: not exactly one of count (1 to num_workers) and share (above 0, at most 1) is given.
    """
    if (count is None) == (share is None):
        raise ValueError(f"count = {count!r}, share = {share!r}: expected one of them")
    if count is None:
        part = check_number("share", share, np.float64, above=0, maximum=1)
        count = max(1, round(float(part) * num_workers))
    return PartialParticipation(rule, check_number("count", count, np.int32, minimum=1, maximum=num_workers))


def sample_one_worker(weights: Any, dtype: Any) -> SampleOneWorker:
    """A `SampleOneWorker` with probabilities proportional to `weights` [M] >= 0.

    Raises:
        ValueError: a weight is negative, or none is positive.
    """
    weights = check_nonnegative_array("weights", weights, np.float64, None, "numbers >= 0, one for each worker")
    if not weights.sum() > 0:
        raise ValueError(f"weights = {weights!r}: expected at least one > 0")
    return SampleOneWorker(np.asarray(weights / weights.sum(), dtype))  # pyright: ignore[reportArgumentType]
