"""Sampling from left to right with cached keys and values: the usual way, for comparison.

The network is a causal `TokenDenoiser` that was trained to predict the next token, as the stage
`scorer` is. Its first token is predicted from an end-of-text.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.stack import cast_matrices
from diladiff_jax.nn.transformer import Cache, TokenDenoiser
from diladiff_jax.sampling.categorical import (
    Keys,
    sample_categorical,
    text_logits,
    token_distribution,
    uniform_per_sample,
)


class AutoregressiveSample(NamedTuple):
    """A batch of samples.

    Attributes:
      tokens: int32 `[B, L]`.
      log_probs: log p(x^l | x^{<l}) of each token among the tokens of text, in nats, before
        temperature and nucleus, `[B, L]`. The given tokens have theirs too.
    """

    tokens: Int[Array, "B L"]
    log_probs: Float[Array, "B L"]


class _State(NamedTuple):
    """What one step hands to the next: the cache, the last token `[B]`, and the results so far."""

    cache: Cache
    last: Array
    sample: AutoregressiveSample


@dataclasses.dataclass(frozen=True, eq=False)
class AutoregressiveSampler:
    """Samples one token after another, each from one call of the network at one position.

    All positions are sampled in one program. The cache grows in segments, so that early positions
    do not attend over its unused part; the number of segments does not change the samples.

    Attributes:
      network: a `TokenDenoiser` with `causal=True`.
      process: the diffusion process of the tokens; it says which ids are text, and which positions
        of a prompt are open.
      start_id: the token that the first one is predicted from, the end-of-text.
      segments: how often the cache grows; each segment is compiled on its own.

    Raises:
      ValueError: the network is not causal, or there is no segment.
    """

    network: TokenDenoiser
    process: DiscreteProcess
    start_id: int
    segments: int = 8

    def __post_init__(self) -> None:
        if not self.network.causal:
            raise ValueError("network: got one that sees later tokens, expected causal=True")
        if self.segments < 1:
            raise ValueError(f"segments: got {self.segments}, expected at least 1")

    def __call__(
        self,
        params: Mapping[str, Any],
        keys: Keys,
        prompt: Int[Array, "B L"],
        temperature: Float[Array, ""] | float = 1.0,
        top_p: Float[Array, ""] | float = 1.0,
    ) -> AutoregressiveSample:
        """Fills the open positions of `prompt` from left to right; meant to be jitted.

        A given token is kept, and seen by the positions after it only.

        Args:
          params: the network's parameters.
          keys: one per sample; sample i depends on `keys[i]` alone.
          prompt: tokens, open where the model is free.
          temperature: of the token distributions; 0 takes the most likely token.
          top_p: mass of the nucleus; 1 keeps every token.
        """
        batch, length = prompt.shape
        call = functools.partial(apply, self.network, self._cast(params))
        uniform = uniform_per_sample(keys, (length,))
        step = functools.partial(self._step, call, prompt, uniform, temperature, top_p)
        state = _State(
            self._empty_cache(batch),
            jnp.full((batch,), self.start_id, prompt.dtype),
            AutoregressiveSample(prompt, jnp.zeros(prompt.shape)),
        )
        start = 0
        for stop in sorted({-(-length * i // self.segments) for i in range(1, self.segments + 1)}):
            state = jax.lax.fori_loop(start, stop, step, _with_room(state, stop))
            start = stop
        return state.sample

    def _step(
        self,
        call: Callable[..., Any],
        prompt: Array,
        uniform: Array,
        temperature: Array | float,
        top_p: Array | float,
        position: Array,
        state: _State,
    ) -> _State:
        """Samples the token at `position` given the one before it."""
        positions = jnp.full((len(prompt), 1), position)
        h, cache = call(state.last[:, None], state.cache, positions, method="states_at")
        sampleable = jnp.asarray(self.process.sampleable)
        logits = text_logits(call(h[:, 0], method="project"), sampleable)
        drawn = sample_categorical(
            token_distribution(logits, temperature, top_p), uniform[:, position]
        )
        given = prompt[:, position]
        is_open = self.process.is_open(given[:, None])[:, 0]
        token = jnp.where(is_open, drawn, given).astype(prompt.dtype)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        tokens, log_probs = state.sample
        sample = AutoregressiveSample(
            tokens.at[:, position].set(token), log_probs.at[:, position].set(log_p)
        )
        return _State(cache, token, sample)

    def _empty_cache(self, batch: int) -> Cache:
        """Keys and values of no position, for every block."""
        network = self.network
        shape = (batch, 0, network.heads, network.width // network.heads)
        return tuple(
            (jnp.zeros(shape, network.dtype), jnp.zeros(shape, network.dtype))
            for _ in range(network.num_layers)
        )

    def _cast(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Casts what the network would cast in every step. Its time embedding stays float32."""
        return {
            name: tree if name == "time" else cast_matrices(tree, self.network.dtype)
            for name, tree in params.items()
        }


def _with_room(state: _State, length: int) -> _State:
    """The state with a cache for `length` positions."""
    more = [(0, 0), (0, length - state.cache[0][0].shape[1]), (0, 0), (0, 0)]
    cache = tuple((jnp.pad(k, more), jnp.pad(v, more)) for k, v in state.cache)
    return state._replace(cache=cache)
