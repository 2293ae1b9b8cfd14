"""Tests of experiments.scaling: bytes of collectives, groups of processes that leave nothing behind, the quick run."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import polars as pl
import psutil
import pytest

import laqjax
from experiments import scaling
from experiments.benchmarks import hlo_traffic, process_group
from experiments.figures import scaling_figures
from experiments.harness import datasets, grid, processes, storage

HLO = """HloModule jit_chunk, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%sent (p: (u32[5,7])) -> f32[9] {
  %p = (u32[5,7]{1,0}) parameter(0)
  %every = u32[20,7]{1,0} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %total = f32[9]{0} fusion(%every), kind=kLoop, calls=%deeper
}

%deeper (q: u32[20,7]) -> f32[9] {
  %q = u32[20,7]{1,0} parameter(0)
  %parts = (u32[3,2]{1,0}, u32[3,2]{1,0}) all-to-all(%q, %q), replica_groups={{0,1},{2,3}}
  ROOT %psum = f32[9]{0} all-reduce(%parts), replica_groups=[1,4]<=[4], to_apply=%add
}

%silent (p: ()) -> f32[9] {
  ROOT %zeros = f32[9]{0} broadcast()
}

%round (state: (s32[], f32[9])) -> (s32[], f32[9]) {
  %state = (s32[], f32[9]{0}) parameter(0)
  %facts = (bf16[2,3]{1,0}, bf16[8,3]{1,0}) all-gather-start(%state), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = bf16[8,3]{1,0} all-gather-done(%facts)
  ROOT %next = f32[9]{0} conditional(%done, %a, %b), branch_computations={%silent, %sent}
}

ENTRY %main (x: f32[9]) -> f32[9] {
  ROOT %loop = (s32[], f32[9]{0}) while(%x), condition=%add, body=%round
}
"""


def test_bytes_of_a_program_made_by_hand():
    always = 8 * 3 * 2 * 3 / 4
    skipped = 20 * 7 * 4 * 3 / 4 + 2 * 3 * 2 * 4 * 1 / 2 + 2 * 9 * 4 * 3 / 4
    assert hlo_traffic.count_received_bytes(HLO) == {"always": always, "skipped": skipped}


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="replica_groups"):
        hlo_traffic.count_received_bytes(HLO.replace("replica_groups={{0,1},{2,3}}", "groups=?"))
    with pytest.raises(ValueError, match="f4"):
        hlo_traffic.count_received_bytes(HLO.replace("bf16", "f4"))
    with pytest.raises(ValueError, match="ENTRY"):
        hlo_traffic.count_received_bytes("nothing")


def echo(rank: int, processes: int, port: int) -> None:
    def respond(**question):
        if question.get("fail") == rank:
            raise ValueError("as asked")
        return [rank, processes, question, os.getpid(), os.environ["XLA_FLAGS"].count("device_count=3")]

    process_group.serve(respond)


def there(pid: int) -> bool:
    return psutil.pid_exists(pid)


@pytest.fixture
def entry_point(tmp_path, monkeypatch):
    """Return the name of `echo` in a module that new processes import without JAX."""
    source = Path(__file__).read_text()
    function = source[source.index("def echo") : source.index("def there")]
    (tmp_path / "echoing.py").write_text(f"import os\nfrom experiments.benchmarks import process_group\n{function}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # a group finds the experiments wherever it is started
    monkeypatch.chdir(tmp_path)
    return "echoing:echo"


@pytest.mark.distributed
def test_group_answers_and_ends(entry_point):
    with process_group.start_group(entry_point, processes=2, devices=3) as group:
        answers = group.ask(number=4)
        assert [(a[0], a[1], a[2], a[4]) for a in answers] == [(0, 2, {"number": 4}, 1), (1, 2, {"number": 4}, 1)]
        pids = [a[3] for a in answers]
        assert all(map(there, pids))
    assert not any(map(there, pids))


@pytest.mark.distributed
@pytest.mark.parametrize("error", [KeyboardInterrupt, ChildProcessError])
def test_nothing_is_left_behind(entry_point, error):
    pids = []

    def interrupted():
        with process_group.start_group(entry_point, processes=2, devices=3) as group:
            pids.extend(answer[3] for answer in group.ask())
            if error is KeyboardInterrupt:
                raise KeyboardInterrupt
            group.ask(fail=1)

    with pytest.raises(error, match="process 1 of 2 ended.*as asked" if error is ChildProcessError else None):
        interrupted()
    assert len(pids) == 2
    assert not any(map(there, pids))


@pytest.mark.distributed
def test_processes_end_when_the_process_that_asks_is_killed(entry_point):
    program = f"from experiments.benchmarks import process_group; s = process_group.start_group({entry_point!r}, 1, 3); group = s.__enter__(); print(group.ask()[0][3], flush=True); group.ask(); import time; time.sleep(60)"
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        parent.kill()
    end = time.monotonic() + 20
    while there(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not there(pid)


@pytest.mark.parametrize(("fixed", "power"), [(0.0, 1.0), (0.01, 1.0), (0.02, 0.7), (0.005, 1.3)])
def test_slope_above_the_fixed_cost(fixed, power):
    x = np.array([10, 30, 100, 300, 1000])
    found = scaling_figures.fit_power_law(x, fixed + 1e-3 * x**power)
    np.testing.assert_allclose(found, (fixed, power), atol=0.02)


@pytest.mark.distributed
def test_quick_run(tmp_path):
    scaling.main(tmp_path, quick=True)
    for name in ("cost", "bytes", "memory", "model", "goals"):
        assert (tmp_path / f"{name}.csv").exists()
        assert len(pl.read_parquet(tmp_path / f"{name}.parquet"))
    for name in ("cost", "devices", "model"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.svg").exists()
    assert storage.read_json(tmp_path / "run.json")["quick"]
    assert "model" in storage.read_json(tmp_path / "model.json")["assumptions"][0]
    moved = pl.read_parquet(tmp_path / "bytes.parquet").row(0, named=True)
    words = 983  # of a message: 7850 codes of 4 bits in whole words of 32, and a radius
    assert moved["skipped"] == 10 * words * 4 / 2
    assert moved["one collective / float32"] < 0.14
    if moved["loopback MB"] is not None:
        assert moved["loopback MB"] > 0.8 * moved["moved MB"]
    messages = moved["uploads"]
    assert moved["server MB"] == pytest.approx(messages * (4 * 7850 + 32) / 8e6)


def test_devices_come_before_all_else():
    with pytest.raises(ValueError, match="devices = 2: must be set before"):
        grid.set_cpu_devices(2)
    with pytest.raises(ValueError, match="devices"):
        grid.set_cpu_devices(0)


@pytest.mark.distributed
def test_example_of_hosts():
    command = [
        sys.executable,
        "-m",
        "experiments.examples.multihost",
        "--coordinator",
        f"127.0.0.1:{processes.find_free_port()}",
    ]
    command += ["--num-processes", "2", "--rows", "60", "--rounds", "20", "--process-id"]
    options = {"cwd": Path(__file__).parents[2], "env": os.environ | {"JAX_PLATFORMS": "cpu"}}
    with contextlib.ExitStack() as stack:
        pair = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, **options) for i in (0, 1)]
        for process in pair:
            stack.enter_context(process)
            stack.callback(process.kill)
        said = [process.communicate(timeout=300)[0].splitlines()[-1:] for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    problem, data = laqjax.problems.Softmax(784, 10), datasets.load("mnist")
    alg = laqjax.algorithms.laq(problem.oracle(), lr=0.02, num_workers=10, bits=4)
    shards = laqjax.partition_data(data.x[:600], data.y[:600], 10, "contiguous")
    info = laqjax.run(alg, problem.init_params(0), shards, 20, jax.random.key(0), worker_batch_size=1).info
    assert f"f = {info.loss[-1]:.9g} after 20 rounds, {info.sent.sum()} uploads" in said[0][0]
    assert "uploads" not in "".join(said[1])
