"""Texts printed during training: what the stage's networks write at that moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import stages
from diladiff_jax.data.prepared import Prepared
from diladiff_jax.data.terminal import printable
from diladiff_jax.experiment import Experiment
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.controls import Controls
from diladiff_jax.training.state import TrainState

Array = jax.Array


Preview = Callable[[TrainState, Array], list[str]]
"""(state, key) -> texts."""


def make_preview(experiment: Experiment, stage: str, prepared: Prepared) -> Preview | None:
    """`(state, key) -> texts` of the stage's preview; None if it has none or none are wanted."""
    preview = stages.preview_of(stages.stage_named(stage))
    if preview is None or not experiment.config.logging.samples:
        return None
    validation = prepared.rows("validation")
    count = min(experiment.config.logging.samples, len(validation))
    rows = jnp.asarray(np.stack(validation.__getitems__(range(count))))
    fixed = {name: experiment.restore_source(source) for name, source in preview.fixed.items()}
    parts, sampler = experiment.parts, experiment.sampler
    controls = Controls.of(sampler.options, preview.latent_steps)

    def draw(params: Any, statistics: Any, fixed: Any, key: Array) -> Array:
        inputs = stages.PreviewInputs(
            parts, sampler, params, statistics, fixed, rows, key, controls
        )
        return preview.draw(inputs).tokens

    # Replicated, since the process that prints needs all of it.
    jitted = jax.jit(
        sharding.on_mesh(draw, experiment.mesh),
        out_shardings=sharding.replicated(experiment.mesh),
    )

    def texts(state: TrainState, key: Array) -> list[str]:
        tokens = np.asarray(jitted(state.averaged, state.statistics, fixed, key))
        return [experiment.tokenizer.decode(row) for row in tokens]

    return texts


def show_preview(
    preview: Preview | None, state: TrainState, key: Array, log: Callable[[str], None]
) -> None:
    """Logs what the stage's networks write now. A failure is logged, and stops nothing."""
    if preview is None:
        return
    try:
        for text in preview(state, key):
            log("  | " + printable(text).replace("\n", "\n  | "))
    except Exception as error:  # of the device's memory, for example
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        log(f"  | no preview ({reason})")
