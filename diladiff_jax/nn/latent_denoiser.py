"""The denoiser of latents (docs/method.md, Prior).

The student is the same network with one more time embedding (docs/method.md, Student).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from diladiff_jax.nn.block import Block
from diladiff_jax.nn.layers import Linear, Norm, Positions, TimeEmbedding, zeros
from diladiff_jax.nn.stack import cast_matrices, run_layers

Call = Callable[[str, Array], Array]
Layer = Callable[[Call, Array, Array | None], Array]


class LatentDenoiser(nn.Module):
    """Predicts the clean latent from a noisy one, in float32.

    Pre-norm blocks with rotary positions and SwiGLU, and additive skips from the first half of the
    layers to the second. Every layer adds a projection of the time embedding, the same for every
    latent, and one of the self-conditioning, which is zero when absent. With `interval`, the
    network also takes t - r, through an embedding that is exactly zero at initialization.
    """

    latent_dim: int
    width: int
    num_layers: int
    heads: int
    mlp_ratio: float = 4.0
    max_frequency: float = 1.0
    max_period: float = 10.0
    # Above 0: add learned positions at the input. Rotary positions distinguish latents only by
    # their distances, but each latent has a role of its own.
    num_latents: int = 0
    interval: bool = False
    plain: bool = False  # whether forward derivatives are needed; see `attention.attend`
    scan: bool = False  # whether to scan one compiled layer per half; see `stack.run_layers`
    remat: str = "none"  # or a key of `stack.REMAT`
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z_t: Float[Array, "B N D_lat"],
        t: Float[Array, " B"],
        self_condition: Float[Array, "B N D_lat"] | None = None,
        interval: Float[Array, " B"] | None = None,
    ) -> Float[Array, "B N D_lat"]:
        """Predicts the clean latent.

        Args:
          z_t: noisy latents.
          t: their times.
          self_condition: an earlier prediction of the clean latent (default: zeros).
          interval: t - r; only read if the module's `interval` is set (default: zeros).

        Returns:
          The predicted clean latents.
        """
        time = self._time_embedding(t, interval)
        if self_condition is None:
            self_condition = jnp.zeros_like(z_t)
        self_condition = self_condition.astype(self.dtype)

        h = Linear(self.width, ("latent", "embed"), dtype=self.dtype, name="in")(z_t)
        if self.num_latents:
            h = Positions(self.num_latents, 1.0, name="position")(h)
        layers = [self._layer_modules(i) for i in range(self.num_layers)]

        def layer(call: Call, h: Array, skip: Array | None) -> Array:
            h = h if skip is None else h + skip
            h = h + call("time", time)[:, None, :].astype(self.dtype)
            h = h + call("self", self_condition)
            return call("block", h)

        # Call each module itself, so that intermediates are stored under its own name.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            h = self._run_by_module(layers, layer, h)
        else:
            h = self._run_by_half(layers, layer, h)
        h = Norm(dtype=self.dtype, name="final_norm")(h)
        return Linear(
            self.latent_dim,
            ("embed", "latent"),
            kernel_init=zeros,
            dtype=self.dtype,
            out_dtype=jnp.float32,
            name="out",
        )(h)

    def _time_embedding(self, t: Array, interval: Array | None) -> Array:
        """The embedding of t, plus that of t - r if the network takes it: `[B]` -> `[B, D]`."""

        def embedding(name: str, zero_init: bool = False) -> TimeEmbedding:
            return TimeEmbedding(
                self.width,
                max_frequency=self.max_frequency,
                max_period=self.max_period,
                zero_init=zero_init,
                name=name,
            )

        time = embedding("time")(t)
        if self.interval:
            interval = jnp.zeros_like(t) if interval is None else interval
            time = time + embedding("interval_time", zero_init=True)(interval)
        return nn.silu(time)

    def _layer_modules(self, i: int) -> dict[str, nn.Module]:
        """The modules of layer i."""
        return {
            "time": Linear(self.width, (None, "embed"), name=f"time_{i}"),
            "self": Linear(
                self.width, ("latent", "embed"), use_bias=False, dtype=self.dtype, name=f"self_{i}"
            ),
            "block": Block(
                self.width,
                self.heads,
                self.mlp_ratio,
                "swiglu",
                qk_norm=True,
                rotary=True,
                plain=self.plain,
                dtype=self.dtype,
                name=f"block_{i}",
            ),
        }

    def _run_by_module(self, layers: list[dict[str, Any]], layer: Layer, h: Array) -> Array:
        """Runs the layers by calling each module."""
        half = self.num_layers // 2
        skips: list[Array] = []
        for i, modules in enumerate(layers):
            skip = skips.pop() if i >= self.num_layers - half else None
            h = layer(lambda name, x, m=modules: m[name](x), h, skip)
            if i < half:
                skips.append(h)
        return h

    def _run_by_half(self, layers: list[dict[str, Any]], layer: Layer, h: Array) -> Array:
        """Runs the first half, the middle layer if the depth is odd, and the second half."""
        unbound = {name: module.clone(parent=None, name=None) for name, module in layers[0].items()}

        def run(h: Array, own: Any, skip: Array | None) -> tuple[Array, Array]:
            h = layer(lambda name, x: unbound[name].apply({"params": own[name]}, x), h, skip)
            return h, h

        parameters = [
            {name: module.variables["params"] for name, module in modules.items()}
            for modules in layers
        ]
        if self.scan:  # the time projection stays in float32
            parameters = [
                own | cast_matrices({name: own[name] for name in ("self", "block")}, self.dtype)
                for own in parameters
            ]
        half, how = len(layers) // 2, {"scan": self.scan, "remat": self.remat}
        skips = None
        if half:
            h, skips = run_layers(run, h, parameters[:half], **how)
        if len(layers) % 2:
            h, _ = run_layers(run, h, parameters[half : half + 1], **how)
        if half:
            h, _ = run_layers(run, h, parameters[-half:], skips, reverse=True, **how)
        return h
