"""The masked-diffusion backbone, which is also (run causally) the autoregressive scorer.

One module covers the paper's backbone (learned positions, QK-norm, RMSNorm) and the DiT of the public MDLM
and DUO checkpoints (rotary positions, LayerNorm without bias, adaLN with a constant time input, zero head).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.nn.layers import (
    MLP,
    Linear,
    Norm,
    Positions,
    SelfAttention,
    TimeEmbedding,
    default_init,
    zeros,
)
from diladiff_jax.nn.placement import constrain_sharding
from diladiff_jax.nn.stack import as_used, run_layers

Array = jax.Array
Cache = tuple[tuple[Array, Array], ...]
"""Keys and values of every block at all positions, each `[B, L, H, K]`."""


class Block(nn.Module):
    """Pre-norm transformer block, `[B, L, D] -> [B, L, D]`; with `condition` its norms and branches are modulated."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    norm: str = "rmsnorm"
    qk_norm: bool = True
    rotary: bool = False
    causal: bool = False
    dropout: float = 0.0
    plain: bool = False  # see `attention.attend`
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.attention_norm = Norm(self.norm, dtype=self.dtype)
        self.attention = SelfAttention(
            self.width, self.heads, self.qk_norm, self.rotary, self.causal, self.plain, self.dtype
        )
        self.mlp_norm = Norm(self.norm, dtype=self.dtype)
        self.feed_forward = MLP(self.width, self.mlp_ratio, self.mlp, dtype=self.dtype, name="mlp")
        self.modulation = Linear(
            6 * self.width, (None, "embed"), kernel_init=zeros, dtype=self.dtype
        )
        self.drop = nn.Dropout(self.dropout)

    def _modulations(self, condition: Array | None) -> list[Array | float]:
        """Shift, scale and gate of the attention, then of the MLP: adaLN-zero, `[1, C]` -> six times `[1, 1, D]`."""
        if condition is None:
            return [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        return jnp.split(self.modulation(condition)[:, None, :], 6, axis=-1)

    def keys_values(
        self, h: Array, condition: Array | None = None, positions: Array | None = None
    ) -> tuple[Array, Array]:
        """The keys and values that `at` reads, each `[B, L, H, K]`; of states at `positions [B, L]` if not at 0 to L - 1."""
        shift, scale, *_ = self._modulations(condition)
        return self.attention.keys_values(self.attention_norm(h) * (1 + scale) + shift, positions)

    def at(
        self,
        h: Array,
        memory: tuple[Array, Array],
        positions: Array | None = None,
        condition: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The block at some positions only: their states `h [B, K, D]`, all keys and values, `positions [B, K]` -> `[B, K, D]`."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulations(condition)
        x = self.attention.read(self.attention_norm(h) * (1 + scale_a) + shift_a, memory, positions)
        x = gate_a * self.drop(x, deterministic=deterministic)
        self.sow(
            "intermediates", "attention_update", x
        )  # for analyses; nothing is kept unless asked for
        h = h + x
        x = self.feed_forward(self.mlp_norm(h) * (1 + scale_m) + shift_m)
        return constrain_sharding(
            h + gate_m * self.drop(x, deterministic=deterministic), "batch", None, None
        )

    def __call__(
        self, h: Array, condition: Array | None = None, *, deterministic: bool = True
    ) -> Array:
        return self.at(
            h, self.keys_values(h, condition), None, condition, deterministic=deterministic
        )


class TokenDenoiser(nn.Module):
    """Tokens to logits: `[B, L] -> [B, L, V]`. The network sees no masking ratio (METHOD section 1).

    The pieces are methods, so that the latent-conditioned decoder can act between layers and a sampler can
    finish only the positions it needs: `embed`, `layers` (a range of blocks), `finish` (or `last_keys_values` and
    `finish_at`), `project`; `layers_at` and `states_at` work at some positions on keys and values that were kept.
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
    adaln: int = 0  # width of the constant time condition; 0 leaves adaLN out
    embedding_std: float = 0.02  # of token embeddings and learned positions at initialization
    tied_head: bool = False
    zero_head: bool = False
    causal: bool = False
    dropout: float = 0.0
    scan: bool = (
        False  # one compiled block for all layers, whose parameters are stacked when it runs
    )
    remat: str = "none"  # or one of stack.REMAT
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embedding = self.param(
            "embedding",
            nn.with_logical_partitioning(
                nn.initializers.normal(self.embedding_std), ("vocab", "embed")
            ),
            (self.vocab_size, self.width),
        )
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

    def embed(self, tokens: Array, positions: Array | None = None) -> Array:
        """`[B, L]` -> `[B, L, D]`, positions added where they are learned: `positions [B, L]`, or 0 to L - 1."""
        h = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        return constrain_sharding(
            self.position(h, positions) if self.positions == "learned" else h, "batch", None, None
        )

    def _condition(self) -> Array | None:
        # The public checkpoints were trained with the time input held at zero.
        return nn.silu(self.time(jnp.zeros((1,)))) if self.adaln else None

    def layers(
        self,
        h: Array,
        start: int,
        stop: int,
        *,
        skip: tuple[int, ...] = (),
        deterministic: bool = True,
    ) -> Array:
        """Runs blocks `start` to `stop - 1`, without those in `skip`."""
        condition, blocks = (
            self._condition(),
            [self.blocks[i] for i in range(start, stop) if i not in skip],
        )
        # Whoever asks for intermediates gets those of every layer by its name.
        if self.is_initializing() or self.is_mutable_collection("intermediates") or not blocks:
            for block in blocks:
                h = block(h, condition, deterministic=deterministic)
            return h
        plain, parameters = (
            blocks[0].clone(parent=None, name=None),
            [block.variables["params"] for block in blocks],
        )
        dropout = self.dropout > 0 and not deterministic

        def layer(h: Array, own: Any, key: Array | None) -> tuple[Array, None]:
            return plain.apply(
                {"params": own},
                h,
                condition,
                deterministic=deterministic,
                rngs={"dropout": key} if dropout else {},
            ), None

        if self.scan:
            parameters = [as_used(own, self.dtype) for own in parameters]
        keys = jax.random.split(self.make_rng("dropout"), len(blocks)) if dropout else None
        return run_layers(layer, h, parameters, keys, scan=self.scan, remat=self.remat)[0]

    def layers_at(
        self,
        h: Array,
        start: int,
        stop: int,
        cache: Cache,
        positions: Array | None,
        *,
        write: bool = True,
    ) -> tuple[Array, Cache]:
        """Runs blocks `start` to `stop - 1` on states `h [B, K, D]` at `positions [B, K]`, which read keys and values from the cache.

        With `write` their own are put there first; positions of L and above are left out of it. Without positions the states are
        those of all positions, and the cache is made of them (what is given as `cache` is kept in front).
        """
        condition, made = self._condition(), list(cache)
        for i in range(start, stop):
            block = self.blocks[i]
            if positions is None:
                made.append(block.keys_values(h, condition))
            elif write:
                rows = jnp.arange(h.shape[0])[:, None]
                own = block.keys_values(h, condition, positions)
                made[i] = tuple(
                    kept.at[rows, positions].set(new, mode="drop")
                    for kept, new in zip(made[i], own, strict=True)
                )
            h = block.at(h, made[i], positions, condition)
        return h, tuple(made)

    def states_at(
        self,
        tokens: Array,
        cache: Cache = (),
        positions: Array | None = None,
        *,
        write: bool = True,
    ) -> tuple[Array, Cache]:
        """`layers_at` of all blocks, from tokens `[B, K]`: final hidden states `[B, K, D]`, and the cache."""
        h, cache = self.layers_at(
            self.embed(tokens, positions), 0, self.num_layers, cache, positions, write=write
        )
        return self.finish(h), cache

    def last_keys_values(self, h: Array) -> tuple[Array, Array]:
        """Keys and values of the last block, from what enters it at all positions, `[B, L, D]`."""
        return self.blocks[-1].keys_values(h, self._condition())

    def finish_at(self, h: Array, memory: tuple[Array, Array], positions: Array) -> Array:
        """Last block and final norm for `positions [B, K]` alone: what enters the block at all positions `[B, L, D]`, and
        its keys and values -> the final hidden states there, `[B, K, D]`."""
        chosen = jnp.take_along_axis(h, positions[:, :, None], axis=1)
        return self.finish(self.blocks[-1].at(chosen, memory, positions, self._condition()))

    def finish(self, h: Array) -> Array:
        """The final norm: `[B, L, D]` -> the hidden states that `project` maps to logits."""
        h = self.final_norm(h)
        if self.adaln:
            shift, scale = jnp.split(
                self.final_modulation(self._condition())[:, None, :], 2, axis=-1
            )
            h = h * (1 + scale) + shift
        return h

    def project(self, h: Array) -> Array:
        """Hidden states `[..., D]` -> float32 logits `[..., V]`."""
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

    def before_last(self, tokens: Array, *, skip: tuple[int, ...] = ()) -> Array:
        """`[B, L]` -> what enters the last block, `[B, L, D]`, made without the blocks in `skip`."""
        return self.layers(self.embed(tokens), 0, self.num_layers - 1, skip=skip)

    def hidden(self, tokens: Array, *, deterministic: bool = True) -> Array:
        """`[B, L]` -> final hidden states `[B, L, D]`."""
        return self.finish(
            self.layers(self.embed(tokens), 0, self.num_layers, deterministic=deterministic)
        )

    def features(self, tokens: Array, *, with_embeddings: bool) -> Array:
        """Contextual features of clean text, float32 `[B, L, D]`, or `[B, L, 2 D]` with the token embeddings beside them."""
        h = self.hidden(tokens).astype(jnp.float32)
        return (
            jnp.concatenate([h, jnp.take(self.embedding, tokens, axis=0)], axis=-1)
            if with_embeddings
            else h
        )

    def __call__(self, tokens: Array, *, deterministic: bool = True) -> Array:
        return self.project(self.hidden(tokens, deterministic=deterministic))
