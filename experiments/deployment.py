r"""Set up a federation of several machines: certificates, keys, nodes; an app.

    python -m experiments.deployment keys DIR --server-names NAME ADDRESS --workers 2    for a SuperLink there
    python -m experiments.deployment register DIR --superlink HOST:PORT                  admit the nodes of these keys
    python -m experiments.deployment node --superlink HOST:PORT --root-certificates ca.crt --key node-0 \
        --worker 0 --workers 2                                                           run worker 0 until the run ends
    python -m experiments.deployment new-app DIR                                         a Flower app for `flwr run`

A SuperLink accepts nodes with registered keys only; `experiments.federated` runs on it. A node works on the problem,
data and algorithms of its own command line: give it those of the server's command. `node --help` lists the options.
"""

import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from experiments.federation import local
from experiments.harness import cli
from laqjax import check_number

Folder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
ServerNames = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")]


def keys(folder: Folder, /, server_names: ServerNames, workers: int, days: int = 365) -> None:
    """Write the certificates of a SuperLink and the keys of its nodes.

    Args:
        folder: New folder; copy node-m and ca.crt to the machine of worker m. It also gets nginx.conf, a proxy for the
            SuperLink.
        server_names: Host names and addresses of the SuperLink.
        workers: Number of nodes M.
        days: Days until the SuperLink's certificate expires.
    """
    for name, value in (("workers", workers), ("days", days)):
        check_number(name, value, np.int32, minimum=1)
    folder.mkdir(parents=True)
    local.write_certificates(folder, dict.fromkeys([*server_names, "localhost", "127.0.0.1"]), days)
    shutil.copy(local.PROXY_CONFIG, folder)
    for worker in range(workers):
        local.write_node_key(folder, worker)
    print(*sorted(path.name for path in folder.iterdir()))


def register(folder: Folder, /, superlink: str) -> None:
    """Register the public keys of a folder with a SuperLink.

    Args:
        folder: Folder that `keys` wrote.
        superlink: HOST:PORT of the SuperLink.
    """
    if not (public_keys := sorted(folder.glob("node-*.pub"))):
        raise FileNotFoundError(f"{folder} holds no node-*.pub: must be a folder that `keys` wrote")
    local.register_nodes(public_keys, superlink, folder / "ca.crt", Console())


def node(words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="...")] = (), /) -> None:
    """Run the node of a worker; `node --help` lists its options."""
    from experiments.federation import node as long_lived
    from experiments.harness import grid

    long_lived.run(grid.parse_settings(long_lived.Settings, words, long_lived.__doc__))


def new_app(folder: Folder, /) -> None:
    """Write a Flower app that uses laqjax; its README.md tells how to run it.

    Args:
        folder: New folder.
    """
    shutil.copytree(
        Path(__file__).with_name("examples") / "flower_app", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    print(f"{folder} is written: read {folder / 'README.md'}")


COMMANDS = {"keys": keys, "register": register, "node": node, "new-app": new_app}

if __name__ == "__main__":
    with cli.command_line() as given:
        if given[:1] == ["node"]:
            node(tuple(given[1:]))  # it parses its own options
        else:
            cli.parse_cli(COMMANDS, given, __doc__, answers=False)
