"""Functions in Python files of the user, named as FILE.py:NAME."""

import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def is_user_reference(text: str) -> bool:
    """Return whether a text has the form FILE.py:NAME."""
    return ".py:" in text


def file_digest(text: str) -> str | None:
    """Return a digest of the file in a name such as FILE.py:NAME or npz:FILE, None where there is none."""
    names = [text.rpartition(":")[0], text.partition(":")[2]]
    path = next((Path(name) for name in names if name and Path(name).is_file()), None)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path else None


def load_user_function(text: str) -> Any:
    """Load the function FILE.py:NAME."""
    file, _, name = text.rpartition(":")
    function = getattr(_load_module(Path(file).resolve()), name, None)
    if not callable(function):
        raise ValueError(f"{text}: {file} has no function {name}")
    return function


def call_user_function(text: str, *given: Any) -> Any:
    """Call the function FILE.py:NAME."""
    return call_named(text, load_user_function(text), *given)


def call_named(text: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call a function of the user, and name it and the line in its errors; `text` begins with FILE.py:NAME."""
    try:
        return function(*given, **named)
    except Exception as error:
        raise ValueError(f"{text}: {locate_error(error, text)}") from error


@cache
def _load_module(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: must be FILE.py:NAME")
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look up their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path.name} cannot be read: {locate_error(error, f'{path}:')}") from error
    return module


def locate_error(error: Exception, text: str) -> str:
    """Return an error's type, first line and, where it came from the file of FILE.py:NAME, line number."""
    file = Path(text.rpartition(":")[0]).name
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == file]
    first, where = str(error).partition("\n")[0], f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {first}{where}"
