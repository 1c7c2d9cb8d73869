"""Jitted samplers: latents by a solver or the student, then tokens in any unmasking order.

For comparison, there is a sampler from left to right too.
"""

from diladiff_jax.sampling.autoregressive import AutoregressiveSample, AutoregressiveSampler
from diladiff_jax.sampling.categorical import (
    normal_per_sample,
    nucleus_threshold,
    sample_categorical,
    text_logits,
    token_distribution,
    uniform_per_sample,
)
from diladiff_jax.sampling.controls import Controls
from diladiff_jax.sampling.latent import GAMMA_WARPS, few_step
from diladiff_jax.sampling.latent_sources import (
    LatentSource,
    NullLatents,
    PriorLatents,
    StudentLatents,
)
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.orders import (
    ORDERS,
    Order,
    TokenControls,
    TokenNetwork,
    ancestral,
    by_confidence,
    plain,
    register_order,
)
from diladiff_jax.sampling.sampler import (
    Sample,
    Sampler,
    TokenDecoder,
    left_to_right,
)
from diladiff_jax.sampling.solvers import SOLVERS, Solver, Step, register_solver

__all__ = [
    "GAMMA_WARPS",
    "ORDERS",
    "SOLVERS",
    "AutoregressiveSample",
    "AutoregressiveSampler",
    "Controls",
    "LatentSource",
    "NullLatents",
    "Order",
    "PriorLatents",
    "Sample",
    "Sampler",
    "SamplingOptions",
    "Solver",
    "Step",
    "StudentLatents",
    "TokenControls",
    "TokenDecoder",
    "TokenNetwork",
    "ancestral",
    "by_confidence",
    "few_step",
    "left_to_right",
    "normal_per_sample",
    "nucleus_threshold",
    "plain",
    "register_order",
    "register_solver",
    "sample_categorical",
    "text_logits",
    "token_distribution",
    "uniform_per_sample",
]
