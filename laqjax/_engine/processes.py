"""Several processes: initialize them, compare their arguments, and translate their errors."""

import hashlib
import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def initialize_distributed(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 60,
    heartbeat: int = 30,
) -> None:
    """Connect this process to the other processes of a run. Call it before any other use of JAX.

    Args:
        coordinator: address host:port of process 0. None: JAX finds it (TPU pods, Slurm).
        num_processes: number of processes. None: JAX finds it.
        process_id: index of this process. None: JAX finds it.
        timeout: seconds to wait for the coordinator.
        heartbeat: seconds after which a lost process is detected.

    Raises:
        ValueError: only some of the first three are given, or none of them and JAX does not find them.
        TimeoutError: the coordinator does not answer at its address.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator = {coordinator}, num_processes = {num_processes}, process_id = {process_id}: must be all "
            "given, or all None where JAX finds them (TPU pods, Slurm)"
        )
    if coordinator is not None and process_id:
        _wait_for_coordinator(coordinator, timeout)
    options: Any = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": heartbeat}
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)
    except ValueError as error:
        if any(given):
            raise
        raise ValueError(
            "coordinator, num_processes and process_id are None: must be given, since JAX finds no Slurm or TPU pod "
            f"({error})"
        ) from None


def _wait_for_coordinator(address: str, timeout: float) -> None:
    """Wait until the coordinator accepts connections.

    Raises:
        ValueError: the address is not host:port.
        TimeoutError: the coordinator does not answer in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator = {address!r}: must be host:port")
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError as problem:
            if time.monotonic() > end:
                raise TimeoutError(
                    f"coordinator = {address!r}, not reachable within {timeout:g} s ({problem}): must be the address "
                    "of process 0; check that it runs and that the port is open"
                ) from None
        time.sleep(0.2)


@contextmanager
def translate_lost_process_errors() -> Iterator[None]:
    """Translate JAX's error of a failed collective into a ConnectionError, if there are several processes."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise ConnectionError(
            f"process {jax.process_index()} lost the connection to another of {jax.process_count()} processes, which "
            f"was killed, failed or cannot be reached ({str(error).splitlines()[0][:200]}); start all processes again: "
            "a run with checkpoints continues from the last one"
        ) from None


def assert_same_on_all_processes(what: str, *values: Any) -> None:
    """Check that all processes have the same values, before long work begins.

    Args:
        what: description of the values, for the error message.
        *values: arrays, or pytrees of them.

    Raises:
        ValueError: a process has other values than process 0.
    """
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(fingerprint(values)), np.uint8)
    every = multihost_utils.process_allgather(mine)
    others = [i for i, row in enumerate(every) if not np.array_equal(row, every[0])]
    if others:
        raise ValueError(
            f"{what} (process {others[0]} differs from process 0): must be the same on all {len(every)} processes"
        )


def run_on_process_zero(act: Callable[[], Any]) -> Any:
    """Call a function on process 0 only, and return its result or raise its error on all processes.

    Args:
        act: function whose result can be converted to JSON.

    Returns:
        The result of `act`, the same on all processes.

    Raises:
        ValueError, OSError: `act` failed. Process 0 raises the original error. The others raise an OSError if that was
            one, and a ValueError otherwise.
        ConnectionError: another process was lost.
    """
    if jax.process_count() == 1:
        return act()
    said, failed = b"", None
    if jax.process_index() == 0:
        try:
            said = json.dumps([act(), None, False]).encode()
        except Exception as error:
            failed = error
            said = json.dumps([None, str(error), isinstance(error, OSError)]).encode()
    with translate_lost_process_errors():
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
        text = multihost_utils.broadcast_one_to_all(np.frombuffer(said.ljust(size), np.uint8))
    if failed:
        raise failed
    value, refused, by_system = json.loads(bytes(np.asarray(text, np.uint8)))
    if refused is not None:
        raise OSError(refused) if by_system else ValueError(refused)
    return value


def fingerprint(tree: Any) -> str:
    """Compute the SHA-256 fingerprint of a pytree.

    It covers the structure, the shapes, the dtypes and the numbers. Of arrays that are spread over processes it covers
    only shapes and dtypes.
    """
    leaves, structure = jax.tree.flatten(tree)
    whole = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", str(structure)).encode())  # no memory addresses
    for leaf in leaves:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        known = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
        array = np.asarray(leaf) if known else None
        whole.update(f"{np.shape(leaf)} {getattr(leaf, 'dtype', type(leaf))}".encode())
        whole.update(b"" if array is None else np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return whole.hexdigest()
