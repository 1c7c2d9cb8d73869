"""The masked-diffusion backbone, which, run causally, is also the autoregressive scorer.

One module covers the paper's backbone (learned positions, QK-norm, RMSNorm) and the DiT of the
public MDLM and DUO checkpoints (rotary positions, LayerNorm without bias, adaLN with a constant
time input, a zero-initialized head).
"""

from __future__ import annotations

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.block import Block, KeysValues
from diladiff_jax.nn.layers import (
    Linear,
    Norm,
    Positions,
    TimeEmbedding,
    default_init,
    parameter,
    zeros,
)
from diladiff_jax.nn.placement import constrain_sharding
from diladiff_jax.nn.stack import cast_matrices, run_layers

Cache = tuple[KeysValues, ...]
"""Keys and values of every block at all L positions."""


class TokenDenoiser(nn.Module):
    """Maps tokens to logits. It does not see the masking ratio (docs/method.md, Masked diffusion).

    Its parts are methods, so that the latent-conditioned decoder can act between layers, and a
    sampler can compute only the positions it needs:

    - `embed`, `layers` (a range of blocks), `finish` and `project` make up `__call__`.
    - `last_keys_values` and `finish_at` run the last block at some positions only.
    - `layers_at` and `states_at` run all blocks at some positions, on cached keys and values.

    Shape letters: B batch, L tokens, P chosen positions, D width, V vocabulary.
    """

    vocab_size: int
    length: int
    width: int
    num_layers: int
    heads: int
    mlp_ratio: float = 4.0
    positions: str = "learned"  # or "rotary"
    norm: str = "rmsnorm"  # or "layernorm"
    qk_norm: bool = True
    adaln: int = 0  # width of the constant time condition; 0: no adaLN
    embedding_std: float = 0.02  # token embeddings and learned positions at initialization
    tied_head: bool = False
    zero_head: bool = False
    causal: bool = False
    dropout: float = 0.0
    scan: bool = False  # whether to scan one compiled block; see `stack.run_layers`
    remat: str = "none"  # or a key of `stack.REMAT`
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init, shape = nn.initializers.normal(self.embedding_std), (self.vocab_size, self.width)
        self.embedding = parameter(self, "embedding", init, ("vocab", "embed"), shape)
        if self.positions == "learned":
            self.position = Positions(self.length, self.embedding_std)
        if self.adaln:
            self.time = TimeEmbedding(self.adaln, max_period=10_000.0)
            self.final_modulation = Linear(
                2 * self.width, (None, "embed"), kernel_init=zeros, dtype=self.dtype
            )
        self.blocks = [
            Block(
                self.width,
                self.heads,
                self.mlp_ratio,
                "gelu",
                self.norm,
                self.qk_norm,
                self.positions == "rotary",
                self.causal,
                self.dropout,
                dtype=self.dtype,
                name=f"block_{i}",
            )
            for i in range(self.num_layers)
        ]
        self.final_norm = Norm(self.norm, dtype=self.dtype)
        if not self.tied_head:
            init = zeros if self.zero_head else default_init
            self.head = Linear(
                self.vocab_size,
                ("embed", "vocab"),
                use_bias=self.adaln > 0,
                kernel_init=init,
                dtype=self.dtype,
                out_dtype=jnp.float32,
            )

    def embed(
        self, tokens: Int[Array, "B L"], positions: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Token embeddings, plus learned positions if there are any (default: 0 to L - 1)."""
        h = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return constrain_sharding(
            self.position(h, positions) if self.positions == "learned" else h, "batch", None, None
        )

    def _condition(self) -> Array | None:
        # The public checkpoints were trained with a time input of zero.
        return nn.silu(self.time(jnp.zeros((1,)))) if self.adaln else None

    def layers(
        self,
        h: Float[Array, "B L D"],
        start: int,
        stop: int,
        *,
        skip: tuple[int, ...] = (),
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        """Runs blocks `start` to `stop - 1`, except those in `skip`."""
        condition = self._condition()
        blocks = [self.blocks[i] for i in range(start, stop) if i not in skip]
        # Call each block itself, so that intermediates are stored under its own name.
        if self.is_initializing() or self.is_mutable_collection("intermediates") or not blocks:
            for block in blocks:
                h = block(h, condition, deterministic=deterministic)
            return h
        block = blocks[0].clone(parent=None, name=None)
        parameters = [block.variables["params"] for block in blocks]
        dropout = self.dropout > 0 and not deterministic

        def layer(h: Array, own: Any, key: Array | None) -> tuple[Array, None]:
            rngs: Any = {"dropout": key} if dropout else {}
            call = functools.partial(block.apply, {"params": own}, rngs=rngs)
            return cast(Array, call(h, condition, deterministic=deterministic)), None

        if self.scan:
            parameters = [cast_matrices(own, self.dtype) for own in parameters]
        keys = jax.random.split(self.make_rng("dropout"), len(blocks)) if dropout else None
        return run_layers(layer, h, parameters, keys, scan=self.scan, remat=self.remat)[0]

    def layers_at(
        self,
        h: Float[Array, "B P D"],
        start: int,
        stop: int,
        cache: Cache,
        positions: Int[Array, "B P"] | None,
        *,
        write: bool = True,
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """Runs blocks `start` to `stop - 1` at some positions, on cached keys and values.

        Args:
          h: states at `positions`.
          start: the first block to run.
          stop: one past the last block to run.
          cache: keys and values of every block.
          positions: positions of the states. If None, the states are those of all positions, and
            keys and values are computed from them and appended to `cache`.
          write: whether to first update the cache at `positions`. Positions of L and above write
            nothing.

        Returns:
          The new states, and the cache.
        """
        condition, made = self._condition(), list(cache)
        for i in range(start, stop):
            block = self.blocks[i]
            if positions is None:
                made.append(block.keys_values(h, condition))
            elif write:
                (old_k, old_v), (k, v) = made[i], block.keys_values(h, condition, positions)
                rows = jnp.arange(h.shape[0])[:, None]
                made[i] = (
                    old_k.at[rows, positions].set(k, mode="drop"),
                    old_v.at[rows, positions].set(v, mode="drop"),
                )
            h = block.at(h, made[i], positions, condition)
        return h, tuple(made)

    def states_at(
        self,
        tokens: Int[Array, "B P"],
        cache: Cache = (),
        positions: Int[Array, "B P"] | None = None,
        *,
        write: bool = True,
    ) -> tuple[Float[Array, "B P D"], Cache]:
        """Runs all blocks as `layers_at` does: final hidden states of `tokens`, and the cache."""
        h, cache = self.layers_at(
            self.embed(tokens, positions), 0, self.num_layers, cache, positions, write=write
        )
        return self.finish(h), cache

    def last_keys_values(self, h: Float[Array, "B L D"]) -> KeysValues:
        """Keys and values of the last block, from its input at all positions."""
        return self.blocks[-1].keys_values(h, self._condition())

    def finish_at(
        self, h: Float[Array, "B L D"], memory: KeysValues, positions: Int[Array, "B P"]
    ) -> Float[Array, "B P D"]:
        """Runs the last block and the final norm at some positions only.

        Args:
          h: the last block's input at all positions.
          memory: the last block's keys and values (`last_keys_values`).
          positions: where to compute the final hidden states.

        Returns:
          The final hidden states at `positions`.
        """
        chosen = jnp.take_along_axis(h, positions[:, :, None], axis=1)
        return self.finish(self.blocks[-1].at(chosen, memory, positions, self._condition()))

    def finish(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Applies the final norm. The result is what `project` maps to logits."""
        h = self.final_norm(h)
        condition = self._condition()
        if condition is not None:
            modulation = self.final_modulation(condition)[:, None, :]
            shift, scale = jnp.split(modulation, 2, axis=-1)
            h = h * (1 + scale) + shift
        return h

    def project(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Maps final hidden states to float32 logits."""
        if self.tied_head:
            logits = jnp.einsum(
                "...d,vd->...v",
                h,
                self.embedding.astype(h.dtype),
                preferred_element_type=jnp.float32,
            )
        else:
            logits = self.head(h)
        return constrain_sharding(logits, "batch", *[None] * (h.ndim - 2), "vocab")

    def before_last(
        self, tokens: Int[Array, "B L"], *, skip: tuple[int, ...] = ()
    ) -> Float[Array, "B L D"]:
        """The input of the last block, computed without the blocks in `skip`."""
        return self.layers(self.embed(tokens), 0, self.num_layers - 1, skip=skip)

    def hidden(
        self, tokens: Int[Array, "B L"], *, deterministic: bool = True
    ) -> Float[Array, "B L D"]:
        """The final hidden states."""
        return self.finish(
            self.layers(self.embed(tokens), 0, self.num_layers, deterministic=deterministic)
        )

    def features(
        self, tokens: Int[Array, "B L"], *, with_embeddings: bool
    ) -> Float[Array, "B L D_feat"]:
        """Contextual features of clean text, in float32: the final hidden states.

        `with_embeddings` concatenates the token embeddings, so that D_feat is 2 D.
        """
        h = self.hidden(tokens).astype(jnp.float32)
        if not with_embeddings:
            return h
        return jnp.concatenate([h, jnp.take(self.embedding, tokens, axis=0)], axis=-1)

    def __call__(
        self, tokens: Int[Array, "B L"], *, deterministic: bool = True
    ) -> Float[Array, "B L V"]:
        return self.project(self.hidden(tokens, deterministic=deterministic))
