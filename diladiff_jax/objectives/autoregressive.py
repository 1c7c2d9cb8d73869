"""The autoregressive scorer: the same backbone run causally, trained on held-out text to judge samples."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion.masking import token_nll_by_position
from diladiff_jax.nn.transformer import TokenDenoiser
from diladiff_jax.objectives.base import WHOLE, Context, Metrics, Params, Part

Array = jax.Array


def next_token_nll(
    network: TokenDenoiser,
    params: Params,
    tokens: Array,
    eot_id: int,
    sampleable: Array,
    *,
    positions: int = 128,
    **apply: Any,
) -> Array:
    """`-log p(x^l | x^{<l})` in nats, `[B, L]`; the first token is predicted from an end-of-text."""
    shifted = jnp.concatenate([jnp.full_like(tokens[:, :1], eot_id), tokens[:, :-1]], axis=1)
    h = network.apply({"params": params}, shifted, method="hidden", **apply)
    project = functools.partial(network.apply, {"params": params}, method="project")
    return token_nll_by_position(project, h, tokens, sampleable, positions=positions)[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Autoregressive:
    """Next-token cross-entropy, averaged over all tokens."""

    network: TokenDenoiser  # with causal=True
    eot_id: int
    sampleable: np.ndarray
    loss_positions: int = 128  # see `masking.token_nll_by_position`

    def init(self, key: Array) -> Params:
        return self.network.init(key, jnp.zeros((1, self.network.length), jnp.int32))["params"]

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
        rngs = {"dropout": jax.random.fold_in(key, part.index)}
        nll = next_token_nll(
            self.network,
            params,
            tokens,
            self.eot_id,
            jnp.asarray(self.sampleable),
            positions=self.loss_positions,
            deterministic=not train,
            rngs=rngs,
        )
        loss = nll.mean()
        return loss, ({"perplexity": jnp.exp(loss)}, context.statistics)

    def group(self, path: tuple[str, ...]) -> str:
        return "all"
