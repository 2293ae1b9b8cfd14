"""Measure the speed and memory of laqjax on this machine, beside goals.

    python -m experiments.bench                          nine minutes and 4 GB on two cores
    python -m experiments.bench --quick                  one minute: the main workloads, rougher times
    python -m experiments.bench --workloads laq gd --json     single calls too, for a program

Compare ratios, not milliseconds: times vary by a factor of two and more with the load of the machine. The workloads of a
group therefore take turns in one process, in calls of similar length, and the best call counts. A share of GEMM is the
share of the rate of a float32 matrix product that takes the same turns. Ratios are unreliable, too, and favor laqjax,
if other processes use more than a few per cent of the CPU: the title shows how much they used. Compile time (of a first
round) and peak memory are measured in new processes that load the data and call `laqjax.run`.
"""

from typing import Annotated

import tyro
from rich.console import Console

from experiments.benchmarks import speed
from experiments.harness import cli

WorkloadNames = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help=f"Only these, of {', '.join(speed.NAMES)}.")
]


def main(quick: bool = False, workloads: WorkloadNames = ()) -> None:
    """Measure and print.

    Args:
        quick: Use fewer turns and, without --workloads, the main workloads only.
        workloads: Workloads to measure; all by default, with --quick the main ones.
    """
    if unknown := sorted(set(workloads) - set(speed.NAMES)):
        raise ValueError(f"--workloads {' '.join(unknown)}: must be some of {' '.join(speed.NAMES)}")
    console = Console()
    with console.status("") as status:
        names = workloads or (speed.QUICK_NAMES if quick else speed.NAMES)
        report = speed.measure(set(names), quick, status.update)
    speed.print_report(report, console)
    cli.write_json_result(report | {"numbers": speed.derive_metrics(report), "goals": speed.TARGETS})


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
