"""Files that are complete or absent, locked folders of results, and their provenance."""

import errno
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import polars as pl
from filelock import FileLock, Timeout

import laqjax
from experiments.harness import cli

FORMAT = 2  # format of a folder of results; increase it when files or columns change
EXTENDABLE_KEYS = {"rounds": "more rounds"} | dict.fromkeys(("target", "targets", "target_accuracy"), "further targets")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, and rename it to `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which selects the format
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, "the disk is full; free some space and run the same command again, it resumes", str(path)
        ) from None
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as part:
        part.write_text(text)


@contextmanager
def lock_results_dir(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
    """Lock a folder of results for this process and experiment, and keep the identity for later calls.

    Args:
        folder: folder of the results.
        identity: values that must be those of the folder; those in `EXTENDABLE_KEYS` may extend them.
        ended: why they may not be extended. "": they may.

    Raises:
        ValueError: the folder holds the results of another experiment, or another process uses it.
    """
    path, holder = folder / "identity.json", folder / ".holder"
    identity = json.loads(json.dumps(identity, default=str))
    _check_identity(folder, identity, ended)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:  # the system releases the lock when the process ends, even if it is killed
            stack.enter_context(FileLock(folder / ".lock", timeout=0))
        except Timeout:
            name = holder.read_text() if holder.exists() else "another process"
            raise ValueError(f"{folder} is held by {name}: wait until it ends, or give another --out") from None
        write_text(
            holder, f"process {os.getpid()} on {platform.node()}, since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        )
        fresh = not path.exists()
        if not _check_identity(folder, identity, ended):
            for name in ("run.json", "result.json"):  # they show that everything is done
                (folder / name).unlink(missing_ok=True)
            write_json(path, {"format": FORMAT, **identity})
        try:
            yield
        except Exception:  # functions of the user may raise any type
            done = itertools.chain(folder.rglob("batches/*.*"), folder.rglob("batches/*/[0-9]*"))  # tables, checkpoints
            if fresh and not any(done):  # nothing was computed: other settings may use the folder
                for opened in list(folder.rglob("batches")):
                    shutil.rmtree(opened)
                path.unlink()
                (folder / "plan.json").unlink(missing_ok=True)
            raise


def _check_identity(folder: Path, identity: dict[str, Any], ended: str) -> bool:
    """Return whether the identity of a folder is exactly this one; see `lock_results_dir` for arguments and errors."""

    def extends(there: Any, given: Any) -> bool:
        return bool(there and given) and (given[: len(there)] == there if isinstance(there, list) else given > there)

    there = read_identity(folder) if (folder / "identity.json").exists() else None
    before = identity if there is None else there
    keys = sorted(k for k in before.keys() | identity.keys() if before.get(k) != identity.get(k))
    more = [k for k in keys if k in EXTENDABLE_KEYS and extends(before.get(k), identity.get(k))]
    refused = [
        f"{k}: {before.get(k)} there, {identity.get(k)} given"
        + (f", where only {EXTENDABLE_KEYS[k]} can be added" if k in EXTENDABLE_KEYS and not ended else "")
        for k in keys
        if ended or k not in more
    ]
    if refused:
        why = f"cannot be continued: {ended}" if more == keys else "holds the results of other settings"
        raise ValueError(f"{folder} {why} ({'; '.join(refused)}); give another --out, or remove the folder")
    return there is not None and not keys


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the settings that identify a folder of results.

    Raises:
        ValueError: another version of laqjax wrote the folder in another format, or the file is damaged.
    """
    there = read_json(folder / "identity.json")
    if (found := there.pop("format", None)) != FORMAT:
        raise ValueError(
            f"{folder} holds results of format {found}: must be format {FORMAT}; give another folder, or use the "
            "version of laqjax that wrote it"
        )
    return there


def quarantine(path: Path, why: str = "damaged") -> str:
    """Rename a file or folder to a free name, and return that name."""
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{why}-{n}")).exists())
    path.rename(aside)
    return aside.name


def save_frame(frame: pl.DataFrame, path: Path, csv: bool = False) -> None:
    """Write a table as Parquet, and as CSV if `csv`."""
    with atomic_write(path.with_name(path.name + ".parquet")) as part:
        frame.write_parquet(part)
    if csv:
        with atomic_write(path.with_name(path.name + ".csv")) as part:
            frame.write_csv(part)


def provenance() -> dict[str, Any]:
    """Return the command of this process, the time, the versions and the machine."""
    names = ("jax", "jaxlib", "numpy", "optax")
    return {
        "command": shlex.join(["python", *shlex.split(cli.get_program_name()), *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in names}
        | {"laqjax": laqjax.__version__, "python": platform.python_version()},
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "cores": os.cpu_count(),
    }


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}): must be JSON; give another folder, since this one cannot be continued"
        ) from None
