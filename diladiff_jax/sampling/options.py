"""Settings of sampling: the `sampling` block of an experiment's config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from diladiff_jax.options import (
    Options,
    above,
    between,
    fraction_below,
    key_of,
    one_of,
    setting,
)
from diladiff_jax.sampling.categorical import MAX_TEMPERATURE
from diladiff_jax.sampling.latent import GAMMA_WARPS, SELF_CONDITIONINGS
from diladiff_jax.sampling.orders import ORDERS
from diladiff_jax.sampling.solvers import SOLVERS


@dataclasses.dataclass(frozen=True)
class SamplingOptions(Options):
    """How texts are sampled, unless a call says otherwise. Not a property of the trained model."""

    batch: int = setting(32, "texts sampled at a time", above(0))
    temperature: float = setting(
        1.0,
        "of the token distribution; 0 takes the most likely token",
        between(0, MAX_TEMPERATURE),
    )
    top_p: float = setting(0.9, "mass of the nucleus; 1 keeps every token", between(0, 1))
    decode_steps: int = setting(64, "steps in which the tokens are unmasked", above(0))
    order: str = setting("random", "which positions a step unmasks", key_of(ORDERS))
    threshold: float = setting(0.9, "order `threshold`: confidence to unmask at", between(0, 1))
    refresh_every: int = setting(
        1,
        "if above 1: keys and values of all positions are recomputed only once in this many steps "
        "(an approximation)",
        above(0),
    )
    skip_layers: tuple[int, ...] = setting(
        (), "layers of the backbone that late steps leave out (an approximation); never the last"
    )
    skip_from: float = setting(
        0.5, "share of the steps after which `skip_layers` applies", between(0, 1)
    )
    prior_steps: int = setting(200, "steps of the prior's solver", above(0))
    prior_method: str = setting("euler", "solver of the prior's ODE", key_of(SOLVERS))
    prior_self_conditioning: str = setting(
        "previous", "what the prior is conditioned on", one_of(*SELF_CONDITIONINGS)
    )
    eta: float = setting(
        0.0,
        "prior_method `ddim`: share of fresh noise in each step; 1 draws from the posterior, as "
        "DDPM does",
        between(0, 1),
    )
    final_noise: float = setting(
        0.0,
        "noise level at which latents are handed to the decoder, which must be trained with "
        "latent_noise for it",
        fraction_below(1),
    )
    student_steps: int = setting(5, "steps of the student", above(0))
    student_self_conditioning: str = setting(
        "current",
        "what the student is conditioned on: a second call at the current point (the paper's), or "
        "nothing",
        one_of("current", "none"),
    )
    gamma: float = setting(0.8, "share of fresh noise in the student's sampler", fraction_below(1))
    gamma_warp: str = setting(
        "noise_level", "how gamma-sampling chooses the time to jump to", key_of(GAMMA_WARPS)
    )

    def student_calls(self, steps: int) -> int:
        """Network calls of the student in `steps` steps."""
        return steps * (2 if self.student_self_conditioning == "current" else 1)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Approximations need an order that supports them, and exclude each other."""
        order = ORDERS[self.order]
        if self.refresh_every > 1 and not order.can_refresh:
            able = ", ".join(name for name, each in ORDERS.items() if each.can_refresh)
            yield "refresh_every", f"1 when order is {self.order} (only {able} can refresh)"
        if self.skip_layers and self.refresh_every > 1:
            yield "skip_layers", "empty when refresh_every is above 1, which keeps all layers"
        if self.skip_layers and not order.fixed_steps:
            yield (
                "skip_layers",
                f"empty when order is {self.order}, whose number of steps is not known in advance",
            )
