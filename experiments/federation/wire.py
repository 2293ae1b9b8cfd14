"""Proxy that counts the bytes of a TCP service on this machine, as they are on the wire: with TLS and HTTP."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass


@dataclass
class WireCounter:
    """Bytes that have passed the proxy at `port`.

    requests: changes of direction towards the service.
    """

    port: int
    up: int = 0
    down: int = 0
    requests: int = 0

    def count_since(self, before: dict[str, int]) -> dict[str, int]:
        """Return what has passed since an earlier value of this method; all with an empty dictionary."""
        return {name: getattr(self, name) - before.get(name, 0) for name in ("up", "down", "requests")}


@contextmanager
def count_wire_bytes(service: int) -> Iterator[WireCounter]:
    """Forward a free port of 127.0.0.1 to the port of a service, and count the bytes in both directions."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        counter, lock = WireCounter(server.getsockname()[1]), threading.Lock()

        def forward(client: socket.socket) -> None:
            with client, socket.create_connection(("127.0.0.1", service)) as upstream:
                last = [""]  # direction of the last bytes

                def copy(source: socket.socket, target: socket.socket, way: str) -> None:
                    with suppress(OSError):
                        while data := source.recv(1 << 16):
                            with lock:
                                setattr(counter, way, getattr(counter, way) + len(data))
                                counter.requests += way == "up" and last[0] != "up"
                                last[0] = way
                            target.sendall(data)
                    with suppress(OSError):
                        target.shutdown(socket.SHUT_WR)

                back = threading.Thread(target=copy, args=(upstream, client, "down"), daemon=True)
                back.start()
                copy(client, upstream, "up")
                back.join()

        def accept() -> None:
            with suppress(OSError):  # the server is closed
                while True:
                    threading.Thread(target=forward, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield counter
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends `accept`
