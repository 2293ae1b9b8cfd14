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
            for (method,), rows in curves.group_by(["method"], maintain_order=True):
                axis.plot(rows[column] + (column == "round"), rows["residual"].clip(floor), label=method, linewidth=1.4)
            axis.set(xscale="log", yscale="log", xlabel=label)
        axes[0].set_ylabel(ylabel)
        axes[0].legend(frameon=False)
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
    lazy = curves.filter(
        pl.len().over("method") * pl.col("workers").first() > pl.col("uploads").max().over("method") + 1
    )
    if len(lazy):
        raster(lazy, folder / "uploads")


def main(folder: tyro.conf.Positional[Path], /) -> None:
    """Draw the figures of a result folder again."""
    if (folder / "curves.parquet").exists():
        comparison(folder)
    else:
        raise SystemExit(f"{folder}: no curves.parquet there; expected a folder that an experiment wrote")
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
