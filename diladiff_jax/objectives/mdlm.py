"""Stage 1: masked diffusion language model (METHOD section 1)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion import masking
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Params, Part

Array = jax.Array


def masked_loss(
    nll: Array, right: Array, x_t: Array, t: Array, mask_id: int, weighting: str
) -> tuple[Array, Metrics]:
    """Cross-entropy on the masked tokens, summed over them and averaged over batch and length.

    nll and right as of `masking.token_nll`, x_t, all `[B, L]`; t `[B]`. `weighting` "bound" multiplies each example by 1/t,
    "one" by 1 (lower variance, converges better). The metric "bound" is the 1/t form in nats per token.
    """
    masked = x_t == mask_id
    nll = jnp.where(masked, nll, 0.0)
    per_example = nll.mean(axis=-1)
    bound = (per_example * masking.bound_weight(t)).mean()
    metrics = {"bound": bound, "recovery": (right * masked).sum() / jnp.maximum(masked.sum(), 1.0)}
    return (bound if weighting == "bound" else per_example.mean()), metrics


@dataclasses.dataclass(frozen=True, eq=False)
class MDLM:
    """Masks at stratified ratios and learns to fill in. `sampleable` bool `[V]`: ids that may ever be predicted."""

    denoiser: TokenDenoiser
    mask_id: int
    sampleable: np.ndarray
    weighting: str = "one"
    loss_positions: int = 128  # see `masking.token_nll_by_position`

    def init(self, key: Array) -> Params:
        return self.denoiser.init(key, jnp.zeros((1, self.denoiser.length), jnp.int32))["params"]

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Array,
        key: Array,
        step: Array,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> tuple[Array, tuple[Metrics, dict[str, Any]]]:
        time_key, key = jax.random.split(key)
        mask_key, dropout_key = jax.random.split(jax.random.fold_in(key, part.index))
        t = masking.stratified_times(time_key, tokens.shape[0], *part)
        x_t = masking.mask_tokens(mask_key, tokens, t, self.mask_id)
        h = self.denoiser.apply(
            {"params": params},
            x_t,
            deterministic=not train,
            rngs={"dropout": dropout_key},
            method="hidden",
        )
        project = functools.partial(self.denoiser.apply, {"params": params}, method="project")
        nll, right = masking.token_nll_by_position(
            project, h, tokens, jnp.asarray(self.sampleable), positions=self.loss_positions
        )
        loss, metrics = masked_loss(nll, right, x_t, t, self.mask_id, self.weighting)
        return loss, (metrics, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        return "all"
