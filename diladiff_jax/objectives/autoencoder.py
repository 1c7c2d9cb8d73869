"""Stage 2: the autoencoder, fine-tuned from the MDLM ("Autoencoder" in docs/method.md)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import masking
from diladiff_jax.nn.autoencoder import LatentConditionedDecoder, LatentEncoder
from diladiff_jax.nn.call import apply
from diladiff_jax.objectives.base import (
    WHOLE,
    Context,
    LossOutput,
    Params,
    Part,
    bernoulli_rows,
)
from diladiff_jax.objectives.encoding import FeatureExtractor
from diladiff_jax.objectives.mdlm import MDLMOptions, masked_loss
from diladiff_jax.objectives.statistics import Moments
from diladiff_jax.options import Rule, at_least, between, fraction_below, one_of, setting


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions(MDLMOptions):
    """Augmentation, statistics and warm-up of the autoencoder stage; the defaults are published."""

    noise: float = setting(0.5, "s, the noise on features", fraction_below(1))
    p_feat: float = setting(0.7, "share of a feature vector's elements zeroed", between(0, 1))
    latent_augmentation: str = setting(
        "dropout",
        "what is done to latents: elements of half of them zeroed (the paper's), or Gaussian noise",
        one_of("dropout", "noise"),
    )
    p_lat: float = setting(
        0.7, "augmentation `dropout`: share of a latent's elements zeroed", between(0, 1)
    )
    p_drop: float = setting(
        0.75,
        "probability that noise replaces the latent; under `dropout`, in half of the examples",
        between(0, 1),
    )
    p_latent_noise: float = setting(
        1.0,
        "augmentation `noise`: probability that a latent that `p_drop` leaves is noised; "
        "the others reach the decoder as they are",
        between(0, 1),
    )
    latent_noise_low: float = setting(
        0.0, "augmentation `noise`: least level s, which bounds the bits", between(0, 1)
    )
    latent_noise_high: float = setting(0.8, "augmentation `noise`: greatest level s", between(0, 1))
    p_suffix: float = setting(
        0.0,
        "augmentation `noise`: probability that noise replaces a random suffix of the latents, so "
        "that the first ones carry most",
        between(0, 1),
    )
    statistics_decay: float = setting(
        0.99,
        "memory of the latents' running moments per update (the encoder moves while it learns)",
        Rule(lambda value: 0 < value <= 1, "in (0, 1]"),
    )
    decoder_warmup: int = setting(
        10_000,
        "warm-up steps of the decoder; longer, so that the encoder learns first",
        at_least(0),
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """The noise levels are an interval."""
        if self.latent_noise_low > self.latent_noise_high:
            yield "latent_noise_low", f"at most latent_noise_high = {self.latent_noise_high}"


def augment_features(
    key: PRNGKeyArray, f: Float[Array, "B L D"], *, p_feat: float, noise: float
) -> Float[Array, "B L D"]:
    """Augments standardized features: half of the examples lose elements, the others gain noise.

    Elements are zeroed with probability `p_feat` (not rescaled); noise keeps the variance:
    sqrt(1 - s^2) f + s eps.
    """
    half, mask, eps = jax.random.split(key, 3)
    zeroed = jnp.where(jax.random.bernoulli(mask, p_feat, f.shape), 0.0, f)
    noised = jnp.sqrt(1.0 - noise**2) * f + noise * jax.random.normal(eps, f.shape, jnp.float32)
    return jnp.where(bernoulli_rows(half, 0.5, f), zeroed, noised)


def drop_elements(
    key: PRNGKeyArray, z: Float[Array, "B N D"], options: AutoencoderOptions
) -> Float[Array, "B N D"]:
    """The paper's augmentation: noise replaces some latents entirely, the others lose elements.

    In half of the examples N(0, I), the latents' distribution once standardized, replaces the
    latent with probability `p_drop`. In the other half each element is zeroed with probability
    `p_lat`.
    """
    half, drop, mask, eps = jax.random.split(key, 4)
    dropped = bernoulli_rows(drop, options.p_drop, z)
    replaced = jnp.where(dropped, jax.random.normal(eps, z.shape, jnp.float32), z)
    zeroed = jnp.where(jax.random.bernoulli(mask, options.p_lat, z.shape), 0.0, z)
    return jnp.where(bernoulli_rows(half, 0.5, z), replaced, zeroed)


def add_noise(
    key: PRNGKeyArray, z: Float[Array, "B N D"], options: AutoencoderOptions
) -> Float[Array, "B N D"]:
    """Gaussian noise that keeps the variance: sqrt(1 - s^2) z + s eps, with one s per latent.

    The level s of an example is 1 with probability `p_drop`. Otherwise it is uniform on
    [latent_noise_low, latent_noise_high] with probability `p_latent_noise`, and else 0. With
    probability `p_suffix` it is 1 for a random suffix of the N latents, of 1 to N - 1 of them.

    A latent of n dimensions that always has noise of at least s carries at most n log2(1 / s) bits,
    so the lowest level sets a bound on the rate if `p_latent_noise` is 1.
    """
    level, drop, noised, suffix, length, eps = jax.random.split(key, 6)
    batch, n = z.shape[:2]
    low, high = options.latent_noise_low, options.latent_noise_high
    s = jax.random.uniform(level, (batch, 1, 1), jnp.float32, minval=low, maxval=high)
    s = jnp.where(bernoulli_rows(noised, options.p_latent_noise, z), s, 0.0)
    s = jnp.where(bernoulli_rows(drop, options.p_drop, z), 1.0, s)
    if options.p_suffix > 0 and n > 1:
        kept = jax.random.randint(length, (batch, 1, 1), 1, n, jnp.int32)
        beyond = jnp.arange(n)[None, :, None] >= kept
        s = jnp.where(beyond & bernoulli_rows(suffix, options.p_suffix, z), 1.0, s)
    return jnp.sqrt(1.0 - jnp.square(s)) * z + s * jax.random.normal(eps, z.shape, jnp.float32)


LATENT_AUGMENTATIONS = {"dropout": drop_elements, "noise": add_noise}
"""What the autoencoder does to standardized latents while it is trained, by its setting."""


@dataclasses.dataclass(frozen=True, eq=False)
class Autoencoder:
    """Encoder and latent-conditioned decoder, trained together by the masked cross-entropy.

    Parameters {"encoder", "decoder"}; frozen {"features"}; statistics {"features", "latents"}. The
    decoder reads standardized latents throughout, so a prior over standardized latents needs no
    inverse.

    Attributes:
      features: the frozen feature extractor.
      encoder, decoder: the networks that are trained.
      process: the diffusion process of the tokens.
      options: see `AutoencoderOptions`.
      loss_positions: see `masking.token_nll_by_position`.
    """

    features: FeatureExtractor
    encoder: LatentEncoder
    decoder: LatentConditionedDecoder
    process: masking.DiscreteProcess
    options: AutoencoderOptions = dataclasses.field(default_factory=AutoencoderOptions)
    loss_positions: int = 128

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Objective.init`."""
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
        """Empty moments of features (per coordinate) and latents (per index and coordinate)."""
        return {
            "features": Moments.zeros((self.features.dim,)),
            "latents": Moments.zeros((self.encoder.num_latents, self.encoder.latent_dim)),
        }

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Int[Array, "B L"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """See `Objective.loss`."""
        time_key, key = jax.random.split(key)
        keys = jax.random.split(jax.random.fold_in(key, part.index), 5)
        options = self.options
        # 1. Features of the clean text, standardized per coordinate over tokens.
        f = self.features(context.frozen["features"], tokens)
        moments = dict(context.statistics)
        if train:
            moments["features"] = moments["features"].update(f.reshape(-1, f.shape[-1]))
        f = moments["features"].standardize(f)
        if train:
            f = augment_features(keys[0], f, p_feat=options.p_feat, noise=options.noise)
        # 2. The latent, standardized per (index, coordinate).
        encode = functools.partial(apply, self.encoder, params["encoder"])
        z = encode(f, deterministic=not train, rngs={"dropout": keys[1]})
        if train:
            decay = options.statistics_decay ** (1 / part.of)
            moments["latents"] = moments["latents"].update(z, decay)
        clean = z = moments["latents"].standardize(z)
        if train:
            z = LATENT_AUGMENTATIONS[options.latent_augmentation](keys[2], z, options)
        # 3. Decode the corrupted text given the latent.
        t = masking.stratified_times(time_key, tokens.shape[0], *part)
        x_t = self.process.corrupt(keys[3], tokens, t)
        nll, right = self._nll(
            params, tokens, x_t, z, deterministic=not train, rngs={"dropout": keys[4]}
        )
        loss, metrics = masked_loss(nll, right, x_t, t, self.process, options.weighting)
        if not train:
            # Dead latents show in one-step decoding and not in the loss.
            blank = jnp.asarray(self.process.initial(tokens.shape))
            metrics["one_step_recovery"] = self._nll(params, tokens, blank, clean)[1].mean()
            # The moments are of augmented text, the prior's data of clean text: 1 if they agree.
            metrics["clean_latent_rms"] = jnp.sqrt(jnp.square(clean).mean())
        return loss, (metrics, moments)

    def _nll(
        self, params: Params, tokens: Array, x: Array, z: Array, **options: Any
    ) -> tuple[Array, Array]:
        """`masking.token_nll` of `tokens` by the decoder given x and z."""
        decode = functools.partial(apply, self.decoder, params["decoder"])
        h = decode(x, z, method="hidden", **options)
        project = functools.partial(decode, method="project")
        sampleable = jnp.asarray(self.process.sampleable)
        return masking.token_nll_by_position(
            project, h, tokens, sampleable, positions=self.loss_positions
        )

    def group(self, path: tuple[str, ...]) -> str:
        """Groups "encoder" and "decoder"; the decoder's embedding table is frozen."""
        return "frozen" if path[-1] == "embedding" else path[0]
