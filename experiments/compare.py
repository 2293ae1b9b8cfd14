r"""Compare methods at their best settings, which are reported on other seeds.

    python -m experiments.compare                all methods on a convex problem, half an hour
    python -m experiments.compare --quick        a few methods and rounds, under a minute
    python -m experiments.compare --problem softmax --dataset mnist --algorithm gd laq qgd
    python -m experiments.compare --problem my.py:make --dataset my.py:load \
        --algorithm laq my.py:factory --set beta 0.1 0.5 --target-accuracy 0.8 0.9

Each method runs a grid of its step sizes and other arguments on `--seeds`, as one compiled program. The steps are
powers of `--lr-ratio` around the step of theory, or around a plain step if the smoothness constant L is not known.

Where a best value lies on the edge of its grid, the grid is widened there. Between the best step and its neighbors more
steps are tried, down to a quarter of their distance. The cheapest settings at each target in bits up, all bits, rounds
or seconds run again on `--report-seeds`, and the tables report these costs.

Files in --out: best (one row per method, target and criterion), tried (every setting), figures, result.json, studies.
After a kill, the same command continues, also with more rounds or smaller targets. If these lead to other settings, the
studies of the old ones are renamed.
"""

from pathlib import Path

import jax
import polars as pl
from rich.console import Console

from experiments.figures import drawing
from experiments.harness import cli, comparison, grid, results, runner, storage


def run(settings: comparison.Settings) -> Path:
    """Search, widen, refine and report, and return the folder of the results."""
    console, leads = cli.leader_console(), jax.process_index() == 0
    settings = comparison.apply_quick_defaults(settings)
    settings.budget.check()
    settings.link.check()
    out, seeds = settings.out, settings.axes.seeds
    with jax.enable_x64(settings.data == comparison.Settings().data):
        space = comparison.MethodGrids(settings, console)
        wanted = space.all()
        identity = grid.settings_identity(settings, experiment="compare")
        # building the points refuses what cannot run before anything is written
        with runner.lock_study(out, identity, runner.reason_states_dropped(space.points(wanted, seeds))):
            tried = space.run("search", wanted, seeds, console)
            for folder, where, propose in comparison.iter_phases(space):
                if more := comparison.new_candidates(propose(tried), wanted):
                    wanted += more
                    console.print(f"{len(more)} settings {where}")
                    tried = pl.concat([tried, space.run(folder, more, seeds, console)], how="diagonal_relaxed")
            best = comparison.best_candidates(tried, space.grids)
            first = space.first() if space.known or not best else []  # the reference of the gains
            chosen = comparison.new_candidates([*best, *first], [])
            reported = space.run("report", chosen, settings.report_seeds, console)
            if leads:
                storage.save_frame(tried, out / "tried", csv=True)
                storage.save_frame(comparison.build_report(space, tried, reported), out / "best", csv=True)
                storage.write_json(out / "run.json", storage.provenance())
                print_report(out, console)
    return out


def print_report(out: Path, console: Console) -> None:
    """Draw the figures, and print the bits of each method and its setting at the smallest target that it reached."""
    drawing.draw_figures(out)
    best = pl.read_parquet(out / "best.parquet")
    if not best["bits_up"].count():
        results.report_result(console, out, {}, ["no target was reached: give more --rounds, or larger targets"])
        return
    best = best.filter(pl.col("cheapest in") == "bits up")
    targets = best["target"].unique(maintain_order=True).to_list()
    last = best.drop_nulls("bits_up").group_by("method", maintain_order=True).last()
    wide = best.pivot("target", index="method", values="bits_up").join(last, on="method", how="left")
    gain = [pl.col("gain over theory").alias("gain")] * (best["bits_up of theory"].count() > 0)
    wider = pl.when(pl.col("widened") != "").then(pl.format(" (wider: {})", "widened")).otherwise(pl.lit(""))
    table = wide.sort(*reversed(targets), nulls_last=True).select("method", *targets, *gain, pl.col("setting") + wider)
    title = f"fewest bits up to {best['goal'][0]} ..., mean over the report seeds"
    title += "; gain over the step of theory" if gain else ""
    words = dict.fromkeys(targets, results.format_count) | {
        "gain": lambda value: "-" if value is None else f"{value:.1f}x"
    }
    edges = last.filter(pl.col("at the edge") != "").select(pl.format("{} ({})", "method", "at the edge")).to_series()
    notices = [f"still best at the edge of what was tried: {', '.join(edges)}"] * (len(edges) > 0)
    notices += results.tied(pl.read_parquet(out / "report" / "points.parquet"))
    results.report_result(console, out, {title: table}, notices, words)


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(comparison.Settings, given, __doc__))
