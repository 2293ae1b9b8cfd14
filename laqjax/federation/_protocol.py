"""Message format of a federation: headers, byte layouts, digests and keys.

`laqjax.federation` describes the protocol that these messages implement.
"""

import dataclasses
import functools
import hashlib
import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as SerializedMessage
from jaxtyping import Array, PRNGKeyArray

from laqjax._core.round import Algorithm
from laqjax._core.validation import get_declaration
from laqjax.downlinks import CompressedModel, CompressedStep
from laqjax.types import OracleHints

RECORD_KEY = "laqjax"
UploadId = tuple[int, bytes]  # (round, 8-byte digest) of an upload
NO_UPLOAD: UploadId = (-1, bytes(8))  # the server has accepted no upload of this worker yet
UNKNOWN_UPLOAD: UploadId = (-2, bytes(8))  # base of a memory that the server does not hold; no upload has this id
RELEASED_UPLOAD: UploadId = (-3, bytes(8))  # of a released worker: no worker state includes it
# How a broadcast carries the model and the rule's shared history. The delta of a history is the server's last step.
MODEL_UNCHANGED, MODEL_FULL, MODEL_DELTA = range(3)
SHORT_HISTORY = 256  # bytes up to which a broadcast carries the history, because reading it is faster than computing it
# Kinds of replies. OUT_OF_SYNC: the worker lacks the model or the history that the broadcast refers to.
REPLY_SILENT, REPLY_UPLOAD, REPLY_FULL, REPLY_OUT_OF_SYNC = range(4)


class BroadcastHeader(NamedTuple):
    """Header of a broadcast from the server to one worker."""

    session: int  # id of the server process; a restarted server has a larger one
    round: int
    worker: int
    model: int  # MODEL_UNCHANGED, MODEL_FULL or MODEL_DELTA
    history: int  # likewise, for the rule's shared state
    accepted: int  # round of this worker's last upload that the server accepted
    digest: bytes  # digest of that upload
    state_digest: bytes  # digest of the model and history that the worker must have in this round
    key: bytes  # PRNG key of the run, 8 bytes
    direction_sq: float  # ||direction||^2 of the server's last step
    step_sq: float  # ||model change||^2 of the server's last step


class ReplyHeader(NamedTuple):
    """Header of a reply from one worker to the server."""

    session: int
    round: int
    worker: int
    kind: int = REPLY_OUT_OF_SYNC  # or REPLY_SILENT, REPLY_UPLOAD or REPLY_FULL
    base: int = UNKNOWN_UPLOAD[0]  # round of the upload that the worker's memory includes
    base_digest: bytes = UNKNOWN_UPLOAD[1]  # digest of that upload
    digest: bytes = bytes(8)  # digest of this upload; zeros if the worker is silent
    scheme: bytes = b""  # digest of the settings that client and server must share
    size: int = 0  # message size in bytes, as the library counts it
    gradients: int = 0  # gradient evaluations in this round
    loss: float = 0.0
    compute: float = 0.0  # seconds for the worker's step
    pack: float = 0.0  # seconds for packing the message into bytes


HEADER_DIGEST_BYTES = 4  # length of the header's digest, which follows the header
HEADER_STRUCTS = {BroadcastHeader: struct.Struct("<QiiBBi8s8s8sdd"), ReplyHeader: struct.Struct("<QiiBi8s8s8siidff")}


def short_digest(*parts: Any) -> bytes:
    """Return an 8-byte SHA-256 prefix of arrays, bytes and numbers.

    The digest identifies messages. It is not a security measure; TLS is.
    """
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).view(np.uint8).data)
    return whole.digest()[:8]


def _describe(value: Any) -> Iterator[Any]:
    """Yield what identifies a setting in all processes: class names and fields, functions by name, arrays by value.

    The names hold no modules, because a user's own file may be loaded under another module name.
    """
    if isinstance(value, str | bytes | None):
        yield repr(value).encode()
    elif isinstance(value, np.ndarray | np.generic | jax.Array | int | float):
        array = np.asarray(value)
        yield f"{array.dtype} {array.shape}".encode()
        yield array
    elif isinstance(value, tuple | list):
        yield f"{type(value).__qualname__} {len(value)}".encode()
        for item in value:
            yield from _describe(item)
    elif isinstance(value, functools.partial):
        yield from _describe([value.func, value.args, sorted(value.keywords.items())])
    elif isinstance(value, dict):
        yield from _describe(sorted(value.items()))
    elif hasattr(value, "__qualname__"):  # a function or a class
        yield value.__qualname__.encode()
    elif dataclasses.is_dataclass(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        yield from _describe([type(value), *fields])
    else:
        yield from _describe([type(value), getattr(value, "__dict__", {})])


SCHEME_PARTS = "model", "compressor", "rule", "memory", "lr", "sampler", "downlink"  # settings that must be equal


def scheme_digests(alg: Algorithm) -> bytes:
    """Return 8 bytes for each of `SCHEME_PARTS`; those of the model cover p, the dtype and the number of workers.

    Client and server must agree on them. They may differ in the oracle and the optimizer.
    """
    model = alg.oracle.size, str(alg.oracle.dtype), alg.num_workers
    return b"".join(short_digest(*_describe(getattr(alg, name, model))) for name in SCHEME_PARTS)


def differing_parts(found: bytes, expected: bytes, names: Sequence[str] = SCHEME_PARTS) -> list[str]:
    """Return the names of the parts whose 8 bytes differ; of all parts, if the lengths differ."""
    places = range(0, 8 * len(names), 8)
    return [
        name
        for name, at in zip(names, places, strict=True)
        if len(found) != len(expected) or found[at : at + 8] != expected[at : at + 8]
    ]


def tree_to_bytes(tree: Any) -> bytes:
    """Concatenate the raw bytes of a pytree's array leaves."""
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree))


def tree_from_bytes(data: bytes, like: Any) -> Any:
    """Invert `tree_to_bytes`.

    Args:
        data: the bytes of all leaves, one after another.
        like: a pytree of arrays or `ShapeDtypeStruct`s that gives structure, shapes and dtypes.

    Returns:
        A pytree of read-only NumPy arrays that share memory with `data`.

    Raises:
        ValueError: `data` has another length than the leaves of `like` need.
    """
    leaves, structure = jax.tree.flatten(like)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in leaves]
    if len(data) != sum(sizes):
        raise ValueError(f"arrays of {len(data)} bytes: must be {sum(sizes)} bytes")
    places = itertools.accumulate(sizes, initial=0)
    pieces = [np.frombuffer(data, a.dtype, a.size, at).reshape(a.shape) for a, at in zip(leaves, places, strict=False)]
    return jax.tree.unflatten(structure, pieces)


def upload_id(body: bytes, round: int, base: UploadId) -> UploadId:
    """Return the id of an upload.

    The digest covers the body, the round and the id of the previous accepted upload (`base`). Through this chain
    one id identifies the worker's whole memory, not only the last message.
    """
    return round, short_digest(body, struct.pack("<ii8s", round, *base))


def make_record(head: Any, **parts: bytes) -> RecordDict:
    """Build the content of a Flower message.

    Args:
        head: a `BroadcastHeader` or `ReplyHeader`.
        **parts: named bytes (`body`, `history`); empty ones are left out.

    Returns:
        A record with the packed header, its digest, and the parts.
    """
    there = {name: part for name, part in parts.items() if part}
    data = HEADER_STRUCTS[type(head)].pack(*head)
    return RecordDict({RECORD_KEY: ConfigRecord({"head": data + short_digest(data)[:HEADER_DIGEST_BYTES], **there})})


def get_shared_history(alg: Algorithm, rule_state: Any, aggregate: Any) -> tuple[Any, Any]:
    """Return what a worker needs beside the model: the rule's shared state, and the aggregate if the oracle reads it."""
    return rule_state, aggregate if get_declaration(alg.oracle, OracleHints, "reads_aggregate") else None


def parse_message(kind: Any, message: Message) -> tuple[Any, dict[str, Any]]:
    """Parse a message that `make_record` built.

    Args:
        kind: the expected header class, `BroadcastHeader` or `ReplyHeader`.
        message: the Flower message.

    Returns:
        The header, and a dictionary of the other parts (`body`, `history`).

    Raises:
        ValueError: the message has another form, or its header is damaged.
    """
    found = message.content.get(RECORD_KEY) if message.has_content() else None
    parts: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
    head, size = parts.pop("head", b""), HEADER_STRUCTS[kind].size
    form = all(isinstance(part, bytes) for part in (head, *parts.values())) and not set(parts) - {"body", "history"}
    if not form or short_digest(head[:size])[:HEADER_DIGEST_BYTES] != head[size:]:
        raise ValueError(
            f"a message with the parts {sorted(parts)}: must be a head of {size} bytes and its digest, body, history"
        )
    return kind(*HEADER_STRUCTS[kind].unpack(head[:size])), parts


_sizes: WeakKeyDictionary[Message, int] = WeakKeyDictionary()  # of messages that this process has serialized


def get_serialized_size(message: Message) -> int:
    """Return the bytes of a message as Flower serializes it, metadata included."""
    size = _sizes.get(message)
    return message_to_proto(message).ByteSize() if size is None else size


def send_in_process(message: Message) -> Message:
    """Return the message as it arrives: serialized, and parsed again."""
    data = message_to_proto(message).SerializeToString()
    arrived = message_from_proto(SerializedMessage.FromString(data))
    _sizes[message] = _sizes[arrived] = len(data)
    return arrived


def down_compressor(alg: Algorithm) -> Any:
    """Return the compressor of the model change, or None if the server broadcasts the whole model."""
    return alg.downlink.compressor if isinstance(alg.downlink, CompressedStep | CompressedModel) else None


@jax.jit
def add_delta(params: Array, change: Array) -> Array:
    """Add a change to the model.

    Client and server both run this jitted program, so that their models are bit-identical.
    """
    return params + change


def worker_keys(alg: Algorithm, key: PRNGKeyArray, round: Any, worker: Any) -> tuple[PRNGKeyArray, PRNGKeyArray]:
    """Return the worker's own key and the shared key of a round, derived as in `Algorithm.step`."""
    of_round = jax.random.fold_in(key, round)
    return jax.random.fold_in(of_round, worker), jax.random.fold_in(of_round, alg.num_workers)


def enable_compilation_cache(folder: str | Path | None) -> None:
    """Cache compiled programs in a folder; None leaves JAX's settings unchanged.

    Flower's processes end after each message, so without the cache each one compiles again.
    """
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
