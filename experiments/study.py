"""Run points until each is at its target: one compiled program for all points of a structure, batch after batch.

    frame = study.run([Point(algorithm, case, seed, {"method": "LAQ"}), ...], Targets((1e-3,)), Path("results/mine"))

A batch's rows are safe when it ends, and its state every few seconds before: after a kill the same call goes on, and no row
differs from an undisturbed run. When half of a batch's points or fewer are left, the batch is cut in half: which points remain
follows from the plan alone.

The last state of every point stays beside the tables: a call that asks for more rounds, or for further targets behind those
that are there, goes on from them. With more rounds alone its rows are those of a run that asked for them at once, bit for
bit, from the same plan. With further targets they are that where no batch was cut (`Budget.short`); after a cut, what a point
did before stands as it is, and what it does then differs from that run in the last bits, as in a batch of another size.

Several processes of JAX that run the same study in a folder that all of them see share its batches; each has devices of its
own, and process 0 writes what is of all.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
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
from laqjax import RunCheckpointer, check_number, distributed, sharding, types

MOST = 64  # points in a batch, for each device: more is not faster, and rows are safe later
SAVE = 10.0  # seconds between two checkpoints of a batch
LOOKS, LEAST = 0.02, 4  # share of the training's work that looking may cost; rounds of the shortest chosen interval
KEEP = 2.0  # GiB of last states that a study keeps; one that has more keeps none


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
    every: int | None = None
    """Rounds between two looks at who is done; minibatch methods' loss and the test accuracy are measured then. When not
    given at most 50, and fewer where the rows that are scored cost about 2 % of those that are trained on."""
    memory: float | None = None
    """GiB for the points of a batch; half of what is free when not given."""
    batch: int | None = None
    """Points that run side by side; as many as fit, at most 64 a device, when not given."""
    keep: int = 200
    """Rows of each point's curve, thinned as a log axis shows them."""
    short: tyro.conf.Suppress[int] = 100  # rounds before a cut: a shorter batch does not earn the compile time
    filled: tyro.conf.Suppress[bool] = (
        False  # all batches of one size: another study of such points is the same program
    )
    longest: tyro.conf.Suppress[int] = 50  # rounds of the longest chosen interval

    def check(self) -> None:
        """ValueError for a number out of its range."""
        for name in ("rounds", "every", "batch", "keep", "longest"):
            check_number(name, 1 if getattr(self, name) is None else getattr(self, name), np.int32, minimum=1)

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
        ValueError: the folder holds another study, or more of this one, or another process is writing it.
    """
    console, leads = console or Console(quiet=True), jax.process_index() == 0
    budget.check()
    link.check()
    labels, groups = labelled(points), grouped(points)
    sizes = [batch_size([points[i] for i in group], budget) for group in groups]
    began, fresh, done, left = time.perf_counter(), 0, 0, not_kept(points)
    identity = identity or {"points": labels, "targets": targets.values, "rounds": budget.rounds}
    firsts = [points[group[0]] for group in groups]
    with held(out, identity, left):
        plan = distributed.run_on_process_zero(lambda: planned(firsts, sizes, out, link, targets, budget))
        budgets = [replace(budget, every=budget.every or every) for every in plan["every"]]
        for case in {id(point.case): point.case for point in points}.values():
            with console.status("f* by a solver in float64 (half a minute on MNIST, then cached)"):
                _ = None if targets.accuracy else case.f_star
        batches = list(cut(groups, plan["batch"]))
        mine = batches[jax.process_index() :: jax.process_count()]
        console.print(f"{len(points)} points, {len(batches)} batch(es), each up to {budget.rounds} rounds")
        with bar(console) as progress:
            total = sum(len(which) for _, which, _ in mine)
            task = progress.add_task("points x rounds", total=total * budget.rounds, note="")

            def show(work: float, note: str) -> None:
                progress.update(task, completed=done * budget.rounds + work, note=note)

            for g, which, part in mine:
                these = [labels[i] for i in which]
                if not finished(out / part, these, targets, budgets[g], console):
                    live = Batch([points[i] for i in which], targets, budgets[g], plan["batch"][g], out / part, show)
                    computed(live, these, out / part, link, plan["compute_ms"][g], not left, console)
                    fresh += len(which)
                if left:
                    shutil.rmtree(out / part, ignore_errors=True)
                done += len(which)
                show(0, f"{done} points done")
            for g, which, part in (batch for batch in batches if batch not in mine):
                while not finished(out / part, [labels[i] for i in which], targets, budgets[g]):
                    show(0, "waits for the other processes")
                    time.sleep(1)
        tables = [f"{out / part}-" for _, _, part in batches]
        summary = ledger.joined(out, tables) if leads else ledger.gathered(tables)["summary"]
        if leads:
            spent = {"seconds": time.perf_counter() - began, "points_computed": fresh}
            files.write_json(out / "run.json", files.provenance() | spent)
    if left:
        console.print(f"more rounds or targets would begin anew: {left}")
    return summary


def computed(
    live: "Batch", labels: Any, part: Path, link: Link, compute_ms: float, keep: bool, console: Console
) -> None:
    """Run a batch; leave its last states, where they are kept, and then its tables."""
    record = live.run(console, keep)
    tables = ledger.tables(labels, record, live.targets, record.spent(link, compute_ms), live.budget.keep)
    for name in ledger.TABLES:
        files.save(tables[name], part.with_name(f"{part.name}-{name}"))


@contextmanager
def held(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
    """`files.claimed`, by process 0 for all of them, who run the same and see the same folder: ValueError where they do not."""
    text = json.dumps(identity, default=str)
    distributed.assert_same_on_all_processes("the settings", np.frombuffer(text.encode(), np.uint8))
    with ExitStack() as stack:
        distributed.run_on_process_zero(lambda: stack.enter_context(files.claimed(folder, identity, ended)))
        seen = (folder / "identity.json").exists() and files.read_identity(folder) == json.loads(text)
        distributed.assert_same_on_all_processes(f"{folder}, a folder that all processes must see", np.array(seen))
        yield


def not_kept(points: Sequence[Point]) -> str:
    """Why the last states of these points are not kept; nothing where they are."""
    sizes = 0
    for group in grouped(points):
        alg = points[group[0]].algorithm
        state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
        sizes += len(group) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return f"the {sizes / 2**30:.1f} GiB of its last states were not kept" if sizes > KEEP * 2**30 else ""


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
        key = (id(point.case), structure, shapes, isinstance(point.start, laqjax.AlgorithmState))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def cut(groups: Sequence[list[int]], sizes: Sequence[int]) -> Iterator[tuple[int, list[int], str]]:
    """(Group, points, name) of each batch."""
    for g, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for first in range(0, len(group), size):
            yield g, group[first : first + size], f"batches/{g:03d}-{first:06d}"


def batch_size(points: Sequence[Point], budget: Budget) -> int:
    """Points in a batch: as many as fit, at most those that there are."""
    devices, processes = jax.local_device_count(), jax.process_count()
    given = points[0].algorithm, points[0].case.on_device, budget.bytes, budget.rounds
    fits = laqjax.max_batch_size(*given, devices=devices)
    there = -(-len(points) // (devices * processes)) * devices
    wanted = budget.batch or MOST * devices
    wanted = wanted if budget.filled else min(wanted, there)
    return max(min(fits, wanted) // devices, 1) * devices


def interval(point: Point, targets: Targets, budget: Budget) -> int:
    """Return the rounds between two looks such that looking costs about 2 % of the training.

    The costs are rows, so that a run that resumes and all shards of a sweep choose the same: a look scores the test rows,
    and all data of a minibatch method; a round reads the rows of a gradient, each at three times the cost of scoring it.
    """
    case, sampler = point.case, point.algorithm.sampler
    if budget.every or not (targets.accuracy or sampler):
        return budget.every or budget.longest
    shards = case.shards.weight
    trained = 3 * (len(shards) * sampler.size if sampler else shards.size)
    scored = (len(jax.tree.leaves(case.test)[0]) if case.scored else 0) + (shards.size if sampler else 0)
    return int(np.clip(np.ceil(scored / (LOOKS * trained)), min(LEAST, budget.longest), budget.longest))


def planned(
    firsts: Sequence[Point], sizes: list[int], out: Path, link: Link, targets: Targets, budget: Budget
) -> dict[str, Any]:
    """Fix batch sizes, intervals and compute times when a study starts; they stay in its folder, as results follow from them."""
    path = out / "plan.json"
    if path.exists():
        plan = files.read_json(path)
        if missing := sorted({"batch", "every", "compute_ms", "devices"} - plan.keys()):
            raise ValueError(f"{path} lacks {missing}: it was made by another version; give another --out")
        if plan["devices"] != jax.local_device_count():
            raise ValueError(
                f"{path} was made for {plan['devices']} devices, here are {jax.local_device_count()}: expected the same, or "
                "another --out"
            )
        return plan
    measured: dict[Any, float] = {}
    for point in firsts if link.compute_ms is None else ():
        alg = point.algorithm
        measured[timed(point)] = measured.get(timed(point)) or gradient_ms(point.case, alg.oracle, alg.sampler)
    compute = [measured.get(timed(point), link.compute_ms) for point in firsts]
    every = [interval(point, targets, budget) for point in firsts]
    plan = {"batch": sizes, "every": every, "compute_ms": compute, "devices": jax.local_device_count()}
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
        rows = sampler(types.RoundKeys(key, key, key, jnp.int32(0), worker), shards) if sampler else None
        return oracle(params, shards, worker, rows)

    times, params = [], case.start(0)
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, case.on_device, jnp.int32(0)))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def intact(part: Path, labels: Sequence[dict[str, Any]], console: Console | None) -> bool:
    """Whether a batch's files are all there and hold these points; others are set aside, not overwritten, by who computes
    it, and not by who only looks (console None).
    """
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
            whole = False
            if console:
                aside = files.set_aside(path)
                console.print(f"[red]{path} is damaged ({error}); kept as {aside}, the batch is computed again[/red]")
    return whole


def finished(part: Path, labels: Any, targets: Targets, budget: Budget, console: Console | None = None) -> bool:
    """Whether a batch's tables are there, and all that these targets and rounds ask for; console: see `intact`."""
    if not intact(part, labels, console):
        return False
    table, asked = pl.read_parquet(f"{part}-points.parquet"), [f"{t:g}" for t in targets.values] or ["end"]
    ended = pl.col("reached") & (pl.col("ended") % budget.every == 0) | (pl.col("ended") == budget.rounds)
    done = ledger.goals_of(table) == asked and table.select((ended | pl.col("diverged")).all()).item()
    if console and not done and not part.exists():
        console.print(f"[red]{part}, the last states, is missing: the batch begins anew[/red]")
    return done


def bar(console: Console) -> Progress:
    """Progress with the time to go and a note."""
    percent, note = TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[note]}")
    named = TextColumn("{task.description}")
    return Progress(named, BarColumn(), percent, TimeElapsedColumn(), TimeRemainingColumn(), note, console=console)


@dataclass
class Batch:
    """Points side by side, filled up to `size` with copies of the last; cut in half whenever half of them or fewer are left.

    Each goes on from its own last state: points of different rounds run side by side.
    """

    points: Sequence[Point]
    targets: Targets
    budget: Budget
    size: int
    path: Path  # of the checkpoints
    show: Callable[[float, str], None]

    def __post_init__(self) -> None:
        count, case = len(self.points), self.points[0].case
        self.case, self.devices = case, jax.local_device_count()
        self.every = interval(self.points[0], self.targets, self.budget)
        kind = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((self.devices,), (sharding.SWEEP_AXIS,), axis_types=kind, devices=jax.local_devices())
        self.running, self.slots = np.ones(count, bool), np.arange(0)  # the point in each place
        self.algs = laqjax.stack_algorithms([point.algorithm for point in self.points])
        self.keys = jnp.stack([jax.random.key(point.seed) for point in self.points])
        starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(point.begin() for point in self.points))
        if not isinstance(starts, laqjax.AlgorithmState):
            starts = jax.vmap(laqjax.Algorithm.init)(self.algs, starts)
        self.last: Any = jax.tree.map(np.array, starts)  # of every point that is not in the batch, or not any more
        f_star = None if self.targets.accuracy else case.f_star
        self.record = Record.empty(self.budget.rounds, count, len(case.shards.weight), f_star)

    def run(self, console: Console, keep: bool = False) -> Record:
        """Every point to its end; keep: leave a checkpoint of that too."""
        with closing(self.opened(console)) as checkpoints:
            self.go_on(checkpoints)
            if keep:
                self.save(checkpoints)
        return self.record

    def go_on(self, checkpoints: RunCheckpointer) -> None:
        """From the last checkpoint, or from the start."""
        if not self.resumed(checkpoints):
            self.fill()
            self.measure(*self.here())
        self.running, saved = self.unfinished(), time.monotonic()
        while self.running.any():
            rounds = self.fill()
            algs, keys = laqjax.select_points(self.algs, self.slots), self.keys[self.slots]
            given = algs, self.state, self.case.on_device, rounds, keys
            for out in laqjax.stream_sweep(*given, chunk_size=self.every, metrics=["gradients"], mesh=self.mesh):
                self.take_in(out)
                if time.monotonic() - saved > SAVE and self.running.any():
                    self.save(checkpoints)
                    saved = time.monotonic()
                if not len(self.here()[0]) or self.places() < len(self.slots):
                    break
            self.put(*self.here())

    def unfinished(self) -> np.ndarray:
        """Who runs on. A point whose rounds were used up between two looks goes on to the next, as if there had been more."""
        ran = self.record.ran
        ended = (self.record.lost >= 0) | self.at_target()
        return (ran < self.budget.rounds) & ((ran % self.every > 0) | ~ended)

    def fill(self) -> int:
        """Fill the batch with those that run and are nearest to their next look; the rounds that they have in common."""
        ran, every = self.record.ran, self.every
        step = np.where(self.running, np.minimum(every - ran % every, self.budget.rounds - ran), every + 1)
        here = np.flatnonzero(step == step.min())
        self.slots = here[np.minimum(np.arange(self.places()), len(here) - 1)]
        self.state: Any = laqjax.select_points(self.last, self.slots)
        whole = (self.budget.rounds - ran[here].max()) // every * every
        return int(whole if step.min() == every else step.min())

    def here(self) -> tuple[np.ndarray, np.ndarray]:
        """The points of the batch that run, and their places; copies fill the batch up."""
        here, place = np.unique(self.slots, return_index=True)
        return here[self.running[here]], place[self.running[here]]

    def take_in(self, out: laqjax.RunResult) -> None:
        """A chunk's facts; points that are done stop running."""
        self.state = out.state
        here, place = self.here()
        whole = np.asarray(self.case.losses(out.state.params))[place] if self.algs.sampler else None
        self.record.add(out.info, here, place, whole)
        self.measure(here, place)
        self.running = self.unfinished()
        ended = ~self.running[here]
        self.put(here[ended], place[ended])
        left = np.count_nonzero(self.running)
        work = float(np.where(self.running, self.record.ran, self.budget.rounds).sum())
        said = f"{len(self.running) - left} of {len(self.running)} done in this batch"
        self.show(work, f"{said}, round {self.record.ran[here].min()}")

    def put(self, here: np.ndarray, place: np.ndarray) -> None:
        """Keep the states in these places."""
        if len(here):
            for last, state in zip(jax.tree.leaves(self.last), jax.tree.leaves(self.state), strict=True):
                last[here] = np.asarray(state)[place]

    def measure(self, here: np.ndarray, place: np.ndarray) -> None:
        """Accuracy, and before round 0 a sampler's loss, of the state as it stands."""
        done = self.record.ran[here]
        if self.case.scored:
            self.record.accuracy[done, here] = self.case.accuracies(self.state.params[place])
        if self.algs.sampler and not done.any():
            self.record.loss[0, here] = np.asarray(self.case.losses(self.state.params))[place]

    def at_target(self) -> np.ndarray:
        """Whether the points have met the last target."""
        if not self.targets.values:
            return np.zeros(len(self.points), bool)
        return np.atleast_1d(self.targets.met(self.record, self.targets.values[-1]).any(axis=0))

    def places(self) -> int:
        """The places that are worth having for those that run: it follows from who they are, and not from the rounds to go."""
        left, size = np.count_nonzero(self.running), self.size
        half = lambda size: size // 2 // self.devices * self.devices  # noqa: E731
        while half(size) >= left and self.record.ran[self.running].min() >= self.budget.short:
            size = half(size)
        return size

    def opened(self, console: Console) -> RunCheckpointer:
        """The checkpoints of these points; a folder of others is set aside, and the batch begins anew."""
        contents = {"points": (jax.tree.leaves(self.algs), [point.seed for point in self.points])}
        options: Any = {"single_process": True, "warn": lambda said: console.print(f"[red]{said}[/red]")}
        try:
            return RunCheckpointer(self.path, contents, **options)
        except ValueError as error:
            console.print(f"[red]{error}; kept as {files.set_aside(self.path)}, the batch begins anew[/red]")
            return RunCheckpointer(self.path, contents, **options)

    def save(self, checkpoints: RunCheckpointer) -> None:
        """Leave what `resumed` goes on with: all that changes. Who runs follows from it."""
        self.put(*self.here())
        checkpoints.save(int(self.record.ran.sum()), self.last, {"record": self.record.kept()})

    def resumed(self, checkpoints: RunCheckpointer) -> bool:
        """Take what `save` left, if there is any."""
        done, last, facts = checkpoints.restore_latest(self.last)
        if not done:
            return False
        self.last = last
        self.record.restore(facts["record"])
        ran = self.record.ran
        more = np.flatnonzero((ran % self.every > 0) & (ran < self.budget.rounds))
        for measured in (self.record.loss, self.record.accuracy):
            measured[ran[more], more] = np.nan  # with more rounds it would not have been looked at there
        return True
