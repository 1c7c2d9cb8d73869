"""What a training stage and a sampled model are: the fields of their records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Int

from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.diffusion.schedules import Schedule, ScheduleOptions, make_schedule
from diladiff_jax.nn.networks import Networks
from diladiff_jax.objectives.base import Objective, Params
from diladiff_jax.objectives.encoding import BertFeatures, DenoiserFeatures, TextEncoder
from diladiff_jax.options import Options
from diladiff_jax.run_options import TrainingOptions
from diladiff_jax.sampling.latent_sources import LatentSource
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.sampler import Controls, Sample, Sampler, TokenDecoder

Source = tuple[str, ...]
"""Where parameters come from: a stage, and a path inside its parameters."""

FEATURES: Source = ("features",)
"""The feature extractor's parameters: those of the MDLM, or of the published encoder ("bert")."""


ENCODER: Source = ("autoencoder", "encoder")
"""The text encoder's parameters. Its stage also keeps the statistics that standardize latents."""

DECODER: Source = ("autoencoder", "decoder")
"""The latent-conditioned decoder's parameters."""


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
      draw: samples the texts; meant to be jitted.
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
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
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
      networks: from the networks of the experiment to those that it samples with; None takes them
        as they are. A model whose token network has another size or form replaces `denoiser` or
        `decoder`; the stage that trains it builds its objective from the same.
      decode: how it fills in the tokens, in one step per token; None unmasks them in the order of
        `sampling.order` in any number of steps.
      latent_steps: the number of latent steps that the settings ask for; None without such steps.
      takes_latents: whether the latents of real text are given to it.
      control: whether it is only a control of evaluations.
      preferred: whether it may be sampled where no model is named; of those trained, the last one.
      color, dark_color: in plots, on a light and on a dark page; dark enough, and light enough, to
        stand out against it.
      marker: matplotlib's marker of its points.
    """

    name: str
    title: str
    parameters: Mapping[str, Source]
    source: LatentSource | None = None
    latent_steps: Callable[[SamplingOptions], int] | None = None
    networks: Callable[[Networks], Networks] | None = None
    decode: TokenDecoder | None = None
    takes_latents: bool = False
    control: bool = False
    preferred: bool = False
    color: str = "#555555"
    dark_color: str = "#aaaaaa"
    marker: str = "o"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose parameters it samples with."""
        return tuple(dict.fromkeys(stage for stage, *_ in self.parameters.values()))

    def sampler(self, sampler: Sampler) -> Sampler:
        """The experiment's sampler with this model's networks and decoder in place of its own."""
        networks = sampler.networks if self.networks is None else self.networks(sampler.networks)
        return dataclasses.replace(sampler, networks=networks, token_decoder=self.decode)

    @property
    def has_latent(self) -> bool:
        """Whether its tokens are decoded given a latent."""
        return self.source is not None or self.takes_latents
