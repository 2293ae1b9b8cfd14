"""Run points until each is at its target: one compiled program for all points of a structure, batch after batch.

    frame = study.run([Point(algorithm, case, seed, {"method": "LAQ"}), ...], Targets((1e-3,)), Path("results/mine"))

A batch's rows are safe when it ends, and its state every few seconds before: after a kill the same call goes on, and no row
differs from an undisturbed run. When half of a batch's points or fewer are left, the batch is cut in half: which points remain
follows from the plan alone.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import laqjax
from experiments import files, ledger
from experiments.ledger import Link, Record, Targets
from experiments.problems import Case
from laqjax import types
from laqjax.checks import number

MOST = 64  # points in a batch, for each device: more is not faster, and rows are safe later
SAVE = 10.0  # seconds between two saved states of a batch


@dataclass(frozen=True, eq=False)
class Point:
    """One run: an algorithm on a case. `label` is what the tables say of it beside the seed.

    seed: of the case's start and of the algorithm's draws. start: parameters [p] or a State instead of the case's start.
    number: in the tables; that of the list when not given.
    """

    algorithm: laqjax.Algorithm
    case: Case
    seed: int = 0
    label: dict[str, Any] = field(default_factory=dict)
    start: Any = None
    number: int | None = None

    def begin(self) -> Any:
        """The start of the run."""
        return self.case.start(self.seed) if self.start is None else self.start


@dataclass(frozen=True)
class Budget:
    """How far points run, and in what portions."""

    rounds: int = 400
    """Rounds of each point at most."""
    every: int = 50
    """Rounds between two looks at who is done; minibatch methods' loss and the test accuracy are measured then."""
    memory: float | None = None
    """GiB for the points of a batch; half of what is free when not given."""
    batch: int | None = None
    """Points that run side by side; as many as fit, at most 64 a device, when not given."""
    keep: int = 200
    """Rows of each point's curve, thinned as a log axis shows them."""
    short: tyro.conf.Suppress[int] = 100  # rounds: with fewer to go a cut batch does not earn its compile time
    filled: tyro.conf.Suppress[bool] = (
        False  # all batches of one size: another study of such points is the same program
    )

    def check(self) -> None:
        """ValueError for a number out of its range."""
        for name in ("rounds", "every", "batch", "keep"):
            number(name, 1 if getattr(self, name) is None else getattr(self, name), np.int32, least=1)

    @property
    def bytes(self) -> float | None:
        """Of the memory."""
        return None if self.memory is None else self.memory * 2**30


def run(
    points: Sequence[Point],
    targets: Targets,
    out: Path,
    budget: Budget = Budget(),
    link: Link = ledger.LINK,
    identity: dict[str, Any] | None = None,
    console: Console | None = None,
) -> pl.DataFrame:
    """Run what is not yet done of these points; their tables in the folder `out`.

    Args:
        points: in any order; those of one case and one structure of algorithm are one program.
        targets: a point ends at the last of them, when it diverges, or with the rounds.
        out: gets points, curves, masks and summary (Parquet, the first and the last as CSV too), plan and run (JSON).
        budget: rounds and portions.
        link: of the workers, for the simulated seconds.
        identity: what makes this study this study, for a word when the folder holds another; by default the labels.
        console: progress is shown there; nowhere by default.

    Returns:
        The summary: a row a setting, means and intervals over its seeds.

    Raises:
        ValueError: the folder holds another study, or another process is writing it.
    """
    console = console or Console(quiet=True)
    budget.check()
    link.check()
    labels, groups = labelled(points), grouped(points)
    for case in {id(point.case): point.case for point in points}.values():
        with console.status("f* by a solver in float64 (half a minute on MNIST, then cached)"):
            _ = None if targets.accuracy else case.f_star
    sizes = [batch_size([points[i] for i in group], budget) for group in groups]
    began, fresh, done = time.perf_counter(), 0, 0
    with files.claimed(out, identity or {"points": labels, "targets": targets.values, "rounds": budget.rounds}):
        plan = planned([points[group[0]] for group in groups], sizes, out, link)
        batches = list(cut(groups, plan["batch"]))
        console.print(f"{len(points)} points, {len(batches)} batch(es), each up to {budget.rounds} rounds")
        with bar(console) as progress:
            task = progress.add_task("points x rounds", total=len(points) * budget.rounds, note="")

            def show(work: float, note: str) -> None:
                progress.update(task, completed=done * budget.rounds + work, note=note)

            for g, which, part in batches:
                if not intact(out / part, [labels[i] for i in which], console):
                    state = (out / part).with_suffix(".npz")
                    live = Batch([points[i] for i in which], targets, budget, plan["batch"][g], state, show)
                    record = live.run(console)
                    spent = record.spent(link, plan["compute_ms"][g])
                    tables = ledger.tables([labels[i] for i in which], record, targets, spent, budget.keep)
                    for name in ledger.TABLES:
                        files.save(tables[name], out / f"{part}-{name}")
                    state.unlink(missing_ok=True)
                    fresh += len(which)
                done += len(which)
                show(0, f"{done} points done")
        summary = ledger.joined(out, [f"{out / part}-" for _, _, part in batches])
        spent = {"seconds": time.perf_counter() - began, "points_computed": fresh}
        files.write_json(out / "run.json", files.provenance() | spent)
    return summary


def labelled(points: Sequence[Point]) -> list[dict[str, Any]]:
    """What the tables say of each point: all have the same columns."""
    names = dict.fromkeys(name for point in points for name in point.label)
    numbers = [i if point.number is None else point.number for i, point in enumerate(points)]
    return [{"point": n, **names, **point.label, "seed": point.seed} for n, point in zip(numbers, points, strict=True)]


def grouped(points: Sequence[Point]) -> list[list[int]]:
    """The numbers of the points of each case and structure, in order of their first."""
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        leaves, structure = jax.tree.flatten(point.algorithm)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        key = (id(point.case), structure, shapes, isinstance(point.start, laqjax.State))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def cut(groups: Sequence[list[int]], sizes: Sequence[int]) -> Iterator[tuple[int, list[int], str]]:
    """(Group, points, name) of each batch."""
    for g, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for first in range(0, len(group), size):
            yield g, group[first : first + size], f"batches/{g:03d}-{first:06d}"


def batch_size(points: Sequence[Point], budget: Budget) -> int:
    """Points in a batch: as many as fit, at most those that there are."""
    devices = jax.device_count()
    fits = laqjax.batch_size(points[0].algorithm, points[0].case.on_device, budget.bytes, budget.rounds)
    there = -(-len(points) // devices) * devices
    wanted = budget.batch or MOST * devices
    wanted = wanted if budget.filled else min(wanted, there)
    return max(min(fits, wanted) // devices, 1) * devices


def planned(firsts: Sequence[Point], sizes: list[int], out: Path, link: Link) -> dict[str, Any]:
    """Batch sizes and compute times, fixed when a study starts and kept in its folder: results follow from them."""
    path = out / "plan.json"
    if path.exists():
        plan = files.read_json(path)
        if plan["devices"] != jax.device_count():
            raise ValueError(
                f"{path} was made for {plan['devices']} devices, here are {jax.device_count()}: expected the same, or "
                "another --out"
            )
        return plan
    measured: dict[Any, float] = {}
    for point in firsts if link.compute_ms is None else ():
        alg = point.algorithm
        measured[timed(point)] = measured.get(timed(point)) or gradient_ms(point.case, alg.oracle, alg.sampler)
    compute = [measured.get(timed(point), link.compute_ms) for point in firsts]
    plan = {"batch": sizes, "compute_ms": compute, "devices": jax.device_count()}
    files.write_json(path, plan)
    return plan


def timed(point: Point) -> Any:
    """What the time of a gradient depends on."""
    return id(point.case), jax.tree.structure(point.algorithm.oracle), point.algorithm.sampler


def gradient_ms(case: Case, oracle: Any, sampler: Any) -> float:
    """Milliseconds of one gradient of a worker on this machine: the link model's compute time."""
    key = jax.random.key(0)

    @jax.jit
    def gradient(params: Any, shards: laqjax.Shards, worker: Any) -> Any:
        rows = sampler(types.Keys(key, key, key, jnp.int32(0), worker), shards) if sampler else None
        return oracle(params, shards, worker, rows)

    times, params = [], case.start(0)
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, case.on_device, jnp.int32(0)))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def intact(part: Path, labels: Sequence[dict[str, Any]], console: Console) -> bool:
    """Whether a batch's files are all there and hold these points; others are set aside, not overwritten."""
    whole = True
    for name in ledger.TABLES:
        path = part.with_name(f"{part.name}-{name}.parquet")
        if not path.exists():
            whole = False
            continue
        try:
            frame = pl.read_parquet(path)
            expected = pl.DataFrame(labels, infer_schema_length=None)
            names = expected.columns if name == "points" else ["point"]
            there = frame.select(names).unique(maintain_order=True).to_dicts()
            mine = expected.select(names).to_dicts()
            if there != mine and (name != "curves" or not all(row in mine for row in there)):  # a curve may be empty
                raise ValueError("it holds other points")
        except Exception as error:
            aside = files.set_aside(path)
            console.print(f"[red]{path} is damaged ({error}); kept as {aside}, the batch is computed again[/red]")
            whole = False
    return whole


def bar(console: Console) -> Progress:
    """Progress with the time to go and a note."""
    percent, note = TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[note]}")
    named = TextColumn("{task.description}")
    return Progress(named, BarColumn(), percent, TimeElapsedColumn(), TimeRemainingColumn(), note, console=console)


@dataclass
class Batch:
    """Points side by side, filled up to `size` with copies of the last; cut in half whenever half of them or fewer are left."""

    points: Sequence[Point]
    targets: Targets
    budget: Budget
    size: int
    path: Path  # of the state, before the batch ends
    show: Callable[[float, str], None]

    def __post_init__(self) -> None:
        count, case = len(self.points), self.points[0].case
        self.case, self.devices, self.done = case, jax.device_count(), 0
        self.slots = np.minimum(np.arange(self.size), count - 1)  # the point in each place
        self.running = np.ones(count, bool)
        self.algs = laqjax.stack([point.algorithm for point in self.points])
        seeds = repr([point.seed for point in self.points]).encode()
        numbers = b"".join(np.ascontiguousarray(leaf).tobytes() for leaf in jax.tree.leaves(self.algs))
        self.digest = np.frombuffer(hashlib.sha256(seeds + numbers).digest(), np.uint8)  # what a saved state belongs to
        self.keys = jnp.stack([jax.random.key(point.seed) for point in self.points])
        starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(point.begin() for point in self.points))
        if not isinstance(starts, laqjax.State):
            starts = jax.vmap(laqjax.Algorithm.init)(self.algs, starts)
        self.state: Any = laqjax.take(starts, self.slots)
        f_star = None if self.targets.accuracy else case.f_star
        self.record = Record.empty(self.budget.rounds, count, len(case.shards.weight), f_star)

    def run(self, console: Console) -> Record:
        """Every point to its end."""
        if self.path.exists():
            self.resume(console)
            if self.running.any() and self.halved() < self.size:  # as it would have been without the stop
                self.compact()
        if not self.done:
            self.measure(np.arange(len(self.points)), np.arange(len(self.points)))
            self.running &= ~self.at_target(np.arange(len(self.points)))
        saved = time.monotonic()
        while self.running.any():
            algs, keys = laqjax.take(self.algs, self.slots), self.keys[self.slots]
            rounds = self.budget.rounds - self.done
            chunk = min(self.budget.every, self.budget.rounds)
            given = algs, self.state, self.case.on_device, rounds, keys
            for out in laqjax.sweep_stream(*given, chunk=chunk, record=["gradients"]):
                self.take_in(out)
                if time.monotonic() - saved > SAVE and self.running.any():
                    files.save_tree(self.path, self.kept())
                    saved = time.monotonic()
                if not self.running.any() or self.halved() < self.size:
                    break
            self.compact()
        return self.record

    def take_in(self, out: laqjax.Output) -> None:
        """A chunk's facts; points that are done stop running."""
        self.state = out.state
        here, place = np.unique(self.slots, return_index=True)  # copies fill the batch up
        here, place = here[self.running[here]], place[self.running[here]]
        whole = np.asarray(self.case.losses(out.state.params))[place] if self.algs.sampler else None
        self.record.add(self.done, out.info, here, place, whole)
        self.done += len(out.info.loss)
        self.measure(here, place)
        ended = (self.record.lost[here] >= 0) | self.at_target(here) | (self.done == self.budget.rounds)
        self.running[here[ended]] = False
        left = np.count_nonzero(self.running)
        work = float(np.where(self.running, self.done, self.budget.rounds).sum())
        self.show(work, f"{len(self.running) - left} of {len(self.running)} done in this batch, round {self.done}")

    def measure(self, here: np.ndarray, place: np.ndarray) -> None:
        """Accuracy, and before round 0 a sampler's loss, of the state as it stands."""
        if self.case.scored:
            self.record.accuracy[self.done, here] = self.case.accuracies(self.state.params[place])
        if self.algs.sampler and not self.done:
            self.record.loss[0, here] = np.asarray(self.case.losses(self.state.params))[place]

    def at_target(self, here: np.ndarray) -> np.ndarray:
        """Whether the points have met the last target."""
        if not self.targets.values:
            return np.zeros(len(here), bool)
        met = self.targets.met(self.record, self.targets.values[-1])[: self.done + 1, here]
        return np.atleast_1d(met.any(axis=0))

    def halved(self) -> int:
        """The places that are worth having for what is left."""
        left, size = max(np.count_nonzero(self.running), 1), self.size
        half = lambda size: size // 2 // self.devices * self.devices  # noqa: E731
        while half(size) >= left and self.budget.rounds - self.done >= self.budget.short:
            size = half(size)
        return size

    def compact(self) -> None:
        """Fewer places, with the points that still run."""
        remaining = np.flatnonzero(self.running)
        if not len(remaining):
            return
        self.size = self.halved()
        kept = remaining[np.minimum(np.arange(self.size), len(remaining) - 1)]
        place = np.array([np.flatnonzero(self.slots == point)[0] for point in kept])
        self.state, self.slots = laqjax.take(self.state, place), kept

    def kept(self) -> Any:
        """All that changes, as arrays."""
        return self.state, self.record.kept(self.done), self.slots, self.running, np.array([self.done]), self.digest

    def resume(self, console: Console) -> None:
        """What `kept` left; a damaged file is set aside, and the batch begins anew."""
        try:
            state, kept, slots, running, done, digest = files.load_tree(self.path, self.kept())
            if not np.array_equal(digest, self.digest):
                raise ValueError(f"{self.path} holds other points")
        except ValueError as error:
            console.print(f"[red]{error}; kept as {files.set_aside(self.path)}, the batch begins anew[/red]")
            return
        self.state, self.slots, self.running = jax.tree.map(jnp.asarray, state), slots, running
        self.done, self.size = int(done[0]), len(slots)
        self.record.restore(kept)
