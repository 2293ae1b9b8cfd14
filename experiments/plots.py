"""Figures from result files alone: `python -m experiments.plots DIR` draws again what an experiment left in DIR."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # files only: no screen is needed, none is opened

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import tyro
from matplotlib import rcsetup
from matplotlib.colors import LogNorm
from matplotlib.ticker import NullFormatter

from experiments.files import replacing

STYLE: dict[Any, Any] = {
    "figure.dpi": 130,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "laqjax",
    "font.size": 10,
    "lines.linewidth": 1.4,
    "axes.prop_cycle": rcsetup.cycler(linestyle=["-", "--", ":"]) * rcsetup.cycler(color=plt.get_cmap("tab10").colors),  # pyright: ignore[reportAttributeAccessIssue]
}
AXES = {"round": "rounds", "uploads": "uploads", "bits_up": "bits up", "bits": "bits up + down"}


def save(figure: Any, path: Path) -> None:
    """PNG and SVG beside each other."""
    for suffix in (".png", ".svg"):
        with replacing(path.with_suffix(suffix)) as part:
            figure.savefig(part, bbox_inches="tight", metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def loss_curves(curves: pl.DataFrame, path: Path, *, ylabel: str = "f - f*", floor: float = 1e-9) -> None:
    """`residual` against rounds, uploads, bits up and bits up + down, one line a `method`, log axes."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6), sharey=True)
        for axis, (column, label) in zip(axes, AXES.items(), strict=True):
            known = curves.drop_nans("residual").filter(pl.col(column) > 0)
            for (method,), rows in known.group_by(["method"], maintain_order=True):
                axis.plot(rows[column], rows["residual"].clip(floor), label=method, marker="." if len(rows) < 3 else "")
            axis.set(xscale="log", yscale="log", xlabel=label)
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0].set_ylabel(ylabel)
        axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def raster(curves: pl.DataFrame, path: Path, *, title: str = "") -> None:
    """Who uploaded when: one dot an upload, a row a worker, a panel a `method`; `sent` holds lists of workers."""
    methods = curves["method"].unique(maintain_order=True).to_list()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(len(methods), 1, figsize=(9, 1.6 * len(methods) + 0.5), sharex=True, squeeze=False)
        for axis, method in zip(axes[:, 0], methods, strict=True):
            rows = curves.filter(pl.col("method") == method).select("round", "sent").explode("sent").drop_nulls()
            axis.plot(rows["round"], rows["sent"], linestyle="", marker="|", markersize=4, alpha=0.6)
            axis.set_ylabel("worker")
            axis.set_title(f"{title}{method}: {len(rows):,} uploads", fontsize=9, loc="left")
            axis.invert_yaxis()
            axis.yaxis.get_major_locator().set_params(integer=True)
        axes[-1, 0].set_xlabel("round")
        save(figure, path)


def comparison(folder: Path) -> None:
    """The figures of `experiments.reproduce`."""
    curves = pl.read_parquet(folder / "curves.parquet")
    residual = not curves["residual"].is_nan().all()
    shown = curves if residual else curves.with_columns(residual=pl.col("loss"))
    loss_curves(shown, folder / "loss", ylabel="f - f*" if residual else "f")
    all_sent = pl.col("round").max().over("method") * pl.col("workers")
    lazy = curves.filter(pl.col("uploads").max().over("method") < all_sent)
    if len(lazy):
        raster(lazy, folder / "uploads")
    accuracy_curves(curves, folder / "accuracy")


def last_target(summary: pl.DataFrame) -> str:
    """The smallest target of a sweep, as it stands in the column names."""
    return min((name.removeprefix("rounds_") for name in summary.columns if _is_target(name)), key=float)


def _is_target(name: str) -> bool:
    return name.startswith("rounds_") and not name.endswith("_ci95")


def ranked(summary: pl.DataFrame, target: str) -> pl.DataFrame:
    """The settings that reached the target on every seed, the fewest bits up first."""
    return summary.filter(pl.col(f"bits_up_{target}").is_not_null()).sort(f"bits_up_{target}", f"rounds_{target}")


def front(rows: pl.DataFrame, target: str) -> pl.DataFrame:
    """The settings that no other beats in both bits up and rounds."""
    fewest = pl.col(f"rounds_{target}").cum_min()
    return ranked(rows, target).filter((pl.col(f"rounds_{target}") < fewest.shift(1)).fill_null(True))


def labels(summary: pl.DataFrame) -> dict[int, str]:
    """Each setting in a few words, by its first point: the algorithm, b, C, D, and what else differs between settings."""
    short = {"bits": "b", "limit": "C", "window": "D"}
    settings = summary.columns[: summary.columns.index("seeds")]
    shown = [name for name in settings if name in short or (name != "algorithm" and summary[name].n_unique() > 1)]
    words = {}
    for row in summary.iter_rows(named=True):
        said = [(short.get(name, name), row[name]) for name in shown if row[name] is not None]
        values = [f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in said]
        words[row["point"]] = ", ".join([row["algorithm"], *values])
    twins = [word for word in words.values() if list(words.values()).count(word) > 1]
    return {point: f"{word} (point {point})" if word in twins else word for point, word in words.items()}


def sweep(folder: Path) -> None:
    """The figures of `experiments.sweep`."""
    summary = pl.read_parquet(folder / "summary.parquet")
    curves = pl.read_parquet(folder / "curves.parquet")
    masks = pl.read_parquet(folder / "masks.parquet")
    target = last_target(summary)
    heat_maps(summary, target, folder / "bits-to-target")
    best, best_front, words = ranked(summary, target), front(summary, target), labels(summary)
    # where none got there, those that came nearest
    shown = (best_front if len(best) else summary.sort("final_loss", nulls_last=True)).head(8)["point"].to_list()
    chosen = curves.filter(pl.col("point").is_in(shown)).with_columns(
        method=pl.col("point").replace_strict(words, return_dtype=pl.String)
    )
    if chosen["uploads"].sum() > 0:
        loss_curves(chosen, folder / "front")
    if not best[f"bits_up_{target}"].sum() > 0:  # none got there, or all were there from the start
        return
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 4.2))
        x, y = f"bits_up_{target}", f"rounds_{target}"
        axis.scatter(best[x], best[y], s=14, alpha=0.5, label="reached on every seed")
        axis.plot(best_front[x], best_front[y], "o-", drawstyle="steps-post", color="C3", label="Pareto front")
        top = best.row(0, named=True)
        axis.annotate(
            words[top["point"]],
            (top[x], top[y]),
            xytext=(8, 10),
            textcoords="offset points",
            fontsize=9,
        )
        axis.set(xscale="log", xlabel=f"bits up to f - f* <= {target}", ylabel="rounds")
        axis.legend(frameon=False)
        save(figure, folder / "pareto")
    mask = masks.row(by_predicate=pl.col("point") == best["point"][0], named=True)
    size = mask["rounds"] * mask["workers"]
    sent = np.unpackbits(np.frombuffer(mask["sent"], np.uint8), count=size).reshape(mask["rounds"], mask["workers"])
    if not size:
        return  # the start was good enough
    rows = {
        "method": words[best["point"][0]],
        "round": range(len(sent)),
        "sent": [np.flatnonzero(row).tolist() for row in sent],
    }
    raster(pl.DataFrame(rows, schema_overrides={"sent": pl.List(pl.Int64)}), folder / "uploads")


def tune(folder: Path) -> None:
    """Bits up over the trials, from what `experiments.tune` left."""
    trials = pl.read_parquet(folder / "trials.parquet")
    bits = trials["bits_up"].fill_null(np.nan).to_numpy()
    if np.isnan(bits).all():
        return
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(6, 4))
        axis.plot(trials["trial"], bits, "o", markersize=4, alpha=0.6, label="reached on every seed")
        axis.plot(trials["trial"], np.fmin.accumulate(bits), drawstyle="steps-post", color="C3", label="fewest so far")
        if not np.isnan(bits[0]):
            axis.axhline(bits[0], color="k", linestyle="--", linewidth=1, label="the paper's setting")
        axis.set(yscale="log", xlabel="trial", ylabel=f"bits up to f - f* <= {trials['target'][0]:g}")
        axis.legend(frameon=False)
        save(figure, folder / "trials")


def lag(folder: Path) -> None:
    """Residual against uploads, a panel a problem, from what `experiments.lag` left."""
    curves = pl.read_parquet(folder / "lag.parquet")
    problems = curves["method"].str.split(": ").list.first().unique(maintain_order=True).to_list()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(problems), figsize=(4 * len(problems), 3.6), sharey=True)
        for axis, problem in zip(axes, problems, strict=True):
            mine = curves.filter(pl.col("method").str.starts_with(f"{problem}: "))
            for (method,), rows in mine.group_by(["method"], maintain_order=True):
                axis.plot(rows["uploads"].clip(1), rows["residual"].clip(1e-9), label=str(method).split(": ")[1])
            axis.set(xscale="log", yscale="log", xlabel="uploads", title=problem)
        axes[0].set_ylabel("f - f*")
        axes[0].legend(frameon=False)
        save(figure, folder / "uploads")


def pareto_of_methods(folder: Path) -> None:
    """Residual against bits up, one line a method, and each method's cost at its target as a point."""
    curves = pl.read_parquet(folder / "family.parquet")
    table = pl.read_parquet(folder / "table.parquet").filter(pl.col("target").is_not_null())
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5))
        for (method,), rows in curves.filter(pl.col("bits_up") > 0).group_by(["method"], maintain_order=True):
            left.plot(rows["bits_up"], rows["residual"].clip(1e-12), label=method)
        left.set(xscale="log", yscale="log", xlabel="bits up", ylabel="f - f*")
        figure.legend(frameon=False, fontsize=8, ncols=9, loc="upper center", bbox_to_anchor=(0.5, 0.03))
        right.scatter(table["bits_up"], table["round"], s=16)
        right.margins(x=0.15)
        for i, row in enumerate(table.sort("bits_up").iter_rows(named=True)):
            right.annotate(
                row["method"],
                (row["bits_up"], row["round"]),
                xytext=(5 if i % 2 else -5, 3),
                textcoords="offset points",
                fontsize=8,
                ha="left" if i % 2 else "right",
            )
        if len(table):
            best = table.sort("bits_up", "round").filter(
                (pl.col("round") < pl.col("round").cum_min().shift(1)).fill_null(True)
            )
            right.plot(best["bits_up"], best["round"], drawstyle="steps-post", color="C3", label="Pareto front")
            right.set(
                xscale="log", yscale="log", xlabel=f"bits up to f - f* <= {table['target'][0]:g}", ylabel="rounds"
            )
            right.legend(frameon=False)
        save(figure, folder / "family")


def heterogeneity(folder: Path) -> None:
    """Share of GD's uploads that is saved, over the spread of L_m and over Dirichlet alpha."""
    table = pl.read_parquet(folder / "heterogeneity.parquet")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
        for axis, ((name,), rows) in zip(axes, table.group_by(["axis"], maintain_order=True), strict=True):
            for method in ("LAQ", "LAG-WK"):
                axis.plot(rows["value"], 100 * rows[f"{method} saves"], "o-", label=method)
            axis.set(xlabel=name, xscale="log" if "alpha" in str(name) else "linear")
        axes[0].set_ylabel("uploads saved against GD, %")
        axes[0].legend(frameon=False)
        save(figure, folder / "heterogeneity")


def accuracy_curves(curves: pl.DataFrame, path: Path) -> None:
    """Test accuracy where it was measured against rounds, uploads and bits, one line a method."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(AXES), figsize=(4 * len(AXES), 3.6), sharey=True)
        for axis, (column, name) in zip(axes, AXES.items(), strict=True):
            known = curves.drop_nulls("accuracy").filter(pl.col(column) > 0)
            for (method,), rows in known.group_by(["method"], maintain_order=True):
                axis.plot(rows[column], rows["accuracy"], label=method)
            axis.set(xscale="log", xlabel=name)
        axes[0].set_ylabel("test accuracy")
        axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        save(figure, path)


def heat_maps(summary: pl.DataFrame, target: str, path: Path) -> None:
    """Bits up to the target over b and C, a panel a D; the cheapest of the other axes in each cell, blank if never reached."""
    lazy = summary.drop_nulls(["bits", "limit", "window"])
    if not len(lazy):
        return
    b, c, d = (sorted(lazy[name].unique()) for name in ("bits", "limit", "window"))
    if lazy.select("bits", "limit", "window").n_unique() < len(b) * len(c) * len(d):  # drawn at random, not a grid
        return
    cheapest = {key: group[f"bits_up_{target}"].min() for key, group in lazy.group_by("bits", "limit", "window")}
    grids = np.array([[[cheapest.get((i, j, k)) for j in c] for i in b] for k in d], float) / 1e6  # nan: never reached
    others = ", the cheapest of all other axes" * (len(lazy) > grids.size)
    if not np.nanmax(grids, initial=0) > 0:
        return
    plain: dict[Any, Any] = STYLE | {"axes.grid": False}
    with plt.rc_context(plain):
        figure, panels = plt.subplots(
            1, len(d), figsize=(1.6 + (1 + 0.9 * len(c)) * len(d), 1.4 + 0.5 * len(b)), squeeze=False
        )
        norm = LogNorm(np.nanmin(grids), max(np.nanmax(grids), 1.01 * np.nanmin(grids)))
        for axis, grid, window in zip(panels[0], grids, d, strict=True):
            axis.imshow(grid, norm=norm, cmap="viridis_r", aspect="auto")
            axis.set(title=f"D = {window:g}", xlabel="C", ylabel="b")
            axis.set_xticks(range(len(c)), [f"{v:g}" for v in c])
            axis.set_yticks(range(len(b)), [f"{v:g}" for v in b])
            for (row, column), value in np.ndenumerate(grid):
                text = "-" if np.isnan(value) else f"{value:.3g}"
                dark = not np.isnan(value) and norm(value) > 0.6
                best = value == np.nanmin(grids)
                axis.text(
                    column,
                    row,
                    text,
                    ha="center",
                    va="center",
                    color="w" if dark else "k",
                    weight="bold" if best else None,
                )
        figure.suptitle(f"Mbit up to f - f* <= {target}{others}", fontsize=10, y=1.05)
        figure.colorbar(panels[0, 0].images[0], ax=panels[0].tolist(), label="Mbit up")
        save(figure, path)


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Draw the figures of a result folder again."""
    if (folder / "summary.parquet").exists():
        sweep(folder)
    elif (folder / "lag.parquet").exists():
        lag(folder)
    elif (folder / "trials.parquet").exists():
        tune(folder)
    elif (folder / "family.parquet").exists():
        pareto_of_methods(folder)
    elif (folder / "heterogeneity.parquet").exists():
        heterogeneity(folder)
    elif (folder / "curves.parquet").exists():
        comparison(folder)
    else:
        raise SystemExit(
            f"{folder}: neither summary.parquet nor curves.parquet there; expected a folder that an experiment wrote"
        )
    print(*sorted(str(p) for p in folder.glob("*.png")), sep="\n")


def thinned(rounds: int, points: int) -> Sequence[int]:
    """About `points` indices below `rounds`, denser at the start as a log axis shows them; first and last included."""
    if rounds <= points:
        return range(rounds)
    return np.unique(
        np.concatenate([np.geomspace(1, rounds, points // 2), np.linspace(1, rounds, points // 2)]).astype(int) - 1
    ).tolist()


if __name__ == "__main__":
    tyro.cli(main)
