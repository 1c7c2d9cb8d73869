"""The paper's figures and tables from a sweep, from a trained model, and from several workdirs."""

from diladiff_jax.evaluation.analyses.attention import attention_share
from diladiff_jax.evaluation.analyses.compression import compression_tradeoff, evaluated
from diladiff_jax.evaluation.analyses.latent_cost import latent_overhead
from diladiff_jax.evaluation.analyses.latent_noise import (
    Omega,
    decoding_error,
    fit_omega,
    robustness,
)
from diladiff_jax.evaluation.analyses.masked_counts import by_masked_count, recovery_by_ratio
from diladiff_jax.evaluation.analyses.mauve_table import mauve_table
from diladiff_jax.evaluation.analyses.prior_likelihood import prior_likelihood
from diladiff_jax.evaluation.analyses.run import ANALYSES, Analysis, Context, analyse, analyse_rows
from diladiff_jax.evaluation.analyses.sampling_settings import latent_samplers, sampled_rows
from diladiff_jax.evaluation.analyses.schedules import schedule_curves
from diladiff_jax.evaluation.analyses.similarity import latent_similarity

__all__ = [
    "ANALYSES",
    "Analysis",
    "Context",
    "Omega",
    "analyse",
    "analyse_rows",
    "attention_share",
    "by_masked_count",
    "compression_tradeoff",
    "decoding_error",
    "evaluated",
    "fit_omega",
    "latent_overhead",
    "latent_samplers",
    "latent_similarity",
    "mauve_table",
    "prior_likelihood",
    "recovery_by_ratio",
    "robustness",
    "sampled_rows",
    "schedule_curves",
]
