"""Records and tables of points: rounds, uploads, bits and seconds to their targets, curves, and masks of uploads.

Row k describes the model after k rounds and all messages until then. The loss of a round is that of the model at its
beginning. The loss of a minibatch method on all rows and the test accuracy are known at evaluations only.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.harness import cli, storage

COST_COLUMNS = ("rounds", "uploads", "bits_up", "bits_down", "bits", "seconds")
TABLES = ("curves", "masks", "points")  # points last: a batch is done when its points are there


@dataclass(frozen=True)
class NetworkModel:
    """Link of each worker, for the simulated seconds. A round lasts as long as its slowest message.

    All bits that the server sends in a round count as one message.
    """

    uplink_mbps: float = 10.0
    """Rate from a worker to the server, in Mbit/s."""
    downlink_mbps: float = 100.0
    """Rate from the server to a worker, in Mbit/s."""
    latency_ms: float = 20.0
    """Latency of one direction, in milliseconds."""
    compute_ms: float | None = None
    """Time of one gradient of a worker, in milliseconds. Default: measured on this machine."""

    def check(self) -> None:
        """Raise ValueError for a rate that is not positive, or a negative time."""
        for name in ("uplink_mbps", "downlink_mbps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must be a number > 0")
        for name in ("latency_ms", "compute_ms"):
            if not (getattr(self, name) is None or getattr(self, name) >= 0):
                raise ValueError(f"{name} = {getattr(self, name)}: must be a number >= 0")


DEFAULT_NETWORK = NetworkModel()


@dataclass(frozen=True)
class Targets:
    """Residuals f - f* (f if f* is not known) or accuracies at which costs are read; a point ends at the last."""

    values: tuple[float, ...] = ()
    accuracy: bool = False

    def __post_init__(self) -> None:
        name, order = ("target_accuracy", "lowest") if self.accuracy else ("target", "largest")
        most, ordered = 1 if self.accuracy else np.inf, sorted(self.values, reverse=not self.accuracy)
        if not all(0 < t <= most for t in self.values) or list(self.values) != ordered:
            kind = "shares above 0 and at most 1 (90 % is 0.9)" if self.accuracy else "residuals > 0"
            raise ValueError(f"{name} = {self.values}: must be {kind}, the {order} first")
        if len({f"{t:g}" for t in self.values}) < len(self.values):  # the column names show six
            raise ValueError(f"{name} = {self.values}: must differ in the first six digits")

    def find_reached(self, record: "PointHistory", target: float) -> np.ndarray:
        """Return which models are within a target, [K + 1, S]; unknown values are not."""
        return record.accuracy >= target - 1e-6 if self.accuracy else record.residual <= target

    def label(self, f_star: float | None) -> str:
        """Return the text before the number of a target."""
        return "test accuracy >=" if self.accuracy else "f <=" if f_star is None else "f - f* <="


@dataclass
class PointHistory:
    """Record of S points. Row k of loss and accuracy belongs to the model after k rounds, NaN if unknown."""

    f_star: float | None
    loss: np.ndarray  # [K + 1, S]
    accuracy: np.ndarray  # [K + 1, S]
    sent: np.ndarray  # [K, S, M]
    bits_up: np.ndarray  # [K, S, M]
    bits_down: np.ndarray  # [K, S]
    gradients: np.ndarray  # [K, S] largest number of gradients of a worker
    rounds_done: np.ndarray  # [S]
    diverged_at: np.ndarray  # [S] first round without a finite loss, or -1

    @classmethod
    def empty(cls, rounds: int, points: int, workers: int, f_star: float | None) -> "PointHistory":
        """Create the record of points before round 0."""
        loss, accuracy = np.full((2, rounds + 1, points), np.nan)
        sent, bits_up = np.zeros((rounds, points, workers), bool), np.zeros((rounds, points, workers), np.int64)
        bits_down, gradients = np.zeros((2, rounds, points), np.int64)
        done, diverged = np.zeros(points, int), np.full(points, -1)
        return cls(f_star, loss, accuracy, sent, bits_up, bits_down, gradients, done, diverged)

    @property
    def residual(self) -> np.ndarray:
        """The residual f - f*, or f if f* is not known."""
        return self.loss - (self.f_star or 0.0)

    def add(self, info: Any, here: np.ndarray, place: np.ndarray, with_loss: bool = True) -> None:
        """Record a chunk of rounds of the points `here`, none of which has diverged, in the slots `place` of a batch.

        Without `with_loss` the losses are those of minibatches, and only show whether a point diverged.
        """
        began, count = self.rounds_done[here], len(info.loss)
        rows = began + np.arange(count)[:, None]
        loss = info.loss[:, place]
        broken = ~np.isfinite(loss)
        self.diverged_at[here] = np.where(broken.any(axis=0), began + broken.argmax(axis=0), -1)
        if with_loss:
            self.loss[rows, here] = loss
        self.sent[rows, here] = info.sent[:, place]
        self.bits_up[rows, here] = info.bits_up[:, place]
        self.bits_down[rows, here] = info.bits_down[:, place]
        self.gradients[rows, here] = info.extra["gradients"].max(axis=2)[:, place]
        self.rounds_done[here] = began + count

    def _arrays(self) -> list[np.ndarray]:
        return [self.loss, self.accuracy, self.sent, self.bits_up, self.bits_down, self.gradients]

    def to_arrays(self) -> list[np.ndarray]:
        """Return the completed rounds as arrays for a file; `restore` is the inverse."""
        unused = len(self.sent) - self.rounds_done.max()
        return [*(a[: len(a) - unused] for a in self._arrays()), self.rounds_done, self.diverged_at]

    def restore(self, kept: Sequence[np.ndarray]) -> None:
        """Take over the arrays of `to_arrays`."""
        for mine, theirs in zip(self._arrays(), kept, strict=False):
            mine[: len(theirs)] = theirs
        self.rounds_done, self.diverged_at = (np.array(a) for a in kept[-2:])

    def cumulative_costs(self, link: NetworkModel, compute_ms: float) -> dict[str, np.ndarray]:
        """Return all costs until the model of row k, [K + 1, S]."""
        slowest = self.bits_up.max(axis=2) / (link.uplink_mbps * 1e6) + link.latency_ms / 1e3
        seconds = np.where(self.sent.any(axis=2), slowest, 0) + self.bits_down / (link.downlink_mbps * 1e6)
        each = {
            "uploads": self.sent.sum(axis=2),
            "bits_up": self.bits_up.sum(axis=2, dtype=np.int64),
            "bits_down": self.bits_down,
            "bits": self.bits_up.sum(axis=2, dtype=np.int64) + self.bits_down,
            "seconds": seconds + (compute_ms * self.gradients + link.latency_ms) / 1e3,
        }
        spent = {name: np.concatenate([0 * values[:1], np.cumsum(values, axis=0)]) for name, values in each.items()}
        return {"rounds": np.broadcast_to(np.arange(len(self.loss))[:, None], self.loss.shape), **spent}


def build_tables(
    labels: Sequence[dict[str, Any]], record: PointHistory, targets: Targets, spent: Any, keep: int
) -> dict[str, Any]:
    """Return curves of about `keep` rows up to the last target, masks of all rounds, and one row per point."""
    rows, curves, masks = [], [], []
    ends = [f"{t:g}" for t in targets.values]
    measures = {"loss": record.loss, "residual": record.residual, "accuracy": record.accuracy}
    known = np.isfinite(record.loss) | np.isfinite(record.accuracy)
    for i, label in enumerate(labels):
        lost = bool(record.diverged_at[i] >= 0)
        end = int(record.diverged_at[i] if lost else record.rounds_done[i])
        met = [np.flatnonzero(targets.find_reached(record, t)[: end + 1, i]) for t in targets.values]
        at = [int(found[0]) if len(found) else None for found in met]
        last = at[-1] if at else None
        row = dict(label) | {"f_star": record.f_star, "goal": targets.label(record.f_star)}
        measured = (record.accuracy if targets.accuracy else record.loss)[: end + 1, i]
        every = int(np.diff(np.flatnonzero(np.isfinite(measured))).max(initial=1))
        row |= {"diverged": lost, "reached": last is not None, "ended": end, "every": every}
        for t, k in zip([*ends, "end"], [*at, end], strict=True):
            row |= {f"{name}_{t}": None if k is None else spent[name][k, i].item() for name in COST_COLUMNS}
        finite = np.flatnonzero(np.isfinite(record.loss[: end + 1, i]))
        row["final_loss"] = float(record.loss[finite[-1], i]) if len(finite) else None
        scored = np.flatnonzero(np.isfinite(record.accuracy[: end + 1, i]))
        row["accuracy"] = float(record.accuracy[scored[-1], i]) if len(scored) and not lost else None
        rows.append(row)
        shown = np.flatnonzero(known[: (end if last is None else last) + 1, i])
        shown = shown[thin_indices(len(shown), keep)]
        columns = {"point": np.full(len(shown), label["point"]), "round": shown}
        columns |= {name: v[shown, i] for name, v in (spent | measures).items() if name != "rounds"}
        curves.append(pl.DataFrame(columns))
        sent = np.packbits(record.sent[:end, i]).tobytes()
        masks.append({"point": label["point"], "rounds": end, "workers": record.sent.shape[2], "sent": sent})
    kinds: Any = {f"{name}_{t}": pl.Int64 for name in COST_COLUMNS[:-1] for t in (*ends, "end")}
    kinds |= dict.fromkeys((*(f"seconds_{t}" for t in (*ends, "end")), "f_star", "final_loss", "accuracy"), pl.Float64)
    points = pl.DataFrame(rows, schema_overrides=kinds, infer_schema_length=None)
    return {"curves": pl.concat(curves), "masks": pl.DataFrame(masks), "points": points}


def thin_indices(rounds: int, points: int) -> list[int]:
    """Return about `points` indices below `rounds` for a log axis, with the first and the last."""
    if rounds <= points:
        return list(range(rounds))
    even = np.concatenate([np.geomspace(1, rounds, points // 2), np.linspace(1, rounds, points // 2)])
    return np.unique(even.astype(int) - 1).tolist()


def unpack_mask(mask: dict[str, Any]) -> np.ndarray:
    """Return which worker sent in which round, [rounds, workers], from a row of masks."""
    size = mask["rounds"] * mask["workers"]
    bits = np.unpackbits(np.frombuffer(mask["sent"], np.uint8), count=size)
    return bits.reshape(mask["rounds"], mask["workers"])


def setting_columns(table: pl.DataFrame) -> list[str]:
    """Return the columns that describe a point or a setting."""
    names = table.columns
    return [name for name in names[: names.index("seed" if "seed" in names else "seeds")] if name != "point"]


def target_labels(table: pl.DataFrame) -> list[str]:
    """Return the targets in the column names of a table, or ["end"] if there are none."""
    found = [name.removeprefix("rounds_") for name in table.columns if name.startswith("rounds_")]
    return [t for t in found if "_" not in t and t != "end"] or ["end"]


def summarize(points: pl.DataFrame) -> pl.DataFrame:
    """Return mean, half of the 95 % interval (Student's t), minimum and maximum over seeds, one row per setting.

    A cost is null if a seed did not reach it.
    """
    by = setting_columns(points)
    measures = [name for name in points.columns if name.rsplit("_", 1)[0] in COST_COLUMNS and name not in by]
    measures += ["final_loss", "accuracy"]
    rows = []
    for key, group in points.group_by(by, maintain_order=True) if by else [((), points)]:
        row: dict[str, Any] = dict(zip(by, key, strict=True)) | {"seeds": len(group), "point": group["point"][0]}
        row |= {name: int(group[name].sum()) for name in ("reached", "diverged")}
        row |= group[0].select("f_star", "goal").to_dicts()[0]
        for name in measures:
            whole = group[name].to_numpy() if group[name].null_count() == 0 else None
            row |= {name + end: value for end, value in mean_ci(whole).items()}
        rows.append(row)
    ends = ("", "_ci95", "_least", "_most")
    return pl.DataFrame(
        rows, infer_schema_length=None, schema_overrides={m + e: pl.Float64 for m in measures for e in ends}
    )


def mean_ci(values: np.ndarray | None) -> dict[str, float | None]:
    """Return mean, half of the 95 % interval if there are two values, minimum and maximum."""
    if values is None:
        return dict.fromkeys(("", "_ci95", "_least", "_most"))
    from scipy import stats  # a slow import, needed at the end only

    n = len(values)
    with np.errstate(over="ignore"):  # losses that diverge
        half = float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else None
        return {"": float(values.mean()), "_ci95": half, "_least": float(values.min()), "_most": float(values.max())}


def save_tables(folder: Path, tables: Mapping[str, pl.DataFrame]) -> None:
    """Write the tables of a study, points and summary as CSV too."""
    for name, table in tables.items():
        storage.save_frame(table, folder / name, csv=name in ("points", "summary"))


def concat_tables(parts: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Return the tables PART + NAME.parquet of batches or folders as one table of each kind, and the summary."""
    read = {name: [pl.read_parquet(f"{part}{name}.parquet") for part in parts] for name in TABLES}
    whole = {
        n: pl.concat(frames, how="diagonal_relaxed").sort("point", maintain_order=True) for n, frames in read.items()
    }
    return whole | {"summary": summarize(whole["points"])}


COLUMN_TITLES = {"bits": "b", "max_silence": "C", "window": "D"}


def format_value(value: Any) -> str:
    """Format a value in a few characters: 0.02, 31.4, 4850, 1.2e+06."""
    if value is None or not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:.0f}" if 999.5 <= abs(value) < 1e6 else f"{value:.3g}"


def format_setting(values: Mapping[str, Any], equals: str = "=") -> str:
    """Format the values of a setting as b=4, lr=0.02."""
    return ", ".join(f"{COLUMN_TITLES.get(name, name)}{equals}{format_value(value)}" for name, value in values.items())


def format_count(number: float | None) -> str:
    """Format a count as 1,234 or 12.3M or 1.23G."""
    if number is None:
        return "-"
    for limit, suffix in ((1e9, "G"), (1e6, "M")):
        if number >= limit:
            return f"{number / limit:.3g}{suffix}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.2g}"


def describe_unreached_settings(summary: pl.DataFrame) -> list[str]:
    """Return a notice if settings did not reach the last target on all seeds."""
    target = target_labels(summary)[-1]
    number, lost = summary[f"rounds_{target}"].null_count(), int((summary["diverged"] > 0).sum())
    return [f"{number} of {len(summary)} settings did not reach {target} ({lost} diverged)"] if number else []


def tied(points: pl.DataFrame) -> list[str]:
    """Return a notice for each pair of neighboring targets that settings of a table of points met at one evaluation."""
    notices, targets, settings = [], target_labels(points), setting_columns(points)
    total = points.select(settings).n_unique() if settings else 1
    for easy, hard in itertools.pairwise(targets):
        at = pl.col(f"rounds_{easy}")
        found = points.filter(pl.col("every") > 1, at > 0, at == pl.col(f"rounds_{hard}"))
        if len(found):
            number = found.select(settings).n_unique() if settings else 1
            notices.append(
                f"{number} of {total} settings met targets {easy} and {hard} at the same evaluation (every = "
                f"{found['every'].max()} rounds): give a smaller --eval-every"
            )
    return notices


Formats = Mapping[str, Callable[[Any], str]]  # functions that format the values of a column


def report_result(console: Console, out: Path, tables: Mapping[str, pl.DataFrame], notices: Sequence[str] = (), words: Formats | None = None, **facts: Any) -> None:  # fmt: skip
    """Print tables by title and notices, and write them with further facts as `result.json` and after --json to stdout.

    `result.json` is written if `out` is a folder.
    """
    for title, frame in tables.items():
        console.print(to_rich_table(frame, title, words or {}))
    for notice in notices:
        console.print(notice, markup=False)
    console.print(f"figures and tables: {out}", soft_wrap=True, markup=False)  # one line, to copy the path
    rows = {title: json.loads(frame.write_json()) for title, frame in tables.items()}  # nan and inf become null
    result = {"out": str(out), "tables": rows, "notices": list(notices), **facts}
    if out.is_dir():
        storage.write_json(out / "result.json", result)
    cli.write_json_result(result)


def to_rich_table(frame: pl.DataFrame, title: str, words: Formats) -> Table:
    """Convert a table for a terminal of 80 columns: null columns are left out, and words are not broken."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    frame = frame.select(name for name in frame.columns if frame[name].null_count() < len(frame))
    formats = []
    for name, kind in frame.schema.items():  # only the last column may wrap
        table.add_column(name, justify="right" if kind.is_numeric() else "left", no_wrap=name != frame.columns[-1])
        is_count = name in ("rounds", "uploads") or "bits" in name
        formats.append(words.get(name, format_count if is_count else format_value))
    for row in frame.iter_rows():
        table.add_row(*(v if isinstance(v, str) else show(v) for show, v in zip(formats, row, strict=True)))
    return table
