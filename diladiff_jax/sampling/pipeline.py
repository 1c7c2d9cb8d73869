"""Latent, then tokens: generation as one pure function of parameters and keys, made to be jitted whole."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion import gaussian, meanflow
from diladiff_jax.nn.networks import Networks
from diladiff_jax.sampling import latent, tokens

Array = jax.Array

MODELS = ("mdlm", "mdlm_long", "ladiff", "diladiff")
"""What can be sampled; `mdlm_long`, the control with the whole budget of decoder steps, is drawn like `mdlm`."""


ORDERS = ("random", "count", "confidence", "threshold")
"""Which positions a step unmasks: each with the probability of the reverse process; a fixed number in random order; the same number of
the surest; or all that are as sure as `Controls.threshold`."""


class Controls(NamedTuple):
    """Run-time settings of a draw: changing them does not compile anew. All scalars."""

    decode_steps: Array | int
    latent_steps: Array | int
    temperature: Array | float
    top_p: Array | float
    gamma: Array | float
    threshold: Array | float


class Sample(NamedTuple):
    """tokens int32 `[B, L]`; the step that unmasked each position, `[B, L]`, -1 where given; latents `[B, N, D_lat]` or None; and, where
    whoever composes a program with a scorer puts it there, the text's negative log-likelihood under that, nats a token `[B]`."""

    tokens: Array
    unmasked_at: Array
    latents: Array | None
    nll: Array | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """The samplers of one experiment. Methods are pure; parameters come as `{"denoiser", "decoder", "teacher", "student", ...}`.

    Sample i of a key is drawn from `(key, indices[i])` alone, whatever the batch or the number of devices; its tokens are the same up to
    the rounding of the network, whose products other shapes may sum in another order.

    Raises:
      ValueError: settings that exclude each other.
    """

    networks: Networks
    schedule: gaussian.Schedule
    mask_id: int
    sampleable: np.ndarray
    step_form: str = "velocity"
    prior_method: str = "euler"
    prior_self_conditioning: str = "previous"
    gamma_warp: str = "noise_level"
    order: str = "random"  # see ORDERS
    refresh_every: int = (
        1  # above 1: keys and values are kept between steps; orders "random" and "count" only
    )
    skip_layers: tuple[
        int, ...
    ] = ()  # blocks (never the last) that the steps from `skip_from` of all on are made without; not with kept keys and values
    skip_from: float = 0.5

    def __post_init__(self) -> None:
        if self.refresh_every > 1 and (self.order not in ("random", "count") or self.skip_layers):
            raise ValueError(
                f"refresh_every is {self.refresh_every}; it must be 1 with order {self.order!r} and skip_layers {self.skip_layers}"
            )
        if self.skip_layers and self.order == "threshold":
            raise ValueError(
                f"skip_layers is {self.skip_layers}; it must be empty with order 'threshold', whose number of steps is not known before"
            )

    def prior_latents(self, params: Mapping[str, Any], keys: Array, controls: Controls) -> Array:
        """LaDiff: the probability-flow ODE of the prior, `[B, N, D_lat]`."""

        def denoise(z_t: Array, t: Array, self_condition: Array) -> Array:
            return self.networks.teacher.apply(
                {"params": params["teacher"]}, z_t, t, self_condition
            )

        noise = latent.normal_per_sample(keys, self.networks.latent_shape)
        return latent.probability_flow(
            denoise,
            self.schedule,
            noise,
            controls.latent_steps,
            method=self.prior_method,
            self_conditioning=self.prior_self_conditioning,
        )

    def student_latents(self, params: Mapping[str, Any], keys: Array, controls: Controls) -> Array:
        """DiLaDiff: a few average-velocity steps of the student, `[B, N, D_lat]`."""

        def clean(z_t: Array, t: Array, self_condition: Array) -> Array:
            return self.networks.student.apply(
                {"params": params["student"]}, z_t, t, self_condition, jnp.zeros_like(t)
            )

        def average_velocity(z_t: Array, t: Array, r: Array, self_condition: Array) -> Array:
            z = self.networks.student.apply(
                {"params": params["student"]}, z_t, t, self_condition, t - r
            )
            return meanflow.STEP_FORMS[self.step_form](self.schedule, z_t, z, t, r)

        with jax.default_matmul_precision("float32"):  # as it was trained
            return latent.few_step(
                average_velocity,
                clean,
                self.schedule,
                keys,
                self.networks.latent_shape,
                controls.latent_steps,
                gamma=controls.gamma,
                warp=self.gamma_warp,
            )

    def decode(
        self,
        params: Mapping[str, Any],
        keys: Array,
        prompt: Array,
        latents: Array | None,
        controls: Controls,
    ) -> Sample:
        """Fills the masked positions of `prompt [B, L]`: by the decoder given latents, else by the plain denoiser."""
        if latents is None:
            network, variables, memory = self.networks.denoiser, {"params": params["denoiser"]}, ()
        else:
            network, variables = self.networks.decoder, {"params": params["decoder"]}
            memory = (
                network.apply(variables, latents, method="memory"),
            )  # keys and values of the latent: once for all steps

        def context_of(x: Array, k: Array) -> tuple[Array, tuple[Array, Array]]:
            def through(skip: tuple[int, ...]) -> Array:
                return network.apply(variables, x, *memory, skip=skip, method="before_last")

            if self.skip_layers:  # early steps lay down what later ones fill in
                late = k >= self.skip_from * controls.decode_steps
                h = jax.lax.cond(late, lambda: through(self.skip_layers), lambda: through(()))
            else:
                h = through(())
            return h, network.apply(variables, h, method="last_keys_values")

        def logits_at(context: tuple[Array, tuple[Array, Array]], positions: Array) -> Array:
            h = network.apply(variables, *context, positions, method="finish_at")
            return network.apply(variables, h, method="project")

        def cache_of(x: Array, k: Array) -> Any:
            return network.apply(variables, x, *memory, method="states_at")[1]

        def renew(cache: Any, x: Array, positions: Array) -> Any:
            return network.apply(variables, x, *memory, cache, positions, method="states_at")[1]

        def logits_from(cache: Any, positions: Array) -> Array:
            masked = jnp.full(positions.shape, self.mask_id, prompt.dtype)
            h, _ = network.apply(
                variables, masked, *memory, cache, positions, write=False, method="states_at"
            )
            return network.apply(variables, h, method="project")

        kept: dict[str, Any] = {}
        if self.refresh_every > 1:
            context_of, logits_at, kept = (
                cache_of,
                logits_from,
                {"renew": renew, "every": self.refresh_every},
            )
        form = {
            "random": functools.partial(tokens.ancestral, **kept),
            "count": functools.partial(tokens.ancestral, equal_counts=True, **kept),
            "confidence": tokens.by_confidence,
            "threshold": functools.partial(tokens.by_confidence, threshold=controls.threshold),
        }[self.order]
        filled, when = form(
            context_of,
            logits_at,
            keys,
            prompt,
            self.mask_id,
            jnp.asarray(self.sampleable),
            controls.decode_steps,
            temperature=controls.temperature,
            top_p=controls.top_p,
        )
        return Sample(filled, when, latents)

    def generate(
        self,
        model: str,
        params: Mapping[str, Any],
        key: Array,
        indices: Array,
        prompt: Array,
        controls: Controls,
    ) -> Sample:
        """Draws samples `indices [B]` of `key`: the latent by the model's own sampler, then the tokens of `prompt [B, L]`.

        Raises:
          ValueError: no such model.
        """
        if model not in MODELS:
            raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        latent_keys, token_keys = jax.vmap(lambda k: jax.random.split(k))(keys).T
        if model == "ladiff":
            z = self.prior_latents(params, latent_keys, controls)
        elif model == "diladiff":
            z = self.student_latents(params, latent_keys, controls)
        else:
            z = None
        return self.decode(params, token_keys, prompt, z, controls)

    def decode_noise(
        self,
        params: Mapping[str, Any],
        key: Array,
        indices: Array,
        prompt: Array,
        controls: Controls,
    ) -> Sample:
        """The null-latent control: decodes given N(0, I) in the latent's place, as augmentation trained it."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        latent_keys, token_keys = jax.vmap(lambda k: jax.random.split(k))(keys).T
        return self.decode(
            params,
            token_keys,
            prompt,
            latent.normal_per_sample(latent_keys, self.networks.latent_shape),
            controls,
        )

    def decode_latents(
        self,
        params: Mapping[str, Any],
        key: Array,
        indices: Array,
        prompt: Array,
        latents: Array,
        controls: Controls,
    ) -> Sample:
        """Decodes given latents `[B, N, D_lat]` (true ones, interpolated ones, edited ones)."""
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
        return self.decode(params, keys, prompt, latents, controls)
