"""Client app of Flower's SuperNodes, which start a process for each message: a warm process answers in its place.

The process of a message imports neither JAX nor the experiments. It hands the message to the warm process of its
SuperNode, which holds the data and the compiled round. The first message starts it, and it ends with the SuperNode.
"""

import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.utils import get_flwr_home

PROCESS_OF_A_MESSAGE = "flwr-clientapp"  # command of Flower


def handle_message(message: Message, context: Context) -> Message:
    """Reply as a client of the run's point: in the warm process, or here if this process stays."""
    if Path(sys.argv[0]).stem != PROCESS_OF_A_MESSAGE:
        from experiments.federation import flower_apps  # imports JAX

        return flower_apps.handle_message(message, context)
    with connect(get_flwr_home() / f"warm-{os.getppid()}") as connection:
        connection.send_bytes(message_to_proto(message).SerializeToString())
        connection.send_bytes(context_to_proto(context).SerializeToString())
        reply = message_from_proto(MessageProto.FromString(connection.recv_bytes()))
        context.state = context_from_proto(ContextProto.FromString(connection.recv_bytes())).state
    return reply


def connect(path: Path) -> Connection:
    """Connect to the warm process of this SuperNode, after starting it if necessary.

    Args:
        path: file with the port and the key of the warm process.

    Raises:
        ChildProcessError: The warm process does not start.
    """
    with suppress(OSError, EOFError, AuthenticationError):
        port, key = path.read_text().split()
        return Client(("127.0.0.1", int(port)), authkey=bytes.fromhex(key))
    path.unlink(missing_ok=True)  # of a process that has ended
    code = f"from pathlib import Path; from experiments.federation import warm; warm.serve(Path({str(path)!r}), {os.getppid()})"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, start_new_session=True)
    while not path.exists():
        if process.poll() is not None:
            raise ChildProcessError("the warm process has ended: see the log of the SuperNode")
        time.sleep(0.05)
    return connect(path)


def serve(path: Path, parent: int) -> None:
    """Answer messages until the process that starts the processes of messages has ended."""
    from experiments.federation import flower_apps, local

    key, part = secrets.token_bytes(32), path.with_suffix(".part")
    with Listener(("127.0.0.1", 0), authkey=key) as listener:
        part.unlink(missing_ok=True)
        local.write_private_file(part, f"{listener.address[1]} {key.hex()}".encode())
        part.replace(path)
        threading.Thread(target=end_with, args=(parent, path), daemon=True).start()
        while True:
            with suppress(OSError, EOFError, AuthenticationError), listener.accept() as connection:
                message = message_from_proto(MessageProto.FromString(connection.recv_bytes()))
                context = context_from_proto(ContextProto.FromString(connection.recv_bytes()))
                # Flower reads the sender of a new message from here
                TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = context.run_id, context.node_id, 0
                try:
                    reply = flower_apps.handle_message(message, context)
                except Exception as error:
                    logging.exception("the app failed")
                    reply = Message(Error(0, f"{type(error).__name__}: {error}"[:300]), reply_to=message)
                connection.send_bytes(message_to_proto(reply).SerializeToString())
                connection.send_bytes(context_to_proto(context).SerializeToString())


def end_with(parent: int, path: Path) -> None:
    """End this process once another one has ended."""
    import psutil

    while psutil.pid_exists(parent):
        time.sleep(0.5)
    path.unlink(missing_ok=True)
    os._exit(0)


client = ClientApp()
client.train()(handle_message)
client.query()(handle_message)
