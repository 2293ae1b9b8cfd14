"""Files that are whole or absent: everything is written under a temporary name, then renamed. And files of the user's."""

import difflib
import errno
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import polars as pl

import laqjax

# what a command line reports in one line: wrong values, files that are not there or not readable, missing packages
REFUSED = (ValueError, OSError, ImportError, pl.exceptions.PolarsError)
# of these, what fails in the work and not in what was asked for: a full disk, no rights, a process that ended
GIVEN = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FORMAT = 1  # of a folder of results; a change of its files or columns gets the next number
TARGETS = "further targets behind these"
MORE = {"rounds": "more rounds"} | dict.fromkeys(("target", "targets", "target_accuracy"), TARGETS)


@contextmanager
def refusing() -> Iterator[None]:
    """A command line: what it refuses is one line on stderr (exit code 2; 1 where the work failed), as is Ctrl-C (130)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except REFUSED as error:
        failed = isinstance(error, OSError) and not isinstance(error, GIVEN)
        raise ended(1 if failed else 2, f"error: {error}") from None
    except KeyboardInterrupt:
        raise ended(130, "stopped; the same command goes on from what is saved") from None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" where a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def ended(code: int, said: str) -> SystemExit:
    """The end of a command with one line on stderr, which the exception holds too."""
    print(said, file=sys.stderr)
    if jax.distributed.is_initialized():  # JAX would wait for the others at the exit, and they for this one
        sys.stdout.flush()
        time.sleep(
            2 if jax.process_index() == 0 else 0
        )  # what is refused by all is said by all: JAX ends them with process 0
        os._exit(code)
    stop = SystemExit(said)
    stop.code = code  # a text alone would be exit code 1
    return stop


def program() -> str:
    """What was started: `-m MODULE`, or a file."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
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
    with replacing(path) as part:
        part.write_text(text)


def further(there: Any, asked: Any) -> bool:
    """Whether more of the same is asked for: more rounds, or further targets behind those that are there."""
    return bool(there and asked) and (asked[: len(there)] == there if isinstance(there, list) else asked > there)


@contextmanager
def claimed(folder: Path, identity: dict[str, Any], ended: str = "") -> Iterator[None]:
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
        more = [k for k in keys if k in MORE and further(there.get(k), identity.get(k))]
        words = {k: f"{k}: {there.get(k)} there, {identity.get(k)} asked for" for k in keys if ended or k not in more}
        words |= {k: f"{words[k]}, which goes on to {MORE[k]} only" for k in words.keys() & MORE.keys() if not ended}
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


def set_aside(path: Path, why: str = "damaged") -> str:
    """Rename a damaged file or folder out of the way, overwriting nothing; its new name."""
    aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"{path.name}.{why}-{n}")).exists())
    path.rename(aside)
    return aside.name


def is_own(text: str) -> bool:
    """Whether a name is that of something in a file of the user's: FILE.py:NAME."""
    return ".py:" in text


def digest(text: str) -> str | None:
    """Of the content of a file that a name stands for (FILE.py:NAME, npz:FILE, ...), None where there is none."""
    names = [text.rpartition(":")[0], text.partition(":")[2]]
    path = next((Path(name) for name in names if name and Path(name).is_file()), None)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else None


def load(text: str) -> Any:
    """The function NAME of `FILE.py:NAME`; ValueError when there is none."""
    file, _, name = text.rpartition(":")
    function = getattr(_module(Path(file).resolve()), name, None)
    if not callable(function):
        raise ValueError(f"{text}: {file} has no function {name}")
    return function


def call(text: str, *given: Any, **named: Any) -> Any:
    """What NAME of `FILE.py:NAME` returns; ValueError that names file, function and line when it fails."""
    function = load(text)
    try:
        return function(*given, **named)
    except Exception as error:
        raise ValueError(f"{text}: {where(error, text)}") from error


@cache
def _module(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: expected FILE.py:NAME")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read: {where(error, f'{path}:')}") from error
    return module


def where(error: Exception, text: str) -> str:
    """An error, and the line of the file of FILE.py:NAME from which it came."""
    file = Path(text.rpartition(":")[0]).name
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == file]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" + (
        f" (line {lines[-1]})" if lines else ""
    )


def save(frame: pl.DataFrame, path: Path, csv: bool = False) -> None:
    """Parquet, and CSV for people."""
    with replacing(path.with_name(path.name + ".parquet")) as part:
        frame.write_parquet(part)
    if csv:
        with replacing(path.with_name(path.name + ".csv")) as part:
            frame.write_csv(part)


def provenance(command: Sequence[str] = ()) -> dict[str, Any]:
    """The exact command (this process's if none is given), the time, the versions and the machine, beside results."""
    names = ("jax", "jaxlib", "numpy", "optax")
    return {
        "command": shlex.join(["python", *(command or (*shlex.split(program()), *sys.argv[1:]))]),
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
