"""Certificates and keys of a federation of machines; its processes on this one.

    python -m experiments.deployment keys DIR --hosts NAME ADDRESS --workers 2    for a SuperLink there
    python -m experiments.deployment register DIR --superlink HOST:PORT           tells it which nodes may come

A SuperLink lets those nodes in whose keys it knows; `experiments.federated` runs on it.
"""

from pathlib import Path
from typing import Annotated

import tyro

from experiments.federation import local
from experiments.harness import cli

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
Hosts = Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST ...")]


def keys(folder: Folder, /, hosts: Hosts, workers: int, days: int = 365) -> None:
    """Certificates of a SuperLink, and the keys of its nodes.

    Args:
        folder: A new one; node-0 and ca.crt go from there to worker 0, and so on.
        hosts: Names and addresses of the SuperLink.
        workers: M, how many nodes.
        days: That the certificates hold.
    """
    folder.mkdir(parents=True)
    local.write_certificates(folder, hosts, days)
    for worker in range(workers):
        local.write_node_key(folder, worker)
    print(*sorted(path.name for path in folder.iterdir()))


def register(folder: Folder, /, superlink: str) -> None:
    """Tell a SuperLink that the nodes of these keys may come.

    Args:
        folder: That `keys` made.
        superlink: Its HOST:PORT.
    """
    with local.temporary_flower_home(folder, local.SuperLinkConfig()) as flwr:
        local.write_connection_config(flwr, superlink, folder / "ca.crt")
        for path in sorted(folder.glob("node-*.pub")):
            flwr.command("supernode", "register", str(path), "laqjax")
            print(f"{path.name} may come")


if __name__ == "__main__":
    with cli.command_line() as given:
        cli.parse_cli({"keys": keys, "register": register}, given, __doc__, answers=False)
