"""Held-out rows of a workdir, and what its networks make of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from diladiff_jax.data import Prepared
from diladiff_jax.evaluation.measures import likelihood
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import Denoiser
from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model
from diladiff_jax.stages import DECODER, MODELS, TRUE_LATENT


def validation_rows(prepared: Prepared, samples: int) -> np.ndarray:
    """The first held-out rows, int32 `[n, L]` with n at most `samples`."""
    rows = prepared.rows("validation")
    return np.stack(rows.__getitems__(range(min(samples, len(rows)))))


def plain_denoiser(model: Model, name: str) -> Denoiser:
    """The trained masked denoiser of a model without a latent."""
    network: Any = MODELS[name].sampler(model.sampler).networks.denoiser
    params = model.parameters(name)["denoiser"]
    return Denoiser(lambda params, x_t, _: network.apply({"params": params}, x_t), params)


def decoder(model: Model, latents: np.ndarray | None = None) -> Denoiser:
    """The autoencoder's trained decoder, given a latent `[n, N, D_lat]` for each row."""
    network: Any = model.networks.decoder
    params = model.parameters(TRUE_LATENT.name)["decoder"]
    return Denoiser(
        lambda params, x_t, z: network.apply({"params": params}, x_t, z), params, latents
    )


def network_bounds(model: Model, rows: np.ndarray) -> dict[str, dict[str, Estimate]]:
    """Bound and recovery on held-out rows `[n, L]`, of each trained denoiser and the decoder.

    The decoder is given each row's own latent.

    Returns:
      Measures by the name of the row in `results.json`, as "mdlm bound".
    """
    found = {
        f"{name} bound": _bound(model, plain_denoiser(model, name), rows)
        for name in model.models
        if not MODELS[name].has_latent and MODELS[name].decode is None
    }
    if model.has(DECODER[0]):
        latents = np.asarray(model.encode(rows))
        found["autoencoder bound"] = _bound(model, decoder(model, latents), rows)
    return found


def _bound(model: Model, denoiser: Denoiser, rows: np.ndarray) -> dict[str, Estimate]:
    settings = model.config.evaluation
    return likelihood.bound_and_recovery(
        denoiser,
        rows,
        random_key(settings.seed),
        model.tokenizer,
        draws=settings.bound_draws,
        batch=model.config.sampling.batch,
    )
