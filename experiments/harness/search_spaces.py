"""What is searched for a method, and its step of theory. A method without a row is searched over lr alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.harness import cases
from laqjax import theory


@dataclass(frozen=True)
class SearchSpace:
    """What is searched for a method. kind: of the panels. axes: its own numbers, the default of each first.

    step: the step of theory of a case; where L is unknown, a plain step to start from. stochastic: it runs on minibatches.
    """

    kind: str
    axes: dict[str, tuple[Any, ...]]
    step: Callable[[cases.ProblemInstance], float]
    stochastic: bool = False
    compressor: str | None = None


def lr_from_smoothness(scale: float) -> Callable[[cases.ProblemInstance], float]:
    """Scale / L; scale / (10 M) where L is not known."""
    return lambda case: scale / (case.smoothness[1] if case.problem.curvature else 10 * len(case.shards.weight))


def constant_lr(lr: float) -> Callable[[cases.ProblemInstance], float]:
    """A step without the scale of the loss."""
    return lambda case: lr


def lr_from_worker_smoothness(case: cases.ProblemInstance) -> float:
    """1 / the largest L_m, for steps on a worker's own loss; 0.1 where it is not known."""
    return 1 / case.smoothness[0].max() if case.problem.curvature else 0.1


def lr_from_theory(step: Callable[..., float], *constants: float) -> Callable[[cases.ProblemInstance], float]:
    """A step that theory admits; 1 / (10 M) where L is not known."""
    return lambda case: step(*case.smoothness, *constants) if case.problem.curvature else lr_from_smoothness(1)(case)


LAZY: dict[str, Any] = {"xi": (0.1, 0.4, 0.8)}
BITS: dict[str, Any] = {"bits": (4, 2, 8)}
CADA: dict[str, Any] = {"c": (0.6, 0.06, 6.0)}
LOCAL: dict[str, Any] = {"num_local_steps": (2, 5)}
MEMBERS = {
    "gd": SearchSpace("full", {}, lr_from_smoothness(1)),
    "qgd": SearchSpace("quantized", BITS, lr_from_smoothness(1)),
    "lag_wk": SearchSpace("lazy", LAZY, lr_from_smoothness(0.8)),
    "lag_ps": SearchSpace("lazy", LAZY, lr_from_smoothness(0.8)),
    "laq": SearchSpace("lazy", LAZY | BITS, lr_from_smoothness(0.8)),
    "two_laq": SearchSpace("lazy", LAZY | BITS, lr_from_smoothness(0.8)),
    "laq_adaptive": SearchSpace("lazy", LAZY | {"min_bits": (3, 2)}, lr_from_smoothness(0.8)),
    "iag_cyclic": SearchSpace("full", {}, lr_from_smoothness(0.1)),
    "iag_random": SearchSpace("full", {}, lr_from_smoothness(0.16)),
    "ef21": SearchSpace("quantized", {}, lr_from_theory(theory.ef21_step_size, 0.1)),
    "ef21_p": SearchSpace("quantized", {}, lr_from_theory(theory.ef21_step_size, 0.1)),
    "ef_bv": SearchSpace(
        "quantized", {"damping": (0.5, 0.9), "scaling": (0.5, 0.9)}, lr_from_theory(theory.ef21_step_size, 0.1)
    ),
    "clag": SearchSpace("lazy", {"zeta": (1.0, 4.0, 16.0)}, lr_from_theory(theory.ef21_step_size, 0.1)),
    "diana": SearchSpace(
        "quantized", {"damping": (0.9, 0.5)}, lr_from_theory(theory.diana_step_size, 1 / 8), compressor="natural"
    ),
    "dasha": SearchSpace(
        "quantized",
        {"estimate_momentum": (0.1, 0.3)},
        lr_from_theory(theory.marina_step_size, 9.0, 0.1),
        compressor="rand_k",
    ),
    "marina": SearchSpace(
        "quantized",
        {"probability": (0.1, 0.05, 0.3)},
        lr_from_theory(theory.marina_step_size, 9.0, 0.1),
        compressor="rand_k",
    ),
    "fedavg": SearchSpace("local", LOCAL, lr_from_worker_smoothness),
    "fedpaq": SearchSpace("local", LOCAL | {"levels": (15, 3)}, lr_from_worker_smoothness),
    "fedlaq": SearchSpace("local", LOCAL | LAZY, lr_from_worker_smoothness),
    "sgd": SearchSpace("stochastic", {}, lr_from_smoothness(0.1), True),
    "qsgd": SearchSpace("stochastic", {"levels": (15, 3)}, lr_from_smoothness(0.1), True),
    "terngrad": SearchSpace("stochastic", {}, lr_from_smoothness(0.1), True),
    "ssgd": SearchSpace("stochastic", {"density": (0.25, 0.05)}, lr_from_smoothness(0.1), True),
    "sign_sgd": SearchSpace("stochastic", {}, constant_lr(1e-3), True),
    "ef_sign_sgd": SearchSpace("stochastic", {}, lr_from_smoothness(0.1), True),
    "topk_ef": SearchSpace("stochastic", {}, lr_from_smoothness(0.1), True),
    "dgc": SearchSpace("stochastic", {"momentum": (0.9, 0.5)}, lr_from_smoothness(0.01), True),
    "ef21_sgdm": SearchSpace("stochastic", {"eta": (0.1, 0.5)}, lr_from_smoothness(0.1), True),
    "slaq": SearchSpace("lazy stochastic", LAZY | BITS, lr_from_smoothness(0.1), True),
    "lasg_wk1": SearchSpace("lazy stochastic", LAZY, lr_from_smoothness(0.1), True),
    "lasg_wk2": SearchSpace("lazy stochastic", LAZY, lr_from_smoothness(0.1), True),
    "lasg_ps": SearchSpace("lazy stochastic", LAZY, lr_from_smoothness(0.1), True),
    "cada1": SearchSpace("lazy stochastic", CADA, constant_lr(1e-2), True),
    "cada2": SearchSpace("lazy stochastic", CADA, constant_lr(1e-2), True),
}
# of a method without a row, named or the user's
USER_SEARCH_SPACE = SearchSpace("own", {}, lr_from_smoothness(1))
