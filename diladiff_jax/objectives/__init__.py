"""Training objectives, one file per stage; each is usable under any `jit` and mesh."""

from diladiff_jax.objectives.autoencoder import (
    LATENT_AUGMENTATIONS,
    Autoencoder,
    AutoencoderOptions,
    augment_features,
)
from diladiff_jax.objectives.autoregressive import (
    Autoregressive,
    AutoregressiveOptions,
    content_mask,
    next_token_nll,
)
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Objective, Params, Part
from diladiff_jax.objectives.diladiff import (
    DiLaDiff,
    DiLaDiffOptions,
    average_velocity,
    student_from_teacher,
)
from diladiff_jax.objectives.encoding import (
    BertFeatures,
    DenoiserFeatures,
    FeatureExtractor,
    TextEncoder,
)
from diladiff_jax.objectives.ladiff import LaDiff, LaDiffOptions
from diladiff_jax.objectives.mdlm import MDLM, MDLMOptions, masked_loss
from diladiff_jax.objectives.statistics import Moments

__all__ = [
    "LATENT_AUGMENTATIONS",
    "MDLM",
    "WHOLE",
    "Autoencoder",
    "AutoencoderOptions",
    "Autoregressive",
    "AutoregressiveOptions",
    "BertFeatures",
    "Context",
    "DenoiserFeatures",
    "DiLaDiff",
    "DiLaDiffOptions",
    "FeatureExtractor",
    "LaDiff",
    "LaDiffOptions",
    "MDLMOptions",
    "Metrics",
    "Moments",
    "Objective",
    "Params",
    "Part",
    "TextEncoder",
    "augment_features",
    "average_velocity",
    "content_mask",
    "masked_loss",
    "next_token_nll",
    "student_from_teacher",
]
