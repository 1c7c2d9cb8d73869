"""The experiments that a benchmark can be run on."""

from __future__ import annotations

from typing import Any

from diladiff_jax import config

SIZES: dict[str, dict[str, Any]] = {
    # The networks of configs/tiny.py.
    "tiny": dict(
        data=dict(length=32),
        tokenizer=dict(vocab_size=512),
        backbone=dict(width=96, num_layers=3, heads=4),
        encoder=dict(num_latents=16, latent_dim=32, width=96, heads=4),
        decoder=dict(cross_layers=(0, 2)),
        latent_denoiser=dict(width=128, num_layers=3, heads=4, mlp_ratio=2.75),
    ),
    "small": dict(
        data=dict(length=256),
        tokenizer=dict(vocab_size=8192),
        backbone=dict(width=384, num_layers=6, heads=6),
        encoder=dict(num_latents=128, latent_dim=384, width=384, heads=6),
        decoder=dict(cross_layers=(0, 5)),
        latent_denoiser=dict(width=384, num_layers=6, heads=6),
    ),
    "paper": {},  # the defaults of the config are the published setting
}
"""By name, the changes to the default config."""


def experiment_config(size: str, *, length: int | None = None, dtype: str = "float32") -> Any:
    """Returns the validated config (a ConfigDict) of one of `SIZES`.

    Args:
      size: its name.
      length: tokens per text; default that of the size.
      dtype: what networks compute in, "float32" or "bfloat16".

    Raises:
      ConfigError: the networks of this size cannot read texts of this length.
    """
    settings = SIZES[size] | {"compute_dtype": dtype}
    if length is None:
        return config.resolve(settings)
    return config.resolve(settings | {"data": SIZES[size].get("data", {}) | {"length": length}})
