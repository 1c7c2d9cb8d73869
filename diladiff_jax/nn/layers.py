"""Layers shared by every network: linear maps, norms, attention, MLPs and embeddings.

Shape letters: B batch, L tokens, M keys, N latents, D width, H heads, K width of a head. `dtype` is
the type of the computation. Parameters are float32 and carry logical axis names ("embed", "heads",
"mlp", "vocab", "latent", or None), which `diladiff_jax.parallel.sharding` maps to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.placement import constrain_sharding

Initializer = Callable[..., Any]

# Fan-in scaling keeps activations of order one at every width, from 32 to 8,192.
default_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
zeros = nn.initializers.zeros_init()


def parameter(
    module: nn.Module,
    name: str,
    init: Initializer,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> Float[Array, "*shape"]:
    """Declares a parameter of `module` whose axes carry the logical names `axes`."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


def align_last(vector: Float[Array, " D"], x: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    """Reshapes `[D]` to `[1, ..., 1, D]` with the rank of `x`, to avoid implicit rank promotion."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """`y = x W (+ b)` over the last axis: `[..., D_in] -> [..., features]`."""

    features: int
    axes: tuple[str | None, str | None] = ("embed", None)
    use_bias: bool = True
    kernel_init: Initializer = default_init
    dtype: Any = jnp.float32
    out_dtype: Any = None  # type of the result, if it should not be rounded to `dtype`

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch D_out"]:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, self.axes, shape)
        # One matrix product over all leading axes: its gradient is nearly twice as fast on CPUs.
        y = jnp.matmul(
            x.astype(self.dtype).reshape(-1, x.shape[-1]),
            kernel.astype(self.dtype),
            preferred_element_type=self.out_dtype,
        )
        y = y.reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bias = parameter(self, "bias", zeros, self.axes[1:], (self.features,))
            y = y + align_last(bias, y).astype(y.dtype)
        return y


class Norm(nn.Module):
    """Root-mean-square or layer normalization of the last axis, in float32, with a learned gain.

    `epsilon` also bounds the gradient at a zero input by `1 / sqrt(epsilon)`. This matters because
    the decoder's cross-attention starts with a query of exactly zero.
    """

    kind: str = "rmsnorm"  # or "layernorm"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        scale = parameter(self, "scale", nn.initializers.ones_init(), (None,), x.shape[-1:])
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * align_last(scale, y)
        if self.use_bias:
            y = y + align_last(parameter(self, "bias", zeros, (None,), x.shape[-1:]), y)
        return y.astype(self.dtype)


def rotary(
    x_BxLxHxK: Float[Array, "B L H K"],
    positions: Int[Array, "#B L"] | None = None,
    base: float = 10_000.0,
) -> Float[Array, "B L H K"]:
    """Rotates pairs (i, i + K/2) of every head by position times frequency (arXiv 2104.09864).

    Args:
      x_BxLxHxK: queries or keys.
      positions: positions of the rows of x, if not 0 to L - 1.
      base: the frequency of pair i is base^(-2 i / K).

    Returns:
      The rotated queries or keys.
    """
    length, half = x_BxLxHxK.shape[1], x_BxLxHxK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    place = jnp.arange(length)[None, :] if positions is None else positions
    angle = place.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    a, b = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxK.dtype)


class Heads(nn.Module):
    """Projects to H heads of width K = width / H, and optionally RMS-normalizes each head."""

    width: int
    heads: int
    normalize: bool = False
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L H K"]:
        y = Linear(
            self.width, ("embed", "heads"), use_bias=self.use_bias, dtype=self.dtype, name="linear"
        )(x)
        y = constrain_sharding(
            y.reshape(*y.shape[:-1], self.heads, self.width // self.heads),
            "batch",
            None,
            "heads",
            None,
        )
        return Norm(dtype=self.dtype, name="norm")(y) if self.normalize else y


class SelfAttention(nn.Module):
    """Multi-head self-attention, by default without biases.

    `keys_values` and `read` are its two halves, for samplers that need only a few positions.
    """

    width: int
    heads: int
    qk_norm: bool = True
    rotary: bool = False
    causal: bool = False
    plain: bool = False  # see `attention.attend`
    dtype: Any = jnp.float32
    use_bias: bool = False

    def setup(self) -> None:
        self.query = Heads(self.width, self.heads, self.qk_norm, self.dtype, self.use_bias)
        self.key = Heads(self.width, self.heads, self.qk_norm, self.dtype, self.use_bias)
        self.value = Heads(self.width, self.heads, False, self.dtype, self.use_bias)
        self.out = Linear(self.width, ("heads", "embed"), use_bias=self.use_bias, dtype=self.dtype)

    def keys_values(
        self, x: Float[Array, "B M D"], positions: Int[Array, "B M"] | None = None
    ) -> tuple[Float[Array, "B M H K"], Float[Array, "B M H K"]]:
        """Keys and values of states x at `positions` (default: 0 to M - 1)."""
        k = self.key(x)
        return rotary(k, positions) if self.rotary else k, self.value(x)

    def read(
        self,
        x: Float[Array, "B L D"],
        memory: tuple[Float[Array, "B M H K"], Float[Array, "B M H K"]],
        positions: Int[Array, "B L"] | None = None,
    ) -> Float[Array, "B L D"]:
        """What states x at `positions` (default: 0 to L - 1) read from keys and values."""
        q = self.query(x)
        q = rotary(q, positions) if self.rotary else q
        return self.out(
            attend(q, *memory, positions=positions, causal=self.causal, plain=self.plain)
        )

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        return self.read(x, self.keys_values(x))


class MLP(nn.Module):
    """Perceptron with hidden width `ratio * width`.

    It is a tanh-GELU with two matrices and biases, or a SwiGLU with three matrices and no bias.
    """

    width: int
    ratio: float = 4.0
    kind: str = "gelu"  # or "swiglu"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], *, deterministic: bool = True
    ) -> Float[Array, "B L D"]:
        hidden = int(self.ratio * self.width)
        if self.kind == "swiglu":
            gate = Linear(hidden, ("embed", "mlp"), use_bias=False, dtype=self.dtype, name="gate")(
                x
            )
            up = Linear(hidden, ("embed", "mlp"), use_bias=False, dtype=self.dtype, name="up")(x)
            h = nn.silu(gate) * up
        else:
            up = Linear(hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
            h = nn.gelu(up, approximate=True)
        h = constrain_sharding(
            nn.Dropout(self.dropout)(h, deterministic=deterministic), "batch", None, "mlp"
        )
        return Linear(
            self.width,
            ("mlp", "embed"),
            use_bias=self.kind != "swiglu",
            dtype=self.dtype,
            name="down",
        )(h)


class Positions(nn.Module):
    """Adds learned absolute position embeddings.

    `std`, the standard deviation at initialization, should match the scale of the input.
    """

    length: int
    std: float = 0.02

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L D"], positions: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Adds the embeddings of `positions` (default: 0 to L - 1)."""
        init, shape = nn.initializers.normal(self.std), (self.length, x.shape[-1])
        table = parameter(self, "table", init, (None, "embed"), shape)
        if positions is None:
            added = table[None, : x.shape[1]]
        else:
            added = jnp.take(table, positions, axis=0, mode="clip")
        return x + added.astype(x.dtype)


def sinusoid(
    value: Float[Array, " B"], features: int, max_frequency: float = 1.0, max_period: float = 10.0
) -> Float[Array, "B {features}"]:
    """Cosines and sines of `value` at geometrically spaced frequencies.

    The frequencies are low on purpose: the student's tangent contains the derivative of the
    embedding in time, which grows with the highest frequency.

    Args:
      value: one scalar per example, such as a time.
      features: width of the result, half of it cosines and half sines.
      max_frequency: the highest frequency, in radians per unit of `value`.
      max_period: frequency i of `features / 2` is max_frequency * max_period^(-2 i / features).

    Returns:
      The embedding.
    """
    half = features // 2
    frequency = max_frequency * max_period ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = value.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
    """Embeds one scalar per example: a sinusoid and a two-layer MLP.

    It computes in float32, so that close times stay distinguishable.
    """

    width: int
    features: int = 256
    max_frequency: float = 1.0
    max_period: float = 10.0
    zero_init: bool = False

    @nn.compact
    def __call__(self, value: Float[Array, " B"]) -> Float[Array, "B D"]:
        h = sinusoid(value, self.features, self.max_frequency, self.max_period)
        h = nn.silu(Linear(self.width, (None, "embed"), name="in")(h))
        init = zeros if self.zero_init else default_init
        return Linear(self.width, ("embed", None), kernel_init=init, name="out")(h)
