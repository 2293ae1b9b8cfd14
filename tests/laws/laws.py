"""Laws as functions of an algorithm: the tests hold the members of the registry, and new ones, to them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import laqjax
from laqjax import Algorithm, Shards, downlinks, rules, types
from laqjax._core import wire_format
from laqjax._core.validation import get_declaration
from tests.support import CHUNK, KEY, RECORD, Toy, identical, keys_of, run


def avals(tree: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(jax.eval_shape(lambda t: t, tree))]


def check_state_is_fixed_point(alg: Algorithm, problem: Toy) -> None:
    """Check that a round returns a state of the structure, shapes and dtypes that it was given."""
    state = alg.init(problem.theta0)
    after, _ = jax.eval_shape(alg.step, state, Shards(*map(jnp.asarray, problem.shards)), KEY)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert avals(after) == avals(state)


def check_sweep_is_loop(algs: list[Algorithm], problem: Toy) -> None:
    """Check that the points of a sweep are the runs of its algorithms."""
    keys, shards = jax.random.split(KEY, len(algs)), problem.shards
    sweep = laqjax.sweep(
        laqjax.stack_algorithms(algs),
        problem.theta0,
        shards,
        CHUNK,
        keys,
        batch_size=3,
        metrics=RECORD,
        chunk_size=CHUNK,
    )
    for i, alg in enumerate(algs):
        info, state = run(alg, problem.theta0, shards, CHUNK, keys[i])
        np.testing.assert_array_equal(sweep.info.sent[:, i], info.sent)
        np.testing.assert_array_equal(sweep.info.bits_up[:, i], info.bits_up)
        np.testing.assert_array_equal(sweep.info.bits_down[:, i], info.bits_down)
        np.testing.assert_allclose(sweep.info.loss[:, i], info.loss, rtol=1e-12)
        point = laqjax.select_points(sweep.state, i)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), point, state)


def check_memories(alg: Algorithm, problem: Toy, rounding: float) -> None:
    """Check that silence changes a worker's count only, and that the server's aggregate is the sum of the memories.

    The state of the oracle advances for the workers that participate, whether they send or not, and for no other.
    """
    state = alg.init(problem.theta0)
    silent = 0
    for _ in range(12):
        before = jax.device_get(state.workers)
        info, state = run(alg, state, problem.shards, 1)
        workers, sent = jax.device_get(state.workers), info.sent[0]
        pairs = list(zip(*(jax.tree.leaves(w.oracle_state) for w in (before, workers)), strict=True))
        if pairs:
            moved = np.any([np.any((a != b).reshape(4, -1), axis=1) for a, b in pairs], axis=0)
            np.testing.assert_array_equal(moved, info.extra["gradients"][0] > 0)
        workers, before = (w._replace(oracle_state=None) for w in (workers, before))
        if isinstance(alg.rule, rules.MaxSilence):
            np.testing.assert_array_equal(workers.rule_state[0], np.where(sent, 0, before.rule_state[0] + 1))
            workers, before = (w._replace(rule_state=w.rule_state[1]) for w in (workers, before))
        if isinstance(
            alg.rule, rules.PartialParticipation
        ):  # it has asked some of the silent ones, whose silence is longer now
            workers, before = (w._replace(rule_state=None) for w in (workers, before))
        # the state of CLAG's rule changes in silent rounds too
        kept = [w.memory_state if isinstance(alg.rule, rules.ClagRule) else w for w in (before, workers)]
        identical(*([leaf[~sent] for leaf in jax.tree.leaves(w)] for w in kept))
        if alg.memory.is_persistent:
            memory = workers.memory_state[0] if isinstance(workers.memory_state, tuple) else workers.memory_state
            error = np.abs(np.asarray(state.aggregate) - memory.sum(axis=0)).max()
            assert error <= rounding * np.abs(memory).max()
        silent += np.sum(~sent)
    assert (silent > 0) == (alg.rule.needs_persistent_memory or isinstance(alg.rule, rules.PartialParticipation))


def check_billed_bits(alg: Algorithm, problem: Toy) -> None:
    """Check every message of a run, made again from the state: its bytes are billed, and decode to what the worker meant."""
    state: Any = alg.init(problem.theta0)
    for k in range(4):
        before, state_before = jax.device_get(state.workers), state
        info, state = run(alg, state, problem.shards, 1)
        for m in range(4):
            keys, grad = keys_of(k, m), info.extra["grad"][0, m]
            memory = jax.tree.map(lambda leaf: leaf[m], before.memory_state)  # noqa: B023
            now: Any = types.RoundContext(
                state_before.params,
                keys,
                alg.learning_rate_at(k),
                4,
                partial(looked, alg, problem, keys),
                round=keys.round,
            )
            target = jnp.asarray(alg.memory.compression_target(memory, grad, now)[0])
            payload = alg.compressor.encode(target, keys)
            data = wire_format.to_bytes(alg.compressor, payload, target)
            assert len(data) == wire_format.message_bytes(alg.compressor.wire_fields(payload, target))
            assert info.bits_up[0, m] == (8 * len(data) if info.sent[0, m] else 0)
            back = wire_format.from_bytes(alg.compressor, data, target)
            identical(np.asarray(back), np.asarray(alg.compressor.decode(payload, target)))
        down = 8 * problem.theta0.nbytes * get_declaration(alg.downlink, types.DownlinkTraits, "num_vectors")
        if isinstance(
            alg.downlink, downlinks.CompressedStep | downlinks.CompressedModel | downlinks.CompressedDirection
        ):
            payload = alg.downlink.compressor.encode(jnp.ones_like(problem.theta0), keys_of(k, 4))
            down = 8 * len(wire_format.to_bytes(alg.downlink.compressor, payload, problem.theta0))
        asked = info.extra["gradients"][0] > 0
        assert info.bits_down == down * (asked.sum() if alg.rule.server_selects else 1)


def looked(
    alg: Algorithm, problem: Toy, keys: types.RoundKeys, params: Any, full: bool = False, when: Any = True
) -> Any:
    """The gradient of a worker at another model on the rows of its round."""
    shards = jax.tree.map(jnp.asarray, problem.shards)
    return gradient(alg.oracle, None if full else alg.sampler, jnp.asarray(params), shards, keys)


@jax.jit
def gradient(oracle: Any, sampler: Any, params: Any, shards: Shards, keys: types.RoundKeys) -> Any:
    """The gradient of the worker of `keys`, compiled once for each sampler."""
    return oracle(params, shards, keys.worker, sampler and sampler(keys, shards)).grad


def check_cut_run(alg: Algorithm, problem: Toy) -> laqjax.RunResult:
    """Check that a run that is cut anywhere is the same run, and return it."""
    straight = run(alg, problem.theta0, problem.shards, 33)
    for cut in ([10, 23], [1, 12, 20]):
        start, infos = problem.theta0, []
        for rounds in cut:
            out = run(alg, start, problem.shards, rounds)
            start = out.state
            infos.append(out.info)
        identical((laqjax.concatenate_infos(infos), start), tuple(straight))
    return straight
