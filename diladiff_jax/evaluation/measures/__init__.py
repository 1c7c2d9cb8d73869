"""Measures with 95% intervals: of samples, of networks on held-out text, and of distributions."""

from diladiff_jax.evaluation.measures.intervals import (
    Estimate,
    bootstrap,
    jackknife,
    mean,
    proportion,
    ratio,
    ratio_exp,
)
from diladiff_jax.evaluation.measures.likelihood import (
    Denoiser,
    bound_and_recovery,
    generative_perplexity,
    retokenize,
)
from diladiff_jax.evaluation.measures.ode_likelihood import LatentModel, likelihood_bound
from diladiff_jax.evaluation.measures.probability_flow import log_density
from diladiff_jax.evaluation.measures.samples import sample_measures
from diladiff_jax.evaluation.measures.scorer import Scored, Scorer, published_scorer
from diladiff_jax.evaluation.measures.text import (
    distinct_measures,
    distinct_n,
    oracle_measures,
    repetition,
    token_measures,
    unigram_entropy,
)

__all__ = [
    "Denoiser",
    "Estimate",
    "LatentModel",
    "Scored",
    "Scorer",
    "bootstrap",
    "bound_and_recovery",
    "distinct_measures",
    "distinct_n",
    "generative_perplexity",
    "jackknife",
    "likelihood_bound",
    "log_density",
    "mean",
    "oracle_measures",
    "proportion",
    "published_scorer",
    "ratio",
    "ratio_exp",
    "repetition",
    "retokenize",
    "sample_measures",
    "token_measures",
    "unigram_entropy",
]
