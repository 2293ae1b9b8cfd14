"""HTML page of `experiments.report`: the figures of result folders and their tables, in one file."""

import html
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import vl_convert

from experiments.figures import drawing, ranking, style
from experiments.harness import results, storage

SHOWN = {  # the tables of the page, with their captions
    "sweep": {"summary": "Settings"},
    "methods": {"table": "The table of the command", "summary": "Methods"},
    "federated": {"summary": "Settings", "points": "Points: what was billed, and what was observed"},
    "heterogeneity": {"heterogeneity": "Uploads to the target, and the share of GD's that is saved"},
    "compare": {"best": "The cheapest setting of each method, at each target", "tried": "Settings that were tried"},
    "tune": {"trials": "Trials"},
    "scaling": {"goals": "Goals", "cost": "Seconds", "bytes": "Bytes of a whole run", "memory": "Memory"},
}
COSTS = ("bits_up", "rounds", "uploads", "bits", "seconds")
COST_OF = re.compile(r"(rounds|uploads|bits_up|bits_down|bits|seconds)_(end|[0-9][0-9.e+-]*)(_ci95|_least|_most)?")
ROWS = 4000  # of a table on the page
SIDE_BY_SIDE = 12  # settings in the figure of several folders
TEMPLATE = Path(__file__).with_name("report.html")


@dataclass
class ResultFolder:
    """Contents of a result folder: the kind of its experiment, its settings, the facts of its run, tables and notices."""

    folder: Path
    kind: str
    asked: dict[str, Any]
    ran: dict[str, Any]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def read(folder: Path) -> ResultFolder:
    """Read a result folder.

    Raises:
        FileNotFoundError: The folder is missing.
        ValueError: The folder holds no results, or a table is damaged or missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: must be the --out folder of an experiment")
    kind, tables = drawing.read_tables(folder)
    asked = storage.read_identity(folder) if (folder / "identity.json").exists() else {}
    asked.pop("experiment", None)
    if asked.get("target_accuracy"):  # it replaces the targets of the loss, whose default is in the file
        asked.pop("target", None)
    run = folder / ("best.json" if kind == "tune" else "run.json")
    section = ResultFolder(folder, kind, asked, storage.read_json(run) if run.exists() else {}, tables)
    needed = [name for name in drawing.TABLES[kind] if name != "masks"]
    if not section.ran:
        parts = sorted(str(path)[: -len("points.parquet")] for path in folder.glob("batches/*-points.parquet"))
        if parts and needed[0] == "summary":
            section.tables = results.concat_tables(parts)
        done = f"{len(section.tables['points'])} points" if "points" in section.tables else "what there is"
        section.notices.append(f"Not finished: the tables show {done}. The same command goes on from there.")
    elif lacking := [name for name in needed if name.removeprefix("report/") not in tables]:
        raise ValueError(f"{folder / lacking[0]}.parquet is missing; run its command again")
    if "summary" in section.tables and kind in ("sweep", "methods"):
        section.notices += results.describe_unreached_settings(section.tables["summary"])
    if needed[0] not in section.tables:
        section.tables = {}
        section.notices.append("There is no table yet.")
    return section


@cache
def load_vega() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed, which draws the figures of the page offline."""
    return vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]


def render_page(sections: list[ResultFolder]) -> str:
    """Return the page."""
    figures: list[dict[str, Any]] = []
    body = [render_side_by_side(sections, figures)] if len(sections) > 1 else []
    body += [render_section(section, f"folder-{i}", figures) for i, section in enumerate(sections)]
    links = "".join(f'<li><a href="#folder-{i}">{escape(s.folder)}</a></li>' for i, s in enumerate(sections))
    command = f"python -m experiments.report {shlex.join(str(s.folder) for s in sections)}"
    parts = {
        "title": f"laqjax: {escape(', '.join(short_names(sections)))}",
        "about": f"<code>{escape(command)}</code>. Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Figures: point at a mark "
        "to read its settings, drag to move, hold Shift and turn the wheel to zoom, double-click to see all again, click on "
        "a name of a legend to pick it out. Tables: click on a column title to sort.",
        "contents": f"<nav><ol>{links}</ol></nav>" if len(sections) > 1 else "",
        "body": "\n".join(body),
        "vega": load_vega(),
        "figures": json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], TEMPLATE.read_text())


def short_names(sections: list[ResultFolder]) -> list[str]:
    """Return a short name for each folder."""
    names = [section.folder.resolve().name for section in sections]
    return [name if names.count(name) == 1 else str(s.folder) for name, s in zip(names, sections, strict=True)]


def escape(value: Any) -> str:
    """Return a value as HTML text."""
    return html.escape(str(value))


def render_section(section: ResultFolder, name: str, figures: list[dict[str, Any]]) -> str:
    """Return the section of a folder: notices, how it was made, figures, tables."""
    kind = f"reproduce {section.asked.get('name')}" if section.kind == "methods" else section.kind
    lines = [f'<section id="{name}"><h2>{escape(kind)}: {escape(section.folder)}</h2>']
    lines += [f'<p class="notice">{escape(notice)}</p>' for notice in section.notices]
    lines.append(render_provenance(section))
    if section.tables:
        lines += [render_figure(figure, figures) for _, figure in drawing.build_figures(section.kind, section.tables)]
        for table, caption in SHOWN[section.kind].items():
            if table in section.tables:
                lines.append(render_table(select_columns(section.tables[table]), caption))
    return "\n".join([*lines, "</section>"])


def render_provenance(section: ResultFolder) -> str:
    """Return the command, the machine, the versions, and the settings."""
    ran = section.ran
    facts = {name: ran.get(name) for name in ("time", "device", "cores")}
    facts["seconds"] = ran.get("seconds") and f"{ran['seconds']:,.0f} of the last call"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in ran.get("versions", {}).items())
    again = "<p>The same command continues from these files; with another --out it starts again.</p>"
    again = "" if section.kind == "scaling" else again
    command = f"<pre>{escape(ran['command'])}</pre>" if "command" in ran else ""
    asked = {name: format_setting(value) for name, value in section.asked.items() if value not in (None, [], "")}
    settings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in asked.items())
    details = f"<details><summary>All {len(asked)} settings</summary><dl>{settings}</dl></details>" if asked else ""
    lines = "".join(f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value)
    return f"{command}{again}<dl>{lines}</dl>{details}"


def format_setting(value: Any) -> str:
    """Return a setting in at most 400 characters."""
    words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return words if len(words) <= 400 else f"{words[:400]} ..."


def render_figure(figure: style.Figure, figures: list[dict[str, Any]]) -> str:
    """Return the place of a figure, and append its specification to `figures`."""
    figures.append(style.to_spec(figure))
    note = f'<p class="dim">{escape(figure.note)}</p>' if figure.note else ""
    place = f'<div class="plot" data-figure="{len(figures) - 1}"></div>'
    return f"<h3>{escape(figure.title)}</h3>{note}{place}"


def select_columns(table: pl.DataFrame) -> pl.DataFrame:
    """Return the columns that are worth reading: those that differ, and the costs, the last target first."""
    names = table.columns
    if "seeds" in names:  # a summary
        costs = [f"{c}_{t}{end}" for t in results.target_labels(table)[::-1] for c in COSTS for end in ("", "_ci95")]
        names = [*results.setting_columns(table), "seeds", "reached", "diverged", *costs, "final_loss", "accuracy"]
        table = table.sort(costs[0], nulls_last=True, maintain_order=True)
    elif "heads_up" in names:  # the points of a federation, whose costs are in its summary
        names = [name for name in names if not COST_OF.fullmatch(name)]
    elif "cheapest in" in names:  # of a comparison: its bits are a cost, not the b of a setting
        table = table.rename({n: n.replace("bits", "bits up + down", 1) for n in names if re.match("bits( |_ci|$)", n)})
        names = table.columns
    kept = [name for name in names if table[name].null_count() < len(table)]
    same = results.setting_columns(table) if len(table) > 1 and {"seed", "seeds"} & set(table.columns) else []
    return table.select(n for n in kept if n not in same or table[n].n_unique() > 1)


def column_title(name: str) -> str:
    """Return the title of a column."""
    if found := COST_OF.fullmatch(name):
        what = {"bits": "bits up + down", "seconds": "simulated seconds"}.get(found[1], found[1])
        where = "at the end" if found[2] == "end" else f"to {found[2].replace('e-0', 'e-')}"
        name = f"{what} {where}{found[3] or ''}"
    return results.COLUMN_TITLES.get(name, name.replace("_ci95", " ±").replace("_", " "))


def render_table(table: pl.DataFrame, caption: str) -> str:
    """Return a table that sorts and scrolls."""
    kinds = [' class="n"' if kind.is_numeric() else "" for kind in table.dtypes]
    names = [f'<button type="button">{escape(column_title(name))}</button>' for name in table.columns]
    heads = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    rows = "".join(f"<tr>{''.join(map(render_cell, row, kinds))}</tr>\n" for row in table[:ROWS].iter_rows())
    left = f", the first {ROWS:,} of {len(table):,} rows; all are in the folder" if len(table) > ROWS else ""
    body = f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>'
    return f'<h3>{escape(caption)}</h3><p class="dim">{len(table):,} rows{left}</p><div class="scroll">{body}</div>'


def render_cell(value: Any, kind: str) -> str:
    """Return a cell; a number shows four digits, and its attribute has all of them."""
    if value is None or not kind or not math.isfinite(value):
        return f"<td{kind}>{'' if value is None else escape(value)}</td>"
    large = abs(value) >= 9999.5
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if large else f"{value:.4g}"
    shown = f"{value:.3e}" if abs(value) >= 1e12 else shown
    return f'<td class="n" data-v="{value!r}">{shown}</td>'


def render_side_by_side(sections: list[ResultFolder], figures: list[dict[str, Any]]) -> str:
    """Return the curves of all folders in one figure, and the settings that differ."""
    folders = short_names(sections)
    lines = ["<section><h2>Side by side</h2>"]
    parts: list[pl.DataFrame] = []
    looks: dict[str, style.Look] = {}
    numbers: dict[str, int] = {}
    titles, problems = set(), set()
    for number, (folder, section) in enumerate(zip(folders, sections, strict=True)):
        if "curves" not in section.tables:
            continue
        names = choose_names(section, max(SIDE_BY_SIDE // len(sections), 3))
        for name in dict.fromkeys(names.values()):
            place = numbers.setdefault(name, len(numbers)) % len(style.COLORS)
            looks[f"{folder}: {name}"] = style.COLORS[place], style.DASHES[number % len(style.DASHES)]
        named = {point: f"{folder}: {name}" for point, name in names.items()}
        rows = drawing.thin_curves(section.tables["curves"], named, "residual", len(sections))
        parts.append(rows.with_columns(line=pl.format("{} {}", pl.lit(folder), "line")))
        titles.add(drawing.residual_title(section.tables["points"]))
        problems.add(json.dumps([section.asked.get(name) for name in ("dataset", "problem")]))
    if len(problems) > 1:
        notice = "The folders have other data or another problem, so no figure compares them."
        lines.append(f'<p class="notice">{notice}</p>')
    elif parts:
        title = titles.pop() if len(titles) == 1 else "f - f*, or training loss f where f* is not known"
        rows = pl.concat(parts, how="diagonal_relaxed")
        chart = drawing.build_curves(rows, "residual", title, looks, drawing.COST_AXES)
        note = "A color for each setting, a dash for each folder."
        if chart is not None:
            lines.append(render_figure(style.Figure(f"{title} against its costs", chart, note), figures))
    asked = [{"experiment": s.kind} | {n: format_setting(v) for n, v in s.asked.items()} for s in sections]
    table = pl.DataFrame(asked, infer_schema_length=None).fill_null("")
    differ = table.select(pl.Series("folder", folders), *(column for column in table if column.n_unique() > 1))
    return "\n".join([*lines, render_table(differ, "Settings that differ"), "</section>"])


def choose_names(section: ResultFolder, number: int) -> dict[int, str]:
    """Return the points of a folder whose curves are drawn beside those of others, with the names of their settings."""
    tables = section.tables
    if section.kind == "compare":
        words = drawing.method_points(tables)
        order = list(words)
    else:
        words = ranking.point_labels(tables["points"], tables["summary"])
        few = "algorithm" not in tables["summary"].columns or len(tables["summary"]) <= number
        order = (tables["summary"] if few else ranking.rank_all(tables["summary"]))["point"]
    kept = list(dict.fromkeys(words[point] for point in order))[:number]
    return {point: name for point, name in words.items() if name in kept}
