"""The autoencoder: text features to a compressed latent, and the denoiser that decodes given it (METHOD section 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.nn.layers import MLP, Heads, Linear, Norm, Positions, attend, zeros
from diladiff_jax.nn.transformer import TokenDenoiser

Array = jax.Array


class EncoderLayer(nn.Module):
    """`z += Attn(Q = RMS(z), K, V = [W_z RMS(z); W_f RMS(f)])`, then `z += MLP(RMS(z))`; `f` is never updated."""

    width: int
    heads: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, z: Array, f: Array, *, deterministic: bool = True) -> Array:
        zn = Norm(dtype=self.dtype, name="latent_norm")(z)
        fn = Norm(dtype=self.dtype, name="feature_norm")(f)

        def heads(name: str, normalize: bool) -> Heads:
            return Heads(self.width, self.heads, normalize, self.dtype, name=name)

        q = heads("query", True)(zn)
        k = jnp.concatenate([heads("latent_key", True)(zn), heads("feature_key", True)(fn)], axis=1)
        v = jnp.concatenate([heads("latent_value", False)(zn), heads("feature_value", False)(fn)], axis=1)
        out = Linear(self.width, ("heads", "embed"), use_bias=False, dtype=self.dtype, name="out")
        z = z + out(attend(q, k, v))
        h = Norm(dtype=self.dtype, name="mlp_norm")(z)
        return z + MLP(self.width, dropout=self.dropout, dtype=self.dtype, name="mlp")(h, deterministic=deterministic)


class LatentEncoder(nn.Module):
    """Perceiver-style encoder: standardized features `[B, L, D_feat]` -> raw latents, float32 `[B, N, D_lat]`.

    N learned vectors read the features through `num_layers` layers. Where the latent is narrower than the
    encoder, a linear map before the last norm brings it to `latent_dim`.
    """

    num_latents: int
    latent_dim: int
    width: int
    heads: int
    length: int
    num_layers: int = 2
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Array, *, deterministic: bool = True) -> Array:
        table = self.param(
            "latents", nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed")), (self.num_latents, self.width)
        )
        # Features and latents are standardized: positions of another size would be lost beside them.
        f = Positions(self.length, 1.0, name="position")(features.astype(self.dtype))
        z = Norm(dtype=self.dtype, name="entry_norm")(table)
        z = jnp.broadcast_to(z[None], (features.shape[0], *z.shape))
        for i in range(self.num_layers):
            layer = EncoderLayer(self.width, self.heads, self.dropout, self.dtype, name=f"layer_{i}")
            z = layer(z, f, deterministic=deterministic)
        if self.latent_dim != self.width:
            z = Linear(self.latent_dim, ("embed", "latent"), use_bias=False, dtype=self.dtype, name="narrow")(z)
        return Norm(dtype=jnp.float32, name="exit_norm")(z)


class CrossAttention(nn.Module):
    """`h += ZeroConv(CrossAttn(ZeroConv(h); z))`: reads only the latent, and adds exactly nothing at initialization.

    `h [B, L, D]`, `z [B, N, D_lat]`. Learned positions are added to the latents.
    """

    width: int
    heads: int
    num_latents: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array, z: Array) -> Array:
        x = Linear(self.width, ("embed", None), kernel_init=zeros, dtype=self.dtype, name="zero_in")(h)
        z = Positions(self.num_latents, 1.0, name="position")(z.astype(self.dtype))
        q = Heads(self.width, self.heads, True, self.dtype, name="query")(x)
        k = Heads(self.width, self.heads, True, self.dtype, name="key")(z)
        v = Heads(self.width, self.heads, False, self.dtype, name="value")(z)
        y = Linear(self.width, ("heads", "embed"), use_bias=False, dtype=self.dtype, name="out")(attend(q, k, v))
        update = Linear(self.width, ("embed", None), kernel_init=zeros, dtype=self.dtype, name="zero_out")(y)
        self.sow("intermediates", "update", update)  # for analyses; nothing is kept unless asked for
        return h + update


class LatentConditionedDecoder(nn.Module):
    """The denoiser with cross-attention to the latent before the given layers: `([B, L], [B, N, D_lat]) -> [B, L, V]`.

    Its parameters are `{"backbone": <those of the TokenDenoiser>, "cross_<layer>": ...}`, so a trained
    denoiser is put in as it is, and at initialization the two compute the same function exactly.
    """

    backbone: TokenDenoiser
    num_latents: int
    cross_layers: tuple[int, ...]

    def setup(self) -> None:
        b = self.backbone
        self.cross = {
            str(i): CrossAttention(b.width, b.heads, self.num_latents, b.dtype, name=f"cross_{i}") for i in sorted(set(self.cross_layers))
        }

    def hidden(self, tokens: Array, z: Array, *, deterministic: bool = True) -> Array:
        """Final hidden states `[B, L, D]`."""
        h, done = self.backbone.embed(tokens), 0
        for i, cross in sorted((int(name), cross) for name, cross in self.cross.items()):
            h = cross(self.backbone.layers(h, done, i, deterministic=deterministic), z)
            done = i
        h = self.backbone.layers(h, done, self.backbone.num_layers, deterministic=deterministic)
        return self.backbone.finish(h)

    def project(self, h: Array) -> Array:
        """Hidden states `[..., D]` -> float32 logits `[..., V]`."""
        return self.backbone.project(h)

    def __call__(self, tokens: Array, z: Array, *, deterministic: bool = True) -> Array:
        return self.project(self.hidden(tokens, z, deterministic=deterministic))
