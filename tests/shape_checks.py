"""Checks the shape annotations of the library while the tests run."""

from __future__ import annotations

from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def mentions_shape(hint: Any) -> bool:
    """Whether a type hint is or contains a shape such as `Float[Array, "B L"]`."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(mentions_shape(part) for part in get_args(hint))


def check_shapes(function):
    """Type-checks the parameters and result of a function that have shape annotations.

    Other annotations are pyright's business. Leaving them out keeps tracing fast, and lets tests
    pass stand-ins for networks.
    """
    hints = {
        name: hint if mentions_shape(hint) else Any
        for name, hint in function.__annotations__.items()
    }
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function)
