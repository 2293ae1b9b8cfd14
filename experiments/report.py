"""Write one HTML page of result folders: interactive figures and sortable tables.

    python -m experiments.report results/sweep               the page is results/sweep/report.html
    python -m experiments.report results/laq-logistic results/mine --out both.html

The page is one file that opens from disk without a network. Several folders have a section each, below one figure with the
curves of all. The page comes from the tables of the folders alone, which are not changed. For a command that has not ended
it shows the batches that are done.
"""

from pathlib import Path

from rich.console import Console

from experiments.figures import report_page
from experiments.harness import cli, results, storage


def main(folders: cli.Folders, /, out: Path | None = None) -> None:
    """Write the page.

    Args:
        folders: Result folders of experiments, such as results/sweep.
        out: Name of the page; by default report.html in the folder, or in results for several folders.
    """
    if not folders:
        raise ValueError("no folder given: must be one or more result folders of experiments, such as results/sweep")
    sections = [report_page.read(folder) for folder in dict.fromkeys(folders)]
    out = out or (folders[0] if len(sections) == 1 else Path("results")) / "report.html"
    if out.is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: must be the name of a page, such as {out / 'report.html'}")
    storage.write_text(out, report_page.render_page(sections))
    notices = [f"{s.folder}: {notice}" for s in sections for notice in s.notices]
    results.report_result(
        Console(), out, {}, notices, folders=[str(s.folder) for s in sections], bytes=out.stat().st_size
    )


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli(main, given, __doc__)
