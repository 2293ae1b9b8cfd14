"""Meshes of devices for workers and for the points of a sweep, and the collectives that sum messages on them.

`make_mesh` is enough for `run`, `stream` and `sweep`. The functions that place states and arrays are for a compiled
step of your own on a mesh.
"""

from laqjax._engine.collectives import (
    AllGather,
    AllReduce,
    AllToAll,
    all_gather,
    all_reduce,
    all_to_all,
    resolve_collective,
)
from laqjax._engine.placement import (
    SWEEP_AXIS,
    WORKER_AXIS,
    device_put_global,
    load_local_shards,
    make_mesh,
    num_worker_slots,
    resize_workers,
    shard_state,
    state_partition_specs,
    unpad_state,
)

__all__ = [
    "SWEEP_AXIS",
    "WORKER_AXIS",
    "AllGather",
    "AllReduce",
    "AllToAll",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "device_put_global",
    "load_local_shards",
    "make_mesh",
    "num_worker_slots",
    "resize_workers",
    "resolve_collective",
    "shard_state",
    "state_partition_specs",
    "unpad_state",
]
