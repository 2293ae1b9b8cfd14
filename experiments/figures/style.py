"""Axes, colors, legends and files of all figures: Altair specifications, drawn by vl-convert without a network."""

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import polars as pl
import polars.selectors as cs
import vl_convert

from experiments.harness.storage import atomic_write

alt.data_transformers.disable_max_rows()

COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f",
          "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#9edae5", "#dbdb8d")  # fmt: skip
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [12, 4], [4, 1], [1, 4], [10, 2, 2, 2, 2, 2])
SHAPES = ("square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-left", "triangle-right", "circle")
GREY = "#8a8a8a"
CONFIG = {
    "aria": False,
    "font": "sans-serif",
    "view": {"stroke": None, "discreteWidth": {"step": 60}},
    "axis": {"gridOpacity": 0.5, "domainColor": "#888", "tickColor": "#888", "titleFontWeight": "normal"}
    | {"titleFontSize": 12, "labelFontSize": 11, "labelLimit": 0, "titleLimit": 0, "labelSeparation": 6},
    "legend": {"labelFontSize": 11, "labelLimit": 0, "titleLimit": 0, "symbolLimit": 0, "symbolStrokeWidth": 2}
    | {"titleFontWeight": "normal", "rowPadding": 4, "gradientLength": 140},
    "title": {"anchor": "start", "fontSize": 12, "fontWeight": "normal", "offset": 8}
    | {"subtitleFontSize": 11, "subtitleColor": "#555"},
    "concat": {"spacing": 25},
}
WRAPPED = r"split(datum.label, '\n')"
Look = tuple[str, list[int]]  # color and dash
Looks = Mapping[str, Look]


class Figure(NamedTuple):
    """Chart with its title and a note, which files show below the title and the report above the chart."""

    title: str
    chart: Any
    note: str = ""


def assign_looks(groups: Mapping[str, str]) -> dict[str, Look]:
    """Return a color for each group of names, and a dash for each name that no other name of its color has."""
    order, used, looks = list(dict.fromkeys(groups.values())), set(), {}
    for name, group in groups.items():
        color = COLORS[order.index(group) % len(COLORS)]
        dash = next((i for i in range(len(DASHES)) if (color, i) not in used), 0)
        used.add((color, dash))
        looks[name] = color, DASHES[dash]
    return looks


def wrap_label(name: str) -> str:
    """Return a legend label in lines of at most 40 characters."""
    return textwrap.fill(name, 40)


def build_legend(title: str | None = None, **more: Any) -> alt.Legend:
    """Return a legend whose labels may have several lines."""
    return alt.Legend(title=title, labelExpr=WRAPPED, **more)


def build_look_channels(looks: Looks, dotted: bool = False, **legend: Any) -> dict[str, Any]:
    """Return the channels color and strokeDash of the column `name`, in one legend; the first is a dot if `dotted`."""
    names = [wrap_label(name) for name in looks]
    box = build_legend(**legend, **({} if dotted else {"symbolType": "stroke", "symbolSize": 900}))
    colors, dashes = zip(*looks.values(), strict=True)
    channels: dict[str, Any] = {"color": (alt.Color, colors), "strokeDash": (alt.StrokeDash, dashes)}
    if dotted:
        channels["shape"] = alt.Shape, ["circle", *["stroke"] * (len(names) - 1)]
    return {
        name: channel("name:N", legend=box, scale=alt.Scale(domain=names, range=list(values)))
        for name, (channel, values) in channels.items()
    }


class Axis(NamedTuple):
    """Column of a table on an axis: its title with the unit, whether the axis is logarithmic, and limits."""

    column: str
    title: str
    log: bool = True
    limits: tuple[float, float] | None = None
    reverse: bool = False

    def fit(self, *values: Iterable[float | None]) -> "Axis":
        """Return the axis with limits around the values; a log axis takes the positive ones."""
        found = np.array([v for part in values for v in part if v is not None], float)
        found = found[np.isfinite(found) & ((found > 0) | (not self.log))]
        if not len(found):
            return self
        low, high = float(found.min()), float(found.max())
        if self.log:
            margin = max((high / low) ** 0.04, 1.02) if high > 1.001 * low else 1.5
            return self._replace(limits=(low / margin, high * margin))
        margin = 0.04 * (high - low) if high > low else 0.1 * abs(high) or 1.0
        return self._replace(limits=(low - margin, high + margin))

    def channel(self, kind: Any, **more: Any) -> Any:
        """Return the channel, alt.X or alt.Y, of the axis."""
        low, high = self.limits or (1.0, 1e3)
        scale: dict[str, Any] = {"domain": [low, high]} if self.limits else {}
        scale |= {"type": "log"} if self.log else {"zero": False, "reverse": self.reverse}
        ticks: dict[str, Any] = {"format": "~s" if low >= 1 else "~g", "tickCount": 8} if self.log else {"tickCount": 6}
        if self.log and high < 2 * low:  # Vega may leave all labels of a short log axis out
            ticks["labelExpr"] = f"format(datum.value, '{ticks['format']}')"
        axis = alt.Axis(**ticks, **more)
        return kind(f"{self.column}:Q", title=self.title, scale=alt.Scale(nice=False, **scale), axis=axis)

    def inside(self) -> str:
        """Return the filter, as a Vega expression, of rows with a value that the axis can show."""
        return (
            f"isValid(datum.{self.column}) && isFinite(datum.{self.column})" + f" && datum.{self.column} > 0" * self.log
        )


def tooltips(columns: Mapping[str, str], frame: pl.DataFrame) -> list[alt.Tooltip]:
    """Return the columns, with their titles, that a mark shows under the pointer."""
    found = []
    for name, title in columns.items():
        if kind := frame.schema.get(name):
            number: Any = {"format": "," if kind.is_integer() else ",.5~g"} if kind.is_numeric() else {}
            found.append(alt.Tooltip(f"{name}:{'Q' if number else 'N'}", title=title, **number))
    return found


def build_line_panel(
    frame: pl.DataFrame,
    x: Axis,
    y: Axis,
    looks: Looks,
    tips: Mapping[str, str],
    size: tuple[int, int] = (220, 210),
    legend_title: str | None = None,
    dotted: bool = False,
    below: bool = False,
    **line: Any,
) -> Any:
    """Return a panel of lines through the rows of `frame`, one for each value of `line`.

    The rows have the columns of the axes, `name` (of the look), `line` and, for the hover, the columns of `tips`. Optional:
    `width` of the stroke, `dot` (whether the row answers to the pointer) and `mark` (whether a marker is drawn). With `dotted`
    the first name has markers only. The legend is beside the panel, or `below` it.
    """
    defaults = {"width": pl.lit(1.6), "dot": pl.lit(True), "mark": pl.lit(False)}
    frame = frame.with_columns(value.alias(name) for name, value in defaults.items() if name not in frame.columns)
    tips = {"name": "", **{axis.column: axis.title for axis in (x, y)}, **tips}
    frame = frame.select(name for name in frame.columns if name in (*tips, "line", *defaults))
    frame = frame.with_columns(pl.col("name").map_elements(wrap_label, pl.String), cs.float().fill_nan(None))
    x, y = (axis if axis.limits else axis.fit(frame[axis.column]) for axis in (x, y))
    base = alt.Chart(frame).transform_filter(f"{x.inside()} && {y.inside()}")
    base = base.encode(x.channel(alt.X), y.channel(alt.Y))
    place = {"orient": "bottom", "columns": 1} if below else {}  # elsewhere the report chooses
    channels = build_look_channels(looks, dotted, title=legend_title, **place)
    shape = {"shape": channels.pop("shape")} if dotted else {}
    picked: Any = {"condition": {"param": "pick", "value": 1}, "value": 0.12}
    stroke = alt.StrokeWidth("width:Q", scale=None, legend=None)
    lines = base.transform_filter(f"!datum.mark || {str(not dotted).lower()}").mark_line(clip=True, **line)
    lines = lines.encode(**channels, strokeWidth=stroke, detail="line:N", opacity=picked)
    dots = base.transform_filter("datum.mark || (hover && datum.dot)").mark_point(size=36, filled=True, clip=True)
    shown = alt.condition("datum.mark", alt.value(1), alt.value(0))
    dots = dots.encode(color=channels["color"], **shape, opacity=shown, tooltip=tooltips(tips, frame))
    return alt.layer(lines, dots).properties(width=size[0], height=size[1])


def concat_panels(panels: Sequence[Any], columns: int, independent: Sequence[str] = ()) -> Any:
    """Return panels side by side, `columns` in a row; the report may take fewer columns."""
    if len(panels) == 1:
        return panels[0]
    apart: Any = dict.fromkeys(independent, "independent")
    return alt.concat(*panels, columns=min(columns, len(panels))).resolve_scale(**apart)


def to_spec(figure: Figure, titled: bool = False) -> dict[str, Any]:
    """Return the Vega-Lite specification of a figure, with its title and note where it stands alone.

    A drag moves a panel, the wheel zooms it while Shift is held, and a click on the legend picks lines out.
    """
    chart = figure.chart
    if titled:
        chart = chart if isinstance(chart, alt.ConcatChart) else alt.concat(chart)
        note: Any = {"subtitle": textwrap.wrap(figure.note, 110)} if figure.note else {}
        chart = chart.properties(title=alt.Title(textwrap.wrap(figure.title, 90) or "", **note))
    spec = chart.to_dict(validate=False) | {"config": CONFIG, "background": "white", "padding": 8}
    del spec["$schema"]  # an address, which nothing needs
    params: list[dict[str, Any]] = [{"name": "hover", "value": not titled}]
    views: list[str] = []
    for i, view in enumerate(spec.get("concat", [spec])):
        while "layer" in view:
            view = view["layer"][0]
        views.append(view.setdefault("name", f"view_{i}"))
        if all(view["encoding"].get(axis, {}).get("type") == "quantitative" for axis in "xy"):
            zoom = {"type": "interval", "zoom": "wheel![event.shiftKey]"}
            params.append({"name": f"zoom_{i}", "select": zoom, "bind": "scales", "views": views[-1:]})
    if '"pick"' in json.dumps(spec):
        params.append(
            {"name": "pick", "select": {"type": "point", "fields": ["name"]}, "bind": "legend", "views": views}
        )
    return spec | {"params": params}


def save(figure: Figure, path: Path, pdf: bool = False) -> None:
    """Write a figure as PNG and SVG, and as PDF if wanted."""
    svg = vl_convert.vegalite_to_svg(to_spec(figure, titled=True))
    files = {".svg": svg.encode(), ".png": vl_convert.svg_to_png(svg, scale=2)}
    if pdf:
        files[".pdf"] = vl_convert.svg_to_pdf(svg)
    for suffix, content in files.items():
        with atomic_write(path.with_name(path.name + suffix)) as part:
            part.write_bytes(content)
