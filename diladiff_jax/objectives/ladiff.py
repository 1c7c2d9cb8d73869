"""Stage 3: the prior, a diffusion model of the latents (METHOD section 3)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diladiff_jax.diffusion import gaussian
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Params, Part
from diladiff_jax.objectives.encoding import TextEncoder

Array = jax.Array


def init_latent_denoiser(network: LatentDenoiser, num_latents: int, key: Array) -> Params:
    """Fresh parameters of a latent denoiser, every input present."""
    z, t = jnp.zeros((1, num_latents, network.latent_dim)), jnp.zeros((1,))
    return network.init(key, z, t, z, t)["params"]


@dataclasses.dataclass(frozen=True, eq=False)
class LaDiff:
    """Predicts the clean latent from z_t, t ~ U(0, 1); plain mean squared error; self-conditioned on half of the batches."""

    text_encoder: TextEncoder
    network: LatentDenoiser
    schedule: gaussian.Schedule
    self_conditioning: float = 0.5  # share of the batches

    @property
    def expensive_branch_probability(self) -> float:
        """The share of the updates that take the dearest branch; see `training.flops.model_flops`."""
        return self.self_conditioning

    def init(self, key: Array) -> Params:
        return init_latent_denoiser(self.network, self.text_encoder.encoder.num_latents, key)

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Array,
        key: Array,
        step: Array,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        time_key, noise_key, coin_key = jax.random.split(jax.random.fold_in(key, part.index), 3)
        z = self.text_encoder(context.frozen, context.statistics, tokens)
        t = jax.random.uniform(time_key, z.shape[:1])
        z_t = gaussian.diffuse(self.schedule, z, jax.random.normal(noise_key, z.shape), t)

        def predict(self_condition: Array) -> Array:
            return self.network.apply({"params": params}, z_t, t, self_condition)

        nothing = jnp.zeros_like(z)
        self_condition = jax.lax.cond(
            jax.random.uniform(coin_key) < self.self_conditioning,
            lambda: jax.lax.stop_gradient(predict(nothing)),
            lambda: nothing,
        )
        error = jnp.square(predict(self_condition) - z).mean(axis=(1, 2))
        loss = error.mean()
        low = t < 0.5
        metrics = {
            "error_low_noise": jnp.sum(error * low) / jnp.maximum(low.sum(), 1),
            "error_high_noise": jnp.sum(error * ~low) / jnp.maximum((~low).sum(), 1),
        }
        return loss, (metrics, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        return "all"
