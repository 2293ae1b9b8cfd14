"""Reproduce the tables of the papers, next to the published values.

    python -m experiments.reproduce laq-logistic          the paper's table, 6 to 15 minutes on 2 cores
    python -m experiments.reproduce laq-logistic --quick  a tenth of the data, under a minute
    python -m experiments.reproduce laq-nn                8000 rounds of a network, hours on a CPU
    python -m experiments.reproduce lag --help            the options of one table

Files in --out: table and summary (CSV, Parquet), points, curves and masks (Parquet), figures (PNG, SVG), run.json with
command and versions, and result.json.
Ctrl-C stops early and keeps what is done. The same command continues after a stop or a kill, also with more --rounds.
"""

from experiments.harness import cli
from experiments.reproduce import family, lag, laq


def main() -> None:
    """Run the command line."""
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
