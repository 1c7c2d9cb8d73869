"""MAUVE (arXiv 2102.01454) on feature arrays, through the mauve-text package (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.measures import intervals

Array = jax.Array

SETTINGS: dict[str, Any] = {
    "num_buckets": "auto",  # a tenth of the samples
    "pca_max_data": -1,
    "kmeans_explained_var": 0.9,
    "kmeans_num_redo": 5,
    "kmeans_max_iter": 500,
    "divergence_curve_discretization_size": 25,
    "mauve_scaling_factor": 5,
    "seed": 25,
}
"""Every parameter of the package that its value depends on, at the package's defaults."""

JACKKNIFE_GROUPS = 10


class MissingPackage(RuntimeError):
    """mauve-text or its faiss is not installed."""


def mauve(data_features: np.ndarray, model_features: np.ndarray, **settings: Any) -> dict[str, Any]:
    """MAUVE of the model's samples `[m, D]` against data `[n, D]`: `{"value", "low", "high", "data_samples", "samples", "settings"}`.

    1 where the two are alike, towards 0 where they are disjoint. It falls with fewer samples, so values at different sample
    counts do not compare. The interval is a jackknife of both sets: a bootstrap repeats samples, which k-means sees as clusters.

    Args:
      **settings: over `SETTINGS`.

    Raises:
      MissingPackage: the package is not installed.
      ValueError: an unknown setting, arrays that do not go together, or fewer than 20 samples of either.
    """
    unknown = set(settings) - set(SETTINGS)
    if unknown:
        raise ValueError(
            f"mauve has no setting {sorted(unknown)[0]!r}; it must be one of {', '.join(SETTINGS)}"
        )
    for name, features in (("data", data_features), ("model", model_features)):
        if features.ndim != 2 or len(features) < 20 or features.shape[1] != data_features.shape[-1]:
            raise ValueError(
                f"{name} features have shape {features.shape}; both must be [samples, D] with at least 20 samples and one D"
            )
    try:
        import faiss
        from mauve import compute_mauve
    except ImportError as error:
        raise MissingPackage(
            f"MAUVE needs the packages mauve-text and faiss-cpu ({error}); pip install 'diladiff-jax[mauve]'"
        ) from None
    faiss.omp_set_num_threads(1)  # k-means sums in the order of its threads
    used = SETTINGS | settings

    def score(p: np.ndarray, q: np.ndarray) -> float:
        return float(compute_mauve(p_features=p, q_features=q, verbose=False, **used).mauve)

    p, q = (np.ascontiguousarray(x, np.float32) for x in (data_features, model_features))
    joint = len(p) + len(q)
    estimate = intervals.jackknife(
        lambda kept: score(p[kept[kept < len(p)]], q[kept[kept >= len(p)] - len(p)]),
        joint,
        groups=JACKKNIFE_GROUPS,
        low=0.0,
        high=1.0,
    )
    return {**estimate, "data_samples": len(p), "samples": len(q), "settings": dict(used)}


def mean_hidden(
    hidden: Callable[[Array], Array], tokens: np.ndarray, counted: np.ndarray, *, batch: int
) -> np.ndarray:
    """Features of rows `[n, L]`: the mean over the `counted [n, L]` positions of a scorer's last hidden states, float32 `[n, D]`.

    `hidden(rows [B, L]) -> [B, L, D]` is traced.
    """

    @jax.jit
    def features(rows: Array, counted: Array) -> Array:
        weight = counted.astype(jnp.float32)[..., None]
        return (hidden(rows).astype(jnp.float32) * weight).sum(axis=1) / jnp.maximum(
            weight.sum(axis=1), 1.0
        )

    n, parts = len(tokens), []
    batch = min(batch, n)
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n
        parts.append(
            np.asarray(features(jnp.asarray(tokens[rows]), jnp.asarray(counted[rows])))[
                : min(batch, n - first)
            ]
        )
    return np.concatenate(parts)
