"""Variance-preserving Gaussian diffusion of latents: schedules, conversions, and single steps (METHOD section 3).

Every schedule is an angle theta(t) from 0 at t = 0 (clean) to pi/2 at t = 1 (noise):
`z_t = alpha z + sigma eps`, `alpha = cos theta`, `sigma = sin theta`. Times are float32 `[B]` (or scalars);
latents `[B, N, D]`. The velocity is `dz_t/dt = alpha' z + sigma' eps`.
"""

from __future__ import annotations

import dataclasses
import math
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


MAX_STEEPNESS = 4.0
"""Of an empirical schedule, k max(t0, 1 - t0): its angle rate at an end grows as exp(2 k t0), here to 300 at t0 = 0.5. On 200 equal steps Euler
misses the flow of a Gaussian by a quarter of its deviation there, and by seven times as much at 5."""


@dataclasses.dataclass(frozen=True)
class EmpiricalSchedule:
    """Time reparameterized so that the decoder's error grows linearly in it (the paper's figures 11 and 12).

    omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2 is the decoding error rate at the noise angle theta = pi u / 2. The
    schedule is theta(t) = pi/2 u(t) with omega(u(t)) = (1 - t) omega(0) + t omega(1), that is
    tanh(k (u - t0)) = (1 - t) tanh(-k t0) + t tanh(k (1 - t0)): w0 and w1 drop out. As k -> 0, theta becomes linear in t.

    To fit it to a trained autoencoder: `evaluation.analyses.decoding_error` measures the error rate at several u and fits omega,
    whose k and t0 go into `diffusion.k` and `diffusion.t0` before the prior is trained (the fit reads no prior).

    Raises:
      ValueError: k or t0 out of range, or too steep at an end for equal steps.
    """

    k: float
    t0: float

    def __post_init__(self) -> None:
        if not (
            0 < self.t0 < 1 and self.k > 0 and self.k * max(self.t0, 1 - self.t0) <= MAX_STEEPNESS
        ):
            raise ValueError(
                f"empirical schedule has k = {self.k}, t0 = {self.t0}; it needs t0 in (0, 1), k > 0 and k max(t0, 1 - t0) <= {MAX_STEEPNESS:g}"
            )

    def _ends(self) -> tuple[float, float, float]:
        # With p = (1 + tanh)/2: p at u = 0, 1 - p at u = 1, and what p gains between. In float64, each without cancellation.
        a, b = (1 / (1 + math.exp(2 * self.k * x)) for x in (self.t0, 1 - self.t0))
        return a, b, 1 - a - b

    def _fractions(self, t: Array) -> tuple[Array, Array]:
        # u and 1 - u, each computed from its own end where it is exactly zero, and from the other beyond the middle.
        a, b, gain = self._ends()
        t = jnp.asarray(t)
        s, early = 1.0 - t, t < 0.5

        def from_end(time: Array, near: float) -> Array:
            inside = jnp.where(
                time <= 0.5, time, 0.5
            )  # the branch not taken stays finite, for the derivative's sake
            return (
                jnp.log1p(inside * (gain / near)) - jnp.log1p(-inside * (gain / (1 - near)))
            ) / (2 * self.k)

        u, v = from_end(t, a), from_end(s, b)
        return jnp.where(early, u, 1.0 - v), jnp.where(early, 1.0 - u, v)

    def alpha(self, t: Array) -> Array:
        """cos theta(t), exactly 0 at t = 1."""
        return jnp.sin(0.5 * jnp.pi * self._fractions(t)[1])

    def sigma(self, t: Array) -> Array:
        """sin theta(t), exactly 0 at t = 0."""
        return jnp.sin(0.5 * jnp.pi * self._fractions(t)[0])

    def angle(self, t: Array) -> Array:
        """theta(t) = pi/2 u(t)."""
        return 0.5 * jnp.pi * self._fractions(t)[0]

    def angle_rate(self, t: Array) -> Array:
        """theta'(t) = (pi/2) (p_1 - p_0) / (2 k p (1 - p)), p = (1 + tanh(k (u - t0))) / 2 = (1 - t) p_0 + t p_1."""
        a, b, gain = self._ends()
        return 0.25 * jnp.pi * gain / (self.k * (a + t * gain) * (b + (1.0 - t) * gain))

    def time_of_angle(self, theta: Array) -> Array:
        """(p(u) - p_0) / (p_1 - p_0) = sinh(k u) cosh(k (1 - t0)) / (cosh(k (u - t0)) sinh k), u = 2 theta / pi."""
        u = theta * (2 / jnp.pi)
        return (
            jnp.sinh(self.k * u)
            / jnp.cosh(self.k * (u - self.t0))
            * (math.cosh(self.k * (1 - self.t0)) / math.sinh(self.k))
        )


def make_schedule(name: str, d: float = 10.0, k: float = 4.0, t0: float = 0.5) -> Schedule:
    """`"tangent"` (with d), `"linear_variance"`, or `"empirical"` (with k and t0).

    Raises:
      ValueError: another name.
    """
    if name == "tangent":
        return TangentSchedule(d)
    if name == "linear_variance":
        return LinearVarianceSchedule()
    if name == "empirical":
        return EmpiricalSchedule(k, t0)
    raise ValueError(
        f"schedule is {name!r}; it must be 'tangent', 'linear_variance' or 'empirical'"
    )


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
    return rate * (
        per_example(schedule.alpha(t), z) * noise - per_example(schedule.sigma(t), z) * z
    )


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
    return (
        per_example(schedule.alpha(s) - ratio * schedule.alpha(t), z) * z
        + per_example(ratio, z) * z_t
    )


def euler_step(schedule: Schedule, z_t: Array, z: Array, t: Array, s: Array) -> Array:
    """From t to s < t along the straight line of the velocity: z_s = z_t - (t - s) v."""
    return z_t - per_example(t - s, z_t) * velocity_of_clean(schedule, z_t, z, t)
