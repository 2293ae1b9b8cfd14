"""Run LAQ on MNIST over many processes or hosts: the same command on each.

python -m experiments.examples.multihost --coordinator HOST:PORT --num-processes 2 --process-id 0
srun python -m experiments.examples.multihost        on Slurm and TPU pods JAX finds the processes
"""

from typing import Literal

import jax
import numpy as np
import tyro

import laqjax
from experiments.harness import cli, datasets
from laqjax import distributed, sharding


def main(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    collective: Literal["all_gather", "all_to_all", "all_reduce"] = "all_gather",
    workers: int = 10,
    rows: int = 6000,
    rounds: int = 200,
) -> None:
    with cli.exit_on_user_error():
        distributed.initialize_distributed(coordinator, num_processes, process_id)  # before any other call of JAX
        data, mesh = datasets.load("mnist"), sharding.make_mesh()

        def load(first: int, last: int) -> laqjax.Shards:  # a process loads its own workers only
            part = slice(first * rows, last * rows)
            return laqjax.partition_data(data.x[part], data.y[part], last - first, "contiguous")

        problem = laqjax.problems.Softmax(784, 10)
        alg = laqjax.algorithms.laq(problem.oracle(), lr=0.2 / workers, num_workers=workers, bits=4)
        shards = sharding.load_local_shards(mesh, workers, load)
        options = {"mesh": mesh, "collective": collective, "worker_batch_size": 1}
        out = laqjax.run(alg, problem.init_params(0), shards, rounds, jax.random.key(0), **options)
        if jax.process_index() == 0:
            uploads, bits = int(out.info.sent.sum()), int(out.info.bits_up.sum(dtype=np.int64))
            where = f"{jax.process_count()} process(es), {jax.device_count()} device(s)"
            print(f"{where}: f = {out.info.loss[-1]:.9g} after {rounds} rounds, {uploads} uploads, {bits} bits up")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
