"""laqjax: lazily aggregated quantized gradients (LAQ, NeurIPS 2019) and related methods in JAX.

M workers hold data, and a server holds the model. In every round, worker m computes its gradient. It quantizes the
*change* since its last upload to b bits per coordinate. It sends this change only when a rule decides that the change
matters. A whole run is one compiled program.

Start with an algorithm of `laqjax.algorithms`, such as `laq`, and pass it to `laqjax.run`.

Notation of the paper and names in the code:

paper | code | shape | meaning
--- | --- | --- | ---
theta | params | [p] | model as a flat vector
grad f_m | grad | [p] | gradient of worker m
Q_m(theta_hat) | memory_state | [p] | vector that the server holds for worker m; some memories keep further vectors
delta Q_m | decoded | [p] | compressed change of this round, as the server decodes it
R_m | radius | | max-norm of grad - memory_state
b | bits | | bits per coordinate
eps_m | error_sq | | squared quantization error; last_error_sq is that of the last upload
norm(dtheta)^2 | motion | [window] | last D squared steps of the model
xi_d, D | xi, window | | weights and length of this history
t_m, t_bar | silence, max_silence | | rounds since the last upload, and their bound C
nabla | aggregate | [p] | sum of the memories of all workers, on the server
alpha | lr | | learning rate

Public are the names in `__all__` of this package, of its modules without an underscore, and of `laqjax.federation` and
`laqjax.federation.testing`. Everything in `_core`, `_engine` and other modules with an underscore is private.

Read the modules in this order:

- `types`: states, messages, and the protocols of the parts.
- `_core/round`: one round of the workers and the server.
- `memories`, `rules`, `compressors`, `downlinks`: the parts. `_core/wire_format` counts the bits of a message.
- `algorithms`: the named methods, each assembled from parts. `optimizers`: server optimizers that optax lacks.
- `oracles`: loss and gradient of a worker, from a function that returns the losses of n examples. `samplers`:
  minibatches.
- `_engine`: runs, sweeps, collectives and checkpoints.
- `sharding`, `distributed`: many devices, and many processes.
- `aggregation`, `local_training`: `lazy_aggregate` and `diloco_optimizer`, optax transformations for an existing
  training loop.
- `problems`, `partition`, `theory`: the losses of the papers, data partitions, and admissible learning rates.
- `federation`: workers and server as Flower apps; it needs the extra `[flower]`.
"""

from laqjax import (
    aggregation,
    algorithms,
    compressors,
    distributed,
    downlinks,
    local_training,
    memories,
    optimizers,
    oracles,
    partition,
    problems,
    rules,
    samplers,
    sharding,
    theory,
    types,
)
from laqjax._core.round import Algorithm, assemble, server_step, worker_step
from laqjax._core.validation import check_inputs, check_number
from laqjax._engine.checkpoint import RunCheckpointer
from laqjax._engine.loop import DivergenceError, RunResult, concatenate_infos, run, stream
from laqjax._engine.sweep import max_batch_size, select_points, stack_algorithms, stream_sweep, sweep
from laqjax.aggregation import lazy_aggregate
from laqjax.local_training import diloco_optimizer
from laqjax.partition import partition_data
from laqjax.types import AlgorithmState, RoundInfo, Shards

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "AlgorithmState",
    "DivergenceError",
    "RoundInfo",
    "RunCheckpointer",
    "RunResult",
    "Shards",
    "aggregation",
    "algorithms",
    "assemble",
    "check_inputs",
    "check_number",
    "compressors",
    "concatenate_infos",
    "diloco_optimizer",
    "distributed",
    "downlinks",
    "lazy_aggregate",
    "local_training",
    "max_batch_size",
    "memories",
    "optimizers",
    "oracles",
    "partition",
    "partition_data",
    "problems",
    "rules",
    "run",
    "samplers",
    "select_points",
    "server_step",
    "sharding",
    "stack_algorithms",
    "stream",
    "stream_sweep",
    "sweep",
    "theory",
    "types",
    "worker_step",
]
