"""Figures of every kind of result folder: one definition each, from the tables alone, for files and for the report."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from experiments.figures import scaling_figures, style
from experiments.figures.ranking import (
    heat_map_cells,
    methods_by_cost,
    pareto_front,
    point_labels,
    rank_all,
    rank_by_bits,
    select_settings,
    setting_labels,
)
from experiments.figures.style import Axis, Figure, Looks
from experiments.harness import results, storage
from experiments.harness.results import target_labels, thin_indices, unpack_mask

COST_AXES = {"round": "rounds", "uploads": "uploads", "bits_up": "bits up", "bits": "bits up + down"}
FEDERATED_AXES = {
    "uploads": "uploads",
    "bits_up": "bits up, billed",
    "bytes_up": "bytes up, observed",
    "seconds": "seconds",
}
# the tables of each kind of folder; without the first there is nothing to draw
TABLES = {
    "sweep": ("summary", "points", "curves", "masks"),
    "methods": ("summary", "points", "curves", "masks", "table"),
    "federated": ("summary", "points", "curves", "masks"),
    "heterogeneity": ("heterogeneity",),
    "compare": ("best", "tried", "report/summary", "report/points", "report/curves"),
    "tune": ("trials",),
    "scaling": ("cost", "goals", "bytes", "memory", "model"),
}
FLOOR = 1e-12  # the least residual on a log axis
ROWS = 6000  # of the curves of one figure
DOTS = 1500  # of these, the rows that answer to the pointer
CELLS = 6000  # of the upload rasters of one figure
RASTERS = 12
SETTINGS = 4000  # of a figure with a dot for each

Tables = Mapping[str, pl.DataFrame]


def read_tables(folder: Path) -> tuple[str, dict[str, pl.DataFrame]]:
    """Return the kind of a result folder and those of its tables that are there.

    Raises:
        ValueError: The folder holds no results, or a table is damaged.
    """
    kind = storage.read_identity(folder).get("experiment") if (folder / "identity.json").exists() else None
    kind = "scaling" if kind is None and (folder / "cost.parquet").exists() else kind
    if kind not in TABLES:
        raise ValueError(
            f"{folder}: must be a folder that an experiment wrote, with its identity.json; give another one"
        )
    tables = {}
    for name in TABLES[kind]:
        if (path := folder / f"{name}.parquet").exists():
            try:
                tables[name.removeprefix("report/")] = pl.read_parquet(path)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise ValueError(f"{path} is damaged ({error}); run its command again") from None
    return kind, tables


def draw_figures(folder: Path, pdf: bool = False) -> None:
    """Write all figures of a result folder beside its tables."""
    kind, tables = read_tables(folder)
    lacking = [name for name in TABLES[kind] if name.split("/")[-1] not in {*tables, "masks", "table"}]
    if lacking and kind != "scaling":
        path = folder / f"{lacking[0]}.parquet"
        raise FileNotFoundError(f"{path} is missing: must be the folder of a finished command; run it to its end")
    for name, figure in build_figures(kind, tables):
        style.save(figure, folder / name, pdf)


def build_figures(kind: str, tables: Tables) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of a folder with the names of their files."""
    builders: dict[str, Callable[[Tables], Iterator[tuple[str, Figure]]]] = {
        "compare": comparison_figures,
        "tune": tune_figures,
        "heterogeneity": heterogeneity_figures,
        "scaling": scaling_figures.scaling_figures,
    }
    yield from builders[kind](tables) if kind in builders else curve_figures(kind, tables)


# ---- curves ----------------------------------------------------------------------------------------------------------


def residual_title(points: pl.DataFrame) -> str:
    """Return what the residual of a folder is."""
    return "training loss f" if points["f_star"].null_count() == len(points) else "f - f*"


def thin_curves(curves: pl.DataFrame, names: Mapping[int, str], column: str, share: int = 1) -> pl.DataFrame:
    """Return the rows of the points in `names` for `build_line_panel`, thinned; the first seed of a setting has the widest line."""
    known = curves.filter(pl.col("point").is_in(list(names)), pl.col(column).is_finite(), pl.col("round") > 0)
    groups = known.partition_by("point", as_dict=True)
    parts, seen = [], set()
    for point, name in names.items():
        if (point,) in groups:
            rows = groups[point,]
            rows = rows[thin_indices(len(rows), max(ROWS // share // len(groups), 10))]
            dots = np.isin(np.arange(len(rows)), thin_indices(len(rows), max(DOTS // share // len(groups), 6)))
            looks: Any = {"width": pl.lit(0.8 if name in seen else 1.6), "mark": pl.lit(len(rows) < 3)}
            parts.append(rows.with_columns(name=pl.lit(name), line="point", dot=pl.Series(dots), **looks))
            seen.add(name)
    rows = pl.concat(parts) if parts else known.head(0)
    return rows.with_columns(pl.col(column).clip(FLOOR)) if column == "residual" else rows


def build_curves(rows: pl.DataFrame, column: str, title: str, looks: Looks, against: Mapping[str, str]) -> Any | None:
    """Return a measure against each cost, a panel each; None where there is nothing to draw."""
    costs = {name: cost for name, cost in against.items() if (rows[name] > 0).any()}
    if not costs:
        return None
    y = Axis(column, title, column == "residual").fit(rows[column])
    looks = {name: look for name, look in looks.items() if name in set(rows["name"])}
    panels = [style.build_line_panel(rows, Axis(*cost), y, looks, costs) for cost in costs.items()]
    return style.concat_panels(panels, len(panels))


def measure_figures(kind: str, tables: Tables, names: Mapping[int, str], looks: Looks) -> Iterator[tuple[str, Figure]]:
    """Yield the loss, and the test accuracy where it is known, against the costs; the measure of the goal first."""
    measures = [("residual", residual_title(tables["points"]), "loss"), ("accuracy", "test accuracy", "accuracy")]
    if "accuracy" in tables["points"]["goal"][0]:
        measures.reverse()
    against = FEDERATED_AXES if kind == "federated" else COST_AXES
    for number, (column, title, name) in enumerate(measures):
        rows = thin_curves(tables["curves"], names, column)
        longest, known = (count_longest(part, column, names) for part in (rows, tables["curves"]))
        chart = build_curves(rows, column, title, looks, against)
        if chart is None or (column == "accuracy" and number and longest == 1):
            continue
        every, drawn = (len(set(n.values())) for n in (point_labels(tables["points"], tables["summary"]), names))
        parts = [
            f"{drawn} of {every} settings: the front, the cheapest, and the best of each algorithm." * (drawn < every),
            "Thin lines are the other seeds of a setting." * (len(names) > drawn),
            f"At most {longest} points of a curve are drawn." * (longest < known),
        ]
        note = " ".join(filter(None, parts))
        yield ("front" if kind == "sweep" and not number else name), Figure(f"{title} against its costs", chart, note)


def count_longest(curves: pl.DataFrame, column: str, names: Mapping[int, str]) -> int:
    """Return the number of rows of the longest curve that a figure could show."""
    rows = curves.filter(pl.col(column).is_finite(), pl.col("round") > 0, pl.col("point").is_in(list(names)))
    return max(rows.group_by("point").len()["len"], default=0)


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def choose_settings(kind: str, tables: Tables) -> tuple[dict[int, str], dict[str, style.Look]]:
    """Return the names of the points whose curves are drawn, and the looks of the names: a color for each method.

    Where all settings are of one method, each has a color of its own.
    """
    points, summary = tables["points"], tables["summary"]
    every = point_labels(points, summary)
    shown = select_settings(summary) if kind == "sweep" else points
    group = dict(points.select("point", "method" if "method" in points.columns else "algorithm").iter_rows())
    single = len(set(group.values())) == 1
    rows = sorted(shown["point"], key=lambda point: list(group.values()).index(group[point]))
    looks = style.assign_looks({every[point]: every[point] if single else group[point] for point in rows})
    order = list(dict.fromkeys(every[point] for point in shown["point"]))
    return {p: name for name in order for p in every if every[p] == name}, {name: looks[name] for name in order}


def curve_figures(kind: str, tables: Tables) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of `experiments.sweep`, `reproduce` and `federated`."""
    points = tables["points"]
    tables = {"summary": points, **tables}
    summary, target = tables["summary"], target_labels(tables["summary"])[-1]
    best = rank_by_bits(summary, target).filter(pl.col(f"bits_up_{target}") > 0) if kind == "sweep" else summary[:0]
    if kind == "sweep" and (cells := heat_map_cells(summary, target)) is not None:
        yield "bits-to-target", build_heat_map(cells, summary, target)
    names, looks = choose_settings(kind, tables)
    yield from measure_figures(kind, tables, names, looks)
    if len(best):
        yield "pareto", build_pareto(best, setting_labels(summary), target, looks)
    masks: dict[str, np.ndarray] = {}
    for row in tables["masks"].iter_rows(named=True) if "masks" in tables else ():
        sent = unpack_mask(row)
        if row["point"] in best["point"][:1] if kind == "sweep" else sent.any() and not sent.all():
            masks.setdefault(names[row["point"]], sent)
    if masks := dict(list(masks.items())[:RASTERS]):
        yield "uploads", build_raster(masks, {name: looks[name][0] for name in masks})
    others = [name for name in results.setting_columns(points) if name != "method" and points[name].n_unique() > 1]
    if kind == "methods" and others:
        methods = dict(points.select("point", "method").iter_rows())
        where = points.select("point", panel=pl.concat_str(others, separator=", "))
        rows = thin_curves(tables["curves"], methods, "residual").filter(pl.col("uploads") > 0)
        rows = rows.join(where, on="point", maintain_order="left")
        y = Axis("residual", residual_title(points)).fit(rows["residual"])
        colors = style.assign_looks({name: name for name in methods.values()})
        panels = [
            style.build_line_panel(part, Axis("uploads", "uploads"), y, colors, COST_AXES).properties(title=name)
            for (name,), part in rows.group_by(["panel"], maintain_order=True)
        ]
        yield "panels", Figure(f"{y.title} against uploads", style.concat_panels(panels, 4))


def build_heat_map(cells: pl.DataFrame, summary: pl.DataFrame, target: str) -> Figure:
    """Return Mbit up to the target over b and C, a panel for each D."""
    positive = cells["mbit"].filter(cells["mbit"] > 0)
    low, high = float(positive.min()), max(float(positive.max()), 1.01 * float(positive.min()))  # pyright: ignore[reportArgumentType]
    place = (pl.col("mbit").clip(low).log() - np.log(low)) / np.log(high / low)
    cells = cells.with_columns(
        text=pl.Series("–" if v is None else f"{v:.3g}" for v in cells["mbit"]),
        dark=place > 0.6,
        best=pl.col("mbit") == cells["mbit"].min(),
        shown=pl.col("mbit") > 0,
    )
    scale = alt.Scale(type="log", domain=[low, high], scheme="viridis", reverse=True)
    bar = alt.Legend(title="Mbit up", format=".3~g", tickCount=8, gradientThickness=14)
    panels = []
    for (window,), part in cells.group_by(["D"], maintain_order=True):
        base = alt.Chart(part).encode(
            alt.X("C:O", title="C, rounds of silence", axis=alt.Axis(labelAngle=0)), alt.Y("b:O", title="b, bits a coordinate"),
            tooltip=style.tooltips({"D": "D", "b": "b", "C": "C", "mbit": "Mbit up"}, part),
        )  # fmt: skip
        color = alt.condition("datum.shown", alt.Color("mbit:Q", scale=scale, legend=bar), alt.value("#f0f0f0"))
        text = base.encode(text="text:N", color=alt.condition("datum.dark", alt.value("white"), alt.value("black")))
        layers = [base.mark_rect(stroke="white").encode(color=color)]
        layers += [
            text.transform_filter("!datum.best").mark_text(),
            text.transform_filter("datum.best").mark_text(fontWeight="bold", fontSize=12),
        ]
        size = {"width": max(52 * part["C"].n_unique(), 120), "height": max(30 * part["b"].n_unique(), 120)}
        panels.append(alt.layer(*layers).properties(title=f"D = {window}", **size))
    others = ", the cheapest of all other axes" * (len(summary) > len(cells))
    title = f"Mbit up to {summary['goal'][0]} {target}{others}"
    return Figure(title, style.concat_panels(panels, 4), "Bold: the cheapest. –: not reached on every seed.")


def build_pareto(best: pl.DataFrame, words: Mapping[int, str], target: str, looks: Looks) -> Figure:
    """Return rounds against bits up of all settings that reached the target, and the front with its settings."""
    rows = best[:SETTINGS].select(
        "point", "algorithm", bits=f"bits_up_{target}", rounds=f"rounds_{target}",
        ci=pl.col(f"bits_up_{target}_ci95").fill_null(0), rounds_ci=pl.col(f"rounds_{target}_ci95").fill_null(0),
    )  # fmt: skip
    x, rows = fit_intervals(rows, f"bits up to {best['goal'][0]} {target}")
    rows = rows.with_columns(
        down=pl.col("rounds") - pl.col("rounds_ci"), up=pl.col("rounds") + pl.col("rounds_ci"),
        setting=pl.col("point").replace_strict(words, return_dtype=pl.String),
    )  # fmt: skip
    y = Axis("rounds", "rounds", log=False).fit(rows["up"], rows["down"])
    ranked = rank_all(best).select("point", "algorithm").iter_rows()
    algorithms = {name: looks[words[p]][0] for p, name in ranked if words[p] in looks}
    colors = list(algorithms.values()) if len(algorithms) > 1 else [style.GREY]
    color = alt.Color(
        "algorithm:N", scale=alt.Scale(domain=list(algorithms), range=colors), legend=style.build_legend("algorithm", symbolType="circle")
    )  # fmt: skip
    tips = {"setting": "setting", "bits": x.title, "ci": "±", "rounds": "rounds", "rounds_ci": "± "}
    plane = alt.Chart().encode(x.channel(alt.X), y.channel(alt.Y), tooltip=style.tooltips(tips, rows))
    base = plane.properties(data=rows)
    layers: list[Any] = [base.mark_circle(size=30, clip=True).encode(color=color)]
    if (rows["ci"] > 0).any():
        layers.append(base.mark_rule(opacity=0.5, clip=True).encode(x="left:Q", x2="right:Q", color=color))
        layers.append(base.mark_rule(opacity=0.5, clip=True).encode(y="down:Q", y2="up:Q", color=color))
    edge = pareto_front(best, target)["point"].to_list()
    if len(edge) > 1:
        front = plane.properties(data=rows.filter(pl.col("point").is_in(edge)))
        layers.append(front.mark_line(interpolate="step-after", color=style.GREY, strokeWidth=1))
    named = [p for p in edge if words[p] in looks][: len(style.SHAPES)]
    labels = {p: style.wrap_label(words[p]) for p in named}
    marks = rows.filter(pl.col("point").is_in(named)).with_columns(
        front=pl.col("point").replace_strict(labels, return_dtype=pl.String)
    )
    box, domain = style.build_legend("Pareto front"), list(labels.values())
    shapes = alt.Scale(domain=domain, range=list(style.SHAPES[: len(named)]))
    front_colors = alt.Scale(domain=domain, range=[looks[words[p]][0] for p in named])
    marked = plane.properties(data=marks).mark_point(size=110, strokeWidth=2, filled=False).encode(
        color=alt.Color("front:N", scale=front_colors, legend=box), shape=alt.Shape("front:N", scale=shapes, legend=box)
    )  # fmt: skip
    chart = alt.layer(alt.layer(*layers), marked).resolve_scale(color="independent", shape="independent")
    note = "A dot is a setting that reached the target on every seed, with 95 % intervals over seeds where there are several."
    return Figure(f"Rounds against {x.title}", chart.properties(width=480, height=300), note)


def fit_intervals(rows: pl.DataFrame, title: str) -> tuple[Axis, pl.DataFrame]:
    """Return a log axis for bits ± ci, and the rows with the ends; those below a third of the value end at its edge."""
    left, right = rows["bits"] - rows["ci"], rows["bits"] + rows["ci"]
    x = Axis("bits", title).fit(rows["bits"], left.filter(left > rows["bits"] / 3), right)
    return x, rows.with_columns(left=left.clip(x.limits[0] if x.limits else None), right=right)


def build_raster(masks: Mapping[str, np.ndarray], colors: Mapping[str, str]) -> Figure:
    """Return the rounds in which each worker uploaded, a panel for each method; masks [rounds, workers]."""
    cells = CELLS // len(masks)
    panels, widest = [], 1
    for name, sent in masks.items():
        rounds, workers = sent.shape
        width = -(-rounds // max(min(cells // workers, 400), 20))
        widest = max(widest, width)
        thin = min(0.5, max(0.3, rounds / 400)) if rounds > 60 else 0.05 + rounds / 240
        counts = np.add.reduceat(sent.astype(int), np.arange(0, rounds, width), axis=0)
        bins, who = np.nonzero(counts)
        rows = pl.DataFrame({"round": bins * width, "worker": who, "uploads": counts[bins, who]}).with_columns(
            left=pl.col("round") - thin, right=pl.min_horizontal(pl.col("round") + width, pl.lit(rounds)) - 1 + thin,
            top=pl.col("worker") - 0.4, bottom=pl.col("worker") + 0.4, share=pl.col("uploads") / width,
        )  # fmt: skip
        x = Axis("left", f"round, in groups of {width}" if width > 1 else "round", False, (-0.5, rounds - 0.5))
        y = Axis("top", "worker", False, (-0.5, workers - 0.5), reverse=True)
        opacity = alt.Opacity("share:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None)
        chart = alt.Chart(rows).mark_rect(color=colors[name], clip=True).encode(
            x.channel(alt.X, tickMinStep=1), y.channel(alt.Y, tickMinStep=1), x2="right:Q", y2="bottom:Q", opacity=opacity,
            tooltip=style.tooltips({"worker": "worker", "round": "round", "uploads": "uploads"}, rows),
        )  # fmt: skip
        title = style.textwrap.wrap(f"{name}: {int(sent.sum()):,} uploads", 90)
        panels.append(alt.layer(chart, title=title).properties(width=620, height=min(max(11 * workers, 60), 160)))
    note = "The darker a mark, the more of its rounds have an upload." * (widest > 1)
    return Figure("Uploads of each worker", style.concat_panels(panels, 1), note)


# ---- compare -----------------------------------------------------------------------------------------------------------


def comparison_figures(tables: Tables) -> Iterator[tuple[str, Figure]]:
    """Yield the figures of `experiments.compare`; a method has one color among those of its kind in all of them."""
    best, tried = tables["best"], tables["tried"]
    members = best.group_by(["kind"], maintain_order=True)
    looks = {kind: style.assign_looks({name: name for name in rows["method"]}) for (kind,), rows in members}
    rows = best.filter(pl.col("cheapest in") == "bits up")
    if (rows["bits_up"].fill_null(0) > 0).any():
        yield "bits", build_costs(rows, looks)
    for target in best["target"].unique(maintain_order=True):
        if (figure := build_fronts(tried, target, looks)) is not None:
            yield f"fronts-{target}", figure
    lines = thin_curves(tables["curves"], method_points(tables), "residual")
    if len(lines):
        y = Axis("residual", residual_title(tables["points"])).fit(lines["residual"])
        panels = [
            style.build_line_panel(part, Axis(x, COST_AXES[x]).fit(lines[x]), y, mine, COST_AXES, legend_title=kind)
            for kind, members in looks.items()
            if (mine := {name: look for name, look in members.items() if name in set(lines["name"])})
            for part in [lines.filter(pl.col("name").is_in(list(mine)))]
            for x in ("round", "bits_up")
        ]
        note = "The settings with the fewest bits up to the last target, on the seeds that are reported."
        chart = style.concat_panels(panels, 2, ("color", "strokeDash"))
        yield "loss", Figure(f"{y.title} against its costs, by kind of method", chart, note)


def method_points(tables: Tables) -> dict[int, str]:
    """Return the points of each method's setting with the fewest bits up to the last target, the cheapest method first."""
    ranked = rank_all(tables["summary"]).unique("algorithm", keep="first", maintain_order=True)
    words, every = setting_labels(tables["summary"]), point_labels(tables["points"], tables["summary"])
    method = {words[point]: name for point, name in ranked.select("point", "algorithm").iter_rows()}
    points = {point: method[word] for point, word in every.items() if word in method}
    order = list(method.values())
    return dict(sorted(points.items(), key=lambda item: order.index(item[1])))


def build_costs(best: pl.DataFrame, looks: Mapping[str, Looks]) -> Figure:
    """Return bits up at each target for each method, with 95 % intervals; hollow: the step of theory."""
    order, missed = methods_by_cost(best), set(best["method"]) - set(best.drop_nulls("bits_up")["method"])
    kinds, theory = dict(best.select("method", "kind").iter_rows()), "bits_up of theory"
    labels = {name: f"{name} ({kinds[name]}{', not reached' * (name in missed)})" for name in order}
    colors = {name: looks[kinds[name]][name][0] for name in order}
    rows = best.filter(pl.col("bits_up") > 0).with_columns(
        pl.col("method").replace_strict(labels, return_dtype=pl.String).alias("label"),
        pl.col("method").replace_strict(colors, return_dtype=pl.String).alias("color"),
        pl.col("bits_up_ci95").fill_null(0).alias("ci"), bits="bits_up", what=pl.lit("mean"),
    )  # fmt: skip
    first = rows.filter(pl.col(theory) > 0).with_columns(bits=theory, what=pl.lit("step of theory"), ci=pl.lit(0.0))
    rows = pl.concat([rows, first])
    goal, panels = f"bits up to {best['goal'][0]}", []
    shapes = alt.Scale(domain=rows["what"].unique(maintain_order=True).to_list(), range=["circle", "diamond"])
    for (target,), part in rows.group_by(["target"], maintain_order=True):
        x, part = fit_intervals(part.select("label", "color", "what", "setting", "bits", "ci"), f"{goal} {target}")
        y = alt.Y("label:N", title=None, scale=alt.Scale(domain=list(labels.values())), axis=alt.Axis(grid=True))
        tips = style.tooltips({"label": "method", "what": "", "setting": "setting", "bits": x.title, "ci": "±"}, part)
        base = alt.Chart(part).encode(y=y, color=alt.Color("color:N", scale=None), tooltip=tips)
        shape = alt.Shape("what:N", scale=shapes, legend=alt.Legend(title=None, symbolFillColor="transparent"))
        dots, span = base.encode(x.channel(alt.X), shape=shape), x._replace(column="left").channel(alt.X)
        layers = [
            dots.transform_filter("datum.what == 'mean'").mark_point(filled=True, size=40, opacity=1),
            dots.transform_filter("datum.what != 'mean'").mark_point(size=60, opacity=1),
            base.transform_filter("datum.ci > 0").mark_rule().encode(span, x2="right:Q"),
        ]
        panels.append(alt.layer(*layers).properties(width=260, height=17 * len(order)))
    note = "Mean and 95 % interval over the seeds that are reported, the cheapest at the last target first."
    return Figure(f"{goal[0].upper()}{goal[1:]} ..., by method", style.concat_panels(panels, 3), note)


def build_fronts(tried: pl.DataFrame, target: str, looks: Mapping[str, Looks]) -> Figure | None:
    """Return rounds against bits up of each method's front, a panel for each kind, with all other fronts in grey."""
    reached = tried.filter(pl.col(f"bits_up_{target}") > 0)
    if reached.is_empty():
        return None
    groups = reached.partition_by("algorithm")
    rows = pl.concat(pareto_front(group, target) for group in groups).select(
        "point", bits=f"bits_up_{target}", rounds=f"rounds_{target}", name="algorithm", line="algorithm",
        setting=pl.col("point").replace_strict(setting_labels(tried), return_dtype=pl.String), mark=pl.lit(True),
    )  # fmt: skip
    x = Axis("bits", f"bits up to {tried['goal'][0]} {target}").fit(rows["bits"])
    y = Axis("rounds", "rounds").fit(rows["rounds"])
    panels = []
    for kind, members in looks.items():
        mine = {name: look for name, look in members.items() if name in set(rows["name"])}
        if mine:
            is_mine = pl.col("name").is_in(list(mine))
            grey = alt.Chart(rows.filter(~is_mine)).encode(x.channel(alt.X), y.channel(alt.Y), detail="line:N")
            grey = grey.mark_line(color="#dddddd", strokeWidth=1, point={"color": "#dddddd", "size": 12})
            own = style.build_line_panel(rows.filter(is_mine), x, y, mine, {"setting": "setting"}, (240, 200), kind)
            panels.append(alt.layer(grey, own).properties(width=240, height=200))
    note = (
        "The settings that no other of their method beats in both, on the seeds of the search. Grey: the other kinds."
    )
    chart = style.concat_panels(panels, 2, ("color", "strokeDash"))
    return Figure(f"Fronts at {tried['goal'][0]} {target}", chart, note)


# ---- tune, heterogeneity -----------------------------------------------------------------------------------------------


def tune_figures(tables: Tables) -> Iterator[tuple[str, Figure]]:
    """Yield bits up over the trials of `experiments.tune`."""
    trials = tables["trials"].filter(pl.col("bits_up").fill_null(0) > 0)
    if not len(trials):
        return
    known = {"trial", "goal", "target", "reached", "diverged", *results.COST_COLUMNS} - {"bits"}
    settings = [name for name in trials.columns if name not in known]
    values = [{n: row[n] for n in settings if row[n] is not None} for row in trials.iter_rows(named=True)]
    words = [results.format_setting(row, " = ") for row in values]
    last, first = int(tables["trials"]["trial"][-1]), tables["trials"]["bits_up"][0]
    dots = trials.select("trial", "bits_up", name=pl.lit("reached on every seed"), setting=pl.Series(words))
    fewest = dots.with_columns(pl.col("bits_up").cum_min(), name=pl.lit("fewest so far"))
    x = Axis("trial", "trial", False, (-0.5, max(last, 1) + 0.5))
    level = pl.DataFrame({"trial": x.limits, "bits_up": first, "name": "the first trial"})
    parts = [dots, *[fewest, fewest[-1:].with_columns(trial=last)] * (len(dots) > 1), *[level] * bool(first)]
    rows = pl.concat(parts, how="diagonal_relaxed").with_columns(line="name", mark=pl.col("name") == dots["name"][0])
    looks = {"reached on every seed": (style.COLORS[0], [1, 0]), "fewest so far": (style.COLORS[3], [1, 0])}
    looks |= {"the first trial": ("#222222", [6, 3])}
    looks = {name: look for name, look in looks.items() if name in set(rows["name"])}
    y = Axis("bits_up", f"bits up to {trials['goal'][0]} {trials['target'][0]:g}").fit(rows["bits_up"])
    look: Any = {"dotted": True, "interpolate": "step-after"}
    panel = style.build_line_panel(rows, x, y, looks, {"setting": "setting"}, (460, 260), **look)
    yield "trials", Figure("Bits up over the trials", panel)


def heterogeneity_figures(tables: Tables) -> Iterator[tuple[str, Figure]]:
    """Yield the share of GD's uploads that is saved, over the spread of L_m and over Dirichlet alpha."""
    table, names = tables["heterogeneity"], ["laq saves", "lag_wk saves"]
    rows = table.unpivot(names, index=["axis", "value"], variable_name="name", value_name="saves")
    name = pl.col("name").str.strip_suffix(" saves")
    rows = rows.filter(pl.col("saves").is_finite()).with_columns(
        name, pl.col("saves") * 100, line=name, mark=pl.lit(True)
    )
    y = Axis("saves", "uploads saved against GD, %", False).fit(rows["saves"])
    looks = style.assign_looks({name: name for name in rows["name"]})
    panels = [
        style.build_line_panel(part, Axis("value", str(axis), "alpha" in str(axis)), y, looks, {}, (280, 220))
        for (axis,), part in rows.group_by(["axis"], maintain_order=True)
    ]
    if panels:
        yield "heterogeneity", Figure("Uploads that the lazy rules save", style.concat_panels(panels, 2))


def write_curves_csv(folder: Path) -> Path:
    """Write curves.csv: the curves of a folder (of a comparison: those that it reports), with the settings that differ."""
    source = next((f for f in (folder, folder / "report") if (f / "curves.parquet").exists()), None)
    if source is None:
        raise ValueError(f"{folder} has no curves: expected curves.parquet there")
    table, curves = (pl.read_parquet(source / f"{name}.parquet") for name in ("points", "curves"))
    differ = [name for name in (*results.setting_columns(table), "seed") if table[name].n_unique() > 1]
    with storage.atomic_write(folder / "curves.csv") as part:
        table.select("point", *differ).join(curves, on="point", maintain_order="left_right").write_csv(part)
    return folder / "curves.csv"
