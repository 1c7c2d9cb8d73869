"""The density of latents under the prior's probability-flow ODE.

The instantaneous change of variables (FFJORD, arXiv 1810.01367; score SDE, arXiv 2011.13456,
appendix D) along dz_t/dt = v = alpha' z_hat + sigma' eps_hat gives

  log p_a(z_a) = log N(z_1; 0, I) + int_a^1 div v(z_t, t) dt.

Tsitouras' adaptive Runge-Kutta 5(4) follows the trajectory in the angle instead of in t:
dz/dtheta = v / theta' = (alpha z_t - z_hat) / sigma, from theta(t_min) to pi/2. The integral is
the same, and no part of it is lost where the schedule's theta' is infinite.

At t = 1 sigma is 1 and nothing is singular. As t -> 0, sigma -> 0: the quotient has a limit for an
exact denoiser, but a network's error is divided by sigma and the integral of its divergence grows
without bound. Hence the floor t_min: the density is that of the latent with the noise of t_min,
alpha z + sigma eps.

Every sample has its own step sizes and its own key, so its result depends neither on the batch nor
on the devices.
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

from diladiff_jax.diffusion import gaussian

Array = jax.Array
CleanPrediction = Callable[[Array, Array], Array]
"""`(z_t [B, N, D], t [B]) -> z_hat [B, N, D]`."""

MAX_STEPS = 4096


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Tolerances of the ODE solver's steps, relative and absolute."""

    rtol: float = 1e-4
    atol: float = 1e-4


DEFAULT_TOLERANCE = Tolerance()


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
    tolerance: Tolerance = DEFAULT_TOLERANCE,
    divergence: str = "hutchinson",
) -> LogDensity:
    """log p_{t_min}(z) in nats of points `z [B, N, D]`. To be jitted.

    Args:
      predict: the clean prediction z_hat.
      schedule: of the diffusion.
      z: the points `[B, N, D]`.
      keys: `[B]`; each draws the one Rademacher vector of Hutchinson's estimate e^T J e of its
        sample's divergence.
      t_min: the time of `z`, in [0, 1); `z` must have the noise of that time.
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
        solution: Any = diffrax.diffeqsolve(
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
) -> Callable[[Any, Any, Any], tuple[Array, Array]]:
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
