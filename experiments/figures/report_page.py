"""One HTML page of result folders: figures with hover and zoom, tables that sort.

    python -m experiments.report results/sweep               the page is results/sweep/report.html
    python -m experiments.report results/laq-logistic results/mine --out both.html

The page holds all that it shows, and opens from disk without a network. Several folders stand in sections of their own, below
one figure with the curves of all. It is made from the tables of the folders alone, which are not changed; of a command that
has not ended it shows the batches that are done.
"""

import html
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from plotly.offline import get_plotlyjs

from experiments.figures import report_figures
from experiments.figures.report_figures import Figure
from experiments.harness import results, storage

# the tables of each kind of folder, the first what its figures are drawn from
TABLES = {
    "sweep": ("summary", "points", "curves"),
    "methods": ("summary", "points", "curves", "table"),
    "federated": ("summary", "points", "curves"),
    "heterogeneity": ("heterogeneity",),
    "compare": ("best", "tried", "report/summary", "report/points", "report/curves"),
    "tune": ("trials",),
    "scaling": ("cost", "goals", "bytes", "memory", "model"),
}
SHOWN = {  # of these, those that stand on the page, with their captions
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
POINTS = 60_000  # of all curves on the page


@dataclass
class ResultFolder:
    """What a folder holds: the kind of its experiment, what it was asked, what it says of its run, and its tables."""

    folder: Path
    kind: str
    asked: dict[str, Any]
    ran: dict[str, Any]
    tables: dict[str, pl.DataFrame] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)


def read(folder: Path) -> ResultFolder:
    """A result folder; ValueError when it is none, FileNotFoundError when it is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: expected the --out folder of an experiment")
    asked = storage.read_identity(folder) if (folder / "identity.json").exists() else {}
    if asked.get("target_accuracy"):  # it replaces the targets of the loss, whose default stands in the file
        asked.pop("target", None)
    kind = asked.pop("experiment", "scaling" if (folder / "goals.parquet").exists() else None)
    if kind not in TABLES:
        raise ValueError(f"{folder} holds no results: expected what an experiment leaves, as results/sweep")
    run = folder / ("best.json" if kind == "tune" else "run.json")
    section = ResultFolder(folder, kind, asked, storage.read_json(run) if run.exists() else {})
    for name in TABLES[kind]:
        if (path := folder / f"{name}.parquet").exists():
            try:
                section.tables[name.removeprefix("report/")] = pl.read_parquet(path)
            except (OSError, pl.exceptions.PolarsError) as error:
                raise ValueError(f"{path} is damaged ({error}); run its command again") from None
    if not section.ran:
        parts = sorted(str(path)[: -len("points.parquet")] for path in folder.glob("batches/*-points.parquet"))
        if parts and TABLES[kind][0] == "summary":
            section.tables = results.concat_tables(parts)
        done = f"{len(section.tables['points'])} points" if "points" in section.tables else "what there is"
        section.notices.append(f"Not finished: the tables show {done}. The same command goes on from there.")
    elif lacking := [name for name in TABLES[kind] if name.removeprefix("report/") not in section.tables]:
        raise ValueError(f"{folder / lacking[0]}.parquet is missing; run its command again")
    if "summary" in section.tables and kind in ("sweep", "methods"):
        section.notices += results.unreached_notice(section.tables["summary"])
    if TABLES[kind][0] not in section.tables:
        section.tables = {}
        section.notices.append("There is no table yet.")
    return section


def render_page(sections: list[ResultFolder]) -> str:
    """The page."""
    figures: list[Figure] = []
    each = POINTS // len(sections) // (2 if len(sections) > 1 else 1)
    body = [render_side_by_side(sections, each, figures)] if len(sections) > 1 else []
    body += [render_section(section, f"folder-{i}", each, figures) for i, section in enumerate(sections)]
    links = "".join(f'<li><a href="#folder-{i}">{escape(s.folder)}</a></li>' for i, s in enumerate(sections))
    parts = {
        "title": f"laqjax: {escape(', '.join(short_names(sections)))}",
        "about": f"<code>python -m experiments.report {escape(shlex.join(str(s.folder) for s in sections))}</code>. Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC. Figures: drag to zoom, double-click to see all again, click "
        "on a name to hide it, double-click to see it alone. Tables: click on a head to sort.",
        "contents": f"<nav><ol>{links}</ol></nav>" if len(sections) > 1 else "",
        "body": "\n".join(body),
        "plotly": get_plotlyjs(),
        "figures": json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report.html").read_text()
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


def short_names(sections: list[ResultFolder]) -> list[str]:
    """A short name of each folder."""
    names = [section.folder.resolve().name for section in sections]
    return [name if names.count(name) == 1 else str(s.folder) for name, s in zip(names, sections, strict=True)]


def escape(value: Any) -> str:
    """For HTML."""
    return html.escape(str(value))


def render_section(section: ResultFolder, name: str, points: int, figures: list[Figure]) -> str:
    """A folder: notices, how it was made, figures, tables."""
    kind = f"reproduce {section.asked.get('name')}" if section.kind == "methods" else section.kind
    lines = [f'<section id="{name}"><h2>{escape(kind)}: {escape(section.folder)}</h2>']
    lines += [f'<p class="notice">{escape(notice)}</p>' for notice in section.notices]
    lines.append(render_provenance(section))
    if section.tables:
        for heading, note, panels in report_figures.of(section.kind, section.tables, points):
            lines.append(render_figure(heading, note, panels, figures))
        for table, caption in SHOWN[section.kind].items():
            if table in section.tables:
                lines.append(render_table(select_columns(section.tables[table]), caption))
    return "\n".join([*lines, "</section>"])


def render_provenance(section: ResultFolder) -> str:
    """The command, how to run it again, the versions, and the settings."""
    ran = section.ran
    facts = {name: ran.get(name) for name in ("time", "device", "cores")}
    facts["seconds"] = ran.get("seconds") and f"{ran['seconds']:,.0f} of the last call"
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in ran.get("versions", {}).items())
    lines = [f"<dt>{name}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value]
    again = (
        ""
        if section.kind == "scaling"
        else "<p>The same command goes on from what is there; with another --out it begins anew.</p>"
    )
    command = f"<pre>{escape(ran['command'])}</pre>" if "command" in ran else ""
    asked = {name: format_setting(value) for name, value in section.asked.items() if value not in (None, [], "")}
    settings = "".join(f"<dt>{escape(name)}</dt><dd>{escape(truncate(value))}</dd>" for name, value in asked.items())
    details = f"<details><summary>All {len(asked)} settings</summary><dl>{settings}</dl></details>" if asked else ""
    return f"{command}{again}<dl>{''.join(lines)}</dl>{details}"


def format_setting(value: Any) -> str:
    """A setting."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def truncate(words: str) -> str:
    """Of a long one the beginning."""
    return words if len(words) <= 400 else f"{words[:400]} ..."


def render_figure(heading: str, note: str, panels: list[Figure], figures: list[Figure]) -> str:
    """Places for the panels of a figure, which are appended to `figures`."""
    boxes = []
    for panel in panels:
        names = [escape(view["name"]) for view in panel.get("views", [])]
        buttons = "".join(f'<button type="button">{name}</button>' for name in names) if len(names) > 1 else ""
        views = f'<div class="views" role="group">{buttons}</div>'
        boxes.append(f'<div data-figure="{len(figures)}">{views}<div class="plot"></div></div>')
        figures.append(panel)
    inner = f'<div class="panels">{"".join(boxes)}</div>' if len(boxes) > 1 else "".join(boxes)
    return f'<h3>{escape(heading)}</h3><p class="dim">{escape(note)}</p>{inner}'


def select_columns(table: pl.DataFrame) -> pl.DataFrame:
    """The columns that are worth reading: what differs, and the costs, at the last target first."""
    names = table.columns
    if "seeds" in names:  # a summary
        costs = [f"{c}_{t}{end}" for t in results.target_labels(table)[::-1] for c in COSTS for end in ("", "_ci95")]
        names = [*results.setting_columns(table), "seeds", "reached", "diverged", *costs, "final_loss", "accuracy"]
        table = table.sort(costs[0], nulls_last=True, maintain_order=True)
    elif "heads_up" in names:  # the points of a federation, whose costs stand in its summary
        names = [name for name in names if not COST_OF.fullmatch(name)]
    elif "cheapest in" in names:  # of a comparison: its bits are a cost, not the b of a setting
        table = table.rename({n: n.replace("bits", "bits up + down", 1) for n in names if re.match("bits( |_ci|$)", n)})
        names = table.columns
    kept = [name for name in names if table[name].null_count() < len(table)]
    same = results.setting_columns(table) if len(table) > 1 and {"seed", "seeds"} & set(table.columns) else []
    return table.select(n for n in kept if n not in same or table[n].n_unique() > 1)


def column_title(name: str) -> str:
    """Of a column, in words."""
    if found := COST_OF.fullmatch(name):
        what = {"bits": "bits up + down", "seconds": "simulated seconds"}.get(found[1], found[1])
        where = "at the end" if found[2] == "end" else f"to {found[2].replace('e-0', 'e-')}"
        name = f"{what} {where}{found[3] or ''}"
    return results.COLUMN_TITLES.get(name, name.replace("_ci95", " ±").replace("_", " "))


def render_table(table: pl.DataFrame, caption: str) -> str:
    """A table that sorts; a number in it shows four digits, and holds all of them."""
    kinds = [' class="n"' if kind.is_numeric() else "" for kind in table.dtypes]
    names = [f'<button type="button">{escape(column_title(name))}</button>' for name in table.columns]
    heads = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True))
    rows = "".join(f"<tr>{''.join(map(render_cell, row, kinds))}</tr>\n" for row in table[:ROWS].iter_rows())
    left = f", the first {ROWS:,} of {len(table):,} rows; all are in the folder" if len(table) > ROWS else ""
    body = f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>\n{rows}</tbody></table>'
    return f'<h3>{escape(caption)}</h3><p class="dim">{len(table):,} rows{left}</p><div class="scroll">{body}</div>'


def render_cell(value: Any, kind: str) -> str:
    """A number is whole in its attribute."""
    if value is None or not kind or not math.isfinite(value):
        return f"<td{kind}>{'' if value is None else escape(value)}</td>"
    large = abs(value) >= 9999.5
    shown = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if large else f"{value:.4g}"
    shown = f"{value:.3e}" if abs(value) >= 1e12 else shown
    return f'<td class="n" data-v="{value!r}">{shown}</td>'


def render_side_by_side(sections: list[ResultFolder], points: int, figures: list[Figure]) -> str:
    """The curves of all folders in one figure, and the settings that differ."""
    names = short_names(sections)
    found = {name: (s.kind, s.tables) for name, s in zip(names, sections, strict=True) if "curves" in s.tables}
    lines = ["<section><h2>Side by side</h2>"]
    for heading, note, panels in report_figures.together(found, points):
        lines.append(render_figure(heading, note, panels, figures))
    asked = [
        {"experiment": s.kind} | {name: format_setting(value) or None for name, value in s.asked.items()}
        for s in sections
    ]
    every = dict.fromkeys(setting for one in asked for setting in one)
    differ = [setting for setting in every if len({one.get(setting) for one in asked}) > 1]
    rows = [
        {"folder": name} | {n: truncate(one.get(n) or "") for n in differ}
        for name, one in zip(names, asked, strict=True)
    ]
    return "\n".join([*lines, render_table(pl.DataFrame(rows), "Settings that differ"), "</section>"])
