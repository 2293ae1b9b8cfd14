"""Client side of a federation: `FederatedClient` and the Flower ClientApp around it."""

import functools
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
from flwr.clientapp.typing import Mod
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as SerializedRecordDict
from jaxtyping import PRNGKeyArray

from laqjax import types
from laqjax._core.round import Algorithm, init_worker_state, worker_step
from laqjax._core.wire_format import from_bytes, to_bytes
from laqjax.compressors import identity
from laqjax.federation import _protocol
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


_fresh_worker_state = jax.jit(init_worker_state)


class ClientState(NamedTuple):
    """State that a worker keeps between two messages: its last round, with the worker before and after it.

    The worker cannot know whether the server accepted its last upload. It keeps both worker states until the next
    broadcast says which one the server has.
    """

    session: int  # session of the server that sent the last broadcast
    round: int  # round of that broadcast
    base: _protocol.UploadId  # last accepted upload that `before` includes
    last: _protocol.UploadId  # upload that `after` includes; equals `base` if the worker was silent
    params: Any  # [p], the model of that round
    history: Any  # (rule's shared state in that round, aggregate or None), see `_protocol.get_shared_history`
    before: WorkerState  # this worker before that round
    after: WorkerState  # this worker after that round


CLIENT_STATE_FORMAT = 2  # raise it when the header or the arrays change
CLIENT_STATE_HEADER = struct.Struct("<iQii8si8s")


def load_state(context: Context, likes: tuple[Any, ...]) -> ClientState | None:
    """Load the worker's state from the node's context.

    Args:
        context: the node's context.
        likes: shapes and dtypes of `params`, `history`, `before` and `after`.

    Returns:
        The state. None if it is missing, damaged, or of another format or algorithm.
    """
    found = context.state.get(_protocol.RECORD_KEY)
    try:
        parts: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
        number, session, round, base, digest, last, last_digest = CLIENT_STATE_HEADER.unpack(parts["head"])
        arrays = _protocol.tree_from_bytes(parts["arrays"], likes)
    except (KeyError, TypeError, ValueError, struct.error):
        return None
    state = ClientState(session, round, (base, digest), (last, last_digest), *arrays)
    return state if number == CLIENT_STATE_FORMAT else None


def save_state(
    context: Context, session: int, round: int, base: _protocol.UploadId, last: _protocol.UploadId, *arrays: bytes
) -> None:
    """Save the worker's state in the node's context: fields of `ClientState`, with the bytes of its arrays in order."""
    head = CLIENT_STATE_HEADER.pack(CLIENT_STATE_FORMAT, session, round, *base, *last)
    context.state[_protocol.RECORD_KEY] = ConfigRecord({"head": head, "arrays": b"".join(arrays)})


def read_context(path: Path, context: Context) -> None:
    """Fill the context of a node from a file, if the file is there and not damaged."""
    data = path.read_bytes() if path.exists() else b""
    if data and _protocol.short_digest(data[8:]) == data[:8]:
        context.state = recorddict_from_proto(SerializedRecordDict.FromString(data[8:]))


def write_context(path: Path, context: Context) -> None:
    """Write the state in the context of a node to a file atomically."""
    data, part = recorddict_to_proto(context.state).SerializeToString(), path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(_protocol.short_digest(data) + data)
    part.replace(path)


@jax.jit
def _compute_worker_step(
    alg: Algorithm, worker: WorkerState, state: AlgorithmState, shards: Shards, key: PRNGKeyArray, index: Any, at: Any
):
    """Compute `laqjax.worker_step` for one worker, as one compiled program.

    Args:
        alg: the algorithm.
        worker: state of this worker.
        state: the model, the round, the rule's shared state and the aggregate, if the oracle reads it; its other fields
            are None.
        shards: the data of this worker alone, arrays [1, N, ...].
        key: PRNG key of the run.
        index: id of the worker.
        at: round from which the random draws are derived.

    Returns:
        The new worker state, the payload, whether it is sent, its size in bytes, the loss, and the number of gradient
        evaluations.
    """
    own, shared = _protocol.worker_keys(alg, key, at, index)
    keys = RoundKeys(own, shared, key, at, index, jnp.int32(0))
    worker, upload, metrics = worker_step(alg, worker, state, shards, keys)
    return worker, upload.payload, upload.sent, upload.bytes, metrics["worker_loss"], metrics["gradients"]


@functools.lru_cache(1)
def _read_key(data: bytes) -> PRNGKeyArray:
    """Return the PRNG key of the run from its bytes."""
    return jax.random.wrap_key_data(jnp.asarray(np.frombuffer(data, np.uint32)))


class FederatedClient:
    """Handler of broadcasts for one worker on a Flower node.

    All state is stored in the node's context, so the process may end after each message. Flower keeps the context until
    the node or the SuperLink stops, `state_dir` keeps it longer.
    """

    def __init__(
        self, alg: Algorithm, load_shard: Callable[[int], Shards], *, state_dir: str | Path | None = None
    ) -> None:
        self._digests = _protocol.scheme_digests(alg)
        alg = jax.tree.map(jnp.asarray, alg)  # else each round copies its numbers to the device
        self._alg = replace(alg, rule=ForcedUpload(alg.rule, False))
        self._full = replace(alg, rule=ForcedUpload(alg.rule, True), compressor=identity())
        self._rule, self._down, self._num_workers = alg.rule, _protocol.down_compressor(alg), alg.num_workers
        self._scheme = _protocol.short_digest(self._digests)
        # a dictionary of loaded shards instead of functools.cache, because Ray copies apps
        self._load_shard, self._shards = load_shard, {}
        self._state_dir = state_dir
        self._model = jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)
        worker = jax.eval_shape(_fresh_worker_state, alg, self._model)
        # shapes of the arrays of a `ClientState`
        history = _protocol.get_shared_history(alg, jax.eval_shape(alg.rule.init, self._model)[0], self._model)
        self._likes = self._model, history, worker, worker

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer one broadcast and save the new worker state in the context.

        Raises:
            ValueError: the message has another form, or is addressed to another worker than this node's `partition-id`.
        """
        down, parts = _protocol.parse_message(_protocol.BroadcastHeader, message)
        worker = _get_worker(context, self._num_workers)
        if down.worker != worker:
            raise ValueError(f"broadcast to worker {down.worker}: must be to worker {worker}, the node's partition-id")
        path = None
        if self._state_dir is not None:
            run = _protocol.short_digest(self._scheme, down.key).hex()
            path = Path(self._state_dir) / f"worker-{worker}-{run}.state"
            if _protocol.RECORD_KEY not in context.state:
                read_context(path, context)
        kept = load_state(context, self._likes)
        known = self._resolve_broadcast(down, parts, kept)
        out_of_sync = _protocol.ReplyHeader(down.session, down.round, worker, scheme=self._scheme)
        if known is None:
            return Message(_protocol.make_record(out_of_sync), reply_to=message)
        params, history, known_bytes = known
        before, base = self._select_base_state(down, kept, params)
        fresh = base == _protocol.UNKNOWN_UPLOAD  # then run as in round 0, where every method starts
        alg = self._full if fresh else self._alg
        began = time.perf_counter()
        after, payload, *rest = _compute_worker_step(
            alg,
            before,
            AlgorithmState(params, np.int32(down.round), history[1], None, history[0], None, None),  # pyright: ignore[reportArgumentType]
            self._get_shard(worker),
            _read_key(down.key),
            np.int32(worker),
            np.int32(0 if fresh else down.round),
        )
        before_bytes = _protocol.tree_to_bytes(before)  # while the step runs
        sent, size, loss, gradients = (np.asarray(value).item() for value in rest)
        computed = time.perf_counter()
        body = to_bytes(alg.compressor, payload, self._model) if sent else b""
        last = _protocol.upload_id(body, down.round, base) if sent else base
        upload = _protocol.REPLY_FULL if fresh else _protocol.REPLY_UPLOAD
        packed = time.perf_counter()
        state = known_bytes, before_bytes, _protocol.tree_to_bytes(after)
        save_state(context, down.session, down.round, base, last, *state)
        if path is not None:
            write_context(path, context)
        head = out_of_sync._replace(
            kind=upload if sent else _protocol.REPLY_SILENT,
            base=base[0],
            base_digest=base[1],
            digest=last[1] if sent else bytes(8),
            size=size if sent else 0,
            gradients=gradients,
            loss=loss,
            compute=computed - began,
            pack=packed - computed,
        )
        return Message(_protocol.make_record(head, body=body), reply_to=message)

    def greet(self, message: Message, context: Context) -> Message:
        """Answer a hello message: say which worker this node is.

        Raises:
            ValueError: the node's config lacks `partition-id`, or its `num-partitions` is not the number of workers.
        """
        worker = _get_worker(context, self._num_workers)
        hello = ConfigRecord({"worker": worker, "scheme": self._digests})
        return Message(RecordDict({_protocol.RECORD_KEY: hello}), reply_to=message)

    def _get_shard(self, worker: int) -> Shards:
        """Return the data of a worker on the device; load and check it on the first call."""
        if worker not in self._shards:
            shards = self._load_shard(worker)
            if np.ndim(shards.weight) != 2 or len(shards.weight) != 1:
                shape = list(np.shape(shards.weight))
                raise ValueError(f"weight of shape {shape}: must be [1, N], the rows of one worker")
            self._alg.oracle.validate(shards)
            self._shards[worker] = jax.tree.map(jnp.asarray, shards)
        return self._shards[worker]

    def _resolve_broadcast(
        self, down: _protocol.BroadcastHeader, parts: dict[str, Any], kept: ClientState | None
    ) -> tuple[Any, Any, bytes] | None:
        """Reconstruct the model and the history from a broadcast.

        Args:
            down: header of the broadcast.
            parts: its other parts, `body` and `history`.
            kept: state from the previous message, or None.

        Returns:
            The model [p], the history, as `get_shared_history` returns it, and the bytes of both. None if the broadcast is
            older than `kept`, or if this worker lacks the model or history that the broadcast refers to.
        """
        if kept and (down.session, down.round) < kept[:2]:
            return None
        again = kept is not None and kept.round == down.round  # a repeated broadcast, or the server was restarted
        params, history = (kept.params, kept.history) if kept else (None, None)
        try:
            if down.model == _protocol.MODEL_FULL:
                params = _protocol.tree_from_bytes(parts.get("body", b""), self._model)
            elif kept and down.model == _protocol.MODEL_DELTA and not again:
                params = _protocol.add_delta(kept.params, from_bytes(self._down, parts.get("body", b""), self._model))
            if down.history == _protocol.MODEL_FULL:
                history = _protocol.tree_from_bytes(parts.get("history", b""), self._likes[1])
            elif kept and down.history == _protocol.MODEL_DELTA and not again:
                squares: Any = [np.asarray(square, self._model.dtype) for square in (down.direction_sq, down.step_sq)]
                step = ServerStep(kept.params, params, squares[0], squares[1], np.int32(down.round - 1))  # pyright: ignore[reportArgumentType]
                history = _update_shared_state(self._rule, kept.history[0], step), None
        except ValueError:  # the body or the history has a wrong length
            return None
        data = _protocol.tree_to_bytes((params, history))
        missing = params is None or history is None
        return None if missing or _protocol.short_digest(data) != down.state_digest else (params, history, data)

    def _select_base_state(
        self, down: _protocol.BroadcastHeader, kept: ClientState | None, params: Any
    ) -> tuple[WorkerState, _protocol.UploadId]:
        """Select the worker state that matches the server's.

        Returns:
            The worker state and the id of the last upload that it includes. If no stored state matches, this is a new
            state. Its id is then `UNKNOWN_UPLOAD`, which makes the worker send a full upload, unless the memory is not
            persistent or the worker is new to the federation.
        """
        accepted = down.accepted, down.digest
        if kept and accepted == kept.last and kept.round != down.round:  # a repeated round runs again from `before`
            return kept.after, accepted
        if kept and accepted == kept.base:
            return kept.before, accepted
        is_new = kept is None and accepted == _protocol.NO_UPLOAD
        base = _protocol.UNKNOWN_UPLOAD if self._alg.memory.is_persistent and not is_new else accepted
        return _fresh_worker_state(self._alg, params), base


def _get_worker(context: Context, num_workers: int) -> int:
    """Return the worker of a node: its `partition-id`."""
    config = context.node_config
    if "partition-id" not in config or int(config.get("num-partitions", num_workers)) != num_workers:
        raise ValueError(
            f"node config {dict(config)}: must have partition-id, and num-partitions = {num_workers}, the number of "
            "workers (--node-config of flower-supernode, num-supernodes of the simulation)"
        )
    return int(config["partition-id"])


def client_app(
    alg: Algorithm | Callable[[Context], FederatedClient],
    load_shard: Callable[[int], Shards] | None = None,
    *,
    mods: list[Mod] | None = None,
    compilation_cache_dir: str | Path | None = None,
    state_dir: str | Path | None = None,
) -> ClientApp:
    """Build the Flower ClientApp of a worker.

    Args:
        alg: the algorithm; it must be the same as the server's. Or a function `client_fn(context)` that returns a
            `FederatedClient`, for an app with settings in `context.run_config`; it is called once per node and process.
        load_shard: function from the worker's id to its data, `Shards` of one worker ([1, N, ...]). The id is the
            node's `partition-id`. None with a `client_fn`.
        mods: Flower's mods for all functions of the app.
        compilation_cache_dir: folder for compiled programs. Flower's processes end after each message; without this
            folder each of them compiles again.
        state_dir: folder for the worker's state, one file for each run. With it a run that continues after the node or
            the SuperLink was killed has the results of an undisturbed run; without it the worker makes a full upload. A
            `client_fn` gives it to `FederatedClient` itself.

    Returns:
        The app, on which `@app.evaluate()` registers an evaluation. Each node stores its worker's state in its context.
    """
    _protocol.enable_compilation_cache(compilation_cache_dir)
    app, clients = ClientApp(mods=mods), {}
    if load_shard is None:
        client_fn: Any = alg
    else:
        client: Any = FederatedClient(alg, load_shard, state_dir=state_dir)  # pyright: ignore[reportArgumentType]
        client_fn = lambda context: client  # noqa: E731

    def get_client(context: Context) -> FederatedClient:
        node = context.run_id, context.node_id
        if node not in clients:
            for other in [one for one in clients if one[0] != context.run_id]:  # their data would stay in memory
                del clients[other]
            clients[node] = client_fn(context)
        return clients[node]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return get_client(context)(message, context)

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return get_client(context).greet(message, context)

    return app
