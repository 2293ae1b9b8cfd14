"""laqjax: lazily aggregated quantized gradients (LAQ, NeurIPS 2019) and their family, as one compiled program in JAX.

Workers m = 1..M hold data, a server holds the model. Every round worker m computes its gradient, quantizes its *change*
since the last upload to b bits, and sends it only when a rule says that the change matters.

Notation
    theta            params      [p]       the model as a flat vector
    grad f_m         grad        [p]       gradient of worker m
    Q_m(theta_hat)   memory      [p]       what the server holds for worker m
    delta Q_m        innovation  [p]       decoded change of this round
    R_m              radius                max-norm of grad - memory
    b                bits                  per coordinate
    eps_m            error_sq              squared quantization error; last_error_sq at the last upload
    ||dtheta||^2     motion      [window]  the last D squared model steps
    xi_d, D          xi, window            weights and length of that history
    t_m, t_bar       silence, limit        rounds since the last upload, and their bound C
    nabla            aggregate   [p]       the server's sum of all memories
    alpha            lr                    step size

Reading order: types (what the parts promise) -> step (one round) -> memories, rules, compressors and wire (the parts)
-> algorithms (the named members) -> oracle (a loss becomes gradients) -> loop, points (runs and sweeps) -> mesh, exchange
(many devices) -> lazy (other people's loops) -> problems, theory; checks stands apart. flower,
federation, messages, loopback: a real federation, with the extra `[flower]`.
"""

from laqjax import algorithms, compressors, exchange, lazy, memories, mesh, oracle, problems, rules, theory, types, wire
from laqjax.lazy import lazy_aggregate
from laqjax.loop import Diverged, Output, init, join, run, step, stream
from laqjax.points import batch_size, stack, sweep, sweep_stream, take
from laqjax.step import Algorithm, assemble
from laqjax.types import Info, Shards, State

__version__ = "0.1.0"
__all__ = [
    "Algorithm",
    "Diverged",
    "Info",
    "Output",
    "Shards",
    "State",
    "algorithms",
    "assemble",
    "batch_size",
    "compressors",
    "exchange",
    "init",
    "join",
    "lazy",
    "lazy_aggregate",
    "memories",
    "mesh",
    "oracle",
    "problems",
    "rules",
    "run",
    "stack",
    "step",
    "stream",
    "sweep",
    "sweep_stream",
    "take",
    "theory",
    "types",
    "wire",
]
