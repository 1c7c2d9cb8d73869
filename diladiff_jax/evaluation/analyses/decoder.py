"""What the decoder does with its latent: figures 7, 8, 10, 11 and 12 of the paper, from a trained model and held-out rows.

All estimates have intervals over rows; `analyses.analyse` runs them on one workdir.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from diladiff_jax.diffusion import gaussian, masking
from diladiff_jax.evaluation.figures import Figure, Table, figure, series, table
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import LogitsOf, content_mask
from diladiff_jax.evaluation.sweep import Trained

Array = jax.Array

# Masked counts: figures 7, 8, 10


@dataclasses.dataclass(frozen=True)
class ByCount:
    """Sums over the masked positions of text, per masked count and row, `[C, n]`: -log p in nats, recovered tokens, and how many."""

    nll: np.ndarray
    right: np.ndarray
    masked: np.ndarray

    def loss(self, i: int) -> Estimate:
        """-log p per masked token at count i, in nats."""
        return intervals.ratio(self.nll[i], self.masked[i])

    def recovery(self, i: int) -> Estimate:
        """Share of the masked tokens recovered at count i."""
        return intervals.ratio(self.right[i], self.masked[i])


def by_masked_count(
    logits_of: LogitsOf,
    params: Any,
    tokens: np.ndarray,
    key: Array,
    mask_id: int,
    eot_id: int,
    sampleable: np.ndarray,
    counts: Sequence[int],
    *,
    condition: np.ndarray | None = None,
    draws: int = 1,
    batch: int,
) -> ByCount:
    """Loss and recovery on rows `[n, L]` with exactly `counts` of their L positions masked, over `draws` random subsets of each.

    Arguments as in `likelihood.bound_and_recovery`. Masks fall on fill too, which is not counted.
    """
    allowed, grid = jnp.asarray(sampleable), jnp.repeat(jnp.asarray(counts, jnp.int32), draws)

    @jax.jit
    def measure(
        params: Any, rows: Array, given: Array | None, key: Array
    ) -> tuple[Array, Array, Array]:
        text = content_mask(rows, eot_id)

        def draw(task: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            key, count = task
            x_t = masking.mask_exactly(key, rows, jnp.full(rows.shape[:1], count), mask_id)
            nll, right = masking.token_nll(logits_of(params, x_t, given), rows, allowed)
            masked = (x_t == mask_id) & text
            return (
                (jnp.where(masked, nll, 0.0)).sum(axis=-1),
                (right * masked).sum(axis=-1),
                masked.sum(axis=-1),
            )

        return jax.lax.map(draw, (jax.random.split(key, len(grid)), grid))

    n, parts = len(tokens), []
    batch = min(batch, n)
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n
        given = None if condition is None else jnp.asarray(condition[rows])
        found = jax.device_get(
            measure(params, jnp.asarray(tokens[rows]), given, jax.random.fold_in(key, first))
        )
        parts.append([part[:, : min(batch, n - first)] for part in found])
    sums = (
        np.concatenate(part, axis=1).astype(np.float64).reshape(len(counts), draws, n).sum(axis=1)
        for part in zip(*parts, strict=True)
    )
    return ByCount(*sums)


def count_bins(length: int, bins: int = 8) -> list[int]:
    """Masked counts that spread over 1 to L, both among them."""
    return sorted({max(1, round(length * i / bins)) for i in range(1, bins + 1)} | {1})


def recovery_by_ratio(
    model: Trained, rows: np.ndarray, latents: np.ndarray, *, draws: int = 4, seed: int = 0
) -> list[Figure]:
    """Figure 7: loss and recovery against the masking ratio, without a latent, with the row's own, and with noise for one."""
    counts = count_bins(model.length)
    x = [c / model.length for c in counts]
    noise = np.asarray(
        jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), latents.shape)
    )
    found = {
        "decoder, own latent": _decoder_by_count(model, rows, latents, counts, draws, seed),
        "decoder, noise for a latent": _decoder_by_count(model, rows, noise, counts, draws, seed),
    }
    if model.has("mdlm"):
        denoiser = model.networks.denoiser
        logits_of: LogitsOf = lambda params, x_t, _: denoiser.apply({"params": params}, x_t)
        found["MDLM"] = _by_count(
            model, logits_of, model.trained("mdlm"), rows, None, counts, draws, seed
        )
    loss = [series(name, x, [f.loss(i) for i in range(len(counts))]) for name, f in found.items()]
    recovery = [
        series(name, x, [f.recovery(i) for i in range(len(counts))]) for name, f in found.items()
    ]
    note = f"{len(rows)} held-out rows, {draws} masks of each exact count"
    return [
        figure(
            "loss_by_ratio",
            "figure 7",
            "Loss against masking ratio",
            "masking ratio",
            "-log p per masked token (nats)",
            loss,
            note,
        ),
        figure(
            "recovery_by_ratio",
            "figure 7",
            "Recovery against masking ratio",
            "masking ratio",
            "share of masked tokens recovered",
            recovery,
            note,
        ),
    ]


def _by_count(
    model: Trained,
    logits_of: LogitsOf,
    params: Any,
    rows: np.ndarray,
    latents: np.ndarray | None,
    counts: Sequence[int],
    draws: int,
    seed: int,
) -> ByCount:
    t = model.tokenizer
    return by_masked_count(
        logits_of,
        params,
        rows,
        jax.random.key(seed),
        t.mask_id,
        t.eot_id,
        t.sampleable,
        counts,
        condition=latents,
        draws=draws,
        batch=model.config.sampling.batch,
    )


def _decoder_by_count(
    model: Trained,
    rows: np.ndarray,
    latents: np.ndarray,
    counts: Sequence[int],
    draws: int,
    seed: int,
) -> ByCount:
    decoder = model.networks.decoder
    logits_of: LogitsOf = lambda params, x_t, z: decoder.apply({"params": params}, x_t, z)
    return _by_count(
        model,
        logits_of,
        model.trained("autoencoder")["decoder"],
        rows,
        latents,
        counts,
        draws,
        seed,
    )


def attention_share(
    decoder: Any,
    params: Any,
    rows: np.ndarray,
    latents: np.ndarray,
    mask_id: int,
    eot_id: int,
    counts: Sequence[int],
    *,
    seed: int = 0,
) -> Figure:
    """Figure 8: the norm of the cross-attention's update over that of the self-attention after it, per layer and masking ratio.

    Norms are over the positions of text and the width of one row `[L, D]`; the updates are read from the decoder's "intermediates".
    """
    text = jnp.asarray(content_mask(rows, eot_id))
    layers = sorted(set(decoder.cross_layers))

    @jax.jit
    def ratios(params: Any, key: Array, count: Array) -> dict[int, Array]:
        x_t = masking.mask_exactly(key, jnp.asarray(rows), jnp.full(len(rows), count), mask_id)
        kept = decoder.apply(
            {"params": params}, x_t, jnp.asarray(latents), mutable=["intermediates"]
        )[1]["intermediates"]

        def norm(update: Array) -> Array:
            return jnp.sqrt(
                jnp.sum(jnp.square(update.astype(jnp.float32)) * text[..., None], axis=(1, 2))
            )

        return {
            i: norm(kept[f"cross_{i}"]["update"][0])
            / jnp.maximum(norm(kept["backbone"][f"block_{i}"]["attention_update"][0]), 1e-12)
            for i in layers
        }

    found = [
        jax.device_get(ratios(params, jax.random.fold_in(jax.random.key(seed), c), c))
        for c in counts
    ]
    x = [c / rows.shape[1] for c in counts]
    lines = [
        series(f"layer {i}", x, [intervals.mean(at[i].astype(np.float64)) for at in found])
        for i in layers
    ]
    return figure(
        "attention_share",
        "figure 8",
        "Cross-attention beside self-attention",
        "masking ratio",
        "norm of the cross-attention's update / the self-attention's",
        lines,
        f"{len(rows)} held-out rows; above 1 the latent says more than the text around",
    )


# The decoder under latent noise: figures 10, 11, 12


@dataclasses.dataclass(frozen=True)
class Omega:
    """omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2: the decoding error rate at the noise angle pi u / 2."""

    w0: float
    w1: float
    k: float
    t0: float

    def __call__(self, u: Any) -> np.ndarray:
        return self.w0 + (self.w1 - self.w0) * 0.5 * (
            1 + np.tanh(self.k * (np.asarray(u, np.float64) - self.t0))
        )

    def schedule(self) -> gaussian.EmpiricalSchedule:
        """Its inverse as a schedule; a k too steep for equal steps is lowered to the steepest that is not."""
        return gaussian.EmpiricalSchedule(
            min(self.k, gaussian.MAX_STEEPNESS / max(self.t0, 1 - self.t0)), self.t0
        )


def fit_omega(u: np.ndarray, error: np.ndarray) -> Omega:
    """Least squares of omega to error rates at u in [0, 1], `[m]` each; k in (0, 50], t0 in [0.02, 0.98].

    Raises:
      ValueError: fewer than five points, for four numbers.
    """
    u, error = np.asarray(u, np.float64), np.asarray(error, np.float64)
    if len(u) < 5:
        raise ValueError(f"omega has four numbers and {len(u)} points to fit; it needs at least 5")
    middle = u[np.argmin(np.abs(error - 0.5 * (error.min() + error.max())))]

    def residual(p: np.ndarray) -> np.ndarray:
        return Omega(*p)(u) - error

    bounds = ([-1.0, -1.0, 1e-2, 0.02], [2.0, 2.0, 50.0, 0.98])
    starts = [[error[0], error[-1], k, np.clip(middle, 0.05, 0.95)] for k in (3.0, 10.0)]
    return Omega(
        *min(
            (scipy.optimize.least_squares(residual, s, bounds=bounds) for s in starts),
            key=lambda r: r.cost,
        ).x.tolist()
    )


def noisy_latents(latents: np.ndarray, u: float, seed: int = 0) -> np.ndarray:
    """cos(pi u / 2) z + sin(pi u / 2) eps: the latent at a noise angle, whatever the schedule."""
    eps = np.random.default_rng([seed, round(1e6 * u)]).normal(size=latents.shape)
    return (math.cos(0.5 * math.pi * u) * latents + math.sin(0.5 * math.pi * u) * eps).astype(
        np.float32
    )


def decoding_error(
    model: Trained,
    rows: np.ndarray,
    latents: np.ndarray,
    levels: Sequence[float],
    shares: Sequence[float] = (1.0,),
    *,
    seed: int = 0,
) -> list[ByCount]:
    """Loss and recovery given each row's latent at each noise angle pi u / 2, `[levels, n]`: one for each share of masked positions."""
    counts = [max(1, round(share * model.length)) for share in shares]
    noisy = np.concatenate([noisy_latents(latents, u, seed) for u in levels])
    found = _decoder_by_count(model, np.tile(rows, (len(levels), 1)), noisy, counts, 1, seed)
    sums = (
        getattr(found, name).reshape(len(counts), len(levels), len(rows))
        for name in ("nll", "right", "masked")
    )
    return [ByCount(*parts) for parts in zip(*sums, strict=True)]


def robustness(
    model: Trained,
    rows: np.ndarray,
    latents: np.ndarray,
    *,
    bins: int = 10,
    refits: int = 40,
    seed: int = 0,
) -> tuple[list[Figure], list[Table]]:
    """Figures 10, 11 and 12: recovery against latent noise; the fit of omega to the error; its inverse as a schedule."""
    levels = np.linspace(0, 1, bins + 1)
    sigma = np.sin(0.5 * np.pi * levels)
    note = f"{len(rows)} held-out rows; the noise is variance preserving, sigma = 1 is no latent at all"
    shares = (1.0, 0.5)
    found = decoding_error(model, rows, latents, levels.tolist(), shares, seed=seed)
    whole = found[0]
    lines = [
        series(f"{share:.0%} masked", sigma, [f.recovery(i) for i in range(len(levels))])
        for share, f in zip(shares, found, strict=True)
    ]
    figures = [
        figure(
            "robustness",
            "figure 10",
            "Decoder under latent noise",
            "noise level sigma of the latent",
            "share of masked tokens recovered",
            lines,
            note,
        )
    ]

    error = [_complement(whole.recovery(i)) for i in range(len(levels))]
    fitted = fit_omega(levels, np.array([e["value"] for e in error]))
    fine = np.linspace(0, 1, 101)
    figures.append(
        figure(
            "decoding_error",
            "figure 11",
            "Decoding error against noise, and the fit of omega",
            "u = angle of the noise / (pi / 2)",
            "share of tokens decoded wrongly in one step",
            [series("measured", levels, error), series("omega(u)", fine, fitted(fine).tolist())],
            note,
        )
    )
    schedule = fitted.schedule()
    u = np.asarray(schedule.angle(jnp.asarray(fine, jnp.float32)), np.float64) * 2 / np.pi
    figures.append(
        figure(
            "reparameterization",
            "figure 12",
            "Time in which the decoding error grows linearly",
            "time t",
            "u(t), and the error there",
            [series("u(t)", fine, u.tolist()), series("omega(u(t))", fine, fitted(u).tolist())],
            f"as a schedule: diffusion.schedule = empirical, diffusion.k = {schedule.k:.3g}, diffusion.t0 = {schedule.t0:.3g}",
        )
    )
    draws = np.random.default_rng(seed).integers(0, len(rows), (refits, len(rows)))
    refitted = np.array(
        [
            dataclasses.astuple(
                fit_omega(
                    levels, 1 - whole.right[:, i].sum(axis=1) / whole.masked[:, i].sum(axis=1)
                )
            )
            for i in draws
        ]
    )
    low, high = np.quantile(refitted, [0.025, 0.975], axis=0)
    values = [
        [name, float(getattr(fitted, name)), float(low[i]), float(high[i])]
        for i, name in enumerate(("w0", "w1", "k", "t0"))
    ]
    return figures, [
        table(
            "omega",
            "figure 11",
            "omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2",
            ("number", "value", "low", "high"),
            values,
            f"bootstrap of {refits} refits over rows",
        )
    ]


def _complement(e: Estimate) -> Estimate:
    return Estimate(value=1 - e["value"], low=1 - e["high"], high=1 - e["low"])
