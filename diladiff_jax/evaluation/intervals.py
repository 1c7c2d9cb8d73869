"""A measured value with its 95% interval over samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import numpy as np

_Z = 1.959964  # two-sided 95%


class Estimate(TypedDict):
    """`value` with the 95% interval [`low`, `high`]."""

    value: float
    low: float
    high: float


def share(hits: np.ndarray) -> Estimate:
    """A proportion of independent yes/no outcomes `[n]` with Wilson's score interval, honest at 0 and 1 too."""
    n, p = len(hits), float(np.mean(hits))
    center = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(value=p, low=min(p, max(0.0, center - half)), high=max(p, min(1.0, center + half)))


def bootstrap(statistic: Callable[[np.ndarray], np.ndarray], count: int, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Percentile bootstrap of a statistic of `count` samples.

    Args:
      statistic: takes sample indices `[draws, count]`, returns the statistic of each row, `[draws]`.
    """
    resampled = statistic(np.random.default_rng(seed).integers(0, count, (draws, count)))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(value=float(statistic(np.arange(count)[None])[0]), low=float(low), high=float(high))


def mean(values: np.ndarray) -> Estimate:
    """The mean of one number per sample `[n]`, with its bootstrap interval."""
    return bootstrap(lambda index: values[index].mean(axis=1), len(values))


def ratio_exp(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """exp(sum of numerators / sum of denominators) over samples `[n]`: a perplexity weighted by tokens."""
    return bootstrap(lambda index: np.exp(numerator[index].sum(axis=1) / denominator[index].sum(axis=1)), len(numerator))
