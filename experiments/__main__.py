"""List of the commands: `python -m experiments NAME ...` is `python -m experiments.NAME ...`."""

import ast
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMANDS = ["sweep", "tune", "compare", "federated", "reproduce", "scaling", "bench", "plots", "report", "deployment"]
EXAMPLES = ["examples.data_parallel", "examples.diloco", "examples.multihost"]
INTRO = """LAQ and its family: experiments on one machine or many. Three first commands:

    python -m experiments reproduce laq-logistic    the paper's table, 6 to 15 minutes on 2 cores
    python -m experiments sweep --quick             a test of the installation, half a minute
    python -m experiments report results/sweep      one HTML page of the results

python -m experiments NAME --help describes each:
"""


def first_doc_line(node: Any) -> str:
    """Return the first line of a docstring."""
    return (ast.get_docstring(node) or "-").splitlines()[0]


def parse_command_module(name: str) -> ast.Module:
    """Parse the module of a command, which takes less time than an import of JAX."""
    path = HERE.joinpath(*name.split("."))
    return ast.parse((path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def reproduce_subcommands() -> dict[str, str]:
    """Return the subcommands of `reproduce` with a line each, from its dict of functions."""
    found: Any = next(node for node in ast.walk(parse_command_module("reproduce")) if isinstance(node, ast.Dict))
    lines = {}
    for key, value in zip(found.keys, found.values, strict=True):  # "lag": lag.table
        body = parse_command_module(f"reproduce.{value.value.id}").body
        lines[key.value] = next(
            first_doc_line(f) for f in body if isinstance(f, ast.FunctionDef) and f.name == value.attr
        )
    return lines


def main() -> None:
    """List the commands, or run one."""
    name, *given = sys.argv[1:] or ["--help"]
    if name in (*COMMANDS, *EXAMPLES):
        import runpy

        sys.argv[1:] = given
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
        return
    if name not in ("-h", "--help"):
        sys.stderr.write(f"error: {name} is no command: must be one of {', '.join((*COMMANDS, *EXAMPLES))}\n")
        sys.exit(2)
    print(INTRO)
    for command in (*COMMANDS, *EXAMPLES):
        print(f"  {command + ' ':<18}{first_doc_line(parse_command_module(command))}")
        for table, line in reproduce_subcommands().items() if command == "reproduce" else ():
            print(f"    {table:<16}{line}")


if __name__ == "__main__":
    main()
