"""Certificates and keys for a federation of several machines, and a Flower app to start from.

    python -m experiments.deployment keys DIR --server-names NAME ADDRESS --workers 2    for a SuperLink there
    python -m experiments.deployment register DIR --superlink HOST:PORT                  admit the nodes of these keys
    python -m experiments.deployment new-app DIR                                         a Flower app for `flwr run`

A SuperLink accepts nodes with registered keys only; `experiments.federated` runs on it.
"""

import shutil
from pathlib import Path
from typing import Annotated

import tyro

from experiments.federation import local
from experiments.harness import cli

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
ServerNames = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]


def keys(folder: Folder, /, server_names: ServerNames, workers: int, days: int = 365) -> None:
    """Write the certificates of a SuperLink and the keys of its nodes.

    Args:
        folder: New folder; copy node-m and ca.crt to the machine of worker m.
        server_names: Host names and addresses of the SuperLink.
        workers: Number of nodes M.
        days: Days until the SuperLink's certificate expires.
    """
    folder.mkdir(parents=True)
    local.write_certificates(folder, server_names, days)
    for worker in range(workers):
        local.write_node_key(folder, worker)
    print(*sorted(path.name for path in folder.iterdir()))


def register(folder: Folder, /, superlink: str) -> None:
    """Register the public keys of a folder with a SuperLink.

    Args:
        folder: Folder that `keys` wrote.
        superlink: HOST:PORT of the SuperLink.
    """
    with local.temporary_flower_home(folder, local.SuperLinkConfig()) as flwr:
        local.write_connection_config(flwr, superlink, folder / "ca.crt")
        for path in sorted(folder.glob("node-*.pub")):
            flwr.command("supernode", "register", str(path), "laqjax")
            print(f"{path.name} is registered")


def new_app(folder: Folder, /) -> None:
    """Write a Flower app that uses laqjax; its README.md tells how to run it.

    Args:
        folder: New folder.
    """
    shutil.copytree(
        Path(__file__).with_name("examples") / "flower_app", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    print(f"{folder} is written: read {folder / 'README.md'}")


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli({"keys": keys, "register": register, "new-app": new_app}, given, __doc__, answers=False)
