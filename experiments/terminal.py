"""Command lines: the examples first in their help, exit codes, and one JSON object where a program reads the result."""

import ctypes
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
import tyro
from rich.console import Console

from experiments import files

JSON = "With --json the result is one JSON object on stdout, and all else goes to stderr."
CODES = "Exit codes: 0 done, 1 failed in the work, 2 wrong input, 130 Ctrl-C."
RESULT: ContextVar[TextIO | None] = ContextVar("RESULT", default=None)  # where --json has it


@contextmanager
def command(given: Iterable[str] | None = None) -> Iterator[list[str]]:
    """The words of a command line, this process's if none are given; what it refuses is one line, see `files.refusing`."""
    words = list(sys.argv[1:] if given is None else given)
    with files.refusing(), ExitStack() as stack:
        if "--json" in words:
            stack.callback(RESULT.reset, RESULT.set(stack.enter_context(results_alone())))
        yield [word for word in words if word != "--json"]


@contextmanager
def results_alone() -> Iterator[TextIO]:
    """Stdout for the result; all else that is written there goes to stderr, also by libraries that are not Python."""
    with ExitStack() as stack:
        file = sys.stdout
        if file and file is sys.__stdout__:
            file.flush()
            file = stack.enter_context(open(os.dup(1), "w"))
            stack.callback(os.dup2, file.fileno(), 1)
            flush_c = ctypes.CDLL(None).fflush  # C keeps what is printed until its end where stdout is a pipe
            stack.callback(flush_c, None)
            flush_c(None)
            os.dup2(2, 1)
        stack.enter_context(redirect_stdout(sys.stderr))
        yield file


def answer(facts: dict[str, Any]) -> None:
    """The result of a command, where --json asked for it."""
    if file := RESULT.get():
        print(json.dumps(facts, default=str), file=file)


def console() -> Console:
    """That of the one process that speaks."""
    return Console(quiet=jax.process_index() > 0)


def cli(what: Any, given: Sequence[str], about: str | None = None, name: str = "", answers: bool = True) -> Any:
    """What tyro makes of a command line.

    Args:
        what: settings or a function; or functions by their names, as subcommands.
        given: the words.
        about: the docstring of the module; its examples stand before the options.
        name: of a subcommand that is not in a dict.
        answers: whether --json has a result.
    """
    if about and given and given[0].startswith("-") and {"-h", "--help"} & set(given):
        print(reflowed("\n\n".join([about.strip(), *[JSON] * answers, CODES])))
    options: Any = {"args": given, "prog": f"python {files.program()}{name}", "description": "" if about else None}
    # without DisallowNone: None on the command line undoes what a config file says
    options["config"] = (tyro.conf.OmitArgPrefixes,)
    call: Any = tyro.extras.subcommand_cli_from_dict if isinstance(what, dict) else tyro.cli
    return call(what, **options)


def many(kind: str, *aliases: str) -> Any:
    """How an option of any number of values looks in the help: without a default where it has none."""
    hint = lambda values: f"(default: {values})" if values else ""  # noqa: E731
    return tyro.conf.arg(metavar=f"{kind} ...", help_behavior_hint=hint, aliases=aliases or None)


Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, many("DIR")]


def reflowed(text: str) -> str:
    """A docstring as wide as the terminal; lines that are indented stand as they are."""
    width = shutil.get_terminal_size().columns
    parts = [part if part.startswith("  ") else textwrap.fill(part.strip(), width) for part in text.split("\n\n")]
    return "\n\n".join(parts) + "\n"
