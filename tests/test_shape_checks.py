"""The shape annotations of the pure rooms are valid, and are checked while the tests run."""

import importlib
import inspect
import pkgutil
import typing

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import diladiff_jax
from diladiff_jax.diffusion import gaussian
from diladiff_jax.nn.layers import Heads
from diladiff_jax.objectives.statistics import Moments

ROOMS = ("nn", "diffusion", "objectives", "sampling")
MODULES = [
    module.name
    for room in ROOMS
    for module in pkgutil.iter_modules(
        getattr(diladiff_jax, room).__path__, f"diladiff_jax.{room}."
    )
]


def functions(module):
    """Functions and methods that a module defines."""
    for _, value in inspect.getmembers(module):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value):
            yield from (f for f in vars(value).values() if inspect.isfunction(f))


@pytest.mark.parametrize("name", MODULES)
def test_every_annotation_can_be_evaluated(name):
    """jaxtyping silently ignores annotations that do not evaluate, such as misspelled shapes."""
    module = importlib.import_module(name)
    for function in functions(module):
        if function.__module__ == name:  # not the methods that Flax and dataclasses generate
            typing.get_type_hints(inspect.unwrap(function), vars(module))


def test_a_wrong_shape_is_an_error():
    """In a plain function, and in a method of a Flax module."""
    z = jnp.zeros((2, 3, 4))
    with pytest.raises(TypeCheckError, match="noise"):
        gaussian.diffuse(gaussian.TangentSchedule(), z, z[:, :2], jnp.zeros(2))
    with pytest.raises(TypeCheckError, match="x"):
        Heads(8, 2).apply({"params": {}}, z[0])


def test_each_call_has_shapes_of_its_own():
    """The same letter may mean another size in the next call."""
    for batch in (2, 3):
        z = jnp.zeros((batch, 3, 4))
        assert gaussian.diffuse(gaussian.TangentSchedule(), z, z, jnp.zeros(batch)).shape == z.shape


def test_pytree_nodes_may_hold_what_is_not_an_array():
    """JAX builds them of shardings, of abstract arrays and of None."""
    moments = Moments.zeros((2,))
    assert jax.tree.map(lambda _: None, moments) == Moments(None, None, None)
    assert jax.eval_shape(lambda: moments).mean.shape == (2,)
