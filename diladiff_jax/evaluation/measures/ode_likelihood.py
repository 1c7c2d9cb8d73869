"""LaDiff's bound on -log p(x), which counts the cost of the latent.

The sampled model runs the probability-flow ODE from N(0, I) down to t_min and decodes the z' that
it arrives at; the encoder is q(z' | x) = N(alpha z, sigma^2 I) at t_min. With one z' for each row,

  -log p(x) <= E_q[masked bound of the decoder given z'] - E_q[log p_{t_min}(z')] - H(q).

This holds for every t_min > 0. A small one makes q sharp and costs the prior many nats; a large
one costs the decoder. Log-densities without H(q) give no bound, because a density has a unit and a
deterministic encoder has no entropy; the paper leaves that term out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import gaussian, masking
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import content_length
from diladiff_jax.evaluation.measures.probability_flow import (
    MAX_STEPS,
    CleanPrediction,
    Tolerance,
    log_density,
)

Array = jax.Array

TOLERANCE = Tolerance(rtol=1e-3, atol=1e-3)


def entropy_of_noise(schedule: gaussian.Schedule, t: float, size: int) -> float:
    """Entropy in nats of noise of deviation sigma(t) in `size` coordinates.

    It is size/2 log(2 pi e sigma^2).
    """
    log_sigma = math.log(float(schedule.sigma(jnp.float32(t))))
    return 0.5 * size * (math.log(2 * math.pi * math.e) + 2 * log_sigma)


@dataclasses.dataclass(frozen=True)
class LatentModel:
    """What the likelihood of LaDiff is computed from.

    Attributes:
      predict: the prior's clean prediction.
      decoder_logits: `(x_t [B, L], z [B, N, D]) -> logits [B, L, V]`.
      schedule: of the prior's diffusion.
      tokenizer: gives the mask's and the end-of-text's ids, and the ids that can be sampled.
      tolerance: of the ODE solver's steps.
    """

    predict: CleanPrediction
    decoder_logits: Callable[[Array, Array], Array]
    schedule: gaussian.Schedule
    tokenizer: Tokenizer
    tolerance: Tolerance = TOLERANCE


def likelihood_bound(
    model: LatentModel,
    latents: np.ndarray,
    tokens: np.ndarray,
    key: Array,
    *,
    t_min: float,
    draws: int,
    batch: int,
) -> dict[str, Estimate]:
    """LaDiff's bound on -log p(x), for rows `[n, L]` with standardized latents `[n, N, D]`.

    Args:
      model: the prior and the decoder.
      latents: standardized, float32 `[n, N, D]`.
      tokens: int32 `[n, L]`.
      key: a JAX key.
      t_min: noise floor, in (0, 1).
      draws: random masks per row.
      batch: rows at a time.

    Returns:
      `bound_ppl`, the perplexity of the bound per token of content; `nats`, the bound in nats per
      token; and its terms in nats per token: `decoder_nats`, `prior_nats` (-log p) and
      `entropy_nats` (subtracted).

    Raises:
      ValueError: `t_min` is outside (0, 1), or a row needs more than `MAX_STEPS` solver steps.
    """
    if not 0 < t_min < 1:
        raise ValueError(
            f"t_min: got {t_min}, expected a number in (0, 1):"
            " without noise the encoder has no entropy."
        )
    measure = _bound_terms(model, key, t_min, draws)
    decoder, prior = (
        np.asarray(part, np.float64)
        for part in map_batches(
            lambda rows: measure(
                jnp.asarray(latents[rows]), jnp.asarray(tokens[rows]), jnp.asarray(rows)
            ),
            len(tokens),
            batch,
        )
    )
    failed = int((~np.isfinite(prior)).sum())
    if failed:
        raise ValueError(
            f"The probability-flow ODE of {failed} rows needs more than {MAX_STEPS} steps:"
            f" raise the tolerances (now {model.tolerance}) or t_min"
            f" (now {t_min})."
        )
    size = int(np.prod(latents.shape[1:]))
    entropy = np.full(len(tokens), entropy_of_noise(model.schedule, t_min, size))
    length = content_length(tokens, model.tokenizer.eot_id)
    total = decoder + prior - entropy
    terms = {"nats": total, "decoder_nats": decoder, "prior_nats": prior, "entropy_nats": entropy}
    return {"bound_ppl": intervals.ratio_exp(total, length)} | {
        name: intervals.ratio(value, length) for name, value in terms.items()
    }


def _bound_terms(
    model: LatentModel, key: Array, t_min: float, draws: int
) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """A jitted `(z, rows, indices) -> ` decoder's bound and -log p(z'), in nats `[B]` each."""
    mask_id = model.tokenizer.mask_id
    allowed = jnp.asarray(model.tokenizer.sampleable)

    def measure(z: Array, rows: Array, indices: Array) -> tuple[Array, Array]:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(indices)
        eps = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:], jnp.float32))(keys[:, 0])
        noisy = gaussian.diffuse(model.schedule, z, eps, jnp.float32(t_min))
        found = log_density(
            model.predict,
            model.schedule,
            noisy,
            keys[:, 1],
            t_min=t_min,
            tolerance=model.tolerance,
        )
        length = rows.shape[1]

        def decoded(draw: Array) -> Array:
            pairs = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, draw)))(keys[:, 2])
            count = jax.vmap(lambda k: jax.random.randint(k, (), 1, length + 1, jnp.int32))(
                pairs[:, 0]
            )
            x_t = jax.vmap(
                lambda k, row, c: masking.mask_exactly(k, row[None], c[None], mask_id)[0]
            )(pairs[:, 1], rows, count)
            nll, _ = masking.token_nll(model.decoder_logits(x_t, noisy), rows, allowed)
            return jnp.sum(nll * (x_t == mask_id), axis=-1) * length / count

        return jax.lax.map(decoded, jnp.arange(draws)).mean(axis=0), -found.log_p

    return jax.jit(measure)
