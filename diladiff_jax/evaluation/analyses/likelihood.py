"""The bound on LaDiff's perplexity, with the cost of the latent counted."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.figures import Table, cells, table
from diladiff_jax.evaluation.held_out import decoder
from diladiff_jax.evaluation.measures import ode_likelihood, probability_flow
from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model

_LARGEST_BATCH = 32
_TOLERANCE = probability_flow.Tolerance(rtol=1e-2, atol=1e-2)


def prior_likelihood(
    model: Model,
    rows: np.ndarray,
    latents: np.ndarray,
    sigmas: Sequence[float] = (0.3, 0.6),
    *,
    draws: int = 8,
    seed: int = 0,
) -> Table:
    """LaDiff's bound on the perplexity at several noise floors; see `likelihood_bound`.

    Args:
      model: the workdir's models.
      rows: held-out rows `[n, L]`.
      latents: their latents `[n, N, D_lat]`.
      sigmas: noise floors.
      draws: random masks per row.
      seed: of noise and masks.
    """
    network = decoder(model)
    settings = model.config.sampling
    how = "none" if settings.prior_self_conditioning == "none" else "current"
    latent_model = ode_likelihood.LatentModel(
        _clean_prediction(model, how),
        functools.partial(network.logits, network.params),
        model.sampler.schedule,
        model.tokenizer,
        _TOLERANCE,
    )
    body = []
    for sigma in sigmas:
        angle = jnp.arcsin(jnp.float32(sigma))
        found = ode_likelihood.likelihood_bound(
            latent_model,
            latents,
            rows,
            random_key(seed),
            t_min=float(latent_model.schedule.time_of_angle(angle)),
            draws=draws,
            batch=min(settings.batch, _LARGEST_BATCH),
        )
        terms = [found[f"{name}_nats"]["value"] for name in ("decoder", "prior", "entropy")]
        body.append([sigma, *cells(found["bound_ppl"]), *cells(found["nats"]), *terms])
    ends = ("low", "high")
    return table(
        "ladiff_likelihood",
        "",
        "Bound on LaDiff's perplexity, with the cost of the latent counted",
        (
            *("noise floor sigma", "bound ppl", *ends, "nats per token", *ends),
            *("decoder", "prior", "entropy of the encoder"),
        ),
        body,
        f"{len(rows)} held-out rows; self-conditioning {how};"
        " nats per token = decoder + prior - entropy."
        " Each row bounds a different model: the one that stops at that noise.",
    )


def _clean_prediction(model: Model, self_conditioning: str) -> probability_flow.CleanPrediction:
    # The divergence is a forward derivative divided by sigma, so it needs float32 throughout, as
    # the student's tangents do.
    teacher: Any = model.networks.teacher.clone(plain=True, dtype=jnp.float32)
    prior = model.trained("ladiff")

    def denoise(z_t: jax.Array, t: jax.Array, self_condition: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            return teacher.apply({"params": prior}, z_t, t, self_condition)

    return probability_flow.clean_prediction(denoise, self_conditioning)
