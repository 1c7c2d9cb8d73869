"""Objectives from an experiment's settings (a plain mapping), and which frozen networks each of them reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from diladiff_jax.diffusion.schedules import ScheduleOptions, make_schedule
from diladiff_jax.nn.networks import Networks
from diladiff_jax.objectives.autoencoder import Autoencoder
from diladiff_jax.objectives.autoregressive import Autoregressive
from diladiff_jax.objectives.base import Objective
from diladiff_jax.objectives.diladiff import DiLaDiff
from diladiff_jax.objectives.encoding import (
    BertFeatures,
    DenoiserFeatures,
    FeatureExtractor,
    TextEncoder,
)
from diladiff_jax.objectives.ladiff import LaDiff
from diladiff_jax.objectives.mdlm import MDLM

FROZEN: dict[str, dict[str, tuple[str, ...]]] = {
    "mdlm": {},
    "mdlm_long": {"start": ("mdlm",)},
    "scorer": {},
    "autoencoder": {"features": ("features",), "start": ("mdlm",)},
    "ladiff": {"features": ("features",), "encoder": ("autoencoder", "encoder")},
    "diladiff": {
        "features": ("features",),
        "encoder": ("autoencoder", "encoder"),
        "teacher": ("ladiff",),
    },
}
"""Stage -> name in `Context.frozen` -> (earlier stage, path inside its parameters). "features" as a stage stands for `features_source`,
"start" is what the stage's own network begins as and no loss reads."""


def features_source(settings: Mapping[str, Any]) -> str:
    """Whose parameters the feature extractor reads: stage "mdlm", or "bert", the published encoder."""
    return "bert" if settings["features"]["source"] == "bert" else "mdlm"


def frozen_sources(stage: str, settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """`FROZEN` of a stage with "features" resolved."""
    return {
        name: (features_source(settings),) if source == ("features",) else source
        for name, source in FROZEN[stage].items()
    }


def text_encoder(settings: Mapping[str, Any], networks: Networks) -> TextEncoder:
    """The path from tokens to standardized latents."""
    features: FeatureExtractor
    if networks.bert is not None:
        features = BertFeatures(networks.bert)
    else:
        features = DenoiserFeatures(networks.denoiser, settings["features"]["with_embeddings"])
    return TextEncoder(features, networks.encoder)


def build_objective(
    stage: str,
    settings: Mapping[str, Any],
    networks: Networks,
    *,
    mask_id: int,
    eot_id: int,
    sampleable: np.ndarray,
) -> Objective:
    """The objective of a stage.

    Raises:
      ValueError: no such stage.
    """
    loss_positions = settings["memory"]["loss_positions"]
    vocabulary = dict(mask_id=mask_id, sampleable=sampleable, loss_positions=loss_positions)
    block = settings[stage]
    schedule = make_schedule(ScheduleOptions.of(settings["diffusion"]))
    encoder = text_encoder(settings, networks)

    def options(*names: str) -> dict[str, Any]:
        return {name: block[name] for name in names}

    if stage in ("mdlm", "mdlm_long"):
        return MDLM(networks.denoiser, weighting=block["weighting"], **vocabulary)
    if stage == "scorer":
        return Autoregressive(networks.scorer, eot_id, sampleable, loss_positions)
    if stage == "autoencoder":
        names = options("noise", "p_feat", "p_lat", "p_drop", "statistics_decay", "weighting")
        return Autoencoder(
            encoder.features, networks.encoder, networks.decoder, **vocabulary, **names
        )
    if stage == "ladiff":
        return LaDiff(encoder, networks.teacher, schedule, **options("self_conditioning"))
    if stage == "diladiff":
        names = options(
            "step_form",
            "teacher_noise",
            "time_mean",
            "time_std",
            "p_equal",
            "p_noise",
            "p_clean",
            "self_conditioning",
            "tangent_warmup",
            "loss_offset",
        )
        return DiLaDiff(encoder, networks.teacher, networks.student, schedule, **names)
    raise ValueError(f"stage is {stage!r}; it must be one of {', '.join(FROZEN)}")
