"""Upload rules: they decide in which rounds a worker sends a message.

    Rules        Always, Cyclic, SampleOneWorker, ClagRule, LazyRule, ServerLazyRule
    Combinators  MaxSilence, PartialParticipation
    History      the last D model steps, which the lazy rules compare with
    Changes      InnovationChange, StaleModelChange, SnapshotChange: the changes that `LazyRule` can measure

The classes check nothing. Functions such as `make_history` and `limit_silence`, and those of `laqjax.algorithms`, check
their numbers.

To write a rule, derive a frozen dataclass from `BaseUploadRule`, decorate it with `types.register_dataclass` and define
`should_send`. Define `init` if the rule has a state, `update` if its shared state changes, and `is_selected` if the
server selects the workers that take part in a round. Set `needs_persistent_memory = False` if every worker always
sends. `laqjax.types.UploadRule` describes the methods and the two states. The page docs/own.md has an example of a rule
with a worker state.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from laqjax import types
from laqjax._core.validation import check_bool, check_nonnegative_array, check_number
from laqjax.types import Decision, RoundContext, ServerStep, UploadContext, register_dataclass, static_field

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


_NO_LIMIT = np.iinfo(np.int32).max  # more rounds than any run has


class BaseUploadRule:
    """Base class for upload rules: stateless, every worker is selected, and every selected worker sends.

    The methods are those of `laqjax.types.UploadRule`, which has their arguments and results.

    Attributes:
        needs_persistent_memory: whether the server must keep the last uploads of workers that send nothing. A rule that
            always sends may set it to False.
    """

    needs_persistent_memory = True

    @property
    def server_selects(self) -> bool:
        """Return whether the server selects only some workers: whether the class defines `is_selected`."""
        return type(self).is_selected is not BaseUploadRule.is_selected

    def init(self, params: Float[Array, " p"]) -> tuple[Any, Any]:
        """Return no shared state and no worker state."""
        return None, None

    def is_selected(self, shared_state: Any, worker_state: Any, context: RoundContext) -> Bool[Array, ""]:
        """Select every worker."""
        return jnp.asarray(True)

    def should_send(self, shared_state: Any, worker_state: Any, context: UploadContext) -> Decision:
        """Send, and leave the worker state unchanged."""
        return Decision(jnp.asarray(True), worker_state, worker_state)

    def update(self, shared_state: Any, step: ServerStep) -> Any:
        """Leave the shared state unchanged."""
        return shared_state


# ---- rules without a history ------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class Always(BaseUploadRule):
    """Upload rule by which every worker sends in every round."""

    needs_persistent_memory = False


@register_dataclass
@dataclass(frozen=True)
class Cyclic(BaseUploadRule):
    """Upload rule by which the server selects worker (round mod M) (cyclic IAG, Blatt et al. 2007)."""

    def is_selected(self, shared_state, worker_state, context):
        return context.keys.worker == context.round % context.num_workers


@register_dataclass
@dataclass(frozen=True)
class SampleOneWorker(BaseUploadRule):
    """Upload rule by which the server selects one random worker per round.

    Num-IAG uses probabilities proportional to L_m.

    Attributes:
        probability: probability of each worker, [M].
    """

    probability: Float[Array, " M"]

    def is_selected(self, shared_state, worker_state, context):
        draw = jax.random.uniform(context.keys.shared_key, (), self.probability.dtype)
        return context.keys.worker == jnp.searchsorted(jnp.cumsum(self.probability)[:-1], draw, side="right")


@register_dataclass
@dataclass(frozen=True)
class ClagRule(BaseUploadRule):
    """Upload rule of CLAG: send iff ||target||^2 > zeta ||grad - last grad||^2 (3PC, Richtarik et al. 2022).

    A worker always sends in its first round. The inequality is strict: if the compressor loses nothing and zeta = 1,
    both sides are equal in the round after an upload, and the worker is silent.

    The memory must be `memories.Innovation` with damping 1, which is not checked: target = grad - h, and an upload adds
    the decoded message to h. The worker state is (h - grad after its last round [p], whether there was such a round).
    The change of the gradient is the target plus this vector, which is exactly zero after an upload without loss.

    Attributes:
        zeta: weight of the change of the gradient, >= 0.
    """

    zeta: Float[Array, ""]

    def init(self, params):
        return None, (jnp.zeros_like(params), jnp.asarray(False))

    def should_send(self, shared_state, worker_state, context):
        offset, begun = worker_state
        # one reduction for both, because XLA may round two reductions of equal vectors differently
        both = jnp.stack([context.target, context.target + offset])
        target_sq, change_sq = jax.vmap(context.squared_norm)(both)
        if_sent, if_silent = context.decoded - context.target, -context.target
        send = (target_sq > self.zeta * change_sq) | ~begun
        return Decision(send, (if_sent, jnp.asarray(True)), (if_silent, jnp.asarray(True)))


# ---- lazy rules -------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class History:
    """History of the last D model steps, which gives the threshold of a lazy rule.

    `kind` chooses the motion and its scale; motion_d belongs to the step d rounds ago, so d = 1 is the newest.

    - "step": motion_d is the squared norm of the model step. The threshold is sum_d xi_d motion_d / (lr^2 M^2). Used
      for SGD with a constant learning rate, as in LAG and LAQ, eq. (7a).
    - "direction": motion_d is the squared norm of the optimizer's input. The threshold is sum_d xi_d motion_d / M^2.
      Used for other optimizers, and for any learning rate schedule.
    - "absolute": motion_d is the squared norm of the model step. The threshold is sum_d xi_d motion_d. Used for LASG
      and CADA, where xi_d = c / window.

    For SGD with a constant learning rate, "step" and "direction" agree up to rounding. Momentum makes the model steps
    1 / (1 - momentum) times as long, and the steps of Adam have another scale. With "step", the rule would then skip
    important uploads.

    Attributes:
        xi: weights xi_d of the steps, the newest step first, zero beyond `window`; [length of the buffer].
        window: D, the number of rounds in the history.
        rescale_short_history: while the history is shorter than the window, multiply xi by window / max(round, 1), as
            in the authors' program.
        kind: "step", "direction" or "absolute".
    """

    xi: Float[Array, " window"]
    window: Int[Array, ""]
    rescale_short_history: Bool[Array, ""]
    kind: str = static_field(default="step")

    def init(self) -> Float[Array, " window"]:
        """Return a ring buffer of zeros; the motion of round k is stored at index k mod its length."""
        return jnp.zeros(self.xi.shape, self.xi.dtype)

    def threshold(self, motion: Float[Array, " window"], context: RoundContext) -> Float[Array, ""]:
        """Return the threshold that a change must reach.

        Args:
            motion: the ring buffer.
            context: the round, the learning rate and the number of workers.

        Returns:
            The threshold, a scalar.
        """
        k, size = context.round, motion.shape[0]
        newest_first = motion[(k - 1 - jnp.arange(size, dtype=jnp.int32)) % size]
        short = self.window / jnp.clip(k, 1, self.window)
        scale = jnp.where(self.rescale_short_history, short, 1).astype(self.xi.dtype)
        if self.kind != "absolute":
            scale = scale / ((context.lr if self.kind == "step" else 1) * context.num_workers) ** 2
        return scale * jnp.sum(self.xi * newest_first)

    def push(self, motion: Float[Array, " window"], step: ServerStep) -> Float[Array, " window"]:
        """Return the ring buffer after the motion of a step is added.

        Args:
            motion: the ring buffer.
            step: the step that the server just made.

        Returns:
            The ring buffer of the next round.
        """
        newest = step.direction_sq if self.kind == "direction" else step.step_sq
        return motion.at[step.round % motion.shape[0]].set(newest.astype(motion.dtype))


@register_dataclass
@dataclass(frozen=True)
class InnovationChange:
    """Squared norm ||decoded||^2 of the compressed change: LAQ, and LAG with the identity compressor."""

    def init(self, params):
        return None, None

    def measure(self, shared_state, worker_state, context):
        return context.decoded_sq, None

    def update(self, shared_state, step):
        return None


@register_dataclass
@dataclass(frozen=True)
class StaleModelChange:
    """Squared change ||g_m(theta) - g_m(theta_hat_m)||^2 of the gradient on the same examples (LASG-WK2, CADA2).

    theta_hat_m is the model at the last upload of worker m. It is the worker state, [p].
    """

    def init(self, params):
        return None, params

    def measure(self, shared_state, worker_state, context):
        return context.squared_norm(context.grad - context.gradient_at(worker_state)), context.params

    def update(self, shared_state, step):
        return None


@register_dataclass
@dataclass(frozen=True)
class SnapshotChange:
    """Squared change ||d_m - last d_m||^2 of the gradient relative to a snapshot (LASG-WK1, CADA1).

    d_m = g_m(theta) - g_m(snapshot), with both gradients on the same examples. last d_m [p] is its value at the last
    upload of worker m, and is the worker state. The snapshot [p] is the shared state: the model of the last round that
    is a multiple of `period`.

    Attributes:
        period: rounds from one snapshot to the next.
    """

    period: Int[Array, ""]

    def init(self, params):
        return params, jnp.zeros_like(params)

    def measure(self, shared_state, worker_state, context):
        reduced = context.grad - context.gradient_at(shared_state)
        return context.squared_norm(reduced - worker_state), reduced

    def update(self, shared_state, step):
        return jnp.where((step.round + 1) % self.period == 0, step.after, shared_state)


@register_dataclass
@dataclass(frozen=True)
class LazyRule(BaseUploadRule):
    """Upload rule that compares a change with recent model motion and quantization errors (LAQ, eq. (7a)).

    A worker sends iff

        change >= threshold of the history + error_weight (error_sq + error_sq at the last upload)

    A change measure has three methods. `init(params)` returns its shared state and its worker state.
    `measure(shared_state, worker_state, context)` returns the change, and the worker state that is kept if the worker
    sends. `update(shared_state, step)` returns the shared state of the next round.

    The shared state of the rule is (ring buffer of the history, shared state of the measure). The worker state is
    (error_sq at the last upload, worker state of the measure).

    Attributes:
        history: the model motion that sets the threshold.
        change_measure: `InnovationChange`, `StaleModelChange`, `SnapshotChange`, or an object with the same methods.
        error_weight: weight of the quantization errors; 3 in LAQ.
    """

    history: History
    change_measure: Any
    error_weight: Float[Array, ""]

    def init(self, params):
        shared, own = self.change_measure.init(params)
        return (self.history.init(), shared), (jnp.zeros((), params.dtype), own)

    def should_send(self, shared_state, worker_state, context):
        motion, reference = shared_state
        last_error_sq, kept = worker_state
        change, renewed = self.change_measure.measure(reference, kept, context)
        threshold = self.history.threshold(motion, context) + self.error_weight * (context.error_sq + last_error_sq)
        return Decision(change >= threshold, (context.error_sq, renewed), worker_state)

    def update(self, shared_state, step):
        motion, reference = shared_state
        return self.history.push(motion, step), self.change_measure.update(reference, step)


@register_dataclass
@dataclass(frozen=True)
class ServerLazyRule(BaseUploadRule):
    """Upload rule by which the server selects workers whose model has moved enough (LAG-PS, LASG-PS).

    It selects worker m iff L_m^2 ||theta - theta_hat_m||^2 >= threshold of the history. theta_hat_m is the model at the
    last upload of worker m. It is the worker state, [p].

    Attributes:
        history: the model motion that sets the threshold.
        smoothness: L_m of every worker, [M].
    """

    history: History
    smoothness: Float[Array, " M"]

    def init(self, params):
        return self.history.init(), params

    def is_selected(self, shared_state, worker_state, context):
        change = self.smoothness[context.keys.worker] ** 2 * context.squared_norm(context.params - worker_state)
        return change >= self.history.threshold(shared_state, context)

    def should_send(self, shared_state, worker_state, context):
        return Decision(jnp.asarray(True), context.params, worker_state)

    def update(self, shared_state, step):
        return self.history.push(shared_state, step)


# ---- combinators ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class MaxSilence(BaseUploadRule):
    """Combinator that follows a rule, and forces an upload after `max_silence` silent rounds (LAQ, eq. (7b)).

    Where the server selects workers, it also selects those that have reached the limit. The worker state is (silent
    rounds since the last upload, worker state of the inner rule).

    Attributes:
        rule: the rule that decides before the limit is reached.
        max_silence: C, in rounds; 0 sends in every round.
        initial_silence: count before round 0. If it is `max_silence`, workers send in their first round.
    """

    rule: types.UploadRule
    max_silence: Int[Array, ""]
    initial_silence: Int[Array, ""]

    @property
    def server_selects(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.server_selects

    @property
    def needs_persistent_memory(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.needs_persistent_memory

    def init(self, params):
        shared, own = self.rule.init(params)
        return shared, (jnp.asarray(self.initial_silence), own)

    def is_selected(self, shared_state, worker_state, context):
        return self.rule.is_selected(shared_state, worker_state[1], context) | (worker_state[0] >= self.max_silence)

    def should_send(self, shared_state, worker_state, context):
        silence, inner = worker_state
        decision = self.rule.should_send(shared_state, inner, context)
        longer = jnp.minimum(silence, _NO_LIMIT - 1) + 1  # stops at the largest int32 instead of overflowing
        return Decision(
            send=decision.send | (silence >= self.max_silence),
            if_sent=(jnp.zeros_like(silence), decision.if_sent),
            if_silent=(longer, decision.if_silent),
        )

    def update(self, shared_state, step):
        return self.rule.update(shared_state, step)


@register_dataclass
@dataclass(frozen=True)
class PartialParticipation(BaseUploadRule):
    """Combinator by which `count` random workers participate in a round and follow a rule.

    The workers are drawn without replacement, and all workers see the same draw. The other workers neither receive the
    model nor compute a gradient, and their states stay unchanged. A `MaxSilence` inside therefore counts only the
    rounds in which a worker participates.

    Attributes:
        rule: the rule that participating workers follow.
        count: participating workers per round.
    """

    rule: types.UploadRule
    count: Int[Array, ""]

    @property
    def needs_persistent_memory(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rule.needs_persistent_memory

    def is_participating(self, context: RoundContext) -> Bool[Array, ""]:
        """Return whether this worker has one of the `count` smallest of M shared uniform draws."""
        # a separate random stream, because compressors and the shared Bernoulli variable use the shared key itself
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
        decision = self.rule.should_send(shared_state, worker_state, context)
        there = self.is_participating(context)
        silent = jax.tree.map(lambda a, b: jnp.where(there, a, b), decision.if_silent, worker_state)
        return decision._replace(if_silent=silent)

    def update(self, shared_state, step):
        return self.rule.update(shared_state, step)


# ---- factories, which check their arguments ---------------------------------------------------------------------


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
    """Build a `History` from checked numbers.

    Args:
        xi: a single number, the sum of D equal weights; or the weights xi_d, [window], the newest step first.
        window: D, the number of rounds in the history, >= 1.
        dtype: dtype of the weights.
        padded_window: length of the buffer, >= window; None means `window`. Histories of equal length share one
            compiled program.
        rescale_short_history: see `History`.
        kind: "step", "direction" or "absolute", see `History`.
        name: name of the weights in error messages.

    Returns:
        The history, with xi padded by zeros to [padded_window].

    Raises:
        ValueError: a number is out of its range, `rescale_short_history` is not a bool, or `kind` is unknown.
    """
    kinds = "step", "direction", "absolute"
    if kind not in kinds:
        raise ValueError(f"kind = {kind!r}: must be one of {kinds}")
    window = int(check_number("window", window, np.int32, minimum=1))
    length = window if padded_window is None else padded_window
    length = int(check_number("padded_window", length, np.int32, minimum=window))
    weights = check_nonnegative_array(
        name, xi, dtype, ((), (window,)), f"a number >= 0 (the sum of the weights) or {window} of them (the window)"
    )
    padded = np.zeros(length, dtype)
    padded[:window] = weights if weights.ndim else weights / window
    check_bool("rescale_short_history", rescale_short_history)
    return History(padded, check_number("window", window, np.int32), np.asarray(rescale_short_history, np.bool_), kind)  # pyright: ignore[reportArgumentType]


def limit_silence(rule: types.UploadRule, max_silence: int | None, *, force_first_upload: bool = False) -> MaxSilence:
    """Build a rule that follows `rule`, and forces an upload after `max_silence` silent rounds.

    Args:
        rule: the rule that decides before the limit is reached.
        max_silence: C, in rounds, >= 0; None means no limit.
        force_first_upload: True: every worker sends in its first round. False: the rule decides there too.

    Returns:
        The combined rule; see `MaxSilence`.

    Raises:
        ValueError: `max_silence` is not a whole number >= 0, or `force_first_upload` is not a bool.
    """
    check_bool("force_first_upload", force_first_upload)
    most = check_number("max_silence", _NO_LIMIT if max_silence is None else max_silence, np.int32, minimum=0)
    return MaxSilence(rule, most, most if force_first_upload else np.zeros_like(most))


def partial_participation(
    rule: types.UploadRule, num_workers: int, *, count: int | None = None, share: float | None = None
) -> PartialParticipation:
    """Build a rule by which some random workers participate in each round and follow `rule`.

    Give exactly one of `count` and `share`.

    Args:
        rule: the rule that participating workers follow.
        num_workers: M.
        count: participating workers per round, 1 to M.
        share: participating share of the workers, in (0, 1]. share * M is rounded to a whole number >= 1.

    Returns:
        The combined rule; see `PartialParticipation`.

    Raises:
        ValueError: both or none of `count` and `share` are given, or a number is out of its range.
    """
    if (count is None) == (share is None):
        raise ValueError(f"count = {count!r}, share = {share!r}: must be one of them, and None for the other")
    if count is None:
        part = check_number("share", share, np.float64, above=0, maximum=1)
        count = max(1, round(float(part) * num_workers))
    return PartialParticipation(rule, check_number("count", count, np.int32, minimum=1, maximum=num_workers))


def sample_one_worker(weights: Any, dtype: Any) -> SampleOneWorker:
    """Build a `SampleOneWorker` rule with probabilities proportional to `weights`.

    Args:
        weights: one number >= 0 for each worker, [M].
        dtype: dtype of the probabilities.

    Returns:
        The rule.

    Raises:
        ValueError: a weight is negative, or none is positive.
    """
    weights = check_nonnegative_array("weights", weights, np.float64, None, "numbers >= 0, one for each worker")
    if not weights.sum() > 0:
        raise ValueError(f"weights = {weights!r}: must be numbers with at least one > 0")
    return SampleOneWorker(np.asarray(weights / weights.sum(), dtype))  # pyright: ignore[reportArgumentType]
