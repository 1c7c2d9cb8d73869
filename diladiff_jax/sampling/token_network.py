"""What every unmasking order works with: a network, run-time settings, and chunks of positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.sampling.categorical import (
    sample_categorical,
    text_logits,
    token_distribution,
)

LOGIT_ROWS = 256
"""Positions of the whole batch that are projected to the vocabulary at once: it bounds the memory
and does not change the samples."""


class TokenControls(NamedTuple):
    """Run-time settings of a decoding; changing them does not recompile. All scalars."""

    steps: Int[Array, ""] | int
    temperature: Float[Array, ""] | float = 1.0
    top_p: Float[Array, ""] | float = 0.9
    threshold: Float[Array, ""] | float = 0.9  # order "threshold" only


@dataclasses.dataclass(frozen=True)
class TokenNetwork:
    """A denoiser as decoding uses it.

    Attributes:
      context: (tokens `[B, L]`, step) -> what `logits` reads; called once per step.
      logits: (context, positions `[B, K]`) -> logits `[B, K, V]`.
      refresh: (context, tokens `[B, K]`, their positions `[B, K]`) -> the context with only these
        positions recomputed; positions of L and above are ignored.
      refresh_every: with `refresh`, `context` is called only in the first step of each
        `refresh_every`; in between only the tokens of the step before are refreshed.
    """

    context: Callable[[Array, Array], Any]
    logits: Callable[[Any, Array], Array]
    refresh: Callable[[Any, Array, Array], Any] | None = None
    refresh_every: int = 1


Decoded = tuple[Int[Array, "B L"], Int[Array, "B L"]]
"""tokens, and the step in which each position was unmasked (-1 where it was given)."""


def chunk_size(tokens: Array, rows: int) -> int:
    """Positions of each row in a chunk, so that a chunk has about `rows` in the whole batch."""
    batch, length = tokens.shape
    return max(1, min(length, rows // batch))


def chunk(order: Array, first: Array, last: Array, i: Array, size: int) -> tuple[Array, Array]:
    """The i-th chunk of the positions `order[first:last]` of each row, `[B, size]`.

    The second result is the same with L in the slots past a row's last, where nothing is written.
    """
    length = order.shape[1]
    slot = first + i * size + jnp.arange(size)[None, :]
    positions = jnp.take_along_axis(order, jnp.minimum(slot, length - 1), axis=1)
    return positions, jnp.where(slot < last, positions, length)


def scatter(x: Array, positions: Array, values: Array) -> Array:
    """Writes `values [B, K]` into `x [B, L]` at `positions`, dropping those out of range."""
    return jax.vmap(lambda row, at, value: row.at[at].set(value, mode="drop"))(x, positions, values)


def sample_at(
    network: TokenNetwork,
    context: Any,
    positions: Array,
    sampleable: Array,
    controls: TokenControls,
    uniform: Array,
) -> tuple[Array, Array]:
    """Samples tokens at `positions [B, K]`, each from its own entry of `uniform [B, L]`.

    Returns:
      tokens `[B, K]`, and the network's logits of text `[B, K, V]`.
    """
    logits = text_logits(network.logits(context, positions), sampleable)
    p = token_distribution(logits, controls.temperature, controls.top_p)
    return sample_categorical(p, jnp.take_along_axis(uniform, positions, axis=1)), logits
