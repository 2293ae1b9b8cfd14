"""Checkpoints of a run through orbax: a folder from which the same call goes on, bit for bit, after it was killed."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from laqjax import mesh as meshes
from laqjax.types import Info, State

KEEP = 2  # the newest may be damaged


class Checkpoints:
    """The checkpoints of one run in a folder of its own, a folder each, named after the rounds done.

    Each is written under another name and renamed when it is whole, in the background, while the next chunk runs. Of several
    processes each writes its part, into a folder that all of them see.
    """

    def __init__(self, folder: str | Path, contents: dict[str, Any]):
        """Open or make the folder.

        Args:
            folder: for the checkpoints of this run and nothing else.
            contents: what the run is made of, by name; a folder of another run is refused, saying what differs.

        Raises:
            ImportError: orbax is not installed.
            ValueError: the folder holds other things, or the checkpoints of another run.
        """
        try:
            import orbax.checkpoint as orbax
        except ImportError:
            raise ImportError("checkpoints need orbax: pip install 'laqjax[checkpoint]'") from None
        self.folder, self.writer = Path(folder).absolute(), orbax.StandardCheckpointer()
        path, mine = self.folder / "run.json", {name: meshes.digest(value) for name, value in contents.items()}
        if self.folder.exists() and any(self.folder.iterdir()) and not path.exists():
            raise ValueError(
                f"checkpoint = {folder}: expected a new folder, or one of checkpoints; this one holds other files"
            )
        there = json.loads(path.read_text()) if path.exists() else mine
        differs = [name for name in mine if there.get(name) != mine[name]]
        if differs:
            raise ValueError(
                f"checkpoint = {folder} is of another run: {', '.join(differs)} differs; expected the same arguments, another "
                "folder, or this one removed"
            )
        self._wait("looked at")  # before one writes: a folder that is being made is no stranger's
        if jax.process_index() == 0 and not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self.folder / ".run.json"
            part.write_text(json.dumps(mine))
            part.replace(path)
        self._wait("made")

    def _wait(self, name: str) -> None:
        """Until all processes are here."""
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"{self.folder} {name}")

    def rounds(self) -> list[int]:
        """Of the whole checkpoints, the latest first."""
        return sorted((int(path.name) for path in self.folder.iterdir() if path.name.isdigit()), reverse=True)

    def latest(self, rounds: int, like: State, mesh: Mesh | None = None) -> tuple[int, Any, Any]:
        """(rounds done, state, info of all of them) of the latest checkpoint that can be read, (0, None, None) without one.

        A damaged one is passed over with a warning. `like`: shapes of a state, without padding.

        Raises:
            ValueError: all have more than `rounds` rounds.
        """
        there = self.rounds()
        within = [done for done in there if done <= rounds]
        if there and not within:
            raise ValueError(
                f"rounds = {rounds}: the checkpoints in {self.folder} have {there[-1]} and more; ask for as many, or give "
                "another folder"
            )
        for done in within:
            try:
                return done, *self._read(self.folder / str(done), like, mesh)
            except Exception as problem:  # orbax and its storage raise many kinds
                warnings.warn(
                    f"the checkpoint {self.folder / str(done)} cannot be read ({_line(problem)}); going on from the one before",
                    stacklevel=4,
                )
        return 0, None, None

    def save(self, done: int, state: State, info: Info) -> None:
        """The state, and the info of all rounds so far; returns before it is on the disk. A warning where it cannot be."""
        own = _copied(state)  # the next chunk consumes the state
        content = {"state": _data(own), "info": info._asdict()}
        self._careful(lambda: self.writer.save(self.folder / str(done), content, force=True))

    def close(self) -> None:
        """Wait until all is on the disk."""
        self._careful(lambda: None)
        self.writer.close()

    def _read(self, path: Path, like: State, mesh: Mesh | None) -> tuple[State, Info]:
        leaves, structure = jax.tree.flatten(like)
        metadata: Any = self.writer.metadata(path)
        shapes = metadata.item_metadata.tree
        places = _places(like, shapes["state"], mesh)
        target = {
            "state": [
                jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
                for shape, place in zip(shapes["state"], places, strict=True)
            ],
            "info": jax.tree.map(lambda shape: np.empty(shape.shape, shape.dtype), shapes["info"]),
        }
        saved: Any = self.writer.restore(path, target)
        return jax.tree.unflatten(structure, _keys(saved["state"], leaves)), Info(**saved["info"])

    def _careful(self, write: Callable[[], None]) -> None:
        try:
            self.writer.wait_until_finished()
            write()
            for old in self.rounds()[KEEP:] if jax.process_index() == 0 else ():
                shutil.rmtree(self.folder / str(old), ignore_errors=True)
        except Exception as problem:
            warnings.warn(
                f"a checkpoint in {self.folder} was not written ({_line(problem)}); the run goes on, and the one before stands",
                stacklevel=5,
            )


@jax.jit
def _copied(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"


def _places(like: State, shapes: list[Any], mesh: Mesh | None) -> list[Any]:
    """Where each leaf is read to: what was padded for another number of devices whole, the run spreads it again."""
    if mesh is None:
        return [SingleDeviceSharding(jax.local_devices()[0])] * len(shapes)
    own = [False] * len(jax.tree.leaves(like[:-1])) + [True] * len(jax.tree.leaves(like.workers))
    devices = mesh.shape.get(meshes.WORKERS, 1)
    split, whole = meshes.spec(mesh, meshes.WORKERS), PartitionSpec()
    return [
        NamedSharding(mesh, split if worker and shape.shape[0] % devices == 0 else whole)
        for worker, shape in zip(own, shapes, strict=True)
    ]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(tree: Any) -> list[Any]:
    """The leaves as numbers."""
    return [jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree)]


def _keys(data: list[Any], like: list[Any]) -> list[Any]:
    """The inverse of `_data`."""
    return [
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(kind)) if _is_key(kind) else leaf
        for leaf, kind in zip(data, like, strict=True)
    ]
