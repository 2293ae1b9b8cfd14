"""Command lines: the examples first in their help, exit codes, and one JSON object where a program reads the result."""

import ctypes
import difflib
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import jax
import polars as pl
import tyro
from rich.console import Console

JSON_HELP = "With --json the result is one JSON object on stdout, and all else goes to stderr."
EXIT_CODE_HELP = "Exit codes: 0 done, 1 failed in the work, 2 wrong input, 130 Ctrl-C."
_json_stream: ContextVar[TextIO | None] = ContextVar("RESULT", default=None)  # where --json has it


@contextmanager
def command_line(given: Iterable[str] | None = None) -> Iterator[list[str]]:
    """The words of a command line, this process's if none are given; what it refuses is one line, see `files.refusing`."""
    words = list(sys.argv[1:] if given is None else given)
    with exit_on_user_error(), ExitStack() as stack:
        if "--json" in words:
            stack.callback(_json_stream.reset, _json_stream.set(stack.enter_context(reserve_stdout())))
        yield [word for word in words if word != "--json"]


@contextmanager
def reserve_stdout() -> Iterator[TextIO]:
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


def write_json_result(facts: dict[str, Any]) -> None:
    """The result of a command, where --json asked for it."""
    if file := _json_stream.get():
        print(json.dumps(facts, default=str), file=file)


def leader_console() -> Console:
    """That of the one process that speaks."""
    return Console(quiet=jax.process_index() > 0)


def parse_cli(what: Any, given: Sequence[str], about: str | None = None, name: str = "", answers: bool = True) -> Any:
    """What tyro makes of a command line.

    Args:
        what: settings or a function; or functions by their names, as subcommands.
        given: the words.
        about: the docstring of the module; its examples stand before the options.
        name: of a subcommand that is not in a dict.
        answers: whether --json has a result.
    """
    if about and given and given[0].startswith("-") and {"-h", "--help"} & set(given):
        print(reflow("\n\n".join([about.strip(), *[JSON_HELP] * answers, EXIT_CODE_HELP])))
    options: Any = {
        "args": given,
        "prog": f"python {invoked_program()}{name}",
        "description": "" if about else None,
    }
    # without DisallowNone: None on the command line undoes what a config file says
    options["config"] = (tyro.conf.OmitArgPrefixes,)
    call: Any = tyro.extras.subcommand_cli_from_dict if isinstance(what, dict) else tyro.cli
    return call(what, **options)


def variadic_option(kind: str, *aliases: str) -> Any:
    """How an option of any number of values looks in the help: without a default where it has none."""
    hint = lambda values: f"(default: {values})" if values else ""  # noqa: E731
    return tyro.conf.arg(metavar=f"{kind} ...", help_behavior_hint=hint, aliases=aliases or None)


Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, variadic_option("DIR")]


def reflow(text: str) -> str:
    """A docstring as wide as the terminal; lines that are indented stand as they are."""
    width = shutil.get_terminal_size().columns
    parts = [part if part.startswith("  ") else textwrap.fill(part.strip(), width) for part in text.split("\n\n")]
    return "\n\n".join(parts) + "\n"


# what a command line reports in one line: wrong values, files that are not there or not readable, missing packages
USER_ERRORS = (ValueError, OSError, ImportError, pl.exceptions.PolarsError)
# of these, what fails in the work and not in what was asked for: a full disk, no rights, a process that ended
INPUT_FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """A command line: what it refuses is one line on stderr (exit code 2; 1 where the work failed), as is Ctrl-C (130)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        failed = isinstance(error, OSError) and not isinstance(error, INPUT_FILE_ERRORS)
        raise exit_with_message(1 if failed else 2, f"error: {error}") from None
    except KeyboardInterrupt:
        raise exit_with_message(130, "stopped; the same command goes on from what is saved") from None


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" where a known name is close to `name`, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def exit_with_message(code: int, said: str) -> SystemExit:
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


def invoked_program() -> str:
    """What was started: `-m MODULE`, or a file."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
