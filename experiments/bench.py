"""How fast laqjax is on this machine, and what memory it takes, beside goals.

    python -m experiments.bench                          nine minutes and 4 GB on two cores
    python -m experiments.bench --quick                  under one minute, with rougher times
    python -m experiments.bench --workloads laq gd --json     single calls too, for a program

Expect ratios, not milliseconds: times move by a factor of two and more with whatever else the machine does. So the
contestants of a group run in turns in one process, by calls of about equal length, the best call counts, and a share of
GEMM is that of the rate of a float32 matrix product that takes the same turns. Ratios too are off, and flatter
laqjax, where other processes take more than a few per cent of the CPU: the title says how much they took. The compile
time (of a first round) and the peak memory are those of fresh processes that load the data and call `laqjax.run`.
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
        quick: Fewer turns.
        workloads: What to measure, of NAMES; all by default.
    """
    if unknown := sorted(set(workloads) - set(speed.NAMES)):
        raise ValueError(f"--workloads {' '.join(unknown)}: expected some of {' '.join(speed.NAMES)}")
    console = Console()
    with console.status("") as status:
        report = speed.measure(set(workloads or speed.NAMES), quick, status.update)
    speed.print_report(report, console)
    cli.write_json_result(report | {"numbers": speed.derive_metrics(report), "goals": speed.TARGETS})


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
