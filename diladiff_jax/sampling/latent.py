"""Latent samplers: solvers of the prior's reverse diffusion, and the student's few steps.

Pure functions of a denoiser, made to be closed over and jitted. Numbers of steps are run-time
values, so one compiled program serves them all. `SOLVERS` is the table of all solvers;
`register_solver` adds one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

Denoise = Callable[[Array, Array, Array], Array]
"""(z_t, t `[B]`, self-conditioning) -> clean latent."""
AverageVelocity = Callable[[Array, Array, Array, Array], Array]
"""(z_t, t `[B]`, r `[B]`, self-conditioning) -> average velocity u."""

SELF_CONDITIONINGS = ("previous", "current", "none")
"""What the prior's denoiser is conditioned on: the previous step's prediction (the paper's), a
second call at the current point and time, or nothing."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a solver may read in the step from t to s < t, number `k` of `steps`.

    Attributes:
      schedule: the noise schedule.
      z_t: the latent at t, `[B, N, D]`.
      z: the denoiser's prediction of the clean latent at (z_t, t).
      previous: its prediction in the step before; zeros in the first.
      t, s: times `[B]`.
      before: the time `[B]` at which `previous` was predicted; of no meaning in the first step.
      k, steps: the step's number, from 0, and how many there are.
      denoise: (z_t, t) -> another prediction, self-conditioned on `z`.
      keys: for a stochastic solver, one random key per sample and step.
      eta: share of fresh noise, for solvers that take one; see `gaussian.stochastic_step`.
    """

    schedule: gaussian.Schedule
    z_t: Float[Array, "B N D"]
    z: Float[Array, "B N D"]
    previous: Float[Array, "B N D"]
    t: Float[Array, " B"]
    s: Float[Array, " B"]
    before: Float[Array, " B"]
    k: Int[Array, ""]
    steps: Int[Array, ""] | int
    denoise: Callable[[Array, Array], Array]
    keys: Keys
    eta: Float[Array, ""] | float = 0.0

    @property
    def noise(self) -> Float[Array, "B N D"]:
        """Fresh standard normal noise."""
        return normal_per_sample(self.keys, self.z.shape[1:])


@dataclasses.dataclass(frozen=True)
class Solver:
    """A solver of the reverse diffusion: of its probability-flow ODE, or of its SDE.

    Attributes:
      advance: gives z_s from a `Step`.
      title: how reports call it.
      calls_per_step: network calls of each step but the last, which takes one.
      uses_velocity: whether it reads the velocity, which some schedules do not have at t = 1.
    """

    advance: Callable[[Step], Array]
    title: str
    calls_per_step: int = 1
    uses_velocity: bool = False

    def calls(self, steps: int) -> int:
        """Network calls of `steps` steps."""
        return (steps - 1) * self.calls_per_step + 1

    def steps_within(self, calls: int) -> int:
        """How many steps `calls` network calls allow."""
        return (calls - 1) // self.calls_per_step + 1


def euler(step: Step) -> Float[Array, "B N D"]:
    """Euler's step in t, the paper's."""
    return gaussian.euler_step(step.schedule, step.z_t, step.z, step.t, step.s)


def ddim(step: Step) -> Float[Array, "B N D"]:
    """DDIM, arXiv 2010.02502, exact for a constant prediction; eta = 1 is the DDPM posterior."""
    # Drawing noise costs more than the step itself, so eta = 0 draws none.
    noise = jax.lax.cond(step.eta > 0, lambda: step.noise, lambda: jnp.zeros_like(step.z))
    return gaussian.stochastic_step(
        step.schedule, step.z_t, step.z, step.t, step.s, noise, step.eta
    )


def heun(step: Step) -> Float[Array, "B N D"]:
    """Euler's step, then the mean of the velocities at both ends: second order.

    The last step is Euler's: at s = 0 a prediction implies no velocity.
    """
    z_euler = euler(step)

    def corrected() -> Array:
        z_end = step.denoise(z_euler, step.s)
        v_start = gaussian.velocity_of_clean(step.schedule, step.z_t, step.z, step.t)
        v_end = gaussian.velocity_of_clean(step.schedule, z_euler, z_end, step.s)
        v = v_start + v_end
        return step.z_t - gaussian.per_example(step.t - step.s, step.z_t) * 0.5 * v

    return jax.lax.cond(step.k + 1 < step.steps, corrected, lambda: z_euler)


def _extrapolated(step: Step) -> Float[Array, "B N D"]:
    """The prediction at the middle of the step, on a line in log(alpha / sigma).

    The line goes through this prediction and the previous one. That variable is infinite at t = 1
    and t = 0, so the first step, and a step to t = 0, take this prediction as it is.
    """
    before, here, there = (
        0.5 * gaussian.log_snr(step.schedule, time) for time in (step.before, step.t, step.s)
    )
    slope = 0.5 * (there - here) / (here - before)
    slope = jnp.where((step.k > 0) & jnp.isfinite(slope), slope, 0.0)
    return step.z + gaussian.per_example(slope, step.z) * (step.z - step.previous)


def dpmpp_2m(step: Step) -> Float[Array, "B N D"]:
    """DPM-Solver++(2M), arXiv 2211.01095: second order up to a logarithm, one call per step."""
    return gaussian.ddim_step(step.schedule, step.z_t, _extrapolated(step), step.t, step.s)


def sde_dpmpp_2m(step: Step) -> Float[Array, "B N D"]:
    """SDE-DPM-Solver++(2M), arXiv 2211.01095: the posterior's step with `dpmpp_2m`'s prediction."""
    return gaussian.stochastic_step(
        step.schedule, step.z_t, _extrapolated(step), step.t, step.s, step.noise, 1.0
    )


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, "Euler", uses_velocity=True),
    "ddim": Solver(ddim, "DDIM"),
    "heun": Solver(heun, "Heun", calls_per_step=2, uses_velocity=True),
    "dpmpp_2m": Solver(dpmpp_2m, "DPM-Solver++(2M)"),
    "sde_dpmpp_2m": Solver(sde_dpmpp_2m, "SDE-DPM-Solver++(2M)"),
}
"""Every solver by its name in `sampling.prior_method`."""


def register_solver(name: str, solver: Solver) -> None:
    """Makes a solver available as `sampling.prior_method = name`.

    Raises:
      ValueError: the name is taken.
    """
    if name in SOLVERS:
        raise ValueError(f"solver {name} is already registered")
    SOLVERS[name] = solver


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
    if method not in SOLVERS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(SOLVERS)}")
    if self_conditioning not in SELF_CONDITIONINGS:
        raise ValueError(
            f"self_conditioning: got {self_conditioning!r}, "
            f"expected one of {', '.join(SELF_CONDITIONINGS)}"
        )
    nothing, batch = jnp.zeros_like(noise), noise.shape[:1]
    end = end_time(schedule, final_noise)

    def time(k: Array) -> Array:
        return jnp.full(batch, _grid_time(k, steps, end), jnp.float32)

    def condition_on(z: Array) -> Array:
        return nothing if self_conditioning == "none" else z

    def body(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z_t, previous = carry
        t, s = time(k), time(k + 1)
        if self_conditioning == "current":
            z = denoise(z_t, t, denoise(z_t, t, nothing))
        else:
            z = denoise(z_t, t, condition_on(previous))
        step = Step(
            schedule,
            z_t,
            z,
            previous,
            t,
            s,
            time(k - 1),
            k,
            steps,
            denoise=lambda z_s, s: denoise(z_s, s, condition_on(z)),
            keys=fold_in_per_sample(keys, k),
            eta=eta,
        )
        return SOLVERS[method].advance(step), z

    return jax.lax.fori_loop(0, steps, body, (noise, nothing))[0]


def end_time(
    schedule: gaussian.Schedule, final_noise: Float[Array, ""] | float
) -> Float[Array, ""]:
    """The time at which sigma is `final_noise`."""
    return schedule.time_of_angle(jnp.arcsin(jnp.asarray(final_noise, jnp.float32)))


def _grid_time(k: Array, steps: Array | int, end: Array) -> Array:
    """Point k of `steps` equal intervals from 1 to `end`, which is hit exactly."""
    return jnp.where(k == steps, end, 1.0 - (1.0 - end) * k / steps)


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
    if warp not in GAMMA_WARPS:
        raise ValueError(f"warp: got {warp!r}, expected one of {', '.join(GAMMA_WARPS)}")
    start_keys, noise_keys = split_per_sample(keys)
    z = normal_per_sample(start_keys, shape)
    batch, end = z.shape[:1], end_time(schedule, final_noise)

    def body(k: Array, z_t: Array) -> Array:
        t, s = (jnp.full(batch, _grid_time(i, steps, end), jnp.float32) for i in (k, k + 1))
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
