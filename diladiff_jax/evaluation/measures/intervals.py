"""Measured values with 95% confidence intervals over samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypedDict

import numpy as np
import scipy.stats

_LEVEL = 0.95
_Z = float(scipy.stats.norm.ppf(0.5 + 0.5 * _LEVEL))


class Estimate(TypedDict):
    """A `value` with its 95% interval [`low`, `high`]."""

    value: float
    low: float
    high: float


def proportion(hits: np.ndarray) -> Estimate:
    """The proportion of independent yes/no outcomes `[n]`, with Wilson's score interval.

    Unlike the normal approximation, this interval keeps its coverage near 0 and 1.
    """
    count, n = int(np.sum(hits)), len(hits)
    interval = scipy.stats.binomtest(count, n).proportion_ci(_LEVEL, method="wilson")
    value = count / n
    return Estimate(
        value=value, low=min(value, float(interval.low)), high=max(value, float(interval.high))
    )


def bootstrap(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """A statistic of samples, with its percentile bootstrap interval.

    If the samples do not differ, the interval has no width: they are too few to say anything, and
    reports print "too few texts" in its place.

    Args:
      statistic: called as `statistic(*samples, axis=-1)`; reduces that axis of each array.
      *samples: arrays `[n]`, resampled jointly: the values of one sample stay together.
      resamples: number of bootstrap resamples.
      seed: of the resampling.
    """
    value = float(statistic(*samples, axis=-1))
    if len(samples[0]) < 2:  # SciPy rejects a single sample, whose every resample is itself
        return Estimate(value=value, low=value, high=value)
    interval = scipy.stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=_LEVEL,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Estimate(value=value, low=float(interval.low), high=float(interval.high))


def mean(values: np.ndarray) -> Estimate:
    """The mean of one number per sample `[n]`, with its bootstrap interval."""
    return bootstrap(np.mean, values)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """Sum of numerators over sum of denominators, of samples `[n]`, with its bootstrap interval."""
    return bootstrap(_ratio_of_sums, numerator, denominator)


def ratio_exp(numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """exp(`ratio`): of negative log-likelihoods over token counts, a token-weighted perplexity."""
    return bootstrap(
        lambda top, bottom, axis: np.exp(_ratio_of_sums(top, bottom, axis)), numerator, denominator
    )


def _ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, axis: int) -> np.ndarray:
    return numerator.sum(axis=axis) / np.maximum(denominator.sum(axis=axis), 1e-12)


def jackknife(
    statistic: Callable[[np.ndarray], float],
    count: int,
    *,
    groups: int = 20,
    seed: int = 0,
    low: float = -math.inf,
    high: float = math.inf,
) -> Estimate:
    """A statistic with its delete-a-group jackknife interval.

    For statistics that repeated samples would bias, such as the number of distinct n-grams or the
    distance of a histogram, which rules out the bootstrap. The interval is the value +- 1.96
    standard errors, sqrt((g - 1) / g sum (theta_(-i) - mean)^2), clipped to [low, high].

    Args:
      statistic: takes the indices of the samples that are kept.
      count: number of samples.
      groups: g, the number of random groups of nearly equal size.
      seed: of the grouping.
      low: smallest possible value of the statistic.
      high: largest possible value of the statistic.

    Raises:
      ValueError: `count` is below 2.
    """
    value = float(statistic(np.arange(count)))
    order = np.random.default_rng(seed).permutation(count)
    parts = [part for part in np.array_split(order, min(groups, count)) if 0 < len(part) < count]
    if len(parts) < 2:
        raise ValueError(f"count of samples for a jackknife: got {count}, expected at least 2")
    left = np.array([statistic(np.setdiff1d(np.arange(count), part)) for part in parts])
    error = math.sqrt((len(parts) - 1) / len(parts) * float(np.square(left - left.mean()).sum()))
    return Estimate(
        value=value, low=max(low, value - _Z * error), high=min(high, value + _Z * error)
    )
