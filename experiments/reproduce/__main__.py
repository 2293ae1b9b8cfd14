"""The tables of the papers, beside the published values.

    python -m experiments.reproduce laq-logistic     LAQ, TWO-LAQ, GD, QGD, LAG to residual 1e-6; 10 minutes on 2 cores
    python -m experiments.reproduce laq-nn           the 784-200-10 network, 8000 rounds; hours on a CPU
    ... --smoke                                      a tenth of the data, 200 rounds; under a minute

Leaves in --out: table and summary (CSV, Parquet), points, curves and masks (Parquet), figures (PNG, SVG), command, versions.
Ctrl-C ends early and keeps what is done; the same command goes on where it, or a kill, stopped, and with more --rounds from
where it ended.
"""

import tyro

from experiments import files
from experiments.reproduce import family, lag, laq


def main() -> None:
    """The command line."""
    commands = {
        "laq-logistic": laq.logistic,
        "laq-nn": laq.network,
        "slaq": laq.slaq,
        "lag": lag.table,
        "heterogeneity": family.heterogeneity,
        "family": family.family,
    }
    with files.refusing():
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)


if __name__ == "__main__":
    main()
