"""Oracles: they compute the loss and the gradient of one worker for a flat vector of parameters [p].

`from_loss` builds an oracle from a loss on a pytree of parameters. `with_local_steps` builds an oracle that trains
locally, with plain gradient steps or with an optax optimizer. The other parts of an algorithm see flat vectors only.

An oracle reads a shard in tiles, each of them once. The loss casts and scales a tile while it is in cache. The forward
and the backward product of this tile run before the next tile is read. Tiles are sliced directly from the [M, N, ...]
arrays, because slicing the worker first would copy every shard once more per round.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from laqjax._core import cpu_layouts
from laqjax._core.validation import (
    as_optimizer_factory,
    as_schedule,
    check_bool,
    check_evaluates_anywhere,
    check_minibatch,
    check_number,
    check_oracle_result,
    check_shards_type,
    get_declaration,
    oracle_dtype,
    suggest,
)
from laqjax.samplers import ExampleSelection
from laqjax.types import (
    Oracle,
    OracleHints,
    OracleResult,
    RoundContext,
    Shards,
    StatefulOracle,
    register_dataclass,
    static_field,
)

__all__ = ["LocalStepsOracle", "PytreeLayout", "TiledOracle", "from_loss", "with_local_steps"]


# One tile in the parameters' dtype on the CPU. It fits in the second-level caches of two cores together; a larger tile
# needs the third level.
_CPU_TILE_BYTES = 4 * 2**20
# The tiles of all workers on other devices: mostly whole shards, so that a round is a handful of kernels.
_ACCELERATOR_TILE_BYTES = 2**30


@dataclass(frozen=True)
class PytreeLayout:
    """Layout of a pytree of arrays of one dtype in a flat vector.

    Layouts of the same structure, shapes and dtype compare equal, so they share one compiled program.

    Attributes:
        tree: structure of the pytree.
        shapes: shapes of its leaves, in the order of the structure.
        dtype: dtype of all leaves.
    """

    tree: Any
    shapes: tuple[tuple[int, ...], ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(map(math.prod, self.shapes))

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """Flatten a pytree into a vector; return a vector of the right length unchanged.

        Args:
            params: the pytree, or a vector [p].

        Returns:
            The vector, [p].

        Raises:
            ValueError: the structure, a shape or a dtype differs from the layout.
        """
        leaves, tree = jax.tree.flatten(params)
        arrays = all(hasattr(leaf, "dtype") for leaf in leaves)
        same = arrays and all(leaf.dtype == self.dtype for leaf in leaves)
        if same and len(leaves) == 1 and np.shape(leaves[0]) == (self.size,):
            return jnp.asarray(leaves[0])
        if not same or tree != self.tree or tuple(np.shape(leaf) for leaf in leaves) != self.shapes:
            given = ", ".join(f"{leaf.dtype}{list(np.shape(leaf))}" for leaf in leaves) if arrays else str(type(params))
            tree_given = "" if jax.tree_util.treedef_is_leaf(tree) or not arrays else f" in {tree}"
            wanted = ", ".join(f"{self.dtype}{list(shape)}" for shape in self.shapes)
            raise ValueError(
                f"params = {given}{tree_given}: must be {self.dtype}[{self.size}], a vector from oracle.ravel(params), "
                f"or the pytree {wanted} in {self.tree}"
            )
        # in two dimensions, because XLA on the CPU would fuse a concatenation of vectors into its consumer, with a
        # branch per element
        return jnp.concatenate([jnp.reshape(jnp.asarray(leaf), (1, -1)) for leaf in leaves], axis=1)[0]

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """Restore the pytree from a vector [p]."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(params, ends[:-1])
        return jax.tree.unflatten(self.tree, [a.reshape(shape) for a, shape in zip(parts, self.shapes, strict=True)])


@register_dataclass
@dataclass(frozen=True)
class TiledOracle:
    """Oracle that reads a shard in tiles: `oracle(params, shards, shard)` -> loss, gradient. Build it with `from_loss`.

    Attributes:
        l2: weight of (l2 / 2) ||params||^2.
        loss_fn: the loss per example, (params, x, y) -> losses [n].
        layout: layout of the parameters in the vector.
        reduction: "mean" or "sum" over the examples of a shard, weighted by `Shards.weight`.
        tile: examples per tile, or None for a default by device.
        precision: precision of the matrix products.
        use_cpu_layouts: whether gradients on the CPU are rewritten for XLA's fast kernels.
    """

    l2: Float[Array, ""]
    loss_fn: Callable[..., Array] = static_field()
    layout: PytreeLayout = static_field()
    reduction: str = static_field()
    tile: int | None = static_field()
    precision: str = static_field()
    use_cpu_layouts: bool = static_field(default=True)

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return self.layout.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of parameters, gradients and losses."""
        return self.layout.dtype

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """Flatten a pytree of parameters into a vector [p].

        Args:
            params: the pytree, or a vector [p], which is returned unchanged.

        Returns:
            The vector, [p]; `unravel` is the inverse.

        Raises:
            ValueError: the structure, a shape or a dtype differs from those of the oracle.
        """
        return self.layout.ravel(params)

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """Restore the pytree of parameters from a vector [p]."""
        return self.layout.unravel(params)

    def examples_per_tile(self, shards: Shards) -> int:
        """Return the number of examples of a tile, at most those of a shard.

        This is `tile` if it was given. Otherwise a shard is split into tiles of nearly equal size. On the CPU a tile
        has about 4 MiB. On other devices the tiles of all workers together have about 1 GiB.
        """
        workers, examples = shards.weight.shape
        size = _CPU_TILE_BYTES if jax.default_backend() == "cpu" else _ACCELERATOR_TILE_BYTES // workers
        numbers = sum(math.prod(a.shape[2:]) for a in jax.tree.leaves(shards.x))
        tiles = -(-examples * numbers * self.dtype.itemsize // size)
        return min(self.tile or -(-examples // max(tiles, 1)), examples)

    def __call__(
        self,
        params: Float[Array, " p"],
        shards: Shards,
        shard: Int[Array, ""],
        examples: ExampleSelection | None = None,
    ) -> OracleResult:
        """Compute the loss and the gradient of one worker at `params`.

        The loss is the reduction over the examples of the worker, plus (l2 / 2) ||params||^2.

        Args:
            params: the model, [p].
            shards: the data, arrays [M, N, ...].
            shard: index of the worker's shard in `shards`, `RoundKeys.shard`.
            examples: the minibatch, from which loss and gradient are estimated; None for the whole shard.

        Returns:
            The loss and the gradient [p].
        """
        tree = self.unravel(params)
        size = examples.size if examples else shards.weight.shape[1]

        def sum_examples(start: Any, count: int) -> tuple[Array, Array, Any]:
            x, y, weight = jax.tree.map(lambda a: _slice_examples(a, shard, examples, start, count), shards)
            weight = weight.astype(self.dtype)
            value_and_grad = jax.value_and_grad(lambda tree, x, y: jnp.vdot(self._losses(tree, x, y), weight))
            if self.use_cpu_layouts and jax.default_backend() == "cpu":
                value_and_grad = partial(cpu_layouts.with_canonical_layouts, value_and_grad)
            loss, grad = value_and_grad(tree, x, y)
            return loss, jnp.sum(weight), grad

        with jax.default_matmul_precision(self.precision):
            loss, weight, grad = _sum_over_tiles(sum_examples, size, min(self.examples_per_tile(shards), size))
        grad = self.ravel(grad)
        if self.reduction == "mean" or examples:
            loss, grad = loss / weight, grad / weight
        # scaled to the sum of the whole shard, so that l2 keeps its relative weight
        if self.reduction == "sum" and examples:
            whole_shard = jnp.sum(shards.weight[shard]).astype(self.dtype)
            loss, grad = loss * whole_shard, grad * whole_shard
        return OracleResult(loss + self.l2 / 2 * jnp.sum(params * params), grad + self.l2 * params)

    def validate(self, shards: Shards) -> None:
        """Raise ValueError unless the loss accepts these shards and returns one loss per example.

        The loss is traced, but not run. If it has a method `check_shards`, as a `laqjax.problems.Problem` has, this
        method is called first.
        """
        check_shards_type(shards)
        own = getattr(self.loss_fn, "check_shards", None)
        if callable(own):
            own(shards)
        jax.eval_shape(self._losses, self._params_struct(), *_example_structs(shards, 2))

    def _losses(self, tree: Any, x: Any, y: Any) -> Array:
        """Return the losses [n] of n examples.

        Raises:
            ValueError: the losses do not have shape [n], or not the dtype of the parameters.
        """
        losses, n = self.loss_fn(tree, x, y), len(jax.tree.leaves(x)[0])
        if getattr(losses, "shape", None) != (n,):
            got = jax.eval_shape(lambda: losses)
            raise ValueError(
                f"loss_fn(params, x, y) returned {got} for {n} examples: must be per-example losses of shape [{n}]; do "
                "not average inside the loss, since the oracle averages by the weights"
            )
        if losses.dtype != self.dtype:
            raise ValueError(
                f"loss_fn returned {losses.dtype} losses: must be {self.dtype}, the dtype of params; cast x in the loss"
            )
        return losses

    def activation_bytes(self, shards: Shards) -> int:
        """Return the bytes that the forward pass of one tile keeps for the backward pass.

        The loss is traced, but not run.
        """
        x, y = _example_structs(shards, self.examples_per_tile(shards))

        def forward(tree: Any, x: Any, y: Any) -> Any:
            return jax.vjp(lambda tree: self._losses(tree, x, y), tree)[1]

        kept = jax.eval_shape(forward, self._params_struct(), x, y)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

    def prefers_sequential(self, shards: Shards) -> bool:
        """Return whether the points of a sweep run one after another.

        This is the case for losses with convolutions on the CPU, where convolutions with many kernels are slow.
        """
        if jax.default_backend() != "cpu":
            return False
        loss = jax.make_jaxpr(self._losses)(self._params_struct(), *_example_structs(shards, 2))
        return cpu_layouts.contains_primitive(loss.jaxpr, jax.lax.conv_general_dilated_p)

    def _params_struct(self) -> Any:
        return jax.eval_shape(self.unravel, jax.ShapeDtypeStruct((self.size,), self.dtype))


def _example_structs(shards: Shards, count: int) -> Any:
    """Return the shapes and dtypes of x and y for `count` examples."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((count, *a.shape[2:]), a.dtype), (shards.x, shards.y))


def _slice_examples(a: Any, shard: Any, examples: ExampleSelection | None, start: Any, count: int) -> Array:
    """Slice `count` examples from `start` on, out of a shard or out of the selected `examples` of it."""
    if examples and examples.index is not None:
        return a[shard, jax.lax.dynamic_slice(examples.index, (start,), (count,))]
    first = start if examples is None else start + examples.start
    at = [jnp.asarray(i, jnp.int32) for i in (shard, first, *(0,) * (a.ndim - 2))]
    return jax.lax.dynamic_slice(a, at, (1, count, *a.shape[2:]))[0]


def _sum_over_tiles(sum_examples: Callable[[Any, int], Any], size: int, tile: int) -> Any:
    """Sum `sum_examples(start, count)` over the tiles of `size` examples; a single tile needs no loop."""
    # summed as a pytree and flattened once, because slices of the flat vector inside the loop cost half of the speed
    whole = size - size % tile
    if whole == tile:
        total = sum_examples(np.int32(0), tile)
    else:
        one = jax.eval_shape(lambda: sum_examples(np.int32(0), tile))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), one)
        starts = np.arange(0, whole, tile, dtype=np.int32)

        def add(total: Any, start: Any) -> Any:
            return jax.tree.map(jnp.add, total, sum_examples(start, tile)), None

        total, _ = jax.lax.scan(add, zeros, starts)
    return total if whole == size else jax.tree.map(jnp.add, total, sum_examples(np.int32(whole), size - whole))


def from_loss(
    loss_fn: Callable[..., Array],
    params: Any,
    *,
    l2: float = 0.0,
    reduction: str = "mean",
    tile: int | None = None,
    precision: str = "highest",
    use_cpu_layouts: bool = True,
) -> TiledOracle:
    """Build an oracle from a loss per example.

    Args:
        loss_fn: (params, x, y) -> losses [n]. x and y are n examples in their storage dtypes; the loss casts and scales
            them.
        params: any pytree of floating arrays of one dtype. Only its structure, shapes and dtype are used.
        l2: weight of the term (l2 / 2) ||params||^2, which is added for each worker.
        reduction: "mean" or "sum" over a worker's shard, weighted by `Shards.weight`.
        tile: examples read at a time. None: about 4 MiB per tile on the CPU; 1 GiB for all workers on GPU and TPU.
        precision: precision of the matrix products. "highest" is true float32 on every device. A lower precision
            changes trajectories on GPU and TPU.
        use_cpu_layouts: on the CPU, rewrite gradients with transposed convolutions and products so that XLA uses its
            fast kernels inside loops. False: gradients as JAX gives them, equal up to rounding and often slower.

    Returns:
        `oracle(params [p], shards, shard)`, which returns loss and gradient [p], with the methods `ravel` and
        `unravel`.

    Raises:
        ValueError: `reduction` is not "mean" or "sum", l2 < 0, tile < 1, `use_cpu_layouts` is not a bool, or `params`
            has mixed or non-floating dtypes.

    Example:
        >>> import jax.numpy as jnp, laqjax
        >>> oracle = laqjax.oracles.from_loss(lambda w, x, y: (x @ w - y) ** 2 / 2, jnp.zeros(3))
        >>> oracle.size
        3
    """
    leaves, tree = jax.tree.flatten(params)
    dtypes = {np.dtype(getattr(leaf, "dtype", type(leaf))) for leaf in leaves}
    if len(dtypes) != 1 or not jnp.issubdtype(next(iter(dtypes)), jnp.floating):
        raise ValueError(f"params of dtypes {sorted(map(str, dtypes))}: must be arrays of one floating dtype")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}: must be 'mean' or 'sum'{suggest(reduction, ('mean', 'sum'))}")
    check_bool("use_cpu_layouts", use_cpu_layouts)
    layout = PytreeLayout(tree, tuple(np.shape(leaf) for leaf in leaves), dtypes.pop())
    strength = check_number("l2", l2, layout.dtype, minimum=0)
    tile = None if tile is None else int(check_number("tile", tile, np.int32, minimum=1))
    return TiledOracle(strength, loss_fn, layout, reduction, tile, precision, bool(use_cpu_layouts))


# ---- local steps ------------------------------------------------------------------------------------------------


@register_dataclass
@dataclass(frozen=True)
class LocalStepsOracle:
    """Oracle that trains locally and returns the change of the model; see `with_local_steps`.

        y = params
        y += optimizer step for the gradient grad(y) + proximal (y - params), `num_local_steps` times
        gradient = (params - y) / (sum of the step sizes), or params - y

    Attributes:
        oracle: the oracle of the local gradients.
        lr: step size of the local steps: a number, or a schedule of the step round * num_local_steps + t. None: the
            optimizer has its own.
        optimizer: factory from the step size to an optax transformation, a pytree. None: plain gradient steps.
        proximal: weight of FedProx's proximal term. None: no such term.
        num_local_steps: local steps per round.
        keep_optimizer_state: whether the state of the optimizer is kept from round to round.
        returns_difference: whether the result is params - y, without the division by the step sizes.
        has_control_variates: whether each local gradient gets SCAFFOLD's correction c - c_m, where c_m is the memory of
            the worker and c the mean of all c_m, the aggregate / M. The result is then the mean of the local gradients
            without it.
    """

    oracle: Oracle
    lr: Any
    optimizer: Any
    proximal: Any
    num_local_steps: int = static_field()
    keep_optimizer_state: bool = static_field()
    returns_difference: bool = static_field()
    has_control_variates: bool = static_field(default=False)

    @property
    def size(self) -> int:
        """Number of parameters p."""
        return self.oracle.size

    @property
    def dtype(self) -> np.dtype:
        """Dtype of parameters, gradients and losses."""
        return self.oracle.dtype

    def ravel(self, params: Any) -> Float[Array, " p"]:
        """Flatten a pytree of parameters into a vector [p]."""
        return self.oracle.ravel(params)

    def unravel(self, params: Float[Array, " p"]) -> Any:
        """Restore the pytree of parameters from a vector [p]."""
        return self.oracle.unravel(params)

    @property
    def reads_aggregate(self) -> bool:
        """Return whether the oracle reads the aggregate of the server."""
        return self.has_control_variates

    def validate(self, shards: Shards) -> None:
        """Raise ValueError if the loss does not fit the data."""
        self.oracle.validate(shards)

    def activation_bytes(self, shards: Shards) -> int:
        """Return the bytes of activations that one local gradient needs."""
        return get_declaration(self.oracle, OracleHints, "activation_bytes")(shards)

    def prefers_sequential(self, shards: Shards) -> bool:
        """Return whether the points of a sweep run one after another."""
        return get_declaration(self.oracle, OracleHints, "prefers_sequential")(shards)

    def init_state(self, params: Float[Array, " p"]) -> Any:
        """Create the state of one worker before round 0: that of its optimizer if it is kept, else None."""
        return self.init_optimizer(params) if self.keep_optimizer_state else None

    def init_optimizer(self, params: Float[Array, " p"]) -> Any:
        """Create a new state of the optimizer for the model [p]; None for plain gradient steps."""
        if self.optimizer is None:
            return None
        return self.optimizer(self.learning_rate_at(jnp.int32(0))).init(self.unravel(params))

    def learning_rate_at(self, step: Int[Array, ""]) -> Any:
        """Return the step size in a local step, counted from round 0; None if the optimizer has its own."""
        if not callable(self.lr):
            return self.lr
        with jax.numpy_dtype_promotion("standard"):  # schedules combine the integer step with floats
            return jnp.asarray(self.lr(step), self.dtype)

    @property
    def local_schedule(self) -> Any:
        """Return the learning rate as a function of the local step; None if it is constant, or the optimizer's own."""
        return jax.tree_util.Partial(LocalStepsOracle.learning_rate_at, self) if callable(self.lr) else None

    def total_learning_rate_at(self, round: Int[Array, ""]) -> Float[Any, ""]:
        """Return the sum of the step sizes of a round."""
        if not callable(self.lr):
            return self.num_local_steps * self.lr
        steps = round * self.num_local_steps + jnp.arange(self.num_local_steps, dtype=jnp.int32)
        return jnp.sum(jax.vmap(self.learning_rate_at)(steps))

    def __call__(
        self,
        params: Float[Array, " p"],
        shards: Shards,
        shard: Int[Array, ""],
        examples: ExampleSelection | None = None,
    ) -> OracleResult:
        """Train locally as in round 0: with a new optimizer state and without control variates.

        Args:
            params: the model, [p], from which the local steps start.
            shards: the data, arrays [M, N, ...].
            shard: index of the worker's shard in `shards`, `RoundKeys.shard`.
            examples: the minibatch, split into one part for each local step; None for the whole shard in every step.

        Returns:
            The loss on the examples of the first local step, the change of the model as a gradient [p], and the state
            of the optimizer, None unless it is kept.

        Raises:
            ValueError: the size of the minibatch is not a multiple of `num_local_steps`, or the inner oracle cannot be
                evaluated at other models than that of the round.
        """
        return _train_locally(self, params, shards, shard, examples, self.init_state(params), jnp.int32(0), None)

    def evaluate(
        self, params: Float[Array, " p"], shards: Shards, examples: Any, state: Any, context: RoundContext
    ) -> OracleResult:
        """Train locally in a round, from the state of the worker; see `laqjax.types.StatefulOracle`."""
        correction = None
        if self.has_control_variates:
            correction = context.aggregate / context.num_workers - context.memory_state
        return _train_locally(self, params, shards, context.keys.shard, examples, state, context.round, correction)


def _train_locally(
    trainer: LocalStepsOracle,
    params: Array,
    shards: Shards,
    shard: Any,
    examples: Any,
    state: Any,
    round: Any,
    correction: Any,
) -> OracleResult:
    """Train locally from the optimizer state `state`, with `correction` [p] added to each gradient unless None."""
    check_evaluates_anywhere(trainer.oracle)
    if examples:
        check_minibatch(examples.size, trainer.num_local_steps)

    def evaluate(local: Any, t: Any) -> OracleResult:
        part = examples.slice(t, examples.size // trainer.num_local_steps) if examples else None
        return check_oracle_result(trainer.oracle, trainer.oracle(local, shards, shard, part))

    def move(local: Any, grad: Any, optimizer_state: Any, t: Any) -> Any:
        if trainer.proximal is not None:
            grad = grad + trainer.proximal * (local - params)
        if correction is not None:
            grad = grad + correction
        step = round * trainer.num_local_steps + t
        lr = trainer.learning_rate_at(step)
        if trainer.optimizer is None:
            return local - lr * grad, None
        optimizer_state = _set_schedule_counts(optimizer_state, step)
        return _apply_optimizer(trainer.optimizer(lr), trainer.oracle, local, grad, optimizer_state)

    def local_step(carry: Any, t: Any) -> Any:
        local, optimizer_state = carry
        return move(local, evaluate(local, t).grad, optimizer_state, t), None

    loss, grad, _ = evaluate(params, jnp.int32(0))
    first = move(params, grad, state if trainer.keep_optimizer_state else trainer.init_optimizer(params), jnp.int32(0))
    steps = jnp.arange(1, trainer.num_local_steps, dtype=jnp.int32)
    (last, optimizer_state), _ = jax.lax.scan(local_step, first, steps)
    if trainer.returns_difference:
        grad = params - last
    elif trainer.num_local_steps > 1 or trainer.optimizer is not None:
        total = trainer.total_learning_rate_at(round)
        if callable(trainer.lr):  # a schedule may begin at zero
            grad = jnp.where(total > 0, (params - last) / jnp.where(total > 0, total, 1), 0)
        else:
            grad = (params - last) / total
        grad = grad if correction is None else grad - correction
    return OracleResult(loss, grad, optimizer_state if trainer.keep_optimizer_state else None)


def _apply_optimizer(transformation: Any, oracle: Oracle, params: Any, grad: Any, state: Any) -> tuple[Any, Any]:
    """Make a step with an optax transformation, which sees the pytree; return the model [p] and the next state."""
    with jax.numpy_dtype_promotion("standard"):  # optax combines floats and integers
        tree: Any = oracle.unravel(params)
        updates, state = transformation.update(oracle.unravel(grad), state, tree)
        return oracle.ravel(optax.apply_updates(tree, updates)), state


def _set_schedule_counts(state: Any, step: Int[Array, ""]) -> Any:
    """Set the counts of optax's schedules, since the own count of an absent worker falls behind.

    States of optax that hold a count and nothing else are those of schedules.
    """

    def is_schedule(node: Any) -> bool:
        return getattr(node, "_fields", None) == ("count",)

    def set_count(node: Any) -> Any:
        return node._replace(count=jnp.asarray(step, node.count.dtype)) if is_schedule(node) else node

    return jax.tree.map(set_count, state, is_leaf=is_schedule)


def with_local_steps(
    oracle: Oracle,
    steps: int,
    lr: Any = None,
    *,
    optimizer: Any = optax.sgd,
    proximal: float = 0.0,
    keep_optimizer_state: bool = True,
) -> LocalStepsOracle:
    """Build an oracle that trains locally for `steps` steps and returns the change of the model as a gradient.

    FedAvg is `algorithms.gd` on this oracle, FedPAQ is `qsgd`, and lazy FedAvg is `laq`.

    Args:
        oracle: the oracle of the local gradients.
        steps: local steps per round. A minibatch is split into as many equal parts, one per step.
        lr: step size of the local steps > 0, or a schedule: a function of the step round * steps + t. None for an
            `optimizer` that is a transformation.
        optimizer: inner optimizer, which sees the pytree of the parameters: a function of the step size that returns an
            optax transformation, such as `optax.adamw`. The gradient is then the change of the model divided by the sum
            of the step sizes; with plain SGD, the mean of the local gradients. The numbers of a `jax.tree_util.Partial`
            are traced. It may also be a transformation, such as `optax.adamw(1e-3)`. Its numbers are then static, its
            schedules read the step round * steps + t too, and the gradient is the change of the model itself.
        proximal: weight mu >= 0 of FedProx's term (mu / 2) ||y - params||^2 in the local loss. A value of 0 is another
            structure than one above 0.
        keep_optimizer_state: whether a worker keeps the state of its optimizer from round to round. The state advances
            in rounds in which the worker participates, whether it sends or not. False: a new state in every round.

    Returns:
        The oracle. Its workers have a state if `keep_optimizer_state` and the optimizer has one.

    Raises:
        ValueError: a number is out of its range, `lr` is missing or given without use, the optimizer needs more than
            gradients, its state and parameters, or `oracle` has a state itself.

    Example:
        >>> import optax, laqjax
        >>> oracle = laqjax.problems.Softmax(20, 3).oracle()
        >>> laqjax.oracles.with_local_steps(oracle, 10, 1e-3, optimizer=optax.adamw).num_local_steps
        10
    """
    names = "steps", "lr", "optimizer"
    return _make_local_steps(oracle, steps, lr, optimizer, proximal, keep_optimizer_state, names)


def _make_local_steps(
    oracle: Oracle,
    steps: Any,
    lr: Any,
    optimizer: Any,
    proximal: Any,
    keep_optimizer_state: Any,
    names: tuple[str, str, str],
) -> LocalStepsOracle:
    """Build the oracle of `with_local_steps`; `names` are those of steps, lr and optimizer in error messages."""
    dtype = oracle_dtype(oracle)
    steps_name, lr_name, optimizer_name = names
    is_ready = isinstance(optimizer, optax.GradientTransformation)
    if is_ready and lr is not None:
        raise ValueError(
            f"{lr_name} = {lr!r} with an optimizer that is a transformation: must be None, since the transformation has "
            f"its own step size; give a function of the step size, such as optax.adamw, to use {lr_name}"
        )
    check_bool("keep_optimizer_state", keep_optimizer_state)
    strength = check_number("proximal", proximal, dtype, minimum=0)
    local = LocalStepsOracle(
        oracle=oracle,
        lr=None if is_ready else as_schedule(lr, dtype, lr_name),
        optimizer=None if optimizer is optax.sgd else as_optimizer_factory(optimizer, dtype, optimizer_name),
        proximal=strength if strength > 0 else None,
        num_local_steps=int(check_number(steps_name, steps, np.int32, minimum=1)),
        keep_optimizer_state=bool(keep_optimizer_state),
        returns_difference=is_ready,
    )
    params = jax.ShapeDtypeStruct((oracle.size,), dtype)
    if jax.tree.leaves(jax.eval_shape(get_declaration(oracle, StatefulOracle, "init_state"), params)):
        raise ValueError(
            f"oracle {type(oracle).__name__} with a state of each worker: must be an oracle without one, such as "
            "oracles.from_loss gives it"
        )
    if local.optimizer is not None:
        _check_inner_optimizer(local, params, f"{optimizer_name} = {optimizer!r}")
    return local


def _check_inner_optimizer(local: LocalStepsOracle, params: jax.ShapeDtypeStruct, given: str) -> None:
    """Raise ValueError unless the optimizer needs gradients, state and parameters only, and its state keeps its form."""

    def step(local: LocalStepsOracle, params: Array) -> Any:
        state = local.init_optimizer(params)
        transformation = local.optimizer(local.learning_rate_at(jnp.int32(0)))
        return state, _apply_optimizer(transformation, local.oracle, params, params, state)[1]

    allowed = (
        "must be a transformation that needs the gradients, its state and the parameters only, such as optax.adamw"
    )
    try:
        before, after = jax.eval_shape(step, local, params)
    except Exception as error:  # optimizers raise many types
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{given}, which failed ({reason}): {allowed}") from error
    if before != after:
        raise ValueError(f"{given}, whose state changes from {before} to {after}: {allowed}")
