"""Files that are whole or absent: everything is written under a temporary name, then renamed. And files of the user's."""

import hashlib
import importlib.util
import sys
import traceback
from functools import cache
from pathlib import Path
from typing import Any


def is_user_reference(text: str) -> bool:
    """Whether a name is that of something in a file of the user's: FILE.py:NAME."""
    return ".py:" in text


def file_digest(text: str) -> str | None:
    """Of the content of a file that a name stands for (FILE.py:NAME, npz:FILE, ...), None where there is none."""
    names = [text.rpartition(":")[0], text.partition(":")[2]]
    path = next((Path(name) for name in names if name and Path(name).is_file()), None)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else None


def load_user_function(text: str) -> Any:
    """The function NAME of `FILE.py:NAME`; ValueError when there is none."""
    file, _, name = text.rpartition(":")
    function = getattr(_module(Path(file).resolve()), name, None)
    if not callable(function):
        raise ValueError(f"{text}: {file} has no function {name}")
    return function


def call_user_function(text: str, *given: Any, **named: Any) -> Any:
    """What NAME of `FILE.py:NAME` returns; ValueError that names file, function and line when it fails."""
    function = load_user_function(text)
    try:
        return function(*given, **named)
    except Exception as error:
        raise ValueError(f"{text}: {locate_error(error, text)}") from error


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
        raise ValueError(f"{path.name} cannot be read: {locate_error(error, f'{path}:')}") from error
    return module


def locate_error(error: Exception, text: str) -> str:
    """An error, and the line of the file of FILE.py:NAME from which it came."""
    file = Path(text.rpartition(":")[0]).name
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == file]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}" + (
        f" (line {lines[-1]})" if lines else ""
    )
