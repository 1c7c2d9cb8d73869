"""Every training stage and every model that can be sampled: one record each.

These are the only lists of stages and models. Config blocks and their checks, the order of
training, the sweep of an evaluation, titles, colours and help texts are derived from them.
`register_stage` and `register_model` add more from outside the library; docs/extending.md has
complete examples.
"""

from diladiff_jax.stages.method import TRUE_LATENT
from diladiff_jax.stages.records import (
    DECODER,
    ENCODER,
    FEATURES,
    Parts,
    Preview,
    PreviewInputs,
    SampledModel,
    Source,
    Stage,
    Start,
)
from diladiff_jax.stages.registry import (
    MODELS,
    STAGES,
    blank_prompts,
    features_source,
    model_named,
    predecessors,
    preview_of,
    register_model,
    register_stage,
    resolve_source,
    sampled_models,
    stage_named,
    take,
)

__all__ = [
    "DECODER",
    "ENCODER",
    "FEATURES",
    "MODELS",
    "STAGES",
    "TRUE_LATENT",
    "Parts",
    "Preview",
    "PreviewInputs",
    "SampledModel",
    "Source",
    "Stage",
    "Start",
    "blank_prompts",
    "features_source",
    "model_named",
    "predecessors",
    "preview_of",
    "register_model",
    "register_stage",
    "resolve_source",
    "sampled_models",
    "stage_named",
    "take",
]
