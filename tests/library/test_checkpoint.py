"""A run with checkpoints, stopped anywhere, is a run without; folders of others and damaged ones."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import laqjax
from laqjax import algorithms, sharding
from laqjax._engine import checkpoint, loop
from tests.support import KEY, Toy, make_toy

ROUNDS, CHUNK = 40, 8


class Killed(Exception):
    """Between two chunks."""


def algorithm(toy: Toy, **options: Any) -> laqjax.Algorithm:
    return algorithms.lazy_diloco(  # workers with memory, silence and the state of an inner optimizer
        toy.oracle,
        num_workers=4,
        num_local_steps=2,
        local_lr=0.01,
        max_silence=5,
        sampler=laqjax.samplers.BlockSampler(4),
        **{"lr": 0.05, "bits": 4} | options,
    )


def run(toy: Toy, folder: Path | None, rounds: int = ROUNDS, alg: Any = None, **options: Any) -> laqjax.RunResult:
    given: Any = {
        "chunk_size": CHUNK,
        "checkpoint_dir": folder,
        "checkpoint_every": CHUNK if folder else None,
        "metrics": ["grad"],
    } | options
    return laqjax.run(alg or algorithm(toy), toy.theta0, toy.shards, rounds, KEY, **given)


def same(one: laqjax.RunResult, two: laqjax.RunResult) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


@pytest.fixture(scope="module")
def straight() -> laqjax.RunResult:
    return run(make_toy(np.float32), None)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_run_that_was_killed_goes_on(
    toy: Toy, straight: laqjax.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    ordinary, left = checkpoint.RunCheckpointer.save, [chunks]

    def save(self: Any, *args: Any) -> None:
        if not left[0]:
            raise Killed
        left[0] -= 1
        ordinary(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.RunCheckpointer, "save", save)
        with pytest.raises(Killed):
            run(toy, tmp_path / "run")
    computed: list[int] = []
    with monkeypatch.context() as patch:
        head = loop.truncate_info
        patch.setattr(
            "laqjax._engine.loop.truncate_info", lambda info, rounds: computed.append(rounds) or head(info, rounds)
        )
        same(run(toy, tmp_path / "run"), straight)
    assert sum(computed) == ROUNDS - chunks * CHUNK


def test_more_rounds_go_on_and_the_same_are_there_already(
    toy: Toy, straight: laqjax.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(toy, tmp_path / "run", 20)
    same(run(toy, tmp_path / "run"), straight)
    with monkeypatch.context() as patch:
        patch.setattr("laqjax._engine.loop.run_chunk", None)
        same(run(toy, tmp_path / "run"), straight)
    with pytest.raises(ValueError, match=r"rounds = 10: must be at least 36"):
        run(toy, tmp_path / "run", 10)


def test_a_mesh_goes_on_where_one_device_stopped(toy: Toy, straight: laqjax.RunResult, tmp_path: Path) -> None:
    run(toy, tmp_path / "run", 16, worker_batch_size=1)
    out = run(toy, tmp_path / "run", mesh=sharding.make_mesh(), worker_batch_size=1)
    alone = run(toy, None, worker_batch_size=1)
    same(laqjax.RunResult(out.info, sharding.unpad_state(out.state, 4)), alone)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("algorithm", {"alg": {"lr": 0.06}}),
        ("algorithm", {"alg": {"bits": 3}}),
        ("metrics", {"metrics": []}),
    ],
)
def test_another_run_is_refused(toy: Toy, tmp_path: Path, name: str, change: dict[str, Any]) -> None:
    run(toy, tmp_path / "run", CHUNK)
    options: Any = {key: algorithm(toy, **value) if key == "alg" else value for key, value in change.items()}
    with pytest.raises(ValueError, match=rf"of a run with other arguments \({name}\)"):
        run(toy, tmp_path / "run", **options)


def test_other_data_start_and_key_are_refused(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path / "run", CHUNK)
    shards = toy.shards._replace(y=1 - np.minimum(toy.shards.y, 1))
    given: Any = {"chunk_size": CHUNK, "metrics": ["grad"], "checkpoint_dir": tmp_path / "run"}
    for start, data, key, name in (
        (toy.theta0 + 1, toy.shards, KEY, "start"),
        (toy.theta0, shards, KEY, "data"),
        (toy.theta0, toy.shards, jax.random.key(1), "key"),
    ):
        with pytest.raises(ValueError, match=rf"of a run with other arguments \({name}\)"):
            laqjax.run(algorithm(toy), start, data, ROUNDS, key, **given)


def test_checkpoints_of_another_format_are_refused(toy: Toy, tmp_path: Path) -> None:
    run(toy, tmp_path / "run", CHUNK)
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": checkpoint.FORMAT + 1}))
    with pytest.raises(ValueError, match=r"checkpoints of format 2: must be format 1"):
        run(toy, tmp_path / "run", CHUNK)


def test_a_folder_with_other_files_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="holds other files"):
        run(toy, tmp_path)


def test_a_damaged_checkpoint_falls_back(toy: Toy, straight: laqjax.RunResult, tmp_path: Path) -> None:
    run(toy, tmp_path / "run", 3 * CHUNK)
    newest = tmp_path / "run" / str(3 * CHUNK)
    assert {path.name for path in newest.parent.iterdir()} == {"run.json", "16", "24"}
    for path in newest.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cannot be read"):
        same(run(toy, tmp_path / "run"), straight)


def test_a_full_disk_is_a_warning(
    toy: Toy, straight: laqjax.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orbax.checkpoint

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        patch.setattr(orbax.checkpoint.StandardCheckpointer, "save", full)
        same(run(toy, tmp_path / "run"), straight)
    assert sum("was not written (OSError" in str(warning.message) for warning in seen) == ROUNDS // CHUNK
    same(run(toy, tmp_path / "run"), straight)  # and begins anew


def test_keys_in_a_state_are_kept(tmp_path: Path) -> None:
    """A rule may keep a key: it is saved as numbers and comes back as one."""
    some: Any = np.zeros(2, np.float32)
    state: Any = laqjax.AlgorithmState(
        some, some, some, some, jax.random.key(3), None, laqjax.types.WorkerState(None, None)
    )
    store = checkpoint.RunCheckpointer(tmp_path / "keys", {})
    store.save(1, jax.tree.map(lambda a: a, state), {"loss": some})
    store.close()
    done, back, _ = checkpoint.RunCheckpointer(tmp_path / "keys", {}).restore_latest(state, 5)
    assert done == 1
    assert jax.random.key_data(back.rule_state).tolist() == jax.random.key_data(state.rule_state).tolist()
    assert back.rule_state.dtype == state.rule_state.dtype
