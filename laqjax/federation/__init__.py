"""Run an algorithm as a Flower federation: `client_app` is one worker, `server_app` the server (extra `[flower]`).

The algorithm is the same as in `laqjax.Algorithm.step`: a client runs `worker_step`, the server runs `server_step`.
This package adds the protocol between them. The protocol keeps one invariant, even when messages are lost:
the server's aggregate equals the sum of the workers' contributions.

Broadcasts. In each round the server sends one message to every selected worker. It holds:

- a header with the round, the PRNG key, and the id of the worker's last upload that the server accepted;
- the whole model, its compressed change, or nothing if the worker already has the model;
- the rule's shared state, or two norms of the server's last step, from which the worker computes the same state.

Replies. A silent worker replies with a header only. A sending worker adds a body of as many bytes as `message_bytes`
counts.

Accepted uploads. A worker stores its memory from before and after its last round. An upload counts once a later
broadcast names it as accepted, by round and digest. The worker then continues from the memory that includes it.

Lost state. A worker may have neither memory, because it lost its state or the server restarted from an older
checkpoint. It then starts again with one full upload: the uncompressed vector. The server replaces the worker's old
contribution to the aggregate by this vector.

Late replies. The server rejects a reply that belongs to another round, and a second reply from the same worker.
Delayed, duplicated and reordered messages therefore change nothing. A worker that misses the deadline is absent: it counts as silent.

Nodes. The server greets each new node with a hello message. The answer holds the worker id (the node's `partition-id`)
and digests of the settings, which must be those of the server. The id then belongs to the public key of the node.

Waiting. The server pulls each reply in a thread of its own, so that a node that stalls costs the others nothing but the
deadline of a few rounds. It waits for no answer to a hello message, and for no worker that was absent in some rounds in a row.
"""

from laqjax.federation._client import FederatedClient, client_app
from laqjax.federation._server import FederatedServer, RoundStats, server_app
from laqjax.federation._strategy import LazyStrategy, arrays_to_params, params_to_arrays

__all__ = [
    "FederatedClient",
    "FederatedServer",
    "LazyStrategy",
    "RoundStats",
    "arrays_to_params",
    "client_app",
    "params_to_arrays",
    "server_app",
]
