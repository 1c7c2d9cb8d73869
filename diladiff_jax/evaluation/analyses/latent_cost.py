"""What sampling the latent costs: table 2 of the paper."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.analyses import published_values
from diladiff_jax.evaluation.figures import Table, cells, table
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.models import title
from diladiff_jax.evaluation.sweep_point import sampling_batch
from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model
from diladiff_jax.stages import MODELS


def latent_overhead(
    model: Model, decode_steps: Sequence[int], *, rounds: int = 5, seed: int = 0
) -> Table:
    """Table 2: the time to sample a latent over the time to decode it.

    Both are timed separately and in turns, at the config's sampling batch.

    Args:
      model: the workdir's models.
      decode_steps: numbers of decoding steps.
      rounds: times that everything is timed.
      seed: of latents and decoding.
    """
    timer = _Timer(model, seed)
    rows = []
    for steps in decode_steps:
        seconds: dict[str, list[float]] = {name: [] for name in timer.names}
        decoding: list[float] = []
        for _ in range(rounds):
            for name in timer.names:
                seconds[name].append(timer.latent_seconds(name))
            decoding.append(timer.decoding_seconds(steps))
        for name in timer.names:
            overhead = intervals.ratio(np.array(seconds[name]), np.array(decoding))
            means = [float(np.mean(seconds[name])), float(np.mean(decoding))]
            rows.append([title(name), timer.latent_steps(name), steps, *means, *cells(overhead)])
    order = [title(name) for name in MODELS]
    theirs = "; ".join(
        f"{title(r.model)} {r.latent_steps} + {r.decode_steps}: {r.share:.0%}"
        for r in published_values.OVERHEAD
    )
    return table(
        "latent_overhead",
        "table 2",
        "What the latent costs",
        (
            "model",
            "latent steps",
            "decoding steps",
            "latent (s per batch)",
            "decoding (s per batch)",
            "latent / decoding",
            "low",
            "high",
        ),
        sorted(rows, key=lambda row: order.index(row[0])),
        f"batch {timer.batch}, intervals over {rounds} timed rounds."
        f" The paper, at L = 1024 and batch 32: {theirs}",
    )


class _Timer:
    """Times one batch of latents, or of decoding. Everything is compiled at the start."""

    def __init__(self, model: Model, seed: int) -> None:
        self._model, self.batch = model, sampling_batch(model)
        self.names = tuple(name for name in model.models if MODELS[name].source is not None)
        self._key, self._indices = random_key(seed), jnp.arange(self.batch)
        self._keys = jax.vmap(lambda i: jax.random.fold_in(self._key, i))(self._indices)
        self._controls = {name: model.controls(name) for name in self.names}
        self._sample = {
            name: jax.jit(functools.partial(source, model.sampler))
            for name in self.names
            if (source := MODELS[name].source) is not None
        }
        self._latents = {name: np.asarray(self._latent(name, steps=1)) for name in self.names}
        for name in self.names:
            jax.block_until_ready(self._decode(name, decode_steps=1))

    def latent_steps(self, name: str) -> int:
        return int(self._controls[name].latent_steps)

    def latent_seconds(self, name: str) -> float:
        return _seconds(lambda: self._latent(name))

    def decoding_seconds(self, steps: int) -> float:
        """Decoding takes the same time whichever model sampled the latent."""
        return _seconds(lambda: self._decode(self.names[-1], steps))

    def _latent(self, name: str, steps: int | None = None) -> Any:
        controls = self._controls[name]
        if steps is not None:
            controls = controls._replace(latent_steps=jnp.int32(steps))
        return self._sample[name](self._model.parameters(name), self._keys, controls)

    def _decode(self, name: str, decode_steps: int) -> Any:
        model = self._model
        controls = self._controls[name]._replace(decode_steps=jnp.int32(decode_steps))
        prompt = model.experiment.process.initial((self.batch, model.length))
        return model.program("true_latent")(
            model.parameters("true_latent"),
            self._key,
            self._indices,
            prompt,
            self._latents[name],
            controls,
        )


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began
