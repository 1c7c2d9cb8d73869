"""Noise schedules of the latent diffusion (docs/method.md, Prior).

Every schedule is variance preserving. It is an angle theta(t) that grows from 0 at t = 0 (clean) to
pi/2 at t = 1 (noise), with `alpha = cos theta` and `sigma = sin theta`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diladiff_jax.options import Options, Rule, above, setting

Number = Array | np.ndarray | float


@runtime_checkable
class Schedule(Protocol):
    """What samplers and objectives need from a schedule. All functions act elementwise."""

    finite_velocity: ClassVar[bool]
    """Whether the velocity, and its derivative in t, are finite at both t = 0 and t = 1.

    If not, no method may evaluate the velocity at an end: the prior cannot be sampled with Euler or
    Heun steps, which start at t = 1, and the student cannot be trained at t = 1 or r = 0.
    """

    def alpha(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """The factor of the clean latent, cos theta(t)."""
        ...

    def sigma(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """The factor of the noise, sin theta(t)."""
        ...

    def angle(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """The angle theta(t) in [0, pi/2]."""
        ...

    def angle_rate(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """The derivative theta'(t)."""
        ...

    def time_of_angle(self, theta: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """The time t at which the angle is theta: the inverse of `angle`."""
        ...


@dataclasses.dataclass(frozen=True)
class TangentSchedule:
    """theta(t) = arctan(d tan(pi t / 2)). The paper uses d = 10; d = 1 makes theta linear in t."""

    finite_velocity: ClassVar[bool] = True

    d: float = 10.0

    def _parts(self, t: Number) -> tuple[Array, Array, Array]:
        # Normalizing cos and d sin avoids the tangent, which overflows at t = 1. The cosine is
        # written as a sine so that it is exactly zero there in float32, not slightly negative.
        c, s = jnp.sin(0.5 * jnp.pi * (1.0 - t)), self.d * jnp.sin(0.5 * jnp.pi * t)
        return c, s, jnp.sqrt(c * c + s * s)

    def alpha(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """cos theta(t)."""
        c, _, norm = self._parts(t)
        return c / norm

    def sigma(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """sin theta(t)."""
        _, s, norm = self._parts(t)
        return s / norm

    def angle(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """theta(t) in [0, pi/2]."""
        c, s, _ = self._parts(t)
        return jnp.arctan2(s, c)

    def angle_rate(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """theta'(t) = (pi d / 2) / (c^2 + d^2 s^2)."""
        return 0.5 * jnp.pi * self.d / jnp.square(self._parts(t)[2])

    def time_of_angle(self, theta: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """arctan(tan(theta) / d) 2 / pi."""
        return jnp.arctan2(jnp.sin(theta), self.d * jnp.cos(theta)) * (2 / jnp.pi)


@dataclasses.dataclass(frozen=True)
class LinearVarianceSchedule:
    """sigma^2 = t.

    The angle rate 1 / (2 sqrt(t (1 - t))) is infinite at both ends, and so is the velocity.
    `angle_rate` clips t to [margin, 1 - margin].
    """

    finite_velocity: ClassVar[bool] = False

    margin: float = 1e-4

    def alpha(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """sqrt(1 - t)."""
        return jnp.sqrt(1.0 - t)

    def sigma(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """sqrt(t)."""
        return jnp.sqrt(t)

    def angle(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """arcsin sqrt(t)."""
        return jnp.arctan2(self.sigma(t), self.alpha(t))

    def angle_rate(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """1 / (2 sqrt(t (1 - t))), with t clipped to [margin, 1 - margin]."""
        t = jnp.clip(t, self.margin, 1.0 - self.margin)
        return 0.5 / jnp.sqrt(t * (1.0 - t))

    def time_of_angle(self, theta: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """sin^2 theta."""
        return jnp.square(jnp.sin(theta))


MAX_STEEPNESS = 4.0
"""Upper limit on the steepness k max(t0, 1 - t0) of an empirical schedule.

The angle rate at an end grows as exp(2 k t0): at t0 = 0.5 it reaches 300 at this limit. With 200
equal steps, Euler then misses the flow of a Gaussian by a quarter of its standard deviation; at a
steepness of 5 the error is seven times as large.
"""


@dataclasses.dataclass(frozen=True)
class EmpiricalSchedule:
    """Time reparameterized so that the decoder's error grows linearly in it (figures 11 and 12).

    omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2 is the decoding error rate at the noise
    angle theta = pi u / 2. The schedule is theta(t) = pi/2 u(t), where u(t) solves
    omega(u(t)) = (1 - t) omega(0) + t omega(1). Since w0 and w1 cancel, this is
    tanh(k (u - t0)) = (1 - t) tanh(-k t0) + t tanh(k (1 - t0)). As k -> 0, theta becomes linear
    in t.

    To fit it to a trained autoencoder, `evaluation.analyses.decoding_error` measures the error rate
    at several u and fits omega. Set `diffusion.k` and `diffusion.t0` to the fitted values before
    training the prior; the fit itself needs no prior.

    Raises:
      ValueError: k or t0 is out of range, or the schedule is too steep for equal steps.
    """

    finite_velocity: ClassVar[bool] = True

    k: float
    t0: float

    def __post_init__(self) -> None:
        if not (
            0 < self.t0 < 1 and self.k > 0 and self.k * max(self.t0, 1 - self.t0) <= MAX_STEEPNESS
        ):
            raise ValueError(
                f"empirical schedule: got k = {self.k}, t0 = {self.t0}, expected t0 in (0, 1), "
                f"k > 0 and k max(t0, 1 - t0) <= {MAX_STEEPNESS:g}"
            )

    def _ends(self) -> tuple[float, float, float]:
        # With p = (1 + tanh)/2: p at u = 0, 1 - p at u = 1, and the rise of p in between. These
        # are float64, and none of them suffers from cancellation.
        a, b = (1 / (1 + math.exp(2 * self.k * x)) for x in (self.t0, 1 - self.t0))
        return a, b, 1 - a - b

    def _fractions(self, t: Number) -> tuple[Array, Array]:
        # u and 1 - u. Each is computed from the end where it is exactly zero, and beyond the middle
        # from the other one.
        a, b, gain = self._ends()
        t = jnp.asarray(t)
        s, early = 1.0 - t, t < 0.5

        def from_end(time: Array, near: float) -> Array:
            # Keep the branch that is not taken finite: its derivative is multiplied by zero.
            inside = jnp.where(time <= 0.5, time, 0.5)
            return (
                jnp.log1p(inside * (gain / near)) - jnp.log1p(-inside * (gain / (1 - near)))
            ) / (2 * self.k)

        u, v = from_end(t, a), from_end(s, b)
        return jnp.where(early, u, 1.0 - v), jnp.where(early, 1.0 - u, v)

    def alpha(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """cos theta(t), exactly 0 at t = 1."""
        return jnp.sin(0.5 * jnp.pi * self._fractions(t)[1])

    def sigma(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """sin theta(t), exactly 0 at t = 0."""
        return jnp.sin(0.5 * jnp.pi * self._fractions(t)[0])

    def angle(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """theta(t) = pi/2 u(t)."""
        return 0.5 * jnp.pi * self._fractions(t)[0]

    def angle_rate(self, t: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """theta'(t) = (pi/2) (p_1 - p_0) / (2 k p (1 - p)).

        Here p = (1 + tanh(k (u - t0))) / 2 = (1 - t) p_0 + t p_1.
        """
        a, b, gain = self._ends()
        t = jnp.asarray(t)
        return 0.25 * jnp.pi * gain / (self.k * (a + t * gain) * (b + (1.0 - t) * gain))

    def time_of_angle(self, theta: Float[Number, "*B"]) -> Float[Array, "*B"]:
        """t = (p(u) - p_0) / (p_1 - p_0), with u = 2 theta / pi.

        It equals sinh(k u) cosh(k (1 - t0)) / (cosh(k (u - t0)) sinh k).
        """
        u = theta * (2 / jnp.pi)
        return (
            jnp.sinh(self.k * u)
            / jnp.cosh(self.k * (u - self.t0))
            * (math.cosh(self.k * (1 - self.t0)) / math.sinh(self.k))
        )


SCHEDULES: dict[str, Callable[[ScheduleOptions], Schedule]] = {
    "tangent": lambda options: TangentSchedule(options.d),
    "linear_variance": lambda options: LinearVarianceSchedule(),
    "empirical": lambda options: EmpiricalSchedule(options.k, options.t0),
}
"""Every schedule by its name in the config, `diffusion.schedule`."""


@dataclasses.dataclass(frozen=True)
class ScheduleOptions(Options):
    """The noise schedule of the latent diffusion, shared by prior and student."""

    schedule: str = setting(
        "tangent",
        "noise schedule",
        Rule(lambda name: name in SCHEDULES, "one of " + ", ".join(SCHEDULES)),
    )
    d: float = setting(10.0, "tangent: steepness; 1 makes the angle linear in time", above(0))
    k: float = setting(4.0, "empirical: slope of the decoding error, fitted to the autoencoder")
    t0: float = setting(
        0.5,
        "empirical: midpoint of the decoding error, fitted to the autoencoder",
        Rule(lambda t0: 0 < t0 < 1, "in (0, 1)"),
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        steepest = MAX_STEEPNESS / max(self.t0, 1 - self.t0)
        if not 0 < self.k <= steepest:
            yield (
                "k",
                f"in (0, {steepest:.3g}] at t0 = {self.t0}, because a steeper schedule needs too "
                "many steps",
            )


def make_schedule(options: ScheduleOptions) -> Schedule:
    """The schedule that `options` name, built by the table `SCHEDULES`."""
    return SCHEDULES[options.schedule](options)
