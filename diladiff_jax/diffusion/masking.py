"""Masked diffusion over tokens: forward kernel, reverse step, bound weights (METHOD section 1; MDLM, arXiv 2406.07524).

alpha_t = 1 - t: at masking ratio t each token is the mask with probability t, independently.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Array = jax.Array


def stratified_times(key: Array, batch: int, part: Array | int = 0, parts: int = 1) -> Array:
    """Masking ratios `t_i = 1 - ((u + i/B) mod 1)`, one `u` for the whole global batch: float32 `[B]` in (0, 1].

    With `parts` > 1, those of the `batch` rows `part, part + parts, ...` of a global batch of `parts * batch`.
    """
    u = jax.random.uniform(key)
    row = jnp.arange(batch, dtype=jnp.float32) * parts + part
    return 1.0 - jnp.mod(u + row / (batch * parts), 1.0)


def mask_tokens(key: Array, tokens: Array, t: Array, mask_id: int) -> Array:
    """Draws x_t: each token of `[B, L]` becomes `mask_id` with probability `t [B]`."""
    masked = jax.random.uniform(key, tokens.shape) < t[:, None]
    return jnp.where(masked, mask_id, tokens)


def mask_exactly(key: Array, tokens: Array, count: Array, mask_id: int) -> Array:
    """Masks exactly `count [B]` tokens of every row, all subsets of that size equally likely."""
    rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, tokens.shape), axis=-1), axis=-1)
    return jnp.where(rank < count[:, None], mask_id, tokens)


def reverse_step_probability(t: Array, s: Array) -> Array:
    """Probability that a token masked at t is unmasked on the way to s < t: `1 - s/t`."""
    return 1.0 - s / t


def restrict(logits: Array, sampleable: Array) -> Array:
    """Gives probability zero to every id that is never text: the mask, padding, and the vocabulary's filling.

    logits `[..., V]`, sampleable bool `[V]`. With copying of unmasked tokens this is the SUBS parameterization.
    """
    return jnp.where(sampleable.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, -jnp.inf)


def token_nll(logits: Array, tokens: Array, sampleable: Array) -> tuple[Array, Array]:
    """`-log p(token)` in nats, and whether the token is the most likely one (1/n among n equally likely ones): `[..., V]`, `[...]` -> `[...]`, `[...]`."""
    logits = restrict(logits.astype(jnp.float32), sampleable)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    # A maximum and a count, for an argmax over the vocabulary is ten times slower on CPUs.
    top = jnp.max(logits, axis=-1, keepdims=True)
    right = jnp.where(picked >= top[..., 0], 1.0 / jnp.sum(logits >= top, axis=-1), 0.0)
    return jax.nn.logsumexp(logits, axis=-1) - picked, right


def token_nll_by_position(
    project: Callable[[Array], Array],
    hidden: Array,
    tokens: Array,
    sampleable: Array,
    *,
    positions: int,
) -> tuple[Array, Array]:
    """`token_nll` of hidden states `[B, L, D]`, for at most `positions` places of each row at a time: `[B, L]`, `[B, L]`.

    `project` maps `[B, K, D]` to logits `[B, K, V]`. All logits at once, `[B, L, V]`, would be most of a step's memory; a
    gradient projects each part anew instead of keeping it, and is the same.
    """
    length = tokens.shape[1]
    if length <= positions:
        return token_nll(project(hidden), tokens, sampleable)
    count = -(-length // positions)
    size = -(-length // count)

    def parts(x: Array) -> Array:  # [B, L, ...] -> [count, B, size, ...], filled up with zeros
        x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)

    one = jax.checkpoint(
        lambda part: token_nll(project(part[0]), part[1], sampleable), prevent_cse=False
    )
    found = jax.lax.map(one, (parts(hidden), parts(tokens)))
    nll, right = (
        jnp.moveaxis(x, 0, 1).reshape(x.shape[1], count * size)[:, :length] for x in found
    )
    return nll, right


def bound_weight(t: Array) -> Array:
    """Weight 1/t of the masked tokens' loss in the bound `-log p(x) <= E_t (1/t) sum_masked -log p`."""
    return 1.0 / t
