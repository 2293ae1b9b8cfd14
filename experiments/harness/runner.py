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
from experiments.harness import results, storage
from experiments.harness.cases import ProblemInstance
from experiments.harness.results import NetworkModel, PointHistory, Targets
from laqjax import RunCheckpointer, check_number, distributed, sharding, types

MAX_POINTS_PER_DEVICE = 64  # points in a batch, for each device: more is not faster, and rows are safe later
CHECKPOINT_SECONDS = 10.0  # seconds between two checkpoints of a batch
LOOKS, LEAST = 0.02, 4  # share of the training's work that looking may cost; rounds of the shortest chosen interval
MAX_STATES_GIB = 2.0  # GiB of last states that a study keeps; one that has more keeps none


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One run: an algorithm on a case. `label` is what the tables say of it beside the seed.

    seed: of the case's start and of the algorithm's draws. start: parameters [p] or a State instead of the case's start.
    number: in the tables; that of the list when not given.
    """

    algorithm: laqjax.Algorithm
    case: ProblemInstance
    seed: int = 0
    label: dict[str, Any] = field(default_factory=dict)
    start: Any = None
    number: int | None = None

    def initial_params(self) -> Any:
        """The start of the run."""
        return self.case.start(self.seed) if self.start is None else self.start


@dataclass(frozen=True)
class RunOptions:
    """How far points run, and in what portions."""

    rounds: int = 400
    """Rounds of each point at most."""
    eval_every: int | None = None
    """Rounds between two looks at who is done; minibatch methods' loss and the test accuracy are measured then. When not
    given at most 50, and fewer where the rows that are scored cost about 2 % of those that are trained on."""
    memory_gib: float | None = None
    """GiB for the points of a batch; half of what is free when not given."""
    batch_size: int | None = None
    """Points that run side by side; as many as fit, at most 64 a device, when not given."""
    curve_points: int = 200
    """Rows of each point's curve, thinned as a log axis shows them."""
    compact_after: tyro.conf.Suppress[int] = 100  # rounds before a cut: a shorter batch does not earn the compile time
    pad_batches: tyro.conf.Suppress[bool] = (
        False  # all batches of one size: another study of such points is the same program
    )
    longest: tyro.conf.Suppress[int] = 50  # rounds of the longest chosen interval

    def check(self) -> None:
        """ValueError for a number out of its range."""
        for name in ("rounds", "eval_every", "batch_size", "curve_points", "longest"):
            check_number(name, 1 if getattr(self, name) is None else getattr(self, name), np.int32, minimum=1)

    @property
    def bytes(self) -> float | None:
        """Of the memory."""
        return None if self.memory_gib is None else self.memory_gib * 2**30


def run(
    points: Sequence[SweepPoint],
    targets: Targets,
    out: Path,
    budget: RunOptions = RunOptions(),
    link: NetworkModel = results.DEFAULT_NETWORK,
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
    labels, groups = make_point_labels(points), group_by_structure(points)
    sizes = [batch_size([points[i] for i in group], budget) for group in groups]
    began, fresh, done, left = time.perf_counter(), 0, 0, reason_states_dropped(points)
    identity = identity or {"points": labels, "targets": targets.values, "rounds": budget.rounds}
    firsts = [points[group[0]] for group in groups]
    with lock_study(out, identity, left):
        plan = distributed.run_on_process_zero(lambda: load_or_make_plan(firsts, sizes, out, link, targets, budget))
        budgets = [replace(budget, eval_every=budget.eval_every or every) for every in plan["every"]]
        for case in {id(point.case): point.case for point in points}.values():
            with console.status("f* by a solver in float64 (half a minute on MNIST, then cached)"):
                _ = None if targets.accuracy else case.f_star
        batches = list(split_into_batches(groups, plan["batch"]))
        mine = batches[jax.process_index() :: jax.process_count()]
        console.print(f"{len(points)} points, {len(batches)} batch(es), each up to {budget.rounds} rounds")
        with make_progress_bar(console) as progress:
            total = sum(len(which) for _, which, _ in mine)
            task = progress.add_task("points x rounds", total=total * budget.rounds, note="")

            def show(work: float, note: str) -> None:
                progress.update(task, completed=done * budget.rounds + work, note=note)

            for g, which, part in mine:
                these = [labels[i] for i in which]
                if not batch_is_finished(out / part, these, targets, budgets[g], console):
                    live = Batch([points[i] for i in which], targets, budgets[g], plan["batch"][g], out / part, show)
                    run_batch(live, these, out / part, link, plan["compute_ms"][g], not left, console)
                    fresh += len(which)
                if left:
                    shutil.rmtree(out / part, ignore_errors=True)
                done += len(which)
                show(0, f"{done} points done")
            for g, which, part in (batch for batch in batches if batch not in mine):
                while not batch_is_finished(out / part, [labels[i] for i in which], targets, budgets[g]):
                    show(0, "waits for the other processes")
                    time.sleep(1)
        tables = [f"{out / part}-" for _, _, part in batches]
        summary = results.merge_tables(out, tables) if leads else results.concat_tables(tables)["summary"]
        if leads:
            spent = {"seconds": time.perf_counter() - began, "points_computed": fresh}
            storage.write_json(out / "run.json", storage.provenance() | spent)
    if left:
        console.print(f"more rounds or targets would begin anew: {left}")
    return summary


def run_batch(
    live: "Batch", labels: Any, part: Path, link: NetworkModel, compute_ms: float, keep: bool, console: Console
) -> None:
    """Run a batch; leave its last states, where they are kept, and then its tables."""
    record = live.run(console, keep)
    tables = results.build_tables(
        labels, record, live.targets, record.cumulative_costs(link, compute_ms), live.budget.curve_points
    )
    for name in results.TABLES:
        storage.save_frame(tables[name], part.with_name(f"{part.name}-{name}"))


@contextmanager
def lock_study(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
    """`files.claimed`, by process 0 for all of them, who run the same and see the same folder: ValueError where they do not."""
    text = json.dumps(identity, default=str)
    distributed.assert_same_on_all_processes("the settings", np.frombuffer(text.encode(), np.uint8))
    with ExitStack() as stack:
        distributed.run_on_process_zero(lambda: stack.enter_context(storage.lock_results_dir(folder, identity, ended)))
        seen = (folder / "identity.json").exists() and storage.read_identity(folder) == json.loads(text)
        distributed.assert_same_on_all_processes(f"{folder}, a folder that all processes must see", np.array(seen))
        yield


def reason_states_dropped(points: Sequence[SweepPoint]) -> str:
    """Why the last states of these points are not kept; nothing where they are."""
    sizes = 0
    for group in group_by_structure(points):
        alg = points[group[0]].algorithm
        state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
        sizes += len(group) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return f"the {sizes / 2**30:.1f} GiB of its last states were not kept" if sizes > MAX_STATES_GIB * 2**30 else ""


def make_point_labels(points: Sequence[SweepPoint]) -> list[dict[str, Any]]:
    """What the tables say of each point: all have the same columns."""
    names = dict.fromkeys(name for point in points for name in point.label)
    numbers = [i if point.number is None else point.number for i, point in enumerate(points)]
    return [{"point": n, **names, **point.label, "seed": point.seed} for n, point in zip(numbers, points, strict=True)]


def group_by_structure(points: Sequence[SweepPoint]) -> list[list[int]]:
    """The numbers of the points of each case and structure, in order of their first."""
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        leaves, structure = jax.tree.flatten(point.algorithm)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        key = (id(point.case), structure, shapes, isinstance(point.start, laqjax.AlgorithmState))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def split_into_batches(groups: Sequence[list[int]], sizes: Sequence[int]) -> Iterator[tuple[int, list[int], str]]:
    """(Group, points, name) of each batch."""
    for g, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for first in range(0, len(group), size):
            yield g, group[first : first + size], f"batches/{g:03d}-{first:06d}"


def batch_size(points: Sequence[SweepPoint], budget: RunOptions) -> int:
    """Points in a batch: as many as fit, at most those that there are."""
    devices, processes = jax.local_device_count(), jax.process_count()
    given = points[0].algorithm, points[0].case.device_shards, budget.bytes, budget.rounds
    fits = laqjax.max_batch_size(*given, devices=devices)
    there = -(-len(points) // (devices * processes)) * devices
    wanted = budget.batch_size or MAX_POINTS_PER_DEVICE * devices
    wanted = wanted if budget.pad_batches else min(wanted, there)
    return max(min(fits, wanted) // devices, 1) * devices


def interval(point: SweepPoint, targets: Targets, budget: RunOptions) -> int:
    """Return the rounds between two looks such that looking costs about 2 % of the training.

    The costs are rows, so that a run that resumes and all shards of a sweep choose the same: a look scores the test rows,
    and all data of a minibatch method; a round reads the rows of a gradient, each at three times the cost of scoring it.
    """
    case, sampler = point.case, point.algorithm.sampler
    if budget.eval_every or not (targets.accuracy or sampler):
        return budget.eval_every or budget.longest
    shards = case.shards.weight
    trained = 3 * (len(shards) * sampler.size if sampler else shards.size)
    scored = (len(jax.tree.leaves(case.test)[0]) if case.has_accuracy else 0) + (shards.size if sampler else 0)
    return int(np.clip(np.ceil(scored / (LOOKS * trained)), min(LEAST, budget.longest), budget.longest))


def load_or_make_plan(
    firsts: Sequence[SweepPoint], sizes: list[int], out: Path, link: NetworkModel, targets: Targets, budget: RunOptions
) -> dict[str, Any]:
    """Fix batch sizes, intervals and compute times when a study starts; they stay in its folder, as results follow from them."""
    path = out / "plan.json"
    if path.exists():
        plan = storage.read_json(path)
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
        measured[timing_key(point)] = measured.get(timing_key(point)) or measure_gradient_ms(
            point.case, alg.oracle, alg.sampler
        )
    compute = [measured.get(timing_key(point), link.compute_ms) for point in firsts]
    every = [interval(point, targets, budget) for point in firsts]
    plan = {"batch": sizes, "every": every, "compute_ms": compute, "devices": jax.local_device_count()}
    storage.write_json(path, plan)
    return plan


def timing_key(point: SweepPoint) -> Any:
    """What the time of a gradient depends on."""
    return id(point.case), jax.tree.structure(point.algorithm.oracle), point.algorithm.sampler


def measure_gradient_ms(case: ProblemInstance, oracle: Any, sampler: Any) -> float:
    """Milliseconds of one gradient of a worker on this machine: the link model's compute time."""
    key = jax.random.key(0)

    @jax.jit
    def gradient(params: Any, shards: laqjax.Shards, worker: Any) -> Any:
        rows = sampler(types.RoundKeys(key, key, key, jnp.int32(0), worker), shards) if sampler else None
        return oracle(params, shards, worker, rows)

    times, params = [], case.start(0)
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(gradient(params, case.device_shards, jnp.int32(0)))
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def tables_are_intact(part: Path, labels: Sequence[dict[str, Any]], console: Console | None) -> bool:
    """Whether a batch's files are all there and hold these points; others are set aside, not overwritten, by who computes
    it, and not by who only looks (console None).
    """
    whole = True
    for name in results.TABLES:
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
                aside = storage.quarantine(path)
                console.print(f"[red]{path} is damaged ({error}); kept as {aside}, the batch is computed again[/red]")
    return whole


def batch_is_finished(
    part: Path, labels: Any, targets: Targets, budget: RunOptions, console: Console | None = None
) -> bool:
    """Whether a batch's tables are there, and all that these targets and rounds ask for; console: see `intact`."""
    if not tables_are_intact(part, labels, console):
        return False
    table, asked = pl.read_parquet(f"{part}-points.parquet"), [f"{t:g}" for t in targets.values] or ["end"]
    ended = pl.col("reached") & (pl.col("ended") % budget.eval_every == 0) | (pl.col("ended") == budget.rounds)
    done = results.target_labels(table) == asked and table.select((ended | pl.col("diverged")).all()).item()
    if console and not done and not part.exists():
        console.print(f"[red]{part}, the last states, is missing: the batch begins anew[/red]")
    return done


def make_progress_bar(console: Console) -> Progress:
    """Progress with the time to go and a note."""
    percent, note = TextColumn("{task.percentage:.0f} %"), TextColumn("{task.fields[note]}")
    named = TextColumn("{task.description}")
    return Progress(named, BarColumn(), percent, TimeElapsedColumn(), TimeRemainingColumn(), note, console=console)


@dataclass
class Batch:
    """Points side by side, filled up to `size` with copies of the last; cut in half whenever half of them or fewer are left.

    Each goes on from its own last state: points of different rounds run side by side.
    """

    points: Sequence[SweepPoint]
    targets: Targets
    budget: RunOptions
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
        starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(point.initial_params() for point in self.points))
        if not isinstance(starts, laqjax.AlgorithmState):
            starts = jax.vmap(laqjax.Algorithm.init)(self.algs, starts)
        self.last: Any = jax.tree.map(np.array, starts)  # of every point that is not in the batch, or not any more
        f_star = None if self.targets.accuracy else case.f_star
        self.record = PointHistory.empty(self.budget.rounds, count, len(case.shards.weight), f_star)

    def run(self, console: Console, keep: bool = False) -> PointHistory:
        """Every point to its end; keep: leave a checkpoint of that too."""
        with closing(self._open_checkpoints(console)) as checkpoints:
            self._run_from_checkpoint(checkpoints)
            if keep:
                self.save(checkpoints)
        return self.record

    def _run_from_checkpoint(self, checkpoints: RunCheckpointer) -> None:
        """From the last checkpoint, or from the start."""
        if not self._try_resume(checkpoints):
            self._load_slots()
            self.measure(*self._live_slots())
        self.running, saved = self._running_mask(), time.monotonic()
        while self.running.any():
            rounds = self._load_slots()
            algs, keys = laqjax.select_points(self.algs, self.slots), self.keys[self.slots]
            given = algs, self.state, self.case.device_shards, rounds, keys
            for out in laqjax.stream_sweep(*given, chunk_size=self.every, metrics=["gradients"], mesh=self.mesh):
                self._record_chunk(out)
                if time.monotonic() - saved > CHECKPOINT_SECONDS and self.running.any():
                    self.save(checkpoints)
                    saved = time.monotonic()
                if not len(self._live_slots()[0]) or self._compacted_size() < len(self.slots):
                    break
            self._store_states(*self._live_slots())

    def _running_mask(self) -> np.ndarray:
        """Who runs on. A point whose rounds were used up between two looks goes on to the next, as if there had been more."""
        ran = self.record.rounds_done
        ended = (self.record.diverged_at >= 0) | self._reached_target()
        return (ran < self.budget.rounds) & ((ran % self.every > 0) | ~ended)

    def _load_slots(self) -> int:
        """Fill the batch with those that run and are nearest to their next look; the rounds that they have in common."""
        ran, every = self.record.rounds_done, self.every
        step = np.where(self.running, np.minimum(every - ran % every, self.budget.rounds - ran), every + 1)
        here = np.flatnonzero(step == step.min())
        self.slots = here[np.minimum(np.arange(self._compacted_size()), len(here) - 1)]
        self.state: Any = laqjax.select_points(self.last, self.slots)
        whole = (self.budget.rounds - ran[here].max()) // every * every
        return int(whole if step.min() == every else step.min())

    def _live_slots(self) -> tuple[np.ndarray, np.ndarray]:
        """The points of the batch that run, and their places; copies fill the batch up."""
        here, place = np.unique(self.slots, return_index=True)
        return here[self.running[here]], place[self.running[here]]

    def _record_chunk(self, out: laqjax.RunResult) -> None:
        """A chunk's facts; points that are done stop running."""
        self.state = out.state
        here, place = self._live_slots()
        whole = np.asarray(self.case.batched_loss(out.state.params))[place] if self.algs.sampler else None
        self.record.add(out.info, here, place, whole)
        self.measure(here, place)
        self.running = self._running_mask()
        ended = ~self.running[here]
        self._store_states(here[ended], place[ended])
        left = np.count_nonzero(self.running)
        work = float(np.where(self.running, self.record.rounds_done, self.budget.rounds).sum())
        said = f"{len(self.running) - left} of {len(self.running)} done in this batch"
        self.show(work, f"{said}, round {self.record.rounds_done[here].min()}")

    def _store_states(self, here: np.ndarray, place: np.ndarray) -> None:
        """Keep the states in these places."""
        if len(here):
            for last, state in zip(jax.tree.leaves(self.last), jax.tree.leaves(self.state), strict=True):
                last[here] = np.asarray(state)[place]

    def measure(self, here: np.ndarray, place: np.ndarray) -> None:
        """Accuracy, and before round 0 a sampler's loss, of the state as it stands."""
        done = self.record.rounds_done[here]
        if self.case.has_accuracy:
            self.record.accuracy[done, here] = self.case.batched_accuracy(self.state.params[place])
        if self.algs.sampler and not done.any():
            self.record.loss[0, here] = np.asarray(self.case.batched_loss(self.state.params))[place]

    def _reached_target(self) -> np.ndarray:
        """Whether the points have met the last target."""
        if not self.targets.values:
            return np.zeros(len(self.points), bool)
        return np.atleast_1d(self.targets.reached(self.record, self.targets.values[-1]).any(axis=0))

    def _compacted_size(self) -> int:
        """The places that are worth having for those that run: it follows from who they are, and not from the rounds to go."""
        left, size = np.count_nonzero(self.running), self.size
        half = lambda size: size // 2 // self.devices * self.devices  # noqa: E731
        while half(size) >= left and self.record.rounds_done[self.running].min() >= self.budget.compact_after:
            size = half(size)
        return size

    def _open_checkpoints(self, console: Console) -> RunCheckpointer:
        """The checkpoints of these points; a folder of others is set aside, and the batch begins anew."""
        contents = {"points": (jax.tree.leaves(self.algs), [point.seed for point in self.points])}
        options: Any = {"single_process": True, "warn": lambda said: console.print(f"[red]{said}[/red]")}
        try:
            return RunCheckpointer(self.path, contents, **options)
        except ValueError as error:
            console.print(f"[red]{error}; kept as {storage.quarantine(self.path)}, the batch begins anew[/red]")
            return RunCheckpointer(self.path, contents, **options)

    def save(self, checkpoints: RunCheckpointer) -> None:
        """Leave what `resumed` goes on with: all that changes. Who runs follows from it."""
        self._store_states(*self._live_slots())
        checkpoints.save(int(self.record.rounds_done.sum()), self.last, {"record": self.record.to_arrays()})

    def _try_resume(self, checkpoints: RunCheckpointer) -> bool:
        """Take what `save` left, if there is any."""
        done, last, facts = checkpoints.restore_latest(self.last)
        if not done:
            return False
        self.last = last
        self.record.restore(facts["record"])
        ran = self.record.rounds_done
        more = np.flatnonzero((ran % self.every > 0) & (ran < self.budget.rounds))
        for measured in (self.record.loss, self.record.accuracy):
            measured[ran[more], more] = np.nan  # with more rounds it would not have been looked at there
        return True
