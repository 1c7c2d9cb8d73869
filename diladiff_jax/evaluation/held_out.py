"""Held-out rows of a workdir, and what its networks make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from diladiff_jax.data.prepare import Prepared
from diladiff_jax.evaluation.measures import likelihood
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import LogitsOf
from diladiff_jax.stages import MODELS

if TYPE_CHECKING:
    from diladiff_jax.model import Model


def validation_rows(prepared: Prepared, samples: int) -> np.ndarray:
    """The first held-out rows, int32 `[n, L]` with n at most `samples`."""
    rows = prepared.rows("validation")
    return np.stack(rows.__getitems__(range(min(samples, len(rows)))))


def denoiser_logits(model: Model) -> LogitsOf:
    """The plain denoiser as a function of parameters and masked tokens."""
    denoiser = model.networks.denoiser
    return lambda params, x_t, _: denoiser.apply({"params": params}, x_t)


def decoder_logits(model: Model) -> LogitsOf:
    """The autoencoder's decoder as a function of parameters, masked tokens and latents."""
    decoder = model.networks.decoder
    return lambda params, x_t, z: decoder.apply({"params": params}, x_t, z)


def network_bounds(model: Model, rows: np.ndarray) -> dict[str, dict[str, Estimate]]:
    """Bound and recovery on held-out rows `[n, L]`, of each trained denoiser and the decoder.

    The decoder is given each row's own latent.

    Returns:
      Measures by the name of the row in `results.json`, as "mdlm bound".
    """
    found = {}
    for name in model.models:
        if not MODELS[name].has_latent:
            params = model.parameters(name)["denoiser"]
            found[f"{name} bound"] = _bound(model, denoiser_logits(model), params, rows, None)
    if model.has("autoencoder"):
        found["autoencoder bound"] = _bound(
            model,
            decoder_logits(model),
            model.trained("autoencoder")["decoder"],
            rows,
            np.asarray(model.encode(rows)),
        )
    return found


def _bound(
    model: Model, logits_of: LogitsOf, params: Any, rows: np.ndarray, latents: np.ndarray | None
) -> dict[str, Estimate]:
    settings = model.config.evaluation
    return likelihood.bound_and_recovery(
        logits_of,
        params,
        rows,
        jax.random.key(settings.seed),
        model.tokenizer,
        condition=latents,
        draws=settings.bound_draws,
        batch=model.config.sampling.batch,
    )
