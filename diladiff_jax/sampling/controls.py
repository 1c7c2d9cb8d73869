"""Run-time settings of sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float, Int

from diladiff_jax.sampling.options import SamplingOptions


class Controls(NamedTuple):
    """Run-time settings of a sampling call; changing them does not recompile. All scalars."""

    decode_steps: Int[Array, ""] | int
    latent_steps: Int[Array, ""] | int
    temperature: Float[Array, ""] | float
    top_p: Float[Array, ""] | float
    gamma: Float[Array, ""] | float
    threshold: Float[Array, ""] | float
    eta: Float[Array, ""] | float = 0.0
    final_noise: Float[Array, ""] | float = 0.0

    @classmethod
    def of(
        cls, options: SamplingOptions, latent_steps: Callable[[SamplingOptions], int] | None
    ) -> Controls:
        """The config's settings; `latent_steps` as in a `SampledModel`."""
        steps = 1 if latent_steps is None else latent_steps(options)
        others = (name for name in cls._fields if name != "latent_steps")
        return cls(latent_steps=steps, **{name: getattr(options, name) for name in others})
