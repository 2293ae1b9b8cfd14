"""Helpers that the factories share: example arguments, and checked parts of the lazy and the local methods."""

import dataclasses
from typing import Any

import numpy as np
import optax
from jax.tree_util import Partial

from laqjax._core.validation import check_nonnegative_array, check_number, oracle_dtype
from laqjax.oracles import LocalStepsOracle, _make_local_steps
from laqjax.rules import (
    Always,
    History,
    InnovationChange,
    LazyRule,
    MaxSilence,
    limit_silence,
    make_history,
    partial_participation,
)
from laqjax.types import Oracle, UploadRule

# Source text of a value for each argument without a default: for error messages, and for docs/docstrings.py.
EXAMPLE_ARGUMENTS = {
    "compressor": "laqjax.compressors.top_k(5)",
    "downlink_compressor": "laqjax.compressors.top_k(5)",
    "smoothness": "[1.0, 2.0, 1.0, 2.0]",
    "k": "5",
    "damping": "0.5",
    "scaling": "0.5",
    "probability": "0.2",
    "estimate_momentum": "0.2",
    "lr": "0.1",
    "num_workers": "4",
    "local_lr": "0.1",
    "num_local_steps": "2",
}


def make_lazy_rule(past: History, change: Any) -> LazyRule:
    """Build the rule of LAQ for a history and a change measure, with the paper's weight 3 of the errors."""
    return LazyRule(past, change, np.asarray(3, past.xi.dtype))  # pyright: ignore[reportArgumentType]


def with_max_silence(rule: UploadRule, max_silence: int | None, force_first_upload: bool) -> MaxSilence:
    """Limit the silence of a rule to `max_silence` >= 1 rounds; None means no limit.

    `rules.limit_silence` accepts 0 too, but then every worker always sends, which is another algorithm.

    Raises:
        ValueError: `max_silence` is not None and not a whole number >= 1, or `force_first_upload` is not a bool.
    """
    checked = None if max_silence is None else int(check_number("max_silence", max_silence, np.int32, minimum=1))
    return limit_silence(rule, checked, force_first_upload=force_first_upload)


def make_innovation_rule(
    oracle: Oracle,
    lr: Any,
    optimizer: Any,
    xi: Any,
    window: int,
    max_silence: int | None,
    rescale_short_history: bool,
    force_first_upload: bool,
    padded_window: int | None,
) -> MaxSilence:
    """Build the upload rule of LAG-WK and LAQ from the arguments of their factories.

    Raises:
        ValueError: a number is out of its range, or `oracle` is not an oracle.
    """
    options: Any = {"padded_window": padded_window, "rescale_short_history": rescale_short_history}
    past = make_history(xi, window, oracle_dtype(oracle), kind=history_kind(lr, optimizer), **options)
    return with_max_silence(make_lazy_rule(past, InnovationChange()), max_silence, force_first_upload)


def history_kind(lr: Any, optimizer: Any) -> str:
    """Return the kind of `rules.History`: "step" for plain SGD with a constant lr, otherwise "direction"."""
    return "step" if optimizer is optax.sgd and not callable(lr) else "direction"


def history_from_xi_or_c(
    xi: Any,
    c: float | None,
    window: int,
    oracle: Oracle,
    padded_window: int | None,
    rescale_short_history: bool,
    kind: str,
) -> History:
    """Build a history with the weights `xi` (0.8 if neither is given) or with the weight `c` of LASG and CADA.

    `kind` is that of a history with `xi`; if it is "absolute", `c` must be given.

    Raises:
        ValueError: both `xi` and `c` are given, or a number is out of its range.
    """
    options: Any = {"padded_window": padded_window, "rescale_short_history": rescale_short_history}
    if c is None and kind != "absolute":
        return make_history(0.8 if xi is None else xi, window, oracle_dtype(oracle), kind=kind, **options)
    if xi is not None:
        raise ValueError(
            f"xi = {xi!r} and c = {c!r}: must be only one of them; c sets every weight to c / window, without lr and M"
        )
    weight = check_number("c", c, oracle_dtype(oracle), minimum=0)
    return make_history(weight, window, oracle_dtype(oracle), kind="absolute", name="c", **options)


def check_smoothness(smoothness: Any, oracle: Oracle, num_workers: int) -> np.ndarray:
    """Check the smoothness constants L_m of the workers and return them as an array [num_workers].

    Raises:
        ValueError: the shape is not [num_workers], or a number is negative or not finite.
    """
    allowed = "num_workers numbers L_m >= 0, one for each worker"
    return check_nonnegative_array("smoothness", smoothness, oracle_dtype(oracle), ((num_workers,),), allowed)


def make_local_steps(
    oracle: Oracle,
    num_local_steps: int,
    local_lr: Any,
    inner: Any = optax.sgd,
    keep_optimizer_state: bool = True,
    returns_difference: bool = False,
) -> LocalStepsOracle:
    """Build the oracle of `laqjax.oracles.with_local_steps`, whose errors name the arguments of the factories.

    With `returns_difference`, it is that of methods that send theta - theta_m itself.
    """
    names = "num_local_steps", "local_lr", "inner"
    local = _make_local_steps(oracle, num_local_steps, local_lr, inner, 0.0, keep_optimizer_state, names)
    return dataclasses.replace(local, returns_difference=local.returns_difference or returns_difference)


def averaging_lr(local: LocalStepsOracle, count: int) -> Any:
    """Return the server's lr that makes the new model the average of the local models of `count` participants."""
    if callable(local.lr):
        return Partial(_mean_total_lr, local, count)
    return float(local.lr) * local.num_local_steps / count


def _mean_total_lr(local: LocalStepsOracle, count: Any, round: Any) -> Any:
    """Return the sum of the local step sizes of a round, divided by `count`."""
    return local.total_learning_rate_at(round) / count


def make_participation(num_workers: int, num_participants: int | None) -> tuple[int, UploadRule]:
    """Return the number of workers that participate in a round, and the rule by which all of them send."""
    if num_participants is None:
        return num_workers, Always()
    return num_participants, partial_participation(Always(), num_workers, count=num_participants)
