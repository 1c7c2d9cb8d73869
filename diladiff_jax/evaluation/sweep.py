"""The sweep: every model and control of a workdir over decoding steps, measured and timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from diladiff_jax.data import Prepared
from diladiff_jax.evaluation.held_out import network_bounds, validation_rows
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.samples import sample_measures, scorer_setting
from diladiff_jax.evaluation.models import controls
from diladiff_jax.evaluation.sweep_point import SweepPoint, sampling_batch
from diladiff_jax.model import Model
from diladiff_jax.parallel import sharding
from diladiff_jax.stages import MODELS, STAGES

_SECONDS = 15.0  # between lines of progress

_IN_ROWS = ("decode_steps", "temperature", "top_p")
"""Settings of sampling that every row has of its own."""


def evaluate(
    model: Model, prepared: Prepared, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Samples and measures everything that a workdir can sample.

    Args:
      model: the workdir's models.
      prepared: its data, for held-out rows.
      say: takes lines that report progress.

    Returns:
      The content of `results.json`; see `results`.
    """
    settings, measure = model.config.evaluation, sample_measures(model)
    rows: list[dict[str, Any]] = []

    def add(name: str, samples: int, measures: dict[str, Estimate], **columns: Any) -> None:
        rows.append(_row(model.config.data.corpus, name, samples, measures, **columns))
        say(_line(rows[-1]))

    held_out = validation_rows(prepared, settings.samples)
    add("data", len(held_out), measure(held_out))
    for name, measures in network_bounds(model, held_out).items():
        add(name, len(held_out), measures)
    points = [
        SweepPoint(model, name, held_out, settings.seed, steps) for name, steps in _plan(model)
    ]
    _sample(points, settings.samples, sampling_batch(model), say)
    for point in points:
        tokens, seconds = point.result(settings.samples)
        add(
            point.name,
            len(tokens),
            measure(tokens),
            latent_steps=point.latent_steps,
            decode_steps=point.decode_steps,
            temperature=model.config.sampling.temperature,
            top_p=model.config.sampling.top_p,
            seconds=seconds,
            tokens_per_second=tokens.size / seconds,
        )
    return {"setting": _setting(model), "rows": rows}


def _plan(model: Model) -> list[tuple[str, int]]:
    """The names and decoding steps of all points: the models, and the controls of a latent."""
    settings = model.config.evaluation
    plan = [
        (name, steps)
        for name in model.models
        for steps in (settings.decode_steps if MODELS[name].decode is None else (model.length,))
    ]
    if any(MODELS[name].has_latent for name in model.models):
        possible = [name for name in controls() if all(map(model.has, MODELS[name].stages))]
        plan += [(name, steps) for name in possible for steps in settings.control_steps]
    return plan


def _sample(points: list[SweepPoint], samples: int, batch: int, say: Callable[[str], None]) -> None:
    """Takes turns batch by batch, so that other load on the machine affects all points alike."""
    turns = [point for _ in range(0, samples, batch) for point in points]
    said = time.monotonic()
    for done, point in enumerate(turns, 1):
        point.sample_batch()
        if time.monotonic() - said > _SECONDS or done == len(turns):
            said = time.monotonic()
            say(f"sampled {done} of {len(turns)} batches")


def _setting(model: Model) -> dict[str, Any]:
    config = model.config
    sampling = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.sampling.items()
        if name not in _IN_ROWS
    }
    return {
        "seed": config.evaluation.seed,
        "length": config.data.length,
        **sampling,
        "trained_steps": {stage: model.trained_steps(stage) for stage in STAGES},
        "device": sharding.available_devices()[0].device_kind,
        "devices": model.devices,
        "compute_dtype": model.experiment.compute_dtype,
        "scorer": scorer_setting(model),
        "scored_on": "re-tokenized text, at most the scorer's `length` tokens per row",
    }


def _row(
    corpus: str, model: str, samples: int, measures: dict[str, Estimate], **columns: Any
) -> dict[str, Any]:
    row: dict[str, Any] = {"corpus": corpus, "model": model}
    row |= dict.fromkeys(("latent_steps", "decode_steps", "temperature", "top_p"))
    row |= {"samples": samples, "seconds": None, "tokens_per_second": None, "metrics": measures}
    return row | columns


def _line(row: dict[str, Any]) -> str:
    steps = "" if row["decode_steps"] is None else f" {row['decode_steps']} steps"
    seconds = "" if row["seconds"] is None else f", {row['seconds']:.2f} s"
    metrics = [f"{name} {value['value']:.3f}" for name, value in row["metrics"].items()]
    return f"{row['model']}{steps}: {', '.join(metrics)}{seconds}"
