"""Points of an experiment: a grid, random draws or a config file, over data, problems and an algorithm's arguments."""

import inspect
import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import yaml

import laqjax
from experiments.harness import arguments, cases, cli, runner, user_code
from experiments.harness.results import Targets
from experiments.harness.runner import SweepPoint
from laqjax import algorithms, check_number, distributed, types

Ints = Annotated[tuple[int, ...], cli.variadic_option("INT")]
Floats = Annotated[tuple[float, ...], cli.variadic_option("FLOAT")]
Names = Annotated[tuple[str, ...], cli.variadic_option("NAME")]


@dataclass(frozen=True)
class GridAxes:
    """Axes of the grid over arguments. An algorithm without an argument has no value there; no value is its default."""

    bits: Annotated[tuple[int, ...], cli.variadic_option("INT", "-b")] = ()
    """b, bits per coordinate of a message."""
    max_silence: Annotated[tuple[int, ...], cli.variadic_option("INT", "-C")] = ()
    """C, rounds that a worker may stay silent."""
    window: Annotated[tuple[int, ...], cli.variadic_option("INT", "-D")] = ()
    """D, past rounds in the threshold of the lazy rule."""
    xi: Floats = ()
    """Sum of the weights of these rounds: larger values save more uploads."""
    lr: Floats = ()
    """Learning rate on the sum over workers; 0.02 for an algorithm without a default."""
    minibatch: Ints = ()
    """Rows per worker and round, a block of the shard; default: the whole shard."""
    seeds: Ints = (0,)
    """Seeds of initial parameters and of the algorithm; the tables give means and intervals over them."""
    algorithm: Names = ("laq",)
    """Names in laqjax.algorithms, or FILE.py:factory, called as factory(oracle, num_workers=M, NAME=value, ...)."""
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME VALUE ...")] = ()
    """Axis over any other argument of the algorithms, such as --set compressor top_k:50 natural, --set optimizer adam
    or --set lr 0.1 cosine:0.1:2000. `--set help` lists arguments and values (of these --algorithm only)."""


@dataclass(frozen=True)
class DataAxes:
    """Axes of the grid over data and problems."""

    problem: Names = ("softmax",)
    """softmax, network, ridge, logistic, or FILE.py:make, called with the data: see experiments.harness.cases.UserProblem."""
    dataset: Names = ("mnist",)
    """mnist, tfds:NAME, idx:DIR, libsvm:FILE, npz:FILE, csv:FILE, FILE.py:load, synthetic-linear?..., synthetic-logistic?...:
    see experiments.harness.datasets."""
    partition: Names = ("contiguous",)
    """Partition of the rows over workers: contiguous, shuffled, sorted, dirichlet:ALPHA, unequal:RATIO."""
    partition_seed: Ints = (0,)
    """Seed of the partition."""
    workers: Ints = (10,)
    """M, number of workers."""


DATA_NAMES = tuple(f.name for f in fields(DataAxes))
OPTIONS = {f.name: f"--{f.name.replace('_', '-')}" for part in (DataAxes, GridAxes) for f in fields(part)}
OPTIONS |= arguments.SUPPLIED | {"seed": "--seeds"}


@dataclass(frozen=True)
class SamplingOptions:
    """Selection of points from the grid."""

    num_random: int | None = None
    """Number of random settings, each on all seeds. Two numbers are a range then; other values are choices."""
    sampling_seed: int = 0
    """Seed of these draws."""
    shard: str = "1/1"
    """i/n: every n-th point only, from the i-th on; `merge` joins the folders."""


@dataclass(frozen=True)
class HostOptions:
    """Devices and processes of a run; several processes need a folder that all of them see."""

    devices: int | None = None
    """Devices into which the CPU is split; GPUs and TPUs are all used. Points are spread over devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0 of several processes that share the points, each started with the same command; or "auto"
    under Slurm and on TPU pods, where JAX finds all three options."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0; process 0 shows the progress and the result."""

    def initialize(self) -> None:
        """Set up devices and processes, before JAX is used."""
        set_cpu_devices(self.devices)
        given = self.coordinator, self.num_processes, self.process_id
        if given == ("auto", None, None):
            distributed.initialize_distributed()
        elif given != (None, None, None):
            distributed.initialize_distributed(*given)


@dataclass(frozen=True)
class TargetOptions:
    """Targets at which the cost of a point is read; a point ends at the last."""

    target: Floats = (0.3, 0.1)
    """Residuals f - f* (f itself where f* is not known, as for networks), the largest first."""
    target_accuracy: Floats = ()
    """Shares of correct test rows instead, the lowest first."""

    @property
    def targets(self) -> Targets:
        """Targets as the runner takes them."""
        if not (self.target or self.target_accuracy):
            raise ValueError("target = (): must be residuals > 0; give them, or a --target-accuracy")
        return Targets(self.target_accuracy or self.target, bool(self.target_accuracy))


def axis_values(axes: GridAxes, data: DataAxes) -> dict[str, tuple[Any, ...]]:
    """Return the values of each axis, (None,) where none is given."""
    given = {"algorithm": axes.algorithm} | {
        f.name: getattr(part, f.name) for part in (data, axes) for f in fields(part)
    }
    own, seeds = given.pop("set"), given.pop("seeds")
    known, seen = set().union(*map(argument_names, axes.algorithm)), set[str]()
    for name, *words in own:
        if name in OPTIONS and name != "lr":
            raise ValueError(f"--set {name}: must be given as {OPTIONS[name]}")
        if name in seen:
            raise ValueError(f"--set {name} is given twice: must be one --set {name} with all values")
        if not words:
            raise ValueError(f"--set {name} has no values: must be --set {name} VALUE ...")
        if name not in known:
            allowed = f"{', '.join(axes.algorithm)}: {sorted(known - (OPTIONS.keys() - {'lr'}))}"
            raise ValueError(f"--set {name}: must be an argument of {allowed}{arguments.suggest(name, known)}")
        values = tuple(map(arguments.parse_literal, words))
        are_words = {isinstance(value, str) for value in values}
        given[name] = values if len(are_words) == 1 else tuple(words)  # a column of the tables has one type
        seen.add(name)
    if given["minibatch"] and "sampler" in seen:
        raise ValueError(
            "--minibatch and --set sampler: must be only one of them; --set sampler block:ROWS is the first"
        )
    given["seed"] = seeds  # last: the seeds of a setting follow each other
    for name in (*DATA_NAMES, "algorithm", "seed"):
        if not given[name]:
            raise ValueError(f"axis {name} has no values: must have one or more")
    for seed in seeds:
        check_number("seeds", seed, np.int32, minimum=0)
    return {name: values or (None,) for name, values in given.items()}


def check_given(axes: GridAxes, plain: GridAxes, data: DataAxes) -> None:
    """Check that some algorithm has the argument of each axis that differs from the command's default `plain`."""
    axis_values(axes, data)
    known = set().union(*map(argument_names, axes.algorithm)) | {"algorithm", "seeds", "set"}
    for name in (f.name for f in fields(GridAxes)):
        values = getattr(axes, name)
        if values and values != getattr(plain, name) and {"minibatch": "sampler"}.get(name, name) not in known:
            raise ValueError(
                f"{OPTIONS[name]} {' '.join(map(str, values))}: {', '.join(axes.algorithm)} has no argument {name}; "
                "leave the option out, or add an --algorithm that has it"
            )


def is_number(value: Any) -> bool:
    """Return whether two such values can be a range."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def iter_settings(axes: GridAxes, data: DataAxes, draw: SamplingOptions = SamplingOptions()) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Yield the settings of this shard; settings that differ only in arguments that the algorithm lacks are one."""
    given = axis_values(axes, data)
    if draw.num_random is not None:
        check_number("num_random", draw.num_random, np.int32, minimum=1)
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values in sample_settings(given, draw) if draw.num_random else itertools.product(*given.values()):
        point = dict(zip(given, values, strict=True))
        own = argument_names(point["algorithm"]) | {*DATA_NAMES, "algorithm", "minibatch", "seed"}
        point = {name: value if name in own else None for name, value in point.items()}
        seen.setdefault(tuple(point.values()), point)
    found = re.fullmatch(r"(\d+)/(\d+)", draw.shard)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"shard = {draw.shard!r}: must be i/n with 1 <= i <= n, such as 2/3")
    if n > len(seen):
        raise ValueError(f"shard = {draw.shard!r}: must be at most {len(seen)} shards for {len(seen)} points")
    yield from ({"point": number, **point} for number, point in list(enumerate(seen.values()))[i - 1 :: n])


def sample_settings(given: dict[str, tuple[Any, ...]], draw: SamplingOptions) -> Iterator[tuple[Any, ...]]:
    """Yield random settings on all seeds: two numbers of an argument are a range (lr on a log scale)."""
    rng = np.random.default_rng(draw.sampling_seed)

    def sample(name: str, values: tuple[Any, ...]) -> Any:
        is_choice = name in (*DATA_NAMES, "minibatch", "seed") or not all(map(is_number, values))
        if is_choice or len(values) != 2:
            return values[rng.integers(len(values))]
        low, high = sorted(values)
        if isinstance(low, int) and isinstance(high, int):
            return int(rng.integers(low, high, endpoint=True))
        if name != "lr":
            return float(rng.uniform(low, high))
        check_number("lr", low, np.float64, above=0)
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    for _ in range(draw.num_random or 0):
        point = {name: sample(name, values) for name, values in given.items()}
        yield from (tuple((point | {"seed": seed}).values()) for seed in given["seed"])


@cache
def algorithm_factories() -> dict[str, Callable[..., laqjax.Algorithm]]:
    """Return the named algorithms of the library."""
    own = [getattr(algorithms, name) for name in algorithms.__all__]
    return {f.__name__: f for f in own if inspect.signature(f).return_annotation is laqjax.Algorithm}


def get_factory(name: str) -> Callable[..., laqjax.Algorithm]:
    """Return the factory of an algorithm's name or FILE.py:factory."""
    if user_code.is_user_reference(name):
        return user_code.load_user_function(name)
    if name not in (known := algorithm_factories()):
        allowed = f"FILE.py:factory or one of {', '.join(sorted(known))}"
        raise ValueError(f"algorithm = {name!r}: must be {allowed}{arguments.suggest(name, known)}")
    return known[name]


def argument_names(name: str) -> set[str]:
    """Return the arguments of an algorithm."""
    return set(inspect.signature(get_factory(name)).parameters)


def build_points(choices: Sequence[dict[str, Any]], padded_window: int, authors: bool = False, rows: int | None = None) -> list[SweepPoint]:  # fmt: skip
    """Build the points of settings; name all that cannot run before anything is compiled.

    Args:
        choices: settings, as `iter_settings` yields them.
        padded_window: shape of all windows, of the whole sweep: a point of a shard is that of the whole.
        authors: the lazy rule of the authors' program.
        rows: largest number of rows of a worker.
    """
    points, bad = [], {}
    for choice in choices:
        try:
            case = cases.get_case(*(choice[name] for name in DATA_NAMES), rows=rows)
            points.append(build_point(choice, case, padded_window, authors))
        except (TypeError, ValueError) as error:  # TypeError: an argument without a default is missing
            bad.setdefault(str(error), []).append(choice["point"])
    if bad:
        lines = [f"{error} ({ranges(which)})" for error, which in bad.items()]
        raise ValueError("\n".join([*lines, f"{sum(map(len, bad.values()))} of {len(choices)} points cannot run"]))
    return points


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers of points as text: "point 3", or "points 0-35, 40"."""
    there = set(numbers)
    starts, ends = ([n for n in numbers if n + step not in there] for step in (-1, 1))
    parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True)]
    return f"point{'s' if len(numbers) > 1 else ''} {', '.join(parts)}"


def build_point(choice: dict[str, Any], case: cases.ProblemInstance, padded_window: int, authors: bool = False) -> SweepPoint:  # fmt: skip
    """Build the point of a setting; an argument without value and default gets a plain value."""
    name, p, (workers, rows) = choice["algorithm"], case.oracle.size, case.shards.weight.shape
    factory = get_factory(name)
    own = inspect.signature(factory).parameters
    required = {key for key, parameter in own.items() if parameter.default is parameter.empty}
    label = {key: value for key, value in choice.items() if key not in ("seed", "point")}
    label |= {k: v for k, v in arguments.REQUIRED_DEFAULTS.items() if k in required and label.get(k) is None}
    values = {key: value for key, value in label.items() if key in own and value is not None}
    given = {k: arguments.parse_argument(k, v) if isinstance(v, str) else v for k, v in values.items()}
    if "padded_window" in own:
        given["padded_window"] = padded_window
        given |= {"rescale_short_history": True, "force_first_upload": False} if authors else {}
    if "smoothness" in required:
        given["smoothness"] = case.smoothness[0]
    plain = "natural" if own.keys() & {"damping", "estimate_momentum"} else f"top_k:{max(p // 10, 1)}"
    for key in required & {"compressor", "downlink_compressor"} - given.keys():
        given[key] = given.get("compressor") or arguments.parse_argument(key, plain)
    if "k" in required:
        given.setdefault("k", max(p // 10, 1))
    if label.get("minibatch") is not None and "sampler" not in given:
        size = check_number("minibatch", label["minibatch"], np.int32, minimum=1, maximum=rows)
        given["sampler"] = laqjax.samplers.BlockSampler(int(size))
    if "sampler" in given:
        check_number(f"sampler = {label.get('sampler')!r}: size", given["sampler"].size, np.int32, maximum=rows)
        if name == "dasha":
            given.setdefault("mvr_momentum", 0.1)  # DASHA needs one on minibatches
    make = partial(user_code.call_named, name, factory) if user_code.is_user_reference(name) else factory
    alg = make(case.oracle, num_workers=workers, **given)
    if not isinstance(alg, laqjax.Algorithm):
        raise ValueError(f"{name} returned {alg!r:.80}: must be a laqjax.Algorithm")
    key, index = jax.random.key(0), jnp.int32(0)
    keys = types.RoundKeys(key, key, key, index, index)
    try:
        jax.eval_shape(alg.compressor.encode, jax.ShapeDtypeStruct((p,), case.oracle.dtype), keys)
    except ValueError as error:  # of JAX, as for k > p
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None
    return SweepPoint(alg, case, choice["seed"], label, number=choice["point"])


def build_checked_points(settings: Any, choices: list[dict[str, Any]]) -> list[runner.SweepPoint]:
    """Build the points of a command's settings, after checks of all settings."""
    settings.budget.check()
    settings.link.check()
    rows, _ = 200 if settings.quick else None, settings.goal.targets
    chosen = build_points(choices, max_history_length(settings.axes), settings.authors_rule, rows)
    if settings.goal.target_accuracy and not all(point.case.has_accuracy for point in chosen):
        raise ValueError(
            "target_accuracy: must be of a problem with an accuracy, on data with test rows (csv:FILE has none: use "
            "npz:FILE with x_test and y_test, FILE.py:load, or --target)"
        )
    return chosen


def max_history_length(axes: GridAxes) -> int:
    """Return the padded length of the windows of a sweep; 10 is the default window."""
    return max(1, *(axes.window or (10,)))


# ---- command lines ---------------------------------------------------------------------------------------------------


def parse_settings(kind: Any, given: Sequence[str], about: str | None) -> Any:
    """Parse the settings of a command line, which takes precedence over its config file; exit after `--set help`."""
    check_words(kind, given)
    settings = cli.parse_cli(kind, given, about)
    if settings.config:
        given = [*config_to_argv(settings.config, kind), *given]
        check_words(kind, given)
        settings = cli.parse_cli(kind, given, about)
    if ("help",) in settings.axes.set:
        names = settings.axes.algorithm if "--algorithm" in given else tuple(algorithm_factories())
        print(arguments.describe_algorithms({name: get_factory(name) for name in names}, OPTIONS))
        raise SystemExit(0)
    if hosts := getattr(settings, "hosts", None):
        hosts.initialize()
    check_given(settings.axes, kind().axes, settings.data)
    return settings


def check_words(kind: Any, words: Sequence[str]) -> None:
    """Refuse options that must be given by --set: arguments of algorithms, and schedules."""
    own = set().union(*map(argument_names, algorithm_factories())) - option_names(kind) - arguments.SUPPLIED.keys()
    schedules = {form.partition(":")[0] for form in arguments.SCHEDULES}
    option = ""
    for word in words:
        option = word if word.startswith("-") else option
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in own:
            raise ValueError(f"{word}: must be --set {name} VALUE ...; --set help lists the arguments")
        if option == "--lr" and word.partition(":")[0] in schedules:
            raise ValueError(f"--lr {word}: must be numbers; give a schedule as --set lr {word}")
    if "--lr" in words and ("--set", "lr") in itertools.pairwise(words):
        raise ValueError("--lr and --set lr: must be only one of them; --set lr takes numbers and schedules")


def set_cpu_devices(count: int | None) -> None:
    """Set the number of CPU devices that XLA sees; None leaves it as it is."""
    try:
        if count is not None:
            jax.config.update("jax_num_cpu_devices", int(check_number("devices", count, np.int32, minimum=1)))
    except RuntimeError as error:
        raise ValueError(f"devices = {count}: must be set before JAX is used in this process ({error})") from None


def option_names(kind: Any) -> set[str]:
    """Return the names of all options of a settings class and of its groups."""
    nested = {f.name: f.type for f in fields(kind) if is_dataclass(f.type)}
    return {f.name for f in fields(kind)} - nested.keys() | set().union(*map(option_names, nested.values()))


def config_to_argv(path: Path, kind: Any) -> list[str]:
    """Convert a TOML or YAML file to command-line words, so that both have the same names, types and errors."""
    text = path.read_text()
    try:
        given = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds {given!r}: must be names of settings with their values")
    known = option_names(kind) - {"config"}
    for name in sorted(given.keys() - known):
        hint = arguments.suggest(name, known) or "; arguments of algorithms belong under set"
        raise ValueError(f"{path}: {name} is no setting: must be one of {sorted(known)}{hint}")
    own = given.pop("set", {})
    if not isinstance(own, dict):
        raise ValueError(f"{path}: set = {own!r}: must be names with their values")
    words = []
    for name, value in [*given.items(), *((f"set {name}", value) for name, value in own.items())]:
        option = f"--{name}" if name.startswith("set ") else f"--{name.replace('_', '-')}"
        if isinstance(value, bool) and name in given:
            words.append(option if value else option.replace("--", "--no-"))
        else:
            words += [*option.split(), *map(str, value if isinstance(value, list) else [value])]
    return words


def settings_identity(settings: Any, **more: Any) -> dict[str, Any]:
    """Return what identifies an experiment: all settings that change results, and digests of user files."""
    flat, free = more, ("out", "config", "hosts", "compact_after", "pad_batches", "longest")
    for f in fields(settings):
        value = getattr(settings, f.name)
        flat |= {} if f.name in free else settings_identity(value) if is_dataclass(value) else {f.name: value}
        texts = [text for text in value if isinstance(text, str)] if isinstance(value, tuple) else []
        flat |= {text: digest for text in texts if (digest := user_code.file_digest(text))}
    return flat


def apply_quick_defaults(settings: Any) -> Any:
    """Return settings with quick sizes, in a folder of their own, where these are not given."""
    if not settings.quick:
        return settings
    plain = type(settings)()
    out = settings.out if settings.out != plain.out else Path(f"{plain.out}-quick")
    goal = replace(settings.goal, target=(1.0, 0.5)) if settings.goal == plain.goal else settings.goal
    budget = replace(settings.budget, rounds=min(settings.budget.rounds, 60))
    return replace(settings, budget=budget, goal=goal, out=out)
