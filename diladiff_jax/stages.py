"""Every training stage and every model that can be sampled: one record each.

These are the only lists of stages and models. Config blocks and their checks, the order of
training, the sweep of an evaluation, titles, colours and help texts are derived from them.
`register_stage` and `register_model` add more from outside the library; docs/extending.md has
complete examples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from diladiff_jax.diffusion.gaussian import Schedule, ScheduleOptions, make_schedule
from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.nn.networks import Networks
from diladiff_jax.objectives.autoencoder import Autoencoder, AutoencoderOptions
from diladiff_jax.objectives.autoregressive import Autoregressive, AutoregressiveOptions
from diladiff_jax.objectives.base import Objective, Params
from diladiff_jax.objectives.diladiff import DiLaDiff, DiLaDiffOptions, student_from_teacher
from diladiff_jax.objectives.encoding import BertFeatures, DenoiserFeatures, TextEncoder
from diladiff_jax.objectives.ladiff import LaDiff, LaDiffOptions
from diladiff_jax.objectives.mdlm import MDLM, MDLMOptions
from diladiff_jax.options import Options
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.sampler import (
    Controls,
    LatentSource,
    NullLatents,
    PriorLatents,
    Sample,
    Sampler,
    StudentLatents,
)

Source = tuple[str, ...]
"""Where parameters come from: a stage, and a path inside its parameters."""

FEATURES: Source = ("features",)
"""The feature extractor's parameters: those of the MDLM, or of the published encoder ("bert")."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What objectives are built from.

    Attributes:
      settings: the whole experiment, as a plain mapping.
      networks: its modules.
      process: the diffusion process of its tokens.
      eot_id: the end-of-text id.
    """

    settings: Mapping[str, Any]
    networks: Networks
    process: DiscreteProcess
    eot_id: int

    @property
    def schedule(self) -> Schedule:
        """The noise schedule of the latents."""
        return make_schedule(ScheduleOptions.of(self.settings["diffusion"]))

    @property
    def text_encoder(self) -> TextEncoder:
        """The path from tokens to standardized latents."""
        if self.networks.bert is not None:
            features = BertFeatures(self.networks.bert)
        else:
            with_embeddings = self.settings["features"]["with_embeddings"]
            features = DenoiserFeatures(self.networks.denoiser, with_embeddings)
        return TextEncoder(features, self.networks.encoder)

    @property
    def loss_positions(self) -> int:
        """See `masking.token_nll_by_position`."""
        return self.settings["memory"]["loss_positions"]


class Start(NamedTuple):
    """What a stage's parameters start from.

    Attributes:
      source: trained parameters of an earlier stage.
      merge: (initial parameters, those of the source) -> the parameters to start from.
    """

    source: Source
    merge: Callable[[Params, Params], Params]


class PreviewInputs(NamedTuple):
    """What a preview reads: the stage's parameters and statistics, `fixed` ones of other stages,
    validation rows `[n, L]`, and the arguments of a sampling call."""

    parts: Parts
    sampler: Sampler
    params: Params
    statistics: Mapping[str, Any]
    fixed: Mapping[str, Params]
    rows: Int[Array, "n L"]
    key: Array
    controls: Controls


@dataclasses.dataclass(frozen=True)
class Preview:
    """Texts printed during training.

    Attributes:
      draw: gives the texts; meant to be jitted.
      fixed: trained parameters that it reads, by name.
      latent_steps: see `SampledModel`.
    """

    draw: Callable[[PreviewInputs], Sample]
    fixed: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    latent_steps: Callable[[SamplingOptions], int] | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
      name: its name in configs, workdirs and commands.
      title: a few words for help texts and docs.
      build: (parts, options) -> objective.
      options: the objective's options with their defaults.
      training: the defaults of the training options.
      predecessor: the stage that must be trained before, or None.
      frozen: name in `Context.frozen` -> where the parameters come from.
      start: what its parameters start from; None initializes them at random.
      rows: the split of the corpus that it trains on.
      preview: texts printed during training: a model's name, or a `Preview`; None prints nothing.
      meaning: settings (blocks or keys) that decide what its parameters mean to later stages.
      baseline: whether it is a baseline and not a stage of the method.
    """

    name: str
    title: str
    build: Callable[[Parts, Any], Objective]
    options: Options
    training: TrainingOptions = TrainingOptions()
    predecessor: str | None = None
    frozen: Mapping[str, Source] = dataclasses.field(default_factory=dict)
    start: Start | None = None
    rows: str = "train"
    preview: str | Preview | None = None
    meaning: tuple[str, ...] = ()
    baseline: bool = False


@dataclasses.dataclass(frozen=True)
class SampledModel:
    """One model that can be sampled, or one control of an evaluation.

    Attributes:
      name: its name in commands and results.
      title: what figures and tables call it.
      parameters: the sampler's name of its parameters -> where they come from.
      source: where its latent comes from; None for a model without a latent.
      latent_steps: the number of latent steps that the settings ask for; None without such steps.
      takes_latents: whether the latents of real text are given to it.
      control: whether it is only a control of evaluations.
      color, dark_color: in plots, on a light and on a dark page; dark enough, and light enough, to
        be told from the background.
      marker: matplotlib's marker of its points.
    """

    name: str
    title: str
    parameters: Mapping[str, Source]
    source: LatentSource | None = None
    latent_steps: Callable[[SamplingOptions], int] | None = None
    takes_latents: bool = False
    control: bool = False
    color: str = "#555555"
    dark_color: str = "#aaaaaa"
    marker: str = "o"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose parameters it samples with."""
        return tuple(dict.fromkeys(stage for stage, *_ in self.parameters.values()))

    @property
    def has_latent(self) -> bool:
        """Whether its tokens are decoded given a latent."""
        return self.source is not None or self.takes_latents


STAGES: dict[str, Stage] = {}
"""Every stage by name, in the order of training."""

MODELS: dict[str, SampledModel] = {}
"""Every model and control by name; of the models, later ones are better."""


def register_stage(stage: Stage) -> Stage:
    """Adds a stage after all others.

    Raises:
      ValueError: the name is taken, or its predecessor is unknown.
    """
    if stage.name in STAGES:
        raise ValueError(f"stage {stage.name} is registered already")
    if stage.predecessor is not None and stage.predecessor not in STAGES:
        raise ValueError(f"stage {stage.name}: predecessor {stage.predecessor} is not registered")
    STAGES[stage.name] = stage
    return stage


def register_model(model: SampledModel) -> SampledModel:
    """Adds a model or control after all others.

    Raises:
      ValueError: the name is taken, or a stage that it needs is unknown.
    """
    if model.name in MODELS:
        raise ValueError(f"model {model.name} is registered already")
    if missing := [stage for stage in model.stages if stage not in STAGES]:
        raise ValueError(f"model {model.name}: stage {missing[0]} is not registered")
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
    before = STAGES[stage].predecessor
    return () if before is None else (before, *predecessors(before))


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
    """The stage's preview; for a model's name, samples of it with the stage's present parameters."""
    if not isinstance(stage.preview, str):
        return stage.preview
    model = MODELS[stage.preview]
    own = {
        name: tuple(path)
        for name, (source, *path) in model.parameters.items()
        if source == stage.name
    }

    def draw(given: PreviewInputs) -> Sample:
        params = given.fixed | {name: take(given.params, path) for name, path in own.items()}
        indices, prompt = _blank(given)
        return given.sampler.generate(
            model.source, params, given.key, indices, prompt, given.controls
        )

    fixed = {name: source for name, source in model.parameters.items() if name not in own}
    return Preview(draw, fixed, model.latent_steps)


def _blank(given: PreviewInputs) -> tuple[Array, Array]:
    """Indices and blank prompts for as many texts as there are rows."""
    prompt = given.parts.process.initial(given.rows.shape)
    return jax.numpy.arange(len(given.rows)), jax.numpy.asarray(prompt, np.int32)


def _reconstruction(given: PreviewInputs) -> Sample:
    """Validation rows, encoded and decoded again in one step."""
    frozen = {"features": given.fixed["features"], "encoder": given.params["encoder"]}
    z = given.parts.text_encoder(frozen, dict(given.statistics), given.rows)
    indices, prompt = _blank(given)
    return given.sampler.decode_latents(
        {"decoder": given.params["decoder"]},
        given.key,
        indices,
        prompt,
        z,
        given.controls._replace(decode_steps=1),
    )


# The method.


def _build_mdlm(parts: Parts, options: MDLMOptions) -> Objective:
    return MDLM(parts.networks.denoiser, parts.process, options, parts.loss_positions)


def _build_autoencoder(parts: Parts, options: AutoencoderOptions) -> Objective:
    networks = parts.networks
    return Autoencoder(
        parts.text_encoder.features,
        networks.encoder,
        networks.decoder,
        parts.process,
        options,
        parts.loss_positions,
    )


def _build_ladiff(parts: Parts, options: LaDiffOptions) -> Objective:
    return LaDiff(parts.text_encoder, parts.networks.teacher, parts.schedule, options)


def _build_diladiff(parts: Parts, options: DiLaDiffOptions) -> Objective:
    networks = parts.networks
    return DiLaDiff(parts.text_encoder, networks.teacher, networks.student, parts.schedule, options)


def _build_scorer(parts: Parts, options: AutoregressiveOptions) -> Objective:
    del options
    return Autoregressive(
        parts.networks.scorer, parts.eot_id, parts.process.sampleable, parts.loss_positions
    )


def _decoder_from_mdlm(params: Params, mdlm: Params) -> Params:
    """The decoder's backbone starts as the MDLM."""
    return {**params, "decoder": {**params["decoder"], "backbone": mdlm}}


register_stage(
    Stage(
        "mdlm",
        "masked diffusion language model",
        _build_mdlm,
        MDLMOptions(),
        TrainingOptions(steps=1_000_000),
        preview="mdlm",
        meaning=("data.length", "backbone"),
    )
)
register_stage(
    Stage(
        "autoencoder",
        "encoder and latent-conditioned decoder",
        _build_autoencoder,
        AutoencoderOptions(),
        TrainingOptions(steps=200_000, learning_rate=5e-5, clip=10.0, ema=0.0),
        predecessor="mdlm",
        frozen={"features": FEATURES},
        start=Start(("mdlm",), _decoder_from_mdlm),
        preview=Preview(_reconstruction, {"features": FEATURES}),
        meaning=("features.source", "features.with_embeddings", "encoder", "decoder"),
    )
)
register_stage(
    Stage(
        "ladiff",
        "latent diffusion prior",
        _build_ladiff,
        LaDiffOptions(),
        TrainingOptions(steps=150_000, learning_rate=2e-4, schedule="constant"),
        predecessor="autoencoder",
        frozen={"features": FEATURES, "encoder": ("autoencoder", "encoder")},
        preview="ladiff",
        meaning=("latent_denoiser", "diffusion"),
    )
)
register_stage(
    Stage(
        "diladiff",
        "few-step student of the prior",
        _build_diladiff,
        DiLaDiffOptions(),
        TrainingOptions(steps=25_000, batch=2048, learning_rate=5e-5, schedule="constant"),
        predecessor="ladiff",
        frozen={
            "features": FEATURES,
            "encoder": ("autoencoder", "encoder"),
            "teacher": ("ladiff",),
        },
        start=Start(("ladiff",), student_from_teacher),
        preview="diladiff",
    )
)

# Baselines, trained where their `steps` is above 0.

register_stage(
    Stage(
        "mdlm_long",
        "control: the MDLM, trained for as many further steps as the decoder",
        _build_mdlm,
        MDLMOptions(),
        predecessor="mdlm",
        start=Start(("mdlm",), lambda params, mdlm: mdlm),
        preview="mdlm_long",
        baseline=True,
    )
)
register_stage(
    Stage(
        "scorer",
        "autoregressive model of held-out text that judges samples",
        _build_scorer,
        AutoregressiveOptions(),
        rows="scorer",
        baseline=True,
    )
)

_DECODER: Source = ("autoencoder", "decoder")
_PRIOR = {"decoder": _DECODER, "teacher": ("ladiff",)}


def _student_calls(options: SamplingOptions) -> int:
    """Steps of the prior with as many network calls as the student: it takes two per step."""
    return 2 * options.student_steps


register_model(
    SampledModel(
        "mdlm", "MDLM", {"denoiser": ("mdlm",)}, color="#7b7b7b", dark_color="#9a9a9a", marker="o"
    )
)
register_model(
    SampledModel(
        "mdlm_long",
        "MDLM, whole decoder budget",
        {"denoiser": ("mdlm_long",)},
        color="#404040",
        dark_color="#d0d0d0",
        marker="D",
    )
)
register_model(
    SampledModel(
        "ladiff",
        "LaDiff",
        _PRIOR,
        PriorLatents(),
        lambda options: options.prior_steps,
        color="#3b75af",
        dark_color="#6ea8e0",
        marker="^",
    )
)
register_model(
    SampledModel(
        "diladiff",
        "DiLaDiff",
        {"decoder": _DECODER, "student": ("diladiff",)},
        StudentLatents(),
        lambda options: options.student_steps,
        color="#c8442d",
        dark_color="#f0795f",
        marker="s",
    )
)
register_model(
    SampledModel(
        "prior_ddim",
        "prior, undistilled, DDIM",
        _PRIOR,
        PriorLatents("ddim", "previous"),
        _student_calls,
        control=True,
        color="#b5761b",
        dark_color="#dba040",
        marker="v",
    )
)
register_model(
    SampledModel(
        "prior_dpmpp_2m",
        "prior, undistilled, DPM-Solver++",
        _PRIOR,
        PriorLatents("dpmpp_2m", "previous"),
        _student_calls,
        control=True,
        color="#7d7a12",
        dark_color="#b9b545",
        marker="P",
    )
)
register_model(
    SampledModel(
        "true_latent",
        "decoder, true latents",
        {"decoder": _DECODER},
        takes_latents=True,
        control=True,
        color="#3f8a57",
        dark_color="#6dbb86",
        marker="X",
    )
)
register_model(
    SampledModel(
        "null_latent",
        "decoder, null latent",
        {"decoder": _DECODER},
        NullLatents(),
        control=True,
        color="#9a5fb0",
        dark_color="#c796d8",
        marker="d",
    )
)
