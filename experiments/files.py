"""Files that are whole or absent: everything is written under a temporary name, then renamed."""

import errno
import json
import os
import platform
import shlex
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

import laqjax

# what a command line reports in one line: wrong values, files that are not there or not readable, missing packages
REFUSED = (ValueError, OSError, ImportError, pl.exceptions.PolarsError)


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


def save_tree(path: Path, tree: Any) -> None:
    """The array leaves of a pytree, in order, as one .npz file."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    with replacing(path) as part:
        np.savez(part, *leaves)


def load_tree(path: Path, like: Any) -> Any:
    """The inverse of `save_tree`; ValueError when the file holds another structure than `like`."""
    try:
        with np.load(path) as file:
            leaves = [file[f"arr_{i}"] for i in range(len(file.files))]
    except (KeyError, OSError, ValueError, zipfile.BadZipFile):
        leaves = []
    expected = [(np.shape(leaf)[1:], np.asarray(leaf).dtype) for leaf in jax.tree.leaves(like)]
    if expected != [(leaf.shape[1:], leaf.dtype) for leaf in leaves]:
        raise ValueError(f"{path} is damaged, or does not hold what this run needs; remove it, or give another --out")
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Make `folder` this experiment's own; ValueError showing the difference when it holds another one's results."""
    path = folder / "identity.json"
    identity = json.loads(json.dumps(identity, default=str))
    if path.exists():
        there = read_json(path)
        if there != identity:
            keys = sorted(k for k in there.keys() | identity.keys() if there.get(k) != identity.get(k))
            difference = "; ".join(f"{k}: {there.get(k)} there, {identity.get(k)} asked for" for k in keys)
            raise ValueError(
                f"{folder} holds the results of other settings ({difference}); give another --out, or remove the folder"
            )
    else:
        write_json(path, identity)


def provenance(command: Sequence[str] = ()) -> dict[str, Any]:
    """The exact command (this process's if none is given), the time, the versions and the machine, beside results."""
    names = ("jax", "jaxlib", "numpy", "optax")
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", module.name] if module else [sys.argv[0]]
    return {
        "command": shlex.join(["python", *(command or (*program, *sys.argv[1:]))]),
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
