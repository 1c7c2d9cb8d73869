"""Gaussian data, of which denoiser, flow and average velocity have closed forms."""

import functools

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion import gaussian
from diladiff_jax.sampling import latent

MEAN = jnp.array([[[0.7, -0.4]]])
STD = jnp.array([[[0.6, 1.5]]])  # the data: N(MEAN, STD^2), two coordinates
D1, D3 = gaussian.TangentSchedule(1.0), gaussian.TangentSchedule(3.0)


def noisy_std(schedule, t):
    """The standard deviation of z_t."""
    alpha, sigma = (x.reshape(-1, 1, 1) for x in (schedule.alpha(t), schedule.sigma(t)))
    return jnp.sqrt((alpha * STD) ** 2 + sigma**2)


def denoise(schedule, z_t, t, self_condition=None):
    """E[z | z_t]."""
    alpha = schedule.alpha(t).reshape(-1, 1, 1)
    return MEAN + alpha * (STD / noisy_std(schedule, t)) ** 2 * (z_t - alpha * MEAN)


def average_velocity(schedule, z_t, t, r, self_condition=None):
    """(z - Phi_{t->r}(z)) / (t - r), where the flow Phi keeps the standardized value."""
    alpha_t, alpha_r = schedule.alpha(t).reshape(-1, 1, 1), schedule.alpha(r).reshape(-1, 1, 1)
    z_r = alpha_r * MEAN + noisy_std(schedule, r) / noisy_std(schedule, t) * (z_t - alpha_t * MEAN)
    return (z_t - z_r) / (t - r).reshape(-1, 1, 1)


def keys_for(noise):
    """One key for each latent."""
    return jax.random.split(jax.random.key(9), len(noise))


@functools.cache
def ode(schedule, method):
    return jax.jit(
        lambda noise, steps: latent.reverse_diffusion(
            functools.partial(denoise, schedule),
            schedule,
            noise,
            steps,
            keys=keys_for(noise),
            method=method,
        )
    )
