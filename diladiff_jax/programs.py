"""The jitted programs of a trained model: its samplers and its encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diladiff_jax.experiment import Experiment
from diladiff_jax.jax_settings import under_pinned_settings
from diladiff_jax.objectives.autoregressive import content_mask, next_token_nll
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.sampler import Sample
from diladiff_jax.stages import SampledModel

Array = jax.Array


class Programs:
    """Programs of one experiment on its mesh, each compiled once; parameters are inputs."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._samplers: dict[Any, Callable[..., Sample]] = {}

    def sampler(self, model: SampledModel) -> Callable[..., Sample]:
        """The sampler of a model or control, its batch sharded over the mesh.

        It takes (params, key, indices `[B]`, prompt `[B, L]`, controls); a model that
        `takes_latents` has them, `[B, N, D_lat]`, before the controls. With a "scorer" among the
        parameters, the texts are scored in the same program. The prompt's buffer is donated.
        """
        sampler, mesh = model.sampler(self._experiment.sampler), self._experiment.mesh
        source = None if model.source is None else model.source.bind(sampler.options)
        # Models that differ only in their parameters share one compiled program.
        program = (source, model.takes_latents, model.networks, model.decode)
        if program not in self._samplers:
            batch, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
            if model.takes_latents:
                function, extra = sampler.decode_latents, (batch,)
            else:
                function, extra = functools.partial(sampler.generate, source), ()
            jitted = jax.jit(
                sharding.on_mesh(self._with_score(function), mesh),
                in_shardings=(None, replicated, batch, batch, *extra, replicated),
                out_shardings=batch,
                donate_argnums=3,
            )
            self._samplers[program] = under_pinned_settings(jitted)
        return self._samplers[program]

    @functools.cached_property
    def encode(self) -> Callable[..., Array]:
        """(frozen parameters, statistics, tokens `[B, L]`) -> latents; see `TextEncoder`."""
        mesh = self._experiment.mesh
        batch, replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        encode = sharding.on_mesh(self._experiment.parts.text_encoder.__call__, mesh)
        jitted = jax.jit(encode, in_shardings=(None, replicated, batch), out_shardings=batch)
        return under_pinned_settings(jitted)

    def _with_score(self, function: Callable[..., Sample]) -> Callable[..., Sample]:
        """`function`, and the scorer's judgement if the parameters include one."""
        network, tokenizer = self._experiment.networks.scorer, self._experiment.tokenizer

        def run(params: dict[str, Any], *args: Any) -> Sample:
            sample = function(params, *args)
            if "scorer" not in params:
                return sample
            sampleable = jnp.asarray(tokenizer.sampleable)
            nll = next_token_nll(
                network, params["scorer"], sample.tokens, tokenizer.eot_id, sampleable
            )
            content = content_mask(sample.tokens, tokenizer.eot_id)
            mean = jnp.sum(nll * content, axis=-1) / jnp.sum(content, axis=-1)
            return sample._replace(nll=mean)

        return run
