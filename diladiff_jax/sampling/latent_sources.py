"""Where the latent of a sampled model comes from: the prior, the student, or nothing but noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float

from diladiff_jax.diffusion import meanflow
from diladiff_jax.diffusion.gaussian import Schedule
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.networks import Networks
from diladiff_jax.sampling import latent
from diladiff_jax.sampling.categorical import Keys, normal_per_sample
from diladiff_jax.sampling.controls import Controls
from diladiff_jax.sampling.options import SamplingOptions


class HasNetworks(Protocol):
    """What a latent source reads of a `Sampler`; see its attributes."""

    @property
    def networks(self) -> Networks: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def options(self) -> SamplingOptions: ...
    @property
    def step_form(self) -> str: ...


class LatentSource(Protocol):
    """Where the latent of a sampled model comes from. Equal sources share a compiled program."""

    def bind(self, options: SamplingOptions) -> LatentSource:
        """The same source with everything that it leaves to the settings filled in."""
        ...

    def __call__(
        self, sampler: HasNetworks, params: Mapping[str, Any], keys: Keys, controls: Controls
    ) -> Float[Array, "B N D"]:
        """Latents of samples `keys [B]`."""
        ...


@dataclasses.dataclass(frozen=True)
class PriorLatents:
    """LaDiff: the reverse diffusion of the prior, parameters "teacher".

    Attributes:
      method: a solver of `solvers.SOLVERS`; None takes `sampling.prior_method`.
      self_conditioning: None takes `sampling.prior_self_conditioning`.
    """

    method: str | None = None
    self_conditioning: str | None = None

    def bind(self, options: SamplingOptions) -> PriorLatents:
        """Fills in solver and self-conditioning."""
        return PriorLatents(
            self.method or options.prior_method,
            self.self_conditioning or options.prior_self_conditioning,
        )

    def __call__(
        self, sampler: HasNetworks, params: Mapping[str, Any], keys: Keys, controls: Controls
    ) -> Float[Array, "B N D"]:
        """Integrates from N(0, I) in `controls.latent_steps` steps."""
        bound, teacher = self.bind(sampler.options), sampler.networks.teacher

        def denoise(z_t: Array, t: Array, condition: Array) -> Array:
            return apply(teacher, params["teacher"], z_t, t, condition)

        noise = normal_per_sample(keys, sampler.networks.latent_shape)
        return latent.reverse_diffusion(
            denoise,
            sampler.schedule,
            noise,
            controls.latent_steps,
            keys=keys,
            method=bound.method or "",
            self_conditioning=bound.self_conditioning or "",
            eta=controls.eta,
            final_noise=controls.final_noise,
        )


@dataclasses.dataclass(frozen=True)
class StudentLatents:
    """DiLaDiff: a few average-velocity steps of the student, parameters "student"."""

    def bind(self, options: SamplingOptions) -> StudentLatents:
        """Nothing to fill in."""
        return self

    def __call__(
        self, sampler: HasNetworks, params: Mapping[str, Any], keys: Keys, controls: Controls
    ) -> Float[Array, "B N D"]:
        """Jumps in `controls.latent_steps` steps of one network call, or two if conditioned."""
        student, schedule = sampler.networks.sampling_student, sampler.schedule
        ours, options = params["student"], sampler.options

        def clean(z_t: Array, t: Array, condition: Array) -> Array:
            return apply(student, ours, z_t, t, condition, jnp.zeros_like(t))

        def average_velocity(z_t: Array, t: Array, r: Array, condition: Array) -> Array:
            z = apply(student, ours, z_t, t, condition, t - r)
            return meanflow.STEP_FORMS[sampler.step_form](schedule, z_t, z, t, r)

        return latent.few_step(
            average_velocity,
            clean if options.student_self_conditioning == "current" else None,
            schedule,
            keys,
            sampler.networks.latent_shape,
            controls.latent_steps,
            gamma=controls.gamma,
            warp=options.gamma_warp,
            final_noise=controls.final_noise,
        )


@dataclasses.dataclass(frozen=True)
class NullLatents:
    """N(0, I) in place of a latent, which the autoencoder's augmentation trained the decoder on."""

    def bind(self, options: SamplingOptions) -> NullLatents:
        """Nothing to fill in."""
        return self

    def __call__(
        self, sampler: HasNetworks, params: Mapping[str, Any], keys: Keys, controls: Controls
    ) -> Float[Array, "B N D"]:
        """Standard normal noise."""
        return normal_per_sample(keys, sampler.networks.latent_shape)
