"""Layers shared by every network: linear maps, norms, attention, MLPs and embeddings.

Shape letters: B batch, L tokens, N latents, D width, H heads, K head width. Every parameter is kept in
float32 and carries logical axis names ("embed", "heads", "mlp", "vocab", "latent", or None); which mesh
axis each of them lies on is decided elsewhere (`diladiff_jax.parallel.sharding`). `dtype` is the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.placement import constrain_sharding

Array = jax.Array
Initializer = Callable[..., Any]

# Fan-in scaling keeps activations of order one from width 32 to width 8,192 alike.
default_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
zeros = nn.initializers.zeros_init()


def align_last(vector: Array, x: Array) -> Array:
    """Reshapes `[D]` to `[1, ..., 1, D]` with the rank of `x`, so that no rank is promoted silently."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


class Linear(nn.Module):
    """`y = x W (+ b)` over the last axis: `[..., D_in] -> [..., features]`."""

    features: int
    axes: tuple[str | None, str | None] = ("embed", None)
    use_bias: bool = True
    kernel_init: Initializer = default_init
    dtype: Any = jnp.float32
    out_dtype: Any = None  # of the result, where it should not be rounded to `dtype`

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param(
            "kernel",
            nn.with_logical_partitioning(self.kernel_init, self.axes),
            (x.shape[-1], self.features),
        )
        # As one matrix product over all leading axes: on CPUs the gradient is then nearly twice as fast.
        y = jnp.matmul(
            x.astype(self.dtype).reshape(-1, x.shape[-1]),
            kernel.astype(self.dtype),
            preferred_element_type=self.out_dtype,
        )
        y = y.reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bias = self.param(
                "bias", nn.with_logical_partitioning(zeros, self.axes[1:]), (self.features,)
            )
            y = y + align_last(bias, y).astype(y.dtype)
        return y


class Norm(nn.Module):
    """Root-mean-square or layer normalization of the last axis with a learned gain (and bias, if asked for), in float32.

    `epsilon` also bounds the gradient at a zero input by `1 / sqrt(epsilon)`: the zero-initialized query of
    the decoder's cross-attention starts exactly there.
    """

    kind: str = "rmsnorm"  # or "layernorm"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param(
            "scale",
            nn.with_logical_partitioning(nn.initializers.ones_init(), (None,)),
            x.shape[-1:],
        )
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        y = y * align_last(scale, y)
        if self.use_bias:
            y = y + align_last(
                self.param("bias", nn.with_logical_partitioning(zeros, (None,)), x.shape[-1:]), y
            )
        return y.astype(self.dtype)


def rotary(x_BxLxHxK: Array, positions: Array | None = None, base: float = 10_000.0) -> Array:
    """Rotates pairs (i, i + K/2) of every head by position times frequency (RoFormer, arXiv 2104.09864).

    positions `[B, L]` where the rows of x are not positions 0 to L - 1.
    """
    length, half = x_BxLxHxK.shape[1], x_BxLxHxK.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    place = jnp.arange(length)[None, :] if positions is None else positions
    angle = place.astype(jnp.float32)[:, :, None] * frequency[None, None, :]
    cos, sin = jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]
    a, b = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BxLxHxK.dtype)


class Heads(nn.Module):
    """Projects `[B, L, D]` to heads `[B, L, H, K]` with `H * K = width`; optional RMS norm of every head."""

    width: int
    heads: int
    normalize: bool = False
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
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
    """Multi-head self-attention, without biases unless asked for: `[B, L, D] -> [B, L, D]`.

    `keys_values` and `read` are its two halves, for a sampler that wants the result at a few positions only.
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

    def keys_values(self, x: Array, positions: Array | None = None) -> tuple[Array, Array]:
        """`[B, M, D]`, standing at `positions [B, M]` (0 to M - 1 if not given) -> keys and values, each `[B, M, H, K]`."""
        k = self.key(x)
        return rotary(k, positions) if self.rotary else k, self.value(x)

    def read(self, x: Array, memory: tuple[Array, Array], positions: Array | None = None) -> Array:
        """What `x [B, L, D]`, standing at `positions [B, L]` (0 to L - 1 if not given), reads from keys and values: `[B, L, D]`."""
        q = self.query(x)
        q = rotary(q, positions) if self.rotary else q
        return self.out(
            attend(q, *memory, positions=positions, causal=self.causal, plain=self.plain)
        )

    def __call__(self, x: Array) -> Array:
        return self.read(x, self.keys_values(x))


class MLP(nn.Module):
    """Perceptron of hidden width `ratio * width`: tanh-GELU with two matrices, or SwiGLU with three and no bias."""

    width: int
    ratio: float = 4.0
    kind: str = "gelu"  # or "swiglu"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, deterministic: bool = True) -> Array:
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
    """Learned absolute positions added to `[B, L, D]`, at `positions [B, L]` if not 0 to L - 1; `std` at initialization should match
    what they are added to."""

    length: int
    std: float = 0.02

    @nn.compact
    def __call__(self, x: Array, positions: Array | None = None) -> Array:
        table = self.param(
            "table",
            nn.with_logical_partitioning(nn.initializers.normal(self.std), (None, "embed")),
            (self.length, x.shape[-1]),
        )
        return x + (
            table[None, : x.shape[1]]
            if positions is None
            else jnp.take(table, positions, axis=0, mode="clip")
        ).astype(x.dtype)


def sinusoid(
    value: Array, features: int, max_frequency: float = 1.0, max_period: float = 10.0
) -> Array:
    """Sines and cosines of `value [B]` at frequencies from `max_frequency` down by a factor `max_period`.

    Returns `[B, features]`. Low frequencies on purpose: a derivative in time of the embedding is what the
    student's tangent is made of, and it grows with the highest frequency.
    """
    half = features // 2
    frequency = max_frequency * max_period ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = value.astype(jnp.float32)[:, None] * frequency[None, :]
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimeEmbedding(nn.Module):
    """A scalar per example `[B]` -> sinusoid -> two-layer MLP -> `[B, width]`, in float32: close times must stay apart."""

    width: int
    features: int = 256
    max_frequency: float = 1.0
    max_period: float = 10.0
    zero_init: bool = False

    @nn.compact
    def __call__(self, value: Array) -> Array:
        h = sinusoid(value, self.features, self.max_frequency, self.max_period)
        h = nn.silu(Linear(self.width, (None, "embed"), name="in")(h))
        init = zeros if self.zero_init else default_init
        return Linear(self.width, ("embed", None), kernel_init=init, name="out")(h)
