"""Sweep b, C, D, xi, lr and seeds as one compiled program, and read off what is cheapest.

    python -m experiments.sweep                                      the default grid on the embedded MNIST, 3 minutes
    python -m experiments.sweep -b 2 4 8 -C 10 100 -D 1 10 --seeds 0 1 2 --target 1e-2 1e-3 --rounds 2000
    python -m experiments.sweep --random 200 -b 2 8 -C 1 200 --lr 0.005 0.05        two values are a range here
    python -m experiments.sweep --shard 2/3 ...  and  python -m experiments.sweep merge DIR DIR DIR --out DIR

Leaves in --out: points (a row a point), summary (mean and 95 % interval over seeds), curves (thinned), masks (who sent
when), each as Parquet, the first two as CSV too; figures as PNG and SVG; the plan, the exact command and the versions.
A batch's rows are safe when it ends: after a kill the same command goes on, and no row differs from an undisturbed run.
"""

import inspect
import itertools
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import scipy.stats
import tyro
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import laqjax
from experiments import datasets, files, plots, problems, race
from laqjax import algorithms, checks, types

CHUNK = 50  # rounds between two looks at who is done
SHORT = 100  # rounds: with fewer to go a cut batch does not earn its compile time
MOST = 64  # points in a batch, for each device: more is not faster, and rows are safe later
# one group, one compile each
SHAPES = ("problem", "dataset", "partition", "partition_seed", "workers", "algorithm", "compressor", "k", "minibatch")
OPTIONAL = ("levels", "density", "zeta", "damping", "probability", "c", "period", "min_bits", "max_bits", "bits_down")
KNOBS = ("bits", "limit", "window", "xi", "lr", *OPTIONAL)
WHOLE = ("bits", "limit", "window", "levels", "period", "min_bits", "max_bits", "bits_down")
# what an algorithm must have, where the command line gives none
PLAIN = {"damping": 0.5, "scaling": 0.5, "probability": 0.1, "a": 0.5, "steps": 2, "local_lr": 0.01}
COST = ("rounds", "uploads", "bits_up", "bits_down", "seconds")


def short(letter: str) -> Any:
    """A one-letter name for an option."""
    return tyro.conf.arg(aliases=[f"-{letter}"])


@dataclass(frozen=True)
class Settings:
    """A grid of points: every list is an axis."""

    bits: Annotated[tuple[float, ...], short("b")] = (2, 3, 4, 8)
    """b, per coordinate."""
    limit: Annotated[tuple[float, ...], short("C")] = (10, 100)
    """C, rounds of silence at most."""
    window: Annotated[tuple[float, ...], short("D")] = (1, 10)
    """D, rounds that the rule looks back on."""
    xi: tuple[float, ...] = (0.8,)
    """Sum of the weights of these rounds."""
    lr: tuple[float, ...] = (0.02,)
    """Step size."""
    seeds: tuple[int, ...] = (0,)
    """Of the start and of the algorithm's draws."""
    algorithm: tuple[str, ...] = ("laq",)
    """Names in laqjax.algorithms; a knob that one does not have is left out there."""
    compressor: tuple[str, ...] = ()
    """Of ef21, clag, diana, marina: top_k:K, rand_k:K, natural, sign, ternary, qsgd:LEVELS, grid:BITS."""
    k: tuple[int, ...] = ()
    """Of topk_ef; a tenth of the parameters when not given."""
    minibatch: tuple[int, ...] = ()
    """Rows per worker and round, one of the shard's fixed blocks; the whole shard when not given."""
    levels: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    zeta: tuple[float, ...] = ()
    damping: tuple[float, ...] = ()
    probability: tuple[float, ...] = ()
    c: tuple[float, ...] = ()
    period: tuple[float, ...] = ()
    min_bits: tuple[float, ...] = ()
    max_bits: tuple[float, ...] = ()
    bits_down: tuple[float, ...] = ()
    problem: tuple[str, ...] = ("softmax",)
    """softmax, network, ridge, logistic."""
    dataset: tuple[str, ...] = ("mnist",)
    """mnist, tfds:NAME, idx:DIR, libsvm:FILE, synthetic-linear?..., synthetic-logistic?..."""
    partition: tuple[str, ...] = ("contiguous",)
    """contiguous, shuffled, sorted, dirichlet:ALPHA, unequal:RATIO."""
    partition_seed: tuple[int, ...] = (0,)
    workers: tuple[int, ...] = (10,)
    authors: bool = False
    """The lazy rule of the authors' program: first upload by the rule, xi ramped up over the first D rounds."""
    rounds: int = 400
    target: tuple[float, ...] = (1e-1, 3e-2)
    """Residuals f - f* (f itself for the network) at which the cost is read off; a point ends at the last.
    Minibatch methods are measured on all data every 50 rounds."""
    random: int | None = None
    """Draw so many settings instead of the grid, each run on all seeds: two values of b, C, D, xi, lr or another number
    of an algorithm are its range then; more, and the values of all other axes, are choices."""
    random_seed: int = 0
    uplink_mbps: float = 10.0
    """Of each worker's own link, for the simulated seconds."""
    downlink_mbps: float = 100.0
    latency_ms: float = 20.0
    """One way."""
    compute_ms: float | None = None
    """Of a worker's gradient; measured here when not given."""
    memory: float | None = None
    """GiB for the points of a batch; half of what is free when not given."""
    batch: int | None = None
    """Points in a batch; as many as fit, at most 64 a device, when not given."""
    shard: str = "1/1"
    """i/n: only every n-th point, from the i-th; join the folders with `merge`."""
    config: Path | None = None
    """A TOML or YAML file of these settings; the command line goes before it."""
    out: Path = Path("results/sweep")
    smoke: bool = False
    """Few examples and rounds: does everything work here?"""


@dataclass(frozen=True)
class Group:
    """Points that share data, problem and algorithm: one compiled program."""

    shards: laqjax.Shards
    problem: laqjax.problems.Problem
    f_star: float
    data: datasets.Dataset
    points: list[dict[str, Any]]
    algs: list[laqjax.Algorithm] = field(default_factory=list)

    @cached_property
    def oracle(self) -> laqjax.oracle.TiledOracle:
        """Loss and gradient of a worker."""
        return self.problem.oracle()

    @cached_property
    def smoothness(self) -> np.ndarray:
        """L_m of the workers."""
        return self.problem.smoothness(self.shards)[0]


def run(settings: Settings, command: Sequence[str] = ()) -> Path:
    """Run what is not yet done of a sweep; tables and figures in the output folder, which is returned."""
    console = Console()
    settings = configured(settings)
    points = list(select(settings))
    groups = checked(points, settings, console)
    sizes = batch_sizes(groups, settings)
    files.claim(settings.out, identity(settings))
    plan = planned(groups, sizes, settings)
    batches = sum(-(-len(group.points) // size) for group, size in zip(groups, plan["batch"], strict=True))
    console.print(
        f"{len(points)} points in {len(groups)} group(s), {batches} batch(es) of {plan['batch']} points, up to {settings.rounds} rounds"
    )
    began, fresh = time.perf_counter(), 0
    with bar(console) as progress:
        task = progress.add_task("points x rounds", total=len(points) * settings.rounds, note="")
        done = 0
        for g, (group, size) in enumerate(zip(groups, plan["batch"], strict=True)):
            for first in range(0, len(group.points), size):
                part = settings.out / "batches" / f"{g:03d}-{first:06d}"
                count = min(size, len(group.points) - first)
                if not intact(part, group.points[first : first + count], console):

                    def show(work: float, note: str, base: int = done) -> None:
                        progress.update(task, completed=base * settings.rounds + work, note=note)

                    compute = settings.compute_ms if settings.compute_ms is not None else plan["compute_ms"][g]
                    frames = run_batch(group, range(first, first + count), size, settings, compute, show)
                    for name, frame in frames.items():
                        save(frame, part.with_name(f"{part.name}-{name}"))
                    fresh += count
                done += count
                progress.update(task, completed=done * settings.rounds, note=f"{done} points done")
    collect(settings.out, groups, plan["batch"])
    spent = time.perf_counter() - began
    files.write_json(
        settings.out / "run.json", files.provenance(command) | {"seconds": spent, "points_computed": fresh}
    )
    report(settings.out, console)
    console.print(f"{spent:.0f} s; figures and tables: {settings.out}")
    return settings.out


def bar(console: Console) -> Progress:
    """Progress with the time to go and a note."""
    percent, note = TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[note]}")
    named = TextColumn("{task.description}")
    return Progress(named, BarColumn(), percent, TimeElapsedColumn(), TimeRemainingColumn(), note, console=console)


def configured(settings: Any) -> Any:
    """Settings with smoke sizes, in a folder of their own, where these are not given."""
    if not settings.smoke:
        return settings
    plain = type(settings)()
    out = settings.out if settings.out != plain.out else Path(f"{plain.out}-smoke")
    target = settings.target if settings.target != plain.target else (1.0, 0.5)
    return replace(settings, rounds=min(settings.rounds, 60), target=target, out=out)


def from_file(path: Path, kind: type[Settings]) -> list[str]:
    """A TOML or YAML file as command-line arguments: one set of names, types and errors for both."""
    text = path.read_text()
    try:
        given = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is no {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path} holds {given!r}: expected names of settings with their values")
    known = {f.name for f in fields(kind)} - {"config"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"{path}: {unknown} are no settings; expected names among {sorted(known)}")
    arguments = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def identity(settings: Settings) -> dict[str, Any]:
    """What makes a sweep this sweep: `memory` and `batch` too, other batch sizes give other last bits."""
    free = {"out", "config"}
    return {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in free}


def axes(settings: Settings) -> dict[str, tuple[Any, ...]]:
    """The axes under their names in a row."""
    names = {"seeds": "seed"}
    optional = (*OPTIONAL, "compressor", "k", "minibatch")  # not given: what the algorithm does by itself
    return {
        names.get(f.name, f.name): getattr(settings, f.name) or ((None,) if f.name in optional else ())
        for f in fields(settings)
        if f.name in (*SHAPES, *KNOBS, "seeds")
    }


def select(settings: Settings) -> Iterator[dict[str, Any]]:
    """The points of this shard, duplicates (from knobs that an algorithm does not have) once."""
    given = axes(settings)
    empty = [name for name, values in given.items() if not values]
    if empty:
        raise ValueError(f"axis {empty[0]} has no values: expected one or more")
    for seed in settings.seeds:
        checks.number("seeds", seed, np.int32, least=0)
    if settings.random is not None:
        checks.number("random", settings.random, np.int32, least=1)
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for values in drawn(given, settings) if settings.random else itertools.product(*given.values()):
        point = dict(zip(given, values, strict=True))
        own = knobs(point["algorithm"])
        point |= {name: None for name in (*KNOBS, "compressor", "k") if name not in own}
        seen.setdefault(tuple(point.values()), point)
    try:
        i, n = (int(part) for part in settings.shard.split("/"))
    except ValueError:
        i = n = 0
    if not 1 <= i <= n:
        raise ValueError(f"shard = {settings.shard!r}: expected i/n with 1 <= i <= n, such as 2/3")
    if n > len(seen):
        raise ValueError(f"shard = {settings.shard!r}: expected at most {len(seen)} shards for {len(seen)} points")
    for number, point in enumerate(seen.values()):
        if number % n == i - 1:
            yield {"point": number, **point}


def drawn(given: dict[str, tuple[Any, ...]], settings: Settings) -> Iterator[tuple[Any, ...]]:
    """Random settings on all seeds: a knob of two numbers is a range (lr on a log scale), of more a choice."""
    rng = np.random.default_rng(settings.random_seed)

    def draw(name: str, values: tuple[Any, ...]) -> Any:
        if len(values) != 2 or name not in KNOBS:
            return values[rng.integers(len(values))]
        low, high = sorted(values)
        if name in WHOLE:
            return float(rng.integers(int(low), int(high), endpoint=True))
        if name != "lr":
            return float(rng.uniform(low, high))
        checks.number("lr", low, np.float64, above=0)
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    for _ in range(settings.random or 0):
        point = {name: draw(name, values) for name, values in given.items()}
        for seed in settings.seeds:
            yield tuple((point | {"seed": seed}).values())


def knobs(name: str) -> set[str]:
    """The keyword arguments of a named algorithm; ValueError when there is none of that name."""
    factory = factories().get(name)
    if factory is None:
        raise ValueError(f"algorithm = {name!r}: expected one of {', '.join(sorted(factories()))}")
    own = set(inspect.signature(factory).parameters)
    return own - {"c"} if "xi" in own else own  # there c would be a second axis of the same weights


def factories() -> dict[str, Callable[..., laqjax.Algorithm]]:
    """The named algorithms of the library."""
    own = [f for _, f in inspect.getmembers(algorithms, inspect.isfunction) if f.__module__ == algorithms.__name__]
    return {f.__name__: f for f in own if inspect.signature(f).return_annotation is laqjax.Algorithm}


@cache
def loaded(name: str) -> datasets.Dataset:
    """A data set, read once."""
    return datasets.load(name)


def problem_of(name: str, data: datasets.Dataset) -> laqjax.problems.Problem:
    """A problem fit for the data."""
    if name in ("softmax", "network") and data.num_classes:
        return getattr(laqjax.problems, name.capitalize())(data.x.shape[1], data.num_classes)
    if name == "ridge" or (name == "logistic" and data.num_classes in (None, 2)):
        return getattr(laqjax.problems, name.capitalize())(data.x.shape[1])
    raise ValueError(
        f"problem = {name!r} on {data.name}: expected softmax or network for classes, logistic for two, ridge for numbers"
    )


def checked(points: Sequence[dict[str, Any]], settings: Settings, console: Console) -> list[Group]:
    """The groups with all algorithms built; every bad point is named before anything is compiled."""
    for name in ("uplink_mbps", "downlink_mbps"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} = {getattr(settings, name)}: expected a number > 0")
    target = settings.target
    if not target or not all(t > 0 for t in target) or list(target) != sorted(target, reverse=True):
        raise ValueError(f"target = {target}: expected residuals > 0, the largest first")
    checks.number("rounds", settings.rounds, np.int32, least=1)
    checks.number("batch", 1 if settings.batch is None else settings.batch, np.int32, least=1)
    groups: dict[tuple[Any, ...], Group] = {}
    bad: dict[str, list[str]] = {}
    widest = widest_window(points, settings)
    for point in points:
        key = tuple(point[name] for name in SHAPES)
        try:
            group = groups.get(key) or grouped(point, settings.smoke)
            group.algs.append(build(point, group.oracle, widest, settings.authors, group))
            group.points.append(point)
            groups[key] = group
        except (TypeError, ValueError) as error:  # TypeError: an algorithm that needs more than this command line gives
            bad.setdefault(str(error), []).append(str(point["point"]))
    if bad:
        lines = [f"  point {', '.join(which)}: {error}" for error, which in bad.items()]
        raise ValueError("\n".join([f"{sum(map(len, bad.values()))} of {len(points)} points cannot run:", *lines]))
    if any(group.problem.name == "network" for group in groups.values()):
        console.print("the network has no known f*: its targets are of f itself")
    out = []
    for group in groups.values():
        with console.status("f* by a solver in float64 (half a minute on MNIST, then cached)"):
            convex = group.problem.name != "network"
            f_star = problems.optimum(group.problem, group.shards, cache=Path("results") / "cache") if convex else 0.0
        out.append(replace(group, f_star=f_star, shards=jax.tree.map(jnp.asarray, group.shards)))
    return out


def widest_window(points: Sequence[dict[str, Any]], settings: Settings) -> int:
    """The shape that all windows share; of the whole sweep, so that a shard's points are those of the whole."""
    return max(1, *map(int, settings.window), *(int(point["window"]) for point in points if point["window"]))


def grouped(point: dict[str, Any], smoke: bool) -> Group:
    """A group without points, its data dealt out."""
    data = loaded(point["dataset"])
    shards = laqjax.problems.partition(data.x, data.y, point["workers"], point["partition"], point["partition_seed"])
    if smoke:
        shards = laqjax.Shards(*(array[:, :200] for array in shards))
    return Group(shards, problem_of(point["problem"], data), np.nan, data, [])


def build(
    point: dict[str, Any], oracle: Any, max_window: int, authors: bool = False, group: Group | None = None
) -> laqjax.Algorithm:
    """The algorithm of a point; what it must have and the point does not say is a plain choice."""
    own, p = knobs(point["algorithm"]), oracle.size
    given: dict[str, Any] = {name: point[name] for name in KNOBS if point.get(name) is not None}
    if "max_window" in own:
        given |= {"max_window": max_window}
        given |= {"ramp": True, "first_upload": "rule"} if authors else {}
    if "smoothness" in own and group is not None:
        given["smoothness"] = group.smoothness
    if "compressor" in own:
        plain = "natural" if own & {"damping", "a"} else f"top_k:{max(p // 10, 1)}"
        given |= dict.fromkeys(own & {"compressor", "down"}, compressor(point.get("compressor") or plain))
    if "k" in own:
        given["k"] = point.get("k") or max(p // 10, 1)
    given = {name: PLAIN[name] for name in own & PLAIN.keys()} | given
    if point.get("minibatch") is not None:
        rows = group.shards.y.shape[1] if group else np.inf
        size = checks.number("minibatch", point["minibatch"], np.int32, least=1, most=rows)
        given["sampler"] = laqjax.oracle.Blocks(int(size))
        given |= {"b": 0.1} if "b" in own else {}
    alg = factories()[point["algorithm"]](oracle, num_workers=point["workers"], **given)
    key, index = jax.eval_shape(lambda: (jax.random.key(0), jnp.int32(0)))
    keys: Any = types.Keys(key, key, key, index, index)  # pyright: ignore[reportArgumentType]
    jax.eval_shape(alg.compressor.encode, jax.ShapeDtypeStruct((p,), oracle.dtype), keys)  # refuses k > p
    return alg


def compressor(text: str) -> Any:
    """A compressor by name, as `top_k:50`."""
    name, _, number = text.partition(":")
    makers = ("grid", "identity", "natural", "qsgd", "rand_k", "sampled", "sign", "ternary", "top_k")
    try:
        return getattr(laqjax.compressors, name if name in makers else "")(*([float(number)] if number else []))
    except (AttributeError, TypeError):
        raise ValueError(
            f"compressor = {text!r}: expected one of {', '.join(makers)}, with its number as top_k:50"
        ) from None


def batch_sizes(groups: Sequence[Group], settings: Settings) -> list[int]:
    """Points in a batch of each group: as many as fit, at most those that there are."""
    memory = None if settings.memory is None else settings.memory * 2**30
    devices, sizes = jax.device_count(), []
    for group in groups:
        fits = laqjax.batch_size(group.algs[0], group.shards, memory, settings.rounds)
        wanted = min(settings.batch or MOST * devices, -(-len(group.points) // devices) * devices)
        sizes.append(max(min(fits, wanted) // devices, 1) * devices)
    return sizes


def planned(groups: Sequence[Group], sizes: list[int], settings: Settings) -> dict[str, Any]:
    """Batch sizes and compute times, fixed when a sweep starts and kept in its folder: results follow from them."""
    path = settings.out / "plan.json"
    if path.exists():
        plan = files.read_json(path)
        if plan["devices"] != jax.device_count():
            raise ValueError(
                f"{path} was made for {plan['devices']} devices, here are {jax.device_count()}: expected the same, or another --out"
            )
        return plan
    given = settings.compute_ms
    compute = [gradient_ms(group) if given is None else given for group in groups]
    plan = {"batch": sizes, "compute_ms": compute, "devices": jax.device_count()}
    files.write_json(path, plan)
    return plan


def gradient_ms(group: Group) -> float:
    """Milliseconds of one worker's gradients of a round on this machine: the link model's compute time."""
    alg, key = group.algs[0], jax.random.key(0)
    state = alg.init(group.problem.theta0(group.oracle))

    @jax.jit
    def gradient(params: Any, shards: laqjax.Shards, worker: Any) -> Any:
        rows = alg.sampler(types.Keys(key, key, key, jnp.int32(0), worker), shards) if alg.sampler else None
        return alg.oracle(params, shards, worker, rows)

    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(gradient(state.params, group.shards, jnp.int32(0)))
        times.append(time.perf_counter() - began)
    step, computed = jax.jit(partial(alg.step, record=("gradients",))), []
    for _ in range(2):  # in round 0 some members do less than later
        state, info = step(state, group.shards, key)
        computed.append(info.extra["gradients"])
    return 1e3 * min(times) * int(np.max(computed))


def run_batch(
    group: Group, which: range, size: int, settings: Settings, compute_ms: float, show: Callable[[float, str], None]
) -> dict[str, pl.DataFrame]:
    """Run a batch of points, filled up to `size`, until each is at the last target, has diverged, or the rounds are done.

    When half of the points or fewer are left, the batch is cut in half: which points remain follows from the plan alone.
    The loss of a minibatch says little: such points are measured on all data at the end of each chunk.
    """
    count, rounds = len(which), settings.rounds
    algs = laqjax.stack([group.algs[min(i, which[-1])] for i in range(which[0], which[0] + size)])
    seeds = [group.points[min(i, which[-1])]["seed"] for i in range(which[0], which[0] + size)]
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    state: Any = jnp.stack([group.problem.theta0(group.oracle, seed) for seed in seeds])
    workers = group.shards.y.shape[0]
    loss = np.full((rounds + 1, count), np.nan)  # of the model after k rounds on all data, NaN where not known
    sent = np.zeros((rounds, count, workers), bool)
    up = np.zeros((rounds, count, workers), np.int32)
    down = np.zeros((rounds, count), np.int64)
    ran = np.zeros(count, int)  # rounds done
    lost = np.full(count, -1)  # the first round without a finite loss
    accuracy = np.full(count, np.nan)
    slots = np.minimum(np.arange(size), count - 1)  # the point in each place of the batch
    running = np.ones(count, bool)
    predict = accuracies(group)
    whole = jax.jit(jax.vmap(race.full_loss(group.oracle, group.shards))) if algs.sampler else None
    if whole:
        loss[0] = np.asarray(whole(state))[:count]
    done = 0
    while running.any():
        for out in laqjax.sweep_stream(algs, state, group.shards, rounds - done, keys, chunk=min(CHUNK, rounds)):
            length, state = len(out.info.loss), out.state
            here, place = np.unique(slots, return_index=True)  # copies fill the batch up
            here, place = here[running[here]], place[running[here]]
            rows = slice(done, done + length)
            found = out.info.loss[:, place]
            broken = ~np.isfinite(found)
            lost[here] = np.where(broken.any(axis=0), done + broken.argmax(axis=0), -1)
            seen = slice(done + length, done + length + 1) if whole else rows
            loss[seen, here] = np.asarray(whole(state.params))[place] if whole else found
            sent[rows, here] = out.info.sent[:, place]
            up[rows, here] = out.info.bits_up[:, place]
            down[rows, here] = out.info.bits_down[:, place]
            done += length
            ran[here] = done
            met = loss[: done + 1, here] - group.f_star <= settings.target[-1]
            ended = (lost[here] >= 0) | met.any(axis=0) | (done == rounds)
            if ended.any():
                score = predict(out.state.params)
                accuracy[here[ended]] = score[place[ended]]
                running[here[ended]] = False
            left = np.count_nonzero(running)
            show(
                float(np.where(running, done, rounds).sum()),
                f"{count - left} of {count} done in this batch, round {done}",
            )
            half = size // 2 // jax.device_count() * jax.device_count()
            if not left or (left <= half and half and rounds - done >= SHORT):
                break
        if running.any():
            remaining = np.flatnonzero(running)
            while size // 2 // jax.device_count() * jax.device_count() >= max(len(remaining), 1):
                size = size // 2 // jax.device_count() * jax.device_count()
            kept = remaining[np.minimum(np.arange(size), len(remaining) - 1)]
            place = np.array([np.flatnonzero(slots == point)[0] for point in kept])
            algs, keys, state, slots = laqjax.take(algs, place), keys[place], laqjax.take(state, place), kept
    points = [group.points[i] for i in which]
    return frames(points, group.f_star, settings, compute_ms, loss, sent, up, down, ran, lost, accuracy)


def accuracies(group: Group) -> Callable[[Any], np.ndarray]:
    """Test accuracy of many parameter vectors, NaN where the problem or the data have none."""
    x, y = jax.tree.map(jnp.asarray, (group.data.x_test, group.data.y_test))
    one = jax.jit(lambda params: None if x is None else group.problem.accuracy(group.oracle.unravel(params), x, y))
    return lambda params: np.array([one(row) for row in params], float)  # None is NaN


def frames(
    points: Sequence[dict[str, Any]],
    f_star: float,
    settings: Settings,
    compute_ms: float,
    loss: np.ndarray,
    sent: np.ndarray,
    up: np.ndarray,
    down: np.ndarray,
    ran: np.ndarray,
    lost: np.ndarray,
    accuracy: np.ndarray,
) -> dict[str, pl.DataFrame]:
    """A row a point, its thinned curve, and its masks. Row k of a curve is the model after k rounds."""
    slowest = up.max(axis=2) / (settings.uplink_mbps * 1e6) + settings.latency_ms / 1e3
    spent = (
        compute_ms / 1e3
        + settings.latency_ms / 1e3
        + down / (settings.downlink_mbps * 1e6)
        + np.where(sent.any(axis=2), slowest, 0)
    )
    each = {"uploads": sent.sum(axis=2), "bits_up": up.sum(axis=2, dtype=np.int64), "bits_down": down, "seconds": spent}
    before = {name: np.concatenate([0 * values[:1], np.cumsum(values, axis=0)]) for name, values in each.items()}
    rows, curves, masks = [], [], []
    for i, point in enumerate(points):
        end = int(ran[i] if lost[i] < 0 else lost[i])
        mine = loss[:, i]
        known = np.flatnonzero(np.isfinite(mine[: end + 1]))
        row = dict(point) | {"f_star": f_star, "diverged": bool(lost[i] >= 0)}
        k = None
        for target in settings.target:
            met = known[mine[known] - f_star <= target]
            k = int(met[0]) if len(met) else None
            row |= {f"rounds_{target:g}": k} | {
                f"{name}_{target:g}": None if k is None else values[k, i].item() for name, values in before.items()
            }
        # final loss and accuracy are those of the end of the chunk in which the last target was met
        row |= {"reached": k is not None, "ended": end, "final_loss": float(mine[known[-1]]) if len(known) else None}
        row |= {"accuracy": None if np.isnan(accuracy[i]) or row["diverged"] else float(accuracy[i])}
        rows.append(row)
        end = end if k is None else k
        known = known[known <= end]
        kept = known[np.asarray(plots.thinned(len(known), 200), int)]
        curves.append(
            pl.DataFrame({"point": point["point"], "round": kept, "loss": mine[kept], "residual": mine[kept] - f_star})
            .with_columns(**{name: pl.Series(values[kept, i]) for name, values in before.items()})
            .with_columns(bits=pl.col("bits_up") + pl.col("bits_down"))
        )
        masks.append(
            {
                "point": point["point"],
                "rounds": end,
                "workers": sent.shape[2],
                "sent": np.packbits(sent[:end, i]).tobytes(),
            }
        )
    kinds = {name: pl.Float64 for t in settings.target for name in (f"seconds_{t:g}",)} | {
        "accuracy": pl.Float64,
        "final_loss": pl.Float64,
    }
    kinds |= {f"{name}_{t:g}": pl.Int64 for t in settings.target for name in COST[:-1]}
    kinds |= {name: pl.Float64 for name in KNOBS} | {"compressor": pl.String, "k": pl.Int64, "minibatch": pl.Int64}
    return {
        "curves": pl.concat(curves),
        "masks": pl.DataFrame(masks),
        "points": pl.DataFrame(
            rows, schema_overrides=kinds, infer_schema_length=None
        ),  # last: a batch is done when its points are there
    }


def save(frame: pl.DataFrame, path: Path, csv: bool = False) -> None:
    """Parquet, and CSV for people."""
    with files.replacing(path.with_name(path.name + ".parquet")) as part:
        frame.write_parquet(part)
    if csv:
        with files.replacing(path.with_name(path.name + ".csv")) as part:
            frame.write_csv(part)


def intact(part: Path, points: Sequence[dict[str, Any]], console: Console) -> bool:
    """Whether a batch's files are all there and hold these points; others are set aside, not overwritten."""
    whole = True
    for name in ("curves", "masks", "points"):
        path = part.with_name(f"{part.name}-{name}.parquet")
        if not path.exists():
            whole = False
            continue
        try:
            frame = pl.read_parquet(path)
            names = list(points[0]) if name == "points" else ["point"]
            there = frame.select(names).unique(maintain_order=True).to_dicts()
            if there != [{column: point[column] for column in names} for point in points]:
                raise ValueError("it holds other points")
        except Exception as error:
            aside = next(
                p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.damaged-{n}")).exists()
            )
            path.rename(aside)
            console.print(
                f"[red]{path} is damaged ({error}); kept as {aside.name}, the batch is computed again[/red]",
                markup=True,
            )
            whole = False
    return whole


def collect(folder: Path, groups: Sequence[Group], sizes: Sequence[int]) -> None:
    """The batches' rows as one file of each kind, and the summary over seeds."""
    firsts = [(g, i) for g, group in enumerate(groups) for i in range(0, len(group.points), sizes[g])]
    for name in ("points", "curves", "masks"):
        parts = [pl.read_parquet(folder / "batches" / f"{g:03d}-{first:06d}-{name}.parquet") for g, first in firsts]
        save(
            pl.concat(parts, how="diagonal_relaxed").sort("point", maintain_order=True),
            folder / name,
            csv=name == "points",
        )
    save(summarised(pl.read_parquet(folder / "points.parquet")), folder / "summary", csv=True)


def summarised(points: pl.DataFrame) -> pl.DataFrame:
    """Mean and half of the 95 % interval (Student's t) over seeds, a row a setting; a cost only where all seeds reached it."""
    by = [name for name in (*SHAPES, *KNOBS) if name in points.columns]
    costs = [name for name in points.columns if name.rsplit("_", 1)[0] in COST]
    measures = [*costs, "final_loss", "accuracy"]

    def half(values: pl.Series) -> float | None:
        n = values.drop_nulls().len()
        return None if n < 2 else float(scipy.stats.t.ppf(0.975, n - 1) * values.std() / np.sqrt(n))  # pyright: ignore[reportOperatorIssue]

    rows = []
    for key, group in points.group_by(by, maintain_order=True):
        row = dict(zip(by, key, strict=True)) | {
            "seeds": len(group),
            "reached": int(group["reached"].sum()),
            "diverged": int(group["diverged"].sum()),
        }
        row |= {"point": group["point"][0]}
        for name in measures:
            whole = group[name].null_count() == 0
            row |= {name: group[name].mean() if whole else None, f"{name}_ci95": half(group[name]) if whole else None}
        rows.append(row)
    return pl.DataFrame(
        rows, infer_schema_length=None, schema_overrides={m + e: pl.Float64 for m in measures for e in ("", "_ci95")}
    )


def report(folder: Path, console: Console) -> None:
    """Figures, and the cheapest settings as a short table."""
    plots.sweep(folder)
    summary = pl.read_parquet(folder / "summary.parquet")
    target = plots.last_target(summary)
    ranked = plots.ranked(summary, target)
    settings = [name for name in (*SHAPES, *KNOBS) if summary[name].n_unique() > 1] or ["algorithm"]
    titles = ["rounds", "uploads", "Mbit up", "Mbit up + down", "seconds"]
    scored = summary["accuracy"].null_count() < len(summary)
    table = Table(title=f"cheapest to f - f* <= {target} (simulated seconds on the link model)")
    for title in [*settings, *titles, *["accuracy"] * scored]:
        table.add_column(title, overflow="fold")  # a narrow terminal loses no digit
    for row in ranked.head(10).iter_rows(named=True):
        cost = {name: row[f"{name}_{target}"] for name in COST}
        cells = [f"{cost['rounds']:.0f}", f"{cost['uploads']:.0f}", f"{cost['bits_up'] / 1e6:.3g}"]
        cells += [f"{(cost['bits_up'] + cost['bits_down']) / 1e6:.3g}", f"{cost['seconds']:.3g}"]
        table.add_row(
            *("" if row[s] is None else f"{row[s]:g}" if isinstance(row[s], float) else str(row[s]) for s in settings),
            *cells,
            *["" if row["accuracy"] is None else f"{row['accuracy']:.4f}"] * scored,
        )
    if len(ranked):
        console.print(table)
    missed = len(summary) - len(ranked)
    if missed:
        console.print(
            f"{missed} of {len(summary)} settings did not reach {target} ({int((summary['diverged'] > 0).sum())} diverged)"
        )


def merge(folders: tyro.conf.Positional[tuple[Path, ...]], /, out: Path) -> None:
    """Join the folders of `--shard i/n` runs of one sweep."""
    console = Console()
    seen: dict[str, Any] = {}
    shards = []
    for folder in folders:
        if not (folder / "identity.json").exists():
            raise ValueError(f"{folder} holds no sweep: expected identity.json there")
        there = files.read_json(folder / "identity.json")
        shards.append(there.pop("shard"))
        if not (folder / "points.parquet").exists():
            raise ValueError(f"{folder} is not finished: expected points.parquet there; run its command again first")
        if seen and there != seen:
            keys = sorted(k for k in there if there[k] != seen.get(k))
            raise ValueError(
                f"{folder} holds another sweep: {', '.join(f'{k}: {there[k]} here, {seen.get(k)} there' for k in keys)}"
            )
        seen = there
    n = int(shards[0].split("/")[1]) if shards else 1
    wanted = [f"{i}/{n}" for i in range(1, n + 1)]
    if sorted(shards) != sorted(wanted):
        raise ValueError(f"shards {shards}: expected {wanted}, each once")
    files.claim(out, seen | {"shard": "1/1"})
    times = {str(files.read_json(folder / "plan.json")["compute_ms"]) for folder in folders}
    if len(times) > 1:
        console.print(
            f"seconds rest on the compute times of different runs ({', '.join(sorted(times))} ms): give all --compute-ms"
        )
    for name in ("points", "curves", "masks"):
        parts = [pl.read_parquet(folder / f"{name}.parquet") for folder in folders]
        save(
            pl.concat(parts, how="diagonal_relaxed").sort("point", maintain_order=True),
            out / name,
            csv=name == "points",
        )
    save(summarised(pl.read_parquet(out / "points.parquet")), out / "summary", csv=True)
    files.write_json(out / "run.json", files.provenance() | {"merged": [str(folder) for folder in folders]})
    report(out, console)


def parsed(given: Sequence[str], kind: type[Settings] = Settings, about: str | None = __doc__) -> Any:
    """The settings of a command line; those of its config file stand before it, so that the command line wins."""
    settings = tyro.cli(kind, args=given, description=about)
    if settings.config:
        settings = tyro.cli(kind, args=[*from_file(settings.config, kind), *given], description=about)
    return settings


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["merge"]:
            tyro.cli(merge, args=given[1:], prog="experiments.sweep merge")
        else:
            run(parsed(given), ["-m", "experiments.sweep", *given])
    except files.REFUSED as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same command goes on from the last finished batch") from None


if __name__ == "__main__":
    main()
