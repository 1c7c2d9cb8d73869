"""The autoencoder: text features to a compressed latent, and the denoiser that decodes given it (METHOD section 2)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.layers import MLP, Heads, Linear, Norm, Positions, zeros
from diladiff_jax.nn.transformer import Cache, TokenDenoiser

Array = jax.Array
Memory = dict[str, tuple[Array, Array]]


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
        v = jnp.concatenate(
            [heads("latent_value", False)(zn), heads("feature_value", False)(fn)], axis=1
        )
        out = Linear(self.width, ("heads", "embed"), use_bias=False, dtype=self.dtype, name="out")
        z = z + out(attend(q, k, v))
        h = Norm(dtype=self.dtype, name="mlp_norm")(z)
        return z + MLP(self.width, dropout=self.dropout, dtype=self.dtype, name="mlp")(
            h, deterministic=deterministic
        )


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
            "latents",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed")),
            (self.num_latents, self.width),
        )
        # Features and latents are standardized: positions of another size would be lost beside them.
        f = Positions(self.length, 1.0, name="position")(features.astype(self.dtype))
        z = Norm(dtype=self.dtype, name="entry_norm")(table)
        z = jnp.broadcast_to(z[None], (features.shape[0], *z.shape))
        for i in range(self.num_layers):
            layer = EncoderLayer(
                self.width, self.heads, self.dropout, self.dtype, name=f"layer_{i}"
            )
            z = layer(z, f, deterministic=deterministic)
        if self.latent_dim != self.width:
            z = Linear(
                self.latent_dim,
                ("embed", "latent"),
                use_bias=False,
                dtype=self.dtype,
                name="narrow",
            )(z)
        return Norm(dtype=jnp.float32, name="exit_norm")(z)


class CrossAttention(nn.Module):
    """`h += ZeroConv(CrossAttn(ZeroConv(h); z))`: reads only the latent, and adds exactly nothing at initialization.

    `h [B, L, D]`, `z [B, N, D_lat]`. Learned positions are added to the latents.
    """

    width: int
    heads: int
    num_latents: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.zero_in = Linear(self.width, ("embed", None), kernel_init=zeros, dtype=self.dtype)
        self.position = Positions(self.num_latents, 1.0)
        self.query = Heads(self.width, self.heads, True, self.dtype)
        self.key = Heads(self.width, self.heads, True, self.dtype)
        self.value = Heads(self.width, self.heads, False, self.dtype)
        self.out = Linear(self.width, ("heads", "embed"), use_bias=False, dtype=self.dtype)
        self.zero_out = Linear(self.width, ("embed", None), kernel_init=zeros, dtype=self.dtype)

    def keys_values(self, z: Array) -> tuple[Array, Array]:
        """Keys and values of the latent, each `[B, N, H, K]`: the same in every decoding step."""
        z = self.position(z.astype(self.dtype))
        return self.key(z), self.value(z)

    def read(self, h: Array, memory: tuple[Array, Array]) -> Array:
        """`h` plus what it reads from keys and values: `[B, L, D]`."""
        update = self.zero_out(self.out(attend(self.query(self.zero_in(h)), *memory)))
        self.sow(
            "intermediates", "update", update
        )  # for analyses; nothing is kept unless asked for
        return h + update

    def __call__(self, h: Array, z: Array) -> Array:
        return self.read(h, self.keys_values(z))


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
            str(i): CrossAttention(b.width, b.heads, self.num_latents, b.dtype, name=f"cross_{i}")
            for i in sorted(set(self.cross_layers))
        }

    def memory(self, z: Array) -> Memory:
        """What cross-attention reads of the latent `[B, N, D_lat]`: layer -> keys and values, each `[B, N, H, K]`."""
        return {name: cross.keys_values(z) for name, cross in self.cross.items()}

    def before_last(
        self,
        tokens: Array,
        memory: Memory,
        *,
        skip: tuple[int, ...] = (),
        deterministic: bool = True,
    ) -> Array:
        """What enters the backbone's last block, `[B, L, D]`, made without the blocks in `skip`; the latent is read all the same."""
        h, done = self.backbone.embed(tokens), 0
        for i, cross in sorted((int(name), cross) for name, cross in self.cross.items()):
            h = cross.read(
                self.backbone.layers(h, done, i, skip=skip, deterministic=deterministic),
                memory[str(i)],
            )
            done = i
        return self.backbone.layers(
            h, done, self.backbone.num_layers - 1, skip=skip, deterministic=deterministic
        )

    def states_at(
        self,
        tokens: Array,
        memory: Memory,
        cache: Cache = (),
        positions: Array | None = None,
        *,
        write: bool = True,
    ) -> tuple[Array, Cache]:
        """As of `TokenDenoiser`, given what cross-attention reads."""
        h, done = self.backbone.embed(tokens, positions), 0
        for i, cross in sorted((int(name), cross) for name, cross in self.cross.items()):
            h, cache = self.backbone.layers_at(h, done, i, cache, positions, write=write)
            h, done = cross.read(h, memory[str(i)]), i
        h, cache = self.backbone.layers_at(
            h, done, self.backbone.num_layers, cache, positions, write=write
        )
        return self.backbone.finish(h), cache

    def last_keys_values(self, h: Array) -> tuple[Array, Array]:
        """As of `TokenDenoiser`."""
        return self.backbone.last_keys_values(h)

    def finish_at(self, h: Array, memory: tuple[Array, Array], positions: Array) -> Array:
        """As of `TokenDenoiser`."""
        return self.backbone.finish_at(h, memory, positions)

    def hidden(self, tokens: Array, z: Array, *, deterministic: bool = True) -> Array:
        """Final hidden states `[B, L, D]`."""
        h = self.before_last(tokens, self.memory(z), deterministic=deterministic)
        last = self.backbone.num_layers - 1
        return self.backbone.finish(
            self.backbone.layers(h, last, last + 1, deterministic=deterministic)
        )

    def project(self, h: Array) -> Array:
        """Hidden states `[..., D]` -> float32 logits `[..., V]`."""
        return self.backbone.project(h)

    def __call__(self, tokens: Array, z: Array, *, deterministic: bool = True) -> Array:
        return self.project(self.hidden(tokens, z, deterministic=deterministic))
