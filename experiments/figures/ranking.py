"""Which settings of a result folder are the best, and what each is called in figures and tables."""

import math
from collections import Counter
from typing import Any

import polars as pl

from experiments.harness.results import format_setting, setting_columns, target_labels


def rank_by_bits(summary: pl.DataFrame, target: str) -> pl.DataFrame:
    """Return the settings that reached the target on every seed, the fewest bits up first."""
    return summary.filter(pl.col(f"bits_up_{target}").is_not_null()).sort(f"bits_up_{target}", f"rounds_{target}")


def rank_all(summary: pl.DataFrame) -> pl.DataFrame:
    """Return all settings: by bits up to the last target, then those that missed it by their final loss."""
    best = rank_by_bits(summary, target_labels(summary)[-1])
    rest = summary.filter(~pl.col("point").is_in(best["point"].to_list()))
    return pl.concat([best, rest.sort("final_loss", nulls_last=True)])


def pareto_front(rows: pl.DataFrame, target: str) -> pl.DataFrame:
    """Return the settings that no other beats in both bits up and rounds."""
    fewest = pl.col(f"rounds_{target}").cum_min()
    return rank_by_bits(rows, target).filter((pl.col(f"rounds_{target}") < fewest.shift(1)).fill_null(True))


def select_settings(summary: pl.DataFrame, number: int = 8) -> pl.DataFrame:
    """Return the settings whose curves are drawn: the front, the cheapest up to six, and the best of each algorithm."""
    if len(summary) <= 6:
        return summary
    ranked = rank_all(summary)
    front = pareto_front(summary, target_labels(summary)[-1])
    best = ranked.unique("algorithm", keep="first", maintain_order=True)
    chosen = pl.concat([front[:number], ranked]).unique("point", keep="first", maintain_order=True)
    chosen = chosen[: min(max(len(front), 6), number)]
    return pl.concat([chosen, best]).unique("point", keep="first", maintain_order=True)


def setting_labels(summary: pl.DataFrame) -> dict[int, str]:
    """Return the name of each setting by its first point: the algorithm, and what differs between settings."""
    shown = [name for name in setting_columns(summary) if name != "algorithm" and summary[name].n_unique() > 1]
    words = {}
    for row in summary.iter_rows(named=True):
        setting = format_setting({name: row[name] for name in shown if row[name] is not None})
        words[row["point"]] = ", ".join(filter(None, (row["algorithm"], setting)))
    often = Counter(words.values())
    return {point: f"{word} (point {point})" if often[word] > 1 else word for point, word in words.items()}


def point_labels(points: pl.DataFrame, summary: pl.DataFrame) -> dict[int, str]:
    """Return the name of the setting of every point; the seeds of a setting share it."""
    settings = setting_columns(points)
    if "algorithm" in settings:
        words = setting_labels(summary)
        first = {row[:-1]: words[row[-1]] for row in summary.select(*settings, "point").iter_rows()}
        return {row[-1]: first[row[:-1]] for row in points.select(*settings, "point").iter_rows()}
    differ = [name for name in settings if points[name].n_unique() > 1] or settings[:1]
    return dict(points.select("point", pl.concat_str(differ, separator=", ")).iter_rows())


def heat_map_cells(summary: pl.DataFrame, target: str) -> pl.DataFrame | None:
    """Return D, b, C and Mbit up to the target, the cheapest of all other axes; null where it was never reached.

    None where the settings are no grid or a single cell, or none reached the target.
    """
    axes: Any = {"D": "window", "b": "bits", "C": "max_silence"}
    if not set(axes.values()) <= set(summary.columns):
        return None
    lazy = summary.drop_nulls(list(axes.values())).group_by(**axes)
    cells = lazy.agg(mbit=pl.col(f"bits_up_{target}").min() / 1e6).sort(*axes)
    is_grid = 1 < len(cells) == math.prod(cells[name].n_unique() for name in axes)  # settings drawn at random are none
    return cells if is_grid and (cells["mbit"] > 0).any() else None


def methods_by_cost(best: pl.DataFrame) -> list[str]:
    """Return the methods of a comparison: the fewest bits at the last target first, then those that missed it, likewise."""
    wide = best.pivot("target", index="method", values="bits_up")
    return wide.sort(*best["target"].unique(maintain_order=True).reverse(), nulls_last=True)["method"].to_list()
