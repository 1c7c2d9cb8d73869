"""The latent denoiser (METHOD section 3); the student is the same network with one more time embedding (section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diladiff_jax.nn.layers import Linear, Norm, Positions, TimeEmbedding, zeros
from diladiff_jax.nn.stack import as_used, run_layers
from diladiff_jax.nn.transformer import Block

Array = jax.Array


class LatentDenoiser(nn.Module):
    """Predicts the clean latent: `(z_t [B, N, D_lat], t [B], self_condition [B, N, D_lat]) -> [B, N, D_lat]`, float32.

    Pre-norm blocks with rotary positions and SwiGLU; additive skips from the first half of the layers to the
    second; every layer is given a projection of the time embedding (to every latent) and of the
    self-conditioning (zeros, and so nothing, when absent). With `interval` the network also takes t - r,
    through an embedding that starts at exactly zero. Positions are rotary, which tell latents apart only by
    their distances; `num_latents` adds learned ones.
    """

    latent_dim: int
    width: int
    num_layers: int
    heads: int
    mlp_ratio: float = 4.0
    max_frequency: float = 1.0
    max_period: float = 10.0
    num_latents: int = 0  # above 0: learned positions are added at the entry, for each latent has a role of its own
    interval: bool = False
    plain: bool = False  # whether it is differentiated forwards, which only attention's plain form allows; see `attention.attend`
    scan: bool = False  # one compiled layer for each half, as in `TokenDenoiser`
    remat: str = "none"  # or one of stack.REMAT
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        z_t: Array,
        t: Array,
        self_condition: Array | None = None,
        interval: Array | None = None,
    ) -> Array:
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
            time = time + embedding("interval_time", zero_init=True)(
                jnp.zeros_like(t) if interval is None else interval
            )
        time = nn.silu(time)
        if self_condition is None:
            self_condition = jnp.zeros_like(z_t)
        self_condition = self_condition.astype(self.dtype)

        h = Linear(self.width, ("latent", "embed"), dtype=self.dtype, name="in")(z_t)
        if self.num_latents:
            h = Positions(self.num_latents, 1.0, name="position")(h)
        layers = [
            {
                "time": Linear(self.width, (None, "embed"), name=f"time_{i}"),
                "self": Linear(
                    self.width,
                    ("latent", "embed"),
                    use_bias=False,
                    dtype=self.dtype,
                    name=f"self_{i}",
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
            for i in range(self.num_layers)
        ]

        def layer(call: Callable[[str, Array], Array], h: Array, skip: Array | None) -> Array:
            h = h if skip is None else h + skip
            h = h + call("time", time)[:, None, :].astype(self.dtype)
            h = h + call("self", self_condition)
            return call("block", h)

        half = self.num_layers // 2
        # Whoever asks for intermediates gets those of every layer by its name.
        if self.is_initializing() or self.is_mutable_collection("intermediates"):
            skips: list[Array] = []
            for i, modules in enumerate(layers):
                h = layer(
                    lambda name, x, m=modules: m[name](x),
                    h,
                    skips.pop() if i >= self.num_layers - half else None,
                )
                if i < half:
                    skips.append(h)
        else:
            h = self._halves(layers, layer, h)
        h = Norm(dtype=self.dtype, name="final_norm")(h)
        return Linear(
            self.latent_dim,
            ("embed", "latent"),
            kernel_init=zeros,
            dtype=self.dtype,
            out_dtype=jnp.float32,
            name="out",
        )(h)

    def _halves(
        self, layers: list[dict[str, nn.Module]], layer: Callable[..., Array], h: Array
    ) -> Array:
        """The layers as `memory.scan` and `memory.remat` ask: the first half, the one between if their number is odd, the second half."""
        plain = {name: module.clone(parent=None, name=None) for name, module in layers[0].items()}

        def run(h: Array, own: Any, skip: Array | None) -> tuple[Array, Array]:
            h = layer(lambda name, x: plain[name].apply({"params": own[name]}, x), h, skip)
            return h, h

        parameters = [
            {name: module.variables["params"] for name, module in modules.items()}
            for modules in layers
        ]
        if self.scan:  # the time's map stays in float32
            parameters = [
                own | as_used({name: own[name] for name in ("self", "block")}, self.dtype)
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
