"""Draw the figures of a result folder again, from its tables alone.

    python -m experiments.plots results/sweep
    python -m experiments.plots results/sweep --pdf      PDF too
    python -m experiments.plots results/sweep --csv      its curves as a table too, for other programs

Figures are PNG and SVG beside the tables; nothing is computed again.
"""

from pathlib import Path
from typing import Annotated

import tyro

from experiments.figures import drawing
from experiments.harness import cli

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


def main(folder: Folder, /, csv: bool = False, pdf: bool = False) -> None:
    """Draw the figures of a result folder again.

    Args:
        folder: Result folder of an experiment.
        csv: Also write curves.csv: a row for each point and measured round, with the settings of the point.
        pdf: Also write each figure as PDF.
    """
    drawing.draw_figures(folder, pdf)
    written = sorted(str(p) for p in folder.glob("*.png"))
    if csv:
        written.append(str(drawing.write_curves_csv(folder)))
    print(*written, sep="\n")
    cli.write_json_result({"out": str(folder), "files": written})


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
