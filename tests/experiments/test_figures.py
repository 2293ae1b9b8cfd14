"""Checks that hold for every figure of every command: labelled axes, legible text, true legends.

The tables are synthetic and nothing is trained. The checks look at what vl-convert draws: the scene of Vega.
"""

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import polars as pl
import pytest
import vl_convert

from experiments import plots
from experiments.figures import drawing, style
from experiments.figures.style import Axis, Figure
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
    "sweep": [name for name in CASES if name not in ("eight decades", "equal")],
    "compare": ["plain", "one missed", "long names"],
    "tune": ["plain", "eight decades", "one setting", "one missed", "equal", "zeros"],
    "federated": ["plain", "eight decades"],
    "methods": ["plain"],
    "heterogeneity": ["plain"],
    "scaling": ["plain"],
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
            row |= {"bits_up of theory": theory if len(mine) > 1 else None, "goal": cheapest["goal"]}
            rows.append(row | {"setting": f"point={cheapest['point']}"})
    kinds: Any = dict.fromkeys(("bits_up", "bits_up_ci95", "bits_up of theory"), pl.Float64)
    return {"best": pl.DataFrame(rows, schema_overrides=kinds), "tried": summary}


@dataclass(frozen=True)
class Drawn:
    """Drawn figure: its specification, and the marks of its scene with their place in pixels."""

    spec: dict[str, Any]
    size: tuple[float, float]
    items: list[tuple[dict[str, Any], dict[str, Any], float, float]]  # (mark, item, x, y)
    axes: list[tuple[str, list[str]]]  # titles and labels

    def texts(self, role: str = "") -> list[tuple[str, tuple[float, float, float, float]]]:
        """Return the texts that are seen, with their boxes; the width of a letter is an estimate."""
        found = []
        for mark, item, x, y in self.items:
            if (
                mark["marktype"] == "text"
                and role in mark.get("role", "")
                and item.get("opacity", 1)
                and item.get("text")
            ):
                lines = item["text"] if isinstance(item["text"], list) else [item["text"]]
                size = item.get("fontSize", 11)
                width, line, height = 0.42 * size * max(map(len, map(str, lines))), 0.8 * size, 1.15 * size * len(lines)
                left = {"left": 0, "center": width / 2, "right": width}[item.get("align", "left")]
                up = {"top": 0, "line-top": 0, "middle": line / 2}.get(item.get("baseline", ""), line)
                box = (x - left, y - up, x - left + width, y - up + height - 0.35 * size)
                if item.get("angle") == -90:
                    box = (x - height, y - width / 2, x, y + width / 2)
                found.append(("".join(map(str, lines)), box))
        return found

    def looks(self, role: str) -> set[tuple[str, str]]:
        """Return the colors, and the dash or shape, of the lines and symbols that are seen."""
        found, lines = set(), {}
        for mark, item, x, y in self.items:
            if mark.get("role", "mark") != role or not item.get("opacity", 1) or item.get("size") == 0:
                continue
            color = next((c for c in (item.get("stroke"), item.get("fill")) if c and c != "transparent"), "")
            dash = str([d for d in item.get("strokeDash") or [1, 0]])
            if mark["marktype"] == "line":
                lines.setdefault(id(mark), []).append((x, y, color, dash))
            elif mark["marktype"] in ("symbol", "rect"):
                shape = item.get("shape", "circle") if mark["marktype"] == "symbol" else "square"
                found.add((color, dash if shape == "stroke" else shape))
        for points in lines.values():
            if len(points) > 1 and max(np.ptp([p[0] for p in points]), np.ptp([p[1] for p in points])) > 1:
                found.add(points[0][2:])
        return found


def walk(
    mark: dict[str, Any], x: float = 0, y: float = 0
) -> Iterator[tuple[dict[str, Any], dict[str, Any], float, float]]:
    """Yield every item of a scene with its mark and its place."""
    for item in mark["items"]:
        here = item.get("x") or 0, item.get("y") or 0
        yield mark, item, x + here[0], y + here[1]
        for part in item.get("items", ()) if mark["marktype"] == "group" else ():
            yield from walk(part, x + here[0], y + here[1])


def render(figure: Figure) -> Drawn:
    """Draw a figure once, as its files are."""
    spec = style.to_spec(figure, titled=True)
    scene = vl_convert.vegalite_to_scenegraph(spec)
    root = {"marktype": "group", "items": [{"items": [scene["scenegraph"]]}]}
    items = list(walk(root, *scene["origin"]))
    axes = []
    for mark, item, _, _ in items:
        if mark.get("role") == "axis":
            parts = {
                part.get("role"): part["items"] for group in item["items"] for part in [group, *group_parts(group)]
            }
            if "axis-label" in parts:
                seen = [
                    str(label["text"]) for label in parts["axis-label"] if label.get("opacity", 1) and label["text"]
                ]
                title = parts.get("axis-title") or [{"text": ""}]
                axes.append((str(title[0].get("text", "")), seen))
    return Drawn(spec, (scene["width"], scene["height"]), items, axes)


def group_parts(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the marks inside a group."""
    return [part for item in group["items"] for part in item.get("items", ())] if group["marktype"] == "group" else []


def make_measurements() -> dict[str, pl.DataFrame]:
    """Return invented tables of heterogeneity and scaling."""
    rows = [
        {"axis": axis, "M": 100, "p": 1000, "rounds": 10, axis: size, "seconds": size * 1e-4 / devices}
        | {"devices": devices, "processes": 1, "devices of each": devices}
        for axis in ("M", "p", "rounds")
        for size in (10, 100, 1000)
        for devices in (1, 2)
    ]
    rows += [
        rows[0] | {"axis": axis, "devices": 4, "processes": processes, "devices of each": 4 // processes}
        for axis in ("strong", "weak")
        for processes in (1, 2, 4)
    ]
    model = itertools.product((10, 100, 1000), (1e6, 1e9), ("all_gather", "all_reduce"))
    hosts = [{"hosts": h, "p": int(p), "collective": c, "seconds": h * p * 1e-9} for h, p, c in model]
    spread = {"axis": ["decades of L_m"] * 3 + ["Dirichlet alpha"] * 3, "value": [0.0, 1.0, 2.0, 0.1, 1.0, 10.0]}
    saved = {"laq saves": [0.1, 0.5, 0.9] * 2, "lag_wk saves": [0.2, None, 0.7] * 2}
    return {"cost": pl.DataFrame(rows), "model": pl.DataFrame(hosts), "heterogeneity": pl.DataFrame(spread | saved)}


def figures_of(command: str, name: str) -> dict[str, Figure]:
    """Return the figures of a command for a case."""
    tables = make_tables(CASES[name])
    summary = tables["summary"]
    if command == "compare":
        tables = tables | make_comparison(summary)
    elif command == "tune":
        target = results.target_labels(summary)[-1]
        trials = summary.select("goal", bits_up=f"bits_up_{target}", target=pl.lit(float(target)))
        tables = {"trials": trials.with_row_index("trial")}
    elif command == "methods":
        points = tables["points"].rename({"algorithm": "method"}).drop("bits", "max_silence", "window", strict=False)
        tables["points"] = points.insert_column(2, (pl.col("point") % 2).cast(pl.String).alias("data"))
        tables["summary"] = tables["points"]
    return dict(drawing.build_figures(command, tables | make_measurements()))


@cache
def drawn(command: str, name: str) -> dict[str, Drawn]:
    """Return the drawn figures of a command for a case, by the names of their files."""
    return {path: render(figure) for path, figure in figures_of(command, name).items()}


def channels(spec: Any) -> Iterator[dict[str, Any]]:
    """Yield all channels of a specification."""
    for key, value in spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ():
        if key == "encoding":
            yield from (channel for channel in value.values() if isinstance(channel, dict))
        elif key not in ("datasets", "config"):
            yield from channels(value)


def unlabelled_axes(figure: Drawn) -> list[str]:
    """List the axes without a title or with fewer than two labels; categories may be one, and explain themselves."""
    discrete = {
        str(c.get("title") or "")
        for c in channels(figure.spec)
        if c.get("type") in ("nominal", "ordinal") and ("axis" in c or c.get("title"))
    }
    assert figure.axes
    return [
        f"{t}: {found}"
        for t, found in figure.axes
        if len(found) < (1 if t in discrete else 2) or not (t or t in discrete)
    ]


def overlap(a: Any, b: Any) -> bool:
    """Return whether two boxes share more than a border of half a pixel."""
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.5 and min(a[3], b[3]) - max(a[1], b[1]) > 0.5


def overlapping_texts(figure: Drawn) -> list[str]:
    """List the pairs of texts that overlap, tick labels among them."""
    return [f"{a} | {b}" for (a, one), (b, two) in itertools.combinations(figure.texts(), 2) if overlap(one, two)]


def texts_outside(figure: Drawn) -> list[str]:
    """List the texts that leave the figure."""
    width, height = figure.size
    outside = lambda box: box[0] < -2 or box[1] < -2 or box[2] > width + 2 or box[3] > height + 2  # noqa: E731
    return [text for text, box in figure.texts() if outside(box)]


def covered_markers(figure: Drawn) -> list[str]:
    """List the texts under which a marker lies."""
    dots = [
        (x, y)
        for mark, item, x, y in figure.items
        if mark["marktype"] == "symbol" and item.get("opacity", 1) and mark.get("role", "mark") == "mark"
    ]
    return [text for text, box in figure.texts() if any(box[0] < x < box[2] and box[1] < y < box[3] for x, y in dots)]


def false_legends(figure: Drawn) -> list[str]:
    """List the looks of legend symbols that nothing has; a solid line may stand for a dot, and grey for any color."""
    seen = figure.looks("mark")
    seen |= {(color, "[1, 0]") for color, shape in seen if shape == "circle"} | {("#888", shape) for _, shape in seen}
    return [str(look) for look in figure.looks("legend-symbol") if look not in seen]


def looks_without_legend(figure: Drawn) -> list[str]:
    """List the lines whose color and dash stand in no legend; greys are the context of other lines."""
    known = figure.looks("legend-symbol")
    lines = [
        look for look in figure.looks("mark") if look[1].startswith("[") and look[0] not in (style.GREY, "#dddddd")
    ]
    return [str(look) for look in lines if look not in known]


def misplaced_marks(figure: Drawn) -> list[str]:
    """List the marks without a finite place, such as zeros on a log axis, and log axes that begin at zero."""
    found = [
        f"{mark['marktype']}: {item.get('x')}, {item.get('y')}"
        for mark, item, _, _ in figure.items
        if mark.get("role", "mark") == "mark" and mark["marktype"] in ("line", "symbol", "rule", "rect")
        if not all(v is not None and math.isfinite(v) and abs(v) < 1e5 for v in (item.get("x", 0), item.get("y", 0)))
    ]
    scales = [channel.get("scale") or {} for channel in channels(figure.spec)]
    return found + [str(scale) for scale in scales if scale.get("type") == "log" and not scale["domain"][0] > 0]


CHECKS = (
    unlabelled_axes,
    overlapping_texts,
    texts_outside,
    covered_markers,
    false_legends,
    looks_without_legend,
    misplaced_marks,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_figure(command: str, check: Any) -> None:
    figures = {f"{name}: {path}": figure for name in COMMANDS[command] for path, figure in drawn(command, name).items()}
    assert figures
    found = {path: bad for path, figure in figures.items() if (bad := check(figure))}
    assert not found


@pytest.mark.parametrize(
    ("command", "path"), [("sweep", "front"), ("federated", "loss"), ("compare", "bits"), ("compare", "loss")]
)
def test_no_method_is_missing(command: str, path: str) -> None:
    for name in COMMANDS[command]:
        words = " ".join("".join(text.split()) for text, _ in drawn(command, name)[path].texts())
        assert [run.algorithm for run in CASES[name].runs if run.algorithm not in words] == [], name


@pytest.mark.parametrize("command", COMMANDS)
def test_a_method_has_one_color(command: str) -> None:
    """In all legends of a folder; of a comparison, whose kinds share the colors, in all legends of a kind too."""
    colors: dict[str, set[str]] = {}
    for channel in channels([figure.spec for figure in drawn(command, "plain").values()]):
        scale = channel.get("scale") or {}
        if channel.get("field") in ("name", "front", "algorithm") and str(scale.get("range", [""])[0]).startswith("#"):
            for name, color in zip(scale["domain"], scale["range"], strict=True):
                colors.setdefault(name, set()).add(color)
    assert colors
    assert {name: found for name, found in colors.items() if len(found) > 1} == {}


@pytest.mark.long
@pytest.mark.parametrize("command", COMMANDS)
def test_specifications_are_valid(command: str) -> None:
    for figure in figures_of(command, "plain").values():
        figure.chart.to_dict()  # Altair validates it


def test_a_log_axis_has_two_labels_in_any_range() -> None:
    rng, panels = np.random.default_rng(0), []
    ends = zip(10 ** rng.uniform(-13, 15, 79), 10 ** rng.uniform(-2.5, 1, 79), strict=True)
    for low, decades in [(8.466, math.log10(9.2424 / 8.466)), *ends]:
        x = Axis("x", "x").fit([low, low * 10**decades])
        chart = alt.Chart(pl.DataFrame({"x": [low], "y": [1.0]})).mark_point()
        panels.append(chart.encode(x.channel(alt.X), y="y:Q").properties(width=180, height=40))
    figure = render(Figure("", style.concat_panels(panels, 10)))
    labels = [found for title, found in figure.axes if title == "x"]
    assert len(labels) == 80
    assert [found for found in labels if not 2 <= len(set(found)) == len(found) <= 12] == []


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PNG, SVG and, where asked for, PDF of one definition; an interval of many rounds is one mark of the raster."""
    for table, frame in make_tables(CASES["plain"]).items():
        storage.save_frame(frame, tmp_path / table)
    storage.write_json(tmp_path / "identity.json", {"format": storage.FORMAT, "experiment": "federated"})
    plots.main(tmp_path, pdf=True)
    assert {path.name for path in tmp_path.glob("loss.*")} == {"loss.png", "loss.svg", "loss.pdf"}
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "loss.pdf").read_bytes()[:4] == b"%PDF"
    assert "bits up, billed" in (tmp_path / "loss.svg").read_text()
    assert str(tmp_path / "loss.png") in capsys.readouterr().out
    sent = np.random.default_rng(0).random((30_000, 10)) < 0.5
    figure = drawing.build_raster({"laq": sent}, {"laq": "#1f77b4"})
    (rows,) = style.to_spec(figure)["datasets"].values()
    assert len(rows) <= drawing.CELLS
    assert sum(row["uploads"] for row in rows) == sent.sum()
    assert len(json.dumps(rows)) < 1e6
