"""Draw the figures of a result folder again, from its tables alone.

    python -m experiments.plots results/sweep
    python -m experiments.plots results/sweep --csv      its curves as a table too, for other programs

Figures are PNG and SVG beside the tables; nothing is computed again.
"""

import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import tyro
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from experiments.harness.results import COLUMN_TITLES, format_value, setting_columns, target_labels, unpack_mask
from experiments.harness.storage import atomic_write

mpl.use("Agg")  # files only: no screen is needed, none is opened


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
}
AXES = {"round": "rounds", "uploads": "uploads", "bits_up": "bits up", "bits": "bits up + down"}
FEDERATED_AXES = {
    "uploads": "uploads",
    "bits_up": "bits up, billed",
    "bytes_up": "bytes up, observed",
    "seconds": "seconds",
}
COLORS: Sequence[Any] = plt.get_cmap("tab10").colors  # pyright: ignore[reportAttributeAccessIssue]
LINES = ("-", "--", ":")
MARKERS = "sD^vP*<>"


class LogTicks(LogLocator):
    """Tick locator of a log axis with at least two ticks inside the limits, however short the range is."""

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Return powers of ten, or fewer and rounder numbers where less than two decades are seen."""
        low, high = sorted((vmin, vmax))
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        axis: Any = self.axis
        most = max(2, min(axis.get_tick_space(), 6))
        if last - first > 1:
            return 10.0 ** np.arange(first, last + 1, -(-(last - first + 1) // most))
        for digits in ((1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
            ticks = np.array([digit * 10.0**power for power in range(first - 1, last + 1) for digit in digits])
            inside = ticks[(ticks >= low) & (ticks <= high)]
            if len(inside) > 2:
                return inside
        ticks = np.array(MaxNLocator(min(most, 4)).tick_values(low, high))
        return ticks[(ticks >= low) & (ticks <= high)]


class LogLabels(Formatter):
    """Tick labels of a log axis: powers of ten over several decades, else plain numbers such as 0.5 and 20M."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """Return the label of a tick that stands alone."""
        return self.format_ticks([x])[0]

    def format_ticks(self, values: Any) -> list[str]:
        """Return the labels of all ticks."""
        powers = np.log10(values)
        if len(powers) > 1 and np.ptp(powers) > 1.99 and np.allclose(powers, np.round(powers)):
            return [f"$10^{{{power:.0f}}}$" for power in powers]
        most = math.floor(max(powers, default=0) + 1e-9)
        if not -4 < most < 18:
            return [rf"${value / 10.0**most:.6g}\times10^{{{most}}}$" for value in values]
        thousands = [math.floor(power + 1e-9) // 3 if most > 3 and power >= 3 else 0 for power in powers]
        return [f"{value / 1000**n:.10g}{('', *'kMGTP')[n]}" for value, n in zip(values, thousands, strict=True)]


def log_scale(axes: Any, letters: str) -> None:
    """Make the x or y axis, or both, logarithmic, with labels inside the limits."""
    for letter in letters:
        getattr(axes, f"set_{letter}scale")("log")
        axis = getattr(axes, f"{letter}axis")
        axis.set_major_locator(LogTicks())
        axis.set_major_formatter(LogLabels())
        axis.set_minor_locator(NullLocator())


def legend(figure: Any) -> None:
    """Add a legend on the right of all axes, with each label once; the figure grows with it."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(textwrap.fill(name, 40), handle)
    lines = sum(1 + name.count("\n") for name in handles)
    figure.set_figheight(max(figure.get_figheight(), 0.5 + 0.18 * lines))
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside right center")


def save(figure: Any, path: Path) -> None:
    """PNG and SVG beside each other."""
    for suffix in (".png", ".svg"):
        with atomic_write(path.with_name(path.name + suffix)) as part:
            figure.savefig(part, metadata={"Date": None} if suffix == ".svg" else None)
    plt.close(figure)


def line_style(number: int) -> dict[str, Any]:
    """Color and line of the n-th thing in a figure."""
    return {"color": COLORS[number % 10], "linestyle": LINES[number // 10 % 3]}


def plot_curves(
    curves: pl.DataFrame, path: Path, column: str = "residual", ylabel: str = "f - f*", against: dict[str, str] = AXES
) -> None:
    """A measure against rounds, uploads, bits up and bits up + down, a color a `method`, a line a point."""
    methods = curves["method"].unique(maintain_order=True).to_list()
    log = column == "residual"
    with plt.rc_context(STYLE):
        size = 4 * len(against), 3.6
        figure, axes = plt.subplots(1, len(against), figsize=size, sharey=True, layout="constrained")
        for axis, (name, label) in zip(axes, against.items(), strict=True):
            known = curves.drop_nans(column).filter(pl.col(name) > 0)
            named = set()
            for (method, _), rows in known.group_by(["method", "point"], maintain_order=True):
                y = rows[column].clip(1e-12) if log else rows[column]
                first = None if method in named else method
                named.add(method)
                marker, width = "." if len(rows) < 3 else "", 1.4 if first else 0.7
                axis.plot(
                    rows[name], y, label=first, marker=marker, linewidth=width, **line_style(methods.index(method))
                )
            log_scale(axis, "xy" if log else "x")
            axis.set_xlabel(label)
        axes[0].set_ylabel(ylabel)
        legend(figure)
        save(figure, path)


def plot_upload_raster(masks: dict[str, np.ndarray], path: Path) -> None:
    """Who uploaded when: one dot an upload, a row a worker, a panel a method; masks [rounds, workers]."""
    with plt.rc_context(STYLE):
        size, shared = (9, 1.6 * len(masks) + 0.5), dict[str, Any]({"sharex": True, "squeeze": False})
        figure, axes = plt.subplots(len(masks), 1, figsize=size, layout="constrained", **shared)
        for axis, (method, sent) in zip(axes[:, 0], masks.items(), strict=True):
            axis.plot(*np.nonzero(sent), linestyle="", marker="|", markersize=4, alpha=0.6)
            axis.set_ylabel("worker")
            title = textwrap.fill(f"{method}: {np.count_nonzero(sent):,} uploads", 110)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_ylim(sent.shape[1] - 0.5, -0.5)
            axis.yaxis.get_major_locator().set_params(integer=True)
        axes[-1, 0].set_xlabel("round")
        save(figure, path)


def rank_by_bits(summary: pl.DataFrame, target: str) -> pl.DataFrame:
    """The settings that reached the target on every seed, the fewest bits up first."""
    return summary.filter(pl.col(f"bits_up_{target}").is_not_null()).sort(f"bits_up_{target}", f"rounds_{target}")


def pareto_front(rows: pl.DataFrame, target: str) -> pl.DataFrame:
    """The settings that no other beats in both bits up and rounds."""
    fewest = pl.col(f"rounds_{target}").cum_min()
    return rank_by_bits(rows, target).filter((pl.col(f"rounds_{target}") < fewest.shift(1)).fill_null(True))


def setting_labels(summary: pl.DataFrame) -> dict[int, str]:
    """Each setting in a few words, by its first point: the algorithm, and what differs between settings."""
    shown = [name for name in setting_columns(summary) if name != "algorithm" and summary[name].n_unique() > 1]
    words = {}
    for row in summary.iter_rows(named=True):
        values = [
            f"{COLUMN_TITLES.get(name, name)}={format_value(row[name])}" for name in shown if row[name] is not None
        ]
        words[row["point"]] = ", ".join([row["algorithm"], *values])
    often = Counter(words.values())
    return {point: f"{word} (point {point})" if often[word] > 1 else word for point, word in words.items()}


def point_labels(points: pl.DataFrame, summary: pl.DataFrame) -> dict[int, str]:
    """The setting of every point in a few words: seeds have one name."""
    settings = setting_columns(points)
    if "algorithm" in settings:
        words = setting_labels(summary)
        first = {row[:-1]: words[row[-1]] for row in summary.select(*settings, "point").iter_rows()}
        return {row[-1]: first[row[:-1]] for row in points.select(*settings, "point").iter_rows()}
    differ = [name for name in settings if points[name].n_unique() > 1] or settings[:1]
    return dict(points.select("point", pl.concat_str(differ, separator=", ")).iter_rows())


def plot_sweep(folder: Path) -> None:
    """The figures of `experiments.sweep`."""
    summary, curves, masks = (pl.read_parquet(folder / f"{name}.parquet") for name in ("summary", "curves", "masks"))
    target = target_labels(summary)[-1]
    plot_heat_maps(summary, target, folder / "bits-to-target")
    best, words = rank_by_bits(summary, target), setting_labels(summary)
    nearest = pl.concat([best, summary.sort("final_loss", nulls_last=True)])
    drawn = (pareto_front(summary, target) if len(best) else nearest).head(8)
    drawn = pl.concat(
        [drawn, nearest.unique("algorithm", keep="first", maintain_order=True)]
    )  # no algorithm is missing
    chosen = curves.filter(pl.col("point").is_in(drawn["point"].to_list())).with_columns(
        method=pl.col("point").replace_strict(words, return_dtype=pl.String)
    )
    if chosen["uploads"].sum() > 0:
        accuracy = "accuracy" in summary["goal"][0]
        ylabel = summary["goal"][0].removesuffix(" <=").removesuffix(" >=")
        plot_curves(chosen, folder / "front", "accuracy" if accuracy else "residual", ylabel)
    if best[f"bits_up_{target}"].sum() > 0:  # not where none got there, or all were there from the start
        plot_pareto(best, words, target, folder / "pareto")
        sent = unpack_mask(masks.row(by_predicate=pl.col("point") == best["point"][0], named=True))
        plot_upload_raster({words[best["point"][0]]: sent}, folder / "uploads")


def plot_pareto(best: pl.DataFrame, words: dict[int, str], target: str, path: Path) -> None:
    """Rounds against bits up: a color an algorithm, 95 % intervals over seeds, a marker a point of the front."""
    x, y = f"bits_up_{target}", f"rounds_{target}"
    best = best.filter(pl.col(x) > 0)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(9, 4.6), layout="constrained")
        for i, ((name,), rows) in enumerate(best.group_by(["algorithm"], maintain_order=True)):
            error: Any = {
                f"{c}err": np.nan_to_num(rows[f"{v}_ci95"].to_numpy().astype(float)) for c, v in (("x", x), ("y", y))
            }
            color = COLORS[i % 10]
            axis.errorbar(rows[x], rows[y], **error, fmt="none", alpha=0.5, ecolor=color)
            axis.plot(rows[x], rows[y], "oXp"[i // 10 % 3], markersize=4, color=color, label=name)
        edge = pareto_front(best, target)
        if len(edge) > 1:
            axis.plot(edge[x], edge[y], drawstyle="steps-post", color="k", linewidth=1, label="Pareto front")
        shown = np.unique(np.linspace(0, len(edge) - 1, len(MARKERS)).astype(int))
        for marker, row in zip(MARKERS, edge[shown].iter_rows(named=True), strict=False):
            look: Any = {"marker": marker, "markersize": 9, "mfc": "none", "color": "k", "linestyle": ""}
            axis.plot(row[x], row[y], **look, label=f"front: {words[row['point']]}")
        log_scale(axis, "x")
        axis.set(xlabel=f"bits up to {best['goal'][0]} {target}", ylabel="rounds")
        legend(figure)
        save(figure, path)


def heat_map_cells(summary: pl.DataFrame, target: str) -> tuple[np.ndarray, str, list[list[int]]] | None:
    """Mbit up to the target [D, b, C], nan where never reached; what is to be said of it; and the values of D, b, C.

    The cheapest of the other axes in each cell. None where the settings are no grid, or none got there.
    """
    axes = ["window", "bits", "max_silence"]
    lazy = summary.drop_nulls(axes) if set(axes) <= set(summary.columns) else summary.head(0)
    values = [sorted(lazy[name].unique()) for name in axes] if len(lazy) else []
    if not values or lazy.select(axes).n_unique() < np.prod([len(axis) for axis in values]):  # drawn at random
        return None
    cheapest: Any = {key: group[f"bits_up_{target}"].min() for key, group in lazy.group_by(axes)}
    found = np.array([cheapest[key] for key in itertools.product(*values)], float)
    grids = found.reshape([len(axis) for axis in values]) / 1e6
    others = ", the cheapest of all other axes" * (len(lazy) > grids.size)
    title = f"Mbit up to {summary['goal'][0]} {target}{others}"
    return (grids, title, values) if np.nanmax(grids, initial=0) > 0 else None


def plot_heat_maps(summary: pl.DataFrame, target: str, path: Path) -> None:
    """Bits up to the target over b and C, a panel a D."""
    found = heat_map_cells(summary, target)
    if found is None:
        return
    grids, title, (d, b, c) = found
    with plt.rc_context({**STYLE, "axes.grid": False}):
        title = textwrap.fill(title, int(10 * (1.6 + (1 + 0.9 * len(c)) * len(d))))
        size = 1.6 + (1 + 0.9 * len(c)) * len(d), 1.4 + 0.5 * len(b) + 0.2 * title.count("\n")
        figure, panels = plt.subplots(1, len(d), figsize=size, squeeze=False, layout="constrained")
        norm = LogNorm(np.nanmin(grids), max(np.nanmax(grids), 1.01 * np.nanmin(grids)))
        for axis, grid, window in zip(panels[0], grids, d, strict=True):
            axis.imshow(grid, norm=norm, cmap="viridis_r", aspect="auto")
            axis.set(title=f"D = {window}", xlabel="C", ylabel="b")
            axis.set_xticks(range(len(c)), c)
            axis.set_yticks(range(len(b)), b)
            for (row, column), value in np.ndenumerate(grid):
                best: Any = {"weight": "bold"} if value == np.nanmin(grids) else {}
                color = "w" if not np.isnan(value) and norm(value) > 0.6 else "k"
                text = "-" if np.isnan(value) else f"{value:.3g}"
                axis.text(column, row, text, ha="center", va="center", color=color, **best)
        figure.suptitle(title, fontsize=10)
        bar = figure.colorbar(panels[0, 0].images[0], ax=panels[0].tolist(), label="Mbit up")
        log_scale(bar.ax, "y")
        save(figure, path)


def plot_tune(folder: Path) -> None:
    """Bits up over the trials, from what `experiments.tune` left."""
    trials = pl.read_parquet(folder / "trials.parquet")
    bits = trials["bits_up"].fill_null(np.nan).to_numpy()
    if not np.nanmax(bits, initial=0) > 0:
        return
    fewest = np.fmin.accumulate(bits)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
        axis.plot(trials["trial"], bits, "o", markersize=4, alpha=0.6, label="reached on every seed")
        if np.isfinite(fewest).sum() > 1:
            axis.plot(trials["trial"], fewest, drawstyle="steps-post", color="C3", label="fewest so far")
        if not np.isnan(bits[0]):
            axis.axhline(bits[0], color="k", linestyle="--", linewidth=1, label="the first trial")
        log_scale(axis, "y")
        axis.set(xlabel="trial", ylabel=f"bits up to {trials['goal'][0]} {trials['target'][0]:g}")
        axis.set_xlim(-0.5, max(len(trials), 2) - 0.5)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure)
        save(figure, folder / "trials")


def plot_methods(folder: Path) -> None:
    """The figures of `experiments.reproduce`: loss, accuracy, and who of the lazy methods' workers sent when."""
    table, curves, masks = (pl.read_parquet(folder / f"{name}.parquet") for name in ("points", "curves", "masks"))
    names, words = setting_columns(table), point_labels(table, table)
    curves = curves.with_columns(method=pl.col("point").replace_strict(words, return_dtype=pl.String))
    unknown = table["f_star"].null_count() == len(table)
    plot_curves(curves, folder / "loss", ylabel="f" if unknown else "f - f*")
    if curves["accuracy"].is_finite().any():
        plot_curves(curves, folder / "accuracy", "accuracy", "test accuracy")
    lazy: dict[str, np.ndarray] = {}
    for row in masks.iter_rows(named=True):
        sent = unpack_mask(row)
        if not sent.all() and sent.any():
            lazy.setdefault(words[row["point"]], sent)
    if lazy:
        plot_upload_raster(dict(list(lazy.items())[:12]), folder / "uploads")
    if len(others := [name for name in names if name != "method" and table[name].n_unique() > 1]):
        where = table.select("point", "method", panel=pl.concat_str(others, separator=", "))
        plot_panels(curves.drop("method").join(where, on="point", maintain_order="left"), folder / "panels")


def plot_federated(folder: Path) -> None:
    """The figures of `experiments.federated`: loss against what was sent, as billed and as observed."""
    summary, curves, masks = (pl.read_parquet(folder / f"{name}.parquet") for name in ("summary", "curves", "masks"))
    table = pl.read_parquet(folder / "points.parquet")
    words = point_labels(table, summary)
    method = pl.col("point").replace_strict(words, return_dtype=pl.String)
    unknown = table["f_star"].null_count() == len(table)
    plot_curves(
        curves.with_columns(method=method), folder / "loss", ylabel="f" if unknown else "f - f*", against=FEDERATED_AXES
    )
    lazy = {words[row["point"]]: unpack_mask(row) for row in masks.iter_rows(named=True)}
    lazy = {name: sent for name, sent in lazy.items() if sent.any() and not sent.all()}
    if lazy:
        plot_upload_raster(dict(list(lazy.items())[:12]), folder / "uploads")


def plot_panels(curves: pl.DataFrame, path: Path) -> None:
    """Residual against uploads, a color a `method`, a panel a `panel`."""
    names, methods = (curves[name].unique(maintain_order=True).to_list() for name in ("panel", "method"))
    with plt.rc_context(STYLE):
        size, shared = (4 * len(names) + 1, 3.6), dict[str, Any]({"sharey": True, "squeeze": False})
        figure, axes = plt.subplots(1, len(names), figsize=size, layout="constrained", **shared)
        for axis, name in zip(axes[0], names, strict=True):
            mine = curves.filter(pl.col("panel") == name)
            for (method, _), rows in mine.group_by(["method", "point"], maintain_order=True):
                y = rows["residual"].clip(1e-12)
                axis.plot(rows["uploads"].clip(1), y, label=method, **line_style(methods.index(method)))
            log_scale(axis, "xy")
            axis.set(xlabel="uploads", title=name)
        axes[0, 0].set_ylabel("f - f*")
        legend(figure)
        save(figure, path)


def plot_comparison(folder: Path) -> None:
    """Bits at each target, method by method, and the fronts of each kind, from what `experiments.compare` left."""
    best, tried = (pl.read_parquet(folder / f"{name}.parquet") for name in ("best", "tried"))
    kinds = best["kind"].unique(maintain_order=True).to_list()
    plot_costs(best.filter(pl.col("cheapest in") == "bits up"), kinds, folder / "bits")
    for target in best["target"].unique(maintain_order=True):
        reached = tried.drop_nulls(f"bits_up_{target}")
        if len(reached):
            kind = dict(best.select("method", "kind").iter_rows())
            plot_fronts(reached, target, {kind_: [m for m in kind if kind[m] == kind_] for kind_ in kinds}, folder)


def methods_by_cost(best: pl.DataFrame) -> list[str]:
    """The methods of a comparison, the cheapest at the last target last; before them who did not reach it, likewise."""
    wide = best.pivot("target", index="method", values="bits_up")
    return wide.sort(*best["target"].unique(maintain_order=True).reverse(), nulls_last=True)["method"].to_list()[::-1]


def plot_costs(best: pl.DataFrame, kinds: list[str], path: Path) -> None:
    """A row a method, a panel a target: bits up with 95 % intervals, and hollow what the step of theory costs."""
    reached = best.filter(pl.col("bits_up") > 0)
    targets = reached["target"].unique(maintain_order=True).to_list()
    if not targets:
        return
    methods, never = methods_by_cost(best), set(best["method"]) - set(best.drop_nulls("bits_up")["method"])
    names = [f"{name} (not reached)" if name in never else name for name in methods]
    with plt.rc_context(STYLE):
        size = 3.2 * len(targets) + 0.6 + 0.065 * max(map(len, names)), 1.4 + 0.22 * len(methods)
        figure, axes = plt.subplots(1, len(targets), figsize=size, sharey=True, squeeze=False, layout="constrained")
        dots = {}
        for axis, target in zip(axes[0], targets, strict=True):
            for row in reached.filter(pl.col("target") == target).iter_rows(named=True):
                color, y = COLORS[kinds.index(row["kind"]) % 10], methods.index(row["method"])
                axis.errorbar(row["bits_up"], y, xerr=row["bits_up_ci95"] or 0, fmt="o", markersize=4, color=color)
                dots[row["kind"]] = {"color": color}
                if row.get("bits_up of theory"):
                    axis.plot(row["bits_up of theory"], y, "o", markersize=5, mfc="none", color="k")
                    dots["step of theory"] = {"color": "k", "mfc": "none"}
            log_scale(axis, "x")
            axis.set(title=f"{best['goal'][0]} {target}", xlabel="bits up")
        axes[0, 0].set_yticks(range(len(methods)), names, fontsize=8)
        axes[0, 0].set_ylim(-0.6, len(methods) - 0.4)
        shown = [name for name in (*kinds, "step of theory") if name in dots]
        handles = [Line2D([], [], marker="o", linestyle="", **dots[name]) for name in shown]
        columns = max(1, int(size[0] / 1.6))
        figure.legend(handles, shown, frameon=False, ncols=columns, loc="outside upper center")
        save(figure, path)


def plot_fronts(reached: pl.DataFrame, target: str, kinds: dict[str, list[str]], folder: Path) -> None:
    """Rounds against bits up, a panel a kind: each method's front in a color, all others grey."""
    x, y = f"bits_up_{target}", f"rounds_{target}"
    reached = reached.filter(pl.col(x) > 0)
    edges = {name: pareto_front(rows, target) for (name,), rows in reached.group_by(["algorithm"], maintain_order=True)}
    shown = {kind: [m for m in methods if m in edges] for kind, methods in kinds.items()}
    shown = {kind: methods for kind, methods in shown.items() if methods}
    if not shown:
        return
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    with plt.rc_context(STYLE):
        size, shared = (5.6 * columns, 3.4 * lines), dict[str, Any]({"sharex": True, "sharey": True, "squeeze": False})
        figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained", **shared)
        for axis in axes.flat[len(shown) :]:
            axis.axis("off")
        for axis, (kind, methods) in zip(axes.flat, shown.items(), strict=False):
            for name, edge in edges.items():
                if name not in methods:
                    axis.plot(edge[x], edge[y], ".-", color="0.85", linewidth=0.8, markersize=3, zorder=1)
            for i, name in enumerate(sorted(methods, key=lambda name: edges[name][y][0], reverse=True)):
                line: Any = {"marker": "o", "markersize": 3, "linewidth": 1, **line_style(i)}
                axis.plot(edges[name][x], edges[name][y], label=textwrap.fill(name, 24), **line)
            log_scale(axis, "xy")
            axis.set_title(kind)
            axis.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        for axis in axes.flat[len(shown) - columns : len(shown)]:  # the lowest of each column
            axis.tick_params(labelbottom=True)
        figure.supxlabel(f"bits up to {reached['goal'][0]} {target}", fontsize=10)
        figure.supylabel("rounds", fontsize=10)
        save(figure, folder / f"fronts-{target}")


def plot_heterogeneity(folder: Path) -> None:
    """Share of GD's uploads that is saved, over the spread of L_m and over Dirichlet alpha."""
    table = pl.read_parquet(folder / "heterogeneity.parquet")
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for axis, ((name,), rows) in zip(axes, table.group_by(["axis"], maintain_order=True), strict=True):
            for method in ("laq", "lag_wk"):
                axis.plot(rows["value"], 100 * rows[f"{method} saves"], "o-", label=method)
            axis.set_xlabel(str(name))
            log_scale(axis, "x" if "alpha" in str(name) else "")
        axes[0].set_ylabel("uploads saved against GD, %")
        legend(figure)
        save(figure, folder / "heterogeneity")


Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]


def write_curves_csv(folder: Path) -> Path:
    """The curves of a folder (of a comparison: those that it reports), with the settings that differ."""
    source = next((f for f in (folder, folder / "report") if (f / "curves.parquet").exists()), None)
    if source is None:
        raise ValueError(f"{folder} has no curves: expected curves.parquet there")
    table, curves = (pl.read_parquet(source / f"{name}.parquet") for name in ("points", "curves"))
    differ = [name for name in (*setting_columns(table), "seed") if table[name].n_unique() > 1]
    with atomic_write(folder / "curves.csv") as part:
        table.select("point", *differ).join(curves, on="point", maintain_order="left_right").write_csv(part)
    return folder / "curves.csv"
