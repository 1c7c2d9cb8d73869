"""The pre-norm transformer block of the backbone and the latent denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.layers import MLP, Linear, Norm, SelfAttention, zeros
from diladiff_jax.nn.placement import constrain_sharding

KeysValues = tuple[Float[Array, "B M H K"], Float[Array, "B M H K"]]
"""Keys and values of one block, at M positions."""


class Block(nn.Module):
    """Pre-norm transformer block. A `condition` modulates its norms and branches (adaLN-zero)."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    norm: str = "rmsnorm"
    qk_norm: bool = True
    rotary: bool = False
    causal: bool = False
    dropout: float = 0.0
    plain: bool = False  # whether forward derivatives are needed; see `attention.attend`
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

    def _modulations(self, condition: Array | None) -> Sequence[Array | float]:
        """Shift, scale and gate of attention, then of the MLP: each `[1, 1, D]`, or constant."""
        if condition is None:
            return [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
        return jnp.split(self.modulation(condition)[:, None, :], 6, axis=-1)

    def keys_values(
        self,
        h: Float[Array, "B L D"],
        condition: Float[Array, "1 C"] | None = None,
        positions: Int[Array, "B L"] | None = None,
    ) -> KeysValues:
        """The keys and values that `at` reads, from states at `positions` (default: 0 to L - 1)."""
        shift, scale, *_ = self._modulations(condition)
        return self.attention.keys_values(self.attention_norm(h) * (1 + scale) + shift, positions)

    def at(
        self,
        h: Float[Array, "B P D"],
        memory: KeysValues,
        positions: Int[Array, "B P"] | None = None,
        condition: Float[Array, "1 C"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B P D"]:
        """Runs the block at some positions only.

        Args:
          h: states at `positions`.
          memory: the block's keys and values at all positions (`keys_values`).
          positions: positions of the states (default: 0 to P - 1).
          condition: the input of adaLN, the same for all examples.
          deterministic: whether to leave dropout out.

        Returns:
          The new states at `positions`.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulations(condition)
        x = self.attention.read(self.attention_norm(h) * (1 + scale_a) + shift_a, memory, positions)
        x = gate_a * self.drop(x, deterministic=deterministic)
        # For analyses; Flax stores it only if the caller makes "intermediates" mutable.
        self.sow("intermediates", "attention_update", x)
        h = h + x
        x = self.feed_forward(self.mlp_norm(h) * (1 + scale_m) + shift_m)
        return constrain_sharding(
            h + gate_m * self.drop(x, deterministic=deterministic), "batch", None, None
        )

    def __call__(
        self,
        h: Float[Array, "B L D"],
        condition: Float[Array, "1 C"] | None = None,
        *,
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        return self.at(
            h, self.keys_values(h, condition), None, condition, deterministic=deterministic
        )
