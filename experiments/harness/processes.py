"""Helpers for processes and ports: stop a process tree, find a free port, measure the CPU time of other programs."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

SHUTDOWN_TIMEOUT = 10.0  # seconds between SIGTERM and SIGKILL


def find_free_port() -> int:
    """Return a port of 127.0.0.1 that is free at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie and a new process under the same pid do not count."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stop_tree(process: psutil.Popen) -> None:
    """Send SIGTERM to a process, wait for it, then kill it and its descendants, whatever process groups they are in."""
    family: list[psutil.Process] = [process]
    with suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
        process.terminate()
    psutil.wait_procs([process], SHUTDOWN_TIMEOUT)
    end = time.monotonic() + SHUTDOWN_TIMEOUT
    while (alive := [one for one in family if is_alive(one)]) and time.monotonic() < end:
        for one in alive:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        time.sleep(0.05)
    process.wait()


def count_available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def monitor_foreign_cpu() -> Callable[[], float]:
    """Return a function that gives the share of the CPU that other programs have used since this call.

    The time of this process and of its finished children is subtracted.
    """

    def read() -> float:
        machine = psutil.cpu_times()
        return machine.user + machine.nice + machine.system - sum(os.times()[:4])

    start, begin = read(), time.perf_counter()
    return lambda: max(read() - start, 0.0) / (time.perf_counter() - begin) / count_available_cores()
