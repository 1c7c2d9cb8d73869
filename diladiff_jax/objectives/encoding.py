"""Text to standardized latent: features of a frozen network, standardized, encoded, standardized again."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax

from diladiff_jax.nn.autoencoder import LatentEncoder
from diladiff_jax.nn.bert import Bert
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import Params
from diladiff_jax.objectives.statistics import Moments

Array = jax.Array


class FeatureExtractor(Protocol):
    """A frozen contextual encoder of clean text."""

    @property
    def dim(self) -> int:
        """D_feat."""
        ...

    def __call__(self, params: Params, tokens: Array) -> Array:
        """tokens `[B, L]` -> float32 `[B, L, D_feat]`, without gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class DenoiserFeatures:
    """The pretrained denoiser's own last hidden states on clean text, optionally with its embeddings beside them."""

    denoiser: TokenDenoiser
    with_embeddings: bool = True

    @property
    def dim(self) -> int:
        return self.denoiser.width * (2 if self.with_embeddings else 1)

    def __call__(self, params: Params, tokens: Array) -> Array:
        features = self.denoiser.apply(
            {"params": params},
            tokens,
            with_embeddings=self.with_embeddings,
            method=TokenDenoiser.features,
        )
        return jax.lax.stop_gradient(features)


@dataclasses.dataclass(frozen=True)
class BertFeatures:
    """The last layer of a published encoder, which reads rows longer than its positions in windows (`Bert.features`)."""

    bert: Bert

    @property
    def dim(self) -> int:
        return self.bert.width

    def __call__(self, params: Params, tokens: Array) -> Array:
        return jax.lax.stop_gradient(
            self.bert.apply({"params": params}, tokens, method=Bert.features)
        )


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """The trained encoder as one function of tokens; nothing in it is trained by whoever calls it."""

    features: FeatureExtractor
    encoder: LatentEncoder

    def __call__(
        self, frozen: dict[str, Any], statistics: dict[str, Moments], tokens: Array
    ) -> Array:
        """tokens `[B, L]` -> standardized latents, float32 `[B, N, D_lat]`.

        frozen holds "features" and "encoder" parameters; statistics "features" and "latents".
        """
        f = statistics["features"].standardize(self.features(frozen["features"], tokens))
        z = self.encoder.apply({"params": frozen["encoder"]}, f)
        return jax.lax.stop_gradient(statistics["latents"].standardize(z))
