"""Variance-preserving Gaussian diffusion of latents: schedules, conversions, and single steps (METHOD section 3).

Every schedule is an angle theta(t) from 0 at t = 0 (clean) to pi/2 at t = 1 (noise):
`z_t = alpha z + sigma eps`, `alpha = cos theta`, `sigma = sin theta`. Times are float32 `[B]` (or scalars);
latents `[B, N, D]`. The velocity is `dz_t/dt = alpha' z + sigma' eps`.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


class Schedule(Protocol):
    """What samplers and objectives need of a schedule; all functions elementwise in t."""

    def alpha(self, t: Array) -> Array: ...
    def sigma(self, t: Array) -> Array: ...
    def angle(self, t: Array) -> Array: ...
    def angle_rate(self, t: Array) -> Array: ...
    def time_of_angle(self, theta: Array) -> Array: ...


@dataclasses.dataclass(frozen=True)
class TangentSchedule:
    """theta(t) = arctan(d tan(pi t / 2)); d = 10 is the paper's choice, d = 1 makes theta linear in t."""

    d: float = 10.0

    def _parts(self, t: Array) -> tuple[Array, Array, Array]:
        # cos and d sin over their norm: no tangent, hence no overflow at t = 1. The cosine is written as a sine,
        # so that it is exactly zero there in float32, and not a little below.
        c, s = jnp.sin(0.5 * jnp.pi * (1.0 - t)), self.d * jnp.sin(0.5 * jnp.pi * t)
        return c, s, jnp.sqrt(c * c + s * s)

    def alpha(self, t: Array) -> Array:
        """cos theta(t)."""
        c, _, norm = self._parts(t)
        return c / norm

    def sigma(self, t: Array) -> Array:
        """sin theta(t)."""
        _, s, norm = self._parts(t)
        return s / norm

    def angle(self, t: Array) -> Array:
        """theta(t) in [0, pi/2]."""
        c, s, _ = self._parts(t)
        return jnp.arctan2(s, c)

    def angle_rate(self, t: Array) -> Array:
        """theta'(t) = (pi d / 2) / (c^2 + d^2 s^2)."""
        return 0.5 * jnp.pi * self.d / jnp.square(self._parts(t)[2])

    def time_of_angle(self, theta: Array) -> Array:
        """The t at which the angle is theta."""
        return jnp.arctan2(jnp.sin(theta), self.d * jnp.cos(theta)) * (2 / jnp.pi)


@dataclasses.dataclass(frozen=True)
class LinearVarianceSchedule:
    """sigma^2 = t. Its angle rate 1 / (2 sqrt(t (1 - t))) is infinite at both ends: `margin` keeps t inside them."""

    margin: float = 1e-4

    def alpha(self, t: Array) -> Array:
        """sqrt(1 - t)."""
        return jnp.sqrt(1.0 - t)

    def sigma(self, t: Array) -> Array:
        """sqrt(t)."""
        return jnp.sqrt(t)

    def angle(self, t: Array) -> Array:
        """arcsin sqrt(t)."""
        return jnp.arctan2(self.sigma(t), self.alpha(t))

    def angle_rate(self, t: Array) -> Array:
        """1 / (2 sqrt(t (1 - t))), t clipped to [margin, 1 - margin]."""
        t = jnp.clip(t, self.margin, 1.0 - self.margin)
        return 0.5 / jnp.sqrt(t * (1.0 - t))

    def time_of_angle(self, theta: Array) -> Array:
        """sin^2 theta."""
        return jnp.square(jnp.sin(theta))


def make_schedule(name: str, d: float = 10.0) -> Schedule:
    """`"tangent"` (with d) or `"linear_variance"`.

    Raises:
      ValueError: another name.
    """
    if name == "tangent":
        return TangentSchedule(d)
    if name == "linear_variance":
        return LinearVarianceSchedule()
    raise ValueError(f"schedule is {name!r}; it must be 'tangent' or 'linear_variance'")


def log_snr(schedule: Schedule, t: Array) -> Array:
    """log(alpha^2 / sigma^2); for the tangent schedule -2 log(d tan(pi t / 2)). Plus or minus infinity at the ends."""
    return 2.0 * (jnp.log(schedule.alpha(t)) - jnp.log(schedule.sigma(t)))


def per_example(value: Array, z: Array) -> Array:
    """Reshapes `[B]` (or a scalar) so that it multiplies `[B, ...]`."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (z.ndim - value.ndim))


def diffuse(schedule: Schedule, z: Array, noise: Array, t: Array) -> Array:
    """z_t = alpha z + sigma eps."""
    return per_example(schedule.alpha(t), z) * z + per_example(schedule.sigma(t), z) * noise


def noise_of_clean(schedule: Schedule, z_t: Array, z: Array, t: Array) -> Array:
    """The implied noise (z_t - alpha z) / sigma. Undefined at t = 0."""
    return (z_t - per_example(schedule.alpha(t), z_t) * z) / per_example(schedule.sigma(t), z_t)


def velocity_of_noise(schedule: Schedule, z: Array, noise: Array, t: Array) -> Array:
    """v = alpha' z + sigma' eps = theta' (cos theta eps - sin theta z)."""
    rate = per_example(schedule.angle_rate(t), z)
    return rate * (per_example(schedule.alpha(t), z) * noise - per_example(schedule.sigma(t), z) * z)


def velocity_of_clean(schedule: Schedule, z_t: Array, z: Array, t: Array) -> Array:
    """v with the implied noise in place: theta' (alpha z_t - z) / sigma (METHOD sections 3 and 9, eq. 15)."""
    rate = per_example(schedule.angle_rate(t) / schedule.sigma(t), z_t)
    return rate * (per_example(schedule.alpha(t), z_t) * z_t - z)


def clean_of_velocity(schedule: Schedule, z_t: Array, v: Array, t: Array) -> Array:
    """Phi: z = (sigma v - sigma' z_t) / (sigma alpha' - sigma' alpha), which is alpha z_t - sigma v / theta'."""
    scale = per_example(schedule.sigma(t) / schedule.angle_rate(t), z_t)
    return per_example(schedule.alpha(t), z_t) * z_t - scale * v


def ddim_step(schedule: Schedule, z_t: Array, z: Array, t: Array, s: Array) -> Array:
    """From t to s < t along the rotation z_s = cos(theta_s) z + sin(theta_s) eps, exact while the prediction is constant.

    Written with sigma_s / sigma_t <= 1, so that nothing is divided by a small number near t = 0.
    """
    ratio = schedule.sigma(s) / schedule.sigma(t)
    return per_example(schedule.alpha(s) - ratio * schedule.alpha(t), z) * z + per_example(ratio, z) * z_t


def euler_step(schedule: Schedule, z_t: Array, z: Array, t: Array, s: Array) -> Array:
    """From t to s < t along the straight line of the velocity: z_s = z_t - (t - s) v."""
    return z_t - per_example(t - s, z_t) * velocity_of_clean(schedule, z_t, z, t)
