"""Many devices and many processes are one device, bit for bit; what travels is packed; what cannot work is refused."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import laqjax
from laqjax import algorithms, compressors, distributed, types
from laqjax._core.validation import get_declaration
from laqjax._engine import collectives
from tests.support import KEY, Half, Toy

ROOT = Path(__file__).parents[2]
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # compiled as users compile
# JAX in its optimised form rounds the gradients of these otherwise when a round is compiled for a mesh: two gradients, or a
# width of the code that only the run knows, are fused with what reads them. Their decisions are the same. The uncompressed
# change of diloco differs in the last bit of a few coordinates.
ROUNDED = {"laq_adaptive", "lasg_wk1", "lasg_wk2", "cada1", "cada2", "diloco"}


def command(case: str, out: Path, devices: int, *process: int) -> list[str]:
    return [sys.executable, "-m", "tests.library.on_mesh", case, str(out), str(devices), *map(str, process)]


def on_devices(case: str, out: Path, devices: int, **env: str) -> dict[str, str]:
    """What one process with so many devices leaves, file by file."""
    subprocess.run(command(case, out, devices), check=True, cwd=ROOT, env=os.environ | env, timeout=600)
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


def on_processes(case: str, out: Path, **env: str) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options: Any = {"cwd": ROOT, "env": os.environ | OPTIMIZED | env, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command(case, out, 2, 2, rank, port), **options) for rank in (0, 1)]


def check_resumed(cut: Path, straight: Path) -> None:
    """A run went on from round 30 or later, and left the state and the metrics of an undisturbed one, bit for bit."""
    computed = [int((out / "computed").read_text()) for out in (cut, straight)]
    assert computed[0] <= 170
    assert computed[1] == 200
    with np.load(cut / "resumed.npz") as mine, np.load(straight / "resumed.npz") as other:
        assert mine.files == other.files
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], other[name])


def test_four_devices_are_one(tmp_path: Path) -> None:
    results = on_devices("short", tmp_path, 4)
    assert len(results) == 7
    assert set(results.values()) == {""}, results


@pytest.mark.distributed
def test_points_and_workers_are_spread_at_once(tmp_path: Path) -> None:
    assert on_devices("swept", tmp_path, 4, **OPTIMIZED) == {"swept-all_gather": "", "swept-all_to_all": ""}


def test_what_a_mesh_cannot_do_is_refused(tmp_path: Path) -> None:
    lines = on_devices("refused", tmp_path, 4)["refused"].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "mesh with axes ('model',)",
        "shards of 3 workers",
        "collective = 'gossip'",
        "messages of 3, 4, 5, 6 bits per number of 'codes' in one sweep",
        "collective 'all_to_all' with compressor Sparse",
        "mesh of 1 x 3 devices",
        "shards.weight of worker 0 sums to 0",
    ]


@pytest.mark.distributed
def test_a_loop_of_ones_own_sends_what_a_run_sends(tmp_path: Path) -> None:
    results = on_devices("lazy", tmp_path, 4, **OPTIMIZED)
    assert results == {"lazy-all_gather": "", "lazy-all_to_all": ""}


@pytest.mark.distributed
def test_parameters_split_over_a_second_axis_do_not_deadlock(tmp_path: Path) -> None:
    results = on_devices("beside", tmp_path, 4)
    assert len(results) == 4
    assert set(results.values()) == {""}, results


@pytest.mark.distributed
def test_parameters_split_over_a_manual_axis_are_whole_ones(tmp_path: Path) -> None:
    """Also where the compiler splits them over a third axis."""
    results = on_devices("split", tmp_path, 8)
    assert results == dict.fromkeys(("laq-all_gather", "laq-beside", "qgd", "ef21", "diloco"), "")


@pytest.mark.distributed
def test_more_methods_with_split_parameters(tmp_path: Path) -> None:
    results = on_devices("split_more", tmp_path, 4, **OPTIMIZED)
    assert results == dict.fromkeys(("laq-all_to_all", "laq-all_reduce", "leaf", "lag", "small"), "")


@pytest.mark.distributed
def test_local_training_in_a_loop_of_ones_own_is_diloco(tmp_path: Path) -> None:
    assert set(on_devices("diloco", tmp_path, 4)) == {"diloco"}


@pytest.mark.distributed
def test_four_devices_are_one_over_two_hundred_rounds(tmp_path: Path) -> None:
    results = on_devices("smaller", tmp_path, 4, **OPTIMIZED)
    assert len(results) == 14
    assert set(results.values()) == {""}, results


@pytest.mark.distributed
def test_two_processes_are_one_over_two_hundred_rounds_of_the_reference_problem(tmp_path: Path) -> None:
    for process in on_processes("reference", tmp_path):
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
    results = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert len(results) == 14
    assert set(results.values()) == {""}, results


@pytest.mark.distributed
def test_every_member_is_the_same_on_a_mesh(tmp_path: Path) -> None:
    results = on_devices("family", tmp_path, 3, **OPTIMIZED)
    assert {name for name, differs in results.items() if differs} <= ROUNDED, results
    assert not any("sent" in differs or "bits" in differs for differs in results.values())


@pytest.mark.distributed
def test_a_lost_process_is_noticed_and_the_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    cut, straight = tmp_path / "cut", tmp_path / "straight"
    cut.mkdir()
    straight.mkdir()
    first, second = on_processes("resumed", cut, PACE="0.5")
    while not (cut / "checkpoints" / "30").exists():
        assert first.poll() is None
        time.sleep(0.1)
    second.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    errors = first.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 60
    assert first.returncode != 0
    assert "process 0 lost the connection to another of 2" in errors
    second.communicate()
    for out in (cut, straight):
        for process in on_processes("resumed", out):
            errors = process.communicate(timeout=300)[1]
            assert process.returncode == 0, errors
    check_resumed(cut, straight)


@pytest.mark.distributed
def test_a_killed_run_goes_on_with_the_states_of_its_inner_optimizers(tmp_path: Path) -> None:
    """Killed at a random moment, which may be in the midst of a write."""
    cut, straight = tmp_path / "cut", tmp_path / "straight"
    cut.mkdir()
    straight.mkdir()
    options: Any = {"cwd": ROOT, "env": os.environ | OPTIMIZED}
    paced = options | {"env": options["env"] | {"PACE": "0.2"}}
    process = subprocess.Popen(command("resumed_locally", cut, 1), **paced)
    while not list(cut.glob("checkpoints/[3-9]0")):
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(np.random.default_rng().uniform(0, 2))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for out in (cut, straight):
        subprocess.run(command("resumed_locally", out, 1), check=True, timeout=600, **options)
    check_resumed(cut, straight)


@pytest.mark.distributed
def test_processes_that_disagree_stop_before_the_first_round(tmp_path: Path) -> None:
    for process in on_processes("disagree", tmp_path):
        errors = process.communicate(timeout=120)[1]
        assert process.returncode != 0
        assert "process 1 differs from process 0" in errors


def test_a_coordinator_that_does_not_answer_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"coordinator = '127\.0\.0\.1:1', not reachable within 0\.1 s"):
        distributed.initialize_distributed("127.0.0.1:1", 2, 1, timeout=0.1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="coordinator = 'here': must be host:port"):
        distributed.initialize_distributed("here", 2, 1)
    with pytest.raises(ValueError, match="process_id = None: must be all given"):
        distributed.initialize_distributed("127.0.0.1:1")


@given(bits=st.integers(1, 32), codes=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=70))
def test_packing_loses_nothing_and_wastes_less_than_a_group(bits: int, codes: list[int]) -> None:
    values = np.array(codes, np.uint32) & np.uint32(2**bits - 1)
    words = collectives.pack(jnp.asarray(values), bits)
    np.testing.assert_array_equal(collectives.unpack(words, bits, values), values)
    assert words.size == collectives.num_packed_words(values, bits)
    assert 32 * words.size < bits * (len(codes) + 32)


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.float16, jnp.bfloat16, np.float32, np.float64])
def test_facts_of_every_dtype_come_back_from_words(x64, dtype: Any) -> None:
    values = jnp.asarray(np.arange(-3, 21).reshape(4, 3, 2) % 5 - 2).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        values = values / jnp.asarray(7, dtype)
    back = collectives.from_words(collectives.to_words(values), values)
    assert back.dtype == values.dtype
    np.testing.assert_array_equal(back, values)


class Undeclared:
    """A compressor of the user's, in the form of `Identity`."""

    def encode(self, target: Any, keys: Any) -> Any:
        return {"values": target}

    def decode(self, payload: Any, like: Any) -> Any:
        return payload["values"]

    def wire_fields(self, payload: Any, like: Any) -> Any:
        yield types.WireField(payload, "values", like, 32)


SCHEMES = {
    "half": (Half(), (16,), True),
    "identity": (compressors.identity(), (32,), True),
    "grid": (compressors.grid(3), (32, 3), True),
    "qsgd": (compressors.qsgd(5), (32, 1, 3), True),
    "natural": (compressors.natural(), (1, 8), True),
    "sign": (compressors.sign(), (32, 1), True),
    "top_k": (compressors.top_k(7), (6, 32), False),
    "blockwise": (compressors.blockwise(compressors.grid(5), (20, 43)), (32, 5, 32, 5), False),
    "adaptive": (compressors.adaptive_grid(), None, True),
    "sampled": (compressors.optimal_sparsifier(0.3), None, True),
}


MORE_SCHEMES: list[Any] = [
    compressors.sign(scaled=False),
    compressors.ternary(),
    compressors.rand_k(3),
    compressors.chunked_top_k(4, 2),
    compressors.statistical_grid(2),
    compressors.quantized_values(compressors.top_k(3), compressors.grid(3)),
    compressors.quantized_values(compressors.chunked_top_k(4, 2), compressors.adaptive_grid()),
    compressors.bernoulli_full(compressors.grid(3), 0.1),
    compressors.bernoulli_full(compressors.top_k(3), 0.1),
    compressors.blockwise(compressors.grid(3), (8,)),
    compressors.blockwise(compressors.adaptive_grid(), (20, 43)),
]


def has_static_layout(compressor: Any) -> bool:
    """Whether the fields of a message can be listed without a message."""
    try:
        list(compressor.wire_fields({}, jax.ShapeDtypeStruct((63,), np.float32)))
    except (KeyError, ValueError):  # a field reads the payload; blocks for another p
        return isinstance(compressor, compressors.Blockwise) and has_static_layout(compressor.compressor)
    return True


def is_coordinatewise(compressor: Any) -> bool:
    """Whether half of a message decodes to half of the vector, for 8 random numbers."""
    keys = types.RoundKeys(KEY, KEY, KEY, jnp.int32(1), jnp.int32(0))
    target = jax.random.normal(KEY, (8,))
    try:
        payload = compressor.encode(target, keys)
        parts = [jax.tree.map(lambda a: a[half] if a.ndim else a, payload) for half in (slice(4), slice(4, 8))]  # noqa: B023
        decoded = [compressor.decode(part, jax.ShapeDtypeStruct((4,), np.float32)) for part in parts]
    except (ValueError, TypeError, IndexError):
        return False
    whole = compressor.decode(payload, jax.ShapeDtypeStruct((8,), np.float32))
    return all(part.shape == (4,) for part in decoded) and bool(jnp.array_equal(jnp.concatenate(decoded), whole))


def test_what_compressors_declare_is_true(toy: Toy) -> None:
    """And a compressor that declares nothing moves decoded, whatever its messages are."""
    listed = [*(scheme for name, (scheme, _, _) in SCHEMES.items() if name != "half"), *MORE_SCHEMES]
    public = [getattr(compressors, name) for name in compressors.__all__]
    assert {kind for kind in public if isinstance(kind, type)} == {type(compressor) for compressor in listed}
    for compressor in listed:
        declared = [
            get_declaration(compressor, types.CompressorTraits, name)
            for name in ("has_static_layout", "is_coordinatewise")
        ]
        assert declared == [has_static_layout(compressor), is_coordinatewise(compressor)], compressor
    alg = algorithms.ef21(toy.oracle, lr=0.1, num_workers=4, compressor=Undeclared())
    assert collectives.field_widths(alg) is None
    assert collectives.all_to_all(alg).widths is None
    one = algorithms.ef21(toy.oracle, lr=0.1, num_workers=4, compressor=compressors.top_k(1))
    with pytest.raises(ValueError, match="must be a compressor with a code for each coordinate"):
        collectives.all_to_all(one)  # half of a message of one number may look like half of a vector


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.float32) for name in SCHEMES), *itertools.product(["half", "grid"], [np.float16, jnp.bfloat16])],
)
def test_a_packed_message_decodes_to_what_was_sent(name: str, dtype: Any) -> None:
    compressor, widths, in_chunks = SCHEMES[name]
    oracle = laqjax.oracles.from_loss(lambda params, x, y: params[0] * y, jnp.zeros(63, dtype))
    alg = algorithms.ef21(oracle, lr=0.1, num_workers=4, compressor=compressor)
    if dtype == np.float32:
        assert collectives.field_widths(alg) == widths
    widths = collectives.field_widths(alg)
    keys = types.RoundKeys(KEY, KEY, KEY, jnp.int32(1), jnp.int32(0))
    target = jax.random.normal(KEY, (63,), dtype)
    payload = compressor.encode(target, keys)
    decoded = compressor.decode(payload, target)
    upload = types.WorkerUpload(payload, decoded, jnp.asarray(True), jnp.asarray(True), jnp.int32(0))
    words = collectives.pack_message(collectives.field_values(compressor, upload, widths), widths)
    assert words.size == collectives.num_message_words(alg, 63, widths)
    np.testing.assert_array_equal(collectives.unpack_message(compressor, words, target, widths), decoded)
    if not in_chunks:
        with pytest.raises(ValueError, match="must be a compressor with a code for each coordinate"):
            collectives.all_to_all(alg)
