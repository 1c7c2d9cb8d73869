"""Ancestral decoding without any of the library's savings, for comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion.masking import DiscreteProcess, restrict
from diladiff_jax.nn.networks import Networks
from diladiff_jax.sampling.categorical import (
    sample_categorical,
    split_per_sample,
    token_distribution,
    uniform_per_sample,
)

Array = jax.Array


def naive_decode(
    networks: Networks,
    params: Any,
    keys: Array,
    prompt: Array,
    latents: Array,
    controls: Any,
    *,
    process: DiscreteProcess,
    sort: bool,
) -> Array:
    """Decodes as the equations are written: all logits in every step, then a draw everywhere.

    The random draws are those of the order "random" of `diladiff_jax.sampling.orders`, so that the
    tokens of both can be compared. The temperature is 1.

    Args:
      networks: provides the decoder.
      params: the decoder's parameters under "decoder".
      keys: `[B]`, one for each sample.
      prompt: int32 `[B, L]`, masked at the positions to fill.
      latents: f32 `[B, N, D_lat]`.
      controls: provides `decode_steps` and `top_p`.
      process: the diffusion process of the tokens.
      sort: whether the nucleus is found by a full sort of the vocabulary instead of the
        library's bisection.

    Returns:
      Tokens `[B, L]`.
    """
    time_keys, token_keys = split_per_sample(keys)
    masked, sampleable = process.is_open(prompt), jnp.asarray(process.sampleable)
    steps, shape = controls.decode_steps, prompt.shape[1:]
    time = uniform_per_sample(time_keys, shape)
    unmasked_at = jnp.minimum(jnp.floor(time * steps).astype(jnp.int32), steps - 1)
    uniform = uniform_per_sample(token_keys, shape)

    def step(k: Any, x: Array) -> Array:
        logits: Any = networks.decoder.apply({"params": params["decoder"]}, x, latents)
        logits = restrict(logits, sampleable)
        if sort:
            p = _sorted_nucleus(logits, controls.top_p)
        else:
            p = token_distribution(logits, 1.0, controls.top_p)
        return jnp.where(masked & (unmasked_at == k), sample_categorical(p, uniform), x)

    return jax.lax.fori_loop(0, steps, step, prompt)


def _sorted_nucleus(logits: Array, top_p: Array) -> Array:
    p = jax.nn.softmax(logits, axis=-1)
    order = jnp.argsort(-p, axis=-1)
    ordered = jnp.take_along_axis(p, order, axis=-1)
    kept = jnp.where(jnp.cumsum(ordered, axis=-1) - ordered < top_p, ordered, 0.0)
    return jnp.put_along_axis(jnp.zeros_like(p), order, kept, axis=-1, inplace=False)
