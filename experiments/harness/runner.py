"""Run sweep points to their targets, batch after batch.

    points = [SweepPoint(algorithm, case, seed, {"method": "LAQ"}), ...]
    summary = runner.run(points, Targets((1e-3,)), Path("results/mine"))

Guarantees:

- Points of one case and algorithm structure share a compiled program and run in the batches that `plan.json` fixes.
- A batch writes its tables when it ends, and a checkpoint every ten seconds before.
- After a kill, the same call continues from there, and every row is bit-identical to that of an uninterrupted run.
- More rounds or further targets continue a study, bit-identical to one long run; only targets after a cut are not.
- JAX processes that see one folder share the batches, and write the tables of a single process.

A batch is cut in half when half of its slots are enough for the points that still run.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

import laqjax
from experiments.harness import results, storage
from experiments.harness.cases import ProblemInstance
from experiments.harness.results import NetworkModel, PointHistory, Targets
from laqjax import RunCheckpointer, check_number, distributed, sharding, types

MAX_POINTS_PER_DEVICE = 64  # larger batches are not faster, and their tables are written later
CHECKPOINT_SECONDS = 10.0  # time between two checkpoints of a batch
EVALUATION_SHARE = 0.02  # of the training work, at most, that evaluations may cost
MIN_INTERVAL = 4  # rounds of the shortest chosen evaluation interval
MAX_STATES_GIB = 2.0  # a study with larger final states does not keep them


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One run of an algorithm on a case."""

    algorithm: laqjax.Algorithm
    case: ProblemInstance
    seed: int = 0  # of the initial parameters and of the algorithm's random draws
    label: dict[str, Any] = field(default_factory=dict)  # columns that describe the point in the tables
    start: Any = None  # parameters [p] or a state that replace the initial parameters of the case
    number: int | None = None  # in the tables; None: the position in the list

    def initial_params(self) -> Any:
        """Return the parameters or the state from which the run starts."""
        return self.case.start(self.seed) if self.start is None else self.start


@dataclass(frozen=True)
class RunOptions:
    """Number of rounds, and the sizes of batches, chunks and curves."""

    rounds: int = 400
    """Maximum number of rounds of a point."""
    eval_every: int | None = None
    """Rounds between two evaluations. A point can end there, and test accuracy and the loss of minibatch methods are
    measured. Default: at most 50, fewer where evaluations then cost about 2 % of the training."""
    memory_gib: float | None = None
    """Memory for the points of a batch, in GiB. Default: half of the free memory."""
    batch_size: int | None = None
    """Number of points that run side by side. Default: as many as fit, at most 64 per device."""
    curve_points: int = 200
    """Number of rows of a point's curve, spaced for a log axis."""
    compact_after: tyro.conf.Suppress[int] = 100  # rounds before a batch may be cut: earlier, compiling costs more
    pad_batches: tyro.conf.Suppress[bool] = False  # pad all batches to one size: studies share one compiled program
    longest: tyro.conf.Suppress[int] = 50  # longest chosen interval between two evaluations

    def check(self) -> None:
        """Raise ValueError for a number out of its range."""
        for name in ("rounds", "eval_every", "batch_size", "curve_points", "longest"):
            check_number(name, 1 if getattr(self, name) is None else getattr(self, name), np.int32, minimum=1)


def run(
    points: Sequence[SweepPoint],
    targets: Targets,
    out: Path,
    budget: RunOptions = RunOptions(),
    link: NetworkModel = results.DEFAULT_NETWORK,
    identity: dict[str, Any] | None = None,
    console: Console | None = None,
) -> pl.DataFrame:
    """Run the points that are not finished, and write the tables of all points to a folder.

    Args:
        points: points in any order. Points of one case and one algorithm structure share a program.
        targets: a point ends at the last target, when it diverges, or after the maximum number of rounds.
        out: folder for points, curves, masks and summary (Parquet; points and summary also CSV), plan and run (JSON).
        budget: rounds, and the sizes of batches.
        link: network of the workers, for the simulated seconds.
        identity: values that identify the study in error messages. None: the labels.
        console: console for the progress. None: no output.

    Returns:
        The summary, one row per setting: means and intervals over its seeds.

    Raises:
        ValueError: the folder holds another study or more of this one, or another process uses it.
    """
    console, leads = console or Console(quiet=True), jax.process_index() == 0
    budget.check()
    link.check()
    labels, groups = make_point_labels(points), group_by_structure(points)
    sizes = [choose_batch_size([points[i] for i in group], budget) for group in groups]
    firsts = [points[group[0]] for group in groups]
    began, computed, dropped = time.perf_counter(), 0, reason_states_dropped(points)
    identity = identity or {"points": labels, "targets": targets.values, "rounds": budget.rounds}
    with lock_study(out, identity, dropped):
        plan = distributed.run_on_process_zero(lambda: load_or_make_plan(firsts, sizes, out, link, targets, budget))
        with console.status("f* by a solver in float64 (half a minute on MNIST, then cached)"):
            _ = targets.accuracy or [point.case.f_star for point in firsts]
        batches = list(split_into_batches(groups, plan["batch"]))
        mine = batches[jax.process_index() :: jax.process_count()]
        console.print(f"{len(points)} points, {len(batches)} batch(es), each up to {budget.rounds} rounds")
        columns = *Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}"
        with Progress(*columns, console=console) as progress:
            total, done = sum(len(which) for _, which, _ in mine), 0
            task = progress.add_task("points x rounds", total=total * budget.rounds, note="")

            def show(work: float, note: str) -> None:
                progress.update(task, completed=done * budget.rounds + work, note=note)

            def is_finished(g: int, which: list[int], part: str, console: Console | None = None) -> bool:
                every, these = plan["every"][g], [labels[i] for i in which]
                return batch_is_finished(out / part, these, targets, budget.rounds, every, console)

            for g, which, part in mine:
                if not is_finished(g, which, part, console):
                    options = replace(budget, eval_every=plan["every"][g])
                    batch = Batch([points[i] for i in which], targets, options, plan["batch"][g])
                    history = batch.run(out / part, not dropped, console, show)
                    costs = history.cumulative_costs(link, plan["compute_ms"][g])
                    these = [labels[i] for i in which]
                    tables = results.build_tables(these, history, targets, costs, budget.curve_points)
                    for name in results.TABLES:
                        storage.save_frame(tables[name], out / f"{part}-{name}")
                    computed += len(which)
                if dropped:
                    shutil.rmtree(out / part, ignore_errors=True)
                done += len(which)
                show(0, f"{done} points done")
            for batch in batches if jax.process_count() > 1 else ():
                while not is_finished(*batch):
                    show(0, "waits for the other processes")
                    time.sleep(1)
        tables = results.concat_tables([f"{out / part}-" for _, _, part in batches])
        if leads:
            results.save_tables(out, tables)
            spent = {"seconds": time.perf_counter() - began, "points_computed": computed}
            storage.write_json(out / "run.json", storage.provenance() | spent)
    if dropped:
        console.print(f"a call with more rounds or targets would start again: {dropped}")
    return tables["summary"]


# ---- the plan ------------------------------------------------------------------------------------------------------


def set_aside_other_study(folder: Path, identity: dict[str, Any], console: Console) -> None:
    """Rename a folder that holds the study of another identity."""
    identity = json.loads(json.dumps(identity, default=str))

    def rename() -> str | None:
        there = (folder / "identity.json").exists() and storage.read_identity(folder)
        return storage.quarantine(folder, "before") if there and there != identity else None

    if kept := distributed.run_on_process_zero(rename):
        console.print(f"other settings than before for {folder.name}: kept as {kept}")


@contextmanager
def lock_study(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
    """Hold `storage.lock_results_dir` on process 0 for all processes.

    Raises:
        ValueError: the processes have other settings, or do not see the same folder.
    """
    text = json.dumps(identity, default=str)
    distributed.assert_same_on_all_processes("the settings", np.frombuffer(text.encode(), np.uint8))
    with ExitStack() as stack:
        distributed.run_on_process_zero(lambda: stack.enter_context(storage.lock_results_dir(folder, identity, ended)))
        seen = (folder / "identity.json").exists() and storage.read_identity(folder) == json.loads(text)
        distributed.assert_same_on_all_processes(f"{folder}, a folder that all processes must see", np.array(seen))
        yield


def reason_states_dropped(points: Sequence[SweepPoint]) -> str:
    """Return why the final states of these points are not kept, or "" if they are."""
    size = 0
    for group in group_by_structure(points):
        alg = points[group[0]].algorithm
        state = jax.eval_shape(alg.init, jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype))
        size += len(group) * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return f"the {size / 2**30:.1f} GiB of its last states were not kept" if size > MAX_STATES_GIB * 2**30 else ""


def make_point_labels(points: Sequence[SweepPoint]) -> list[dict[str, Any]]:
    """Return the label of each point, with the same columns for all of them."""
    names = dict.fromkeys(name for point in points for name in point.label)
    numbers = [i if point.number is None else point.number for i, point in enumerate(points)]
    return [{"point": n, **names, **point.label, "seed": point.seed} for n, point in zip(numbers, points, strict=True)]


def group_by_structure(points: Sequence[SweepPoint]) -> list[list[int]]:
    """Return the indices of the points of each case and algorithm structure."""
    groups: dict[Any, list[int]] = {}
    for i, point in enumerate(points):
        leaves, structure = jax.tree.flatten(point.algorithm)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        key = (id(point.case), structure, shapes, isinstance(point.start, laqjax.AlgorithmState))
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def split_into_batches(groups: Sequence[list[int]], sizes: Sequence[int]) -> Iterator[tuple[int, list[int], str]]:
    """Yield (index of the group, indices of the points, name) for each batch."""
    for g, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        for first in range(0, len(group), size):
            yield g, group[first : first + size], f"batches/{g:03d}-{first:06d}"


def choose_batch_size(points: Sequence[SweepPoint], budget: RunOptions) -> int:
    """Return the number of slots of a batch: as many as fit, and not more than there are points."""
    devices, processes = jax.local_device_count(), jax.process_count()
    memory = None if budget.memory_gib is None else budget.memory_gib * 2**30
    alg, shards = points[0].algorithm, points[0].case.device_shards
    fits = laqjax.max_batch_size(alg, shards, memory, budget.rounds, devices=devices)
    there = -(-len(points) // (devices * processes)) * devices
    wanted = budget.batch_size or MAX_POINTS_PER_DEVICE * devices
    wanted = wanted if budget.pad_batches else min(wanted, there)
    return max(min(fits, wanted) // devices, 1) * devices


def choose_eval_interval(point: SweepPoint, targets: Targets, budget: RunOptions) -> int:
    """Return the number of rounds between two evaluations, such that these cost about 2 % of the training.

    Costs are counted in rows, so that a resumed run and all shards of a sweep choose the same interval. An evaluation
    reads the test rows, and all rows if the method has a sampler. A round reads the rows of a gradient, at three times
    the cost of an evaluation.
    """
    case, sampler = point.case, point.algorithm.sampler
    if budget.eval_every or not (targets.accuracy or sampler):
        return budget.eval_every or budget.longest
    shards = case.shards.weight
    trained = 3 * (len(shards) * sampler.size if sampler else shards.size)
    scored = (len(jax.tree.leaves(case.test)[0]) if case.has_accuracy else 0) + (shards.size if sampler else 0)
    shortest = min(MIN_INTERVAL, budget.longest)
    return int(np.clip(np.ceil(scored / (EVALUATION_SHARE * trained)), shortest, budget.longest))


def load_or_make_plan(
    firsts: Sequence[SweepPoint], sizes: list[int], out: Path, link: NetworkModel, targets: Targets, budget: RunOptions
) -> dict[str, Any]:
    """Read or fix the batch sizes, evaluation intervals and compute times of a study, which results depend on."""
    path, devices = out / "plan.json", jax.local_device_count()
    if path.exists():
        plan = storage.read_json(path)
        if plan["devices"] != devices:
            raise ValueError(
                f"{path} is for {plan['devices']} devices: must be for {devices}, the devices of this process; use as "
                "many devices, or give another --out"
            )
        return plan
    measured: dict[Any, float] = {}
    compute: list[float | None] = [link.compute_ms] * len(firsts)
    for i, point in enumerate(firsts if link.compute_ms is None else ()):
        alg = point.algorithm
        key = id(point.case), jax.tree.structure(alg.oracle), alg.sampler  # gradients of one key take the same time
        compute[i] = measured[key] = measured.get(key) or measure_gradient_ms(point.case, alg.oracle, alg.sampler)
    every = [choose_eval_interval(point, targets, budget) for point in firsts]
    plan = {"batch": sizes, "every": every, "compute_ms": compute, "devices": devices}
    storage.write_json(path, plan)
    return plan


def measure_gradient_ms(case: ProblemInstance, oracle: Any, sampler: Any) -> float:
    """Return the milliseconds of one gradient of a worker on this machine, the compute time of the network model."""
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


# ---- batches -------------------------------------------------------------------------------------------------------


def batch_is_finished(
    part: Path, labels: Any, targets: Targets, rounds: int, every: int, console: Console | None = None
) -> bool:
    """Return whether the tables of a batch hold these points and all that the targets and rounds need.

    With a console, damaged tables and those of other points are renamed.
    """
    expected = pl.DataFrame(labels, infer_schema_length=None)
    for name in results.TABLES:
        path = part.with_name(f"{part.name}-{name}.parquet")
        if not path.exists():
            return False
        try:
            table = pl.read_parquet(path)
            columns = expected.columns if name == "points" else ["point"]
            there = table.select(columns).unique(maintain_order=True).to_dicts()
            mine = expected.select(columns).to_dicts()
            if there != mine and (name != "curves" or not all(row in mine for row in there)):  # a curve may be empty
                raise ValueError("it holds other points")
        except Exception as error:  # Polars raises many types for a damaged file
            if console:
                aside = storage.quarantine(path)
                console.print(f"[red]{path} is damaged ({error}); kept as {aside}, the batch is computed again[/red]")
            return False
    table, wanted = pl.read_parquet(f"{part}-points.parquet"), [f"{t:g}" for t in targets.values] or ["end"]
    ended = pl.col("reached") & (pl.col("ended") % every == 0) | (pl.col("ended") == rounds) | pl.col("diverged")
    done = results.target_labels(table) == wanted and table.select(ended.all()).item()
    if console and not done and not part.exists():
        console.print(f"[red]{part}, the last states, is missing: the batch starts again[/red]")
    return done


class Batch:
    """Points of one structure that run side by side in `size` slots; surplus slots hold copies of the last point.

    `states` holds a state of each point on the host, always after a multiple of `every` rounds. A last chunk that is
    shorter is run from these states and does not change them, so that a call with more rounds can continue.
    """

    def __init__(self, points: Sequence[SweepPoint], targets: Targets, budget: RunOptions, size: int) -> None:
        self.points, self.targets, self.budget, self.size = points, targets, budget, size
        self.case, self.devices = points[0].case, jax.local_device_count()
        self.every = choose_eval_interval(points[0], targets, budget)
        kind = (jax.sharding.AxisType.Auto,)
        self.mesh = jax.make_mesh((self.devices,), (sharding.SWEEP_AXIS,), axis_types=kind, devices=jax.local_devices())
        self.algs = laqjax.stack_algorithms([point.algorithm for point in points])
        self.keys = jnp.stack([jax.random.key(point.seed) for point in points])
        starts = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(point.initial_params() for point in points))
        if not isinstance(starts, laqjax.AlgorithmState):
            starts = jax.vmap(laqjax.Algorithm.init)(self.algs, starts)
        self.states: Any = jax.tree.map(np.array, starts)
        f_star = None if targets.accuracy else self.case.f_star
        self.history = PointHistory.empty(budget.rounds, len(points), len(self.case.shards.weight), f_star)

    def run(self, folder: Path, keep: bool, console: Console, show: Callable[[float, str], None]) -> PointHistory:
        """Run every point to its end, from the last checkpoint in a folder if there is one.

        Args:
            folder: folder of the checkpoints.
            keep: True to leave a checkpoint from which a call with more rounds or targets continues.
            console: console for warnings.
            show: function that gets the completed point-rounds and a note after each chunk.
        """
        rounds, saved = self.budget.rounds, time.monotonic()
        with closing(self._open_checkpoints(folder, console)) as checkpoints:
            done, states, facts = checkpoints.restore_latest(self.states)
            if done:
                self.states = states
                self.history.restore(facts["record"])
            else:
                every_point = np.arange(len(self.points))
                states = laqjax.select_points(self.states, self._fill_slots(every_point))
                self._measure(states, every_point, every_point)

            def save() -> None:
                record = {"record": self.history.to_arrays()}
                checkpoints.save(int(self.history.rounds_done.sum()), self.states, record)

            for fetch_states in self._advance(rounds - rounds % self.every, show):
                if time.monotonic() - saved > CHECKPOINT_SECONDS and self._running(rounds).size:
                    fetch_states()
                    save()
                    saved = time.monotonic()
            if keep and self.history.rounds_done.any():
                save()
            for _ in self._advance(rounds, show):
                pass
        return self.history

    def _advance(self, rounds: int, show: Callable[[float, str], None]) -> Iterator[Callable[[], None]]:
        """Run all points up to a number of rounds; after each chunk, yield a function that updates `states`."""
        history, options = self.history, dict[str, Any](chunk_size=self.every, metrics=["gradients"], mesh=self.mesh)
        while (running := self._running(rounds)).size:
            slots = self._fill_slots(running)
            algs, states = (laqjax.select_points(tree, slots) for tree in (self.algs, self.states))
            count = rounds - int(history.rounds_done[running].max())
            given = algs, states, self.case.device_shards, count, self.keys[slots]
            for out in laqjax.stream_sweep(*given, **options):
                count -= len(out.info.loss)
                here = self._running(rounds)
                place = np.searchsorted(running, here)
                history.add(out.info, here, place, with_loss=not self.algs.sampler)
                self._measure(out.state, here, place)
                left = self._running(rounds)
                over = not left.size or not count or len(self._fill_slots(left)) < len(slots)
                if rounds % self.every == 0:
                    final = np.full(len(here), over) | ~np.isin(here, left)
                    self._fetch(out.state, here[final], place[final])
                self._report(show)
                yield partial(self._fetch, out.state, here, place)
                if over:
                    break

    def _running(self, rounds: int) -> np.ndarray:
        """Return the indices of the points that have more of so many rounds to run."""
        ended = self.history.diverged_at >= 0
        for last in self.targets.values[-1:]:
            ended = ended | self.targets.find_reached(self.history, last).any(axis=0)
        return np.flatnonzero((self.history.rounds_done < rounds) & ~ended)

    def _fill_slots(self, running: np.ndarray) -> np.ndarray:
        """Return the point of each slot; use half of the slots where these are enough for the running points."""
        size = half = self.size
        if self.history.rounds_done[running].min() >= self.budget.compact_after:
            while (half := half // 2 // self.devices * self.devices) >= len(running):
                size = half
        return running[np.minimum(np.arange(size), len(running) - 1)]

    def _measure(self, states: Any, here: np.ndarray, place: np.ndarray) -> None:
        """Record the accuracy of the points `here` in the slots `place`, and with a sampler the loss on all rows."""
        done = self.history.rounds_done[here]
        if self.algs.sampler:
            self.history.loss[done, here] = np.asarray(self.case.batched_loss(states.params))[place]
        if self.case.has_accuracy:
            self.history.accuracy[done, here] = self.case.batched_accuracy(states.params[place])

    def _fetch(self, states: Any, here: np.ndarray, place: np.ndarray) -> None:
        """Copy the states in the slots `place` to the states of the points `here` on the host."""
        for kept, new in zip(jax.tree.leaves(self.states), jax.tree.leaves(states), strict=True):
            kept[here] = np.asarray(new)[place]

    def _report(self, show: Callable[[float, str], None]) -> None:
        """Show how many points are done, and the least completed rounds of the others."""
        rounds, left = self.history.rounds_done, self._running(self.budget.rounds)
        over = len(self.points) - len(left)
        note = f"{over} of {len(self.points)} done in this batch, round {rounds[left].min(initial=rounds.max())}"
        show(float(over * self.budget.rounds + rounds[left].sum()), note)

    def _open_checkpoints(self, folder: Path, console: Console) -> RunCheckpointer:
        """Open the checkpoints of these points; rename a folder that holds something else."""
        contents = {"points": (jax.tree.leaves(self.algs), [point.seed for point in self.points])}
        options: Any = {"single_process": True, "warn": lambda text: console.print(f"[red]{text}[/red]")}
        try:
            return RunCheckpointer(folder, contents, **options)
        except ValueError as error:
            console.print(f"[red]{error}; kept as {storage.quarantine(folder)}, the batch starts again[/red]")
            return RunCheckpointer(folder, contents, **options)
