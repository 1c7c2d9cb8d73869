"""All measures of a model's samples that its workdir and config allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from diladiff_jax.evaluation.measures import likelihood, scorer, text
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.model import Model

Measure = Callable[[np.ndarray], dict[str, Estimate]]
"""Maps samples `[n, L]` to named estimates."""


def sample_measures(model: Model) -> Measure:
    """A function that measures samples `[n, L]`.

    It applies the oracle on the stories corpus, a published or else the trained scorer if there is
    one, and the measures of tokens alone.
    """
    tokenizer, corpus = model.tokenizer, model.config.data.corpus

    def measure(tokens: np.ndarray) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        if corpus == "stories":
            found |= text.oracle_measures(text.first_documents(tokens, tokenizer))
        published = scorer.published_scorer(model)
        if published is not None:
            found |= published.measures([tokenizer.raw_text(row) for row in tokens])
        elif model.has("scorer"):
            found["gen_ppl"] = likelihood.generative_perplexity(
                model.networks.scorer,
                model.trained("scorer"),
                likelihood.retokenize(tokens, tokenizer),
                tokenizer,
                batch=model.config.sampling.batch,
            )
        return found | text.token_measures(list(tokens), tokenizer.eot_id)

    return measure


def scorer_setting(model: Model) -> dict[str, Any] | None:
    """Which scorer measures `gen_ppl`, and how many tokens of a row it reads; None without one."""
    published = scorer.published_scorer(model)
    if published is not None:
        return {**published.origin, "length": published.length}
    if model.has("scorer"):
        return {"name": "stage scorer", "length": model.config.data.length}
    return None
