"""The type checker that jaxtyping puts around every function of the library in tests."""

from beartype import BeartypeConf, FrozenDict, beartype

# shapes and dtypes of arrays; the library takes numbers of every kind and checks them itself, in words
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({bool: object, int: object, float: object})))


def typecheck(function):
    """Constructors stay unchecked: while JAX rebuilds a pytree its fields also hold shapes, axes and placeholders.

    So do functions inside functions, of which the library has few with shapes: each call of the outer one would generate
    the checks again.
    """
    is_unchecked = function.__name__ == "__init__" or "<locals>" in function.__qualname__
    return function if is_unchecked else _beartype(function)
