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
    return Estimate(
        value=p, low=min(p, max(0.0, center - half)), high=max(p, min(1.0, center + half))
    )


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], count: int, *, draws: int = 1000, seed: int = 0
) -> Estimate:
    """Percentile bootstrap of a statistic of `count` samples.

    Args:
      statistic: takes sample indices `[draws, count]`, returns the statistic of each row, `[draws]`.
    """
    resampled = statistic(np.random.default_rng(seed).integers(0, count, (draws, count)))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(
        value=float(statistic(np.arange(count)[None])[0]), low=float(low), high=float(high)
    )


def mean(values: np.ndarray) -> Estimate:
    """The mean of one number per sample `[n]`, with its bootstrap interval."""
    return bootstrap(lambda index: values[index].mean(axis=1), len(values))


def ratio_exp(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """exp(sum of numerators / sum of denominators) over samples `[n]`: a perplexity weighted by tokens."""
    return bootstrap(
        lambda index: np.exp(numerator[index].sum(axis=1) / denominator[index].sum(axis=1)),
        len(numerator),
    )


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Sum of numerators / sum of denominators over samples `[n]`; samples are drawn whole, so that both move together."""
    return bootstrap(
        lambda index: (
            numerator[index].sum(axis=1) / np.maximum(denominator[index].sum(axis=1), 1e-12)
        ),
        len(numerator),
    )


def jackknife(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: int = 20,
    seed: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Estimate:
    """Delete-a-group jackknife of a statistic that a repeated sample would mislead (distinct n-grams, a histogram's distance).

    `statistic` takes the indices that are kept. The groups are random and of equal size, but for one; the interval is the
    value +- 1.96 standard errors, sqrt((g - 1) / g sum (theta_(-i) - mean)^2), within [low, high].

    Raises:
      ValueError: fewer than two samples.
    """
    value = float(statistic(np.arange(count)))
    parts = [
        part
        for part in np.array_split(
            np.random.default_rng(seed).permutation(count), min(groups, count)
        )
        if len(part) < count
    ]
    if len(parts) < 2:
        raise ValueError(f"a jackknife of {count} samples has no interval; it needs at least 2")
    left = np.array([statistic(np.setdiff1d(np.arange(count), part)) for part in parts])
    error = math.sqrt((len(parts) - 1) / len(parts) * float(np.square(left - left.mean()).sum()))
    return Estimate(
        value=value, low=max(low, value - _Z * error), high=min(high, value + _Z * error)
    )
