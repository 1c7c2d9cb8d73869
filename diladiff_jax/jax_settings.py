"""JAX's global settings that numbers depend on, pinned, and the random keys of this library.

A sample is a function of its key and index, and a training run one of its seed. JAX lets a user
change the generator behind a key, its splitting and the types that random numbers default to, by
environment variables, `jax.config` or context managers. Here these are constants.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

PRNG = "threefry2x32"
"""The generator of every key. With others, such as rbg, a sample would depend on its batch."""

_WORDS = 2  # uint32 words in the data of a key of `PRNG`
_PINNED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": PRNG,
    "jax_threefry_partitionable": True,
    # Neither changes numbers. They are checkers, which reject code that is right by other means.
    "jax_numpy_dtype_promotion": "standard",
    "jax_debug_key_reuse": False,
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Runs the block under the settings that this library needs, in the caller's thread.

    It also hides a mesh that the caller has set (`jax.set_mesh`): ours is passed explicitly.
    """
    with contextlib.ExitStack() as stack:
        for name, value in _PINNED.items():
            stack.enter_context(getattr(jax, name.removeprefix("jax_"))(value))
        if not jax.sharding.get_abstract_mesh().empty:
            stack.enter_context(jax.set_mesh(None))
        yield


def under_pinned_settings(function: _Function) -> _Function:
    """`function`, whose calls run in `pinned`. Do not use it on generators."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with pinned():
            return function(*args, **kwargs)

    return cast(_Function, call)


def pin_process() -> None:
    """Pins the settings for every thread of this process; for commands, not for the library."""
    for name, value in _PINNED.items():
        jax.config.update(name, value)


def random_key(seed: int) -> jax.Array:
    """The key of a seed of 64 bits, whatever JAX's defaults are.

    For seeds of 32 bits it is `jax.random.key(seed, impl=PRNG)`, which ignores the bits above.
    """
    words = np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
    return jax.random.wrap_key_data(jnp.asarray(words), impl=PRNG)


def as_random_key(key: jax.Array) -> jax.Array:
    """A key of `PRNG` from a key of any generator, or from the words of an old-style key.

    Keys of `PRNG`, new-style or old-style, keep their numbers. Another generator's key becomes a
    key of `PRNG` that is a function of its words.
    """
    words = key
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) == PRNG:
            return key
        words = jax.random.key_data(key)
    ours = jax.random.wrap_key_data(words[:_WORDS], impl=PRNG)
    for i in range(_WORDS, len(words)):
        ours = jax.random.fold_in(ours, words[i])
    return ours
