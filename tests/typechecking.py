"""The type checker that jaxtyping puts around every function of the library in tests."""

from beartype import BeartypeConf, FrozenDict, beartype

# shapes and dtypes of arrays; the library takes numbers of every kind and checks them itself, in words
_beartype = beartype(conf=BeartypeConf(hint_overrides=FrozenDict({bool: object, int: object, float: object})))


def typecheck(function):
    """Constructors stay unchecked: while JAX rebuilds a pytree its fields also hold shapes, axes and placeholders."""
    return function if function.__name__ == "__init__" else _beartype(function)
