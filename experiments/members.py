"""What is searched for a method, and its step of theory. A method without a row is searched over lr alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments import problems
from laqjax import theory


@dataclass(frozen=True)
class Member:
    """What is searched for a method. kind: of the panels. axes: its own numbers, the default of each first.

    step: the step of theory of a case; where L is unknown, a plain step to start from. stochastic: it runs on minibatches.
    """

    kind: str
    axes: dict[str, tuple[Any, ...]]
    step: Callable[[problems.Case], float]
    stochastic: bool = False
    compressor: str | None = None


def smooth(scale: float) -> Callable[[problems.Case], float]:
    """Scale / L; scale / (10 M) where L is not known."""
    return lambda case: scale / (case.smoothness[1] if case.problem.curvature else 10 * len(case.shards.weight))


def plain(lr: float) -> Callable[[problems.Case], float]:
    """A step without the scale of the loss."""
    return lambda case: lr


def one_worker(case: problems.Case) -> float:
    """1 / the largest L_m, for steps on a worker's own loss; 0.1 where it is not known."""
    return 1 / case.smoothness[0].max() if case.problem.curvature else 0.1


def of_theory(step: Callable[..., float], *constants: float) -> Callable[[problems.Case], float]:
    """A step that theory admits; 1 / (10 M) where L is not known."""
    return lambda case: step(*case.smoothness, *constants) if case.problem.curvature else smooth(1)(case)


LAZY: dict[str, Any] = {"xi": (0.1, 0.4, 0.8)}
BITS: dict[str, Any] = {"bits": (4, 2, 8)}
CADA: dict[str, Any] = {"c": (0.6, 0.06, 6.0)}
LOCAL: dict[str, Any] = {"num_local_steps": (2, 5)}
MEMBERS = {
    "gd": Member("full", {}, smooth(1)),
    "qgd": Member("quantized", BITS, smooth(1)),
    "lag_wk": Member("lazy", LAZY, smooth(0.8)),
    "lag_ps": Member("lazy", LAZY, smooth(0.8)),
    "laq": Member("lazy", LAZY | BITS, smooth(0.8)),
    "two_laq": Member("lazy", LAZY | BITS, smooth(0.8)),
    "laq_adaptive": Member("lazy", LAZY | {"min_bits": (3, 2)}, smooth(0.8)),
    "iag_cyclic": Member("full", {}, smooth(0.1)),
    "iag_random": Member("full", {}, smooth(0.16)),
    "ef21": Member("quantized", {}, of_theory(theory.ef21_step_size, 0.1)),
    "ef21_p": Member("quantized", {}, of_theory(theory.ef21_step_size, 0.1)),
    "ef_bv": Member("quantized", {"damping": (0.5, 0.9), "scaling": (0.5, 0.9)}, of_theory(theory.ef21_step_size, 0.1)),
    "clag": Member("lazy", {"zeta": (1.0, 4.0, 16.0)}, of_theory(theory.ef21_step_size, 0.1)),
    "diana": Member(
        "quantized", {"damping": (0.9, 0.5)}, of_theory(theory.diana_step_size, 1 / 8), compressor="natural"
    ),
    "dasha": Member(
        "quantized",
        {"estimate_momentum": (0.1, 0.3)},
        of_theory(theory.marina_step_size, 9.0, 0.1),
        compressor="rand_k",
    ),
    "marina": Member(
        "quantized",
        {"probability": (0.1, 0.05, 0.3)},
        of_theory(theory.marina_step_size, 9.0, 0.1),
        compressor="rand_k",
    ),
    "fedavg": Member("local", LOCAL, one_worker),
    "fedpaq": Member("local", LOCAL | {"levels": (15, 3)}, one_worker),
    "fedlaq": Member("local", LOCAL | LAZY, one_worker),
    "sgd": Member("stochastic", {}, smooth(0.1), True),
    "qsgd": Member("stochastic", {"levels": (15, 3)}, smooth(0.1), True),
    "terngrad": Member("stochastic", {}, smooth(0.1), True),
    "ssgd": Member("stochastic", {"density": (0.25, 0.05)}, smooth(0.1), True),
    "sign_sgd": Member("stochastic", {}, plain(1e-3), True),
    "ef_sign_sgd": Member("stochastic", {}, smooth(0.1), True),
    "topk_ef": Member("stochastic", {}, smooth(0.1), True),
    "dgc": Member("stochastic", {"momentum": (0.9, 0.5)}, smooth(0.01), True),
    "ef21_sgdm": Member("stochastic", {"eta": (0.1, 0.5)}, smooth(0.1), True),
    "slaq": Member("lazy stochastic", LAZY | BITS, smooth(0.1), True),
    "lasg_wk1": Member("lazy stochastic", LAZY, smooth(0.1), True),
    "lasg_wk2": Member("lazy stochastic", LAZY, smooth(0.1), True),
    "lasg_ps": Member("lazy stochastic", LAZY, smooth(0.1), True),
    "cada1": Member("lazy stochastic", CADA, plain(1e-2), True),
    "cada2": Member("lazy stochastic", CADA, plain(1e-2), True),
}
# of a method without a row, named or the user's
OWN = Member("own", {}, smooth(1))
