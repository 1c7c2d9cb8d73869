"""Loss and recovery against the masking ratio: figure 7 of the paper."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import masking
from diladiff_jax.evaluation.figures import Figure, figure, linear, series
from diladiff_jax.evaluation.held_out import decoder, plain_denoiser
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import Denoiser
from diladiff_jax.evaluation.models import title
from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model
from diladiff_jax.objectives.autoregressive import content_mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CountSums:
    """Sums over the masked content tokens of each row, for each masked count: arrays `[C, n]`.

    Attributes:
      nll: of -log p, in nats.
      right: of recovered tokens.
      masked: of masked tokens.
    """

    nll: np.ndarray
    right: np.ndarray
    masked: np.ndarray

    def loss(self, i: int) -> Estimate:
        """-log p per masked token at count i, in nats."""
        return intervals.ratio(self.nll[i], self.masked[i])

    def recovery(self, i: int) -> Estimate:
        """Share of the masked tokens recovered at count i."""
        return intervals.ratio(self.right[i], self.masked[i])


@dataclasses.dataclass(frozen=True)
class Masks:
    """Random masks of exact size.

    Attributes:
      counts: how many of the L positions of a row are masked, one after the other.
      draws: random subsets of each size for each row.
      seed: of the subsets.
    """

    counts: Sequence[int]
    draws: int = 1
    seed: int = 0


def by_masked_count(
    denoiser: Denoiser,
    tokens: np.ndarray,
    masks: Masks,
    tokenizer: Tokenizer,
    *,
    batch: int,
) -> CountSums:
    """Loss and recovery on rows `[n, L]` with an exact number of masked positions.

    Padding is masked too, but not counted.

    Args:
      denoiser: the network, with a condition for each row if it takes one.
      tokens: int32 `[n, L]`.
      masks: the sizes, number and seed of the masks.
      tokenizer: gives the mask's and the end-of-text's ids, and the ids that can be sampled.
      batch: rows at a time.
    """
    key = random_key(masks.seed)
    measure = _count_sums(denoiser, masks, tokenizer)

    def measure_batch(rows: np.ndarray) -> tuple[Array, Array, Array]:
        batch_key, given = jax.random.fold_in(key, int(rows[0])), denoiser.condition_of(rows)
        return measure(denoiser.params, jnp.asarray(tokens[rows]), given, batch_key)

    shape = (len(masks.counts), masks.draws, len(tokens))
    return CountSums(
        *(
            np.asarray(part, np.float64).reshape(shape).sum(axis=1)
            for part in map_batches(measure_batch, len(tokens), batch, axis=1)
        )
    )


def _count_sums(
    denoiser: Denoiser, masks: Masks, tokenizer: Tokenizer
) -> Callable[[Any, Array, Array | None, Array], tuple[Array, Array, Array]]:
    """A jitted `(params, rows, condition, key) -> ` the three sums, `[C * draws, B]` each."""
    mask_id, allowed = tokenizer.mask_id, jnp.asarray(tokenizer.sampleable)
    grid = jnp.repeat(jnp.asarray(masks.counts, jnp.int32), masks.draws)

    def measure(
        params: Any, rows: Array, given: Array | None, key: Array
    ) -> tuple[Array, Array, Array]:
        content = content_mask(rows, tokenizer.eot_id)

        def draw(task: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            key, count = task
            x_t = masking.mask_exactly(key, rows, jnp.full(rows.shape[:1], count), mask_id)
            nll, right = masking.token_nll(denoiser.logits(params, x_t, given), rows, allowed)
            masked = (x_t == mask_id) & content
            nll = jnp.where(masked, nll, 0.0)
            return nll.sum(axis=-1), (right * masked).sum(axis=-1), masked.sum(axis=-1)

        return jax.lax.map(draw, (jax.random.split(key, len(grid)), grid))

    return jax.jit(measure)


def decoder_by_count(
    model: Model, rows: np.ndarray, latents: np.ndarray, masks: Masks
) -> CountSums:
    """`by_masked_count` of the decoder, given latents `[n, N, D_lat]`."""
    batch = model.config.sampling.batch
    return by_masked_count(decoder(model, latents), rows, masks, model.tokenizer, batch=batch)


def count_grid(length: int, bins: int = 8) -> list[int]:
    """Masked counts spread evenly over 1 to `length`, with both ends."""
    return sorted({max(1, round(length * i / bins)) for i in range(1, bins + 1)} | {1})


def recovery_by_ratio(
    model: Model, rows: np.ndarray, latents: np.ndarray, *, draws: int = 4, seed: int = 0
) -> list[Figure]:
    """Figure 7: loss and recovery against the masking ratio.

    Compares the decoder given each row's own latent with the decoder given noise, and with MDLM.

    Args:
      model: the workdir's models.
      rows: held-out rows `[n, L]`.
      latents: their latents `[n, N, D_lat]`.
      draws: random masks of each size.
      seed: of masks and noise.
    """
    masks = Masks(count_grid(model.length), draws, seed)
    noise_key = jax.random.fold_in(random_key(seed), 1)
    noise = np.asarray(jax.random.normal(noise_key, latents.shape, np.float32))
    found = {
        "decoder, own latent": decoder_by_count(model, rows, latents, masks),
        "decoder, noise as the latent": decoder_by_count(model, rows, noise, masks),
    }
    if model.has("mdlm"):
        batch = model.config.sampling.batch
        found[title("mdlm")] = by_masked_count(
            plain_denoiser(model, "mdlm"), rows, masks, model.tokenizer, batch=batch
        )
    x, points = [c / model.length for c in masks.counts], range(len(masks.counts))
    note = f"{len(rows)} held-out rows, {draws} random masks of each exact size"
    return [
        figure(
            "loss_by_ratio",
            "figure 7",
            "Loss against masking ratio",
            linear("masking ratio"),
            linear("-log p per masked token (nats)"),
            [series(name, x, [sums.loss(i) for i in points]) for name, sums in found.items()],
            note,
        ),
        figure(
            "recovery_by_ratio",
            "figure 7",
            "Recovery against masking ratio",
            linear("masking ratio"),
            linear("share of masked tokens recovered"),
            [series(name, x, [sums.recovery(i) for i in points]) for name, sums in found.items()],
            note,
        ),
    ]
