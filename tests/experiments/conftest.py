"""The shapes of arrays are checked in the tests of the library; here they would cost a tenth of the time."""

import jaxtyping
import pytest


@pytest.fixture(scope="module", autouse=True)
def unchecked_shapes():
    """Switch the type checker of `tests/typechecking.py` off."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
