"""A federation with Flower: `client_app` is one worker, `server_app` the server (extra `[flower]`).

The algorithm is that of `laqjax.Algorithm.step`: a client runs `worker_step`, the server `server_step`. This file is what lies between
them, a protocol under which the server's aggregate is the sum of what the workers remember, whatever gets lost:

    server -> worker   model (whole, its quantized change, or nothing where the worker has it), what the rule shares (the two
                       numbers of the last step, from which the worker computes the same), the last upload that was accepted
    worker -> server   nothing but a head (silent), or a head and the bytes that `message_bytes` bills

A worker keeps its memory before and after its last upload, and goes on from the one that the server says it has: an upload
counts when the server names it, by round and digest, in a later broadcast. A worker that has neither (it lost its state, or
the server came back from an older checkpoint) begins anew with one full upload, the whole vector, which takes the place of
what the server had of it. Late, repeated and reordered replies belong to another round, or are the second of theirs, and are
refused; who does not answer until the deadline counts as silent.
"""

from laqjax.federation._client import FederatedClient, client_app
from laqjax.federation._server import FederatedServer, RejectedReply, RoundStats, server_app

__all__ = ["FederatedClient", "FederatedServer", "RejectedReply", "RoundStats", "client_app", "server_app"]
