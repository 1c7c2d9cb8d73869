"""Latent samplers: the prior's reverse diffusion, and the student's few steps.

Pure functions of a denoiser, made to be closed over and jitted. Numbers of steps are run-time
values, so one compiled program serves them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.sampling.categorical import (
    Keys,
    fold_in_per_sample,
    normal_per_sample,
    split_per_sample,
)
from diladiff_jax.sampling.solvers import SOLVERS, Step

Denoise = Callable[[Array, Array, Array], Array]
"""(z_t, t `[B]`, self-conditioning) -> clean latent."""
AverageVelocity = Callable[[Array, Array, Array, Array], Array]
"""(z_t, t `[B]`, r `[B]`, self-conditioning) -> average velocity u."""

SELF_CONDITIONINGS = ("previous", "current", "none")
"""What the prior's denoiser is conditioned on: the previous step's prediction (the paper's), a
second call at the current point and time, or nothing."""


def reverse_diffusion(
    denoise: Denoise,
    schedule: gaussian.Schedule,
    noise: Float[Array, "B N D"],
    steps: Int[Array, ""] | int,
    *,
    keys: Keys,
    method: str = "euler",
    self_conditioning: str = "previous",
    eta: Float[Array, ""] | float = 0.0,
    final_noise: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B N D"]:
    """Integrates the reverse diffusion from t = 1 to the noise level `final_noise`.

    The steps are equal intervals of t. A deterministic solver integrates the probability-flow ODE.

    Args:
      denoise: the prior; see `Denoise`.
      schedule: the noise schedule it was trained with.
      noise: z_1 ~ N(0, I).
      steps: the number of intervals.
      keys: `[B]`, from which a stochastic solver draws.
      method: a name in `SOLVERS`.
      self_conditioning: one of `SELF_CONDITIONINGS`.
      eta: share of fresh noise in each step; see `gaussian.stochastic_step`.
      final_noise: sigma at which to stop, in [0, 1): a latent is returned with this much noise.

    Raises:
      ValueError: unknown method or self-conditioning.
    """
    _require_one_of("method", method, SOLVERS)
    _require_one_of("self_conditioning", self_conditioning, SELF_CONDITIONINGS)
    nothing, end = jnp.zeros_like(noise), end_time(schedule, final_noise)
    time = functools.partial(_grid_times, len(noise), steps, end)
    predict = functools.partial(_predict, denoise, self_conditioning)

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        (z_t, previous), t, s = carry, time(k), time(k + 1)
        first = denoise(z_t, t, nothing) if self_conditioning == "current" else previous
        z = predict(z_t, t, first)
        step = Step(
            schedule=schedule,
            z_t=z_t,
            z=z,
            previous=previous,
            t=t,
            s=s,
            before=time(k - 1),
            k=k,
            steps=steps,
            denoise=lambda z_s, s: predict(z_s, s, z),
            keys=fold_in_per_sample(keys, k),
            eta=eta,
        )
        return SOLVERS[method].advance(step), z

    return jax.lax.fori_loop(0, steps, body, (noise, nothing))[0]


def _predict(
    denoise: Denoise, self_conditioning: str, z_t: Array, t: Array, previous: Array
) -> Array:
    """The clean latent, conditioned on an earlier prediction unless there is no conditioning."""
    condition = jnp.zeros_like(z_t) if self_conditioning == "none" else previous
    return denoise(z_t, t, condition)


def _require_one_of(name: str, value: str, valid: Iterable[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(valid)}")


def end_time(
    schedule: gaussian.Schedule, final_noise: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The time at which sigma is `final_noise`."""
    return schedule.time_of_angle(jnp.arcsin(jnp.asarray(final_noise, jnp.float32)))


def _grid_times(batch: int, steps: Array | int, end: Array, k: Array) -> Array:
    """Point k of `steps` equal intervals from 1 to `end`, which is hit exactly, `[B]`."""
    time = jnp.where(k == steps, end, 1.0 - (1.0 - end) * k / steps)
    return jnp.full((batch,), time, jnp.float32)


def noise_level_warp(
    schedule: gaussian.Schedule, s: Float[Array, " B"], gamma: Float[Array, ""] | float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(r, scale) with sigma_r / alpha_r = sqrt(1 - gamma^2) sigma_s / alpha_s.

    With scale = alpha_s / alpha_r, z_s = scale z_r + gamma sigma_s eps has exactly the alpha and
    sigma of s.
    """
    r = meanflow.renoise_time(schedule, s, gamma)
    return r, schedule.alpha(s) / schedule.alpha(r)


def literal_warp(
    schedule: gaussian.Schedule, s: Float[Array, " B"], gamma: Float[Array, ""] | float
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """(r, scale) as the paper prints them: r = sqrt(1 - gamma^2) s, and no scale."""
    del schedule
    return jnp.sqrt(1.0 - jnp.square(gamma)) * s, jnp.ones_like(s)


GAMMA_WARPS = {"noise_level": noise_level_warp, "literal": literal_warp}
"""How gamma-sampling chooses the cleaner time r, by its name in `sampling.gamma_warp`."""


def few_step(
    average_velocity: AverageVelocity,
    clean_prediction: Denoise | None,
    schedule: gaussian.Schedule,
    keys: Keys,
    shape: tuple[int, int],
    steps: Int[Array, ""] | int,
    *,
    gamma: Float[Array, ""] | float = 0.8,
    warp: str = "noise_level",
    final_noise: Float[Array, ""] | float = 0.0,
) -> Float[Array, "B N D"]:
    """The student's sampler: `steps` jumps with gamma-sampling in between.

    From grid time t the student jumps to a time r cleaner than the next grid time s, and noise is
    added back: z_s = scale z_r + gamma sigma_s eps, with r and scale from `GAMMA_WARPS`. After the
    last jump no noise is added. gamma = 0 is deterministic.

    Args:
      average_velocity: the student.
      clean_prediction: its prediction without self-conditioning, which conditions each jump at the
        cost of a second call; None for no self-conditioning.
      schedule: the noise schedule.
      keys: `[B]`, one per sample.
      shape: (N, D).
      steps: the number of jumps.
      gamma: share of the noise level that is fresh noise, in [0, 1).
      warp: a name in `GAMMA_WARPS`.
      final_noise: see `reverse_diffusion`.

    Raises:
      ValueError: unknown warp.
    """
    _require_one_of("warp", warp, GAMMA_WARPS)
    start_keys, noise_keys = split_per_sample(keys)
    z = normal_per_sample(start_keys, shape)
    time = functools.partial(_grid_times, len(z), steps, end_time(schedule, final_noise))

    def body(k: Array, z_t: Array) -> Array:
        t, s = time(k), time(k + 1)
        r, scale = GAMMA_WARPS[warp](schedule, s, gamma)
        last = k + 1 == steps
        r = jnp.where(last, s, r)
        condition = jnp.zeros_like(z_t)
        if clean_prediction is not None:
            condition = clean_prediction(z_t, t, condition)
        u = average_velocity(z_t, t, r, condition)
        z_r = z_t - gaussian.per_example(t - r, z_t) * u
        eps = normal_per_sample(fold_in_per_sample(noise_keys, k), shape)
        fresh = gaussian.per_example(gamma * schedule.sigma(s), z_r) * eps
        renoised = gaussian.per_example(scale, z_r) * z_r + fresh
        return jnp.where(last, z_r, renoised)

    return jax.lax.fori_loop(0, steps, body, z)
