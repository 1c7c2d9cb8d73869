"""Masked diffusion over tokens: the process, its bound, and the loss of a token.

MDLM, arXiv 2406.07524; see "Masked diffusion" in docs/method.md. alpha_t = 1 - t: at masking ratio
t each token is the mask with probability t, independently of the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


class DiscreteProcess(Protocol):
    """A diffusion process over tokens; time runs from 0 (text) to 1 (nothing is known).

    Losses, samplers and prompts know a process only through these methods. A prompt marks its gaps
    by ids that are open; a process without such ids (uniform noise, say) samples from scratch, its
    start x_1 being the prompt.
    """

    @property
    def sampleable(self) -> np.ndarray:
        """bool `[V]`: the ids that are text; every other id has probability zero."""
        ...

    def corrupt(
        self, key: PRNGKeyArray, tokens: Int[Array, "B L"], t: Float[Array, " B"]
    ) -> Int[Array, "B L"]:
        """Samples x_t given the text x_0."""
        ...

    def initial(self, shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
        """x_1, from which sampling starts."""
        ...

    def is_open(self, x_t: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """Where the denoiser has to predict the token: positions of the loss, gaps of a prompt."""
        ...

    def step(
        self,
        key: PRNGKeyArray,
        x_t: Int[Array, " L"],
        x_0: Int[Array, " L"],
        t: Float[Array, ""],
        s: Float[Array, ""],
    ) -> Int[Array, " L"]:
        """Samples x_s, s < t, of one row given x_t and a sample x_0 of the denoiser."""
        ...

    def bound_weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """Weight of the loss at time t in the bound on -log p(x)."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class AbsorbingProcess:
    """Absorbing masks: a token is either itself or the mask, and never changes once unmasked."""

    mask_id: int
    sampleable: np.ndarray

    def corrupt(
        self, key: PRNGKeyArray, tokens: Int[Array, "B L"], t: Float[Array, " B"]
    ) -> Int[Array, "B L"]:
        """Each token becomes the mask with probability t."""
        return mask_tokens(key, tokens, t, self.mask_id)

    def initial(self, shape: tuple[int, ...]) -> Int[np.ndarray, "..."]:
        """Masks alone, as a host array: the prompt of a sample without a prompt."""
        return np.full(shape, self.mask_id, np.int32)

    def is_open(self, x_t: Int[Array, "B L"]) -> Bool[Array, "B L"]:
        """The masked positions."""
        return x_t == self.mask_id

    def step(
        self,
        key: PRNGKeyArray,
        x_t: Int[Array, " L"],
        x_0: Int[Array, " L"],
        t: Float[Array, ""],
        s: Float[Array, ""],
    ) -> Int[Array, " L"]:
        """Unmasks each masked token with probability 1 - s/t.

        The coin comes first and the category second: folding both into one float32 Gumbel draw
        undersamples rare tokens.
        """
        unmasked = jax.random.uniform(key, x_t.shape, jnp.float32) < reverse_step_probability(t, s)
        return jnp.where((x_t == self.mask_id) & unmasked, x_0, x_t)

    def bound_weight(self, t: Float[Array, "..."]) -> Float[Array, "..."]:
        """1/t."""
        return bound_weight(t)


def stratified_times(
    key: PRNGKeyArray, batch: int, part: Int[Array, ""] | int = 0, parts: int = 1
) -> Float[Array, " B"]:
    """Masking ratios `t_i = 1 - ((u + i/B) mod 1)` in (0, 1], with one `u` for the global batch.

    With `parts` > 1, those of the `batch` rows `part, part + parts, ...` of a global batch of
    `parts * batch` rows.
    """
    u = jax.random.uniform(key, (), jnp.float32)
    row = jnp.arange(batch, dtype=jnp.float32) * parts + part
    return 1.0 - jnp.mod(u + row / (batch * parts), 1.0)


def mask_tokens(
    key: PRNGKeyArray, tokens: Int[Array, "B L"], t: Float[Array, " B"], mask_id: int
) -> Int[Array, "B L"]:
    """Samples x_t: each token of `[B, L]` becomes `mask_id` with probability `t [B]`."""
    masked = jax.random.uniform(key, tokens.shape, jnp.float32) < t[:, None]
    return jnp.where(masked, mask_id, tokens)


def mask_exactly(
    key: PRNGKeyArray, tokens: Int[Array, "B L"], count: Int[Array, " B"], mask_id: int
) -> Int[Array, "B L"]:
    """Masks exactly `count [B]` tokens of each row; all subsets of that size are equally likely."""
    place = jax.random.uniform(key, tokens.shape, jnp.float32)
    rank = jnp.argsort(jnp.argsort(place, axis=-1), axis=-1)
    return jnp.where(rank < count[:, None], mask_id, tokens)


def reverse_step_probability(t: Array | float, s: Array | float) -> Array | float:
    """Probability that a token masked at t is unmasked in the step to s < t: `1 - s/t`."""
    return 1.0 - s / t


def restrict(
    logits: Float[Array, "*batch V"], sampleable: Bool[Array, " V"]
) -> Float[Array, "*batch V"]:
    """Gives probability zero to every id that is never text: mask, padding, unused ids.

    Together with copying the unmasked tokens this is the SUBS parameterization of MDLM.
    """
    return jnp.where(sampleable.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, -jnp.inf)


def token_nll(
    logits: Float[Array, "*batch V"], tokens: Int[Array, "*batch"], sampleable: Bool[Array, " V"]
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """`-log p(token)` in nats, and whether the token is the most likely one.

    The second result is 1/n for a token among n equally likely ones.
    """
    logits = restrict(logits.astype(jnp.float32), sampleable)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # A maximum and a count: an argmax over the vocabulary is ten times slower on CPUs.
    top = jnp.max(logits, axis=-1, keepdims=True)
    right = jnp.where(picked >= top[..., 0], 1.0 / jnp.sum(logits >= top, axis=-1), 0.0)
    return jax.nn.logsumexp(logits, axis=-1) - picked, right


def token_nll_by_position(
    project: Callable[[Array], Array],
    hidden: Float[Array, "B L D"],
    tokens: Int[Array, "B L"],
    sampleable: Bool[Array, " V"],
    *,
    positions: int,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """`token_nll` of hidden states, for at most `positions` positions of each row at a time.

    All logits at once, `[B, L, V]`, would be most of a step's memory. The gradient projects each
    part again instead of storing its logits, and has the same value.

    Args:
      project: maps `[B, K, D]` to logits `[B, K, V]`.
    """
    length = tokens.shape[1]
    if length <= positions:
        return token_nll(project(hidden), tokens, sampleable)
    count = -(-length // positions)
    size = -(-length // count)

    def parts(x: Array) -> Array:  # [B, L, ...] -> [count, B, size, ...], padded with zeros
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    nll_of_part = jax.checkpoint(
        lambda part: token_nll(project(part[0]), part[1], sampleable), prevent_cse=False
    )
    found = jax.lax.map(nll_of_part, (parts(hidden), parts(tokens)))
    nll, right = (
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * size)[:, :length] for x in found
    )
    return nll, right


def bound_weight(t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Weight 1/t of the masked tokens' loss in `-log p(x) <= E_t (1/t) sum_masked -log p`."""
    return 1.0 / t
