"""Checkpoints of a run through orbax.

After a run was killed, the same call continues from its folder, and the result is bit-identical to that of an
uninterrupted run.
"""

import json
import logging
import math
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from laqjax._engine import placement, processes

FORMAT = 1  # of a folder of checkpoints; a change of its files or of a state's leaves gets the next number
MAX_TO_KEEP = 2  # a second one, since the newest may be damaged


class RunCheckpointer:
    """Checkpoints of one run in a folder of its own.

    Each checkpoint is a subfolder named after the number of completed rounds. It is written in the background, while
    the next chunk runs, under a temporary name, and renamed when it is complete. With several processes, each one
    writes its part into a folder that all of them see. With `single_process`, one of several processes writes
    checkpoints of its own.
    """

    def __init__(
        self,
        folder: str | Path,
        contents: dict[str, Any],
        *,
        single_process: bool = False,
        warn: Callable[[str], None] = warnings.warn,
    ):
        """Open or create the folder.

        Args:
            folder: folder for the checkpoints of this run and nothing else.
            contents: values that identify the run, by name. A folder of a run with other values is rejected with an
                error that names them.
            single_process: True if this process alone does the run, although there may be others; False if all
                processes do it together.
            warn: function that gets a message when a checkpoint cannot be read or written.

        Raises:
            ImportError: orbax is not installed.
            ValueError: the folder holds other files, or checkpoints of another run or another format.
        """
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise ImportError("checkpoints need the package orbax; run pip install 'laqjax[checkpoint]'") from None
        self.folder, self.warn, me = Path(folder).absolute(), warn, jax.process_index()
        self.leads, self.shared = single_process or me == 0, not single_process and jax.process_count() > 1
        one = {"primary_host": me, "active_processes": {me}, "barrier_sync_key_prefix": f"process-{me}"}
        together = orbax.options.MultiprocessingOptions(**(one if single_process else {}))
        # orbax waits for its folder-creating thread under a name that all processes of JAX share
        threads = orbax.options.AsyncOptions(create_directories_asynchronously=not single_process)
        self.writer = orbax.StandardCheckpointer(async_options=threads, multiprocessing_options=together)
        self.remover = ThreadPoolExecutor(1)
        logging.getLogger("absl").addFilter(_drop_orbax_merge_warning)
        path = self.folder / "run.json"
        mine = {"format": FORMAT} | {name: processes.fingerprint(value) for name, value in contents.items()}
        _check_folder(self.folder, mine)
        self._wait("looked at")  # all processes check the folder before process 0 writes to it
        for part in self.folder.glob("*.orbax-checkpoint-tmp*") if self.leads else ():  # left by a killed process
            shutil.rmtree(part, ignore_errors=True)
        if self.leads and not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / ".run.json"
            part.write_text(json.dumps(mine))
            part.replace(path)
        self._wait("made")

    def _wait(self, name: str) -> None:
        """Wait until all processes that share the run reach this point."""
        if self.shared:
            multihost_utils.sync_global_devices(f"{self.folder} {name}")

    def list_saved_rounds(self) -> list[int]:
        """Return the completed rounds of each whole checkpoint, the latest first."""
        return sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True)

    def restore_latest(self, like: Any, rounds: float = math.inf, mesh: Mesh | None = None) -> tuple[int, Any, Any]:
        """Restore the latest checkpoint that can be read.

        A damaged checkpoint is skipped with a warning.

        Args:
            like: state without padding workers, or its shapes. Leaves that are NumPy arrays here are restored as NumPy
                arrays.
            rounds: maximum number of completed rounds of the checkpoint.
            mesh: mesh on which the state is placed. None: the first local device.

        Returns:
            (completed rounds, state, arrays), or (0, None, None) if no checkpoint can be read.

        Raises:
            ValueError: there are checkpoints, but all have more than `rounds` rounds.
        """
        there = self.list_saved_rounds()
        within = [done for done in there if done <= rounds]
        if there and not within:
            raise ValueError(
                f"rounds = {rounds}: must be at least {there[-1]}, the rounds of the oldest checkpoint in "
                f"{self.folder}; give more rounds, or another folder"
            )
        for done in within:
            try:
                return done, *self._read(self.folder / str(done), like, mesh)
            except Exception as problem:  # orbax and its storage raise many types
                path = self.folder / str(done)
                self.warn(
                    f"checkpoint {path} cannot be read ({_first_line(problem)}); the run continues from an older one "
                    "or the start"
                )
        return 0, None, None

    def save(self, done: int, state: Any, arrays: dict[str, Any]) -> None:
        """Save a checkpoint in the background.

        The arrays are copied, so the caller may change or donate them as soon as this method returns. If the checkpoint
        cannot be written, `warn` gets a message and the run continues.

        Args:
            done: number of completed rounds, which names the checkpoint.
            state: state after these rounds.
            arrays: arrays to keep with it, such as the metrics of the rounds.
        """
        # "facts" is the name of the arrays in the files of this format
        content = {"state": _snapshot(_unwrap_prng_keys(state)), "facts": arrays}
        self._write_or_warn(lambda: self.writer.save(self.folder / str(done), content, force=True))

    def close(self) -> None:
        """Wait until all checkpoints are on the disk, and release the writer."""
        self._write_or_warn(lambda: None)
        self.writer.close()
        self.remover.shutdown()

    def _read(self, path: Path, like: Any, mesh: Mesh | None) -> tuple[Any, Any]:
        """Read the state and the arrays of one checkpoint."""
        leaves, structure = jax.tree.flatten(like)
        metadata: Any = self.writer.metadata(path)
        shapes = metadata.item_metadata.tree
        places = _restore_shardings(like, shapes["state"], mesh)

        def describe(shape: Any, leaf: Any = None, place: Any = None) -> Any:
            if place is None or isinstance(leaf, np.ndarray):
                return np.empty(shape.shape, shape.dtype)
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)

        state = [describe(*each) for each in zip(shapes["state"], leaves, places, strict=True)]
        target = {"state": state, "facts": jax.tree.map(describe, shapes["facts"])}
        saved: Any = self.writer.restore(path, target)
        return jax.tree.unflatten(structure, _rewrap_prng_keys(saved["state"], leaves)), saved["facts"]

    def _write_or_warn(self, write: Callable[[], None]) -> None:
        """Wait for the previous write, start a new one, delete old checkpoints, and turn an error into a warning."""
        try:
            self.writer.wait_until_finished()
            write()
            for old in self.list_saved_rounds()[MAX_TO_KEEP:] if self.leads else ():
                self.remover.submit(shutil.rmtree, self.folder / str(old), ignore_errors=True)
        except Exception as problem:
            self.warn(
                f"a checkpoint in {self.folder} was not written ({_first_line(problem)}); the run continues, and the "
                "older checkpoints are kept"
            )


def _check_folder(folder: Path, contents: dict[str, Any]) -> None:
    """Raise ValueError unless a folder is new, empty, or one of checkpoints of the run with these contents."""
    path = folder / "run.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"checkpoint_dir = {folder}, which holds other files: must be a new folder, or a folder of checkpoints"
            )
        return
    there = json.loads(path.read_text())
    if there.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint_dir = {folder} with checkpoints of format {there.get('format')}: must be format {FORMAT}; give "
            "another folder, or use the version of laqjax that wrote it"
        )
    differs = [name for name in contents if there.get(name) != contents[name]]
    if differs:
        raise ValueError(
            f"checkpoint_dir = {folder} of a run with other arguments ({', '.join(differs)}): must be a folder of the "
            "same run; give the same arguments or another folder, or remove this one"
        )


def _drop_orbax_merge_warning(record: logging.LogRecord) -> bool:
    """Filter out orbax's warning that a checkpoint holds NumPy arrays only."""
    return "Skipping merge of OCDBT" not in str(record.msg)


def _first_line(problem: Exception) -> str:
    """Return the type and the first line of an error."""
    return f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"


def _restore_shardings(like: Any, shapes: list[Any], mesh: Mesh | None) -> list[Any]:
    """Return the sharding with which each leaf is restored.

    Workers' leaves that were padded for another number of devices are restored whole on each device; the run shards
    them again.
    """
    if mesh is None:
        return [SingleDeviceSharding(jax.local_devices()[0])] * len(shapes)
    own = [False] * len(jax.tree.leaves(like[:-1])) + [True] * len(jax.tree.leaves(like.workers))
    devices = mesh.shape.get(placement.WORKER_AXIS, 1)
    split, whole = placement.partition_spec(mesh, placement.WORKER_AXIS), PartitionSpec()
    return [
        NamedSharding(mesh, split if worker and shape.shape[0] % devices == 0 else whole)
        for worker, shape in zip(own, shapes, strict=True)
    ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _unwrap_prng_keys(tree: Any) -> list[Any]:
    """Return the leaves of a pytree, with typed PRNG keys as arrays of numbers."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


_copy_on_device = jax.jit(partial(jax.tree.map, jnp.copy))


def _snapshot(leaves: list[Any]) -> list[Any]:
    """Copy the leaves of a state, since the next chunk donates it.

    The copy is on the host, which costs orbax a third less work, unless the leaves are spread over several processes.
    """
    whole = all(isinstance(leaf, np.ndarray) or leaf.is_fully_addressable for leaf in leaves)
    if not whole:
        return _copy_on_device(leaves)
    return [leaf if isinstance(leaf, np.ndarray) else np.array(leaf) for leaf in leaves]  # orbax copies NumPy arrays


def _rewrap_prng_keys(data: list[Any], like: list[Any]) -> list[Any]:
    """Invert `_unwrap_prng_keys`."""
    return [
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(kind)) if _is_key(kind) else leaf
        for leaf, kind in zip(data, like, strict=True)
    ]
