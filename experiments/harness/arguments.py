"""Arguments of algorithms on the command line: values by name, such as `top_k:50`, and the text of `--set help`."""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import jax
import optax

from laqjax import check_number, compressors, optimizers, samplers

# arguments of algorithms that follow from an option
SUPPLIED = {"oracle": "--problem", "num_workers": "--workers", "padded_window": "--window", "smoothness": "--dataset"}
# values of arguments without a default
REQUIRED_DEFAULTS = {"lr": 0.02, "damping": 0.5, "scaling": 0.5, "probability": 0.1, "estimate_momentum": 0.5}
REQUIRED_DEFAULTS |= {"num_local_steps": 2, "local_lr": 0.01}
COMPRESSORS = {
    "chunked_top_k:CHUNK:K": compressors.chunked_top_k,
    "grid:BITS": compressors.grid,
    "identity": compressors.identity,
    "natural": compressors.natural,
    "optimal_sparsifier:DENSITY": compressors.optimal_sparsifier,
    "qsgd:LEVELS": compressors.qsgd,
    "rand_k:K": compressors.rand_k,
    "sign[:SCALED]": compressors.sign,
    "statistical_grid:BITS[:SIGMAS]": compressors.statistical_grid,
    "ternary": compressors.ternary,
    "top_k:K": compressors.top_k,
}
OPTIMIZERS = {  # the names after the colons are keyword arguments
    "adagrad": optax.adagrad,
    "adam[:B1:B2]": optax.adam,
    "adamw[:WEIGHT_DECAY]": optax.adamw,
    "amsgrad": optimizers.amsgrad,
    "lion[:B1:B2]": optax.lion,
    "nesterov:MOMENTUM": partial(optax.sgd, nesterov=True),
    "rmsprop[:DECAY]": optax.rmsprop,
    "sgd[:MOMENTUM]": optax.sgd,
}
SAMPLERS = {"block:ROWS": samplers.BlockSampler, "shuffle:ROWS": samplers.ShuffleSampler}
SCHEDULES = {  # ALPHA: share of LR at the end
    "constant:LR": optax.constant_schedule,
    "cosine:LR:STEPS[:ALPHA]": optax.cosine_decay_schedule,
    "exponential:LR:STEPS:RATE": optax.exponential_decay,
    "linear:LR:STEPS[:ALPHA]": lambda lr, steps, alpha=0.0: optax.linear_schedule(lr, alpha * lr, steps),
    "warmup_cosine:LR:WARMUP:STEPS": partial(optax.warmup_cosine_decay_schedule, 0.0),
}
NAMED_VALUES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "compressor": COMPRESSORS,
    "downlink_compressor": COMPRESSORS,
    "optimizer": OPTIMIZERS,
    "inner": OPTIMIZERS,
    "sampler": SAMPLERS,
    "lr": SCHEDULES,
    "local_lr": SCHEDULES,
}


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" where a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_literal(text: str) -> Any:
    """Convert text to the int, float or bool that it names; return other text as it is."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False}.get(text, text)


@cache  # points with equal words share one object, and so one compiled program
def parse_argument(argument: str, text: str) -> Any:
    """Convert the word of a command line to the value of an algorithm's argument, such as compressor and top_k:50.

    Raises:
        ValueError: the argument takes values by name, and the text is none of them.
    """
    value, forms = parse_literal(text), NAMED_VALUES.get(argument)
    if not isinstance(value, str) or forms is None:
        return value
    name, *words = text.split(":")
    by_name = {re.split(r"\W", form)[0]: form for form in forms}
    form, numbers = by_name.get(name, ""), [parse_literal(word) for word in words]
    counts = (form.partition("[")[0].count(":"), form.count(":"))
    if not form or len(numbers) not in counts or any(isinstance(number, str) for number in numbers):
        hint = "" if form else suggest(name, by_name)
        raise ValueError(f"{argument} = {text!r}: must be one of {', '.join(forms)}{hint}")
    if forms is OPTIMIZERS:
        named = zip(re.findall(r":(\w+)", form.lower()), numbers, strict=False)
        return partial(forms[form], **dict(named)) if numbers else forms[form]
    if forms is SCHEDULES:
        check_number(argument, numbers[0], float, above=0)
        return jax.tree_util.Partial(_unit_schedule(form, *numbers[1:]), numbers[0])
    return forms[form](*numbers)


@cache
def _unit_schedule(form: str, *numbers: Any) -> Callable[[Any, Any], Any]:
    """Build a schedule as a function of lr and round, since points with other lr then share one compiled program."""
    schedule = SCHEDULES[form](1.0, *numbers)
    return lambda lr, round: lr * schedule(round)


def describe_algorithms(factories: Mapping[str, Callable[..., Any]], options: Mapping[str, str]) -> str:
    """Return the text of `--set help`: arguments of algorithms, those with an option of their own, and values by name."""
    lines = ["--set NAME VALUE ... is an axis of values of an argument. Arguments with an option in brackets use that."]
    for name, factory in factories.items():
        about = inspect.getdoc(factory) or ""
        lines += ["", f"{name}: {about.partition(chr(10))[0]}"]
        described = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", about, re.MULTILINE))
        signature = inspect.signature(factory).parameters
        for key in (key for key in signature if key not in SUPPLIED):
            default = signature[key].default
            if default is inspect.Parameter.empty:
                default = (REQUIRED_DEFAULTS | {"k": "p // 10"}).get(key, "-")
            text = " ".join(described.get(key, "").split()).split(". ")[0].rstrip(".")
            if key in NAMED_VALUES:
                text = f"{re.split('[:,]', text)[0]}; values by name: see below"
            head = f"{key} ({options[key]})" if key in options else key
            lines.append(f"  {head:<27} {getattr(default, '__name__', default)!s:<7} {text}".rstrip())
    lines += ["", "Values by name (in brackets: may be left out):"]
    return "\n".join([*lines, *(f"  {key:<20} {'  '.join(forms)}" for key, forms in NAMED_VALUES.items())])
