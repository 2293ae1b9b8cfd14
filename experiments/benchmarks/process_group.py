"""Groups of processes that compute together and answer requests as lines of JSON."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from experiments.harness.processes import find_free_port

DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count"


@dataclass
class ProcessGroup:
    """Group of worker processes; see `start_group`."""

    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    errors: list[IO[str]] = field(default_factory=list)  # what each process writes to stderr

    def ask(self, **request: Any) -> list[Any]:
        """Send a request to all processes and return the answer of each.

        Raises:
            ChildProcessError: A process ended; the message holds its last lines on stderr.
        """
        for process in self.processes:
            assert process.stdin
            with suppress(BrokenPipeError):  # `_receive` reports a process that ended
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
        return [self._receive(rank) for rank in range(len(self.processes))]

    def _receive(self, rank: int) -> Any:
        """Return the answer of a process."""
        process, errors = self.processes[rank], self.errors[rank]
        for line in process.stdout or ():
            if line.startswith("{"):  # libraries print other lines
                return json.loads(line)["answer"]
        code = process.wait()
        errors.seek(0)
        last = " | ".join(errors.read().strip().splitlines()[-3:])
        raise ChildProcessError(f"process {rank} of {len(self.processes)} ended (exit code {code}): {last}")


@contextmanager
def start_group(entry_point: str, processes: int, devices: int) -> Iterator[ProcessGroup]:
    """Start processes and kill them at the end of the block.

    Args:
        entry_point: "module:function"; each process calls it with its rank, the number of processes and a port.
        processes: Number of processes.
        devices: Number of CPU devices in each process.
    """
    module, _, function = entry_point.partition(":")
    flags = re.sub(rf"{DEVICE_COUNT_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", ""))
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} {DEVICE_COUNT_FLAG}={devices}"}
    # Ctrl-C ends this process alone, which then ends the others in order
    options: Any = {"cwd": Path(__file__).parents[2], "env": env, "text": True, "start_new_session": True}
    port, group = find_free_port(), ProcessGroup()
    with ExitStack() as stack:
        for rank in range(processes):
            program = f"from {module} import {function}; {function}({rank}, {processes}, {port})"
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            process = subprocess.Popen([sys.executable, "-c", program], **pipes, **options)
            stack.callback(process.communicate)  # closes the pipes and waits
            stack.callback(process.kill)
            group.processes.append(process)
            group.errors.append(errors)
        yield group


def serve(respond: Callable[..., Any]) -> None:
    """Answer the requests to this process until the other side closes."""
    for line in sys.stdin:
        print(json.dumps({"answer": respond(**json.loads(line))}), flush=True)
    os._exit(0)  # at a normal exit, JAX would wait for the other processes of the group
