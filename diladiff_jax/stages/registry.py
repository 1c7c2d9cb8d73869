"""The tables of all stages and models, and how to look something up in them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diladiff_jax.sampling.sampler import Sample
from diladiff_jax.stages.records import (
    FEATURES,
    Preview,
    PreviewInputs,
    SampledModel,
    Source,
    Stage,
)

STAGES: dict[str, Stage] = {}
"""Every stage by name, in the order of training."""

_RESERVED = ("data", "features", "latents", "report", "samples", "statistics", "tokenizer")
"""Names in a workdir or a bundle that belong to no stage."""

MODELS: dict[str, SampledModel] = {}
"""Every model and control by name; of the preferred models, later ones are better."""


def register_stage(stage: Stage) -> Stage:
    """Adds a stage after all others.

    Raises:
      ValueError: the name is taken; its predecessor is unknown; it reads parameters of a stage that
        need not be trained before it; an option of its objective is named like one of training; or
        it is named like something else in a workdir.
    """
    if stage.name in STAGES:
        raise ValueError(f"stage {stage.name} is already registered")
    if stage.predecessor is not None and stage.predecessor not in STAGES:
        raise ValueError(f"stage {stage.name}: predecessor {stage.predecessor} is not registered")
    before = () if stage.predecessor is None else _with_predecessors(stage.predecessor)
    for source, *_ in [*stage.frozen.values(), *([stage.start.source] if stage.start else [])]:
        if source not in (*before, *FEATURES):
            raise ValueError(f"stage {stage.name}: {source} is not a predecessor of it")
    if stage.name in _RESERVED:
        raise ValueError(f"stage {stage.name}: a workdir or bundle has something else of that name")
    training = {field.name for field in dataclasses.fields(stage.training)}
    if both := [o.name for o in dataclasses.fields(stage.options) if o.name in training]:
        raise ValueError(f"stage {stage.name}: option {both[0]} is one of its training already")
    STAGES[stage.name] = stage
    return stage


def register_model(model: SampledModel) -> SampledModel:
    """Adds a model or control after all others.

    Raises:
      ValueError: the name or the title is taken; a stage that it needs is unknown; it lacks the
        parameters that its decoder reads; or it takes latents and is not a control.
    """
    if model.name in MODELS:
        raise ValueError(f"model {model.name} is already registered")
    if missing := [stage for stage in model.stages if stage not in STAGES]:
        raise ValueError(f"model {model.name}: stage {missing[0]} is not registered")
    if model.title in (other.title for other in MODELS.values()):
        raise ValueError(f"model {model.name}: another one has the title {model.title!r}")
    decoder = "decoder" if model.has_latent else "denoiser"
    if model.decode is None and decoder not in model.parameters:
        raise ValueError(
            f"model {model.name}: parameters has no {decoder!r}, which it decodes with"
        )
    if model.takes_latents and not model.control:
        raise ValueError(f"model {model.name}: takes_latents is for controls only")
    MODELS[model.name] = model
    return model


def stage_named(name: str) -> Stage:
    """The record of a stage.

    Raises:
      ValueError: there is no such stage.
    """
    if name not in STAGES:
        raise ValueError(f"stage: got {name!r}, expected one of {', '.join(STAGES)}")
    return STAGES[name]


def model_named(name: str, *, controls: bool = False) -> SampledModel:
    """The record of a model; of controls too, if asked for.

    Raises:
      ValueError: there is no such model.
    """
    names = sampled_models(controls=controls)
    if name not in names:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(names)}")
    return MODELS[name]


def sampled_models(*, controls: bool = False) -> tuple[str, ...]:
    """Names of the models, and of the controls if asked for."""
    return tuple(name for name, model in MODELS.items() if controls or not model.control)


def predecessors(stage: str) -> tuple[str, ...]:
    """The stages before `stage`, nearest first."""
    return _with_predecessors(stage)[1:]


def _with_predecessors(stage: str) -> tuple[str, ...]:
    before = STAGES[stage].predecessor
    return (stage,) if before is None else (stage, *_with_predecessors(before))


def features_source(settings: Mapping[str, Any]) -> str:
    """Whose parameters the feature extractor reads: stage "mdlm", or "bert" if published."""
    return "bert" if settings["features"]["source"] == "bert" else "mdlm"


def resolve_source(source: Source, settings: Mapping[str, Any]) -> Source:
    """`FEATURES` as the stage that it means in these settings; any other source as it is."""
    return (features_source(settings),) if source == FEATURES else source


def take(tree: Any, path: tuple[str, ...]) -> Any:
    """The subtree at `path`."""
    return functools.reduce(lambda node, name: node[name], path, tree)


def preview_of(stage: Stage) -> Preview | None:
    """The stage's preview; for a model's name, samples with the stage's current parameters."""
    if not isinstance(stage.preview, str):
        return stage.preview
    model = model_named(stage.preview, controls=True)
    own = {
        name: tuple(path)
        for name, (source, *path) in model.parameters.items()
        if source == stage.name
    }

    def draw(given: PreviewInputs) -> Sample:
        params = dict(given.fixed) | {name: take(given.params, path) for name, path in own.items()}
        indices, prompt = blank_prompts(given)
        return model.sampler(given.sampler).generate(
            model.source, params, given.key, indices, prompt, given.controls
        )

    fixed = {name: source for name, source in model.parameters.items() if name not in own}
    return Preview(draw, fixed, model.latent_steps)


def blank_prompts(given: PreviewInputs) -> tuple[Array, Array]:
    """Indices and blank prompts, one per row."""
    prompt = given.parts.process.initial(given.rows.shape)
    return jnp.arange(len(given.rows)), jnp.asarray(prompt, np.int32)
