"""Average velocities and their distillation (docs/method.md, Student; MeanFlow, arXiv 2505.13447).

u(z_t, t, r) is the average velocity from t back to r <= t: z_r = z_t - (t - r) u.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion.gaussian import Number, Schedule, per_example, velocity_of_clean


def sample_times(
    key: PRNGKeyArray,
    batch: int,
    *,
    mean: float = -1.0,
    std: float = 1.0,
    p_equal: float = 0.25,
    p_noise: float = 0.0,
    p_clean: float = 0.0,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Samples pairs of times t and r <= t.

    t is the larger and r the smaller of two draws of LogitNormal(mean, std). LogitNormal(-1, 1)
    hardly ever visits t = 1, where sampling starts, or r = 0, where it ends, so `p_noise` and
    `p_clean` can force these ends. Both are zero in the paper.

    Args:
      key: the random key.
      batch: number of pairs, B.
      mean: mean of the logit.
      std: standard deviation of the logit.
      p_equal: probability of r = t, which is plain flow matching to the teacher.
      p_noise: probability of t = 1.
      p_clean: probability of r = 0.

    Returns:
      t and r.
    """
    keys = jax.random.split(key, 4)
    pair = jax.nn.sigmoid(mean + std * jax.random.normal(keys[0], (2, batch), jnp.float32))
    t, r = jnp.max(pair, axis=0), jnp.min(pair, axis=0)
    t = jnp.where(jax.random.uniform(keys[1], (batch,), jnp.float32) < p_noise, 1.0, t)
    r = jnp.where(jax.random.uniform(keys[2], (batch,), jnp.float32) < p_clean, 0.0, r)
    r = jnp.where(jax.random.uniform(keys[3], (batch,), jnp.float32) < p_equal, t, r)
    return t, r


def sample_jumps(
    key: PRNGKeyArray, batch: int, step_counts: tuple[int, ...]
) -> tuple[Float[Array, " B"], Float[Array, " B"], Int[Array, " B"]]:
    """Samples jumps from t to r < t, as a few-step sampler makes them.

    A jump is one of n equal steps from 1 to an end, with n of `step_counts`. In half of the jumps
    the end is 0, else uniform on [0, 0.4], for samplers that stop before the noise is gone. In half
    of them r is the step's end s, else uniform on [s / 2, s], for samplers that jump further and
    add noise.

    Returns:
      t, r, and the n of each jump.
    """
    keys = jax.random.split(key, 6)
    n = jax.random.choice(keys[0], jnp.asarray(step_counts), (batch,))
    k = jnp.floor(n * jax.random.uniform(keys[1], (batch,)))
    end = jax.random.uniform(keys[2], (batch,), maxval=0.4)
    end = jnp.where(jax.random.bernoulli(keys[3], 0.5, (batch,)), end, 0.0)
    t, s = (1.0 - (1.0 - end) * i / n for i in (k, k + 1))
    s = jnp.where(k + 1 == n, end, s)
    shorter = jax.random.uniform(keys[4], (batch,), minval=0.5)
    r = jnp.where(jax.random.bernoulli(keys[5], 0.5, (batch,)), shorter * s, s)
    return t, r, n


def velocity_from_prediction(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    r: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """u = v(z_t, t) for every r, from a prediction z of the clean latent: a straight step.

    This is the paper's initialization of the student.
    """
    del r
    return velocity_of_clean(schedule, z_t, z, t)


def rotation_from_prediction(
    schedule: Schedule,
    z_t: Float[Array, "*B N D"],
    z: Float[Array, "*B N D"],
    t: Float[Number, "*#B"],
    r: Float[Number, "*#B"],
) -> Float[Array, "*B N D"]:
    """The u whose step z_t - (t - r) u is the DDIM rotation from t to r towards a prediction z.

    At r = t it equals v(z_t, t), and at r = 0 the step lands on z itself. A student that starts
    from the teacher's weights therefore starts as the teacher's DDIM sampler, and prediction errors
    are not amplified near t = 0.

    With a the angle from r to t, u = [(1 - sigma_r / sigma_t) z_t - (sin a / sigma_t) z] / (t - r).
    Both brackets vanish with t - r, and 1 - sigma_r / sigma_t = [2 sin(a/2) cos(theta_r + a/2)] /
    sigma_t.
    """
    theta_t, theta_r = schedule.angle(t), schedule.angle(r)
    a, gap = theta_t - theta_r, t - r
    # The quotient a / (t - r) loses precision here; the rate at the midpoint agrees with it to
    # second order.
    close = gap < 1e-3
    slope = jnp.where(close, schedule.angle_rate(0.5 * (t + r)), a / jnp.where(close, 1.0, gap))
    half = jnp.sinc(a / (2 * jnp.pi))  # sin(a/2) / (a/2)
    scale = slope / jnp.sin(theta_t)
    toward_noise = scale * half * jnp.cos(theta_r + 0.5 * a)
    toward_clean = scale * jnp.sinc(a / jnp.pi)
    return per_example(toward_noise, z_t) * z_t - per_example(toward_clean, z_t) * z


STEP_FORMS = {"velocity": velocity_from_prediction, "rotation": rotation_from_prediction}
"""Ways to turn the student's prediction of the clean latent into an average velocity."""


def average_velocity_target(
    average_velocity: Callable[[Array, Array, Array], Array],
    z_t: Float[Array, "B N D"],
    t: Float[Array, " B"],
    r: Float[Array, " B"],
    v: Float[Array, "B N D"],
    tangent_weight: Float[Number, ""] = 1.0,
) -> tuple[Float[Array, "B N D"], Float[Array, "B N D"]]:
    """The MeanFlow target u_tgt = v - w (t - r) (v . du/dz + du/dt), and u itself.

    One forward derivative of the student along (v, 1, 0) gives the bracket.

    Args:
      average_velocity: the student, `u(z_t, t, r)`.
      z_t: noisy latents.
      t: times of `z_t`.
      r: times at which the average ends.
      v: the teacher's velocity at (z_t, t).
      tangent_weight: w, which is 1 after the tangent's warm-up. At w = 0 the target is v, which is
        plain flow matching.

    Returns:
      u with its gradient, and the target without any.
    """
    tangents = (v, jnp.ones_like(t), jnp.zeros_like(r))
    u, du = jax.jvp(average_velocity, (z_t, t, r), tangents)
    target = v - tangent_weight * per_example(t - r, z_t) * du
    return u, jax.lax.stop_gradient(target)


def adaptive_loss(
    u: Float[Array, "B N D"], target: Float[Array, "B N D"], c: float = 5.0
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Squared error *summed* over each latent, scaled by 1 / stop_gradient(error + c).

    The loss stays near 1 by design, so monitor the error instead.

    Returns:
      The loss and the unscaled error of each example.
    """
    error = jnp.sum(jnp.square(u - target), axis=tuple(range(1, u.ndim)))
    return error / jax.lax.stop_gradient(error + c), error


def renoise_time(
    schedule: Schedule, s: Float[Number, "*B"], gamma: Float[Number, "*#B"]
) -> Float[Array, "*B"]:
    """The cleaner time r from which adding noise gamma sigma_s eps reaches exactly the level of s.

    r solves sigma_r / alpha_r = sqrt(1 - gamma^2) sigma_s / alpha_s. Then the signal of
    z_s = (alpha_s / alpha_r) z_r + gamma sigma_s eps is alpha_s, and the variance of its noise is
    (1 - gamma^2) sigma_s^2 + gamma^2 sigma_s^2. The paper warps time differently (docs/method.md,
    Where the paper is silent).
    """
    keep = jnp.sqrt(1.0 - jnp.square(gamma))
    return schedule.time_of_angle(jnp.arctan2(keep * schedule.sigma(s), schedule.alpha(s)))
