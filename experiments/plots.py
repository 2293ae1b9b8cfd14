"""Draw the figures of a result folder again, from its tables alone.

    python -m experiments.plots results/sweep
    python -m experiments.plots results/sweep --csv      its curves as a table too, for other programs

Figures are PNG and SVG beside the tables; nothing is computed again.
"""

import matplotlib as mpl

from experiments.figures import drawing
from experiments.harness import cli
from experiments.harness.storage import read_identity

mpl.use("Agg")  # files only: no screen is needed, none is opened


def main(folder: drawing.Folder, /, csv: bool = False) -> None:
    """Draw the figures of a result folder again.

    Args:
        folder: That an experiment wrote.
        csv: Also write curves.csv: a row a point and measured round, with the settings of the point.
    """
    draw = {
        "sweep": drawing.plot_sweep,
        "tune": drawing.plot_tune,
        "methods": drawing.plot_methods,
        "heterogeneity": drawing.plot_heterogeneity,
        "compare": drawing.plot_comparison,
    }
    draw["federated"] = drawing.plot_federated
    kind = read_identity(folder).get("experiment") if (folder / "identity.json").exists() else None
    if kind not in draw:
        raise ValueError(f"{folder}: expected a folder that an experiment wrote, with its identity.json")
    draw[kind](folder)
    written = sorted(str(p) for p in folder.glob("*.png"))
    if csv:
        written.append(str(drawing.write_curves_csv(folder)))
    print(*written, sep="\n")
    cli.write_json_result({"out": str(folder), "files": written})


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
