"""The autoregressive scorer: the same backbone run causally on held-out text, to judge samples."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion.masking import token_nll_by_position
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, LossOutput, Params, Part
from diladiff_jax.options import Options


@dataclasses.dataclass(frozen=True)
class AutoregressiveOptions(Options):
    """The scorer's loss has no options."""


def next_token_nll(
    network: TokenDenoiser,
    params: Params,
    tokens: Int[Array, "B L"],
    eot_id: int,
    sampleable: Bool[Array, " V"],
    *,
    positions: int = 128,
    **options: Any,
) -> Float[Array, "B L"]:
    """`-log p(x^l | x^{<l})` in nats; the first token is predicted from an end-of-text."""
    shifted = jnp.concatenate([jnp.full_like(tokens[:, :1], eot_id), tokens[:, :-1]], axis=1)
    call = functools.partial(apply, network, params)
    h = call(shifted, method="hidden", **options)
    project = functools.partial(call, method="project")
    return token_nll_by_position(project, h, tokens, sampleable, positions=positions)[0]


def content_mask(tokens: Int[Array, "B L"], eot_id: int) -> Bool[Array, "B L"]:
    """The positions of text and of the end-of-text that closes it, without the padding."""
    padding = (tokens[:, 1:] == eot_id) & (tokens[:, :-1] == eot_id)
    return jnp.concatenate([jnp.ones_like(padding[:, :1]), ~padding], axis=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Autoregressive:
    """Next-token cross-entropy, averaged over all tokens.

    Attributes:
      network: a `TokenDenoiser` with `causal=True`.
      eot_id: the end-of-text, from which the first token is predicted.
      sampleable: bool `[V]`, the ids that are text.
      loss_positions: see `masking.token_nll_by_position`.
    """

    network: TokenDenoiser
    eot_id: int
    sampleable: np.ndarray
    loss_positions: int = 128

    def init(self, key: PRNGKeyArray) -> Params:
        """See `Objective.init`."""
        return self.network.init(key, jnp.zeros((1, self.network.length), jnp.int32))["params"]

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
        nll = next_token_nll(
            self.network,
            params,
            tokens,
            self.eot_id,
            jnp.asarray(self.sampleable),
            positions=self.loss_positions,
            deterministic=not train,
            rngs={"dropout": jax.random.fold_in(key, part.index)},
        )
        loss = nll.mean()
        return loss, ({"perplexity": jnp.exp(loss)}, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        """One group, "all"."""
        return "all"
