"""What the factories share: documented arguments, checked parts of the lazy and the federated methods."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import optax

from laqjax._core.round import Algorithm
from laqjax._core.validation import check_nonnegative_array, check_number, oracle_dtype
from laqjax.oracles import with_local_steps
from laqjax.rules import (
    Always,
    History,
    LazyRule,
    MaxSilence,
    limit_silence,
    make_history,
    partial_participation,
)
from laqjax.types import Oracle, UploadRule

AlgorithmFactory = TypeVar("AlgorithmFactory", bound=Callable[..., Algorithm])

ARGUMENT_DOCS = {
    "oracle": "loss and gradient of a worker, from `laqjax.oracles.from_loss`.",
    "lr": "step size > 0 on the sum over workers, or an optax schedule.",
    "num_workers": "M.",
    "bits": "b, bits per coordinate of a message, 1 to 16.",
    "downlink_bits": "bits per coordinate on the way down (None: `bits`).",
    "min_bits": "the least b that may be chosen.",
    "max_bits": "the largest b that may be chosen, at most 16.",
    "xi": "weights of the history: one number, the sum of equal weights xi_d, or the weights themselves [window], that of the "
    "newest step first. None, where there is a c too: 0.8 unless c is given.",
    "c": "weight of the history by the papers of LASG and CADA: the threshold is (c / D) sum_d motion_d, whatever lr and M. "
    "Where there is a xi too: None, or instead of it.",
    "window": "D, the rounds of motion that the rule looks back on.",
    "max_silence": "C, an upload is forced after so many silent rounds (None: never).",
    "rescale_short_history": "divide xi by the rounds seen so far until there are `window` of them, as the authors' program does.",
    "force_first_upload": "True: every worker sends in round 0; False: the rule decides there too, as in the program of the authors.",
    "padded_window": "length of the history's buffer, at least window (None: window); algorithms of one length and different "
    "windows share one compiled program.",
    "smoothness": "L_m of every worker [M].",
    "period": "rounds from one snapshot of the model to the next.",
    "compressor": "C or Q, from `laqjax.compressors`.",
    "downlink_compressor": "the compressor of the way down, from `laqjax.compressors`.",
    "zeta": "how much progress a change must outweigh, >= 0.",
    "damping": "lambda in (0, 1], the part of the change by which the memories move.",
    "scaling": "nu in (0, 1], the part of the change that enters the direction at once.",
    "probability": "of the rounds in which everything is sent, in (0, 1].",
    "eta": "weight of the newest gradient in the momentum, in (0, 1].",
    "estimate_momentum": "momentum of the estimates, in (0, 1]; 1 / (2 omega + 1) in the paper.",
    "mvr_momentum": "momentum of DASHA-MVR, in (0, 1]; None: gradients as they are (full ones).",
    "momentum": "in [0, 1).",
    "levels": "parts of the norm beside zero, 1 to 65535.",
    "density": "the share of coordinates that stays, in (0, 1].",
    "k": "coordinates sent.",
    "num_local_steps": "local gradient steps a round.",
    "local_lr": "local step size.",
    "num_participants": "workers that take part in a round (None: all).",
    "optimizer": "the server: a function of the step size that gives an optax transformation, or a transformation, which then "
    "has a step size of its own. The default is plain SGD, the papers' server.",
    "sampler": "minibatches: `laqjax.samplers.BlockSampler(size)` or `ShuffleSampler(size)` (None: full gradients).",
}
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


def add_shared_docs(factory: AlgorithmFactory) -> AlgorithmFactory:
    """Add what all factories share to the docstring: the arguments by name, and an example that runs."""
    parameters = inspect.signature(factory).parameters
    arguments = [f"        {name}: {ARGUMENT_DOCS[name]}" for name in parameters]
    needed = [name for name, p in parameters.items() if p.default is p.empty and name != "oracle"]
    call = ", ".join(f"{name}={EXAMPLE_ARGUMENTS[name]}" for name in needed)
    lines = [
        "",
        "",
        "    Args:",
        *arguments,
        "",
        "    Returns:",
        "        The algorithm, a pytree with its numbers as leaves.",
    ]
    lines += ["", "    Raises:", "        ValueError: a number is out of its range, or the parts do not fit.", ""]
    lines += [
        "    Example:",
        "        >>> import laqjax",
        "        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()",
    ]
    lines += [f"        >>> laqjax.algorithms.{factory.__name__}(oracle, {call}).num_workers", "        4", "    "]
    factory.__doc__ = (factory.__doc__ or "").rstrip() + "\n".join(lines)
    return factory


def make_lazy_rule(past: History, change: Any) -> LazyRule:
    """LAQ's rule over a history, with its 3 before the errors."""
    return LazyRule(past, change, np.asarray(3, past.xi.dtype))  # pyright: ignore[reportArgumentType]


def with_max_silence(rule: UploadRule, max_silence: int | None, force_first_upload: bool) -> MaxSilence:
    """`rules.limit_silence`, with a bound >= 1: max_silence = 0 would be another algorithm."""
    checked = None if max_silence is None else int(check_number("max_silence", max_silence, np.int32, minimum=1))
    return limit_silence(rule, checked, force_first_upload=force_first_upload)


def history_kind(lr: Any, optimizer: Any) -> str:
    """What the history is made of: the step itself for plain SGD of one lr, else the direction; see `rules.History`."""
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
    """Return a history by xi, 0.8 where neither is given, or by c."""
    if c is None:
        return make_history(
            0.8 if xi is None else xi,
            window,
            oracle_dtype(oracle),
            padded_window=padded_window,
            rescale_short_history=rescale_short_history,
            kind=kind,
        )
    if xi is not None:
        raise ValueError(
            f"xi = {xi!r} and c = {c!r}: expected one of them; c / window is each of the weights, without lr and M"
        )
    weight = check_number("c", c, oracle_dtype(oracle), minimum=0)
    return make_history(
        weight,
        window,
        oracle_dtype(oracle),
        padded_window=padded_window,
        rescale_short_history=rescale_short_history,
        kind="absolute",
        name="c",
    )


def check_smoothness(smoothness: Any, oracle: Oracle, num_workers: int) -> np.ndarray:
    """L_m of each worker, checked."""
    return check_nonnegative_array(
        "smoothness", smoothness, oracle_dtype(oracle), ((num_workers,),), "L_m >= 0 of each of the num_workers workers"
    )


def make_local_oracle(
    oracle: Oracle, num_workers: int, num_local_steps: int, local_lr: float, lr: Any, num_participants: int | None
) -> tuple[Oracle, Any, UploadRule]:
    """(oracle of local steps, the server's lr, who takes part) of the federated members."""
    local = with_local_steps(oracle, num_local_steps, local_lr)
    count = num_workers if num_participants is None else num_participants
    rule = (
        Always() if num_participants is None else partial_participation(Always(), num_workers, count=num_participants)
    )
    return local, float(local.lr) * local.num_local_steps / count if lr is None else lr, rule
