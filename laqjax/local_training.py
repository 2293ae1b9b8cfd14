"""Local training with few bits (DiLoCo) for your own training loop, as an optax transformation inside `jax.shard_map`.

Each device trains with an inner optimizer. Every `sync_every` steps the devices send compressed differences from the
outer model, and an outer optimizer steps with them (Douillard et al. 2023).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from laqjax._core.validation import check_implements, check_number
from laqjax._engine.split_parameters import make_specs
from laqjax.aggregation import LazyAggregateState, _check_axis, _find, lazy_aggregate
from laqjax.algorithms import laq
from laqjax.optimizers import nesterov
from laqjax.types import register_dataclass

__all__ = ["DilocoState", "ParameterUpdate", "collapse", "diloco_optimizer", "replicate"]


class DilocoState(NamedTuple):
    """State of `diloco_optimizer`.

    Attributes:
        step: number of inner steps since the last synchronization.
        params: outer model, the same on every device.
        inner_state: states of the inner optimizers, with the axis of the workers; every leaf is [M, ...].
        outer_state: state of the outer optimizer.
        aggregate_state: state of `lazy_aggregate`; its `sent` and bytes are zero in steps without a synchronization.
    """

    step: Int[Array, ""]
    params: Any
    inner_state: Any
    outer_state: Any
    aggregate_state: LazyAggregateState
    _must_be_last = True

    def _make_specs(self, axis: str, lead: tuple[str, ...], param_specs: Any) -> "DilocoState":
        """Return the partition specs of this state; see `aggregation.partition_specs`."""
        whole = make_specs(tuple(self), axis, lead, param_specs)
        return DilocoState(*whole)._replace(inner_state=make_specs(self.inner_state, axis, (*lead, axis), param_specs))


@register_dataclass
@dataclass(frozen=True)
class ParameterUpdate:
    """Update of one leaf of the parameters, which `optax.apply_updates` applies, but not `equinox.apply_updates`.

    A sum of floats cannot set a number exactly. After a synchronization, `params + update` is therefore `value` itself.

    Attributes:
        value: number to add, or new value of the leaf, [1, ...].
        replaces: whether `value` is the new value, [1].
    """

    value: Array
    replaces: Bool[Array, "1"]
    __array_ufunc__ = None  # a NumPy array leaves the sum to this class

    def __radd__(self, params: Any) -> Array:
        """Return the parameters after the update."""
        return jnp.where(self.replaces.reshape(-1, *[1] * (self.value.ndim - 1)), self.value, params + self.value)


_NESTEROV = nesterov(0.7)


def diloco_optimizer(
    inner: optax.GradientTransformation,
    *,
    axis: str,
    num_workers: int,
    sync_every: int,
    outer: optax.GradientTransformation = _NESTEROV,
    algorithm: Any = laq,
    param_specs: Any = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """Create an optimizer for local training, with an outer step every `sync_every` steps (DiLoCo).

    The parameters differ between the devices from one synchronization to the next. They carry a leading axis of M
    workers (`replicate`), which is split over the mesh axis: each device passes gradients and parameters [1, ...].
    Inner and outer optimizer see them without that axis. At a synchronization, each device passes its outer gradient,
    the outer model minus its parameters, to `lazy_aggregate`. The outer optimizer steps with the mean. Then the
    parameters of all devices are the outer model, bit for bit.

    The lazy rules compare the change of an outer gradient with the last means of outer gradients, not with the steps of
    the outer optimizer. Both sides are differences of parameters, so `xi` needs no other value for another learning
    rate, and momentum does not raise the threshold. Useful values of `xi` are 0.02 to 0.2: the default 0.8 of `laq`
    sends too little with momentum.

    Args:
        inner: optimizer of each device, such as `optax.adamw(1e-3)`.
        axis: mesh axis of the enclosing `jax.shard_map(..., check_vma=False)`, whose axes are all manual.
        num_workers: number of devices M along that axis, one worker each.
        sync_every: steps from one synchronization to the next, H.
        outer: optimizer of the outer model; by default `optax.sgd(0.7, momentum=0.9, nesterov=True)`, as in DiLoCo.
        algorithm: function of `laqjax.algorithms`, as in `lazy_aggregate`. `algorithms.gd` sends full precision.
        param_specs: partition specs of the parameters without the axis of the workers, for parameters that further mesh
            axes split; see `lazy_aggregate`.
        **settings: arguments of `algorithm`, such as bits and xi, and further arguments of `lazy_aggregate`.

    Returns:
        A transformation. `init(params)` takes the parameters with the axis of the workers. Place its state, a
        `DilocoState`, by `aggregation.partition_specs`. Apply the updates by `optax.apply_updates`. The transformation
        must be the last one of a chain; those before it see the axis of the workers.

    Raises:
        ValueError: an argument is wrong. `init` and `update` raise it if the parameters lack the axis of the workers or
            an optimizer needs other arguments, and `update` for the reasons of `lazy_aggregate`.

    Example:
        >>> import jax.numpy as jnp, optax, laqjax
        >>> from laqjax import local_training
        >>> tx = laqjax.diloco_optimizer(optax.adamw(1e-3), axis="data", num_workers=4, sync_every=10, bits=4, xi=0.1)
        >>> params = local_training.replicate({"w": jnp.zeros((3, 2))}, 4)
        >>> state = tx.init(params)
        >>> laqjax.aggregation.partition_specs(state, "data").inner_state[0].mu["w"]
        P('data',)
        >>> local_training.collapse(state)["w"].shape
        (3, 2)
    """
    period = int(check_number("sync_every", sync_every, np.int32, minimum=1))
    for name, optimizer in (("inner", inner), ("outer", outer)):
        allowed = "an optax transformation, such as optax.adamw(1e-3)"
        check_implements(name, optimizer, optax.GradientTransformation, allowed)
    exchange = lazy_aggregate(axis, num_workers, algorithm, param_specs=param_specs, **settings)

    def init(params: Any) -> DilocoState:
        _check_workers_axis(params, [(num_workers, *np.shape(leaf)[1:]) for leaf in jax.tree.leaves(params)], "in init")
        outer_params = jax.tree.map(lambda leaf: leaf[0], params)
        inner_state, outer_state = inner.init(outer_params), outer.init(outer_params)
        _check_update("inner", inner, inner_state, outer_params)
        _check_update("outer", outer, outer_state, outer_params)
        workers = replicate(inner_state, num_workers)
        aggregate_state: Any = exchange.init(outer_params)
        return DilocoState(jnp.int32(0), outer_params, workers, outer_state, aggregate_state)

    def update(gradients: Any, state: DilocoState, params: Any = None) -> tuple[Any, DilocoState]:
        if params is None:
            raise ValueError("diloco_optimizer's update with params = None: must be the parameters")
        _check_axis("diloco_optimizer", axis, num_workers)
        _check_workers_axis(params, [(1, *np.shape(leaf)) for leaf in jax.tree.leaves(state.params)], "on each device")
        gradients, here, inner_state = jax.tree.map(lambda leaf: leaf[0], (gradients, params, state.inner_state))
        with jax.numpy_dtype_promotion("standard"):  # optax combines floats and integers
            updates, inner_state = inner.update(gradients, inner_state, here)

            def synchronize() -> Any:
                moved = optax.apply_updates(here, updates)
                delta = jax.tree.map(lambda old, new: old - new, state.params, moved)
                mean, aggregate_state = exchange.update(delta, state.aggregate_state, state.params)
                steps, outer_state = outer.update(mean, state.outer_state, state.params)
                new: Any = optax.apply_updates(state.params, steps)
                return _promote(new, here, updates), new, outer_state, aggregate_state

            def go_on() -> Any:
                nothing = {name: jnp.zeros_like(getattr(state.aggregate_state, name)) for name in _OF_ONE_UPDATE}
                kept = state.aggregate_state._replace(**nothing)
                return _promote(updates, here, updates), state.params, state.outer_state, kept

            # all devices count alike, so that all of them take the same branch
            is_last = state.step == period - 1
            values, outer_params, outer_state, aggregate_state = jax.lax.cond(is_last, synchronize, go_on)
        step = jnp.where(is_last, 0, state.step + 1)
        inner_state = jax.tree.map(lambda leaf: leaf[None], inner_state)
        updates = jax.tree.map(lambda value: ParameterUpdate(value[None], is_last[None]), values)
        return updates, DilocoState(step, outer_params, inner_state, outer_state, aggregate_state)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]


_OF_ONE_UPDATE = "sent", "bytes_up", "bytes_received"  # fields of `LazyAggregateState`


def replicate(params: Any, num_workers: int) -> Any:
    """Give every leaf of a pytree a leading axis of M equal workers.

    Args:
        params: pytree of arrays.
        num_workers: number of workers M.

    Returns:
        The pytree with arrays [M, ...]. Split the axis over the mesh axis of the workers, by the spec `P(axis)`.
    """
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_workers, *jnp.shape(leaf))), params)


def collapse(state: Any) -> Any:
    """Return the outer model of an optimizer state, without the axis of the workers.

    Args:
        state: state of `diloco_optimizer`, or of a chain that ends with it.

    Returns:
        The pytree of parameters.

    Raises:
        ValueError: the state contains no `DilocoState`.
    """
    found = _find(DilocoState, state)
    if not found:
        raise ValueError(
            f"state of type {type(state).__name__}: must be a state of diloco_optimizer, or of a chain with it"
        )
    return found[0].params


def _promote(values: Any, params: Any, updates: Any) -> Any:
    """Return values in the dtype of the sum of parameters and updates."""
    return jax.tree.map(lambda a, p, u: jnp.asarray(a, jnp.result_type(p, u)), values, params, updates)


def _check_workers_axis(params: Any, shapes: list[tuple[int, ...]], where: str) -> None:
    """Raise ValueError unless the leaves have these shapes, with the axis of the workers in front."""
    for leaf, shape in zip(jax.tree.leaves(params), shapes, strict=True):
        if np.shape(leaf) != shape:
            raise ValueError(
                f"diloco_optimizer with parameters of shape {list(np.shape(leaf))} {where}: must be {list(shape)}, with the "
                "axis of the workers in front; use local_training.replicate(params, num_workers), and P(axis) as its spec"
            )


def _check_update(name: str, optimizer: Any, state: Any, params: Any) -> None:
    """Raise ValueError if the update of an optimizer needs more than gradients, state and parameters."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            jax.eval_shape(optimizer.update, params, state, params)
    except TypeError as error:
        raise ValueError(
            f"{name} optimizer whose update fails with '{error}': must need no arguments other than gradients, state and "
            "parameters, as optax.adamw(1e-3)"
        ) from error
