"""Stage 1: masked diffusion language model ("Masked diffusion" in docs/method.md)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import masking
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, LossOutput, Metrics, Params, Part
from diladiff_jax.options import Options, one_of, setting


@dataclasses.dataclass(frozen=True)
class MDLMOptions(Options):
    """Options of the masked diffusion loss."""

    weighting: str = setting(
        "one",
        "weight of an example at masking ratio t: 1 (lower variance), or the bound's 1/t",
        one_of("one", "bound"),
    )


def masked_loss(
    nll: Float[Array, "B L"],
    right: Float[Array, "B L"],
    x_t: Int[Array, "B L"],
    t: Float[Array, " B"],
    process: masking.DiscreteProcess,
    weighting: str,
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy on the corrupted tokens, summed over them and averaged over batch and length.

    Args:
      nll, right: as returned by `masking.token_nll`.
      x_t: the corrupted text.
      t: masking ratios.
      process: says which positions count, and the bound's weight.
      weighting: "bound" multiplies each example by 1/t, "one" by 1.

    Returns:
      The loss, and the metrics "bound" (the 1/t form, nats per token) and "recovery" (share of the
      corrupted tokens that are the most likely prediction).
    """
    masked = process.is_open(x_t)
    nll = jnp.where(masked, nll, 0.0)
    per_example = nll.mean(axis=-1)
    bound = (per_example * process.bound_weight(t)).mean()
    recovery = (right * masked).sum() / jnp.maximum(masked.sum(), 1.0)
    loss = bound if weighting == "bound" else per_example.mean()
    return loss, {"bound": bound, "recovery": recovery}


@dataclasses.dataclass(frozen=True, eq=False)
class MDLM:
    """Corrupts text at stratified masking ratios and learns to fill it in.

    Attributes:
      denoiser: the network.
      process: the diffusion process of the tokens.
      options: see `MDLMOptions`.
      loss_positions: see `masking.token_nll_by_position`.
    """

    denoiser: TokenDenoiser
    process: masking.DiscreteProcess
    options: MDLMOptions = dataclasses.field(default_factory=MDLMOptions)
    loss_positions: int = 128

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Objective.init`."""
        return self.denoiser.init(key, jnp.zeros((1, self.denoiser.length), jnp.int32))["params"]

    def loss(
        self,
        params: Params,
        context: Context,
        tokens: Int[Array, "B L"],
        key: PRNGKeyArray,
        step: Int[Array, ""] | int,
        *,
        train: bool = True,
        part: Part = WHOLE,
    ) -> LossOutput:
        """See `Objective.loss`."""
        time_key, key = jax.random.split(key)
        mask_key, dropout_key = jax.random.split(jax.random.fold_in(key, part.index))
        t = masking.stratified_times(time_key, tokens.shape[0], *part)
        x_t = self.process.corrupt(mask_key, tokens, t)
        call = functools.partial(apply, self.denoiser, params)
        h = call(x_t, deterministic=not train, rngs={"dropout": dropout_key}, method="hidden")
        project = functools.partial(call, method="project")
        nll, right = masking.token_nll_by_position(
            project,
            h,
            tokens,
            jnp.asarray(self.process.sampleable),
            positions=self.loss_positions,
        )
        loss, metrics = masked_loss(nll, right, x_t, t, self.process, self.options.weighting)
        return loss, (metrics, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        """One group, "all"."""
        return "all"
