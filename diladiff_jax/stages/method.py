"""The stages and models of the paper, its baselines and its controls.

This file is a little longer than others because it is one list, to be read in one place.
"""

from __future__ import annotations

import dataclasses

from diladiff_jax.nn.networks import Networks
from diladiff_jax.objectives.autoencoder import Autoencoder, AutoencoderOptions
from diladiff_jax.objectives.autoregressive import Autoregressive, AutoregressiveOptions
from diladiff_jax.objectives.base import Objective, Params
from diladiff_jax.objectives.diladiff import DiLaDiff, DiLaDiffOptions, student_from_teacher
from diladiff_jax.objectives.ladiff import LaDiff, LaDiffOptions
from diladiff_jax.objectives.mdlm import MDLM, MDLMOptions
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling.latent_sources import NullLatents, PriorLatents, StudentLatents
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.sampler import Sample, left_to_right
from diladiff_jax.stages.records import (
    DECODER,
    ENCODER,
    FEATURES,
    Parts,
    Preview,
    PreviewInputs,
    SampledModel,
    Stage,
    Start,
)
from diladiff_jax.stages.registry import blank_prompts, register_model, register_stage

# The method.


def _reconstruction(given: PreviewInputs) -> Sample:
    """Validation rows, encoded and decoded again in one step."""
    frozen = {"features": given.fixed["features"], "encoder": given.params["encoder"]}
    z = given.parts.text_encoder(frozen, dict(given.statistics), given.rows)
    indices, prompt = blank_prompts(given)
    return given.sampler.decode_latents(
        {"decoder": given.params["decoder"]},
        given.key,
        indices,
        prompt,
        z,
        given.controls._replace(decode_steps=1),
    )


def _build_mdlm(parts: Parts, options: MDLMOptions) -> Objective:
    return MDLM(parts.networks.denoiser, parts.process, options, parts.loss_positions)


def _build_autoencoder(parts: Parts, options: AutoencoderOptions) -> Objective:
    networks = parts.networks
    return Autoencoder(
        parts.text_encoder.features,
        networks.encoder,
        networks.decoder,
        parts.process,
        options,
        parts.loss_positions,
    )


def _build_ladiff(parts: Parts, options: LaDiffOptions) -> Objective:
    return LaDiff(parts.text_encoder, parts.networks.teacher, parts.schedule, options)


def _build_diladiff(parts: Parts, options: DiLaDiffOptions) -> Objective:
    networks = parts.networks
    return DiLaDiff(parts.text_encoder, networks.teacher, networks.student, parts.schedule, options)


def _build_scorer(parts: Parts, options: AutoregressiveOptions) -> Objective:
    del options
    return Autoregressive(
        parts.networks.scorer, parts.eot_id, parts.process.sampleable, parts.loss_positions
    )


def _causal(networks: Networks) -> Networks:
    """The denoiser as an autoregressive model: it sees earlier tokens only, and no time."""
    causal = networks.denoiser.clone(causal=True, adaln=0, name=None)
    return dataclasses.replace(networks, denoiser=causal)


def _build_autoregressive(parts: Parts, options: AutoregressiveOptions) -> Objective:
    del options
    network = _causal(parts.networks).denoiser
    return Autoregressive(network, parts.eot_id, parts.process.sampleable, parts.loss_positions)


def _decoder_from_mdlm(params: Params, mdlm: Params) -> Params:
    """The decoder's backbone starts as the MDLM."""
    return {**params, "decoder": {**params["decoder"], "backbone": mdlm}}


register_stage(
    Stage(
        "mdlm",
        "masked diffusion language model",
        _build_mdlm,
        MDLMOptions(),
        TrainingOptions(steps=1_000_000),
        preview="mdlm",
        meaning=("data.length", "backbone"),
    )
)
register_stage(
    Stage(
        "autoencoder",
        "encoder and latent-conditioned decoder",
        _build_autoencoder,
        AutoencoderOptions(),
        TrainingOptions(steps=200_000, learning_rate=5e-5, clip=10.0, ema=0.0),
        predecessor="mdlm",
        frozen={"features": FEATURES},
        start=Start(("mdlm",), _decoder_from_mdlm),
        preview=Preview(_reconstruction, {"features": FEATURES}),
        meaning=("features.source", "features.with_embeddings", "encoder", "decoder"),
    )
)
register_stage(
    Stage(
        "ladiff",
        "latent diffusion prior",
        _build_ladiff,
        LaDiffOptions(),
        TrainingOptions(steps=150_000, learning_rate=2e-4, schedule="constant"),
        predecessor="autoencoder",
        frozen={"features": FEATURES, "encoder": ENCODER},
        preview="ladiff",
        meaning=("latent_denoiser", "diffusion"),
    )
)
register_stage(
    Stage(
        "diladiff",
        "few-step student of the prior",
        _build_diladiff,
        DiLaDiffOptions(),
        TrainingOptions(steps=25_000, batch=2048, learning_rate=5e-5, schedule="constant"),
        predecessor="ladiff",
        frozen={
            "features": FEATURES,
            "encoder": ENCODER,
            "teacher": ("ladiff",),
        },
        start=Start(("ladiff",), student_from_teacher),
        preview="diladiff",
    )
)

# Baselines, which are trained if their `steps` is above 0.

register_stage(
    Stage(
        "mdlm_long",
        "control: the MDLM, trained further for the number of steps that the decoder has",
        _build_mdlm,
        MDLMOptions(),
        predecessor="mdlm",
        start=Start(("mdlm",), lambda params, mdlm: mdlm),
        preview="mdlm_long",
        baseline=True,
    )
)
register_stage(
    Stage(
        "autoregressive",
        "baseline: a causal model of the MDLM's size",
        _build_autoregressive,
        AutoregressiveOptions(),
        preview="autoregressive",
        baseline=True,
    )
)
register_stage(
    Stage(
        "scorer",
        "autoregressive model of held-out text that judges samples",
        _build_scorer,
        AutoregressiveOptions(),
        rows="scorer",
        baseline=True,
    )
)

_PRIOR = {"decoder": DECODER, "teacher": ("ladiff",)}


def _student_calls(options: SamplingOptions) -> int:
    """Steps of the prior with the number of network calls that the student makes."""
    return options.student_calls(options.student_steps)


register_model(
    SampledModel(
        "mdlm",
        "MDLM",
        {"denoiser": ("mdlm",)},
        preferred=True,
        color="#7b7b7b",
        dark_color="#9a9a9a",
        marker="o",
    )
)
register_model(
    SampledModel(
        "mdlm_long",
        "MDLM, whole decoder budget",
        {"denoiser": ("mdlm_long",)},
        color="#404040",
        dark_color="#d0d0d0",
        marker="D",
    )
)
register_model(
    SampledModel(
        "autoregressive",
        "autoregressive, cached",
        {"denoiser": ("autoregressive",)},
        networks=_causal,
        decode=left_to_right,
        color="#2f8f8f",
        dark_color="#62c4c4",
        marker="h",
    )
)
register_model(
    SampledModel(
        "ladiff",
        "LaDiff",
        _PRIOR,
        PriorLatents(),
        lambda options: options.prior_steps,
        preferred=True,
        color="#3b75af",
        dark_color="#6ea8e0",
        marker="^",
    )
)
register_model(
    SampledModel(
        "diladiff",
        "DiLaDiff",
        {"decoder": DECODER, "student": ("diladiff",)},
        StudentLatents(),
        lambda options: options.student_steps,
        preferred=True,
        color="#c8442d",
        dark_color="#f0795f",
        marker="s",
    )
)
register_model(
    SampledModel(
        "prior_ddim",
        "prior, undistilled, DDIM",
        _PRIOR,
        PriorLatents("ddim", "previous"),
        _student_calls,
        control=True,
        color="#b5761b",
        dark_color="#dba040",
        marker="v",
    )
)
register_model(
    SampledModel(
        "prior_dpmpp_2m",
        "prior, undistilled, DPM-Solver++",
        _PRIOR,
        PriorLatents("dpmpp_2m", "previous"),
        _student_calls,
        control=True,
        color="#7d7a12",
        dark_color="#b9b545",
        marker="P",
    )
)
TRUE_LATENT = register_model(
    SampledModel(
        "true_latent",
        "decoder, true latents",
        {"decoder": DECODER},
        takes_latents=True,
        control=True,
        color="#3f8a57",
        dark_color="#6dbb86",
        marker="X",
    )
)
register_model(
    SampledModel(
        "null_latent",
        "decoder, null latent",
        {"decoder": DECODER},
        NullLatents(),
        control=True,
        color="#9a5fb0",
        dark_color="#c796d8",
        marker="d",
    )
)
