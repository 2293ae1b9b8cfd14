"""Search space of each method, and its step of theory. A method without a row is searched over its step alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.harness.cases import ProblemInstance
from laqjax import theory

StepRule = Callable[[ProblemInstance], float]


@dataclass(frozen=True)
class SearchSpace:
    """Search space of one method.

    Attributes:
        kind: panel of the method in the figures; methods of a stochastic kind run on minibatches.
        step: step of theory on a case, or a plain step where the smoothness constant L is not known.
        axes: values of the method's own arguments, the default first.
        compressor: name of the compressor, for methods that need one.
    """

    kind: str
    step: StepRule
    axes: dict[str, tuple[Any, ...]]
    compressor: str | None = None


def lr_from_smoothness(scale: float) -> StepRule:
    """Return the step scale / L, or scale / (10 M) if L is not known."""
    return lambda case: scale / (case.smoothness[1] if case.problem.curvature else 10 * len(case.shards.weight))


def lr_from_theory(step: Callable[..., float], *constants: float) -> StepRule:
    """Return the largest step that theory admits, or 1 / (10 M) if L is not known."""
    plain = lr_from_smoothness(1)
    return lambda case: step(*case.smoothness, *constants) if case.problem.curvature else plain(case)


def local_lr(case: ProblemInstance) -> float:
    """Return 1 / max L_m for steps on a worker's own loss, or 0.1 if L_m is not known."""
    return 1 / case.smoothness[0].max() if case.problem.curvature else 0.1


XI, BITS, C, LOCAL = (0.1, 0.4, 0.8), (4, 2, 8), (0.6, 0.06, 6.0), (2, 5)
FULL, LAZY, TENTH = lr_from_smoothness(1), lr_from_smoothness(0.8), lr_from_smoothness(0.1)
EF21, MARINA = lr_from_theory(theory.ef21_step_size, 0.1), lr_from_theory(theory.marina_step_size, 9.0, 0.1)
DIANA = lr_from_theory(theory.diana_step_size, 1 / 8)
MEMBERS = {
    "gd": SearchSpace("full", FULL, {}),
    "qgd": SearchSpace("quantized", FULL, {"bits": BITS}),
    "lag_wk": SearchSpace("lazy", LAZY, {"xi": XI}),
    "lag_ps": SearchSpace("lazy", LAZY, {"xi": XI}),
    "laq": SearchSpace("lazy", LAZY, {"xi": XI, "bits": BITS}),
    "two_laq": SearchSpace("lazy", LAZY, {"xi": XI, "bits": BITS}),
    "laq_adaptive": SearchSpace("lazy", LAZY, {"xi": XI, "min_bits": (3, 2)}),
    "iag_cyclic": SearchSpace("full", TENTH, {}),
    "iag_random": SearchSpace("full", lr_from_smoothness(0.16), {}),
    "ef21": SearchSpace("quantized", EF21, {}),
    "ef21_p": SearchSpace("quantized", EF21, {}),
    "ef_bv": SearchSpace("quantized", EF21, {"damping": (0.5, 0.9), "scaling": (0.5, 0.9)}),
    "clag": SearchSpace("lazy", EF21, {"zeta": (1.0, 4.0, 16.0)}),
    "diana": SearchSpace("quantized", DIANA, {"damping": (0.9, 0.5)}, compressor="natural"),
    "dasha": SearchSpace("quantized", MARINA, {"estimate_momentum": (0.1, 0.3)}, compressor="rand_k"),
    "marina": SearchSpace("quantized", MARINA, {"probability": (0.1, 0.05, 0.3)}, compressor="rand_k"),
    "fedavg": SearchSpace("local", local_lr, {"num_local_steps": LOCAL}),
    "fedpaq": SearchSpace("local", local_lr, {"num_local_steps": LOCAL, "levels": (15, 3)}),
    "fedlaq": SearchSpace("local", local_lr, {"num_local_steps": LOCAL, "xi": XI}),
    "scaffold": SearchSpace("local", local_lr, {"num_local_steps": LOCAL}),
    "fedadam": SearchSpace("local", local_lr, {"num_local_steps": LOCAL, "lr": (0.1, 0.01)}),
    "fedyogi": SearchSpace("local", local_lr, {"num_local_steps": LOCAL, "lr": (0.1, 0.01)}),
    "diloco": SearchSpace("local", lambda case: 1e-2, {"num_local_steps": LOCAL}),
    "lazy_diloco": SearchSpace("local", lambda case: 1e-2, {"num_local_steps": LOCAL, "xi": (0.05, 0.2)}),
    "sparse_loco": SearchSpace("local", lambda case: 1e-2, {"num_local_steps": LOCAL, "chunk": (16,), "k": (2, 4)}),
    "sgd": SearchSpace("stochastic", TENTH, {}),
    "qsgd": SearchSpace("stochastic", TENTH, {"levels": (15, 3)}),
    "terngrad": SearchSpace("stochastic", TENTH, {}),
    "ssgd": SearchSpace("stochastic", TENTH, {"density": (0.25, 0.05)}),
    "sign_sgd": SearchSpace("stochastic", lambda case: 1e-3, {}),
    "ef_sign_sgd": SearchSpace("stochastic", TENTH, {}),
    "topk_ef": SearchSpace("stochastic", TENTH, {}),
    "dgc": SearchSpace("stochastic", lr_from_smoothness(0.01), {"momentum": (0.9, 0.5)}),
    "ef21_sgdm": SearchSpace("stochastic", TENTH, {"eta": (0.1, 0.5)}),
    "slaq": SearchSpace("lazy stochastic", TENTH, {"xi": XI, "bits": BITS}),
    "lasg_wk1": SearchSpace("lazy stochastic", TENTH, {"xi": XI}),
    "lasg_wk2": SearchSpace("lazy stochastic", TENTH, {"xi": XI}),
    "lasg_ps": SearchSpace("lazy stochastic", TENTH, {"xi": XI}),
    "cada1": SearchSpace("lazy stochastic", lambda case: 1e-2, {"c": C}),
    "cada2": SearchSpace("lazy stochastic", lambda case: 1e-2, {"c": C}),
}
USER_SEARCH_SPACE = SearchSpace("own", FULL, {})  # space of a method without a row
LARGEST = {"num_local_steps": 32}  # values at which a grid stops to grow, because a round takes as many gradients
