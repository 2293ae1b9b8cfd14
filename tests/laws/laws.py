"""Laws as functions of an algorithm, for the tests that hold several of them at once."""

from functools import partial

import jax
import numpy as np

import laqjax
from laqjax import Algorithm
from tests.support import CHUNK, KEY, RECORD, Toy, run


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
