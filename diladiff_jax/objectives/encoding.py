"""Text to standardized latents, through the features of a frozen network."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.autoencoder import LatentEncoder
from diladiff_jax.nn.bert import Bert
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import Context, Params
from diladiff_jax.objectives.statistics import Moments


class FeatureExtractor(Protocol):
    """A frozen contextual encoder of clean text."""

    @property
    def dim(self) -> int:
        """D_feat."""
        ...

    def __call__(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Features in float32, without gradient."""
        ...


@dataclasses.dataclass(frozen=True)
class DenoiserFeatures:
    """The MDLM's last hidden states on clean text, optionally with its embeddings."""

    denoiser: TokenDenoiser
    with_embeddings: bool = True

    @property
    def dim(self) -> int:
        """D_feat."""
        return self.denoiser.width * (2 if self.with_embeddings else 1)

    def __call__(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """See `FeatureExtractor`."""
        features = apply(
            self.denoiser,
            params,
            tokens,
            with_embeddings=self.with_embeddings,
            method=TokenDenoiser.features,
        )
        return jax.lax.stop_gradient(features)


@dataclasses.dataclass(frozen=True)
class BertFeatures:
    """The last layer of a published encoder; long rows are read in windows (`Bert.features`)."""

    bert: Bert

    @property
    def dim(self) -> int:
        """D_feat."""
        return self.bert.width

    def __call__(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """See `FeatureExtractor`."""
        features = apply(self.bert, params, tokens, method=Bert.features)
        return jax.lax.stop_gradient(features)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """The trained encoder as one function of tokens; its caller trains nothing in it."""

    features: FeatureExtractor
    encoder: LatentEncoder

    def __call__(
        self, frozen: dict[str, Any], statistics: dict[str, Moments], tokens: Int[Array, "B L"]
    ) -> Float[Array, "B N D"]:
        """Standardized latents in float32.

        Args:
          frozen: parameters "features" and "encoder".
          statistics: moments "features" and "latents".
          tokens: clean text.
        """
        f = statistics["features"].standardize(self.features(frozen["features"], tokens))
        z = apply(self.encoder, frozen["encoder"], f)
        return jax.lax.stop_gradient(statistics["latents"].standardize(z))

    def latents(
        self, context: Context, rows: Int[Array, "B L"] | Float[Array, "B N D"]
    ) -> Float[Array, "B N D"]:
        """The latents of rows, which may be tokens or latents that were computed before."""
        if jnp.issubdtype(rows.dtype, jnp.floating):
            return rows
        return self(context.frozen, context.statistics, rows)
