"""Stage 3: the prior, a diffusion model of the latents ("Prior" in docs/method.md)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import gaussian
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, LossOutput, Params, Part
from diladiff_jax.objectives.encoding import TextEncoder
from diladiff_jax.options import Options, between, setting


@dataclasses.dataclass(frozen=True)
class LaDiffOptions(Options):
    """Options of the prior's loss."""

    self_conditioning: float = setting(
        0.5, "share of the batches that are self-conditioned", between(0, 1)
    )


def init_latent_denoiser(network: LatentDenoiser, num_latents: int, key: PRNGKeyArray) -> Params:
    """Initial parameters of a latent denoiser with every input present."""
    z, t = jnp.zeros((1, num_latents, network.latent_dim)), jnp.zeros((1,))
    return network.init(key, z, t, z, t)["params"]


@dataclasses.dataclass(frozen=True, eq=False)
class LaDiff:
    """Predicts the clean latent from z_t, t ~ U(0, 1), with a plain mean squared error.

    Attributes:
      text_encoder: the frozen path from tokens to standardized latents.
      network: the prior.
      schedule: the noise schedule.
      options: see `LaDiffOptions`.
    """

    text_encoder: TextEncoder
    network: LatentDenoiser
    schedule: gaussian.Schedule
    options: LaDiffOptions = dataclasses.field(default_factory=LaDiffOptions)

    @property
    def expensive_branch_probability(self) -> float:
        """See `Objective`: a self-conditioned update calls the network twice."""
        return self.options.self_conditioning

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Objective.init`."""
        return init_latent_denoiser(self.network, self.text_encoder.encoder.num_latents, key)

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Int[Array, "B L"] | Float[Array, "B N D"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """See `Objective.loss`."""
        time_key, noise_key, coin_key = jax.random.split(jax.random.fold_in(key, part.index), 3)
        z = self.text_encoder.latents(context, tokens)
        t = jax.random.uniform(time_key, z.shape[:1], jnp.float32)
        z_t = gaussian.diffuse(
            self.schedule, z, jax.random.normal(noise_key, z.shape, jnp.float32), t
        )

        def predict(self_condition: Array) -> Array:
            return apply(self.network, params, z_t, t, self_condition)

        nothing = jnp.zeros_like(z)
        self_condition = jax.lax.cond(
            jax.random.uniform(coin_key, (), jnp.float32) < self.options.self_conditioning,
            lambda: jax.lax.stop_gradient(predict(nothing)),
            lambda: nothing,
        )
        error = jnp.square(predict(self_condition) - z).mean(axis=(1, 2))
        low = t < 0.5
        metrics = {
            "error_low_noise": jnp.sum(error * low) / jnp.maximum(low.sum(), 1),
            "error_high_noise": jnp.sum(error * ~low) / jnp.maximum((~low).sum(), 1),
        }
        return error.mean(), (metrics, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        """One group, "all"."""
        return "all"
