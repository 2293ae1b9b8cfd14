"""A federation with Flower: `client_app` is one worker, `server_app` the server (extra `[flower]`).

The algorithm is that of `laqjax.step`: a client runs `worker_step`, the server `server_step`. This file is what lies between
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
from flwr.serverapp import Grid, ServerApp
from jaxtyping import Array, PRNGKeyArray

from laqjax import types
from laqjax.compressors import Identity
from laqjax.federation import Facts, Federation
from laqjax.messages import (
    BEHIND,
    CHANGE,
    FULL,
    LOST,
    NAME,
    NEVER,
    SENT,
    SILENT,
    WHOLE,
    Down,
    Up,
    Upload,
    digest,
    down_compressor,
    draws,
    moved,
    name_of,
    opened,
    packed,
    record,
    scheme,
    unpacked,
)
from laqjax.rules import Rule
from laqjax.step import Algorithm, worker_step
from laqjax.types import Keys, Shards, State, Step, Worker, register_dataclass, static
from laqjax.wire import from_bytes, to_bytes


@register_dataclass
@dataclass(frozen=True)
class Told(Rule):
    """`rule` of a worker that got a broadcast, so it is asked; `must`: it sends in any case."""

    rule: types.Rule
    must: bool = static()

    def init(self, params):
        return self.rule.init(params)

    def decide(self, shared, own, now):
        send, sent, silent = self.rule.decide(shared, own, now)
        return send | self.must, sent, silent


@jax.jit
def observed(rule: types.Rule, shared: Any, step: Step) -> Any:
    """What a rule shares after a step."""
    return rule.observe(shared, step)


@jax.jit
def begun(alg: Algorithm, params: Array) -> Worker:
    """A worker that remembers nothing."""
    return Worker(alg.memory.init(params), alg.rule.init(params)[1])


class Kept(NamedTuple):
    """What a worker keeps from one message to the next: of its last round, the worker before and after it."""

    session: int
    round: int
    base: Upload  # what `before` has of the server's acceptance
    last: Upload  # what `after` has, once it is accepted; `base` where the worker was silent
    params: Any
    history: Any
    before: Worker
    after: Worker


KEPT = struct.Struct("<Qii8si8s")


@jax.jit
def worker_round(alg: Algorithm, worker: Worker, state: State, shards: Shards, key: PRNGKeyArray, index: Any, at: Any):
    """`worker_step` of the one worker whose data these are; `at`: the round that its draws belong to."""
    own, shared = draws(alg, key, at, index)
    keys = Keys(own, shared, key, at, index, jnp.int32(0))
    worker, upload, facts = worker_step(alg, worker, state, shards, keys)
    return worker, upload.payload, upload.sent, upload.bytes, facts["worker_loss"], facts["gradients"]


class Client:
    """One worker a Flower node: what it keeps is in the node's context, so it may end after each message."""

    def __init__(self, alg: Algorithm, shard: Callable[[int], Shards]) -> None:
        self.alg = replace(alg, rule=Told(alg.rule, False))
        self.full = replace(alg, rule=Told(alg.rule, True), compressor=Identity()) if alg.memory.persists else self.alg
        self.rule, self.scheme, self.down = alg.rule, scheme(alg), down_compressor(alg)
        self.load_shard, self.shards = shard, {}  # a worker's data, once loaded; no `cache`: Ray copies apps
        self.model = jax.ShapeDtypeStruct((alg.oracle.size,), alg.oracle.dtype)
        self.like = jax.eval_shape(alg.rule.init, self.model)[0], jax.eval_shape(begun, alg, self.model)

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to a broadcast."""
        down, parts = opened(Down, message)
        worker = int(context.node_config["partition-id"])
        if down.worker != worker:
            raise ValueError(f"a broadcast to worker {down.worker}: expected one to {worker}, the node's partition-id")
        kept = self.load(context)
        known = self.read(down, parts, kept)
        blank = Up(down.session, down.round, worker, BEHIND, *LOST, bytes(8), self.scheme, 0, 0, 0.0, 0.0, 0.0)
        if known is None:
            return Message(record(blank), reply_to=message)
        before, base = self.begin(down, kept, known[0])
        fresh = base == LOST  # begins as in round 0, in which every method begins
        began = time.perf_counter()
        after, payload, *rest = worker_round(
            self.full if fresh else self.alg,
            before,
            State(known[0], jnp.int32(down.round), None, None, known[1], None, None),  # pyright: ignore[reportArgumentType]
            self.shard(worker),
            jax.random.wrap_key_data(jnp.asarray(np.frombuffer(down.key, np.uint32))),
            np.int32(worker),
            np.int32(0 if fresh else down.round),
        )
        sent, size, loss, gradients = (np.asarray(fact).item() for fact in jax.device_get(rest))
        computed = time.perf_counter()
        compressor = self.full.compressor if fresh else self.alg.compressor
        body = to_bytes(compressor, payload, self.model) if sent else b""
        last = name_of(body, down.round, base) if sent else base
        kind = (FULL if fresh and self.alg.memory.persists else SENT) if sent else SILENT
        times = computed - began, time.perf_counter() - computed
        self.save(context, Kept(down.session, down.round, base, last, *known, before, after))
        head = blank._replace(kind=kind, base=base[0], base_digest=base[1], digest=last[1] if sent else bytes(8))
        head = head._replace(size=size if sent else 0, gradients=gradients, loss=loss, compute=times[0], pack=times[1])
        return Message(record(head, body=body), reply_to=message)

    def shard(self, worker: int) -> Shards:
        """The data of a worker, on the device."""
        if worker not in self.shards:
            self.shards[worker] = jax.tree.map(jnp.asarray, checked(self.alg, self.load_shard(worker)))
        return self.shards[worker]

    def read(self, down: Down, parts: dict[str, Any], kept: Kept | None) -> tuple[Any, Any] | None:
        """(model, history) that a broadcast means; None where this worker lacks what it builds on, or it is an old one."""
        if kept and (down.session, down.round) < kept[:2]:
            return None
        again = kept is not None and kept.round == down.round  # a repeated broadcast, or the server came back
        try:
            if down.model == WHOLE:
                params = unpacked(parts.get("body", b""), self.model)
            elif kept and down.model == CHANGE and not again:
                params = moved(kept.params, from_bytes(self.down, parts.get("body", b""), self.model))
            else:
                params = kept.params if kept else None
            if down.history == WHOLE:
                history = unpacked(parts.get("history", b""), self.like[0])
            elif kept and down.history == CHANGE and not again:
                squares: Any = [np.asarray(square, self.model.dtype) for square in (down.direction_sq, down.step_sq)]
                step = Step(kept.params, params, squares[0], squares[1], np.int32(down.round - 1))  # pyright: ignore[reportArgumentType]
                history = observed(self.rule, kept.history, step)
            else:
                history = kept.history if kept else None
        except ValueError:  # bytes of another length
            return None
        missing = params is None or (kept is None and down.history != WHOLE)
        return None if missing or digest(packed((params, history))) != down.reads else (params, history)

    def begin(self, down: Down, kept: Kept | None, params: Any) -> tuple[Worker, Upload]:
        """(worker, the upload that it stands on): the one that the server has, or a new one."""
        accepted = down.accepted, down.digest
        if kept is None or (not self.alg.memory.persists and accepted not in (kept.base, kept.last)):
            return begun(self.alg, params), LOST if accepted != NEVER and self.alg.memory.persists else accepted
        if accepted == kept.last and kept.round != down.round:  # else the round is done once more
            return kept.after, accepted
        return (kept.before, accepted) if accepted == kept.base else (begun(self.alg, params), LOST)

    def load(self, context: Context) -> Kept | None:
        """What was kept; None where there is nothing, or nothing usable."""
        found = context.state.get(NAME)
        try:
            parts: dict[str, Any] = dict(found) if isinstance(found, ConfigRecord) else {}
            session, round, base, base_digest, last, last_digest = KEPT.unpack(parts["head"])
            names, likes = ("params", "history", "before", "after"), (self.model, self.like[0], *[self.like[1]] * 2)
            arrays = [unpacked(parts[name], like) for name, like in zip(names, likes, strict=True)]
        except (KeyError, TypeError, ValueError, struct.error):
            return None
        return Kept(session, round, (base, base_digest), (last, last_digest), *arrays)

    def save(self, context: Context, kept: Kept) -> None:
        """Into the node's context."""
        head = KEPT.pack(kept.session, kept.round, *kept.base, *kept.last)
        parts = {name: packed(getattr(kept, name)) for name in ("params", "history", "before", "after")}
        context.state[NAME] = ConfigRecord({"head": head, **parts})


def checked(alg: Algorithm, shards: Shards) -> Shards:
    """The data of one worker."""
    if np.ndim(shards.weight) != 2 or len(shards.weight) != 1:
        raise ValueError(f"shard with weight {list(np.shape(shards.weight))}: expected [1, N], the rows of one worker")
    alg.oracle.check(shards)
    return shards


def client_app(alg: Algorithm, shard: Callable[[int], Shards], *, programs: str | Path | None = None) -> ClientApp:
    """A worker as a Flower ClientApp.

    Args:
        alg: the algorithm, the same as the server's.
        shard: number of the worker -> its data, `Shards` of one row; the number is the node's `partition-id`.
        programs: a folder for compiled programs; with Flower's processes, which end after each message, each would else
            compile anew.

    Returns:
        The app; a node keeps the worker in its context.
    """
    keep_programs(programs)
    app, client = ClientApp(), Client(alg, shard)
    app.train()(client)

    @app.query()
    def greet(message: Message, context: Context) -> Message:
        return Message(
            RecordDict({NAME: ConfigRecord({"worker": int(context.node_config["partition-id"])})}), reply_to=message
        )

    return app


def keep_programs(folder: str | Path | None) -> None:
    """Compiled programs are kept on disk: Flower starts a process for each message."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def server_app(
    alg: Algorithm,
    params: Any,
    key: PRNGKeyArray,
    rounds: int,
    *,
    observe: Callable[[Facts, Federation], None] | None = None,
    workers: int | None = None,
    patience: int = 10,
    programs: str | Path | None = None,
    **options: Any,
) -> ServerApp:
    """The server as a Flower ServerApp.

    Args:
        alg: the algorithm, the same as the workers'.
        params: the model to begin with, a pytree or a flat vector [p].
        key: of the run, as `laqjax.run` takes it.
        rounds: how many.
        observe: called with the facts of each round, and the server.
        workers: begin when so many are there (None: all).
        patience: deadlines without an answer until the run ends.
        programs: a folder for compiled programs.
        options: of `Federation`: deadline, checkpoint, absurd.

    Returns:
        The app.
    """
    keep_programs(programs)
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        server = Federation(alg, params, key, **options)
        for facts in server.run(grid, rounds, workers=workers, patience=patience):
            if observe is not None:
                observe(facts, server)

    return app
