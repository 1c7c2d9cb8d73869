"""MAUVE (arXiv 2102.01454) on feature arrays, through the mauve-text package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.evaluation.measures.intervals import Estimate

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
"""Every parameter of the package that affects the value, at the package's defaults."""

FEWEST_SAMPLES = 20
JACKKNIFE_GROUPS = 10


class MauveEstimate(Estimate):
    """MAUVE with the numbers of samples and the settings that it depends on."""

    data_samples: int
    samples: int
    settings: dict[str, Any]


class MissingPackage(RuntimeError):
    """mauve-text or its dependency faiss is not installed."""


def mauve(data_features: np.ndarray, model_features: np.ndarray, **settings: Any) -> MauveEstimate:
    """MAUVE of a model's samples `[m, D]` against data `[n, D]`.

    It is 1 for equal distributions and approaches 0 for disjoint ones. It also falls with fewer
    samples, so only values at equal sample counts compare. The interval is a jackknife over both
    sets, because a bootstrap repeats samples, which k-means takes for clusters. It is wider than
    the spread of MAUVE over fresh samples, by a factor of about 1.9 at a few hundred samples: each
    jackknife value is clustered again, and that noise counts as if it were the samples'.

    Args:
      data_features: features of the data's samples.
      model_features: features of the model's samples.
      **settings: override `SETTINGS`.

    Raises:
      MissingPackage: mauve-text or faiss is not installed.
      ValueError: an unknown setting, incompatible shapes, or fewer than 20 samples of either.
    """
    unknown = sorted(set(settings) - set(SETTINGS))
    if unknown:
        raise ValueError(
            f"MAUVE setting: got {unknown[0]!r}, expected one of {', '.join(SETTINGS)}."
        )
    for name, features in (("data", data_features), ("model", model_features)):
        width = data_features.shape[-1]
        if features.ndim != 2 or len(features) < FEWEST_SAMPLES or features.shape[1] != width:
            raise ValueError(
                f"{name}_features: got shape {features.shape}, expected [samples, D] with at least"
                f" {FEWEST_SAMPLES} samples and the same D for data and model."
            )
    try:
        import faiss
        from mauve import compute_mauve
    except ImportError as error:
        raise MissingPackage(
            f"MAUVE needs the packages mauve-text and faiss-cpu ({error});"
            " run pip install 'diladiff-jax[mauve]'"
        ) from None
    faiss.omp_set_num_threads(1)  # k-means adds up in the order of its threads
    used = SETTINGS | settings

    def score(p: np.ndarray, q: np.ndarray) -> float:
        return float(compute_mauve(p_features=p, q_features=q, verbose=False, **used).mauve)

    p, q = (np.ascontiguousarray(x, np.float32) for x in (data_features, model_features))
    estimate = intervals.jackknife(
        lambda kept: score(p[kept[kept < len(p)]], q[kept[kept >= len(p)] - len(p)]),
        len(p) + len(q),
        groups=JACKKNIFE_GROUPS,
        low=0.0,
        high=1.0,
    )
    return {**estimate, "data_samples": len(p), "samples": len(q), "settings": dict(used)}


def mean_hidden(
    hidden: Callable[[Array], Array], tokens: np.ndarray, counted: np.ndarray, *, batch: int
) -> np.ndarray:
    """Features of rows `[n, L]`: hidden states averaged over some positions, float32 `[n, D]`.

    Args:
      hidden: maps rows `[B, L]` to a scorer's last hidden states `[B, L, D]`; traced.
      tokens: int32 `[n, L]`.
      counted: which positions are averaged, bool `[n, L]`.
      batch: rows at a time.
    """

    @jax.jit
    def features(rows: Array, counted: Array) -> Array:
        weight = counted.astype(jnp.float32)[..., None]
        total = (hidden(rows).astype(jnp.float32) * weight).sum(axis=1)
        return total / jnp.maximum(weight.sum(axis=1), 1.0)

    return np.asarray(
        map_batches(
            lambda rows: features(jnp.asarray(tokens[rows]), jnp.asarray(counted[rows])),
            len(tokens),
            batch,
        )
    )
