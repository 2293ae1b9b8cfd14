"""Checks that hold for every figure of every command, whatever draws it: labelled axes, legible text, true legends.

The tables are synthetic: `ledger` makes them from invented runs, and nothing is trained.
"""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import polars as pl
import pytest
from matplotlib.axis import Axis, Tick
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from experiments.figures import drawing
from experiments.harness import results, storage

WORKERS, ROUNDS = 4, 40
KINDS = {"gd": "baseline", "laq": "lazy", "lag_wk": "lazy", "ef21": "compressed"}


@dataclass(frozen=True)
class Run:
    """Invented setting: f - f* is start * rate^k after k rounds; `size` bits for each upload, one in `every` rounds."""

    algorithm: str
    rate: float
    size: int = 320
    every: int = 1
    start: float = 1.0
    bits: int | None = None
    max_silence: int | None = None


@dataclass(frozen=True)
class Case:
    """Runs with the targets and seeds of their result folder."""

    runs: tuple[Run, ...]
    targets: tuple[float, ...] = (0.5, 0.1)
    seeds: int = 2


GRID = tuple(
    Run("laq", 0.85 + 0.01 * i, 10 * b, every=1 + i, bits=b, max_silence=c)
    for i, (b, c) in enumerate(itertools.product((2, 4), (5, 50)))
)
LONG = "my_project_with_a_long_name.py:quantized_gradients_with_server_momentum_and_restarts"
CASES = {
    "plain": Case((*GRID, Run("gd", 0.8), Run("lag_wk", 0.82, every=2), Run("ef21", 0.9, 60), Run("mine", 0.92, 700))),
    "one decade": Case(tuple(Run(name, 0.99, 300 + i, start=1.9) for i, name in enumerate(KINDS)), (1.6, 1.5)),
    "eight decades": Case(
        tuple(Run(name, 0.6, 10 ** (2 * i + 1), start=10.0**i) for i, name in enumerate(KINDS)), (1e-1, 1e-5)
    ),
    "one setting": Case((Run("laq", 0.9, bits=4, max_silence=5),), seeds=1),
    "one missed": Case((Run("gd", 0.8), Run("laq", 0.85, 40), Run("mine", 0.9999, 30)), seeds=1),
    "none reached": Case((Run("gd", 0.999), Run("laq", 0.9985, 40), Run("mine", 0.9999))),
    "long names": Case((Run("gd", 0.8), Run(LONG, 0.85, 40), Run(f"{LONG}_twice", 0.9, 20))),
    "equal": Case(tuple(Run(name, 0.8) for name in KINDS), seeds=1),
    "zeros": Case((Run("gd", 0.8), Run("laq", 0.0, 40), Run("mine", 0.8, start=0.3)), seeds=1),
    "many": Case(
        (
            *(Run("laq", 0.8 + 0.002 * i, 40 - i, bits=i, max_silence=5) for i in range(24)),
            *(Run(f"method_{i}", 0.9 + 0.001 * i, 10 * i + 50) for i in range(12)),
        ),
        seeds=1,
    ),
}
COMMANDS = {  # and the cases of each; the curves of all commands are one function
    "sweep": list(CASES),
    "compare": ["plain", "one decade", "one missed", "long names", "many"],
    "tune": ["plain", "eight decades", "one setting", "one missed", "equal", "zeros"],
    "federated": ["plain", "one decade", "zeros"],
    "methods": ["plain"],
}


def make_tables(case: Case) -> dict[str, pl.DataFrame]:
    """Return curves, masks, points and summary of a case, as a command writes them."""
    runs = [(run, seed) for run in case.runs for seed in range(case.seeds)]
    record = results.PointHistory.empty(ROUNDS, len(runs), WORKERS, 0.0)
    times = np.arange(ROUNDS)[:, None] + np.arange(WORKERS)
    for i, (run, seed) in enumerate(runs):
        record.loss[:, i] = run.start * run.rate ** np.arange(ROUNDS + 1) * (1 + 0.1 * seed)
        record.sent[:, i] = times % run.every == 0
        record.bits_up[:, i] = run.size * record.sent[:, i]
    record.bits_down[:], record.gradients[:], record.rounds_done[:] = 320, 1, ROUNDS
    grid = any(run.bits for run in case.runs)
    labels = [
        {"point": i, "algorithm": run.algorithm}
        | ({"bits": run.bits, "max_silence": run.max_silence, "window": run.bits and 1} if grid else {})
        | {"seed": seed}
        for i, (run, seed) in enumerate(runs)
    ]
    spent = record.cumulative_costs(results.DEFAULT_NETWORK, 1.0)
    spent["bytes_up"] = spent["bits_up"] // 8 + 100 * spent["uploads"]
    tables = results.build_tables(labels, record, results.Targets(case.targets), spent, 200)
    return tables | {"summary": results.summarize(tables["points"])}


def make_comparison(summary: pl.DataFrame) -> dict[str, pl.DataFrame]:
    """Return the tables best and tried of a comparison with these settings, the first one being that of theory."""
    rows = []
    for (name,), mine in summary.group_by(["algorithm"], maintain_order=True):
        for target in results.target_labels(summary):
            cheapest = mine.sort(f"bits_up_{target}", nulls_last=True).row(0, named=True)
            row = {"method": name, "kind": KINDS.get(str(name), "your own"), "target": target, "cheapest in": "bits up"}
            row |= {f"bits_up{end}": cheapest[f"bits_up_{target}{end}"] for end in ("", "_ci95")}
            theory = mine[f"bits_up_{target}"][0]
            rows.append(row | {"bits_up of theory": theory if len(mine) > 1 else None, "goal": cheapest["goal"]})
    kinds: Any = dict.fromkeys(("bits_up", "bits_up_ci95", "bits_up of theory"), pl.Float64)
    return {"best": pl.DataFrame(rows, schema_overrides=kinds), "tried": summary}


@cache
def drawn(command: str, name: str) -> dict[str, Figure]:
    """Return the figures of a command for a case, laid out, by the names of their files."""
    tables, figures = make_tables(CASES[name]), {}
    summary = tables["summary"]
    if command == "compare":
        tables = make_comparison(summary)
    elif command == "tune":
        target = results.target_labels(summary)[-1]
        trials = summary.select("goal", bits_up=f"bits_up_{target}", target=pl.lit(float(target)))
        tables = {"trials": trials.with_row_index("trial")}
    elif command == "methods":
        points = tables["points"].rename({"algorithm": "method"}).drop("bits", "max_silence", "window", strict=False)
        tables["points"] = points.insert_column(2, (pl.col("point") % 2).cast(pl.String).alias("data"))

    def keep(figure: Figure, path: Path) -> None:
        figure.draw_without_rendering()
        drawing.plt.close(figure)
        figures[path.name] = figure

    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for table, frame in tables.items():
            storage.save_frame(frame, Path(folder) / table)
        patch.setattr(drawing, "save", keep)
        getattr(drawing, {"compare": "plot_comparison"}.get(command, f"plot_{command}"))(Path(folder))
    return figures


def tick_labels(axis: Axis) -> list[Text]:
    """Return the tick labels of an axis that are seen."""
    low, high = sorted(axis.get_view_interval())
    margin = 1e-9 * (high - low)
    ticks: list[Tick] = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    inside = [tick for tick in ticks if low - margin <= tick.get_loc() <= high + margin]
    return [text for tick in inside for text in (tick.label1, tick.label2) if text.get_visible() and text.get_text()]


def axes_of(figure: Figure) -> list[Any]:
    """Return the axes of a figure that are seen."""
    return [axes for axes in figure.axes if axes.axison]


@cache
def boxes(figure: Figure) -> dict[Text, Any]:
    """Return the box in pixels of every text that is seen."""
    ticks = {text for tick in figure.findobj(Tick) for text in (tick.label1, tick.label2)}  # pyright: ignore[reportAttributeAccessIssue]
    texts: list[Any] = [text for text in figure.findobj(Text) if text not in ticks and text.get_visible()]
    hidden = {text for axes in figure.axes if not axes.axison for text in axes.findobj(Text)}
    texts += [text for axes in axes_of(figure) for axis in (axes.xaxis, axes.yaxis) for text in tick_labels(axis)]
    return {text: text.get_window_extent() for text in texts if text.get_text().strip() and text not in hidden}


def overlap(a: Any, b: Any) -> bool:
    """Return whether two boxes share more than a border of half a pixel."""
    return min(a.x1, b.x1) - max(a.x0, b.x0) > 0.5 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.5


def marks(line: Line2D) -> np.ndarray:
    """Return the pixels [N, 2] of the points of a line that lie inside its axes."""
    if line.axes is None or not line.get_visible():
        return np.empty((0, 2))
    pixels = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
    box = line.axes.bbox
    inside = (pixels >= [box.x0 - 1, box.y0 - 1]) & (pixels <= [box.x1 + 1, box.y1 + 1])
    return pixels[inside.all(axis=1)]


def has_marker(line: Line2D) -> bool:
    """Return whether a line has markers."""
    return line.get_marker() not in ("", " ", "None", None)


def has_stroke(line: Line2D) -> bool:
    """Return whether a line joins its points."""
    return line.get_linestyle() not in ("", " ", "None", None)


def shows(line: Line2D) -> bool:
    """Return whether something of a line is seen: a marker, or a stroke of some length."""
    pixels = marks(line)
    long = len(pixels) > 1 and float(np.ptp(pixels, axis=0).max()) > 1
    return (has_marker(line) and len(pixels) > 0) or (has_stroke(line) and long)


def style(line: Line2D) -> tuple[Any, ...]:
    """Return what a reader tells lines apart by."""
    colors = [to_hex(c) if c != "none" else c for c in (line.get_color(), line.get_markerfacecolor())]
    return (*colors, line.get_marker() if has_marker(line) else "", line.get_linestyle() if has_stroke(line) else "")


def unlabelled_axes(figure: Figure) -> list[str]:
    """List the axes with fewer than two tick labels; one is enough where ticks are categories."""
    found = []
    for axes in axes_of(figure):
        for letter in "xy":
            siblings = getattr(axes, f"get_shared_{letter}_axes")().get_siblings(axes)
            axis = getattr(axes, f"{letter}axis")
            edge = f"{letter}0"  # a shared axis has its labels below its column, or beside its row
            here = [one for one in siblings if abs(getattr(one.bbox, edge) - getattr(axes.bbox, edge)) < 1]
            most = max(len(tick_labels(getattr(one, f"{letter}axis"))) for one in here)
            colors = getattr(axes, "_colorbar", None)
            if colors is not None and letter == ("x" if colors.orientation == "vertical" else "y"):
                continue  # the short side of a color bar
            if most < (1 if isinstance(axis.get_major_locator(), FixedLocator) else 2):
                found.append(
                    f"{letter} of {axes.get_title() or axes.get_xlabel()}: {most} of {axis.get_view_interval()}"
                )
    return found


def overlapping_texts(figure: Figure) -> list[str]:
    """List the pairs of texts that overlap, tick labels among them."""
    pairs = itertools.combinations(boxes(figure).items(), 2)
    return [f"{a.get_text()} | {b.get_text()}" for (a, first), (b, second) in pairs if overlap(first, second)]


def texts_outside(figure: Figure) -> list[str]:
    """List the texts that leave the figure."""
    whole, found = figure.bbox, []
    for text, box in boxes(figure).items():
        if box.x0 < whole.x0 - 1 or box.y0 < whole.y0 - 1 or box.x1 > whole.x1 + 1 or box.y1 > whole.y1 + 1:
            found.append(text.get_text())
    return found


def texts_over_frames(figure: Figure) -> list[str]:
    """List the texts that are neither inside nor outside some axes."""
    found = []
    for axes in axes_of(figure):
        frame = axes.bbox
        for text, box in boxes(figure).items():
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if overlap(box, frame) and not inside:
                found.append(text.get_text())
    return found


def covered_markers(figure: Figure) -> list[str]:
    """List the texts under which a marker lies."""
    dots = [marks(line) for axes in axes_of(figure) for line in axes.lines if has_marker(line)]
    pixels = np.concatenate([np.empty((0, 2)), *dots])
    found = []
    for text, box in boxes(figure).items():
        under = (pixels > [box.x0, box.y0]) & (pixels < [box.x1, box.y1])
        found += [text.get_text()] * bool(under.all(axis=1).any())
    return found


def false_legends(figure: Figure) -> list[str]:
    """List the legend entries that stand for nothing that is seen."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    seen = [style(line) for axes in axes_of(figure) for line in axes.lines if shows(line)]
    found = []
    for legend in legends:
        for handle, text in zip(legend.legend_handles, legend.get_texts(), strict=True):
            if isinstance(handle, Line2D):
                known = style(handle) in seen
            else:  # the bar of an error bar
                known = to_hex(handle.get_color()[0]) in [look[0] for look in seen]
            found += [] if known else [text.get_text()]
    return found


def missing_methods(figure: Figure, names: list[str]) -> list[str]:
    """List the methods that no text of a figure names."""
    words = " ".join("".join(text.get_text().split()) for text in boxes(figure))
    return [name for name in names if "".join(name.split()) not in words]


CHECKS = (unlabelled_axes, overlapping_texts, texts_outside, texts_over_frames, covered_markers, false_legends)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_figure(command: str, check: Any) -> None:
    figures = {f"{name}: {path}": figure for name in COMMANDS[command] for path, figure in drawn(command, name).items()}
    assert figures
    found = {path: bad for path, figure in figures.items() if (bad := check(figure))}
    assert not found


@pytest.mark.parametrize(("command", "path"), [("sweep", "front"), ("federated", "loss"), ("compare", "bits")])
def test_no_method_is_missing(command: str, path: str) -> None:
    names = {name: [run.algorithm for run in case.runs] for name, case in CASES.items()}
    figures = {name: drawn(command, name)[path] for name in COMMANDS[command]}
    found = {name: bad for name, figure in figures.items() if (bad := missing_methods(figure, names[name]))}
    assert not found


def test_a_log_axis_has_two_labels_in_any_range() -> None:
    figure, axes = drawing.plt.subplots(figsize=(3, 3))
    drawing.log_scale(axes, "x")
    rng = np.random.default_rng(0)
    for low, decades in zip(10 ** rng.uniform(-13, 15, 300), 10 ** rng.uniform(-3, 1, 300), strict=True):
        axes.set_xlim(low, low * 10**decades)
        words = axes.xaxis.get_major_formatter().format_ticks(axes.xaxis.get_majorticklocs().tolist())
        assert 2 <= len(words) <= 9
        assert len(set(words)) == len(words)
    drawing.plt.close(figure)
