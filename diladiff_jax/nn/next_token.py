"""Negative log-likelihood of next tokens, without all logits in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Positions of each row whose logits exist at a time. All logits of 32 rows of 1,024 tokens over
# 50,257 ids would take 6.6 GB.
_CHUNK = 128


def next_token_nll(
    project: Callable[[Array], Array], h: Float[Array, "B L D"], targets: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """Computes -log softmax(project(h))[targets] in nats.

    The logits of at most 128 positions of each row exist at a time.

    Args:
      project: maps hidden states `[B, K, D]` to float32 logits `[B, K, V]`.
      h: hidden states.
      targets: the id to score at each position.
    """
    length = targets.shape[1]
    size = next(n for n in range(min(_CHUNK, length), 0, -1) if not length % n)

    def chunk(item: tuple[Array, Array]) -> Array:
        states, wanted = item
        logits = project(states)
        picked = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    def cut(x: Array) -> Array:
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

    return jax.lax.map(chunk, (cut(h), cut(targets))).swapaxes(0, 1).reshape(targets.shape)


class NextTokenModel(nn.Module):
    """A causal network that predicts the next token, in two parts that its subclass defines.

    The hidden states of all positions are computed first, and then projected to the vocabulary,
    which `nll` does for a few positions at a time.
    """

    def hidden_states(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The normalized hidden states of the last block."""
        raise NotImplementedError

    def project(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Maps hidden states to float32 logits."""
        raise NotImplementedError

    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        return self.project(self.hidden_states(ids))

    def nll(self, ids: Int[Array, "B L"], targets: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """Computes -log p(targets_l | ids_1 .. ids_l) in nats; see `next_token_nll`."""
        return self.nll_of_states(self.hidden_states(ids), targets)

    def nll_of_states(
        self, h: Float[Array, "B L D"], targets: Int[Array, "B L"]
    ) -> Float[Array, "B L"]:
        """`nll` after `hidden_states`."""
        return next_token_nll(self.project, h, targets)
