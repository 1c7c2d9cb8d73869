"""The likelihood of LaDiff: log p(z) by the prior's probability-flow ODE, and with the decoder a bound on log p(x) (METHOD section 6).

The instantaneous change of variables (FFJORD, arXiv 1810.01367; score SDE, arXiv 2011.13456, appendix D):
log p_a(z_a) = log N(z_1; 0, I) + int_a^1 div v(z_t, t) dt along dz_t/dt = v = alpha' z_hat + sigma' eps_hat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion import gaussian, masking
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import content_mask

Array = jax.Array
CleanPrediction = Callable[[Array, Array], Array]  # (z_t [B, N, D], t [B]) -> z_hat [B, N, D]

MAX_STEPS = 4096


class LogDensity(NamedTuple):
    """log p at the point given, in nats `[B]`; where the trajectory ends at t = 1, `[B, N, D]`; the steps that it took `[B]`."""

    log_p: Array
    noise: Array
    steps: Array


def clean_prediction(
    denoise: Callable[[Array, Array, Array], Array], self_conditioning: str = "current"
) -> CleanPrediction:
    """A clean prediction that depends on (z_t, t) alone, as an ODE's vector field must.

    `denoise(z_t, t, self_condition)`. Self-conditioning "none" feeds zeros; "current" the prediction at the same point and
    time (two calls). The sampler's "previous" depends on the steps taken before, so it defines no vector field.

    Raises:
      ValueError: another self-conditioning.
    """
    if self_conditioning == "none":
        return lambda z_t, t: denoise(z_t, t, jnp.zeros_like(z_t))
    if self_conditioning == "current":
        return lambda z_t, t: denoise(z_t, t, denoise(z_t, t, jnp.zeros_like(z_t)))
    raise ValueError(
        f"self-conditioning is {self_conditioning!r}; a vector field needs 'current' or 'none'"
    )


def log_density(
    predict: CleanPrediction,
    schedule: gaussian.Schedule,
    z: Array,
    keys: Array,
    *,
    t_min: float = 0.0,
    rtol: float = 1e-4,
    atol: float = 1e-4,
    divergence: str = "hutchinson",
) -> LogDensity:
    """log p_{t_min}(z) in nats of points `z [B, N, D]` at time t_min, by Tsitouras' adaptive Runge-Kutta 5(4); to be jitted.

    The curve is followed in the angle, dz/dtheta = v / theta' = (alpha z_t - z_hat) / sigma, from theta(t_min) to pi/2: the
    same integral as in t, and none of it is lost where a schedule's theta' is infinite. At t = 1 sigma = 1 and nothing is
    singular. At t -> 0 sigma -> 0: for an exact denoiser the quotient has a limit, a network's error is divided by sigma and
    the integral of its divergence grows without bound. t_min is the floor: the density is that of the latent with the
    noise of t_min, and `z` must be such a latent (alpha z + sigma eps).

    Every sample has its own step sizes and its own key, so it depends neither on the batch nor on the devices.

    Args:
      keys: `[B]`; each draws the one Rademacher vector of Hutchinson's estimate e^T J e of its sample's divergence.
      divergence: "hutchinson", or "exact": the trace, by N D forward derivatives.

    Raises:
      ValueError: unknown divergence, or t_min outside [0, 1).
    """
    if divergence not in ("hutchinson", "exact"):
        raise ValueError(f"divergence is {divergence!r}; it must be 'hutchinson' or 'exact'")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min is {t_min}; it must be in [0, 1)")
    start = schedule.angle(jnp.float32(t_min))

    def field(theta: Array, z_t: Array) -> Array:
        # At theta = 0 exactly the quotient is 0/0; a tenth of a milliradian above, it is its limit to float32.
        theta = jnp.maximum(theta, 1e-4)
        z_hat = predict(z_t[None], schedule.time_of_angle(theta)[None])[0]
        return (jnp.cos(theta) * z_t - z_hat) / jnp.sin(theta)

    def one(z: Array, key: Array) -> LogDensity:
        probe = jax.random.rademacher(key, z.shape, z.dtype)

        def rates(theta: Array, state: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
            at = functools.partial(field, theta)
            if divergence == "hutchinson":
                dz, change = jax.jvp(at, (state[0],), (probe,))
                return dz, jnp.sum(probe * change)
            basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
            diagonal = jax.vmap(lambda e: jnp.sum(e * jax.jvp(at, (state[0],), (e,))[1]))(basis)
            return at(state[0]), diagonal.sum()

        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            diffrax.Tsit5(),
            start,
            jnp.float32(0.5 * jnp.pi),
            None,
            (z, jnp.zeros((), z.dtype)),
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
            max_steps=MAX_STEPS,
            throw=False,
        )
        noise, integral = (value[-1] for value in solution.ys)
        normal = -0.5 * jnp.sum(jnp.square(noise)) - 0.5 * z.size * math.log(2 * math.pi)
        done = solution.result == diffrax.RESULTS.successful
        return LogDensity(
            jnp.where(done, normal + integral, jnp.nan), noise, solution.stats["num_steps"]
        )

    with jax.numpy_rank_promotion("allow"):  # inside diffrax
        return jax.vmap(one)(z, keys)


def entropy_of_noise(schedule: gaussian.Schedule, t: float, size: int) -> float:
    """Entropy in nats of `size` coordinates of noise of deviation sigma(t): size/2 log(2 pi e sigma^2)."""
    return (
        0.5
        * size
        * (math.log(2 * math.pi * math.e) + 2 * math.log(float(schedule.sigma(jnp.float32(t)))))
    )


def likelihood_bound(
    predict: CleanPrediction,
    decoder_logits: Callable[[Array, Array], Array],
    schedule: gaussian.Schedule,
    latents: np.ndarray,
    tokens: np.ndarray,
    key: Array,
    tokenizer: Tokenizer,
    *,
    t_min: float,
    draws: int,
    batch: int,
    rtol: float = 1e-3,
    atol: float = 1e-3,
) -> dict[str, Estimate]:
    """LaDiff's bound on -log p(x), on rows `tokens [n, L]` with their standardized latents `[n, N, D]`.

    The model drawn from runs the ODE from N(0, I) down to t_min and decodes the z' it finds there; the encoder is
    q(z' | x) = N(alpha z, sigma^2 I) at t_min. Then, with one z' a row,

      -log p(x) <= E_q[ masked bound of the decoder given z' ] - E_q[ log p_{t_min}(z') ] - entropy of q,

    a bound for every t_min > 0: a small one costs the prior many nats (a sharp q), a large one the decoder. The log-densities
    alone are no bound, for a density has no unit and a deterministic encoder no entropy; the paper drops that last term.

    Returns:
      `bound_ppl`, the perplexity of the whole bound per token of text; `nats`, the same in nats per token; and its three terms
      in nats per token: `decoder_nats`, `prior_nats` (-log p), `entropy_nats` (subtracted).

    Raises:
      ValueError: t_min is 0, or the integration of some row needs more than MAX_STEPS steps.
    """
    if not 0 < t_min < 1:
        raise ValueError(
            f"t_min is {t_min}; it must be above 0 and below 1: without noise the encoder has no entropy"
        )
    allowed = jnp.asarray(tokenizer.sampleable)

    @jax.jit
    def measure(z: Array, rows: Array, indices: Array) -> tuple[Array, Array]:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(indices)
        eps = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys[:, 0])
        noisy = gaussian.diffuse(schedule, z, eps, jnp.float32(t_min))
        found = log_density(predict, schedule, noisy, keys[:, 1], t_min=t_min, rtol=rtol, atol=atol)
        length = rows.shape[1]

        def decoded(draw: Array) -> Array:
            pairs = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, draw)))(keys[:, 2])
            count = jax.vmap(lambda k: jax.random.randint(k, (), 1, length + 1))(pairs[:, 0])
            x_t = jax.vmap(
                lambda k, row, c: masking.mask_exactly(k, row[None], c[None], tokenizer.mask_id)[0]
            )(pairs[:, 1], rows, count)
            nll, _ = masking.token_nll(decoder_logits(x_t, noisy), rows, allowed)
            return jnp.sum(nll * (x_t == tokenizer.mask_id), axis=-1) * length / count

        return jax.lax.map(decoded, jnp.arange(draws)).mean(axis=0), -found.log_p

    n, parts = len(tokens), []
    batch = min(batch, n)
    for first in range(0, n, batch):
        index = np.arange(first, first + batch)
        rows = index % n
        found = jax.device_get(
            measure(jnp.asarray(latents[rows]), jnp.asarray(tokens[rows]), jnp.asarray(index))
        )
        parts.append([part[: min(batch, n - first)] for part in found])
    decoder, prior = (np.concatenate(part).astype(np.float64) for part in zip(*parts, strict=True))
    if not np.isfinite(prior).all():
        raise ValueError(
            f"the probability-flow ODE of {int((~np.isfinite(prior)).sum())} rows needs more than {MAX_STEPS} steps; raise rtol and atol (now {rtol}, {atol}) or t_min ({t_min})"
        )
    entropy = np.full(n, entropy_of_noise(schedule, t_min, int(np.prod(latents.shape[1:]))))
    length = np.asarray(content_mask(tokens, tokenizer.eot_id)).sum(axis=1).astype(np.float64)
    total = decoder + prior - entropy
    terms = {"nats": total, "decoder_nats": decoder, "prior_nats": prior, "entropy_nats": entropy}
    return {"bound_ppl": intervals.ratio_exp(total, length)} | {
        name: intervals.ratio(value, length) for name, value in terms.items()
    }
