"""Solvers of the prior's reverse diffusion: each maps the latent at t to that at s < t.

`SOLVERS` is the table of all; `register_solver` adds one. `latent.reverse_diffusion` takes their
steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.diffusion import gaussian
from diladiff_jax.sampling.categorical import Keys, normal_per_sample


@dataclasses.dataclass(frozen=True)
class Step:
    """What a solver may read in the step from t to s < t, number `k` of `steps`.

    Attributes:
      schedule: the noise schedule.
      z_t: the latent at t, `[B, N, D]`.
      z: the denoiser's prediction of the clean latent at (z_t, t).
      previous: its prediction in the step before; zeros in the first.
      t, s: times `[B]`.
      before: the time `[B]` at which `previous` was predicted; meaningless in the first step.
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
      TypeError: it is a bare function.
      ValueError: the name is taken.
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver {name}: got {solver!r}, expected a Solver")
    if name in SOLVERS:
        raise ValueError(f"solver {name} is already registered")
    SOLVERS[name] = solver
