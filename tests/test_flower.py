"""A federation in one process: the simulation's run, message by message, whatever is lost, late, repeated or hostile."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KEY, Toy, softmax_loss

import laqjax
from laqjax import algorithms, compressors

pytest.importorskip("flwr")

from laqjax import federation, flower, messages
from laqjax.loopback import Loopback

L2 = 0.01


def loader(shards: laqjax.Shards) -> Callable[[int], laqjax.Shards]:
    return lambda worker: jax.tree.map(lambda a: a[worker : worker + 1], shards)


def federated(alg: Any, start: Any, shards: laqjax.Shards, rounds: int, **options: Any) -> Any:
    """(facts of all rounds, server, grid)."""
    grid = Loopback(flower.client_app(alg, loader(shards)), range(alg.num_workers))
    server = federation.Federation(alg, start, KEY, **options)
    return list(server.run(grid, rounds)), server, grid


def column(facts: Any, name: str) -> np.ndarray:
    return np.array([getattr(one, name) for one in facts])


# ---- the same run as the simulation ------------------------------------------------------------------------------

RULE = dict(lr=0.05, num_workers=4)
SMOOTH = np.array([3.0, 1.0, 2.0, 2.0])
METHODS: dict[str, Callable[[Any], Any]] = {
    "gd": lambda o: algorithms.gd(o, **RULE),
    "qgd": lambda o: algorithms.qgd(o, bits=3, **RULE),
    "laq": lambda o: algorithms.laq(o, bits=3, limit=7, **RULE),
    "laq, Adam": lambda o: algorithms.laq(o, bits=3, optimizer=laqjax.algorithms.amsgrad, **RULE),
    "laq_adaptive": lambda o: algorithms.laq_adaptive(o, **RULE),
    "two_laq": lambda o: algorithms.two_laq(o, bits=6, **RULE),
    "lag_wk": lambda o: algorithms.lag_wk(o, **RULE),
    "lag_ps": lambda o: algorithms.lag_ps(o, smoothness=SMOOTH, limit=5, **RULE),
    "iag_random": lambda o: algorithms.iag_random(o, smoothness=SMOOTH, **RULE),
    "ef21": lambda o: algorithms.ef21(o, compressor=compressors.top_k(6), **RULE),
    "ef21_p": lambda o: algorithms.ef21_p(o, compressor=compressors.top_k(6), down=compressors.top_k(9), **RULE),
    "marina": lambda o: algorithms.marina(o, compressor=compressors.rand_k(9), probability=0.3, **RULE),
    "diana": lambda o: algorithms.diana(o, compressor=compressors.natural(), damping=0.5, **RULE),
    "sign_sgd": lambda o: algorithms.sign_sgd(o, **RULE | {"lr": 1e-3}),
    "dgc": lambda o: algorithms.dgc(o, k=6, momentum=0.5, **RULE),
    "lasg_wk1": lambda o: algorithms.lasg_wk1(o, sampler=laqjax.oracle.Blocks(3), period=4, **RULE),
    "ssgd": lambda o: algorithms.ssgd(o, density=0.3, **RULE),
    "fedlaq": lambda o: algorithms.fedlaq(o, num_workers=4, steps=2, local_lr=0.05, participants=2),
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_simulation(name: str, toy: Toy, quick_compilation: None) -> None:
    alg = METHODS[name](toy.oracle)
    out = laqjax.run(alg, toy.theta0, toy.shards, 12, KEY, record=["gradients"])
    facts, server, _ = federated(alg, toy.theta0, toy.shards, 12)
    np.testing.assert_array_equal(column(facts, "sent"), out.info.sent)
    np.testing.assert_array_equal(column(facts, "bits_up"), out.info.bits_up)
    np.testing.assert_array_equal(column(facts, "bits_down"), out.info.bits_down)
    np.testing.assert_array_equal(column(facts, "gradients"), out.info.extra["gradients"])
    np.testing.assert_allclose(server.state.params, out.state.params, rtol=1e-4, atol=1e-6)
    if alg.num_workers == column(facts, "answered").sum() / len(facts):  # else the mean is over those that were asked
        np.testing.assert_allclose(column(facts, "loss"), out.info.loss, rtol=1e-5)


def test_the_reference_problem(mnist: laqjax.Shards) -> None:
    """60 rounds: the masks of the simulation, and of the authors' program as far as the simulation has them."""
    import reference
    from test_golden import GOLDEN, authors_run, flat

    out = authors_run(mnist, np.float32, 60)
    theta0 = jnp.asarray(flat(GOLDEN["theta0"]), np.float32)
    params = {"bias": theta0[:10], "weight": theta0[10:].reshape(10, 784)}
    oracle = laqjax.oracle.from_loss(softmax_loss, params, l2=reference.AUTHORS_L2)
    alg = algorithms.laq(oracle, num_workers=10, **reference.AUTHORS)
    facts, _, grid = federated(alg, theta0, mnist, 60)
    sent, payload = column(facts, "sent"), column(facts, "payload_up")
    np.testing.assert_array_equal(sent, out.info.sent)
    np.testing.assert_array_equal(sent[:50], GOLDEN["sent"][:50])
    np.testing.assert_allclose(column(facts, "loss"), out.info.loss, rtol=0, atol=1e-6)
    # what is billed is what is sent, and the rest is heads: Flower's, and ours of a fixed size
    np.testing.assert_array_equal(8 * payload, out.info.bits_up)
    heads = column(facts, "bytes_up") - payload
    own = messages.HEADS[messages.Up].size
    assert own <= heads.min() <= heads.max() <= own + 120
    hello = grid.bytes_up - column(facts, "bytes_up").sum()
    assert 0 < hello <= 10 * 80  # one reply of each node to the question who it is
    # every model goes down once a worker, as no worker has it yet, with the two numbers of the last step
    np.testing.assert_array_equal(column(facts, "payload_down"), 4 * 7850)
    assert (column(facts, "bytes_down") - 4 * 7850)[1:].max() < 200

    gd = algorithms.gd(oracle, lr=0.02, num_workers=10)
    plain = federated(gd, theta0, mnist, 20)[0]
    assert column(facts[:20], "bytes_up").sum() < 0.2 * column(plain, "bytes_up").sum()


def test_the_model_comes_down_in_the_bits_that_are_billed(toy: Toy) -> None:
    alg = METHODS["two_laq"](toy.oracle)
    facts, _, _ = federated(alg, toy.theta0, toy.shards, 5)
    down = column(facts, "payload_down")
    np.testing.assert_array_equal(down[0], 4 * 63)  # nobody has a model yet
    np.testing.assert_array_equal(8 * down[1:], np.broadcast_to(column(facts, "bits_down")[:-1, None], (4, 4)))


def test_who_is_not_asked_gets_nothing(toy: Toy) -> None:
    facts, _, _ = federated(METHODS["lag_ps"](toy.oracle), toy.theta0, toy.shards, 12)
    sent = column(facts, "sent")
    assert not sent.all()
    assert not column(facts, "bytes_down")[~sent].any()
    assert not column(facts, "bytes_up")[~sent].any()


def test_a_model_that_did_not_change_is_not_sent_again(toy: Toy) -> None:
    """A round that is repeated, since nobody's reply came through."""
    alg = METHODS["laq"](toy.oracle)
    grid = Loopback(flower.client_app(alg, loader(toy.shards)), range(4))
    server = federation.Federation(alg, toy.theta0, KEY)
    list(server.run(grid, 3))
    server.holds = [3] * 4  # as if they had answered in round 3
    before = {node: context.state for node, context in grid.contexts.items()}
    assert before
    message = server.broadcast(100, b"")
    assert messages.opened(messages.Down, message)[0].model == messages.SAME
    assert "body" not in message.content[messages.NAME]
