"""Sampling of tokens from logits: temperature, nucleus, and one random key per sample."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, UInt32

from diladiff_jax.diffusion.masking import restrict
from diladiff_jax.jax_settings import as_random_key

MAX_TEMPERATURE = 1e6
"""Above it all tokens are equally likely up to rounding. The reciprocal of much larger numbers is 0
on some devices, which turns -inf into NaN."""

Keys = Key[Array, " B"] | UInt32[Array, "B words"]
"""One JAX key per sample, new-style or old-style."""


def nucleus_threshold(
    probabilities: Float[Array, "*batch V"], top_p: Float[Array, ""] | float
) -> Float[Array, "*batch 1"]:
    """The probability of the last token of the nucleus: the largest p with mass {>= p} >= top_p.

    Bisection over the 31 bits of the threshold replaces sorting the vocabulary: non-negative
    float32 values are ordered as their bit patterns are, so the result is exact to the token, up
    to the rounding of the sums of probabilities: for top_p above 0.99, tokens that are worth about
    1e-7 of the mass may be in or out. Tokens as probable as the last one are all kept.
    """

    def body(i: Array, low: Array) -> Array:
        candidate = low | (jnp.int32(1) << (30 - i))
        threshold = jax.lax.bitcast_convert_type(candidate, jnp.float32)
        mass = jnp.sum(
            jnp.where(probabilities >= threshold, probabilities, 0.0), axis=-1, keepdims=True
        )
        return jnp.where(mass >= target, candidate, low)

    target = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)  # mass 0 keeps the most likely token
    low = jnp.zeros((*probabilities.shape[:-1], 1), jnp.int32)
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, body, low), jnp.float32)


def token_distribution(
    logits: Float[Array, "*batch V"],
    temperature: Float[Array, ""] | float,
    top_p: Float[Array, ""] | float,
) -> Float[Array, "*batch V"]:
    """Probabilities after temperature and nucleus, not renormalized after the cut.

    Temperature 0 keeps only the most likely token, nucleus 1 keeps everything. The most likely
    token is always kept.
    """
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    limited = jnp.clip(temperature, 1e-6, MAX_TEMPERATURE)
    tempered = jnp.where(logits == top, 0.0, (logits - top) / limited)
    greedy = jnp.where(logits == top, 0.0, -jnp.inf)
    p = jax.nn.softmax(jnp.where(temperature > 0, tempered, greedy), axis=-1)
    # At top_p = 1 there is nothing to find, and rounding must not cut a tail whose mass falls
    # short of 1.
    return jax.lax.cond(
        jnp.asarray(top_p) < 1.0,
        lambda: jnp.where(p >= nucleus_threshold(p, top_p), p, 0.0),
        lambda: p,
    )


def text_logits(
    logits: Float[Array, "*batch V"], sampleable: Bool[Array, " V"]
) -> Float[Array, "*batch V"]:
    """`masking.restrict` in float32 that also survives the output of a diverged network.

    NaN counts as -inf. A row without any finite logit of text becomes uniform over text.
    """
    logits = logits.astype(jnp.float32)
    logits = restrict(jnp.where(jnp.isnan(logits), -jnp.inf, logits), sampleable)
    nothing = jnp.max(logits, axis=-1, keepdims=True) == -jnp.inf
    return restrict(jnp.where(nothing, 0.0, logits), sampleable)


def sample_categorical(
    probabilities: Float[Array, "*batch V"], uniform: Float[Array, "*batch"]
) -> Int[Array, "*batch"]:
    """Inverts the cumulative sum of unnormalized probabilities at `uniform` in [0, 1).

    This needs one uniform per row instead of V. An index of probability zero is never sampled.
    """
    cumulative = jnp.cumsum(probabilities, axis=-1)
    level = uniform[..., None] * cumulative[..., -1:]
    # A parallel cumulative sum may rise by a rounding error where the probability is zero.
    above = (cumulative > level) & (probabilities > 0)
    return jnp.where(
        above.any(axis=-1), jnp.argmax(above, axis=-1), last_positive(probabilities)
    ).astype(jnp.int32)


def last_positive(probabilities: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Index of the last entry above zero."""
    size = probabilities.shape[-1]
    return size - 1 - jnp.argmax(jnp.flip(probabilities > 0, axis=-1), axis=-1)


def uniform_per_sample(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Uniform [0, 1) `[B, *shape]`; row i depends on `keys[i]` alone."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys)


def normal_per_sample(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal `[B, *shape]`; row i depends on `keys[i]` alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def split_per_sample(keys: Keys) -> tuple[Keys, Keys]:
    """Two independent keys `[B]` from each of `keys [B]`."""
    pairs = jax.vmap(lambda key: jax.random.split(key))(keys)
    return pairs[:, 0], pairs[:, 1]


def fold_in_per_sample(keys: Keys, data: Int[Array, ""] | int) -> Keys:
    """`jax.random.fold_in` of each of `keys [B]`."""
    return jax.vmap(lambda key: jax.random.fold_in(key, data))(keys)


def sample_keys(key: PRNGKeyArray, indices: Int[Array, " B"]) -> Keys:
    """One key per sample `[B]`, a function of `key` and the sample's index.

    Keys of other generators are converted, because theirs would depend on the batch.
    """
    key = as_random_key(key)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
