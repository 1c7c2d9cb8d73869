"""MAUVE of every model: part of table 1 of the paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from diladiff_jax.evaluation.figures import Table, cells, table
from diladiff_jax.evaluation.measures import likelihood, mauve
from diladiff_jax.evaluation.models import title
from diladiff_jax.model import Model


def mauve_table(model: Model, held_out: np.ndarray, *, seed: int = 0) -> Table:
    """MAUVE of every model against held-out rows `[n, L]`, at the config's sampling settings.

    Features are the trained scorer's hidden states, averaged over each row.

    Raises:
      MissingPackage: mauve-text is not installed.
    """
    scorer: Any = model.networks.scorer
    params, tokenizer = model.trained("scorer"), model.tokenizer

    def features(tokens: np.ndarray) -> np.ndarray:
        rows = likelihood.retokenize(tokens, tokenizer)
        content = likelihood.content_positions(rows, tokenizer.eot_id)
        hidden = lambda x: scorer.apply({"params": params}, x, method="hidden")
        return mauve.mean_hidden(hidden, rows, content, batch=model.config.sampling.batch)

    data, rows = features(held_out), []
    for name in model.models:
        found = mauve.mauve(data, features(model.sample(seed, len(held_out), model=name).tokens))
        rows.append([title(name), *cells(found), found["samples"], found["data_samples"]])
    settings = ", ".join(f"{name} {value}" for name, value in mauve.SETTINGS.items())
    return table(
        "mauve",
        "table 1",
        "MAUVE on this run's scorer",
        ("model", "MAUVE", "low", "high", "samples", "data samples"),
        rows,
        f"features: mean last hidden state; {settings}",
    )
