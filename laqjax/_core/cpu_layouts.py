"""Gradients in the form that XLA's fast CPU kernels take. Both faults hold inside loops, where every round is.

Convolutions: there is a threaded kernel for NHWC images with HWIO kernels. Other layouts, such as those of a kernel's
gradient, are brought into that form at the top level of a program only; inside a loop or a branch they fall back to a
naive one, ten times slower (jax issue 12868). So the transpositions are written out before XLA sees them.

Products: the gradient of a kernel stored [in, out], as flax does, is a product that is then transposed. XLA folds the two
into one product of an unlucky layout, three times slower. So the transposition is kept apart.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core


def contains_primitive(jaxpr: core.Jaxpr, *primitives: core.Primitive) -> bool:
    """Whether one of the primitives is in it, or in what it calls."""
    return any(
        eqn.primitive in primitives
        or any(contains_primitive(inner, *primitives) for value in eqn.params.values() for inner in _sub_jaxprs(value))
        for eqn in jaxpr.eqns
    )


def with_canonical_layouts(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, with its convolutions in NHWC, HWIO -> NHWC, and products apart from their transpositions."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shape), _eval_canonical_jaxpr(closed, jax.tree.leaves(args)))


def _sub_jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """The jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _sub_jaxprs(inner)


def _eval_canonical_jaxpr(closed: core.ClosedJaxpr, args: Any) -> list[Any]:
    """What the jaxpr computes, equation by equation."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, args, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    moved = [eqn.invars[0] for eqn in closed.jaxpr.eqns if eqn.primitive is lax.transpose_p]
    transposed = {variable for variable in moved if not isinstance(variable, core.Literal)}
    for eqn in closed.jaxpr.eqns:
        inputs: Any = [read(variable) for variable in eqn.invars]
        if eqn.primitive is lax.conv_general_dilated_p:
            outputs = [_bind_nhwc_conv(*inputs, **eqn.params)]
        else:
            params = {name: _canonicalize_param(value) for name, value in eqn.params.items()}
            params: Any = eqn.primitive.get_bind_params(params)
            functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before JAX 0.9.2
            outputs: Any = eqn.primitive.bind(*functions, *inputs, **params)
        if eqn.primitive is lax.dot_general_p and eqn.outvars[0] in transposed:
            outputs = lax.optimization_barrier(outputs)
        several = eqn.primitive.multiple_results
        values |= zip(eqn.outvars, outputs if several or isinstance(outputs, list) else [outputs], strict=True)
    return [read(variable) for variable in closed.jaxpr.outvars]


def _canonicalize_param(value: Any) -> Any:
    """A parameter of an equation, its jaxprs in canonical form."""
    changes = lax.conv_general_dilated_p, lax.dot_general_p
    if isinstance(value, core.ClosedJaxpr) and contains_primitive(value.jaxpr, *changes):
        return jax.make_jaxpr(lambda *args: _eval_canonical_jaxpr(value, args))(*[v.aval for v in value.jaxpr.invars])
    if isinstance(value, core.Jaxpr) and contains_primitive(value, *changes):
        return _canonicalize_param(core.ClosedJaxpr(value, ())).jaxpr
    if type(value) is tuple:  # the branches of a cond; not the named tuples of a gather
        return tuple(_canonicalize_param(inner) for inner in value)
    return value


def _bind_nhwc_conv(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    left, right, out = dimension_numbers
    spatial = tuple(range(1, lhs.ndim - 1))
    last = lhs.ndim - 1
    numbers = lax.ConvDimensionNumbers((0, last, *spatial), (last, last - 1, *range(last - 1)), (0, last, *spatial))
    result = lax.conv_general_dilated_p.bind(
        lax.transpose(lhs, (left[0], *left[2:], left[1])),
        lax.transpose(rhs, (*right[2:], right[1], right[0])),
        dimension_numbers=numbers,
        **params,
    )
    return lax.transpose(result, np.argsort((out[0], *out[2:], out[1])).tolist())
