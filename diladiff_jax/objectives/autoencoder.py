"""Stage 2: the autoencoder, fine-tuned from the masked diffusion model (METHOD section 2)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion import masking
from diladiff_jax.nn.autoencoder import LatentConditionedDecoder, LatentEncoder
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Params, Part
from diladiff_jax.objectives.encoding import FeatureExtractor
from diladiff_jax.objectives.mdlm import masked_loss
from diladiff_jax.objectives.statistics import Moments

Array = jax.Array


def _half(key: Array, x: Array) -> Array:
    """True for each example with probability one half, shaped to select rows of `x`."""
    return jax.random.bernoulli(key, 0.5, x.shape[:1] + (1,) * (x.ndim - 1))


def augment_features(key: Array, f: Array, *, p_feat: float, noise: float) -> Array:
    """Standardized features `[B, L, D]`: half of the examples lose elements, the others gain noise.

    Zeroing with probability `p_feat` (not rescaled); or sqrt(1 - s^2) f + s eps, which keeps the variance.
    """
    half, mask, eps = jax.random.split(key, 3)
    zeroed = jnp.where(jax.random.bernoulli(mask, p_feat, f.shape), 0.0, f)
    noised = jnp.sqrt(1.0 - noise**2) * f + noise * jax.random.normal(eps, f.shape)
    return jnp.where(_half(half, f), zeroed, noised)


def augment_latents(key: Array, z: Array, *, p_lat: float, p_drop: float) -> Array:
    """Standardized latents `[B, N, D]`: half of the examples are replaced whole by noise with probability `p_drop`,
    the others lose elements with probability `p_lat`. N(mu_z, sigma_z^2) is N(0, I) once standardized."""
    half, drop, mask, eps = jax.random.split(key, 4)
    dropped = jax.random.bernoulli(drop, p_drop, z.shape[:1] + (1,) * (z.ndim - 1))
    replaced = jnp.where(dropped, jax.random.normal(eps, z.shape), z)
    zeroed = jnp.where(jax.random.bernoulli(mask, p_lat, z.shape), 0.0, z)
    return jnp.where(_half(half, z), replaced, zeroed)


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """Encoder and latent-conditioned decoder, trained together by the masked cross-entropy.

    Parameters `{"encoder", "decoder"}`; frozen `{"features"}`; statistics `{"features", "latents"}`. The
    decoder reads standardized latents throughout, so a prior over standardized latents needs no way back.
    """

    features: FeatureExtractor
    encoder: LatentEncoder
    decoder: LatentConditionedDecoder
    mask_id: int
    sampleable: np.ndarray
    noise: float = 0.5
    p_feat: float = 0.7
    p_lat: float = 0.7
    p_drop: float = 0.75
    statistics_decay: float = (
        0.99  # of the latents': the encoder moves while it learns; the features do not
    )
    weighting: str = "one"
    loss_positions: int = 128  # see `masking.token_nll_by_position`

    def init(self, key: Array) -> Params:
        length = self.encoder.length
        encoder_key, decoder_key = jax.random.split(key)
        tokens = jnp.zeros((1, length), jnp.int32)
        f = jnp.zeros((1, length, self.features.dim))
        z = jnp.zeros((1, self.encoder.num_latents, self.encoder.latent_dim))
        return {
            "encoder": self.encoder.init(encoder_key, f)["params"],
            "decoder": self.decoder.init(decoder_key, tokens, z)["params"],
        }

    def init_statistics(self) -> dict[str, Moments]:
        return {
            "features": Moments.zeros((self.features.dim,)),
            "latents": Moments.zeros((self.encoder.num_latents, self.encoder.latent_dim)),
        }

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
        time_key, key = jax.random.split(key)
        keys = jax.random.split(jax.random.fold_in(key, part.index), 5)
        # 1. Features of the clean text, standardized per coordinate over tokens.
        f = self.features(context.frozen["features"], tokens)
        moments = dict(context.statistics)
        if train:
            moments["features"] = moments["features"].update(f.reshape(-1, f.shape[-1]))
        f = moments["features"].standardize(f)
        if train:
            f = augment_features(keys[0], f, p_feat=self.p_feat, noise=self.noise)
        # 2. The latent, standardized per (index, coordinate).
        z = self.encoder.apply(
            {"params": params["encoder"]}, f, deterministic=not train, rngs={"dropout": keys[1]}
        )
        if train:
            moments["latents"] = moments["latents"].update(
                z, self.statistics_decay ** (1 / part.of)
            )
        z = moments["latents"].standardize(z)
        clean = z
        if train:
            z = augment_latents(keys[2], z, p_lat=self.p_lat, p_drop=self.p_drop)
        # 3. Decode the partly masked text given the latent.
        t = masking.stratified_times(time_key, tokens.shape[0], *part)
        x_t = masking.mask_tokens(keys[3], tokens, t, self.mask_id)
        decoder = functools.partial(self.decoder.apply, {"params": params["decoder"]})

        def nll_of(x: Array, z: Array, **apply: Any) -> tuple[Array, Array]:
            h = decoder(x, z, method="hidden", **apply)
            project = functools.partial(decoder, method="project")
            return masking.token_nll_by_position(
                project, h, tokens, jnp.asarray(self.sampleable), positions=self.loss_positions
            )

        nll, right = nll_of(x_t, z, deterministic=not train, rngs={"dropout": keys[4]})
        loss, metrics = masked_loss(nll, right, x_t, t, self.mask_id, self.weighting)
        if not train:  # dead latents show here, with every token masked, and not in the loss
            blank = jnp.full_like(tokens, self.mask_id)
            metrics["one_step_recovery"] = nll_of(blank, clean)[1].mean()
            # The statistics are of augmented text, the prior's data of clean text: 1 says that they agree.
            metrics["clean_latent_rms"] = jnp.sqrt(jnp.square(clean).mean())
        return loss, (metrics, moments)

    def group(self, path: tuple[str, ...]) -> str:
        return "frozen" if path[-1] == "embedding" else path[0]
