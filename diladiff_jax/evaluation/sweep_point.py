"""One point of the sweep: a model or control at one number of decoding steps, sampled and timed."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model
from diladiff_jax.parallel import sharding
from diladiff_jax.stages import MODELS


def sampling_batch(model: Model) -> int:
    """The config's sampling batch, rounded up to a multiple of the devices."""
    return sharding.round_up(model.config.sampling.batch, model.devices)


class SweepPoint:
    """Samples of one model or control at one number of decoding steps, a batch at a time.

    Attributes:
      name: of the model or control.
      decode_steps: decoding steps.
      latent_steps: steps of the latent sampler, or None if it has none.
    """

    def __init__(
        self, model: Model, name: str, held_out: np.ndarray, seed: int, decode_steps: int
    ) -> None:
        """Restores the parameters; compiles and samples nothing yet.

        Args:
          model: the workdir's models.
          name: of a model or control in `stages.MODELS`.
          held_out: rows `[n, L]`; a control that takes latents decodes theirs.
          seed: of the samples.
          decode_steps: decoding steps.
        """
        self.name, self.decode_steps = name, decode_steps
        self._model, self._held_out = model, held_out
        self._key, self._batch = random_key(seed), sampling_batch(model)
        self._program, self._params = model.program(name), model.parameters(name)
        self._controls = model.controls(name, decode_steps=decode_steps)
        has_steps = MODELS[name].latent_steps is not None
        self.latent_steps = int(self._controls.latent_steps) if has_steps else None
        self._parts: list[np.ndarray] = []
        self._seconds: list[float] = []

    def sample_batch(self) -> None:
        """Samples the next batch and times it; the first call compiles before it is timed."""
        model, first = self._model, len(self._parts) * self._batch
        indices = np.arange(first, first + self._batch)
        latents: tuple[np.ndarray, ...] = ()
        if MODELS[self.name].takes_latents:
            latents = (np.asarray(model.encode(self._held_out[indices % len(self._held_out)])),)
        # On the host, because the program donates the memory of a device array.
        prompt = model.experiment.process.initial((self._batch, model.length))
        arguments = (self._params, self._key, jnp.asarray(indices), prompt, *latents)
        if not self._parts:  # numbers of steps are not compiled in, so one of each kind suffices
            quick = self._controls._replace(decode_steps=jnp.int32(1), latent_steps=jnp.int32(1))
            jax.block_until_ready(self._program(*arguments, quick))
        began = time.perf_counter()
        self._parts.append(np.asarray(self._program(*arguments, self._controls).tokens))
        self._seconds.append(time.perf_counter() - began)

    def result(self, samples: int) -> tuple[np.ndarray, float]:
        """Tokens `[samples, L]`, and the seconds they took without compilation.

        The seconds are those of the median batch, scaled to `samples`.
        """
        tokens = np.concatenate(self._parts)[:samples]
        return tokens, float(np.median(self._seconds)) * samples / self._batch
