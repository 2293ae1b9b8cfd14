r"""Every method at its best: searched and chosen on some seeds, reported on others.

    python -m experiments.compare                all members on a convex problem, 8 minutes
    python -m experiments.compare --problem softmax --dataset mnist --algorithm gd laq qgd
    python -m experiments.compare --problem my.py:make --dataset my.py:load \
        --algorithm laq my.py:factory --set beta 0.1 0.5 --target-accuracy 0.8 0.9

Every member runs its grid of steps (powers of `--lr-ratio` around the step of theory, or around a plain one where the problem
has no known smoothness constant L) and of its own numbers on `--seeds`, as one compiled program. Where the best value of a
number lies on the edge of its grid, the grid is widened there; between the best step and its neighbours further ones are
tried, down to a quarter of the grid's distance. The settings that are cheapest at each target in bits up, in all bits, in
rounds or in seconds run again on `--report-seeds`: what the tables say is what these cost. Leaves in --out: best (a row a method, target and criterion;
Parquet, CSV), tried (every setting), figures (PNG, SVG), and the studies that it is made of; resumes like a sweep, and goes
on to more rounds or smaller targets like one. Where the choice of settings is another then, their study is run anew.
"""

from itertools import product
from pathlib import Path

import jax
import polars as pl
from rich.console import Console

from experiments.figures import drawing
from experiments.harness import cli, comparison, grid, results, runner, storage


def run(settings: comparison.Settings) -> Path:
    """Search, widen, report; tables and figures in the output folder, which is returned."""
    console, leads = cli.leader_console(), jax.process_index() == 0
    settings = grid.apply_quick_defaults(settings)
    settings.budget.check()
    settings.link.check()
    with jax.enable_x64(settings.data == comparison.Settings().data):
        compared = comparison.Comparison(settings, console)
        wanted = [(name, dict(zip(axes, v, strict=True))) for name, axes in compared.grids.items() for v in product(*axes.values())]  # fmt: skip
        made = compared.points(wanted, settings.axes.seeds)  # what cannot run is refused before anything is written
        with runner.lock_study(
            settings.out, grid.settings_identity(settings, experiment="compare"), runner.reason_states_dropped(made)
        ):
            tried = compared.run("search", wanted, settings.axes.seeds, console)
            for folder, proposed in compared.search_phases():
                known = {comparison.candidate_key(one) for one in wanted}
                more = list(
                    {
                        comparison.candidate_key(one): one
                        for one in proposed(tried)
                        if comparison.candidate_key(one) not in known
                    }.values()
                )
                if more:
                    wanted += more
                    console.print(f"{len(more)} settings {comparison.SEARCH_PHASES[folder.partition('-')[0]]}")
                    summary = compared.run(folder, more, settings.axes.seeds, console)
                    tried = pl.concat([tried, summary], how="diagonal_relaxed")
            best_ones = comparison.best_candidates(tried, compared.grids)
            first = compared.first() if compared.known or not best_ones else []  # what the best is measured against
            chosen = {comparison.candidate_key(one): one for one in [*best_ones, *first]}
            reported = compared.run("report", list(chosen.values()), settings.report_seeds, console)
            if not leads:
                return settings.out
            storage.save_frame(tried, settings.out / "tried", csv=True)
            rows = [row for name in compared.grids for row in compared.best_rows(name, tried, reported)]
            kinds = {c: pl.Float64 for c in rows[0] if c.startswith((*comparison.CRITERIA.values(), "uploads", "gain"))}
            kinds |= dict.fromkeys(("setting", "widened", "at the edge"), pl.String)
            best = pl.DataFrame(rows, schema_overrides=kinds).with_columns(goal=pl.lit(tried["goal"][0]))
            storage.save_frame(best, settings.out / "best", csv=True)
            storage.write_json(settings.out / "run.json", storage.provenance())
            print_report(settings.out, console)
    return settings.out


def print_report(out: Path, console: Console) -> None:
    """Figures, and a row a member: its bits at each target, and its setting at the smallest that it reached."""
    drawing.draw_figures(out)
    if not pl.read_parquet(out / "best.parquet")["bits_up"].count():
        results.report_result(console, out, {}, ["no target was reached: give more --rounds, or larger targets"])
        return
    best = pl.read_parquet(out / "best.parquet").filter(pl.col("cheapest in") == "bits up")
    targets = best["target"].unique(maintain_order=True).to_list()
    wide = best.pivot("target", index="method", values="bits_up")
    last = best.drop_nulls("bits_up").group_by("method", maintain_order=True).last()
    shown = wide.join(last, on="method", how="left").sort(*reversed(targets), nulls_last=True)
    words = dict.fromkeys(targets, results.format_count) | {
        "gain": lambda gain: "-" if gain is None else f"{gain:.1f}x"
    }
    gain = [pl.col("gain over theory").alias("gain")] * (best["bits_up of theory"].count() > 0)
    wider = pl.when(pl.col("widened") != "").then(pl.format(" (wider: {})", "widened")).otherwise(pl.lit(""))
    title = f"fewest bits up to {best['goal'][0]} ..., mean over the report seeds"
    title += "; gain over the step of theory" if gain else ""
    open_ = last.filter(pl.col("at the edge") != "").select("method", "at the edge").rows()
    still = "still best at the edge of what was tried: " + ", ".join(f"{m} ({axes})" for m, axes in open_)
    table = shown.select("method", *targets, *gain, pl.col("setting") + wider)
    notices = [*([still] if open_ else []), *results.tied(pl.read_parquet(out / "report" / "points.parquet"))]
    results.report_result(console, out, {title: table}, notices, words)


if __name__ == "__main__":
    with cli.command_line() as given:
        run(grid.parse_settings(comparison.Settings, given, __doc__))
