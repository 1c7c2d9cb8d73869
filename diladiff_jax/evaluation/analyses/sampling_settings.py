"""Samples at settings that the sweep does not cover: figures 13 to 15, and few network calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.analyses.sweep_curves import QUALITY
from diladiff_jax.evaluation.figures import Table, cells, table
from diladiff_jax.evaluation.measures.samples import sample_measures
from diladiff_jax.evaluation.sweep_point import sampling_batch
from diladiff_jax.jax_settings import random_key
from diladiff_jax.model import Model
from diladiff_jax.sampling.latent_sources import PriorLatents
from diladiff_jax.sampling.solvers import SOLVERS
from diladiff_jax.stages import MODELS, SampledModel

_LIMIT_STEPS = 200
_CALLS = (2, 4, 5, 8, 10, 20)
_STUDENT_STEPS = (1, 2, 4, 5, 8)


def sampled_rows(
    model: Model,
    name: str,
    settings: Sequence[Mapping[str, Any]],
    samples: int,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Samples a model at several settings.

    Args:
      model: the workdir's models.
      name: of the model to sample.
      settings: controls (latent_steps, decode_steps, temperature, top_p) that differ from the
        config's.
      samples: number of texts for each of `settings`.
      seed: of the samples.

    Returns:
      Rows as in `results.json`, one for each of `settings`. They are not timed: `seconds` is None.
    """
    measure = sample_measures(model)
    rows = []
    for given in settings:
        used = model.controls(name, **given)
        sampled = model.sample(seed, samples, model=name, **given)
        rows.append(
            {
                "corpus": model.config.data.corpus,
                "model": name,
                "latent_steps": int(used.latent_steps) if MODELS[name].latent_steps else None,
                "decode_steps": int(used.decode_steps),
                "temperature": float(used.temperature),
                "top_p": float(used.top_p),
                "samples": samples,
                "seconds": None,
                "tokens_per_second": None,
                "metrics": measure(sampled.tokens),
            }
        )
    return rows


def latent_samplers(model: Model, samples: int, *, seed: int = 0) -> Table:
    """What each latent sampler and the student reach with few network calls.

    The solver, or the student's options, decide how many network calls a step takes. The first
    solver (Euler's method) with 200 steps is the limit that the deterministic ones approach. DDIM
    is there without fresh noise and with that of the DDPM posterior. Solvers that need a velocity
    which the schedule does not have are left out. Decoding is as in the config.

    Args:
      model: the workdir's models.
      samples: number of texts for each row.
      seed: of the samples.
    """
    measure = sample_measures(model)

    finite = model.sampler.schedule.finite_velocity
    solvers = {name: each for name, each in SOLVERS.items() if finite or not each.uses_velocity}
    priors = {
        name: dataclasses.replace(MODELS["ladiff"], source=PriorLatents(name, "previous"))
        for name in solvers
    }

    def row(
        label: str, record: SampledModel, steps: int, calls: int, eta: float = 0.0
    ) -> list[Any]:
        tokens = _tokens(model, record, steps, samples, seed, eta)
        found = measure(tokens)
        return [label, steps, calls, *(c for metric in QUALITY for c in cells(found.get(metric)))]

    limit = next(iter(solvers))
    calls = solvers[limit].calls(_LIMIT_STEPS)
    rows = [row(solvers[limit].title, priors[limit], _LIMIT_STEPS, calls)]
    variants = [(solver.title, name, 0.0) for name, solver in solvers.items()]
    variants.append(("DDIM, eta 1", "ddim", 1.0))
    for title, name, eta in variants:
        for most in _CALLS:
            steps = solvers[name].steps_within(most)
            rows.append(row(title, priors[name], steps, solvers[name].calls(steps), eta))
    student_calls = model.sampler.options.student_calls
    rows += [
        row("student", MODELS["diladiff"], steps, student_calls(steps)) for steps in _STUDENT_STEPS
    ]
    columns = ["latents by", "steps", "network calls"]
    columns += [c for metric in QUALITY for c in (metric, "low", "high")]
    kept = [i for i in range(len(columns)) if i < 3 or any(r[i] is not None for r in rows)]
    return table(
        "latent_samplers",
        "",
        "Latents in few network calls",
        [columns[i] for i in kept],
        [[r[i] for i in kept] for r in rows],
        f"{samples} samples each, {int(model.controls('diladiff').decode_steps)} decoding steps;"
        " all samplers of the prior start from the same noise",
    )


def _tokens(
    model: Model, record: SampledModel, latent_steps: int, samples: int, seed: int, eta: float
) -> np.ndarray:
    """Tokens `[samples, L]` of a model, or of one with another source of latents."""
    size, program = sampling_batch(model), model.program(record)
    prompt = model.experiment.process.initial((size, model.length))
    controls = model.controls(record.name, latent_steps=latent_steps, eta=eta)
    parameters, key = model.parameters(record.name), random_key(seed)
    parts = [
        np.asarray(program(parameters, key, jnp.arange(i, i + size), prompt, controls).tokens)
        for i in range(0, samples, size)
    ]
    return np.concatenate(parts)[:samples]
