"""The decoder under latent noise, and the schedule that follows from it: figures 10, 11 and 12."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.optimize

from diladiff_jax.diffusion import gaussian
from diladiff_jax.evaluation.analyses.masked_counts import CountSums, Masks, decoder_by_count
from diladiff_jax.evaluation.figures import (
    Figure,
    Findings,
    Table,
    figure,
    linear,
    series,
    table,
)
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.model import Model

_SHARES = (1.0, 0.5)  # of the positions masked; the error of figures 11 and 12 is the first one's


@dataclasses.dataclass(frozen=True)
class Omega:
    """The decoding error rate at the noise angle pi u / 2.

    omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2.
    """

    w0: float
    w1: float
    k: float
    t0: float

    def __call__(self, u: Any) -> np.ndarray:
        """omega at u, of any shape."""
        rise = 1 + np.tanh(self.k * (np.asarray(u, np.float64) - self.t0))
        return self.w0 + (self.w1 - self.w0) * 0.5 * rise

    def schedule(self) -> gaussian.EmpiricalSchedule:
        """The inverse of omega as a schedule; a k too steep for float32 is lowered to the limit."""
        steepest = gaussian.MAX_STEEPNESS / max(self.t0, 1 - self.t0)
        return gaussian.EmpiricalSchedule(min(self.k, steepest), self.t0)


def fit_omega(u: np.ndarray, error: np.ndarray) -> Omega:
    """Fits omega to error rates by least squares, with k in (0, 50] and t0 in [0.02, 0.98].

    Args:
      u: noise levels in [0, 1], `[m]`.
      error: error rates there, `[m]`.

    Raises:
      ValueError: fewer than five points, since omega has four parameters.
    """
    u, error = np.asarray(u, np.float64), np.asarray(error, np.float64)
    if len(u) < 5:
        raise ValueError(f"fit of omega: got {len(u)} points, expected at least 5.")
    middle = u[np.argmin(np.abs(error - 0.5 * (error.min() + error.max())))]

    def residual(parameters: np.ndarray) -> np.ndarray:
        return Omega(*parameters)(u) - error

    bounds = ([-1.0, -1.0, 1e-2, 0.02], [2.0, 2.0, 50.0, 0.98])
    starts = [[error[0], error[-1], k, np.clip(middle, 0.05, 0.95)] for k in (3.0, 10.0)]
    fits = [scipy.optimize.least_squares(residual, start, bounds=bounds) for start in starts]
    return Omega(*min(fits, key=lambda fit: fit.cost).x.tolist())


def noisy_latents(latents: np.ndarray, u: float, seed: int = 0) -> np.ndarray:
    """Latents at the noise angle pi u / 2 of any schedule: cos(pi u / 2) z + sin(pi u / 2) eps."""
    eps = np.random.default_rng([seed, round(1e6 * u)]).normal(size=latents.shape)
    angle = 0.5 * math.pi * u
    return (math.cos(angle) * latents + math.sin(angle) * eps).astype(np.float32)


def decoding_error(
    model: Model,
    rows: np.ndarray,
    latents: np.ndarray,
    levels: Sequence[float],
    shares: Sequence[float] = (1.0,),
    *,
    seed: int = 0,
) -> list[CountSums]:
    """Loss and recovery of the decoder given noisy latents.

    Args:
      model: the workdir's models.
      rows: held-out rows `[n, L]`.
      latents: their latents `[n, N, D_lat]`.
      levels: noise levels u; the noise angle is pi u / 2.
      shares: shares of positions masked.
      seed: of noise and masks.

    Returns:
      For each share, sums `[levels, n]`.
    """
    counts = [max(1, round(share * model.length)) for share in shares]
    noisy = np.concatenate([noisy_latents(latents, u, seed) for u in levels])
    tiled = np.tile(rows, (len(levels), 1))
    found = decoder_by_count(model, tiled, noisy, Masks(counts, 1, seed))
    shape = (len(counts), len(levels), len(rows))
    sums = (part.reshape(shape) for part in (found.nll, found.right, found.masked))
    return [CountSums(*parts) for parts in zip(*sums, strict=True)]


def robustness(
    model: Model,
    rows: np.ndarray,
    latents: np.ndarray,
    *,
    bins: int = 10,
    refits: int = 40,
    seed: int = 0,
) -> Findings:
    """Figures 10, 11 and 12: recovery under noise, the fit of omega, and its inverse as a schedule.

    Args:
      model: the workdir's models.
      rows: held-out rows `[n, L]`.
      latents: their latents `[n, N, D_lat]`.
      bins: number of noise levels, besides 0.
      refits: bootstrap refits of omega.
      seed: of noise, masks and bootstrap.
    """
    levels = np.linspace(0, 1, bins + 1)
    found = decoding_error(model, rows, latents, levels.tolist(), _SHARES, seed=seed)
    error = [_complement(found[0].recovery(i)) for i in range(len(levels))]
    fitted = fit_omega(levels, np.array([e["value"] for e in error]))
    note = (
        f"{len(rows)} held-out rows; the noise preserves variance,"
        " so that sigma = 1 leaves nothing of the latent"
    )
    lines = [
        series(
            f"{share:.0%} masked",
            np.sin(0.5 * np.pi * levels),
            [sums.recovery(i) for i in range(len(levels))],
        )
        for share, sums in zip(_SHARES, found, strict=True)
    ]
    figures = [
        figure(
            "robustness",
            "figure 10",
            "Decoder under latent noise",
            linear("noise level sigma of the latent"),
            linear("share of masked tokens recovered"),
            lines,
            note,
        ),
        *_fit_figures(levels, error, fitted, note),
    ]
    return Findings(figures, [_fit_table(levels, found[0], fitted, refits, seed)])


def _fit_figures(
    levels: np.ndarray, error: Sequence[Estimate], fitted: Omega, note: str
) -> list[Figure]:
    fine = np.linspace(0, 1, 101)
    schedule = fitted.schedule()
    u = np.asarray(schedule.angle(jnp.asarray(fine, jnp.float32)), np.float64) * 2 / np.pi
    return [
        figure(
            "decoding_error",
            "figure 11",
            "Decoding error against noise, and the fit of omega",
            linear("u = angle of the noise / (pi / 2)"),
            linear("share of tokens decoded wrongly in one step"),
            [series("measured", levels, error), series("omega(u)", fine, fitted(fine).tolist())],
            note,
        ),
        figure(
            "reparameterization",
            "figure 12",
            "Time in which the decoding error grows linearly",
            linear("time t"),
            linear("u(t), and the error there"),
            [series("u(t)", fine, u.tolist()), series("omega(u(t))", fine, fitted(u).tolist())],
            f"as a schedule: diffusion.schedule = empirical, diffusion.k = {schedule.k:.3g},"
            f" diffusion.t0 = {schedule.t0:.3g}",
        ),
    ]


def _fit_table(levels: np.ndarray, sums: CountSums, fitted: Omega, refits: int, seed: int) -> Table:
    """The parameters of omega, with bootstrap intervals over rows."""
    count = sums.right.shape[1]
    resampled = np.random.default_rng(seed).integers(0, count, (refits, count))
    errors = [1 - sums.right[:, i].sum(axis=1) / sums.masked[:, i].sum(axis=1) for i in resampled]
    refitted = np.array([dataclasses.astuple(fit_omega(levels, error)) for error in errors])
    low, high = np.quantile(refitted, [0.025, 0.975], axis=0)
    return table(
        "omega",
        "figure 11",
        "omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2",
        ("parameter", "value", "low", "high"),
        [
            [name, float(value), float(low[i]), float(high[i])]
            for i, (name, value) in enumerate(dataclasses.asdict(fitted).items())
        ],
        f"bootstrap over rows, {refits} refits",
    )


def _complement(e: Estimate) -> Estimate:
    return Estimate(value=1 - e["value"], low=1 - e["high"], high=1 - e["low"])
