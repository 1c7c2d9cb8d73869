"""Variance-preserving Gaussian diffusion of latents: conversions and single steps.

docs/method.md, Prior. A noisy latent is `z_t = alpha z + sigma eps`, with alpha and sigma from a
schedule (`diffusion.schedules`), and its velocity is `dz_t/dt = alpha' z + sigma' eps`. Latents are
`[B, N, D]`, and times float32 `[B]` or scalars.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from diladiff_jax.diffusion.schedules import (
    MAX_STEEPNESS,
    SCHEDULES,
    EmpiricalSchedule,
    LinearVarianceSchedule,
    Number,
    Schedule,
    ScheduleOptions,
    TangentSchedule,
    make_schedule,
)

__all__ = [
    "MAX_STEEPNESS",
    "SCHEDULES",
    "EmpiricalSchedule",
    "LinearVarianceSchedule",
    "Number",
    "Schedule",
    "ScheduleOptions",
    "TangentSchedule",
    "clean_of_ddim_step",
    "clean_of_velocity",
    "ddim_step",
    "diffuse",
    "euler_step",
    "log_snr",
    "make_schedule",
    "noise_of_clean",
    "per_example",
    "stochastic_step",
    "velocity_of_clean",
    "velocity_of_noise",
]


def log_snr(schedule: Schedule, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
    """log(alpha^2 / sigma^2), which is plus infinity at t = 0 and minus infinity at t = 1.

    For the tangent schedule it is -2 log(d tan(pi t / 2)). Equation 33 of the paper is a misprint
    (docs/method.md, Where the paper is silent).
    """
    return 2.0 * (jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t)))


def per_example(value: Float[Number, "*#B"], z: Float[Array, "*B N D"]) -> Array:
    """Reshapes `[B]` (or a scalar) so that it multiplies `z [B, ...]`."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (z.ndim - value.ndim))


def diffuse(
    schedule: Schedule,
    z: Float[Array, "*B N D"],
    noise: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """z_t = alpha z + sigma eps."""
    return per_example(schedule.alpha(t), z) * z + per_example(schedule.sigma(t), z) * noise


def noise_of_clean(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """The implied noise (z_t - alpha z) / sigma. Undefined at t = 0."""
    return (z_t - per_example(schedule.alpha(t), z_t) * z) / per_example(schedule.sigma(t), z_t)


def velocity_of_noise(
    schedule: Schedule,
    z: Float[Array, "*B N D"],
    noise: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """v = alpha' z + sigma' eps = theta' (cos theta eps - sin theta z)."""
    rate = per_example(schedule.angle_rate(t), z)
    return rate * (
        per_example(schedule.alpha(t), z) * noise - per_example(schedule.sigma(t), z) * z
    )


def velocity_of_clean(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """v with the noise that z_t and z imply (equation 15): theta' (alpha z_t - z) / sigma."""
    rate = per_example(schedule.angle_rate(t) / schedule.sigma(t), z_t)
    return rate * (per_example(schedule.alpha(t), z_t) * z_t - z)


def clean_of_velocity(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    v: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """Phi, the inverse of `velocity_of_clean`: z = alpha z_t - sigma v / theta'.

    This equals (sigma v - sigma' z_t) / (sigma alpha' - sigma' alpha) (docs/method.md, Student).
    """
    scale = per_example(schedule.sigma(t) / schedule.angle_rate(t), z_t)
    return per_example(schedule.alpha(t), z_t) * z_t - scale * v


def ddim_step(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    s: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """Steps from t to s < t along the rotation z_s = cos(theta_s) z + sin(theta_s) eps.

    The step is exact while the prediction z is constant. It uses the ratio sigma_s / sigma_t <= 1,
    so nothing is divided by a small number near t = 0.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (
        per_example(schedule.alpha(s) - ratio * schedule.alpha(t), z) * z
        + per_example(ratio, z) * z_t
    )


def clean_of_ddim_step(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z_s: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    s: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """The clean latent towards which `ddim_step` leads from z_t to z_s; undefined at s = t."""
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return (z_s - per_example(ratio, z_t) * z_t) / per_example(
        schedule.alpha(s) - ratio * schedule.alpha(t), z_t
    )


def stochastic_step(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    s: Float[Number, "*#B"],
    noise: Float[Array, "*B N D"],
    eta: Float[Number, ""],
) -> Float[Array, "*B N D"]:
    """DDIM's step from t to s < t with fresh noise (arXiv 2010.02502, equation 16).

    With c = sigma_s alpha_t / (alpha_s sigma_t) <= 1, the standard deviation of the fresh noise is
    eta sigma_s sqrt(1 - c^2); the implied noise keeps the rest of sigma_s. eta = 0 is `ddim_step`;
    eta = 1 draws from the posterior of the forward process given z, as DDPM does. The signal and
    variance of z_s are those of time s for every eta.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    # The product form is 0 and not 0/0 where s = 0 meets alpha = 1.
    c = ratio * schedule.alpha(t) / schedule.alpha(s)
    fresh = jnp.square(eta) * (1.0 - jnp.square(c))
    kept = ratio * jnp.sqrt(1.0 - fresh)
    return (
        per_example(schedule.alpha(s) - kept * schedule.alpha(t), z) * z
        + per_example(kept, z) * z_t
        + per_example(schedule.sigma(s) * jnp.sqrt(fresh), z) * noise
    )


def euler_step(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    s: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """Steps from t to s < t along the straight line of the velocity: z_s = z_t - (t - s) v."""
    return z_t - per_example(t - s, z_t) * velocity_of_clean(schedule, z_t, z, t)
