"""Unmasking orders that start with the tokens that the model is most confident of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.sampling.categorical import (
    Keys,
    fold_in_per_sample,
    uniform_per_sample,
)
from diladiff_jax.sampling.token_network import (
    LOGIT_ROWS,
    Decoded,
    TokenControls,
    TokenNetwork,
    chunk,
    chunk_size,
    sample_at,
    scatter,
)


def by_confidence(
    network: TokenNetwork,
    process: DiscreteProcess,
    keys: Keys,
    tokens: Int[Array, "B L"],
    controls: TokenControls,
    *,
    use_threshold: bool = False,
    rows: int = LOGIT_ROWS,
) -> Decoded:
    """Unmasks first the tokens that the model is most confident of.

    Every step samples a token for each masked position. Its confidence is the probability that the
    model itself gives it, before temperature and nucleus (at temperature 0 every sample would be
    certain). Each step keeps the same number of the most confident tokens
    (plus or minus one). With `use_threshold` it keeps every token of at least
    `controls.threshold`, and the most confident one in any case, and takes as many steps as that
    needs (`controls.steps` is ignored). The other tokens are sampled again in the next step. The
    result is not a sample from the model's distribution: it costs diversity.

    Arguments and results are otherwise those of `ancestral`.
    """
    size, length = chunk_size(tokens, rows), tokens.shape[1]
    free = process.is_open(tokens)
    total = jnp.sum(free, axis=1, keepdims=True)
    sampleable = jnp.asarray(process.sampleable)

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        k, x, when = carry
        context, masked = network.context(x, k), free & (when < 0)
        left = masked.sum(axis=1, keepdims=True)
        order = jnp.argsort(~masked, axis=1)  # the masked positions first, in their order
        uniform = uniform_per_sample(fold_in_per_sample(keys, k), (length,))

        def sample_chunk(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            positions, target = chunk(order, jnp.zeros_like(left), left, i, size)
            drawn, logits = sample_at(network, context, positions, sampleable, controls, uniform)
            confidence = jnp.take_along_axis(
                jax.nn.softmax(logits, axis=-1), drawn[..., None], axis=-1
            )[..., 0]
            # NaN (a diverged network) counts as no confidence: every step must keep something.
            return (
                scatter(found[0], target, drawn.astype(x.dtype)),
                scatter(found[1], target, jnp.nan_to_num(confidence)),
            )

        nothing = (x, jnp.full(x.shape, -1.0))
        drawn, confidence = jax.lax.fori_loop(0, -(-jnp.max(left) // size), sample_chunk, nothing)
        rank = jnp.argsort(jnp.argsort(-confidence, axis=1), axis=1)
        if use_threshold:
            kept = (rank == 0) | (confidence >= controls.threshold)
        else:
            kept = rank < total * (k + 1) // controls.steps - (total - left)
        kept &= masked
        return k + 1, jnp.where(kept, drawn, x), jnp.where(kept, k, when)

    start = (jnp.int32(0), tokens, jnp.full(tokens.shape, -1, jnp.int32))
    return jax.lax.while_loop(lambda carry: jnp.any(free & (carry[2] < 0)), step, start)[1:]


def by_threshold(*args: Any, **options: Any) -> Decoded:
    """`by_confidence` with a threshold."""
    return by_confidence(*args, use_threshold=True, **options)
