"""The tables of the papers, beside the published values.

    python -m experiments.reproduce laq-logistic          the paper's table, 5 minutes on 2 cores
    python -m experiments.reproduce laq-logistic --quick  a tenth of the data, under a minute
    python -m experiments.reproduce laq-nn                8000 rounds of a network, hours on a CPU
    python -m experiments.reproduce lag --help            the options of one of them

Leaves in --out: table and summary (CSV, Parquet), points, curves and masks (Parquet), figures (PNG, SVG), command, versions.
Ctrl-C ends early and keeps what is done; the same command goes on where it, or a kill, stopped, and with more --rounds from
where it ended.
"""

from experiments.harness import cli
from experiments.reproduce import family, lag, laq


def main() -> None:
    """The command line."""
    tables = {
        "laq-logistic": laq.logistic,
        "laq-nn": laq.network,
        "slaq": laq.slaq,
        "lag": lag.lag_table,
        "heterogeneity": family.heterogeneity,
        "family": family.family,
    }
    with cli.command_line() as given:
        cli.parse_cli(tables, given, __doc__)


if __name__ == "__main__":
    main()
