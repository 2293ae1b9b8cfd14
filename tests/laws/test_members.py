"""A method has four places: the file of its family, the export, a row in the registry, a row in the docs."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import laqjax
from laqjax import algorithms
from tests.laws import registry
from tests.laws.laws import (
    check_billed_bits,
    check_cut_run,
    check_memories,
    check_state_is_fixed_point,
    check_sweep_is_loop,
)
from tests.support import KEY, ROOT, Toy

pytestmark = pytest.mark.core

FAMILY = (ROOT / "docs" / "algorithm.md").read_text()
LARGER = '''
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from laqjax import Algorithm, assemble, check_number, memories, rules
from laqjax.types import Decision, WireField, register_dataclass


@register_dataclass
@dataclass(frozen=True)
class Half:
    """Compressor to float16."""

    def encode(self, target, keys):
        return {"values": target.astype(jnp.float16)}

    def decode(self, payload, like):
        return payload["values"].astype(like.dtype)

    def wire_fields(self, payload, like):
        yield WireField(payload, "values", jax.ShapeDtypeStruct(like.shape, np.float16), 16)


@register_dataclass
@dataclass(frozen=True)
class Larger(rules.BaseUploadRule):
    """Rule that sends a change larger than a share of the last one sent."""

    share: Any

    def init(self, params):
        return None, jnp.zeros((), params.dtype)

    def should_send(self, shared_state, worker_state, context):
        send = context.decoded_sq > jnp.asarray(self.share, worker_state.dtype) * worker_state
        return Decision(send, context.decoded_sq, worker_state)


def larger(oracle, *, lr: Any, num_workers: int, share: Any, optimizer: Any = optax.sgd) -> Algorithm:
    share = check_number("share", share, np.float32, minimum=0)
    memory = memories.make_innovation_memory(oracle)
    return assemble(oracle, Half(), Larger(share), memory, lr=lr, num_workers=num_workers, optimizer=optimizer)
'''


def missing_rows(family: str) -> list[tuple[str, str]]:
    """Return (method, place) for each exported method without a row in the registry, or in a text of the docs."""
    listed = {row.factory for row in registry.ROWS.values()}
    rows = re.findall(r"^\| (`.*?) \|", family, re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    methods = registry.named_algorithms()
    missing = [(name, "registry") for name, factory in methods.items() if factory not in listed]
    return missing + [(name, "docs") for name in methods if name not in explained]


def test_every_method_has_its_rows() -> None:
    assert missing_rows(FAMILY) == []


def federate(alg: laqjax.Algorithm, problem: Toy, rounds: int) -> list[Any]:
    """Run a federation in this process and return its rounds."""
    pytest.importorskip("flwr")
    from laqjax import federation
    from laqjax.federation.testing import InProcessGrid

    app = federation.client_app(alg, lambda worker: jax.tree.map(lambda a: a[worker : worker + 1], problem.shards))
    server = federation.FederatedServer(alg, problem.theta0, KEY)
    return list(server.run(InProcessGrid(app, range(alg.num_workers)), rounds))


def test_a_new_method_needs_its_four_places_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quadratic: Toy
) -> None:
    path = tmp_path / "_new.py"
    path.write_text(LARGER)
    spec = importlib.util.spec_from_file_location("laqjax.algorithms._new", path)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(algorithms, "larger", module.larger, raising=False)
    monkeypatch.setattr(algorithms, "__all__", [*algorithms.__all__, "larger"])
    assert missing_rows(FAMILY) == [("larger", "registry"), ("larger", "docs")]
    other_values = registry.LR | {"share": (0, 0.3, np.float64(0.6), np.float32(0.9), 2)}
    monkeypatch.setitem(registry.ROWS, "larger", registry.Row(module.larger, dict(share=0.1), other_values))
    assert missing_rows(f"{FAMILY}\n| `larger` | change in float16 | its own rule | memory |\n") == []

    alg = registry.make("larger", quadratic)
    check_state_is_fixed_point(alg, quadratic)
    check_memories(alg, quadratic, 1e-14)
    check_billed_bits(alg, quadratic)
    sent = check_cut_run(alg, quadratic).info.sent
    assert 0.05 < sent[1:].mean() < 0.95
    check_sweep_is_loop(registry.points_of("larger", quadratic), quadratic)
    stats = federate(alg, quadratic, 6)
    np.testing.assert_array_equal([round.sent for round in stats], sent[:6])
