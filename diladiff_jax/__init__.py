"""DiLaDiff in JAX: masked diffusion language models guided by a few-step latent (arXiv 2605.23605).

    import diladiff_jax as dl

    model = dl.load("workdir")
    model.sample(0, num=8, latent_steps=5, decode_steps=64).texts

The pure pieces are `dl.nn`, `dl.diffusion`, `dl.objectives` and `dl.sampling`.
"""

from diladiff_jax import diffusion, nn, objectives, sampling
from diladiff_jax.config import ConfigError
from diladiff_jax.data.errors import DataError
from diladiff_jax.model import Model, Samples, load
from diladiff_jax.stages import (
    MODELS,
    STAGES,
    SampledModel,
    Stage,
    register_model,
    register_stage,
)
from diladiff_jax.storage.errors import CheckpointError, PretrainedError
from diladiff_jax.storage.released import models

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "STAGES",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Model",
    "PretrainedError",
    "SampledModel",
    "Samples",
    "Stage",
    "diffusion",
    "load",
    "models",
    "nn",
    "objectives",
    "register_model",
    "register_stage",
    "sampling",
]
