"""How much the decoder attends to its latent: figure 8 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import masking
from diladiff_jax.evaluation.figures import Figure, figure, linear, series
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.jax_settings import random_key
from diladiff_jax.objectives.autoregressive import content_mask

Array = jax.Array


def attention_share(
    decoder: Any,
    params: Any,
    rows: np.ndarray,
    latents: np.ndarray,
    tokenizer: Tokenizer,
    counts: Sequence[int],
    *,
    seed: int = 0,
) -> Figure:
    """Figure 8: cross-attention's update relative to self-attention's, by layer and masking ratio.

    The measure is the norm of the cross-attention's update over the norm of the update of the
    self-attention after it. Norms are over the content positions and the width of one row
    `[L, D]`; the updates are the decoder's "intermediates".

    Args:
      decoder: the network.
      params: its parameters.
      rows: held-out rows `[n, L]`.
      latents: their latents `[n, N, D_lat]`.
      tokenizer: gives the mask's and the end-of-text's ids.
      counts: numbers of masked positions.
      seed: of the masks.
    """
    content = content_mask(jnp.asarray(rows), tokenizer.eot_id)
    layers = sorted(set(decoder.cross_layers))

    def norm(update: Array) -> Array:
        squares = jnp.square(update.astype(jnp.float32)) * content[..., None]
        return jnp.sqrt(jnp.sum(squares, axis=(1, 2)))

    @jax.jit
    def ratios(params: Any, key: Array, count: Array) -> dict[int, Array]:
        masked = jnp.full(len(rows), count)
        x_t = masking.mask_exactly(key, jnp.asarray(rows), masked, tokenizer.mask_id)
        kept = decoder.apply(
            {"params": params}, x_t, jnp.asarray(latents), mutable=["intermediates"]
        )[1]["intermediates"]
        cross = {i: norm(kept[f"cross_{i}"]["update"][0]) for i in layers}
        own = {i: norm(kept["backbone"][f"block_{i}"]["attention_update"][0]) for i in layers}
        return {i: cross[i] / jnp.maximum(own[i], 1e-12) for i in layers}

    key = random_key(seed)
    found = [jax.device_get(ratios(params, jax.random.fold_in(key, c), c)) for c in counts]
    x = [c / rows.shape[1] for c in counts]
    return figure(
        "attention_share",
        "figure 8",
        "Cross-attention relative to self-attention",
        linear("masking ratio"),
        linear("norm of the cross-attention's update / the self-attention's"),
        [
            series(f"layer {i}", x, [intervals.mean(at[i].astype(np.float64)) for at in found])
            for i in layers
        ],
        f"{len(rows)} held-out rows; above 1, the latent contributes more than the text around",
    )
