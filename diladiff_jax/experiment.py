"""One experiment in its workdir: config, tokenizer, networks, mesh, and restored parameters.

Every command on a workdir starts from an `Experiment`.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from diladiff_jax import files, stages
from diladiff_jax.config import Config
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion.masking import AbsorbingProcess
from diladiff_jax.jax_settings import random_key
from diladiff_jax.nn import bert
from diladiff_jax.nn.networks import NetworkOptions, Networks, build_networks
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.sampler import Sampler
from diladiff_jax.storage import bundles, lineage, pretrained
from diladiff_jax.storage.checkpoints import Checkpoints
from diladiff_jax.storage.errors import PretrainedError

BERT = "bert"
"""The published encoder, where it stands in for a stage as a source of parameters."""


class Experiment:
    """An experiment and its workdir, or a bundle in its place.

    Attributes:
      config: the checked config; `settings` is the same as a plain mapping.
      workdir: the folder.
      tokenizer: its tokenizer.
      mesh: the devices, with axes (data, fsdp, tensor).
      compute_dtype: what its networks compute in, "float32" or "bfloat16".
      networks: its modules, without parameters.
      process: the diffusion process of its tokens.
    """

    def __init__(
        self,
        config: Config,
        workdir: str | pathlib.Path,
        tokenizer: Tokenizer,
        mesh: Mesh,
        *,
        compute_dtype: str | None = None,
    ) -> None:
        """Builds the networks.

        Args:
          config: the checked config.
          workdir: the folder.
          tokenizer: its tokenizer.
          mesh: the devices.
          compute_dtype: what all networks compute in, the published encoder included; default: what
            the config says. The config keeps what the stages were trained in.
        """
        self.config = config
        self.settings = config.to_dict()
        self.workdir = files.expand(workdir)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.process = AbsorbingProcess(tokenizer.mask_id, tokenizer.sampleable)
        options = NetworkOptions.of(self.settings)
        self.compute_dtype = compute_dtype or options.compute_dtype
        self._encoder_dtype = compute_dtype or config.features.compute_dtype
        self.networks: Networks = build_networks(
            dataclasses.replace(options, compute_dtype=self.compute_dtype),
            config.data.length,
            tokenizer.vocab_size,
            self._published_encoder(),
        )

    @property
    def parts(self) -> stages.Parts:
        """What objectives and previews are built from."""
        return stages.Parts(self.settings, self.networks, self.process, self.tokenizer.eot_id)

    def objective(self, stage: str) -> Objective:
        """The objective of a stage."""
        record = stages.stage_named(stage)
        return record.build(self.parts, type(record.options).of(self.settings[stage]))

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The samplers that the settings ask for."""
        return Sampler(
            self.networks,
            self.parts.schedule,
            self.process,
            SamplingOptions.of(self.settings["sampling"]),
            self.config.diladiff.step_form,
            self.tokenizer.eot_id,
        )

    def checkpoints_directory(self, stage: str) -> pathlib.Path:
        """`WORKDIR/STAGE/checkpoints`, where this workdir's own training of the stage is saved."""
        return self.workdir / stage / "checkpoints"

    def trained_steps(self, stage: str) -> int:
        """The step of the stage's last checkpoint, own or inherited; 0 if there is none."""
        return lineage.trained_steps(self.workdir, stage)

    def restore(self, stage: str) -> Any:
        """The trained parameters of a stage (the average, if one is kept), or of "bert", sharded.

        Raises:
          CheckpointError: the stage has no checkpoint, or one that cannot be read.
          PretrainedError: the published encoder's weights cannot be read.
        """
        if stage == BERT:
            network = self.networks.bert
            assert network is not None
            boxed = bert.abstract_parameters(network)
            params = pretrained.encoder_parameters(self.features_directory, network)
            return sharding.place(params, sharding.parameter_shardings(boxed, self.mesh))
        home = lineage.home_of_trained_stage(self.workdir, stage)
        boxed = jax.eval_shape(self.objective(stage).init, random_key(0))
        abstract, shardings = nn.unbox(boxed), sharding.parameter_shardings(boxed, self.mesh)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read(stage, abstract, shardings)
        item = "ema" if self.config[stage].ema > 0 else "params"
        with Checkpoints(home / stage / "checkpoints") as checkpoints:
            return checkpoints.restore_item(item, abstract, shardings)

    def restore_source(self, source: stages.Source) -> Any:
        """The trained parameters at a `stages.Source`. Raises as `restore`."""
        stage, *path = stages.resolve_source(source, self.settings)
        return stages.take(self.restore(stage), tuple(path))

    def restore_statistics(self) -> dict[str, Any]:
        """The statistics frozen at the end of the encoder's stage.

        Raises:
          CheckpointError: that stage has no checkpoint, or one that cannot be read.
        """
        stage = stages.ENCODER[0]
        home = lineage.home_of_trained_stage(self.workdir, stage)
        objective: Any = self.objective(stage)
        abstract = jax.eval_shape(objective.init_statistics)
        shardings = jax.tree.map(lambda _: sharding.replicated(self.mesh), abstract)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read_statistics(abstract, shardings)
        with Checkpoints(home / stage / "checkpoints") as checkpoints:
            return checkpoints.restore_item("statistics", abstract, shardings)

    def context(self, stage: str) -> Context:
        """The frozen networks and statistics that a stage's loss reads.

        Raises:
          CheckpointError: a predecessor is not trained, or cannot be read.
        """
        sources = {
            name: stages.resolve_source(source, self.settings)
            for name, source in stages.stage_named(stage).frozen.items()
        }
        # The latest stage first, so that an error names the one to train next.
        order = [BERT, *stages.STAGES]
        needed = sorted({source[0] for source in sources.values()}, key=order.index, reverse=True)
        trained = {earlier: self.restore(earlier) for earlier in needed}
        frozen = {
            name: stages.take(trained[earlier], tuple(path))
            for name, (earlier, *path) in sources.items()
        }
        statistics = self.restore_statistics() if stages.ENCODER[0] in needed else {}
        return Context(frozen, statistics)

    @property
    def features_directory(self) -> pathlib.Path:
        """`WORKDIR/features`, a copy of the published encoder: the original may be removed."""
        return self.workdir / "features"

    def _published_encoder(self) -> bert.Bert | None:
        """The encoder in `WORKDIR/features`, if the config asks for one.

        Raises:
          PretrainedError: its files are missing or damaged, or its ids are not the tokenizer's.
        """
        if stages.features_source(self.settings) != BERT:
            return None
        ours, theirs = (
            pretrained.read_vocabulary(folder)
            for folder in (self.workdir / "tokenizer", self.features_directory)
        )
        if ours != theirs:
            raise PretrainedError(
                f"tokenizer.file: got a vocabulary of {len(ours)} pieces, expected the "
                f"{len(theirs)} pieces of {self.features_directory / 'vocab.txt'}. Use the "
                f"vocab.txt of the encoder in features.path."
            )
        return pretrained.load_encoder(self.features_directory, jnp.dtype(self._encoder_dtype))
