"""What server and workers of a federation say to each other: heads, bytes and digests; the protocol is in `laqjax.federation`."""

import hashlib
import itertools
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_to_proto
from jaxtyping import Array, PRNGKeyArray

from laqjax._core.round import Algorithm
from laqjax.downlinks import CompressedModel, CompressedStep

RECORD_KEY = "laqjax"
UploadId = tuple[int, bytes]  # the name of an upload: its round and digest
NO_UPLOAD: UploadId = (-1, bytes(8))
UNKNOWN_UPLOAD: UploadId = (-2, bytes(8))  # of a memory that the server does not have: no upload is called so
MODEL_UNCHANGED, MODEL_FULL, MODEL_DELTA = range(
    3
)  # how model and history travel; the change of a history is the step that the server made
REPLY_SILENT, REPLY_UPLOAD, REPLY_FULL, REPLY_OUT_OF_SYNC = range(
    4
)  # what a reply is; BEHIND: the worker lacks what the broadcast builds on


class BroadcastHeader(NamedTuple):
    """The head of a broadcast."""

    session: int  # of the server: a restarted one has a larger number
    round: int
    worker: int
    model: int
    history: int
    accepted: int  # the round and the digest of this worker's last upload that the server accepted
    digest: bytes
    state_digest: bytes  # digest of model and history as the worker must have them now
    key: bytes  # of the run
    direction_sq: float  # of the server's last step
    step_sq: float


class ReplyHeader(NamedTuple):
    """The head of a reply."""

    session: int
    round: int
    worker: int
    kind: int
    base: int  # the upload from which this worker went on
    base_digest: bytes
    digest: bytes  # of this upload
    scheme: bytes  # p, dtype and compressor
    size: int  # of the message in bytes, as the library bills it
    gradients: int
    loss: float
    compute: float  # seconds
    pack: float


HEADER_DIGEST_BYTES = 4  # bytes of a digest of the head, which follow it
HEADER_STRUCTS = {BroadcastHeader: struct.Struct("<QiiBBi8s8s8sdd"), ReplyHeader: struct.Struct("<QiiBi8s8s8siidff")}


def short_digest(*parts: Any) -> bytes:
    """Of arrays, bytes and numbers, 8 bytes: it tells messages apart, TLS guards them."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return whole.digest()[:8]


def scheme_digest(alg: Algorithm) -> bytes:
    """Of p, the dtype, the compressor and its numbers: two sides that differ in one do not understand each other."""
    leaves, structure = jax.tree.flatten(alg.compressor)
    about = f"{alg.oracle.size} {alg.oracle.dtype} {structure}".encode()
    return short_digest(about, *(np.asarray(leaf) for leaf in leaves))


def tree_to_bytes(tree: Any) -> bytes:
    """The leaves of a pytree of arrays, one after another."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def tree_from_bytes(data: bytes, like: Any) -> Any:
    """The inverse of `packed`; ValueError for bytes of another length."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    if len(data) != sum(sizes):
        raise ValueError(f"{len(data)} bytes: expected {sum(sizes)}")
    places = itertools.accumulate(sizes, initial=0)
    pieces = [np.frombuffer(data, a.dtype, a.size, at).reshape(a.shape) for a, at in zip(leaves, places, strict=False)]
    return jax.tree.unflatten(structure, pieces)


def upload_id(body: bytes, round: int, base: UploadId) -> UploadId:
    """The name of an upload; with its body and with the upload that it stands on, it stands for the whole memory."""
    return round, short_digest(body, struct.pack("<ii8s", round, *base))


def make_record(head: Any, **parts: bytes) -> RecordDict:
    """The content of a message; parts of no bytes are left out."""
    there = {name: part for name, part in parts.items() if part}
    data = HEADER_STRUCTS[type(head)].pack(*head)
    return RecordDict({RECORD_KEY: ConfigRecord({"head": data + short_digest(data)[:HEADER_DIGEST_BYTES], **there})})


def parse_message(kind: Any, message: Message) -> tuple[Any, dict[str, Any]]:
    """(head, other parts) of a message; ValueError where it has another form, or its head is damaged."""
    found = message.content.get(RECORD_KEY) if message.has_content() else None
    parts: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
    head, size = parts.pop("head", b""), HEADER_STRUCTS[kind].size
    form = all(isinstance(part, bytes) for part in (head, *parts.values())) and not set(parts) - {"body", "history"}
    if (
        not form
        or len(head) != size + HEADER_DIGEST_BYTES
        or short_digest(head[:size])[:HEADER_DIGEST_BYTES] != head[size:]
    ):
        raise ValueError(
            f"a message with {sorted(parts)}: expected a head of {size} bytes and its digest, body, history"
        )
    return kind(*HEADER_STRUCTS[kind].unpack(head[:size])), parts


def serialized_size(message: Message) -> int:
    """Bytes of a message as Flower serialises it, metadata included."""
    return message_to_proto(message).ByteSize()


def down_compressor(alg: Algorithm) -> Any:
    """What the change of the model travels in; None where the whole model does."""
    return alg.downlink.compressor if isinstance(alg.downlink, CompressedStep | CompressedModel) else None


@jax.jit
def add_delta(params: Array, change: Array) -> Array:
    """The model after a change: one program on both sides, so that they agree to the last bit."""
    return params + change


def worker_keys(alg: Algorithm, key: PRNGKeyArray, round: Any, worker: Any) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """(own, shared) keys of a worker in a round, those of `Algorithm.step`."""
    of_round = jax.random.fold_in(key, round)
    return jax.random.fold_in(of_round, worker), jax.random.fold_in(of_round, alg.num_workers)


def enable_compilation_cache(folder: str | Path | None) -> None:
    """Compiled programs are kept on disk: Flower starts a process for each message."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
