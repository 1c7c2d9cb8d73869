"""Average velocities and their distillation (METHOD section 4; MeanFlow, arXiv 2505.13447).

u(z_t, t, r) is the average velocity from t back to r <= t: z_r = z_t - (t - r) u.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion.gaussian import Schedule, per_example, velocity_of_clean

Array = jax.Array


def sample_times(
    key: Array,
    batch: int,
    *,
    mean: float = -1.0,
    std: float = 1.0,
    p_equal: float = 0.25,
    p_noise: float = 0.0,
    p_clean: float = 0.0,
) -> tuple[Array, Array]:
    """Pairs (t, r), r <= t, each `[B]`: two draws of LogitNormal(mean, std), the larger is t; r = t with probability `p_equal`.

    LogitNormal(-1, 1) hardly ever visits t = 1, where sampling starts, nor r = 0, where it ends: `p_noise` sets
    t = 1 and `p_clean` sets r = 0 in that share of the examples (both zero in the paper).
    """
    keys = jax.random.split(key, 4)
    pair = jax.nn.sigmoid(mean + std * jax.random.normal(keys[0], (2, batch)))
    t, r = jnp.max(pair, axis=0), jnp.min(pair, axis=0)
    t = jnp.where(jax.random.uniform(keys[1], (batch,)) < p_noise, 1.0, t)
    r = jnp.where(jax.random.uniform(keys[2], (batch,)) < p_clean, 0.0, r)
    r = jnp.where(jax.random.uniform(keys[3], (batch,)) < p_equal, t, r)
    return t, r


def velocity_from_prediction(schedule: Schedule, z_t: Array, z: Array, t: Array, r: Array) -> Array:
    """u = v(z_t, t) for every r, from a clean prediction z: the paper's initialization, a straight step."""
    del r
    return velocity_of_clean(schedule, z_t, z, t)


def rotation_from_prediction(schedule: Schedule, z_t: Array, z: Array, t: Array, r: Array) -> Array:
    """u whose step z_t - (t - r) u is the DDIM rotation from t to r towards a clean prediction z.

    At r = t it is v(z_t, t), at r = 0 the step lands on z itself: a network started from the teacher starts
    as the teacher's DDIM sampler, and errors of the prediction are not amplified near t = 0.

    With a the angle from r to t, u = [(1 - sigma_r / sigma_t) z_t - (sin a / sigma_t) z] / (t - r). Both
    brackets vanish with t - r, and 1 - sigma_r / sigma_t = [2 sin(a/2) cos(theta_r + a/2)] / sigma_t.
    """
    theta_t, theta_r = schedule.angle(t), schedule.angle(r)
    a, gap = theta_t - theta_r, t - r
    close = (
        gap < 1e-3
    )  # the quotient a / (t - r) cancels there; the rate at the midpoint agrees to second order
    slope = jnp.where(close, schedule.angle_rate(0.5 * (t + r)), a / jnp.where(close, 1.0, gap))
    half = jnp.sinc(a / (2 * jnp.pi))  # sin(a/2) / (a/2)
    scale = slope / jnp.sin(theta_t)
    toward_noise = scale * half * jnp.cos(theta_r + 0.5 * a)
    toward_clean = scale * jnp.sinc(a / jnp.pi)
    return per_example(toward_noise, z_t) * z_t - per_example(toward_clean, z_t) * z


STEP_FORMS = {"velocity": velocity_from_prediction, "rotation": rotation_from_prediction}
"""How the student's clean prediction is read as an average velocity."""


def average_velocity_target(
    average_velocity: Callable[[Array, Array, Array], Array],
    z_t: Array,
    t: Array,
    r: Array,
    v: Array,
    tangent_weight: Array | float = 1.0,
) -> tuple[Array, Array]:
    """(u, u_tgt) with u_tgt = v - w (t - r) (v . du/dz + du/dt), all of the target without gradient.

    `average_velocity(z, t, r)` is the student; the bracket is one forward derivative along (v, 1, 0). `w` is
    1 after the tangent's warm-up; at w = 0 the target is plain flow matching to the teacher's velocity v.
    """
    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    u, du = jax.jvp(average_velocity, (z_t, t, r), tangents)
    target = v - tangent_weight * per_example(t - r, z_t) * du
    return u, jax.lax.stop_gradient(target)


def adaptive_loss(u: Array, target: Array, c: float = 5.0) -> tuple[Array, Array]:
    """Per-example squared error *summed* over the latent, scaled by 1 / stop_gradient(error + c).

    Returns (loss `[B]`, unscaled error `[B]`). The loss sits near 1 by design: watch the error.
    """
    error = jnp.sum(jnp.square(u - target), axis=tuple(range(1, u.ndim)))
    return error / jax.lax.stop_gradient(error + c), error


def renoise_time(schedule: Schedule, s: Array, gamma: Array | float) -> Array:
    """The cleaner time r from which adding noise gamma sigma_s eps gives exactly the level of s.

    sigma_r / alpha_r = sqrt(1 - gamma^2) sigma_s / alpha_s: then z_s = (alpha_s / alpha_r) z_r + gamma sigma_s eps has
    variance (1 - gamma^2) sigma_s^2 + gamma^2 sigma_s^2 of noise and alpha_s of signal.
    """
    keep = jnp.sqrt(1.0 - jnp.square(gamma))
    return schedule.time_of_angle(jnp.arctan2(keep * schedule.sigma(s), schedule.alpha(s)))
