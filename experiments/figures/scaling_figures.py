"""The figures of `experiments.scaling`, from the tables of its folder, and the slopes in them."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.optimize

from experiments.figures import drawing
from experiments.figures.drawing import plt


def fit_power_law(x: Any, seconds: Any) -> tuple[float, float]:
    """(Fixed cost, slope): seconds = fixed + c x^slope, the least squares of the logarithms."""
    x, seconds = np.asarray(x, float), np.asarray(seconds, float)

    def line(share: float) -> tuple[float, np.ndarray]:
        power, offset = np.polyfit(np.log(x), np.log(seconds - share * seconds.min()), 1)
        return power, np.log(share * seconds.min() + np.exp(offset) * x**power) - np.log(seconds)

    tried: Any = scipy.optimize.minimize_scalar(
        lambda share: np.sum(line(share)[1] ** 2), bounds=(0, 0.99), method="bounded"
    )
    return float(tried.x * seconds.min()), float(line(tried.x)[0])


def plot_scaling(folder: Path) -> None:
    """The figures, from the tables of a folder."""
    cost, modelled = (pl.read_parquet(folder / f"{name}.parquet") for name in ("cost", "model"))
    with plt.rc_context(drawing.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
        for axis, name in zip(axes, ("M", "p", "rounds"), strict=True):
            for i, ((devices,), rows) in enumerate(cost.filter(axis=name).group_by(["devices"], maintain_order=True)):
                fixed, power = fit_power_law(rows[name], rows["seconds"])
                label = f"{devices} device(s): slope {power:.2f} above {1e3 * fixed:.2g} ms"
                axis.plot(rows[name], rows["seconds"], marker="o", label=label, **drawing.line_style(i))
            drawing.log_scale(axis, "xy")
            axis.set(xlabel=name, ylabel="s a run" if name == "rounds" else "s a round")
            axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
        drawing.save(figure, folder / "cost")
        figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharey=True, layout="constrained")
        for axis, name in zip(axes, ("strong", "weak"), strict=True):
            rows = cost.filter(axis=name)
            bars = [f"{r['processes']} x {r['devices of each']}" for r in rows.iter_rows(named=True)]
            axis.bar(bars, 1e3 * rows["seconds"], color=[drawing.COLORS[r - 1] for r in rows["processes"]])
            work = f"M = {rows['M'][0]}" if name == "strong" else f"M = {rows['M'][0]} a device"
            axis.set(title=f"{name} scaling, {work}", xlabel="processes x devices of each")
        axes[0].set_ylabel("ms a round")
        drawing.save(figure, folder / "devices")
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
        for axis, ((size,), part) in zip(axes, modelled.group_by(["p"], maintain_order=True), strict=True):
            for i, ((name,), rows) in enumerate(part.group_by(["collective"], maintain_order=True)):
                axis.plot(rows["hosts"], rows["seconds"], label=name, **drawing.line_style(i))
            drawing.log_scale(axis, "xy")
            axis.set(xlabel="hosts", title=f"p = {size:,}")
        figure.suptitle("a model, not measured: M = 1000")
        axes[0].set_ylabel("s a round")
        drawing.legend(figure)
        drawing.save(figure, folder / "model")
