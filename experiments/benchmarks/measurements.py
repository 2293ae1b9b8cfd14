"""How the cost of a round grows with workers, parameters, devices and processes.

    python -m experiments.scaling                six minutes on two quiet cores
    python -m experiments.scaling --quick        a minute and a half: rougher times, small sizes

Starts its own processes on this machine, on CPU devices that XLA makes of its cores: more devices than cores cannot be
faster, and a device alone uses all cores in its products, so that weak and strong scaling show here what devices and
processes cost, not what they gain. LAQ with b = 4, on MNIST. Contestants take turns, the best call counts. Bytes are those
that a device receives, by the compiled program; between processes also by the counter of the loopback device, from which
the traffic of an idle while as long is taken away: what else the machine says to itself meanwhile stays in it, but not in a
network of its own (as root: unshare -n sh -c 'ip link set lo up; python -m experiments.scaling').
The model of a thousand hosts is a model: its formula, constants and assumptions stand in model.json.

Leaves in --out: cost and bytes (Parquet, CSV), goals and model (Parquet, CSV; JSON), figures (PNG, SVG), run.json.
"""

import contextlib
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from experiments.benchmarks import hlo_traffic
from experiments.benchmarks.process_group import ProcessGroup
from experiments.figures.scaling_figures import fit_power_law
from experiments.harness import storage

WORKER_ENTRY_POINT = "experiments.benchmarks.scaling_worker:worker_main"
PROCESS_LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2))  # processes x devices of each
TEAMS_QUICK = ((1, 1), (2, 1))
REFERENCE: dict[str, Any] = {"workers": 10, "rows": 6000}
MODEL = (
    "seconds of a round on n hosts = ceil(M / n) t_worker + (n - 1) latency + collective",
    "messages: (n - 1) latency + (1 - 1/n) M p b / 8 / bandwidth + M p t_decode",
    "chunked: 2 (n - 1) latency + (1 - 1/n) (M p b / (8 n) + 4 p) / bandwidth + M p t_decode / n",
    "sums: 2 (n - 1) latency + (1 - 1/n) 8 p / bandwidth",
)
MODEL_ASSUMPTIONS = (
    "a model, not a measurement: constants are of two processes on one machine's loopback device, not of a network",
    "collectives are rings, n - 1 steps of one latency each; the bandwidth is each host's own, in both directions",
    "somebody sends in every round (the worst case for the skip), hosts are equally fast, nothing overlaps",
)


@dataclass(frozen=True)
class Measurement:
    """A point of a figure: `chunk_size` rounds a call."""

    axis: str
    team: tuple[int, int]
    workers: int
    rows: int
    hidden: int | None = None
    chunk: int = 20
    at_once: int | None = None
    collective: str = "all_gather"

    @property
    def size(self) -> int:
        """Parameters p."""
        return 785 * 10 if self.hidden is None else 795 * self.hidden + 10

    @property
    def worker_arguments(self) -> dict[str, Any]:
        """For the member."""
        return {k: v for k, v in asdict(self).items() if k not in ("axis", "team")}


# ---- what is measured -------------------------------------------------------------------------------------------


def plan_measurements(quick: bool) -> list[Measurement]:
    """Everything that is timed in turns."""
    few = TEAMS_QUICK if quick else PROCESS_LAYOUTS
    workers = (10, 30, 100) if quick else (10, 30, 100, 300, 1000)
    hidden = (13, 40, 126) if quick else (13, 126, 1258, 12579)
    found = []
    for team in few[: 1 if quick else 2]:
        # workers one after another: which run together is a choice by size, and would be a step in the curve
        found += [Measurement("M", team, m, 60, chunk=min(100, max(4, 4000 // m)), at_once=1) for m in workers]
        # ten at least: each call has the memory of its temporaries given to it anew, which is a cost of calls
        chunks = [min(100, max(10, 10**6 // (795 * h))) for h in hidden]
        found += [Measurement("p", team, 8, 32, h, chunk) for h, chunk in zip(hidden, chunks, strict=True)]
    rows = 60 if quick else 1500
    found += [Measurement("strong", team, 40, rows) for team in few]
    found += [Measurement("weak", team, 10 * team[0] * team[1], rows) for team in few]
    return found + [Measurement("reference", team, **REFERENCE) for team in (() if quick else few)]


def time_interleaved(
    teams: dict[tuple[int, int], ProcessGroup], timed: Sequence[Measurement], seconds: float
) -> list[float]:
    """Seconds of a round of each cell, the best of calls that take turns until the time is up, of two at least."""
    best, end, turn = [np.inf] * len(timed), None, 0
    while turn < 2 or time.perf_counter() < (end or 0):
        for i, cell in list(enumerate(timed))[:: -1 if turn % 2 else 1]:
            answers = teams[cell.team].ask(do="go", cell=cell.worker_arguments)
            ran = {(answer["M"], answer["p"]) for answer in answers}
            if ran != {(cell.workers, cell.size)}:  # else a table would hold the times of something else
                raise ValueError(f"(M, p) = {ran} ran: expected {cell.workers, cell.size}")
            best[i] = min(best[i], max(answer["seconds"] for answer in answers))
        end, turn = end or time.perf_counter() + seconds, turn + 1  # the first turn compiles
    return best


def measure_costs(teams: dict[tuple[int, int], ProcessGroup], quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """A row a cell: seconds of a round, or of a run."""
    rows: list[dict[str, Any]] = []
    every = plan_measurements(quick)
    for axis in dict.fromkeys(cell.axis for cell in every):
        note(f"seconds of a round: {axis}")
        timed = [cell for cell in every if cell.axis == axis]
        for cell, seconds in zip(timed, time_interleaved(teams, timed, 0 if quick else 30), strict=True):
            rows.append(cost_row(cell, 1, seconds))
    note("seconds of a run")
    cell = Measurement("rounds", (1, 1), 10, 60)
    lengths = (10, 100) if quick else (10, 30, 100, 300, 1000, 3000)
    tries = [
        [teams[1, 1].ask(do="run", cell=cell.worker_arguments, rounds=k)[0]["seconds"] for k in lengths]
        for _ in range(3)
    ]
    rows += [cost_row(cell, k, min(times)) for k, times in zip(lengths, zip(*tries, strict=True), strict=True)]
    return pl.DataFrame(rows)


def cost_row(cell: Measurement, rounds: int, seconds: float) -> dict[str, Any]:
    """Of the table of costs."""
    processes, devices = cell.team
    facts = {"axis": cell.axis, "processes": processes, "devices of each": devices, "devices": processes * devices}
    return facts | {"M": cell.workers, "p": cell.size, "rows": cell.rows, "rounds": rounds, "seconds": seconds}


def measure_bytes(teams: dict[tuple[int, int], ProcessGroup], quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """A row an collective and team: bytes that a device receives, and that the loopback device counted."""
    rows: list[dict[str, Any]] = []
    rounds, few = (40, [(2, 1)]) if quick else (400, PROCESS_LAYOUTS[1:])
    for processes, devices in few:
        for name in ("all_gather", "all_to_all", "all_reduce")[: 1 if quick or processes * devices > 2 else 3]:
            note(f"bytes: {name} on {processes} x {devices}")
            team, cell = teams[processes, devices], REFERENCE | {"collective": name} | ({"rows": 60} if quick else {})
            facts = team.ask(do="bytes", cell=cell)[0]
            team.ask(do="run", cell=cell, rounds=1)
            before = hlo_traffic.loopback_bytes()
            ran = team.ask(do="run", cell=cell, rounds=rounds)[0]
            after = hlo_traffic.loopback_bytes()
            counted = None
            if processes > 1 and before is not None and after is not None:
                time.sleep(ran["seconds"])
                idle = (hlo_traffic.loopback_bytes() or after) - after
                counted = (after - before - idle) / 1e6
            each = (facts["always"] * rounds + facts["skipped"] * ran["active"]) / rounds
            ratios = {"an collective / float32": (facts["always"] + facts["skipped"]) / facts["float32"]}
            ratios |= {"the run / float32": each / facts["float32"]}
            total = {"moved MB": each * rounds * processes * devices / 1e6, "loopback MB": counted}
            names = {"collective": name, "processes": processes, "devices of each": devices, "rounds": rounds}
            rows.append(names | ratios | total | {"server MB": ran["bits_up"] / 8e6} | facts | ran)
    return pl.DataFrame(rows, infer_schema_length=None)


def measure_memory(quick: bool, note: Callable[[str], Any]) -> pl.DataFrame:
    """A row a size: by how much a new process's peak grows, beside its part of M p + p numbers for each device."""
    rows = []
    sizes = ((8, 126),) if quick else ((8, 1258), (32, 1258), (8, 4025), (8, 12579))
    for workers, hidden in sizes:
        for processes, devices in ((1, 1), (1, 2), (2, 1))[: 1 if quick else 3]:
            note(f"memory: M = {workers}, p = {795 * hidden + 10}, {processes} x {devices}")
            cell = Measurement("memory", (processes, devices), workers, 32, hidden, 2, 1)
            with ProcessGroup(WORKER_ENTRY_POINT, processes, devices) as team:
                answers = team.ask(do="memory", cell=cell.worker_arguments)
            grown, peak = (max(answer[key] for answer in answers) for key in ("grown", "peak"))
            unit = 4 * (-(-workers // (processes * devices)) + 1) * cell.size * devices
            facts = {"processes": processes, "devices of each": devices, "M": workers, "p": cell.size}
            rows.append(
                facts | {"grown MB": grown / 1e6, "peak MB": peak / 1e6, "of 4 (M p / devices + p)": grown / unit}
            )
    return pl.DataFrame(rows)


def evaluate_model(
    teams: dict[tuple[int, int], ProcessGroup], cost: pl.DataFrame, quick: bool
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Seconds of a round on 1 to 1000 hosts by `MODEL`, and its constants, measured here."""
    asked: Any = {"do": "constants", "cell": REFERENCE | {"rows": 6}, "words": 2**18 if quick else 2**22, "times": 10}
    gathered, decode = teams[2, 1].ask(**asked)[0], teams[1, 1].ask(**asked)[0]["decode"]
    latency, bandwidth = gathered["short"], 4 * asked["words"] / (gathered["long"] - gathered["short"])
    alone = cost.filter((pl.col("axis") == "strong") & (pl.col("devices") == 1)).row(0, named=True)
    large = cost.filter((pl.col("axis") == "p") & (pl.col("devices") == 1)).row(-1, named=True)
    known = {"latency": latency, "bandwidth": bandwidth, "t_decode": decode, "b": 4, "M": 1000}
    n, workers, rows = np.unique(np.geomspace(1, 1000, 40).astype(int)), 1000, []
    for part in (alone, large):
        size, worker = part["p"], part["seconds"] / part["M"]
        known |= {f"t_worker, p = {size}": worker}
        ring, share, compute = (n - 1) * latency, 1 - 1 / n, -(-workers // n) * worker
        packed = workers * size * 4 / 8
        spent = {
            "all_gather": ring + share * packed / bandwidth + workers * size * decode,
            "all_to_all": 2 * ring + share * (packed / n + 4 * size) / bandwidth + workers * size * decode / n,
            "all_reduce": 2 * ring + share * 8 * size / bandwidth,
        }
        for name, seconds in spent.items():
            total = np.where(n > 1, compute + ring + seconds, compute)
            rows += [
                {"collective": name, "p": size, "hosts": int(h), "seconds": s} for h, s in zip(n, total, strict=True)
            ]
    return pl.DataFrame(rows), {"formula": MODEL, "assumptions": MODEL_ASSUMPTIONS, "constants": known}


# ---- what is said of it -----------------------------------------------------------------------------------------


def evaluate_goals(cost: pl.DataFrame, moved: pl.DataFrame, memory: pl.DataFrame) -> pl.DataFrame:
    """A row a goal: what was measured, and whether it is met."""
    found: list[tuple[str, float, float, float]] = []  # name, least, most, measured
    for (axis, devices), rows in cost.group_by(["axis", "devices"], maintain_order=True):
        if axis in ("M", "p", "rounds"):
            found.append(
                (f"slope in {axis}, {devices} device(s)", 0.9, 1.1, fit_power_law(rows[axis], rows["seconds"])[1])
            )
    speed = {(r["processes"], r["devices"]): r["seconds"] for r in cost.filter(axis="reference").iter_rows(named=True)}
    for devices in (2, 4):
        if (2, devices) in speed:
            name = f"rounds/s, 2 processes / 1 process, {devices} devices together"
            found.append((name, 0.8, np.inf, speed[1, devices] / speed[2, devices]))
    for rows in moved.filter(collective="all_gather").iter_rows(named=True):
        team = f"{rows['processes']} x {rows['devices of each']}"
        found.append(
            (f"messages / float32 all-gather, an collective, {team}", 0, 0.14, rows["an collective / float32"])
        )
        found.append((f"the same over {rows['rounds']} rounds, {team}", 0, 0.05, rows["the run / float32"]))
    for team, rows in memory.filter(M=8).group_by(["processes", "devices of each"], maintain_order=True):
        if len(rows) > 2:
            found.append(
                (
                    f"slope of peak memory in p, {team[0]} x {team[1]}",
                    0,
                    1.1,
                    fit_power_law(rows["p"], rows["grown MB"])[1],
                )
            )
    names = ("goal", "least", "most", "measured")
    table = pl.DataFrame(found, names, orient="row", schema_overrides={n: pl.Float64 for n in names[1:]})
    return table.with_columns(met=pl.col("measured").is_between("least", "most"))


def measure(out: Path, quick: bool, note: Callable[[str], Any]) -> dict[str, pl.DataFrame]:
    """All tables, each written when it is done. `note` is told what runs."""
    tables: dict[str, pl.DataFrame] = {}

    def keep(name: str, table: pl.DataFrame) -> None:
        tables[name] = table
        storage.save_frame(table, out / name, csv=True)

    keep("memory", measure_memory(quick, note))
    with contextlib.ExitStack() as stack:
        teams = {
            team: stack.enter_context(ProcessGroup(WORKER_ENTRY_POINT, *team))
            for team in (TEAMS_QUICK if quick else PROCESS_LAYOUTS)
        }
        keep("bytes", measure_bytes(teams, quick, note))
        keep("cost", measure_costs(teams, quick, note))
        modelled, constants = evaluate_model(teams, tables["cost"], quick)
    keep("model", modelled)
    storage.write_json(out / "model.json", constants)
    keep("goals", evaluate_goals(tables["cost"], tables["bytes"], tables["memory"]))
    return tables


def child_cpu_seconds() -> float:
    """CPU time of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
