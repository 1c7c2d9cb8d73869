"""Latent samplers: the probability-flow ODE of the prior, and the student's few average-velocity steps.

Pure functions of a denoiser, made to be closed over and jitted; numbers of steps are run-time values, so one
compiled program serves them all. Latents `[B, N, D]`; `keys [B]` is one key per sample, so that a sample does
not depend on the batch it is drawn in.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion import gaussian, meanflow

Array = jax.Array
Denoise = Callable[[Array, Array, Array], Array]  # (z_t, t [B], self_condition) -> clean latent
AverageVelocity = Callable[
    [Array, Array, Array, Array], Array
]  # (z_t, t [B], r [B], self_condition) -> u

ODE_METHODS = ("euler", "ddim", "heun", "dpmpp_2m")


def normal_per_sample(keys: Array, shape: tuple[int, ...]) -> Array:
    """Standard normal `[B, *shape]`, row i drawn from `keys[i]` alone."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def probability_flow(
    denoise: Denoise,
    schedule: gaussian.Schedule,
    noise: Array,
    steps: Array | int,
    *,
    method: str = "euler",
    self_conditioning: str = "previous",
) -> Array:
    """Integrates the probability-flow ODE from `noise ~ N(0, I)` at t = 1 to t = 0 on `steps` equal intervals of t.

    Methods: "euler" in t and "ddim" (the rotation), of first order; "heun" (Euler's step, then the mean of the velocities
    at both ends; two calls per step but for the last) and "dpmpp_2m" (DPM-Solver++(2M), arXiv 2211.01095; one call),
    of second, the latter but for a logarithm: its variable is infinite at both ends of an equal grid of t.

    Self-conditioning is the previous step's prediction (the paper's), or "current": a second call per step,
    at the current point and time (Heun's second velocity takes the first one's prediction all the same), or "none".

    Raises:
      ValueError: unknown method or self-conditioning.
    """
    if method not in ODE_METHODS:
        raise ValueError(
            f"latent sampler is {method!r}; it must be one of {', '.join(ODE_METHODS)}"
        )
    if self_conditioning not in ("previous", "current", "none"):
        raise ValueError(
            f"self-conditioning is {self_conditioning!r}; it must be 'previous', 'current' or 'none'"
        )
    nothing = jnp.zeros_like(noise)
    batch = noise.shape[:1]

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z_t, previous = carry
        t, s = jnp.full(batch, 1.0 - k / steps), jnp.full(batch, 1.0 - (k + 1) / steps)
        if self_conditioning == "previous":
            condition = previous
        else:
            condition = denoise(z_t, t, nothing) if self_conditioning == "current" else nothing
        z = denoise(z_t, t, condition)
        if method == "euler":
            z_s = gaussian.euler_step(schedule, z_t, z, t, s)
        elif method == "ddim":
            z_s = gaussian.ddim_step(schedule, z_t, z, t, s)
        elif method == "heun":
            euler = gaussian.euler_step(schedule, z_t, z, t, s)

            def corrected() -> Array:
                again = denoise(euler, s, nothing if self_conditioning == "none" else z)
                v = gaussian.velocity_of_clean(schedule, z_t, z, t) + gaussian.velocity_of_clean(
                    schedule, euler, again, s
                )
                return z_t - gaussian.per_example(t - s, z_t) * 0.5 * v

            z_s = jax.lax.cond(
                k + 1 < steps, corrected, lambda: euler
            )  # at s = 0 a prediction implies no velocity
        else:
            # Along log(alpha / sigma) the prediction is a straight line through this and the previous one. At both
            # ends of time that variable is infinite: the first step and the last are of first order.
            before, here, there = (
                0.5 * gaussian.log_snr(schedule, 1.0 - (k + i) / steps) for i in (-1, 0, 1)
            )
            inner = (k > 0) & (k + 1 < steps)
            slope = jnp.where(inner, 0.5 * (there - here) / (here - before), 0.0)
            z_s = gaussian.ddim_step(schedule, z_t, z + slope * (z - previous), t, s)
        return z_s, z

    return jax.lax.fori_loop(0, steps, body, (noise, nothing))[0]


def few_step(
    average_velocity: AverageVelocity,
    clean_prediction: Denoise,
    schedule: gaussian.Schedule,
    keys: Array,
    shape: tuple[int, int],
    steps: Array | int,
    *,
    gamma: Array | float = 0.8,
    warp: str = "noise_level",
    self_conditioning: bool = True,
) -> Array:
    """The student's sampler: `steps` jumps, each one call for self-conditioning and one for u; gamma-sampling between.

    From grid time t_k the student jumps to a time r cleaner than the next grid time s, and noise is added back:
      warp "noise_level": sigma_r / alpha_r = sqrt(1 - gamma^2) sigma_s / alpha_s and
        z_s = (alpha_s / alpha_r) z_r + gamma sigma_s eps, which has exactly the alpha and sigma of s;
      warp "literal": the paper's r = sqrt(1 - gamma^2) s and z_s = z_r + gamma sigma_s eps.
    After the last step nothing is added. gamma = 0 is deterministic. keys `[B]`, shape `(N, D)`.

    Raises:
      ValueError: unknown warp.
    """
    if warp not in ("noise_level", "literal"):
        raise ValueError(f"gamma warp is {warp!r}; it must be 'noise_level' or 'literal'")
    start, again = jax.vmap(lambda key: jax.random.split(key))(keys).T
    z = normal_per_sample(start, shape)
    batch = z.shape[:1]

    def body(k: Array, z_t: Array) -> Array:
        t, s = jnp.full(batch, 1.0 - k / steps), jnp.full(batch, 1.0 - (k + 1) / steps)
        if warp == "noise_level":
            r = meanflow.renoise_time(schedule, s, gamma)
        else:
            r = jnp.sqrt(1.0 - jnp.square(gamma)) * s
        self_condition = (
            clean_prediction(z_t, t, jnp.zeros_like(z_t))
            if self_conditioning
            else jnp.zeros_like(z_t)
        )
        z_r = z_t - gaussian.per_example(t - r, z_t) * average_velocity(z_t, t, r, self_condition)
        scale = schedule.alpha(s) / schedule.alpha(r) if warp == "noise_level" else jnp.ones(batch)
        eps = normal_per_sample(jax.vmap(lambda key: jax.random.fold_in(key, k))(again), shape)
        renoised = (
            gaussian.per_example(scale, z_r) * z_r
            + gaussian.per_example(gamma * schedule.sigma(s), z_r) * eps
        )
        return jnp.where(k + 1 < steps, renoised, z_r)

    return jax.lax.fori_loop(0, steps, body, z)
