"""Teams of processes that compute together and answer questions: started here, and ended here whatever happens."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


class ProcessGroup:
    """`processes` processes of `devices` forced CPU devices each, which run `member` ("module:function").

    A question is a dictionary; all members get it, and answer one each, by `answer`. Use it in a `with` block.
    """

    def __init__(self, member: str, processes: int, devices: int):
        self.processes, self.devices = processes, devices
        self.errors = [tempfile.TemporaryFile("w+") for _ in range(processes)]  # noqa: SIM115, closed in `close`
        self.members: list[subprocess.Popen[str]] = []
        module, _, function = member.partition(":")
        flags = re.sub(rf"{DEVICE_COUNT_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {DEVICE_COUNT_FLAG}={devices}"}
        port = free_port()
        try:
            for rank, errors in enumerate(self.errors):
                program = f"from {module} import {function}; {function}({rank}, {processes}, {port})"
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, "-c", program],
                        cwd=Path(__file__).parents[2],
                        env=env,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        start_new_session=True,  # a Ctrl-C is ours: members are ended in order, not by the terminal
                    )
                )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "ProcessGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all members; nothing is left to them that anybody needs."""
        for member in self.members:
            member.kill()
        for member, errors in zip(self.members, self.errors, strict=False):
            member.wait()
            for stream in (member.stdin, member.stdout, errors):
                with contextlib.suppress(OSError):  # what was not yet written to a member that is gone
                    if stream:
                        stream.close()
        self.members = []

    def ask(self, **question: Any) -> list[Any]:
        """The answer of each member.

        Raises:
            ChildProcessError: a member ended; its last words are said.
        """
        self._send(question)
        return [self._receive(rank) for rank in range(self.processes)]

    def _send(self, question: dict[str, Any]) -> None:
        """A question to all members; whoever is gone is noticed when its answer is read."""
        for member in self.members:
            assert member.stdin
            with contextlib.suppress(BrokenPipeError):
                member.stdin.write(json.dumps(question) + "\n")
                member.stdin.flush()

    def _receive(self, rank: int) -> Any:
        """The answer of a member."""
        output = self.members[rank].stdout
        assert output
        for line in output:
            if line.startswith("{"):  # other lines are what libraries say
                return json.loads(line)["answer"]
        errors = self.errors[rank]
        errors.seek(0)
        said = errors.read().strip().splitlines()
        raise ChildProcessError(
            f"process {rank} of {self.processes} ended (exit code {self.members[rank].wait()}): {' | '.join(said[-3:])}"
        )


def free_port() -> int:
    """A port of the loopback device that nobody has right now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def serve(respond: Callable[..., Any]) -> None:
    """The loop of a member: an answer to each question, until there are no more."""
    for line in sys.stdin:
        print(json.dumps({"answer": respond(**json.loads(line))}), flush=True)
    os._exit(0)  # whoever asked is gone: others of the team may be too, and are not waited for
