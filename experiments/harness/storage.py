"""Files that are whole or absent: everything is written under a temporary name, then renamed. And files of the user's."""

import errno
import fcntl
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import polars as pl

import laqjax
from experiments.harness import cli

FORMAT = 2  # of a folder of results; a change of its files or columns gets the next number
EXTEND_TARGETS_MESSAGE = "further targets behind these"
EXTENDABLE_KEYS = {"rounds": "more rounds"} | dict.fromkeys(
    ("target", "targets", "target_accuracy"), EXTEND_TARGETS_MESSAGE
)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A name to write to; the file takes its place at `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix stays: writers choose the format by it
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, "the disk is full; make room and run the same command again, it resumes", str(path)
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with atomic_write(path) as part:
        part.write_text(text)


def extends(there: Any, asked: Any) -> bool:
    """Whether more of the same is asked for: more rounds, or further targets behind those that are there."""
    return bool(there and asked) and (asked[: len(there)] == there if isinstance(there, list) else asked > there)


@contextmanager
def lock_results_dir(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
    """Hold `folder` as this experiment's own, for one process at a time; it keeps the identity for the next one.

    Args:
        folder: of the results.
        identity: all but what is in `MORE` must be as it is there, and that may ask for more.
        ended: why it may not.

    Raises:
        ValueError: it holds another experiment's results (the difference is said), or another process holds it.
    """
    path = folder / "identity.json"
    identity = json.loads(json.dumps(identity, default=str))

    def same() -> bool:
        there = read_identity(folder) if path.exists() else identity
        keys = sorted(k for k in there.keys() | identity.keys() if there.get(k) != identity.get(k))
        more = [k for k in keys if k in EXTENDABLE_KEYS and extends(there.get(k), identity.get(k))]
        words = {k: f"{k}: {there.get(k)} there, {identity.get(k)} asked for" for k in keys if ended or k not in more}
        words |= {
            k: f"{words[k]}, which goes on to {EXTENDABLE_KEYS[k]} only"
            for k in words.keys() & EXTENDABLE_KEYS.keys()
            if not ended
        }
        if words:
            why = f"cannot go on: {ended}" if more == keys else "holds the results of other settings"
            raise ValueError(f"{folder} {why} ({'; '.join(words.values())}); give another --out, or remove the folder")
        return path.exists() and not keys

    same()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, also when it is killed
        except BlockingIOError:
            lock.seek(0)
            raise ValueError(
                f"{folder} is held by {lock.read().strip()}: wait until it ends, or give another --out"
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n")
        lock.flush()
        fresh = not path.exists()
        if not same():
            (folder / "run.json").unlink(missing_ok=True)  # it says that all is done
            write_json(path, {"format": FORMAT, **identity})
        try:
            yield
        except Exception:  # whatever a function of the user's raises
            done = itertools.chain(folder.rglob("batches/*.*"), folder.rglob("batches/*/[0-9]*"))  # tables, checkpoints
            if fresh and not any(done):  # refused before anything was done: the name stays free
                for opened in list(folder.rglob("batches")):
                    shutil.rmtree(opened)
                path.unlink()
                (folder / "plan.json").unlink(missing_ok=True)
            raise


def read_identity(folder: Path) -> dict[str, Any]:
    """Read what was asked for in a folder of results.

    Raises:
        ValueError: another version of laqjax wrote the folder in another format, or the file is damaged.
    """
    there = read_json(folder / "identity.json")
    if (found := there.pop("format", None)) != FORMAT:
        raise ValueError(
            f"{folder} holds results of format {found}: must be format {FORMAT}; give another folder, or use the version of "
            "laqjax that wrote it"
        )
    return there


def quarantine(path: Path, why: str = "damaged") -> str:
    """Rename a damaged file or folder out of the way, overwriting nothing; its new name."""
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{why}-{n}")).exists())
    path.rename(aside)
    return aside.name


def save_frame(frame: pl.DataFrame, path: Path, csv: bool = False) -> None:
    """Parquet, and CSV for people."""
    with atomic_write(path.with_name(path.name + ".parquet")) as part:
        frame.write_parquet(part)
    if csv:
        with atomic_write(path.with_name(path.name + ".csv")) as part:
            frame.write_csv(part)


def provenance(command: Sequence[str] = ()) -> dict[str, Any]:
    """The exact command (this process's if none is given), the time, the versions and the machine, beside results."""
    names = ("jax", "jaxlib", "numpy", "optax")
    return {
        "command": shlex.join(["python", *(command or (*shlex.split(cli.invoked_program()), *sys.argv[1:]))]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in names}
        | {"laqjax": laqjax.__version__, "python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "cores": os.cpu_count(),
    }


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """The inverse of `write_json`; ValueError that names a file which is no JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); give another folder, this one cannot be gone on with") from None
