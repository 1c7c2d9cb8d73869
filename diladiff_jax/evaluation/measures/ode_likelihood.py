"""LaDiff's likelihood: log p(z) by the prior's probability-flow ODE, and a bound on log p(x).

The instantaneous change of variables (FFJORD, arXiv 1810.01367; score SDE, arXiv 2011.13456,
appendix D) along dz_t/dt = v = alpha' z_hat + sigma' eps_hat gives

  log p_a(z_a) = log N(z_1; 0, I) + int_a^1 div v(z_t, t) dt.

The decoder's masked bound turns it into a bound on log p(x).
"""

from __future__ import annotations

import dataclasses
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
from diladiff_jax.evaluation.measures.batches import map_batches
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import content_length

Array = jax.Array
CleanPrediction = Callable[[Array, Array], Array]
"""`(z_t [B, N, D], t [B]) -> z_hat [B, N, D]`."""

MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Tolerances of the ODE solver's steps, relative and absolute."""

    rtol: float = 1e-3
    atol: float = 1e-3


class LogDensity(NamedTuple):
    """log p at the given points, with the trajectories that it was integrated along.

    Attributes:
      log_p: in nats, `[B]`; NaN where the integration needs more than `MAX_STEPS` steps.
      noise: the ends of the trajectories at t = 1, `[B, N, D]`.
      steps: steps that the solver took, `[B]`.
    """

    log_p: Array
    noise: Array
    steps: Array


def clean_prediction(
    denoise: Callable[[Array, Array, Array], Array], self_conditioning: str = "current"
) -> CleanPrediction:
    """A clean prediction that depends on (z_t, t) alone, as the vector field of an ODE must.

    Args:
      denoise: `(z_t, t, self_condition) -> z_hat`.
      self_conditioning: "none" feeds zeros; "current" feeds the prediction at the same point and
        time, which takes two calls. The sampler's "previous" depends on the steps taken before
        and so defines no vector field.

    Raises:
      ValueError: any other self-conditioning.
    """
    if self_conditioning == "none":
        return lambda z_t, t: denoise(z_t, t, jnp.zeros_like(z_t))
    if self_conditioning == "current":
        return lambda z_t, t: denoise(z_t, t, denoise(z_t, t, jnp.zeros_like(z_t)))
    raise ValueError(
        f"self_conditioning: got {self_conditioning!r}, expected 'current' or 'none',"
        " because only these define a vector field."
    )


def log_density(
    predict: CleanPrediction,
    schedule: gaussian.Schedule,
    z: Array,
    keys: Array,
    *,
    t_min: float = 0.0,
    tolerance: Tolerance = Tolerance(rtol=1e-4, atol=1e-4),
    divergence: str = "hutchinson",
) -> LogDensity:
    """log p_{t_min}(z) in nats of points `z [B, N, D]` at time t_min. To be jitted.

    Tsitouras' adaptive Runge-Kutta 5(4) follows the trajectory in the angle instead of in t:
    dz/dtheta = v / theta' = (alpha z_t - z_hat) / sigma, from theta(t_min) to pi/2. The integral
    is the same, and no part of it is lost where the schedule's theta' is infinite.

    At t = 1 sigma is 1 and nothing is singular. As t -> 0, sigma -> 0: the quotient has a limit
    for an exact denoiser, but a network's error is divided by sigma and the integral of its
    divergence grows without bound. Hence the floor t_min: the density is that of the latent with
    the noise of t_min, and `z` must be such a latent (alpha z + sigma eps).

    Every sample has its own step sizes and its own key, so its result depends neither on the
    batch nor on the devices.

    Args:
      predict: the clean prediction z_hat.
      schedule: of the diffusion.
      z: the points `[B, N, D]`.
      keys: `[B]`; each draws the one Rademacher vector of Hutchinson's estimate e^T J e of its
        sample's divergence.
      t_min: the time of `z`, in [0, 1).
      tolerance: of the solver's steps.
      divergence: "hutchinson", or "exact": the trace, by N D forward derivatives.

    Raises:
      ValueError: `divergence` is unknown, or `t_min` is outside [0, 1).
    """
    if divergence not in ("hutchinson", "exact"):
        raise ValueError(f"divergence: got {divergence!r}, expected 'hutchinson' or 'exact'.")
    if not 0 <= t_min < 1:
        raise ValueError(f"t_min: got {t_min}, expected a number in [0, 1).")
    start = schedule.angle(jnp.float32(t_min))

    def integrate(z: Array, key: Array) -> LogDensity:
        probe = jax.random.rademacher(key, z.shape, z.dtype)
        rates = _rates(predict, schedule, probe if divergence == "hutchinson" else None)
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(rates),
            diffrax.Tsit5(),
            start,
            jnp.float32(0.5 * jnp.pi),
            None,
            (z, jnp.zeros((), z.dtype)),
            stepsize_controller=diffrax.PIDController(tolerance.rtol, tolerance.atol),
            max_steps=MAX_STEPS,
            throw=False,
        )
        noise, integral = (value[-1] for value in solution.ys)
        normal = -0.5 * jnp.sum(jnp.square(noise)) - 0.5 * z.size * math.log(2 * math.pi)
        done = solution.result == diffrax.RESULTS.successful
        return LogDensity(
            jnp.where(done, normal + integral, jnp.nan), noise, solution.stats["num_steps"]
        )

    with jax.numpy_rank_promotion("allow"):  # diffrax promotes ranks
        return jax.vmap(integrate)(z, keys)


def _rates(
    predict: CleanPrediction, schedule: gaussian.Schedule, probe: Array | None
) -> Callable[[Array, tuple[Array, Array], Any], tuple[Array, Array]]:
    """d/dtheta of one sample's (z_t, integrated divergence); exact without a Hutchinson probe."""

    def field(theta: Array, z_t: Array) -> Array:
        # At theta = 0 the quotient is 0/0; at 0.1 milliradians it equals its limit in float32.
        theta = jnp.maximum(theta, 1e-4)
        z_hat = predict(z_t[None], schedule.time_of_angle(theta)[None])[0]
        return (jnp.cos(theta) * z_t - z_hat) / jnp.sin(theta)

    def rates(theta: Array, state: tuple[Array, Array], _: Any) -> tuple[Array, Array]:
        at, z = functools.partial(field, theta), state[0]
        if probe is not None:
            dz, change = jax.jvp(at, (z,), (probe,))
            return dz, jnp.sum(probe * change)
        basis = jnp.eye(z.size, dtype=z.dtype).reshape(z.size, *z.shape)
        diagonal = jax.vmap(lambda e: jnp.sum(e * jax.jvp(at, (z,), (e,))[1]))(basis)
        return at(z), diagonal.sum()

    return rates


def entropy_of_noise(schedule: gaussian.Schedule, t: float, size: int) -> float:
    """Entropy in nats of noise of deviation sigma(t) in `size` coordinates.

    It is size/2 log(2 pi e sigma^2).
    """
    log_sigma = math.log(float(schedule.sigma(jnp.float32(t))))
    return 0.5 * size * (math.log(2 * math.pi * math.e) + 2 * log_sigma)


@dataclasses.dataclass(frozen=True)
class LatentModel:
    """What the likelihood of LaDiff is computed from.

    Attributes:
      predict: the prior's clean prediction.
      decoder_logits: `(x_t [B, L], z [B, N, D]) -> logits [B, L, V]`.
      schedule: of the prior's diffusion.
      tokenizer: gives the mask's and the end-of-text's ids, and the ids that can be sampled.
    """

    predict: CleanPrediction
    decoder_logits: Callable[[Array, Array], Array]
    schedule: gaussian.Schedule
    tokenizer: Tokenizer


def likelihood_bound(
    model: LatentModel,
    latents: np.ndarray,
    tokens: np.ndarray,
    key: Array,
    *,
    t_min: float,
    draws: int,
    batch: int,
    tolerance: Tolerance = Tolerance(),
) -> dict[str, Estimate]:
    """LaDiff's bound on -log p(x), for rows `[n, L]` with standardized latents `[n, N, D]`.

    The sampled model runs the ODE from N(0, I) down to t_min and decodes the z' that it arrives
    at; the encoder is q(z' | x) = N(alpha z, sigma^2 I) at t_min. With one z' for each row,

      -log p(x) <= E_q[masked bound of the decoder given z'] - E_q[log p_{t_min}(z')] - H(q).

    This holds for every t_min > 0. A small one makes q sharp and costs the prior many nats; a
    large one costs the decoder. Log-densities without H(q) give no bound, because a density has a
    unit and a deterministic encoder has no entropy; the paper leaves that term out.

    Args:
      model: the prior and the decoder.
      latents: standardized, float32 `[n, N, D]`.
      tokens: int32 `[n, L]`.
      key: a JAX key.
      t_min: noise floor, in (0, 1).
      draws: random masks per row.
      batch: rows at a time.
      tolerance: of the ODE solver.

    Returns:
      `bound_ppl`, the perplexity of the bound per token of content; `nats`, the bound in nats per
      token; and its terms in nats per token: `decoder_nats`, `prior_nats` (-log p) and
      `entropy_nats` (subtracted).

    Raises:
      ValueError: `t_min` is outside (0, 1), or a row needs more than `MAX_STEPS` solver steps.
    """
    if not 0 < t_min < 1:
        raise ValueError(
            f"t_min: got {t_min}, expected a number in (0, 1):"
            " without noise the encoder has no entropy."
        )
    measure = _bound_terms(model, key, t_min, draws, tolerance)
    decoder, prior = (
        np.asarray(part, np.float64)
        for part in map_batches(
            lambda rows: measure(
                jnp.asarray(latents[rows]), jnp.asarray(tokens[rows]), jnp.asarray(rows)
            ),
            len(tokens),
            batch,
        )
    )
    failed = int((~np.isfinite(prior)).sum())
    if failed:
        raise ValueError(
            f"The probability-flow ODE of {failed} rows needs more than {MAX_STEPS} steps:"
            f" raise rtol (now {tolerance.rtol}), atol (now {tolerance.atol}) or t_min (now {t_min})."
        )
    size = int(np.prod(latents.shape[1:]))
    entropy = np.full(len(tokens), entropy_of_noise(model.schedule, t_min, size))
    length = content_length(tokens, model.tokenizer.eot_id)
    total = decoder + prior - entropy
    terms = {"nats": total, "decoder_nats": decoder, "prior_nats": prior, "entropy_nats": entropy}
    return {"bound_ppl": intervals.ratio_exp(total, length)} | {
        name: intervals.ratio(value, length) for name, value in terms.items()
    }


def _bound_terms(
    model: LatentModel, key: Array, t_min: float, draws: int, tolerance: Tolerance
) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """A jitted `(z, rows, indices) -> ` decoder's bound and -log p(z'), in nats `[B]` each."""
    mask_id = model.tokenizer.mask_id
    allowed = jnp.asarray(model.tokenizer.sampleable)

    def measure(z: Array, rows: Array, indices: Array) -> tuple[Array, Array]:
        keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i), 3))(indices)
        eps = jax.vmap(lambda k: jax.random.normal(k, z.shape[1:]))(keys[:, 0])
        noisy = gaussian.diffuse(model.schedule, z, eps, jnp.float32(t_min))
        found = log_density(
            model.predict,
            model.schedule,
            noisy,
            keys[:, 1],
            t_min=t_min,
            tolerance=tolerance,
        )
        length = rows.shape[1]

        def decoded(draw: Array) -> Array:
            pairs = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(k, draw)))(keys[:, 2])
            count = jax.vmap(lambda k: jax.random.randint(k, (), 1, length + 1))(pairs[:, 0])
            x_t = jax.vmap(
                lambda k, row, c: masking.mask_exactly(k, row[None], c[None], mask_id)[0]
            )(pairs[:, 1], rows, count)
            nll, _ = masking.token_nll(model.decoder_logits(x_t, noisy), rows, allowed)
            return jnp.sum(nll * (x_t == mask_id), axis=-1) * length / count

        return jax.lax.map(decoded, jnp.arange(draws)).mean(axis=0), -found.log_p

    return jax.jit(measure)
