"""Command lines: parsing, examples before the options in their help, exit codes, and one JSON object with --json."""

import ctypes
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import jax
import polars as pl
import tyro
from rich.console import Console

JSON_HELP = "With --json the result is one JSON object on stdout, and all else goes to stderr."
EXIT_CODE_HELP = "Exit codes: 0 done, 1 failed in the work, 2 wrong input, 130 Ctrl-C."
# reported as one line, without a traceback
USER_ERRORS = (ValueError, OSError, ImportError, pl.exceptions.PolarsError)
# OSErrors of wrong input; others, such as a full disk, are failures of the work
INPUT_FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_json_results: list[dict[str, Any]] = []


@contextmanager
def command_line(given: Iterable[str] | None = None) -> Iterator[list[str]]:
    """Yield the words of a command line (None: of this process) without --json; end as `exit_on_user_error` does.

    With --json, all output goes to stderr, and the result of `write_json_result` follows on stdout.
    """
    words = list(sys.argv[1:] if given is None else given)
    with exit_on_user_error():
        if "--json" not in words:
            yield words
            return
        _json_results.clear()
        try:
            with redirect_to_stderr():
                yield [word for word in words if word != "--json"]
        finally:  # a stopped search has a result too
            for result in _json_results:
                print(json.dumps(result, default=str))


@contextmanager
def redirect_to_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, also for libraries that are not Python."""
    sys.stdout.flush()
    flush_c = ctypes.CDLL(None).fflush  # C keeps its output until the end if stdout is a pipe
    flush_c(None)
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        flush_c(None)
        os.dup2(saved, 1)
        os.close(saved)


def write_json_result(result: dict[str, Any]) -> None:
    """Set the result of a command, which --json prints."""
    _json_results[:] = [result]


def leader_console() -> Console:
    """Return a console that is quiet in all processes but process 0."""
    return Console(quiet=jax.process_index() > 0)


def parse_cli(what: Any, given: Sequence[str], about: str | None = None, name: str = "", answers: bool = True) -> Any:
    """Parse a command line by tyro.

    Args:
        what: settings or a function; or a dict of functions, the subcommands.
        given: the words.
        about: the module's docstring; the help prints it before the options.
        name: a subcommand that is not in a dict.
        answers: whether --json has a result.
    """
    if about and given and given[0].startswith("-") and {"-h", "--help"} & set(given):
        width = shutil.get_terminal_size().columns
        parts = [*about.strip().split("\n\n"), *[JSON_HELP] * answers, EXIT_CODE_HELP]
        print(*(p if p.startswith("  ") else textwrap.fill(p.strip(), width) for p in parts), sep="\n\n", end="\n\n")
    call: Any = tyro.extras.subcommand_cli_from_dict if isinstance(what, dict) else tyro.cli
    prog, description = f"python {get_program_name()}{name}", "" if about else None
    # no DisallowNone in config: None on the command line undoes a config file's value
    return call(what, args=given, prog=prog, description=description, config=(tyro.conf.OmitArgPrefixes,))


def variadic_option(kind: str, *aliases: str) -> Any:
    """Describe an option of any number of values; its help shows a default only if there is one."""
    hint = lambda values: f"(default: {values})" if values else ""  # noqa: E731
    return tyro.conf.arg(metavar=f"{kind} ...", help_behavior_hint=hint, aliases=aliases or None)


Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, variadic_option("DIR")]


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line on stderr after an error of the user (exit code 2), of the work (1) or Ctrl-C (130)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except USER_ERRORS as error:
        failed = isinstance(error, OSError) and not isinstance(error, INPUT_FILE_ERRORS)
        raise exit_with_message(1 if failed else 2, f"error: {error}") from None
    except KeyboardInterrupt:
        raise exit_with_message(130, "stopped; the same command continues from the saved results") from None


def exit_with_message(code: int, message: str) -> SystemExit:
    """Print a message on stderr, and return the exception that ends the command with this exit code."""
    print(message, file=sys.stderr)
    if jax.distributed.is_initialized():  # at a normal exit, JAX and the other processes would wait for each other
        sys.stdout.flush()
        time.sleep(2 if jax.process_index() == 0 else 0)  # JAX ends the others with process 0: let them print first
        os._exit(code)
    stop = SystemExit(message)
    stop.code = code  # with a text as its code the exit code would be 1
    return stop


def get_program_name() -> str:
    """Return what was started: `-m MODULE`, or a file."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return f"-m {module.name.removesuffix('.__main__')}" if module else sys.argv[0]
