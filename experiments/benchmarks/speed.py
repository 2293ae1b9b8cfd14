"""Measurements of `experiments.bench`: times of workloads that take turns, compile time and memory, and their goals."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import laqjax
from experiments.benchmarks.workloads import (
    STREAM,
    WORKLOAD_GROUPS,
    Workload,
    gemm,
    load_mnist,
    run_workload,
    sweep_workload,
)
from experiments.harness import processes, storage

RACE_SECONDS = {
    "softmax": 75, "network": 35, "sweep": 60, "network-sweep": 30, "kernel": 20,
    "cnn": 40, "million": 20, "ten": 60, "checkpoint": 60, "message": 5, "federation": 10,
}  # fmt: skip
COLD_START_WORKLOADS = {"fresh-softmax": "softmax", "fresh-network": "network", "fresh-sweep": "sweep"}
NAMES = (*COLD_START_WORKLOADS, *(name for builders in WORKLOAD_GROUPS.values() for name in builders))
QUICK_NAMES = (
    "fresh-softmax",
    "stream",
    "laq",
    "gd",
    "plain",
    "numpy",
    "one",
    "sweep-16",
    "message-pack",
    "message-read",
    "federation-round",
    "federation-gradients",
)
TARGETS = (  # names of `derive_metrics`
    ("laq, share of GEMM", ">=", 0.25),
    ("laq, share of GEMM", ">=", 0.35),
    ("laq / gd", "<=", 1.10),
    ("laq / plain", "<=", 0.75),
    ("numpy / laq", ">=", 4),
    ("pytorch / laq", ">=", 1.8),
    ("network-laq, share of GEMM", ">=", 0.60),
    ("sweep-16, share of GEMM", ">=", 0.75),
    ("sweep-64, share of GEMM", ">=", 0.75),
    ("sweep-16 / one", "<=", 0.45),
    ("sweep-64 / one", "<=", 0.45),
    ("network-sweep-8, share of GEMM", ">=", 0.80),
    ("in-out / out-in", "<=", 1.25),
    ("cnn-laq / cnn-calls", "<=", 1.15),
    ("cnn-sweep / cnn-calls", "<=", 1.15),
    ("million-laq / million-gd", "<=", 1.4),
    ("million-gd / million-plain", "<=", 1.0),
    ("ten-million-laq / ten-million-gd", "<=", 1.4),
    ("ten-million-gd / ten-million-plain", "<=", 1.0),
    ("saved / unsaved", "<=", 1.03),
    ("message-pack, ms", "<=", 5),
    ("federation-round - federation-gradients, ms", "<=", 10),
    ("fresh-softmax, compile s", "<=", 5),
    ("fresh-network, compile s", "<=", 5),
    ("fresh-sweep, compile s", "<=", 10),
    ("fresh-softmax, peak MB", "<=", 600),
    ("fresh-network, peak MB", "<=", 1500),
)


# ---- measurements ---------------------------------------------------------------------------------------------------


def measure(names: set[str], quick: bool, note: Callable[[str], Any]) -> dict[str, Any]:
    """Measure workloads; `note` receives the names of those that run.

    Returns:
        The machine, the seconds of every call, the measurements in fresh processes, and the missing packages.
    """
    report: dict[str, Any] = {"machine": describe_machine(), "others": 0.0}
    report |= {key: {} for key in ("fresh", "seconds", "flops", "missing")}
    for name in [name for name in COLD_START_WORKLOADS if name in names]:
        note(name)
        runs = [run_cold_start(COLD_START_WORKLOADS[name]) for _ in range(1 if quick else 2)]
        report["fresh"][name] = {key: min(run[key] for run in runs) for key in runs[0]}
    if names <= COLD_START_WORKLOADS.keys():
        return report
    shards, foreign_cpu = laqjax.Shards(*map(jnp.asarray, load_mnist())), processes.monitor_foreign_cpu()
    for group, builders in WORKLOAD_GROUPS.items():
        workloads = {"gemm": gemm()}
        for name in [name for name in builders if name in names]:
            try:
                workloads[name] = builders[name](shards)
            except ImportError as error:
                report["missing"][name] = str(error)
        if len(workloads) > 1:
            note(", ".join(workloads))
            timers = {name: partial(time_call, workload) for name, workload in workloads.items()}
            report["seconds"][group] = time_interleaved(timers, RACE_SECONDS[group] / (10 if quick else 1))
            report["flops"] |= {name: workload.flops for name, workload in workloads.items()}
    return report | {"others": foreign_cpu()}


def time_call(workload: Workload) -> float:
    """Return the seconds per round of one call."""
    begin = time.perf_counter()
    workload.call()
    return (time.perf_counter() - begin) / workload.rounds


def time_interleaved(timers: Mapping[Any, Callable[[], float]], seconds: float) -> dict[Any, list[float]]:
    """Alternate between timers until the time is up, at least twice; return their results after a first call."""
    times = {name: [timer()] for name, timer in timers.items()}  # compiles
    end, turn = time.perf_counter() + seconds, 0
    while turn < 2 or time.perf_counter() < end:
        for name in list(timers)[:: -1 if turn % 2 else 1]:  # alternate the order, so that neighbors change
            times[name].append(timers[name]())
        turn += 1
    return {name: measured[1:] for name, measured in times.items()}


def run_cold_start(kind: str) -> dict[str, float]:
    """Run `cold_start` in a new Python without a compilation cache."""
    command = [sys.executable, "-c", f"from experiments.benchmarks import speed; speed.cold_start({kind!r})"]
    env, root = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cold_start(kind: str) -> None:
    """Load the data, run four single rounds, and print the compile time and the peak memory."""
    shards = load_mnist()
    sweep = kind == "sweep"
    one_round = sweep_workload(shards, "softmax", 16, 1) if sweep else run_workload(shards, kind, 1)
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        one_round.call()
        seconds.append(time.perf_counter() - begin)
    print(json.dumps({"compile s": seconds[0] - seconds[1], "peak MB": peak_rss_bytes() / 1e6}))


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux `ru_maxrss` includes the memory of the parent when it started this process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_machine() -> dict[str, Any]:
    """Return the facts that measurements depend on: cores, CPU and versions."""
    info, facts = Path("/proc/cpuinfo"), storage.provenance()
    cpu = info.read_text().partition("model name\t: ")[2].partition("\n")[0] if info.exists() else platform.processor()
    torch = {"torch": version("torch")} if find_spec("torch") else {}
    return facts | {"cores": processes.count_available_cores(), "cpu": cpu, "versions": facts["versions"] | torch}


# ---- report ---------------------------------------------------------------------------------------------------------


def derive_metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of `TARGETS`: shares of GEMM, best times with their ratios and differences in a group, fresh processes."""
    found = {f"{name}, {key}": value for name, facts in report["fresh"].items() for key, value in facts.items()}
    for times in report["seconds"].values():
        best = {name: min(seconds) for name, seconds in times.items()}
        rate = {name: flops / best[name] for name, flops in report["flops"].items() if flops and name in best}
        found |= {f"{name}, share of GEMM": value / rate["gemm"] for name, value in rate.items()}
        found |= {f"{name}, ms": 1e3 * seconds for name, seconds in best.items()}
        found |= {f"{a} / {b}": best[a] / best[b] for a in best for b in best if a != b}
        found |= {f"{a} - {b}, ms": 1e3 * (best[a] - best[b]) for a in best for b in best if a != b}
    return found


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a table of times and a table of goals."""
    facts, found = report["machine"], derive_metrics(report)
    title = f"one round on {facts['cores']} cores of {facts['cpu'] or 'an unknown CPU'}"
    table = Table("", title=f"{title}; other processes used {report['others']:.0%}")
    for name in ("ms, best", "ms, median", "rate", "share of GEMM"):
        table.add_column(name, justify="right")
    for times in report["seconds"].values():
        for name, seconds in times.items():
            best, flops, share = min(seconds), report["flops"][name], found.get(f"{name}, share of GEMM")
            rate = f"{flops / best / 1e9:.0f} GFLOP/s" if flops else ""
            rate = f"{8 * STREAM / best / 1e9:.1f} GB/s" if name == "stream" else rate
            median = statistics.median(seconds)
            table.add_row(name, f"{1e3 * best:.1f}", f"{1e3 * median:.1f}", rate, f"{share:.0%}" if share else "")
        table.add_section()
    for name, reason in report["missing"].items():
        table.add_row(name, "", "", f"not installed: {reason}", "")
    console.print(table)
    table = Table("", "goal", "measured", "verdict", title="goals")
    for name, sign, bound in TARGETS:
        if name in found:
            met = found[name] >= bound if sign == ">=" else found[name] <= bound
            verdict = f"{'[green]met' if met else '[red]missed'} by {abs(found[name] / bound - 1):.0%}"
            table.add_row(name, f"{sign} {bound:g}", f"{found[name]:.3g}", verdict)
    console.print(table)
