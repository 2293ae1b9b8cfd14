"""laqjax: lazily aggregated quantized gradients (LAQ, NeurIPS 2019) and their family, as one compiled program in JAX.

Workers m = 1..M hold data, a server holds the model. Every round worker m computes its gradient, quantizes its *change*
since the last upload to b bits, and sends it only when a rule says that the change matters.

Notation
    theta            params       [p]       the model as a flat vector
    grad f_m         grad         [p]       gradient of worker m
    Q_m(theta_hat)   memory       [p]       what the server holds for worker m
    delta Q_m        innovation   [p]       decoded change of this round
    R_m              radius                 max-norm of grad - memory
    b                bits                   per coordinate
    eps_m            error_sq               squared quantization error; last_error_sq at the last upload
    ||dtheta||^2     motion       [window]  the last D squared model steps
    xi_d, D          xi, window             weights and length of that history
    t_m, t_bar       silence, max_silence   rounds since the last upload, and their bound C
    nabla            aggregate    [p]       the server's sum of all memories
    alpha            lr                     step size

Reading order: types (the protocols of the parts) -> _core/round (one round) -> memories, rules, compressors, downlinks (the
parts) and _core/wire_format (their bits) -> algorithms (the named members) -> oracles (a loss becomes gradients), samplers ->
_engine (runs, sweeps, collectives, checkpoints) -> sharding, distributed (many devices, many processes) -> aggregation (other
people's loops) -> problems, partition, theory. federation: workers and server as Flower apps, with the extra `[flower]`.
"""

from laqjax import (
    aggregation,
    algorithms,
    compressors,
    distributed,
    downlinks,
    memories,
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
from laqjax._engine.loop import DivergenceError, RunResult, concatenate_infos, run, run_chunk, shard_inputs, stream
from laqjax._engine.sweep import max_batch_size, select_points, stack_algorithms, stream_sweep, sweep
from laqjax.aggregation import lazy_aggregate
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
    "distributed",
    "downlinks",
    "lazy_aggregate",
    "max_batch_size",
    "memories",
    "oracles",
    "partition",
    "partition_data",
    "problems",
    "rules",
    "run",
    "run_chunk",
    "samplers",
    "select_points",
    "server_step",
    "shard_inputs",
    "sharding",
    "stack_algorithms",
    "stream",
    "stream_sweep",
    "sweep",
    "theory",
    "types",
    "worker_step",
]
