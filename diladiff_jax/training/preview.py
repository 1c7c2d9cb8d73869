"""Samples printed as training goes: what the stage's networks write at this moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data import Prepared
from diladiff_jax.experiment import Experiment
from diladiff_jax.objectives.build import text_encoder
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.pipeline import Controls, Sample
from diladiff_jax.training.state import TrainState

Array = jax.Array


def make_preview(
    experiment: Experiment, stage: str, prepared: Prepared
) -> Callable[[TrainState, Array], list[str]]:
    """`(state, key) -> texts`: samples of the stage's model; for the autoencoder, validation text encoded and decoded again."""
    config, sampler = experiment.config, experiment.sampler()
    count, length = config.logging.samples, config.data.length
    steps = config.sampling.prior_steps if stage == "ladiff" else config.sampling.student_steps
    controls = Controls(
        config.sampling.decode_steps,
        steps,
        config.sampling.temperature,
        config.sampling.top_p,
        config.sampling.gamma,
        config.sampling.threshold,
    )
    blank = jnp.full((count, length), experiment.tokenizer.mask_id, jnp.int32)
    indices = jnp.arange(count)

    if stage in ("mdlm", "mdlm_long"):

        def draw(params: Any, statistics: Any, fixed: Any, key: Array) -> Sample:
            return sampler.generate("mdlm", {"denoiser": params}, key, indices, blank, controls)

        fixed: Any = None
    elif stage == "autoencoder":
        encode = text_encoder(experiment.settings, experiment.networks)
        texts = jnp.asarray(
            np.stack(
                prepared.rows("validation").__getitems__(
                    range(min(count, len(prepared.rows("validation"))))
                )
            )
        )

        def draw(params: Any, statistics: Any, fixed: Any, key: Array) -> Sample:
            z = encode({"features": fixed, "encoder": params["encoder"]}, statistics, texts)
            one_step = controls._replace(decode_steps=1)
            return sampler.decode_latents(
                {"decoder": params["decoder"]},
                key,
                indices[: len(texts)],
                blank[: len(texts)],
                z,
                one_step,
            )

        fixed = experiment.restore_features()
    else:
        network = "teacher" if stage == "ladiff" else "student"

        def draw(params: Any, statistics: Any, fixed: Any, key: Array) -> Sample:
            return sampler.generate(
                stage, {"decoder": fixed, network: params}, key, indices, blank, controls
            )

        fixed = experiment.restore("autoencoder")["decoder"]

    # Whole on every process, which prints it.
    jitted = jax.jit(
        sharding.on_mesh(draw, experiment.mesh), out_shardings=sharding.replicated(experiment.mesh)
    )

    def preview(state: TrainState, key: Array) -> list[str]:
        tokens = np.asarray(jitted(state.averaged, state.statistics, fixed, key).tokens)
        return [experiment.tokenizer.decode(row) for row in tokens]

    return preview
