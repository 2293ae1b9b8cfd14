"""What the figures of `experiments.report` show: names, colors and axes as in `experiments.plots`, the numbers of the tables.

A figure is a dict that report.html draws: `views` (x and y: columns of `data`; titles, log axes; says: the columns that hover
shows) and `series` (name, color, dash, ..., `data`: a list a column); or `x`, `y` and `z` of a heat map.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from matplotlib.colors import to_hex

from experiments.figures import drawing
from experiments.harness.results import COST_COLUMNS, format_value, target_labels, thin_indices

Figure = dict[str, Any]
Shown = tuple[str, str, list[Figure]]  # heading, note, panels
Tables = Mapping[str, pl.DataFrame]
DASHES = {"-": "solid", "--": "dash", ":": "dot"}
MANY = 40  # settings whose curves are on the page
SOME = 12  # of them, those that are seen at first
FLOOR = 1e-12  # of a residual on a log axis


def of(kind: str, tables: Tables, points: int) -> Iterator[Shown]:
    """The figures of a folder: (heading, note, panels) each, with `points` points of curves at most."""
    if kind == "compare":
        yield from compared(tables, points)
    elif kind in ("sweep", "methods", "federated"):
        if kind == "sweep":
            yield from grids(tables["summary"])
        yield from curves(kind, tables, points)
        if kind == "sweep":
            yield from pareto(tables["summary"])
    else:
        others: dict[str, Callable[..., Iterator[Shown]]] = {
            "tune": tune,
            "heterogeneity": heterogeneity,
            "scaling": scaling,
        }
        yield from others[kind](tables)


def color(number: int) -> str:
    """Of the n-th thing, as in `plots.look`."""
    return to_hex(drawing.COLORS[number % 10])


def series(name: str, data: Mapping[str, list[Any]], number: int, mode: str = "lines", **more: Any) -> dict[str, Any]:
    """One of a figure; the n-th of its kind."""
    plain = {"color": color(number), "dash": "solid", "mode": mode, "width": 1.6, "size": 6, "legend": True}
    return {"name": name, "data": data} | plain | more


def view(name: str, x: str, y: str, says: Mapping[str, str], log: str = "xy", **more: Any) -> dict[str, Any]:
    """What an axis shows; its titles are what the columns are called."""
    titles = {"xtitle": says[x], "ytitle": says[y], "xlog": "x" in log, "ylog": "y" in log}
    return {"name": name, "x": x, "y": y, "says": dict(says)} | titles | more


def finite(values: pl.Series) -> list[Any]:
    """Numbers, and None for what is none."""
    return [None if v is None or not np.isfinite(v) else v for v in values.to_list()]


# ---- curves ----------------------------------------------------------------------------------------------------------


def measure(tables: Tables) -> str:
    """What the residual is."""
    return "f" if tables["points"]["f_star"].null_count() == len(tables["points"]) else "f - f*"


def ordered(tables: Tables) -> list[str]:
    """The names of the settings: as they stand where they are few; else the front first, then the cheapest, then the nearest."""
    summary, words = tables["summary"], drawing.point_labels(tables["points"], tables["summary"])
    if len(summary) <= SOME:
        return list(dict.fromkeys(words[point] for point in summary["point"]))
    target = target_labels(summary)[-1]
    parts = (
        drawing.pareto_front(summary, target),
        drawing.rank_by_bits(summary, target),
        summary.sort("final_loss", nulls_last=True),
    )
    return list(dict.fromkeys(words[point] for part in parts for point in part["point"]))


def styled(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A color and a dash a name; those behind the first are hidden until somebody wants them."""
    looks = [drawing.line_style(i) for i in range(len(names))]
    return {
        name: {"number": i, "dash": DASHES[look["linestyle"]], "hidden": i >= SOME}
        for i, (name, look) in enumerate(zip(names, looks, strict=True))
    }


def drawn(tables: Tables, styles: Mapping[str, dict[str, Any]], y: str, against: Mapping[str, str], each: int, prefix: str = "") -> list[dict[str, Any]]:  # fmt: skip
    """A line a point; the seeds of a setting are one entry of the legend."""
    words = drawing.point_labels(tables["points"], tables["summary"])
    table = tables["curves"].with_columns(name=pl.col("point").replace_strict(words, return_dtype=pl.String))
    table = table.filter(pl.col("name").is_in(list(styles)), pl.col(y).is_finite())
    found, first = [], set()
    lines = {key[0]: rows for key, rows in table.group_by(["point"], maintain_order=True)}
    for point in sorted(lines, key=lambda point: list(styles).index(words[point])):
        rows, name = lines[point], words[point]
        kept = rows[thin_indices(len(rows), each)]
        data = {column: finite(kept[column]) for column in (*against, y)}
        new = name not in first
        look: dict[str, Any] = {"legend": new, "width": 1.8 if new else 0.9, "group": prefix + name}
        look["mode"] = "lines" if len(kept) > 2 else "lines+markers"
        found.append(series(prefix + name, data, **styles[name] | look))
        first.add(name)
    return found


def share(tables: Tables, styles: Mapping[str, Any], points: int) -> tuple[int, str]:
    """Points of each curve, so that they are `points` in all; and what is to be said of it."""
    words = drawing.point_labels(tables["points"], tables["summary"])
    mine = tables["curves"].filter(pl.col("point").is_in([p for p, name in words.items() if name in styles]))
    lengths = mine.group_by("point").len()["len"]
    each = max(points // max(len(lengths), 1), 10)
    longest = int(lengths.max() or 0)  # pyright: ignore[reportArgumentType]
    thin = f"Curves are thinned from {longest:,} to about {each:,} points each." if longest > each else ""
    left = len(set(words.values())) - len(styles)
    few = f"{len(styles)} of {left + len(styles)} settings, the cheapest first." if left else ""
    hidden = (
        "Names in grey are hidden until they are clicked on."
        if any(look.get("hidden") for look in styles.values())
        else ""
    )
    return each, " ".join(filter(None, (few, hidden, thin)))


def curves(kind: str, tables: Tables, points: int) -> Iterator[Shown]:
    """Loss, and accuracy where there is one."""
    styles = styled(ordered(tables)[:MANY])
    against = drawing.FEDERATED_AXES if kind == "federated" else drawing.AXES
    each, note = share(tables, styles, points * 3 // 4)
    for y, title in (("residual", measure(tables)), ("accuracy", "test accuracy")):
        lines = drawn(tables, styles, y, against, each if y == "residual" else max(each // 3, 10))
        if not any(len(line["data"][y]) > 1 for line in lines):
            continue
        log, floor = ("xy", {"floor": FLOOR}) if y == "residual" else ("x", {})
        views = [view(label, x, y, {**against, y: title}, log, **floor) for x, label in against.items()]
        yield (
            f"{title} against what it costs",
            note,
            [{"views": views, "series": lines, "first": list(against).index("bits_up")}],
        )


def together(found: Mapping[str, tuple[str, Tables]], points: int) -> Iterator[Shown]:
    """The curves of several folders in one figure: a color a setting, a dash a folder."""
    names: dict[str, int] = {}
    lines, notes, titles = [], [], []
    for i, (folder, (kind, tables)) in enumerate(found.items()):
        few = methods_of(tables) if kind == "compare" else ordered(tables)
        few = few[: max(SOME // len(found), 3)]
        if kind == "compare":
            tables = named_by_method(tables)
        dash = ("solid", "dash", "dot", "dashdot", "longdash")[i % 5]
        styles = {name: {"number": names.setdefault(name, len(names)), "dash": dash} for name in few}
        each, note = share(tables, styles, points // len(found))
        lines += drawn(tables, styles, "residual", drawing.AXES, each, f"{folder}: ")
        notes.append(f"{folder}: {note}" if note else "")
        titles.append(measure(tables))
    if lines:
        title = titles[0] if len(set(titles)) == 1 else "f - f*, or f where f* is not known"
        says = {**drawing.AXES, "residual": title}
        views = [view(label, x, "residual", says, floor=FLOOR) for x, label in drawing.AXES.items()]
        note = " ".join(["A color a setting, a dash a folder.", *filter(None, notes)])
        yield f"{title} against what it costs", note, [{"views": views, "series": lines, "first": 2}]


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def grids(summary: pl.DataFrame) -> Iterator[Shown]:
    """Bits up to the last target over b and C, a panel a D."""
    found = drawing.heat_map_cells(summary, target_labels(summary)[-1])
    if found is None:
        return
    values, title, (d, b, c) = found
    least, most = float(np.nanmin(values)), float(np.nanmax(values))
    ends = {"least": float(np.log10(least)), "most": float(np.log10(max(most, 1.01 * least))), "best": least}
    panels = [
        {"title": f"D = {window}", "x": c, "y": b, **ends}
        | {"z": [[None if np.isnan(v) else float(v) for v in row] for row in grid]}
        for window, grid in zip(d, values, strict=True)
    ]
    yield title, "Bold: the cheapest. –: not reached on every seed.", panels


def pareto(summary: pl.DataFrame) -> Iterator[Shown]:
    """Rounds against bits up to the last target, a color an algorithm, and the front."""
    target, words = target_labels(summary)[-1], drawing.setting_labels(summary)
    best, x, y = drawing.rank_by_bits(summary, target), f"bits_up_{target}", f"rounds_{target}"
    if not len(best) or not best[x].sum() > 0:
        return

    def data(rows: pl.DataFrame) -> dict[str, list[Any]]:
        errors = {f"error_{axis}": finite(rows[f"{name}_ci95"]) for axis, name in (("x", x), ("y", y))}
        known = {axis: values for axis, values in errors.items() if any(values)}
        return {x: finite(rows[x]), y: finite(rows[y]), "text": [words[p] for p in rows["point"]], **known}

    groups = best.group_by(["algorithm"], maintain_order=True)
    lines = [series(str(name), data(rows), i, "markers") for i, ((name,), rows) in enumerate(groups)]
    edge = data(drawing.pareto_front(best, target))
    front = {"shape": "hv", "color": "#888888", "width": 1.2}
    lines.append(series("Pareto front", {x: edge[x], y: edge[y], "text": edge["text"]}, 0, **front))
    says = {x: f"bits up to {summary['goal'][0]} {target}", y: "rounds"}
    note = "A dot a setting that got there on every seed, with 95 % intervals over seeds where there are several."
    yield "Rounds against bits up", note, [{"views": [view("", x, y, says)], "series": lines, "height": 400}]


# ---- comparisons -----------------------------------------------------------------------------------------------------


def methods_of(tables: Tables) -> list[str]:
    """The methods of a comparison, the fewest bits up first."""
    summary = tables["summary"]
    rows = pl.concat(
        [drawing.rank_by_bits(summary, target_labels(summary)[-1]), summary.sort("final_loss", nulls_last=True)]
    )
    return rows["algorithm"].unique(maintain_order=True).to_list()


def named_by_method(tables: Tables) -> dict[str, pl.DataFrame]:
    """Of a comparison's report: the setting of each method that is cheapest at the last target, called as the method."""
    summary = tables["summary"]
    rows = pl.concat(
        [drawing.rank_by_bits(summary, target_labels(summary)[-1]), summary.sort("final_loss", nulls_last=True)]
    )
    best = rows.unique("algorithm", keep="first", maintain_order=True)
    words, mine = drawing.point_labels(tables["points"], summary), drawing.setting_labels(summary)
    kept = [point for point, word in words.items() if word in {mine[p] for p in best["point"]}]
    points = (
        tables["points"]
        .filter(pl.col("point").is_in(kept))
        .select("point", method="algorithm", seed="seed", f_star="f_star")
    )
    return {"points": points, "summary": points, "curves": tables["curves"].filter(pl.col("point").is_in(kept))}


def compared(tables: Tables, points: int) -> Iterator[Shown]:
    """Bits at each target, the fronts, and the curves of each method's cheapest setting; a color a kind."""
    best = tables["best"]
    kinds = best["kind"].unique(maintain_order=True).to_list()
    kind = dict(best.select("method", "kind").iter_rows())
    yield from costs(best.filter(pl.col("cheapest in") == "bits up").drop_nulls("bits_up"), kinds)
    yield from fronts(tables["tried"], best, kinds, kind)
    if "curves" in tables:
        mine, order = named_by_method(tables), methods_of(tables)
        styles = {
            name: {"number": kinds.index(kind[name])}
            for name in sorted(order, key=lambda name: kinds.index(kind[name]))
        }
        each, note = share(mine, styles, points)
        lines = drawn(mine, styles, "residual", drawing.AXES, each)
        title = measure(tables)
        views = [
            view(label, x, "residual", {**drawing.AXES, "residual": title}, floor=FLOOR)
            for x, label in drawing.AXES.items()
        ]
        note = f"The setting of each method with the fewest bits up to the last target, on the seeds that are reported. {note}"
        figure = {"views": views, "series": lines, "first": 2, "height": 620}
        yield f"{title} against what it costs", note, [figure]


def costs(best: pl.DataFrame, kinds: Sequence[str]) -> Iterator[Shown]:
    """Bits up at each target, method by method, and hollow what the step of theory costs."""
    if not len(best):
        return
    methods = drawing.methods_by_cost(best)
    lines, views = [], []
    for number, target in enumerate(best["target"].unique(maintain_order=True)):
        says = {"bits_up": f"bits up to {best['goal'][0]} {target}", "method": "method", "setting": "setting"}
        views.append(view(f"{best['goal'][0]} {target}", "bits_up", "method", says, "x", order=methods, ytitle=""))
        for (name,), rows in best.filter(pl.col("target") == target).group_by(["kind"], maintain_order=True):
            data = {n: rows[n].to_list() for n in ("bits_up", "method", "setting")} | {
                "error_x": finite(rows["bits_up_ci95"])
            }
            lines.append(series(str(name), data, kinds.index(str(name)), "markers", view=number))
            theory = rows.drop_nulls("bits_up of theory")
            data = {"bits_up": theory["bits_up of theory"].to_list(), "method": theory["method"].to_list()}
            hollow = {"symbol": "circle-open", "legend": False, "group": str(name), "view": number, "size": 8}
            if len(theory):
                lines.append(series(f"{name}, step of theory", data, kinds.index(str(name)), "markers", **hollow))
    note = "Mean and 95 % interval over the seeds that are reported."
    note += " Hollow: the step of theory." if best["bits_up of theory"].count() else ""
    figure = {"views": views, "series": lines, "first": len(views) - 1, "height": 140 + 19 * len(methods)}
    yield "Bits up at each target", note, [figure]


def fronts(tried: pl.DataFrame, best: pl.DataFrame, kinds: Sequence[str], kind: Mapping[str, str]) -> Iterator[Shown]:
    """Rounds against bits up: the front of each method, a color a kind."""
    words, goal, lines, views = drawing.setting_labels(tried), tried["goal"][0], [], []
    for target in best["target"].unique(maintain_order=True):
        reached, x, y = tried.drop_nulls(f"bits_up_{target}"), f"bits_up_{target}", f"rounds_{target}"
        if not len(reached):
            continue
        edges = {
            str(n): drawing.pareto_front(rows, target)
            for (n,), rows in reached.group_by(["algorithm"], maintain_order=True)
        }
        for name in sorted((n for n in edges if n in kind), key=lambda name: kinds.index(kind[name])):
            edge = edges[name]
            data = {x: edge[x].to_list(), y: edge[y].to_list(), "text": [words[p] for p in edge["point"]]}
            more = {"group": kind[name], "heading": True, "view": len(views), "width": 1, "size": 5}
            lines.append(series(name, data, kinds.index(kind[name]), "lines+markers", **more))
        views.append(view(f"{goal} {target}", x, y, {x: f"bits up to {goal} {target}", y: "rounds"}))
    if views:
        note = "The settings of each method that no other of its settings beats in both, on the seeds of the search."
        yield "Fronts", note, [{"views": views, "series": lines, "first": len(views) - 1, "height": 620}]


# ---- the others ------------------------------------------------------------------------------------------------------


def tune(tables: Tables) -> Iterator[Shown]:
    """Bits up over the trials."""
    trials = tables["trials"]
    bits = trials["bits_up"].fill_null(np.nan).to_numpy()
    if np.isnan(bits).all():
        return
    knobs = [n for n in trials.columns if n not in ("trial", "goal", "target", "reached", "diverged", *COST_COLUMNS)]
    words = [", ".join(f"{n} = {format_value(row[n])}" for n in knobs) for row in trials.iter_rows(named=True)]
    data = {"trial": trials["trial"].to_list(), "bits_up": finite(trials["bits_up"]), "text": words}
    fewest = {"trial": data["trial"], "bits_up": finite(pl.Series(np.fmin.accumulate(bits)))}
    lines = [series("reached on every seed", data, 0, "markers"), series("fewest so far", fewest, 3, shape="hv")]
    says = {"trial": "trial", "bits_up": f"bits up to {trials['goal'][0]} {trials['target'][0]:g}"}
    yield "Bits up over the trials", "", [{"views": [view("", "trial", "bits_up", says, "y")], "series": lines}]


def heterogeneity(tables: Tables) -> Iterator[Shown]:
    """The share of GD's uploads that is saved."""
    lines, views = [], []
    for number, ((axis,), rows) in enumerate(tables["heterogeneity"].group_by(["axis"], maintain_order=True)):
        says = {"value": str(axis), "saves": "uploads saved against GD, share"}
        views.append(view(str(axis), "value", "saves", says, "x" if "alpha" in str(axis) else ""))
        for i, method in enumerate(("laq", "lag_wk")):
            data = {"value": rows["value"].to_list(), "saves": finite(rows[f"{method} saves"])}
            lines.append(series(method, data, i, "lines+markers", view=number))
    yield "Uploads that the lazy rules save", "", [{"views": views, "series": lines}]


def scaling(tables: Tables) -> Iterator[Shown]:
    """Seconds of a round over workers, parameters and rounds."""
    lines, views = [], []
    for axis, label in (("M", "M, workers"), ("p", "p, parameters"), ("rounds", "rounds")):
        says = {axis: label, "seconds": "seconds of a run" if axis == "rounds" else "seconds of a round"}
        cost = tables["cost"].filter(pl.col("axis") == axis)
        for i, ((devices,), rows) in enumerate(cost.group_by(["devices"], maintain_order=True)):
            data = {axis: rows[axis].to_list(), "seconds": finite(rows["seconds"])}
            lines.append(series(f"{devices} device(s)", data, i, "lines+markers", view=len(views)))
        views.append(view(label, axis, "seconds", says))
    yield "Seconds of a round", "", [{"views": views, "series": lines}]
