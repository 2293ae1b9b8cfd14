"""The HTML page: it holds the numbers of the tables, asks nothing of any network, and draws and sorts in a browser."""

import html
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from experiments import report, sweep
from experiments.figures import drawing, ranking, report_page, style

DATA = "synthetic-logistic?workers=4&samples=30&features=10"
TASK = ["--dataset", DATA, "--problem", "logistic", "--workers", "4", "--compute-ms", "1", "--target", "10", "5"]
GRID = ["-b", "2", "4", "-C", "5", "50", "-D", "1", "--lr", "0.05", "--seeds", "0", "1", "--rounds", "60"]
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
VEGA = "/* vega */"  # the script itself takes seconds to build
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=20000 --window-size=500,1500 --dump-dom"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of eight points."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(drawing, "draw_figures", lambda folder: None)
        sweep.main([*TASK, *GRID, "--out", "swept"])
    return home / "swept"


@pytest.fixture(scope="module")
def page(swept: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of that sweep beside another folder of it, whose name would be HTML."""
    other = tmp_path_factory.mktemp("other") / "a <script>&"
    shutil.copytree(swept, other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "load_vega", lambda: VEGA)
        return report_page.render_page([report_page.read(swept), report_page.read(other)])


def figures(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def tables(page: str) -> dict[str, list[dict[str, str]]]:
    """The rows under each caption, as text; of a number all digits."""
    found = {}
    for caption, table in re.findall(
        r"<h3>([^<]*)</h3><p[^>]*>[^<]*</p><div class=\"scroll\">(.*?)</table>", page, re.DOTALL
    ):
        heads = [html.unescape(head) for head in re.findall(r'<button type="button">([^<]*)</button></th>', table)]
        lines = re.findall(r"<tr>(.*?)</tr>", table.partition("<tbody>")[2], re.DOTALL)
        cells = [re.findall(r'<td(?: class="n")?(?: data-v="([^"]*)")?>([^<]*)</td>', line) for line in lines]
        found[caption] = [dict(zip(heads, (v or html.unescape(t) for v, t in row), strict=True)) for row in cells]
    return found


def rows_of(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of all data of a figure."""
    return [row for rows in figure["datasets"].values() for row in rows]


def test_nothing_is_loaded(page: str) -> None:
    assert VEGA in page
    assert not re.search(r"https?://|url\(|@import|<script[^>]*src|<link(?! rel=\"icon\" href=\"data:,\")", page)
    assert "default-src 'none'" in page
    assert "a <script>&" not in page
    assert "a &lt;script&gt;&amp;" in page


def test_the_curves_are_those_of_the_tables(swept: Path, page: str) -> None:
    curves, points, summary = (pl.read_parquet(swept / f"{name}.parquet") for name in ("curves", "points", "summary"))
    words = ranking.point_labels(points, summary)
    together, figure = [f for f in figures(page) if "residual" in rows_of(f)[0]][:2]
    assert {row["name"].split(": ")[0] for row in rows_of(together)} == {"swept", "a <script>&"}
    encodings = [panel["layer"][0]["encoding"] for panel in figure["concat"]]
    assert [encoding["x"]["title"] for encoding in encodings] == list(drawing.COST_AXES.values())
    assert {encoding["y"]["title"] for encoding in encodings} == {"f - f*"}
    assert encodings[0]["color"]["scale"]["domain"] == list(dict.fromkeys(words.values()))
    for point, name in words.items():
        mine = [row for row in rows_of(figure) if row["line"] == point]
        known = curves.filter(pl.col("point") == point, pl.col("round") > 0)
        assert {row["name"] for row in mine} == {name}
        for column in ("residual", *drawing.COST_AXES):
            assert [row[column] for row in mine] == known[column].to_list()


def test_the_heat_map_and_the_tables_hold_all(swept: Path, page: str) -> None:
    summary = pl.read_parquet(swept / "summary.parquet")
    heat = next(rows_of(figure) for figure in figures(page) if "mbit" in rows_of(figure)[0])
    cheapest = {(row["bits"], row["max_silence"]): row["bits_up_5"] / 1e6 for row in summary.iter_rows(named=True)}
    assert {(row["b"], row["C"]): row["mbit"] for row in heat} == pytest.approx(cheapest)
    assert [row["best"] for row in heat].count(True) == 1
    rows = tables(page)["Settings"]
    assert len(rows) == len(summary) == 4
    for row, known in zip(rows, summary.sort("bits_up_5").iter_rows(named=True), strict=True):
        assert (int(row["b"]), int(row["C"])) == (known["bits"], known["max_silence"])
        names = {"bits up to 5": "bits_up_5", "bits up to 5 ±": "bits_up_5_ci95", "final loss": "final_loss"}
        for head, name in (names | {"rounds to 10": "rounds_10"}).items():
            assert float(row[head]) == known[name]
    assert [row["folder"] for row in tables(page)["Settings that differ"]] == ["swept", "a <script>&"]


def test_many_points_are_thinned_and_it_says_so(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "load_vega", lambda: VEGA)
    monkeypatch.setattr(drawing, "ROWS", 160)
    monkeypatch.setattr(report_page, "ROWS", 3)
    thin = report_page.render_page([report_page.read(swept)])
    figure = next(figure for figure in figures(thin) if "residual" in rows_of(figure)[0])
    lengths = Counter(row["line"] for row in rows_of(figure))
    longest = pl.read_parquet(swept / "curves.parquet").filter(pl.col("round") > 0).group_by("point").len()["len"].max()
    assert max(lengths.values()) <= 20 < longest  # pyright: ignore[reportOperatorIssue]
    assert f"At most {max(lengths.values())} points of a curve" in thin
    assert "the first 3 of 4 rows" in thin
    assert len(tables(thin)["Settings"]) == 3


def test_an_unfinished_folder_shows_what_is_done(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_page, "load_vega", lambda: VEGA)
    shutil.copytree(swept, tmp_path / "half")
    for name in ("run.json", "summary.parquet", "points.parquet", "curves.parquet"):
        (tmp_path / "half" / name).unlink()
    page = report_page.render_page([report_page.read(tmp_path / "half")])
    assert "Not finished: the tables show 8 points." in page
    assert len(tables(page)["Settings"]) == 4
    shutil.rmtree(tmp_path / "half" / "batches")
    page = report_page.render_page([report_page.read(tmp_path / "half")])
    assert "There is no table yet." in page
    assert figures(page) == []


def test_a_target_of_accuracy_replaces_the_others(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path / "scored")
    identity = tmp_path / "scored" / "identity.json"
    asked = json.loads(identity.read_text())
    assert "target" in report_page.read(tmp_path / "scored").asked
    identity.write_text(json.dumps(asked | {"target_accuracy": [0.9]}))
    asked = report_page.read(tmp_path / "scored").asked
    assert asked["target_accuracy"] == [0.9]
    assert "target" not in asked


def test_what_is_no_result_folder_is_said(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "load_vega", lambda: VEGA)
    (tmp_path / "empty").mkdir()
    shutil.copytree(swept, tmp_path / "damaged")
    (tmp_path / "damaged" / "curves.parquet").write_bytes(b"PAR1")
    for name, said in (
        ("none", "is missing"),
        ("empty", "must be a folder that an experiment wrote"),
        ("damaged", "curves.parquet is damaged"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=said):
            report.main((tmp_path / name,))
    with pytest.raises(ValueError, match="no folder given"):
        report.main(())
    with pytest.raises(IsADirectoryError, match="must be the name of a page"):
        report.main((swept,), out=tmp_path)
    report.main((swept,), out=tmp_path / "page.html")
    assert "page.html" in capsys.readouterr().out
    assert (tmp_path / "page.html").stat().st_size < 5e5  # without the script, which has 0.9 MB


def test_the_other_experiments_have_their_figures() -> None:
    """Tables as tune and heterogeneity leave them, drawn as they stand."""
    trials = pl.DataFrame(
        {"trial": [0, 1, 2], "bits": [4, 4, 2], "bits_up": [5.0, None, 3.0], "goal": "f <=", "target": 0.1}
    )
    ((name, figure),) = drawing.build_figures("tune", {"trials": trials})
    assert (name, figure.title) == ("trials", "Bits up over the trials")
    rows = rows_of(style.to_spec(figure))
    drawn = {word: [row["bits_up"] for row in rows if row["name"] == word] for word in {row["name"] for row in rows}}
    assert drawn == {
        "reached on every seed": [5.0, 3.0],
        "fewest so far": [5.0, 3.0, 3.0],
        "the first trial": [5.0, 5.0],
    }
    assert rows[0]["setting"] == "b = 4"
    table = {"axis": ["decades of L_m", "Dirichlet alpha"], "value": [1.0, 0.1], "laq saves": [0.8, 0.7], "lag_wk saves": [0.5, math.nan]}  # fmt: skip
    ((_, figure),) = drawing.build_figures("heterogeneity", {"heterogeneity": pl.DataFrame(table)})
    drawn = [(row["name"], row["value"], row["saves"]) for row in rows_of(style.to_spec(figure))]
    assert sorted(drawn) == [("lag_wk", 1.0, 50.0), ("laq", 0.1, 70.0), ("laq", 1.0, 80.0)]


# in the test's copy: what the browser drew, what it loaded, and a column before and after two clicks on its head
PROBE = """<script>
drawn.then(() => {
  const table = [...document.querySelectorAll("table.sortable")].find(t => t.textContent.includes("bits up to 5"));
  const head = [...table.querySelectorAll("th")].find(th => th.textContent === "bits up to 5");
  const column = () => [...table.tBodies[0].rows].map(row => Number(row.cells[head.cellIndex].dataset.v));
  const found = {before: column(), plots: [...document.querySelectorAll(".plot")].map(p => p.querySelectorAll("svg.marks").length)};
  head.firstChild.click();
  found.up = column();
  head.firstChild.click();
  found.down = column();
  found.wide = [...document.querySelectorAll(".plot")].filter(p => p.scrollWidth > p.clientWidth).length;
  found.page = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.links = document.querySelectorAll('.plot a[href^="http"]').length;
  const boxes = [...document.querySelectorAll(".scroll")];
  found.cut = boxes.map(box => box.scrollWidth > box.clientWidth);
  found.hints = boxes.map(box => getComputedStyle(box.previousElementSibling, "::after").content.includes("scroll sideways"));
  found.bars = boxes.map(box => box.offsetHeight - box.clientHeight > 8);
  found.loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
def test_in_a_browser(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page.replace("</body>", PROBE).replace(VEGA, report_page.load_vega()))
    words = [str(BROWSER), *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*words, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    shown = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    found = json.loads(html.unescape(shown[1]))
    assert found["plots"]
    assert all(found["plots"])
    numbers = sorted(found["before"])
    assert numbers != sorted(numbers, key=str)
    assert (found["up"], found["down"]) == (numbers, numbers[::-1])
    assert (found["wide"], found["page"], found["links"]) == (0, 0, 0)  # all figures have shrunk to the window
    assert any(found["cut"])
    assert found["cut"] == found["hints"] == found["bars"]
    assert found["loaded"] == []
