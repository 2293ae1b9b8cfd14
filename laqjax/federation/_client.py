"""Client side of a federation: `FederatedClient` and the Flower ClientApp around it."""

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from jaxtyping import Array, PRNGKeyArray

from laqjax import types
from laqjax._core.round import Algorithm, worker_step
from laqjax._core.wire_format import from_bytes, to_bytes
from laqjax.compressors import Identity
from laqjax.federation._protocol import (
    MODEL_DELTA,
    MODEL_FULL,
    NO_UPLOAD,
    RECORD_KEY,
    REPLY_FULL,
    REPLY_OUT_OF_SYNC,
    REPLY_SILENT,
    REPLY_UPLOAD,
    UNKNOWN_UPLOAD,
    BroadcastHeader,
    ReplyHeader,
    UploadId,
    add_delta,
    down_compressor,
    enable_compilation_cache,
    make_record,
    parse_message,
    scheme_digest,
    short_digest,
    tree_from_bytes,
    tree_to_bytes,
    upload_id,
    worker_keys,
)
from laqjax.rules import BaseUploadRule
from laqjax.types import AlgorithmState, RoundKeys, ServerStep, Shards, WorkerState, register_dataclass, static_field


@register_dataclass
@dataclass(frozen=True)
class ForcedUpload(BaseUploadRule):
    """Upload rule of a worker that received a broadcast, so it is selected.

    rule: the algorithm's own upload rule.
    force_send: whether the worker sends regardless of that rule.
    """

    rule: types.UploadRule
    force_send: bool = static_field()

    def init(self, params):
        return self.rule.init(params)

    def should_send(self, shared_state, worker_state, context):
        decision = self.rule.should_send(shared_state, worker_state, context)
        return decision._replace(send=decision.send | self.force_send)


@jax.jit
def _update_shared_state(rule: types.UploadRule, shared_state: Any, step: ServerStep) -> Any:
    """Return the rule's shared state after a server step."""
    return rule.update(shared_state, step)


@jax.jit
def _fresh_worker_state(alg: Algorithm, params: Array) -> WorkerState:
    """Initialize the state of a worker without history."""
    return WorkerState(alg.memory.init(params), alg.rule.init(params)[1])


class ClientState(NamedTuple):
    """State that a worker keeps between two messages: its last round, with the worker before and after it.

    The worker cannot know whether the server accepted its last upload. It keeps both worker states until the next
    broadcast says which one the server has.
    """

    session: int  # session of the server that sent the last broadcast
    round: int  # round of that broadcast
    base: UploadId  # last accepted upload that `before` includes
    last: UploadId  # upload that `after` includes; equals `base` if the worker was silent
    params: Any  # [p], the model of that round
    history: Any  # the rule's shared state in that round
    before: WorkerState  # this worker before that round
    after: WorkerState  # this worker after that round


CLIENT_STATE_HEADER = struct.Struct("<Qii8si8s")


@jax.jit
def _run_worker_round(
    alg: Algorithm, worker: WorkerState, state: AlgorithmState, shards: Shards, key: PRNGKeyArray, index: Any, at: Any
):
    """Run `worker_step` for one worker.

    Args:
        alg: the algorithm.
        worker: state of this worker.
        state: the model, the round and the rule's shared state; its other fields are None.
        shards: the data of this worker, one row [1, N, ...].
        key: PRNG key of the run.
        index: id of the worker.
        at: round from which the random draws are derived.

    Returns:
        The new worker state, the payload, whether it is sent, its size in bytes, the loss, and the number of gradient
        evaluations.
    """
    own, shared = worker_keys(alg, key, at, index)
    keys = RoundKeys(own, shared, key, at, index, jnp.int32(0))
    worker, upload, facts = worker_step(alg, worker, state, shards, keys)
    return worker, upload.payload, upload.sent, upload.bytes, facts["worker_loss"], facts["gradients"]


class FederatedClient:
    """Handler of broadcasts for one worker on a Flower node.

    All state is stored in the node's context, so the process may end after each message.
    """

    def __init__(self, alg: Algorithm, load_shard: Callable[[int], Shards]) -> None:
        self.alg = replace(alg, rule=ForcedUpload(alg.rule, False))
        self.full = (
            replace(alg, rule=ForcedUpload(alg.rule, True), compressor=Identity())
            if alg.memory.is_persistent
            else self.alg
        )
        self.rule, self.scheme, self.down = alg.rule, scheme_digest(alg), down_compressor(alg)
        # a dictionary of loaded shards instead of functools.cache, because Ray copies apps
        self.load_shard, self.shards = load_shard, {}
        self.model = jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)
        self.like = jax.eval_shape(alg.rule.init, self.model)[0], jax.eval_shape(_fresh_worker_state, alg, self.model)

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one broadcast and save the new worker state in the context.

        Raises:
            ValueError: the message has another form, or is addressed to another worker than this node's `partition-id`.
        """
        down, parts = parse_message(BroadcastHeader, message)
        worker = int(context.node_config["partition-id"])
        if down.worker != worker:
            raise ValueError(f"a broadcast to worker {down.worker}: expected one to {worker}, the node's partition-id")
        kept = self.load(context)
        known = self._resolve_broadcast(down, parts, kept)
        blank = ReplyHeader(
            down.session,
            down.round,
            worker,
            REPLY_OUT_OF_SYNC,
            *UNKNOWN_UPLOAD,
            bytes(8),
            self.scheme,
            0,
            0,
            0.0,
            0.0,
            0.0,
        )
        if known is None:
            return Message(make_record(blank), reply_to=message)
        before, base = self._select_base_state(down, kept, known[0])
        fresh = base == UNKNOWN_UPLOAD  # then run as in round 0, where every method starts
        began = time.perf_counter()
        after, payload, *rest = _run_worker_round(
            self.full if fresh else self.alg,
            before,
            AlgorithmState(known[0], jnp.int32(down.round), None, None, known[1], None, None),  # pyright: ignore[reportArgumentType]
            self._load_shard(worker),
            jax.random.wrap_key_data(jnp.asarray(np.frombuffer(down.key, np.uint32))),
            np.int32(worker),
            np.int32(0 if fresh else down.round),
        )
        sent, size, loss, gradients = (np.asarray(fact).item() for fact in jax.device_get(rest))
        computed = time.perf_counter()
        compressor = self.full.compressor if fresh else self.alg.compressor
        body = to_bytes(compressor, payload, self.model) if sent else b""
        last = upload_id(body, down.round, base) if sent else base
        kind = (REPLY_FULL if fresh and self.alg.memory.is_persistent else REPLY_UPLOAD) if sent else REPLY_SILENT
        times = computed - began, time.perf_counter() - computed
        self.save(context, ClientState(down.session, down.round, base, last, *known, before, after))
        head = blank._replace(kind=kind, base=base[0], base_digest=base[1], digest=last[1] if sent else bytes(8))
        head = head._replace(size=size if sent else 0, gradients=gradients, loss=loss, compute=times[0], pack=times[1])
        return Message(make_record(head, body=body), reply_to=message)

    def _load_shard(self, worker: int) -> Shards:
        """Return the data of a worker on the device; load it on the first call."""
        if worker not in self.shards:
            self.shards[worker] = jax.tree.map(jnp.asarray, _check_worker_shard(self.alg, self.load_shard(worker)))
        return self.shards[worker]

    def _resolve_broadcast(
        self, down: BroadcastHeader, parts: dict[str, Any], kept: ClientState | None
    ) -> tuple[Any, Any] | None:
        """Reconstruct the model and the rule's shared state from a broadcast.

        Args:
            down: header of the broadcast.
            parts: its other parts, `body` and `history`.
            kept: state from the previous message, or None.

        Returns:
            The model [p] and the shared state. None if the broadcast is older than `kept`, or if this worker lacks
            the model or history that the broadcast refers to.
        """
        if kept and (down.session, down.round) < kept[:2]:
            return None
        again = kept is not None and kept.round == down.round  # a repeated broadcast, or the server was restarted
        try:
            if down.model == MODEL_FULL:
                params = tree_from_bytes(parts.get("body", b""), self.model)
            elif kept and down.model == MODEL_DELTA and not again:
                params = add_delta(kept.params, from_bytes(self.down, parts.get("body", b""), self.model))
            else:
                params = kept.params if kept else None
            if down.history == MODEL_FULL:
                history = tree_from_bytes(parts.get("history", b""), self.like[0])
            elif kept and down.history == MODEL_DELTA and not again:
                squares: Any = [np.asarray(square, self.model.dtype) for square in (down.direction_sq, down.step_sq)]
                step = ServerStep(kept.params, params, squares[0], squares[1], np.int32(down.round - 1))  # pyright: ignore[reportArgumentType]
                history = _update_shared_state(self.rule, kept.history, step)
            else:
                history = kept.history if kept else None
        except ValueError:  # the body or the history has a wrong length
            return None
        missing = params is None or (kept is None and down.history != MODEL_FULL)
        return (
            None
            if missing or short_digest(tree_to_bytes((params, history))) != down.state_digest
            else (params, history)
        )

    def _select_base_state(
        self, down: BroadcastHeader, kept: ClientState | None, params: Any
    ) -> tuple[WorkerState, UploadId]:
        """Select the worker state that matches the server's.

        Returns:
            The worker state and the id of the last upload that it includes. If no stored state matches, this is a new
            state. Its id is then `UNKNOWN_UPLOAD`, which makes the worker send a full upload, unless the memory is not
            persistent or the worker is new to the federation.
        """
        accepted = down.accepted, down.digest
        if kept is None or (not self.alg.memory.is_persistent and accepted not in (kept.base, kept.last)):
            return _fresh_worker_state(
                self.alg, params
            ), UNKNOWN_UPLOAD if accepted != NO_UPLOAD and self.alg.memory.is_persistent else accepted
        if accepted == kept.last and kept.round != down.round:  # a repeated round runs again from `before`
            return kept.after, accepted
        return (
            (kept.before, accepted)
            if accepted == kept.base
            else (_fresh_worker_state(self.alg, params), UNKNOWN_UPLOAD)
        )

    def load(self, context: Context) -> ClientState | None:
        """Load the worker's state from the node's context; return None if it is missing or unusable."""
        found = context.state.get(RECORD_KEY)
        try:
            parts: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
            session, round, base, base_digest, last, last_digest = CLIENT_STATE_HEADER.unpack(parts["head"])
            names, likes = ("params", "history", "before", "after"), (self.model, self.like[0], *[self.like[1]] * 2)
            arrays = [tree_from_bytes(parts[name], like) for name, like in zip(names, likes, strict=True)]
        except (KeyError, TypeError, ValueError, struct.error):
            return None
        return ClientState(session, round, (base, base_digest), (last, last_digest), *arrays)

    def save(self, context: Context, kept: ClientState) -> None:
        """Save the worker's state in the node's context."""
        head = CLIENT_STATE_HEADER.pack(kept.session, kept.round, *kept.base, *kept.last)
        parts = {name: tree_to_bytes(getattr(kept, name)) for name in ("params", "history", "before", "after")}
        context.state[RECORD_KEY] = ConfigRecord({"head": head, **parts})


def _check_worker_shard(alg: Algorithm, shards: Shards) -> Shards:
    """Check the data of one worker and return it.

    Raises:
        ValueError: the weights do not have shape [1, N], or the oracle rejects the data.
    """
    if np.ndim(shards.weight) != 2 or len(shards.weight) != 1:
        raise ValueError(f"shard with weight {list(np.shape(shards.weight))}: expected [1, N], the rows of one worker")
    alg.oracle.validate(shards)
    return shards


def client_app(
    alg: Algorithm, load_shard: Callable[[int], Shards], *, compilation_cache_dir: str | Path | None = None
) -> ClientApp:
    """Build the Flower ClientApp of a worker.

    Args:
        alg: the algorithm; it must be the same as the server's.
        load_shard: function from the worker's id to its data, `Shards` of one row ([1, N, ...]). The id is the node's
            `partition-id`.
        compilation_cache_dir: folder for compiled programs. Flower's processes end after each message; without this
            folder each of them compiles again.

    Returns:
        The app. Each node stores its worker's state in its context.
    """
    enable_compilation_cache(compilation_cache_dir)
    app, client = ClientApp(), FederatedClient(alg, load_shard)
    app.train()(client)

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return Message(
            RecordDict({RECORD_KEY: ConfigRecord({"worker": int(context.node_config["partition-id"])})}),
            reply_to=message,
        )

    return app
