"""Measurements of `experiments.scaling`: costs, bytes, memory, and a model of many hosts."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from experiments.benchmarks.hlo_traffic import read_loopback_bytes
from experiments.benchmarks.process_group import ProcessGroup, start_group
from experiments.benchmarks.speed import time_interleaved
from experiments.figures.scaling_figures import fit_power_law
from experiments.harness import storage

WORKER_ENTRY_POINT = "experiments.benchmarks.scaling_worker:worker_main"
LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2))  # processes x devices of each
QUICK_LAYOUTS = ((1, 1), (2, 1))
REFERENCE: dict[str, Any] = {"workers": 10, "rows": 6000}
MODEL = (
    "seconds of a round on n hosts = ceil(M / n) t_worker + (n - 1) latency + collective",
    "all_gather: (n - 1) latency + (1 - 1/n) M p b / 8 / bandwidth + M p t_decode",
    "all_to_all: 2 (n - 1) latency + (1 - 1/n) (M p b / (8 n) + 4 p) / bandwidth + M p t_decode / n",
    "all_reduce: 2 (n - 1) latency + (1 - 1/n) 8 p / bandwidth",
)
MODEL_ASSUMPTIONS = (
    "a model, not a measurement: constants are of two processes on one machine's loopback device, not of a network",
    "collectives are rings of n - 1 steps of one latency each; each host has its own bandwidth in both directions",
    "a worker uploads in every round (the worst case for the skip), hosts are equally fast, nothing overlaps",
)
Layout = tuple[int, int]
Groups = dict[Layout, ProcessGroup]


@dataclass(frozen=True)
class Measurement:
    """Point of a figure, timed by calls of `chunk` rounds."""

    axis: str
    layout: Layout
    workers: int
    rows: int
    hidden: int | None = None
    chunk: int = 20
    at_once: int | None = None
    collective: str = "all_gather"

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return 785 * 10 if self.hidden is None else 795 * self.hidden + 10

    @property
    def cell(self) -> dict[str, Any]:
        """Arguments of a worker process."""
        return {k: v for k, v in asdict(self).items() if k not in ("axis", "layout")}

    def to_row(self, rounds: int, seconds: float) -> dict[str, Any]:
        """Return a row of the table of costs."""
        processes, devices = self.layout
        row = {"axis": self.axis, "processes": processes, "devices of each": devices, "devices": processes * devices}
        return row | {"M": self.workers, "p": self.size, "rows": self.rows, "rounds": rounds, "seconds": seconds}


# ---- measurements -----------------------------------------------------------------------------------------------


def plan_measurements(quick: bool) -> Iterator[Measurement]:
    """Yield all measurements that take turns with the others of their axis."""
    layouts = QUICK_LAYOUTS if quick else LAYOUTS
    workers = (10, 30, 100) if quick else (10, 30, 100, 300, 1000)
    hidden = (13, 40, 126) if quick else (13, 126, 1258, 12579)
    for layout in layouts[: 1 if quick else 2]:
        for m in workers:  # one worker at a time: the choice of how many run together depends on M
            yield Measurement("M", layout, m, 60, chunk=min(100, max(4, 4000 // m)), at_once=1)
        for h in hidden:  # at least ten rounds: each call allocates its temporaries anew
            yield Measurement("p", layout, 8, 32, h, min(100, max(10, 10**6 // (795 * h))))
    rows = 60 if quick else 1500
    for layout in layouts:
        yield Measurement("strong", layout, 20 if quick else 40, rows)
        yield Measurement("weak", layout, 10 * layout[0] * layout[1], rows)
        if not quick:
            yield Measurement("reference", layout, **REFERENCE)


def time_chunk(groups: Groups, one: Measurement) -> float:
    """Return the seconds of a round, by the slowest process of a group."""
    answers = groups[one.layout].ask(do="go", cell=one.cell)
    ran = {(answer["M"], answer["p"]) for answer in answers}
    if ran != {(one.workers, one.size)}:
        raise ValueError(f"(M, p) = {ran} ran: must be {one.workers, one.size}")
    return max(answer["seconds"] for answer in answers)


def measure_costs(groups: Groups, quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """Measure the seconds of rounds and runs: one row for each measurement."""
    rows: list[dict[str, Any]] = []
    plan = list(plan_measurements(quick))
    for axis in dict.fromkeys(one.axis for one in plan):
        note(f"seconds of a round: {axis}")
        timers = {one: partial(time_chunk, groups, one) for one in plan if one.axis == axis}
        times = time_interleaved(timers, 0 if quick else 30)
        rows += [one.to_row(1, min(seconds)) for one, seconds in times.items()]
    note("seconds of a run")
    one, lengths = Measurement("rounds", (1, 1), 10, 60), (10, 100) if quick else (10, 30, 100, 300, 1000, 3000)
    for k in lengths * 3:
        rows.append(one.to_row(k, groups[1, 1].ask(do="run", cell=one.cell, rounds=k)[0]["seconds"]))
    keys = [name for name in rows[0] if name != "seconds"]
    return pl.DataFrame(rows).group_by(keys, maintain_order=True).agg(pl.col("seconds").min())


def measure_bytes(groups: Groups, quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """Measure the bytes of each collective and layout: of the compiled program and on the loopback device."""
    rows: list[dict[str, Any]] = []
    rounds, layouts = (40, QUICK_LAYOUTS[1:]) if quick else (400, LAYOUTS[1:])
    for processes, devices in layouts:
        for name in ("all_gather", "all_to_all", "all_reduce")[: 1 if quick or processes * devices > 2 else 3]:
            note(f"bytes: {name} on {processes} x {devices}")
            group, cell = groups[processes, devices], REFERENCE | {"collective": name} | ({"rows": 60} if quick else {})
            program = group.ask(do="bytes", cell=cell)[0]
            group.ask(do="run", cell=cell, rounds=1)
            before = read_loopback_bytes()
            ran = group.ask(do="run", cell=cell, rounds=rounds)[0]
            after, loopback = read_loopback_bytes(), None
            if processes > 1 and before is not None and after is not None:
                time.sleep(ran["seconds"])  # subtract the traffic of an equally long idle time
                loopback = (after - before - ((read_loopback_bytes() or after) - after)) / 1e6
            each = (program["always"] * rounds + program["skipped"] * ran["active"]) / rounds
            row = {"collective": name, "processes": processes, "devices of each": devices, "rounds": rounds}
            row["one collective / float32"] = (program["always"] + program["skipped"]) / program["float32"]
            row |= {"the run / float32": each / program["float32"]}
            row |= {"moved MB": each * rounds * processes * devices / 1e6, "loopback MB": loopback}
            rows.append(row | {"server MB": ran["bits_up"] / 8e6} | program | ran)
    return pl.DataFrame(rows, infer_schema_length=None)


def measure_memory(quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """Measure how runs raise the peak memory of new processes, in MB and in units of a device's M p + p numbers."""
    rows = []
    for workers, hidden in ((8, 126),) if quick else ((8, 1258), (32, 1258), (8, 4025), (8, 12579)):
        for processes, devices in ((1, 1), (1, 2), (2, 1))[: 1 if quick else 3]:
            one = Measurement("memory", (processes, devices), workers, 32, hidden, 2, 1)
            note(f"memory: M = {workers}, p = {one.size}, {processes} x {devices}")
            with start_group(WORKER_ENTRY_POINT, processes, devices) as group:
                answers = group.ask(do="memory", cell=one.cell)
            grown, peak = (max(answer[key] for answer in answers) for key in ("grown", "peak"))
            unit = 4 * (-(-workers // (processes * devices)) + 1) * one.size * devices
            row = {"processes": processes, "devices of each": devices, "M": workers, "p": one.size}
            row |= {"grown MB": grown / 1e6, "peak MB": peak / 1e6, "of 4 (M p / devices + p)": grown / unit}
            rows.append(row)
    return pl.DataFrame(rows)


# ---- model and goals --------------------------------------------------------------------------------------------


def evaluate_model(groups: Groups, cost: pl.DataFrame, quick: bool) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Return the seconds of a round on 1 to 1000 hosts by `MODEL`, and the constants measured here."""
    request: Any = {"do": "constants", "cell": REFERENCE | {"rows": 6}, "words": 2**18 if quick else 2**22, "times": 10}
    gathered, decode = groups[2, 1].ask(**request)[0], groups[1, 1].ask(**request)[0]["decode"]
    latency, bandwidth = gathered["short"], 4 * request["words"] / (gathered["long"] - gathered["short"])
    known = {"latency": latency, "bandwidth": bandwidth, "t_decode": decode, "b": 4, "M": 1000}
    n, workers, rows = np.unique(np.geomspace(1, 1000, 40).astype(int)), 1000, []
    single = cost.filter(devices=1)
    for part in (single.filter(axis="strong").row(0, named=True), single.filter(axis="p").row(-1, named=True)):
        size, worker = part["p"], part["seconds"] / part["M"]
        known[f"t_worker, p = {size}"] = worker
        ring, share, packed = (n - 1) * latency, 1 - 1 / n, workers * size * 4 / 8
        collectives = {
            "all_gather": ring + share * packed / bandwidth + workers * size * decode,
            "all_to_all": 2 * ring + share * (packed / n + 4 * size) / bandwidth + workers * size * decode / n,
            "all_reduce": 2 * ring + share * 8 * size / bandwidth,
        }
        for name, seconds in collectives.items():
            total = -(-workers // n) * worker + np.where(n > 1, ring + seconds, 0)
            row = {"collective": name, "p": size}
            rows += [row | {"hosts": int(h), "seconds": s} for h, s in zip(n, total, strict=True)]
    return pl.DataFrame(rows), {"formula": MODEL, "assumptions": MODEL_ASSUMPTIONS, "constants": known}


def evaluate_goals(cost: pl.DataFrame, moved: pl.DataFrame, memory: pl.DataFrame) -> pl.DataFrame:
    """Compare the measurements with the goals: one row for each goal."""
    found: list[tuple[str, float, float, float]] = []  # name, least, most, measured
    for (axis, devices), rows in cost.group_by(["axis", "devices"], maintain_order=True):
        if axis in ("M", "p", "rounds"):
            slope = fit_power_law(rows[axis], rows["seconds"])[1]
            found.append((f"slope in {axis}, {devices} device(s)", 0.9, 1.1, slope))
    speed = {(r["processes"], r["devices"]): r["seconds"] for r in cost.filter(axis="reference").iter_rows(named=True)}
    for devices in (2, 4):
        if (2, devices) in speed:
            name = f"rounds/s of 2 processes / 1, on {devices} devices"
            found.append((name, 0.8, np.inf, speed[1, devices] / speed[2, devices]))
    for row in moved.filter(collective="all_gather").iter_rows(named=True):
        on = f"{row['processes']} x {row['devices of each']}"
        once, run = row["one collective / float32"], row["the run / float32"]
        found.append((f"bytes of an all_gather / of float32, {on}", 0, 0.14, once))
        found.append((f"the same over {row['rounds']} rounds, {on}", 0, 0.05, run))
    for layout, rows in memory.filter(M=8).group_by(["processes", "devices of each"], maintain_order=True):
        if len(rows) > 2:
            slope = fit_power_law(rows["p"], rows["grown MB"])[1]
            found.append((f"slope of peak memory in p, {layout[0]} x {layout[1]}", 0, 1.1, slope))
    names = ("goal", "least", "most", "measured")
    table = pl.DataFrame(found, names, orient="row", schema_overrides={n: pl.Float64 for n in names[1:]})
    return table.with_columns(met=pl.col("measured").is_between("least", "most"))


def measure(out: Path, quick: bool, note: Callable[[str], Any]) -> dict[str, pl.DataFrame]:
    """Measure all tables and write each as soon as it is complete; `note` receives the name of what runs."""
    tables: dict[str, pl.DataFrame] = {}

    def save(name: str, table: pl.DataFrame) -> None:
        tables[name] = table
        storage.save_frame(table, out / name, csv=True)

    with ExitStack() as stack:
        layouts = QUICK_LAYOUTS if quick else LAYOUTS
        groups = {layout: stack.enter_context(start_group(WORKER_ENTRY_POINT, *layout)) for layout in layouts}
        save("memory", measure_memory(quick, note))
        save("bytes", measure_bytes(groups, quick, note))
        save("cost", measure_costs(groups, quick, note))
        modelled, constants = evaluate_model(groups, tables["cost"], quick)
    save("model", modelled)
    storage.write_json(out / "model.json", constants)
    save("goals", evaluate_goals(tables["cost"], tables["bytes"], tables["memory"]))
    return tables
