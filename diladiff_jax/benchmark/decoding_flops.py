"""The matrix products of decoding: FLOPs of each case, and programs that run only products."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diladiff_jax.nn.attention import BLOCK_SCORES, MANY_SCORES

Array = jax.Array


def expected_busy_steps(positions: int, steps: int, group: int = 1) -> float:
    """Expected number of steps in which at least one position is unmasked.

    Each position is unmasked in one step, chosen uniformly; a step with nothing to unmask costs
    nothing.

    Args:
      positions: number of positions, over all samples of a batch.
      steps: number of decoding steps.
      group: counts groups of this many consecutive steps instead of steps.
    """
    groups = -(-steps // group)
    return groups * (1 - (1 - 1 / groups) ** positions)


def decoding_flops(
    case: str, config: Any, vocab: int, batch: int, steps: int, refresh_every: int
) -> float:
    """Expected matrix-product FLOPs of `steps` decoding steps, by the network's formulas.

    A multiplication and an addition count as two.

    Args:
      case: a case of the sampling benchmark, such as "naive" or "ours".
      config: the experiment's config.
      vocab: size of the vocabulary.
      batch: number of samples.
      steps: number of decoding steps.
      refresh_every: how many steps reuse the same keys and values, in the refreshing case.
    """
    d, layers, length = config.backbone.width, config.backbone.num_layers, config.data.length
    latents, cross_layers = config.encoder.num_latents, len(set(config.decoder.cross_layers))
    rows = batch * length
    mlp = 2 * config.backbone.mlp_ratio * d * d
    block = 2 * rows * (4 * d * d + mlp) + 4 * rows * length * d
    cross = cross_layers * (2 * rows * 4 * d * d + 4 * rows * latents * d)
    # Keys and values of the latent.
    latent_memory = cross_layers * 4 * batch * latents * config.encoder.latent_dim * d
    if case in ("naive", "bisection"):
        return steps * (layers * block + cross + latent_memory + 2 * rows * d * vocab)
    refreshes = expected_busy_steps(rows, steps, refresh_every)
    busy = expected_busy_steps(rows, steps)
    needed = rows / busy  # positions that a step needs logits for
    # One layer at the needed positions, given the keys and values of all.
    layer_at_needed = 2 * needed * (2 * d * d + mlp) + 4 * needed * length * d
    # All layers but the last, and the last one's keys and values.
    all_positions = (layers - 1) * block + cross + 2 * rows * 2 * d * d
    projection = 2 * needed * d * vocab
    if case in ("ours", "approx_skip"):
        skipping_steps = busy / 2 if case == "approx_skip" else 0
        saved = skipping_steps * len(skipped_layers(layers)) * block
        return busy * (all_positions + layer_at_needed + projection) + latent_memory - saved
    cross_at_needed = cross * needed / rows
    reading = layers * layer_at_needed + cross_at_needed
    # Keys and values of the positions that have just changed; the last layer needs no more.
    writing = (layers - 1) * layer_at_needed + cross_at_needed + layers * 2 * needed * 2 * d * d
    return (
        refreshes * all_positions
        + (busy - refreshes) * writing
        + busy * (reading + projection)
        + latent_memory
    )


def skipped_layers(layers: int) -> tuple[int, ...]:
    """Indices of every second layer between the first and the last."""
    return tuple(range(1, layers - 1, 2))


def linear_maps(params: Mapping[str, Any], h: Array) -> Array:
    """Runs only the products of a backbone's linear maps, and the sums between them.

    Args:
      params: the backbone's parameters.
      h: f32 `[B L, D]`, which goes through queries, keys, values, output and MLP of every block.
    """
    for name in sorted(name for name in params if name.startswith("block_")):
        attention, mlp = params[name]["attention"], params[name]["mlp"]
        inputs = (attention[part]["linear"]["kernel"] for part in ("query", "key", "value"))
        h = sum(h @ kernel for kernel in inputs) @ attention["out"]["kernel"]
        h = (h @ mlp["up"]["kernel"]) @ mlp["down"]["kernel"]
    return h


def attention_products(q: Array, k: Array, v: Array) -> Array:
    """Runs only the two products of one layer's attention, without the softmax between them.

    Long texts are processed in blocks, as the library does on CPUs. The time of this program times
    the number of layers, plus that of `linear_maps`, is the time of the backbone's products at all
    positions. A step of the library may take less, because its last layer computes only keys and
    values at all positions. It may take more, because it also reads the latent, projects to the
    vocabulary and does everything that is not a matrix product.

    Args:
      q, k, v: f32 `[B, L, H, K]`.
    """
    batch, length, heads, width = q.shape
    if batch * heads * length * length < MANY_SCORES:
        return jnp.einsum("bhlm,bmhk->blhk", jnp.einsum("blhk,bmhk->bhlm", q, k), v)
    size = max(1, min(length, BLOCK_SCORES // (batch * length)))
    while length % size:
        size -= 1

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        q, k, v = qkv
        return jax.lax.map(
            lambda q: jnp.einsum("blm,bmk->blk", jnp.einsum("blk,bmk->blm", q, k), v),
            jnp.moveaxis(q.reshape(batch, -1, size, width), 1, 0),
        )

    return jax.lax.map(head, tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
