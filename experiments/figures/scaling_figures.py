"""Figures of `experiments.scaling`, and the power laws in them."""

from collections.abc import Iterator, Mapping
from typing import Any

import altair as alt
import numpy as np
import polars as pl

from experiments.figures import style
from experiments.figures.style import Axis, Figure


def fit_power_law(x: Any, seconds: Any) -> tuple[float, float]:
    """Return (fixed cost, slope) of seconds = fixed + c x^slope, by least squares of the logarithms."""
    import scipy.optimize  # here: half a second

    x, seconds = np.asarray(x, float), np.asarray(seconds, float)

    def line(share: float) -> tuple[float, np.ndarray]:
        power, offset = np.polyfit(np.log(x), np.log(seconds - share * seconds.min()), 1)
        return power, np.log(share * seconds.min() + np.exp(offset) * x**power) - np.log(seconds)

    tried: Any = scipy.optimize.minimize_scalar(
        lambda share: np.sum(line(share)[1] ** 2), bounds=(0, 0.99), method="bounded"
    )
    return float(tried.x * seconds.min()), float(line(tried.x)[0])


def scaling_figures(tables: Mapping[str, pl.DataFrame]) -> Iterator[tuple[str, Figure]]:
    """Yield seconds over workers, parameters and rounds; over devices; and the model of many hosts."""
    panels = []
    for column, title in (("M", "M, workers"), ("p", "p, parameters"), ("rounds", "rounds")):
        names, parts = {}, []
        for (devices,), rows in tables["cost"].filter(axis=column).group_by(["devices"], maintain_order=True):
            fixed, power = fit_power_law(rows[column], rows["seconds"])
            name = f"{devices} device{'s' * (devices > 1)}: slope {power:.2f} above {1e3 * fixed:.2g} ms"
            names[name] = str(devices)
            parts.append(rows.select(column, "seconds", name=pl.lit(name), line=pl.lit(name), mark=pl.lit(True)))
        y = Axis("seconds", "seconds of a run" if column == "rounds" else "seconds of a round")
        given = pl.concat(parts), Axis(column, title), y, style.assign_looks(names), {}
        panels.append(style.build_line_panel(*given, below=True))
    chart = style.concat_panels(panels, 3, ("color", "strokeDash"))
    yield "cost", Figure("Seconds over workers, parameters and rounds", chart)
    panels = []
    for name in ("strong", "weak"):
        rows = tables["cost"].filter(axis=name)
        bars = rows.select(
            "processes", on=pl.format("{} x {}", "processes", "devices of each"), ms=pl.col("seconds") * 1e3
        )
        work = f"M = {rows['M'][0]}" + " a device" * (name == "weak")
        chart = alt.Chart(bars).mark_bar().encode(
            alt.X("on:N", sort=None, title="processes x devices of each", axis=alt.Axis(labelAngle=0)),
            alt.Y("ms:Q", title="milliseconds of a round", axis=alt.Axis(tickCount=6)),
            color=alt.Color("processes:O", scale=alt.Scale(domain=[1, 2], range=list(style.COLORS[:2]))),
            tooltip=style.tooltips({"on": "processes x devices of each", "ms": "ms of a round"}, bars),
        )  # fmt: skip
        panels.append(chart.properties(title=f"{name} scaling, {work}", height=220))
    yield "devices", Figure("Milliseconds of a round over processes and devices", style.concat_panels(panels, 2))
    if "model" in tables:
        rows = tables["model"].with_columns(name="collective", line="collective")
        looks = style.assign_looks({name: name for name in rows["name"].unique(maintain_order=True)})
        panels = [
            style.build_line_panel(
                part, Axis("hosts", "hosts"), Axis("seconds", "seconds of a round"), looks, {}
            ).properties(title=f"p = {size:,}")
            for (size,), part in rows.group_by(["p"], maintain_order=True)
        ]
        yield "model", Figure("A model, not measured: M = 1000", style.concat_panels(panels, 2))
