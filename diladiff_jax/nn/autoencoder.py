"""The autoencoder (docs/method.md, Autoencoder).

An encoder compresses text features to a latent, and the denoiser learns to decode given the latent.
Shape letters: B batch, L tokens, P chosen positions, N latents, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.block import KeysValues
from diladiff_jax.nn.layers import MLP, Heads, Linear, Norm, Positions, parameter, zeros
from diladiff_jax.nn.transformer import Cache, TokenDenoiser

LatentKeysValues = tuple[Float[Array, "B N H K"], Float[Array, "B N H K"]]
"""Keys and values of the latent for one cross-attention."""
Memory = dict[str, LatentKeysValues]
"""Keys and values of the latent for every cross-attention, by its layer's index as text."""


class EncoderLayer(nn.Module):
    """One layer of the encoder, which updates the latents z and never the features f.

    It computes `z += Attn(Q = RMS(z), K, V = [W_z RMS(z); W_f RMS(f)])`, then `z += MLP(RMS(z))`.
    """

    width: int
    heads: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z: Float[Array, "B N D"],
        f: Float[Array, "B L D_feat"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B N D"]:
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
        mlp = MLP(self.width, dropout=self.dropout, dtype=self.dtype, name="mlp")
        return z + mlp(h, deterministic=deterministic)


class LatentEncoder(nn.Module):
    """Perceiver-style encoder from standardized features to raw latents, which are float32.

    N learned vectors read the features through `num_layers` layers. If the latents are narrower
    than the encoder, a linear map before the last norm reduces them to `latent_dim`.
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
    def __call__(
        self, features: Float[Array, "B L D_feat"], *, deterministic: bool = True
    ) -> Float[Array, "B N D_lat"]:
        init, shape = nn.initializers.normal(0.02), (self.num_latents, self.width)
        table = parameter(self, "latents", init, (None, "embed"), shape)
        # Features and latents are standardized, so smaller positions would be negligible.
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
    """Cross-attention that reads only the latent: `h += ZeroConv(CrossAttn(ZeroConv(h); z))`.

    It adds learned positions to the latents. ZeroConv is a linear map that is zero at
    initialization, where the layer therefore adds exactly nothing.
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

    def keys_values(self, z: Float[Array, "B N D_lat"]) -> LatentKeysValues:
        """Keys and values of the latent, which are the same in every decoding step."""
        z = self.position(z.astype(self.dtype))
        return self.key(z), self.value(z)

    def read(self, h: Float[Array, "B L D"], memory: LatentKeysValues) -> Float[Array, "B L D"]:
        """`h` plus what it reads from the latent's keys and values."""
        update = self.zero_out(self.out(attend(self.query(self.zero_in(h)), *memory)))
        # For analyses; Flax stores it only if the caller makes "intermediates" mutable.
        self.sow("intermediates", "update", update)
        return h + update

    def __call__(
        self, h: Float[Array, "B L D"], z: Float[Array, "B N D_lat"]
    ) -> Float[Array, "B L D"]:
        return self.read(h, self.keys_values(z))


class LatentConditionedDecoder(nn.Module):
    """The denoiser, with cross-attention to the latent before some of its layers.

    Its parameters are `{"backbone": <parameters of the TokenDenoiser>, "cross_<layer>": ...}`, so
    that a trained denoiser's parameters fit unchanged. At initialization, both compute exactly the
    same function.
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

    def memory(self, z: Float[Array, "B N D_lat"]) -> Memory:
        """The keys and values of the latent that each cross-attention reads."""
        return {name: cross.keys_values(z) for name, cross in self.cross.items()}

    def _cross_by_layer(self) -> list[tuple[int, CrossAttention]]:
        return sorted((int(name), cross) for name, cross in self.cross.items())

    def before_last(
        self,
        tokens: Int[Array, "B L"],
        memory: Memory,
        *,
        skip: tuple[int, ...] = (),
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        """The input of the last block, computed without the blocks in `skip`.

        The cross-attention before a skipped block still runs.
        """
        h, done = self.backbone.embed(tokens), 0
        for i, cross in self._cross_by_layer():
            h = self.backbone.layers(h, done, i, skip=skip, deterministic=deterministic)
            h, done = cross.read(h, memory[str(i)]), i
        last = self.backbone.num_layers - 1
        return self.backbone.layers(h, done, last, skip=skip, deterministic=deterministic)

    def states_at(
        self,
        tokens: Int[Array, "B P"],
        memory: Memory,
        cache: Cache = (),
        positions: Int[Array, "B P"] | None = None,
        *,
        write: bool = True,
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """`TokenDenoiser.states_at`, with cross-attention to the latent's keys and values."""
        h, done = self.backbone.embed(tokens, positions), 0
        for i, cross in self._cross_by_layer():
            h, cache = self.backbone.layers_at(h, done, i, cache, positions, write=write)
            h, done = cross.read(h, memory[str(i)]), i
        h, cache = self.backbone.layers_at(
            h, done, self.backbone.num_layers, cache, positions, write=write
        )
        return self.backbone.finish(h), cache

    def last_keys_values(self, h: Float[Array, "B L D"]) -> KeysValues:
        """See `TokenDenoiser.last_keys_values`."""
        return self.backbone.last_keys_values(h)

    def finish_at(
        self, h: Float[Array, "B L D"], memory: KeysValues, positions: Int[Array, "B P"]
    ) -> Float[Array, "B P D"]:
        """See `TokenDenoiser.finish_at`."""
        return self.backbone.finish_at(h, memory, positions)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        z: Float[Array, "B N D_lat"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        """The final hidden states."""
        h = self.before_last(tokens, self.memory(z), deterministic=deterministic)
        last = self.backbone.num_layers - 1
        h = self.backbone.layers(h, last, last + 1, deterministic=deterministic)
        return self.backbone.finish(h)

    def project(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Maps final hidden states to float32 logits."""
        return self.backbone.project(h)

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        z: Float[Array, "B N D_lat"],
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B L V"]:
        return self.project(self.hidden(tokens, z, deterministic=deterministic))
