"""Checks the shape annotations of the library while the tests run."""

from __future__ import annotations

import types
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray


def is_shape(hint: Any) -> bool:
    """Whether a type hint is a shape such as `Float[Array, "B L"]`."""
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def mentions_shape(hint: Any) -> bool:
    """Whether a type hint is or contains a shape."""
    return is_shape(hint) or any(map(mentions_shape, get_args(hint)))


def accept_numpy(hint: Any) -> Any:
    """The same hint, but satisfied by numpy arrays too, which all of JAX accepts."""
    if is_shape(hint) and hint.array_type is jax.Array:
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str]
    if is_shape(hint) or not mentions_shape(hint):
        return hint
    parts = tuple(map(accept_numpy, get_args(hint)))
    origin = get_origin(hint)
    return Union[parts] if origin in (Union, types.UnionType) else origin[parts]  # noqa: UP007 (a tuple)


def check_shapes(function):
    """Type-checks the parameters and result of a function that have shape annotations.

    Other annotations are pyright's business. Leaving them out keeps tracing fast, and lets tests
    pass stand-ins for networks. Constructors are not checked, because JAX also builds pytree nodes
    of shardings, of abstract arrays and of None.
    """
    hints = function.__annotations__
    if function.__name__ == "__init__" or not any(map(mentions_shape, hints.values())):
        return function
    function.__annotations__ = {
        name: accept_numpy(hint) if mentions_shape(hint) else Any for name, hint in hints.items()
    }
    return beartype(function)
