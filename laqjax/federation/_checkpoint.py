"""Checkpoint of the server: one file that holds everything that the next round needs."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from laqjax.federation._protocol import NO_UPLOAD, RELEASED_UPLOAD, SCHEME_PARTS, UploadId, differing_parts
from laqjax.types import AlgorithmState

CHECKPOINT_FORMAT = 2  # raise it when the arrays of the file change
IDENTITY_PARTS = (*SCHEME_PARTS, "key")  # settings of a run, and its PRNG key


@dataclass
class WorkerRecords:
    """What the server stores about the workers, in the order of their ids.

    rule_states: the rule's state of each worker, [M, ...].
    contributions: each worker's part of the aggregate, [p]; None if the memory is not persistent.
    accepted: the last accepted upload of each worker.
    owners: key of the node that owns the id of each worker; b"" if none does.
    max_magnitudes: worker -> largest absolute value that it has sent.
    """

    rule_states: Any
    contributions: list[Any]
    accepted: list[UploadId]
    owners: list[bytes]
    max_magnitudes: dict[int, float]

    def release(self, worker: int) -> None:
        """Free the id of a worker for another node; no worker state matches, so that it starts with a full upload."""
        self.owners[worker] = b""
        self.max_magnitudes.pop(worker, None)
        if self.contributions[worker] is not None and self.accepted[worker] != NO_UPLOAD:
            self.accepted[worker] = RELEASED_UPLOAD


class Checkpoint(NamedTuple):
    """Contents of a checkpoint."""

    identity: bytes  # 8 bytes for each of `IDENTITY_PARTS`
    session: int  # id of the server process
    state: AlgorithmState  # without its workers
    workers: WorkerRecords


def _make_tree(contents: Checkpoint) -> Any:
    """Build the pytree whose leaves the file holds."""
    workers = contents.workers
    rounds = [np.asarray(round, np.int32) for round, _ in workers.accepted]
    digests = [np.frombuffer(digest, np.uint8) for _, digest in workers.accepted]
    peaks = np.asarray([workers.max_magnitudes.get(worker, -1.0) for worker in range(len(rounds))])
    about = np.frombuffer(contents.identity, np.uint8), np.asarray(contents.session, np.int64)
    owners = np.frombuffer(b"".join(owner.ljust(32, b"\0") for owner in workers.owners), np.uint8)
    return about, contents.state, workers.contributions, workers.rule_states, rounds, digests, peaks, owners


def save_checkpoint(path: Path, contents: Checkpoint) -> None:
    """Write a checkpoint atomically: a crash leaves the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(_make_tree(contents))]
        np.savez(file, *arrays, format=np.asarray(CHECKPOINT_FORMAT))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def restore_checkpoint(path: Path, initial: Checkpoint) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: the file.
        initial: contents before the first round; they give structure, shapes, dtypes and identity.

    Returns:
        The contents of the file.

    Raises:
        ValueError: the file is damaged, has another format, or belongs to another algorithm, model or key.
    """
    like = _make_tree(initial)
    try:
        with path.open("rb") as opened, np.load(opened) as file:  # NumPy leaves a damaged file open
            arrays = dict(file)
    except (OSError, ValueError, EOFError, KeyError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): must be readable; remove it, or give another file") from None
    found = arrays.pop("format", None)
    if not np.array_equal(found, CHECKPOINT_FORMAT):
        raise ValueError(
            f"{path} is of format {found}: must be format {CHECKPOINT_FORMAT}; remove it, or give another file"
        )
    leaves = list(arrays.values())
    if parts := differing_parts(leaves[0].tobytes(), initial.identity, IDENTITY_PARTS):
        raise ValueError(f"{path} is of a run with another {', '.join(parts)}: must be of this run; give another file")
    shapes = [[(np.shape(leaf), np.asarray(leaf).dtype) for leaf in part] for part in (jax.tree.leaves(like), leaves)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{path} is of a run with another optimizer: must be of this run; give another file")
    about, state, contributions, rule_states, rounds, digests, peaks, owners = jax.tree.unflatten(
        jax.tree.structure(like), leaves
    )
    state, contributions = jax.tree.map(jnp.asarray, (state, contributions))
    accepted = [(int(round), digest.tobytes()) for round, digest in zip(rounds, digests, strict=True)]
    magnitudes = {worker: float(peak) for worker, peak in enumerate(peaks) if peak >= 0}
    keys = [owner.tobytes() if owner.any() else b"" for owner in owners.reshape(-1, 32)]
    workers = WorkerRecords(rule_states, contributions, accepted, keys, magnitudes)
    return Checkpoint(initial.identity, int(about[1]), state, workers)
