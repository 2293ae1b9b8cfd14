"""Rewrite gradients so that XLA uses its fast CPU kernels inside loops.

Every round runs inside a loop, and two kinds of operations are slow there:

- Convolutions. XLA has a threaded kernel for NHWC images with HWIO kernels. It converts other layouts, such as those of
  a kernel's gradient, to that form only at the top level of a program. Inside a loop or a branch they fall back to a
  naive implementation, which is ten times slower (jax issue 12868). This module therefore inserts the transpositions
  before XLA sees the program.
- Matrix products. The gradient of a kernel stored as [in, out], as in flax, is a product that is then transposed. XLA
  folds the two into one product with an unfavorable layout, which is three times slower. This module keeps the
  transposition separate.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core


def contains_primitive(jaxpr: core.Jaxpr, *primitives: core.Primitive) -> bool:
    """Return whether a jaxpr, or any jaxpr that it calls, contains one of the primitives."""
    return any(
        eqn.primitive in primitives
        or any(contains_primitive(inner, *primitives) for value in eqn.params.values() for inner in _sub_jaxprs(value))
        for eqn in jaxpr.eqns
    )


def with_canonical_layouts(function: Callable[..., Any], *args: Any) -> Any:
    """Call `function(*args)` with convolutions as NHWC, HWIO -> NHWC and with products not fused with transpositions."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shape), _eval_canonical_jaxpr(closed, jax.tree.leaves(args)))


def _sub_jaxprs(value: Any) -> Iterator[core.Jaxpr]:
    """Yield the jaxprs in a parameter of an equation."""
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _sub_jaxprs(inner)


def _eval_canonical_jaxpr(closed: core.ClosedJaxpr, args: Any) -> list[Any]:
    """Evaluate a jaxpr equation by equation, with convolutions and products in canonical form."""
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
            functions, params = params if isinstance(params, tuple) else ((), params)  # before JAX 0.9.2: a pair
            outputs: Any = eqn.primitive.bind(*functions, *inputs, **params)
        if eqn.primitive is lax.dot_general_p and eqn.outvars[0] in transposed:
            outputs = lax.optimization_barrier(outputs)
        several = eqn.primitive.multiple_results
        values |= zip(eqn.outvars, outputs if several or isinstance(outputs, list) else [outputs], strict=True)
    return [read(variable) for variable in closed.jaxpr.outvars]


def _canonicalize_param(value: Any) -> Any:
    """Return a parameter of an equation with the jaxprs in it rewritten to canonical form."""
    changes = lax.conv_general_dilated_p, lax.dot_general_p
    if isinstance(value, core.ClosedJaxpr) and contains_primitive(value.jaxpr, *changes):
        return jax.make_jaxpr(lambda *args: _eval_canonical_jaxpr(value, args))(*[v.aval for v in value.jaxpr.invars])
    if isinstance(value, core.Jaxpr) and contains_primitive(value, *changes):
        return _canonicalize_param(core.ClosedJaxpr(value, ())).jaxpr
    if type(value) is tuple:  # the branches of a cond, but not the named tuples of a gather
        return tuple(_canonicalize_param(inner) for inner in value)
    return value


def _bind_nhwc_conv(lhs: Any, rhs: Any, *, dimension_numbers: Any, **params: Any) -> Any:
    """Apply a convolution in the form NHWC, HWIO -> NHWC, with transpositions of its inputs and its result."""
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
