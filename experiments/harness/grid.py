"""Which points: a grid, random draws or a config file, over an algorithm's numbers, data and problems."""

import inspect
import itertools
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import yaml

import laqjax
from experiments.harness import cases, cli, runner, user_code
from experiments.harness.results import Targets
from experiments.harness.runner import SweepPoint
from laqjax import algorithms, check_number, distributed, types

# arguments of algorithms that the command supplies, and the option from which they follow
SUPPLIED = {"oracle": "--problem", "num_workers": "--workers", "sampler": "--minibatch", "padded_window": "--window"}
SUPPLIED |= {"smoothness": "--dataset", "downlink_compressor": "--compressor", "seed": "--seeds"}
# what an algorithm must have, where nothing is given
REQUIRED_DEFAULTS = {
    "lr": 0.02,
    "damping": 0.5,
    "scaling": 0.5,
    "probability": 0.1,
    "estimate_momentum": 0.5,
    "num_local_steps": 2,
    "local_lr": 0.01,
}


Ints = Annotated[tuple[int, ...], cli.variadic_option("INT")]
Floats = Annotated[tuple[float, ...], cli.variadic_option("FLOAT")]
Names = Annotated[tuple[str, ...], cli.variadic_option("NAME")]


@dataclass(frozen=True)
class GridAxes:
    """Every list is an axis of the grid. A number that an algorithm does not have is left out there; one that is not given is
    what the algorithm takes by itself.
    """

    bits: Annotated[tuple[int, ...], cli.variadic_option("INT", "-b")] = ()
    """b, bits for each coordinate of a message."""
    max_silence: Annotated[tuple[int, ...], cli.variadic_option("INT", "-C")] = ()
    """C, rounds that a worker may be silent at most."""
    window: Annotated[tuple[int, ...], cli.variadic_option("INT", "-D")] = ()
    """D, rounds that the lazy rule looks back on."""
    xi: Floats = ()
    """Sum of the weights of these rounds: the larger, the lazier."""
    lr: Floats = ()
    """Step size; 0.02 where an algorithm must have one."""
    seeds: Ints = (0,)
    """Seeds of the start and of the algorithm's draws; over them the tables give means and intervals."""
    algorithm: Names = ("laq",)
    """Names in laqjax.algorithms, or FILE.py:factory, called as factory(oracle, num_workers=M, NAME=value, ...)."""
    set: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME VALUE ...")] = ()
    """An axis over any other keyword argument of the algorithms, as --set momentum 0.5 0.9."""
    compressor: Names = ()
    """Of ef21, clag, diana, marina, ...: top_k:K, rand_k:K, natural, sign, ternary, qsgd:LEVELS, grid:BITS."""
    k: Ints = ()
    """Coordinates that topk_ef and dgc send; a tenth of the parameters when not given."""
    minibatch: Ints = ()
    """Rows per worker and round, one of the shard's fixed blocks; the whole shard when not given."""
    levels: Ints = ()
    """Of qsgd and fedpaq: steps between 0 and the vector's norm."""
    density: Floats = ()
    """Of ssgd: the share of coordinates sent."""
    zeta: Floats = ()
    """Of clag: the larger, the lazier."""
    damping: Floats = ()
    """Of diana and ef_bv: how fast the memories follow."""
    probability: Floats = ()
    """Of marina: the share of rounds with full gradients."""
    c: Floats = ()
    """Of the LASG and CADA rules: the absolute weight of the history, instead of xi."""
    period: Ints = ()
    """Of lasg_wk1 and cada1: rounds between two snapshots."""
    min_bits: Ints = ()
    """Of laq_adaptive: the fewest bits."""
    max_bits: Ints = ()
    """Of laq_adaptive: the most bits."""
    downlink_bits: Ints = ()
    """Of two_laq: bits of the way down; as up when not given."""


@dataclass(frozen=True)
class DataAxes:
    """What the points run on; these are axes too."""

    problem: Names = ("softmax",)
    """softmax, network, ridge, logistic, or FILE.py:make, called with the data set: see experiments.harness.cases.UserProblem."""
    dataset: Names = ("mnist",)
    """mnist, tfds:NAME, idx:DIR, libsvm:FILE, npz:FILE, csv:FILE, FILE.py:load, synthetic-linear?..., synthetic-logistic?...:
    see experiments.harness.datasets."""
    partition: Names = ("contiguous",)
    """How rows are dealt out: contiguous, shuffled, sorted, dirichlet:ALPHA, unequal:RATIO."""
    partition_seed: Ints = (0,)
    """Seed of the shuffles and of Dirichlet's draws."""
    workers: Ints = (10,)
    """M, how many workers share the data."""


@dataclass(frozen=True)
class SamplingOptions:
    """Points drawn instead of the whole grid."""

    num_random: int | None = None
    """So many settings, each run on all seeds: two values of a number are its range then; more, and names, are choices."""
    sampling_seed: int = 0
    """Seed of these draws."""
    shard: str = "1/1"
    """i/n: only every n-th point, from the i-th; join the folders with `merge`."""


@dataclass(frozen=True)
class HostOptions:
    """Where the points run: on all devices of this process, or of several that share a folder which all of them see."""

    devices: int | None = None
    """Devices that the CPU is cut into; points are spread over them. GPUs and TPUs are all used as they are."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes share the points, each started with the same command and its own
    number; or "auto" under Slurm and on TPU pods, where JAX finds all three."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """The number of this one, from 0; process 0 shows the progress and the result."""

    def initialize(self) -> None:
        """Set devices and processes up, before JAX is used.

        Raises:
            ValueError, TimeoutError: see `cpu_devices` and `laqjax.distributed.initialize_distributed`.
        """
        set_cpu_devices(self.devices)
        where, count, rank = self.coordinator, self.num_processes, self.process_id
        if (where, count, rank) == ("auto", None, None):
            distributed.initialize_distributed()
        elif (where, count, rank) != (None, None, None):
            distributed.initialize_distributed(where, count, rank)


def axis_values(axes: GridAxes, data: DataAxes, strict: bool = True) -> dict[str, tuple[Any, ...]]:
    """The axes under their names in a row, (None,) where none is given. strict: no algorithm lacks all that is --set."""
    given = {f.name: getattr(part, f.name) for part in (data, axes) for f in fields(part)}
    own, seeds = given.pop("set"), given.pop("seeds")
    given = {"algorithm": given.pop("algorithm"), **given}
    options = {f.name: f"--{f.name.replace('_', '-')}" for part in (data, axes) for f in fields(part)} | SUPPLIED
    for name, *values in own:
        if name in options:
            raise ValueError(f"--set {name}: expected {options[name]}, the option that gives it")
        if name in given:
            raise ValueError(f"--set {name} is given twice: expected all its values behind one --set {name}")
        given[name] = tuple(parse_literal(value) for value in values)
        if not values:
            raise ValueError(f"--set {name} has no values: expected NAME VALUE ...")
    known = set().union(*(argument_names(name) for name in given["algorithm"]))
    lost = [name for name, *_ in own if name not in known]
    if lost and strict:
        there = f"{', '.join(given['algorithm'])}: {sorted(known - options.keys())}"
        raise ValueError(f"--set {lost[0]}: expected an argument of {there}{cli.suggest(lost[0], known)}")
    optional = {f.name for f in fields(GridAxes) if f.default == ()}
    empty = [name for name, values in (given | {"seed": seeds}).items() if not values and name not in optional]
    if empty:
        raise ValueError(f"axis {empty[0]} has no values: expected one or more")
    for seed in seeds:
        check_number("seeds", seed, np.int32, minimum=0)
    return {name: values or (None,) for name, values in given.items()} | {"seed": seeds}


def check_given(axes: GridAxes, plain: GridAxes, data: DataAxes) -> None:
    """Raise ValueError for an axis that differs from the command's own (`plain`) and that no algorithm has."""
    axis_values(axes, data)
    known = set().union(*map(argument_names, axes.algorithm))
    known |= {"algorithm", "seeds", "set"} | ({"minibatch"} if "sampler" in known else set())
    for name in (f.name for f in fields(GridAxes) if f.name not in known):
        values = getattr(axes, name)
        if values and values != getattr(plain, name):
            option = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
            raise ValueError(
                f"{option}: {', '.join(axes.algorithm)} has no argument {name}; leave the option out, or add an --algorithm "
                "that has it"
            )


def is_number(value: Any) -> bool:
    """Whether two of them can be a range."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse_literal(text: str) -> Any:
    """A number or a word of the command line."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False}.get(text, text)


def iter_settings(
    axes: GridAxes, data: DataAxes, draw: SamplingOptions = SamplingOptions()
) -> Iterator[dict[str, Any]]:
    """The settings of this shard, duplicates (from numbers that an algorithm does not have) once."""
    given = axis_values(axes, data)
    if draw.num_random is not None:
        check_number("num_random", draw.num_random, np.int32, minimum=1)
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values in sample_settings(given, draw) if draw.num_random else itertools.product(*given.values()):
        point = dict(zip(given, values, strict=True))
        own = (
            argument_names(point["algorithm"]) | {f.name for f in fields(DataAxes)} | {"algorithm", "minibatch", "seed"}
        )
        point = {name: value if name in own else None for name, value in point.items()}
        seen.setdefault(tuple(point.values()), point)
    found = re.fullmatch(r"(\d+)/(\d+)", draw.shard)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise ValueError(f"shard = {draw.shard!r}: expected i/n with 1 <= i <= n, such as 2/3")
    if n > len(seen):
        raise ValueError(f"shard = {draw.shard!r}: expected at most {len(seen)} shards for {len(seen)} points")
    yield from ({"point": number, **point} for number, point in list(enumerate(seen.values()))[i - 1 :: n])


def sample_settings(given: dict[str, tuple[Any, ...]], draw: SamplingOptions) -> Iterator[tuple[Any, ...]]:
    """Random settings on all seeds: two numbers of the algorithm are a range (lr on a log scale), all else choices."""
    rng = np.random.default_rng(draw.sampling_seed)
    choices = {f.name for f in fields(DataAxes)} | {"algorithm", "compressor", "minibatch", "seed"}

    def value(name: str, values: tuple[Any, ...]) -> Any:
        if len(values) != 2 or name in choices or not all(map(is_number, values)):
            return values[rng.integers(len(values))]
        low, high = sorted(values)
        if isinstance(low, int) and isinstance(high, int):
            return int(rng.integers(low, high, endpoint=True))
        if name != "lr":
            return float(rng.uniform(low, high))
        check_number("lr", low, np.float64, above=0)
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    for _ in range(draw.num_random or 0):
        point = {name: value(name, values) for name, values in given.items()}
        for seed in given["seed"]:
            yield tuple((point | {"seed": seed}).values())


def algorithm_factories() -> dict[str, Callable[..., laqjax.Algorithm]]:
    """The named algorithms of the library."""
    own = [getattr(algorithms, name) for name in algorithms.__all__]
    return {f.__name__: f for f in own if inspect.signature(f).return_annotation is laqjax.Algorithm}


def get_factory(name: str) -> Callable[..., laqjax.Algorithm]:
    """The function behind a name; ValueError when there is none."""
    if user_code.is_user_reference(name):
        return user_code.load_user_function(name)
    if name not in algorithm_factories():
        known = sorted(algorithm_factories())
        raise ValueError(
            f"algorithm = {name!r}: expected FILE.py:factory or one of {', '.join(known)}{cli.suggest(name, known)}"
        )
    return algorithm_factories()[name]


def argument_names(name: str) -> set[str]:
    """The keyword arguments of a named algorithm."""
    return set(inspect.signature(get_factory(name)).parameters)


def build_points(choices: Sequence[dict[str, Any]], padded_window: int, authors: bool = False, rows: int | None = None) -> list[SweepPoint]:  # fmt: skip
    """The points of settings as `select` yields them; every bad one is named, before anything is compiled.

    Args:
        choices: of the points.
        padded_window: the shape that all windows share; of the whole sweep, so that a shard's points are those of the whole.
        authors: the lazy rule of the authors' program.
        rows: of each worker, at most.
    """
    points, bad = [], {}
    for choice in choices:
        try:
            names = [choice[f.name] for f in fields(DataAxes)]
            points.append(build_point(choice, cases.get_case(*names, rows=rows), padded_window, authors))
        except (TypeError, ValueError) as error:  # TypeError: an algorithm that needs more than this command line gives
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


def build_point(
    choice: dict[str, Any], case: cases.ProblemInstance, padded_window: int, authors: bool = False
) -> SweepPoint:
    """A point of a setting; what its algorithm must have and the setting does not say is a plain choice."""
    name, oracle = choice["algorithm"], case.oracle
    signature = inspect.signature(get_factory(name)).parameters
    own, p = set(signature), oracle.size
    label = {key: value for key, value in choice.items() if key not in ("seed", "point")}
    label |= {
        key: value for key, value in REQUIRED_DEFAULTS.items() if is_required(signature, key) and label.get(key) is None
    }
    given = {key: label[key] for key in own & label.keys() if label[key] is not None}
    if "padded_window" in own:
        given |= {"padded_window": padded_window} | (
            {"rescale_short_history": True, "force_first_upload": False} if authors else {}
        )
    if is_required(signature, "smoothness"):
        given["smoothness"] = case.smoothness[0]
    if "compressor" in own:
        plain = "natural" if own & {"damping", "estimate_momentum"} else f"top_k:{max(p // 10, 1)}"
        given |= dict.fromkeys(
            own & {"compressor", "downlink_compressor"}, parse_compressor(label.get("compressor") or plain)
        )
    if is_required(signature, "k"):
        given["k"] = label.get("k") or max(p // 10, 1)
    if label.get("minibatch") is not None:
        most = case.shards.weight.shape[1]
        given["sampler"] = laqjax.samplers.BlockSampler(
            int(check_number("minibatch", label["minibatch"], np.int32, minimum=1, maximum=most))
        )
        if name == "dasha" and "mvr_momentum" not in given:
            given["mvr_momentum"] = 0.1  # it needs one on minibatches
    workers = len(case.shards.weight)
    call = (
        user_code.call_user_function
        if user_code.is_user_reference(name)
        else lambda _, *given, **named: algorithm_factories()[name](*given, **named)
    )
    alg = call(name, oracle, num_workers=workers, **given)
    if not isinstance(alg, laqjax.Algorithm):
        raise ValueError(f"{name} returned {alg!r:.80}: expected a laqjax.Algorithm")
    key, index = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    keys: Any = types.RoundKeys(key, key, key, index, index)  # pyright: ignore[reportArgumentType]
    try:
        jax.eval_shape(alg.compressor.encode, jax.ShapeDtypeStruct((p,), oracle.dtype), keys)
    except ValueError as error:  # such as k > p, in JAX's words
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from None
    return SweepPoint(alg, case, choice["seed"], label, number=choice["point"])


def is_required(signature: Any, *names: str) -> bool:
    """Whether a factory has these arguments, the first without a default."""
    return all(name in signature for name in names) and signature[names[0]].default is inspect.Parameter.empty


def parse_compressor(text: str) -> Any:
    """A compressor by name, as `top_k:50`."""
    name, _, size = text.partition(":")
    makers = ("grid", "identity", "natural", "qsgd", "rand_k", "optimal_sparsifier", "sign", "ternary", "top_k")
    try:
        return getattr(laqjax.compressors, name if name in makers else "")(*([float(size)] if size else []))
    except (AttributeError, TypeError):
        raise ValueError(
            f"compressor = {text!r}: expected one of {', '.join(makers)}, with its number as top_k:50"
            f"{'' if name in makers else cli.suggest(name, makers)}"
        ) from None


def max_history_length(choices: Sequence[dict[str, Any]], axes: GridAxes) -> int:
    """The padding of the windows of a sweep."""
    return max(1, *axes.window, *(int(choice["window"] or 1) for choice in choices), 10 if not axes.window else 1)


# ---- command lines ---------------------------------------------------------------------------------------------------


def parse_settings(kind: Any, given: Sequence[str], about: str | None) -> Any:
    """The settings of a command line; those of its config file stand before it, so that the command line wins."""
    settings = cli.parse_cli(kind, given, about)
    if settings.config:
        settings = cli.parse_cli(kind, [*config_to_argv(settings.config, kind), *given], about)
    if hosts := getattr(settings, "hosts", None):
        hosts.initialize()
    check_given(settings.axes, kind().axes, settings.data)
    return settings


def set_cpu_devices(count: int | None) -> None:
    """Make XLA see so many devices in this machine's CPU; others, as GPUs, are not touched. None: as it is.

    Raises:
        ValueError: no number of devices, or JAX has computed something already.
    """
    if count is None:
        return
    check_number("devices", count, np.int32, minimum=1)
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        raise ValueError(
            f"devices = {count}: expected to be set before JAX is used in this process ({error})"
        ) from None


def option_names(kind: Any) -> set[str]:
    """The names of all options of a settings class, those of its groups too."""
    nested = {f.name: f.type for f in fields(kind) if is_dataclass(f.type)}
    return {f.name for f in fields(kind)} - nested.keys() | set().union(*map(option_names, nested.values()))


def config_to_argv(path: Path, kind: Any) -> list[str]:
    """A TOML or YAML file as command-line arguments: one set of names, types and errors for both."""
    text = path.read_text()
    try:
        given = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds {given!r}: expected names of settings with their values")
    known = option_names(kind) - {"config"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(
            f"{path}: {unknown} are no settings; expected names among {sorted(known)}{cli.suggest(unknown[0], known)}"
        )
    words = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{name.replace('_', '-')}")
        elif name == "set":
            if not isinstance(value, dict):
                raise ValueError(f"{path}: set = {value!r}: expected names with their values")
            for axis, values in value.items():
                words += [option, axis, *map(str, values if isinstance(values, list) else [values])]
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


def settings_identity(settings: Any, **more: Any) -> dict[str, Any]:
    """What makes an experiment this experiment: all settings but where they stand, and what stands in files of one's own."""
    flat, free = more, ("out", "config", "hosts", "compact_after", "pad_batches", "longest")
    for f in fields(settings):
        value = getattr(settings, f.name)
        flat |= {} if f.name in free else settings_identity(value) if is_dataclass(value) else {f.name: value}
        texts = [text for text in value if isinstance(text, str)] if isinstance(value, tuple) else []
        flat |= {text: digest for text in texts if (digest := user_code.file_digest(text))}
    return flat


@dataclass(frozen=True)
class TargetOptions:
    """When a point is done, and its cost read off."""

    target: Floats = (0.3, 0.1)
    """Residuals f - f* (f itself where no f* is known, as for networks), the largest first."""
    target_accuracy: Floats = ()
    """Shares of right test rows instead, the lowest first."""

    @property
    def targets(self) -> Targets:
        """What the study takes."""
        if not (self.target or self.target_accuracy):
            raise ValueError("target = (): expected residuals > 0, or a --target-accuracy")
        return Targets(self.target_accuracy or self.target, bool(self.target_accuracy))


def build_checked_points(settings: Any, choices: list[dict[str, Any]]) -> list[runner.SweepPoint]:
    """The points of these settings, all checked."""
    settings.budget.check()
    settings.link.check()
    rows, _ = 200 if settings.quick else None, settings.goal.targets
    chosen = build_points(choices, max_history_length(choices, settings.axes), settings.authors_rule, rows)
    if settings.goal.target_accuracy and not all(point.case.has_accuracy for point in chosen):
        raise ValueError("target_accuracy: expected a problem with an accuracy, and data with test rows")
    return chosen


def apply_quick_defaults(settings: Any) -> Any:
    """Return settings with quick sizes, in a folder of their own, where these are not given."""
    if not settings.quick:
        return settings
    plain = type(settings)()
    out = settings.out if settings.out != plain.out else Path(f"{plain.out}-quick")
    goal = replace(settings.goal, target=(1.0, 0.5)) if settings.goal == plain.goal else settings.goal
    budget = replace(settings.budget, rounds=min(settings.budget.rounds, 60))
    return replace(settings, budget=budget, goal=goal, out=out)
