"""Write one HTML page of result folders: interactive figures and sortable tables.

    python -m experiments.report results/sweep               the page is results/sweep/report.html
    python -m experiments.report results/laq-logistic results/mine --out both.html

The page holds all that it shows, and opens from disk without a network. Several folders stand in sections of their own, below
one figure with the curves of all. It is made from the tables of the folders alone, which are not changed; of a command that
has not ended it shows the batches that are done.
"""

from pathlib import Path

from rich.console import Console

from experiments.figures import report_page
from experiments.harness import cli, results, storage


def main(folders: cli.Folders, /, out: Path | None = None) -> None:
    """Write the page.

    Args:
        folders: That experiments wrote, as results/sweep.
        out: The page; report.html in the folder by default, of several folders in results.
    """
    if not folders:
        raise ValueError("no folder given: expected one or more that an experiment wrote, as results/sweep")
    sections = [report_page.read(folder) for folder in dict.fromkeys(folders)]
    out = out or (folders[0] if len(sections) == 1 else Path("results")) / "report.html"
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: expected the name of a page, as {out / 'report.html'}")
    storage.write_text(out, report_page.render_page(sections))
    notices = [f"{s.folder}: {notice}" for s in sections for notice in s.notices]
    results.report_result(
        Console(), out, {}, notices, folders=[str(s.folder) for s in sections], bytes=out.stat().st_size
    )


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
