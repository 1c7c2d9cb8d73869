"""Generation, latent first and then tokens, as one pure function of parameters and keys."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diladiff_jax.diffusion import gaussian
from diladiff_jax.diffusion.masking import AbsorbingProcess, DiscreteProcess
from diladiff_jax.nn.call import apply
from diladiff_jax.nn.networks import Networks
from diladiff_jax.sampling.autoregressive import AutoregressiveSampler
from diladiff_jax.sampling.categorical import (
    Keys,
    sample_keys,
    split_per_sample,
)
from diladiff_jax.sampling.controls import Controls
from diladiff_jax.sampling.latent_sources import LatentSource
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.orders import ORDERS, TokenControls, TokenNetwork


class Sample(NamedTuple):
    """A batch of samples.

    Attributes:
      tokens: int32 `[B, L]`.
      unmasked_at: the step that unmasked each position, `[B, L]`; -1 where it was given.
      latents: `[B, N, D_lat]`, or None without a latent.
      nll: negative log-likelihood of each text in nats per token, `[B]`, where the program
        includes a scorer; else None.
    """

    tokens: Int[Array, "B L"]
    unmasked_at: Int[Array, "B L"]
    latents: Float[Array, "B N D"] | None
    nll: Float[Array, " B"] | None = None


class TokenDecoder(Protocol):
    """A function that fills in the tokens of a sampled model in place of `Sampler.decode`."""

    __name__: str

    def __call__(
        self,
        sampler: Sampler,
        params: Mapping[str, Any],
        keys: Keys,
        prompt: Int[Array, "B L"],
        latents: Float[Array, "B N D"] | None,
        controls: Controls,
    ) -> Sample:
        """Fills the open positions of `prompt`; see `Sampler.decode`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """The samplers of one experiment; methods are pure functions of parameters and keys.

    Sample i of a key depends on `(key, indices[i])` alone, not on the batch or the number of
    devices, up to the rounding of the network, whose products other shapes may sum in another
    order.

    Attributes:
      networks: the experiment's modules.
      schedule: the noise schedule of the latents.
      process: the diffusion process of the tokens.
      options: the `sampling` block of the config.
      step_form: how the student's prediction is read; a name in `meanflow.STEP_FORMS`.
      eot_id: the end-of-text, from which a decoder from left to right starts.
      token_decoder: fills in the tokens; None takes `options.order`.

    Raises:
      ValueError: the order of `options` works for absorbing masks only, and `process` is another.
    """

    networks: Networks
    schedule: gaussian.Schedule
    process: DiscreteProcess
    options: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    step_form: str = "velocity"
    eot_id: int | None = None
    token_decoder: TokenDecoder | None = None

    def __post_init__(self) -> None:
        order, absorbing = self.options.order, isinstance(self.process, AbsorbingProcess)
        if not (absorbing or ORDERS[order].any_process):
            raise ValueError(f"order: got {order!r}, expected one for any process, as 'plain' is")

    def generate(
        self,
        source: LatentSource | None,
        params: Mapping[str, Any],
        key: PRNGKeyArray,
        indices: Int[Array, " B"],
        prompt: Int[Array, "B L"],
        controls: Controls,
    ) -> Sample:
        """Samples `indices` of `key`: the latent first, then the open tokens of `prompt`.

        Args:
          source: where the latent comes from; None samples the plain denoiser.
          params: what `source` and `decode` read, by name: "teacher", "student", "decoder" or
            "denoiser".
          key: one key for all samples.
          indices: the samples' numbers.
          prompt: tokens, open where the model is free.
          controls: see `Controls`.
        """
        keys = sample_keys(key, indices)
        latent_keys, token_keys = split_per_sample(keys)
        z = None if source is None else source(self, params, latent_keys, controls)
        return self.decode(params, token_keys, prompt, z, controls)

    def decode_latents(
        self,
        params: Mapping[str, Any],
        key: PRNGKeyArray,
        indices: Int[Array, " B"],
        prompt: Int[Array, "B L"],
        latents: Float[Array, "B N D"],
        controls: Controls,
    ) -> Sample:
        """Decodes given latents: encoded, interpolated or edited. Arguments as in `generate`."""
        return self.decode(params, sample_keys(key, indices), prompt, latents, controls)

    def decode(
        self,
        params: Mapping[str, Any],
        keys: Keys,
        prompt: Int[Array, "B L"],
        latents: Float[Array, "B N D"] | None,
        controls: Controls,
    ) -> Sample:
        """Fills the open positions of `prompt`: by the decoder, or without latents the denoiser."""
        if self.token_decoder is not None:
            return self.token_decoder(self, params, keys, prompt, latents, controls)
        if latents is None:
            call = functools.partial(apply, self.networks.denoiser, params["denoiser"])
            memory = ()
        else:
            call = functools.partial(apply, self.networks.decoder, params["decoder"])
            # Keys and values of the latent: once for all steps.
            memory = (call(latents, method="memory"),)

        if self.options.refresh_every > 1:
            adapter = self._refreshing_network(call, memory, prompt)
        else:
            adapter = self._exact_network(call, memory, controls)
        tokens, unmasked_at = ORDERS[self.options.order].decode(
            adapter,
            self.process,
            keys,
            prompt,
            TokenControls(
                controls.decode_steps, controls.temperature, controls.top_p, controls.threshold
            ),
        )
        return Sample(tokens, unmasked_at, latents)

    def _exact_network(
        self, call: Callable[..., Any], memory: tuple[Any, ...], controls: Controls
    ) -> TokenNetwork:
        """Recomputes everything in every step, the last block only at the step's positions."""
        skipped = self.options.skip_layers

        def context(x: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
            def through(skip: tuple[int, ...]) -> Array:
                return call(x, *memory, skip=skip, method="before_last")

            if skipped:  # early steps decide most, and keep all layers
                late = k >= self.options.skip_from * controls.decode_steps
                h = jax.lax.cond(late, lambda: through(skipped), lambda: through(()))
            else:
                h = through(())
            return h, call(h, method="last_keys_values")

        def logits(context: tuple[Array, tuple[Array, Array]], positions: Array) -> Array:
            h = call(*context, positions, method="finish_at")
            return call(h, method="project")

        return TokenNetwork(context, logits)

    def _refreshing_network(
        self, call: Callable[..., Any], memory: tuple[Any, ...], prompt: Array
    ) -> TokenNetwork:
        """Keys and values of all layers are kept, and refreshed where tokens changed."""
        masked = self.process.initial((1, 1)).astype(prompt.dtype)

        def context(x: Array, k: Array) -> Any:
            return call(x, *memory, method="states_at")[1]

        def refresh(cache: Any, x: Array, positions: Array) -> Any:
            return call(x, *memory, cache, positions, method="states_at")[1]

        def logits(cache: Any, positions: Array) -> Array:
            blank = jnp.broadcast_to(jnp.asarray(masked), positions.shape)
            h, _ = call(blank, *memory, cache, positions, write=False, method="states_at")
            return call(h, method="project")

        return TokenNetwork(context, logits, refresh, self.options.refresh_every)


def left_to_right(
    sampler: Sampler,
    params: Mapping[str, Any],
    keys: Keys,
    prompt: Int[Array, "B L"],
    latents: Float[Array, "B N D"] | None,
    controls: Controls,
) -> Sample:
    """A `TokenDecoder`: one token after another, by a causal denoiser with cached keys and values.

    It reads parameters "denoiser". See `AutoregressiveSampler`.

    Raises:
      ValueError: the sampler has no `eot_id`, or its denoiser is not causal.
    """
    if sampler.eot_id is None:
        raise ValueError("eot_id: got None, expected the end-of-text, which comes first")
    decode = AutoregressiveSampler(sampler.networks.denoiser, sampler.process, sampler.eot_id)
    found = decode(params["denoiser"], keys, prompt, controls.temperature, controls.top_p)
    positions = jnp.arange(prompt.shape[1], dtype=jnp.int32)
    unmasked_at = jnp.where(sampler.process.is_open(prompt), positions, -1)
    return Sample(found.tokens, unmasked_at, latents)
