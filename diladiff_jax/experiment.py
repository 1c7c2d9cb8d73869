"""One experiment in its workdir: config, tokenizer, networks, mesh; objectives, samplers, and what is trained so far."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion.gaussian import make_schedule
from diladiff_jax.nn import bert
from diladiff_jax.nn.networks import build_networks
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.objectives.build import FROZEN, build_objective, features_source, frozen_sources
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.pipeline import Sampler
from diladiff_jax.storage import bundles, lineage, pretrained
from diladiff_jax.storage.checkpoints import Checkpoints
from diladiff_jax.storage.quarantine import last_step


class Experiment:
    """What every command on a workdir starts from."""

    def __init__(
        self, config: ConfigDict, workdir: str | pathlib.Path, tokenizer: Tokenizer, mesh: Mesh
    ) -> None:
        self.config = config
        self.workdir = pathlib.Path(workdir)
        self.tokenizer = tokenizer
        self.mesh = mesh
        self.settings = config.to_dict()
        self.networks = build_networks(
            self.settings, config.data.length, tokenizer.vocab_size, self._published_encoder()
        )

    def objective(self, stage: str) -> Objective:
        """The stage's objective."""
        t = self.tokenizer
        return build_objective(
            stage,
            self.settings,
            self.networks,
            mask_id=t.mask_id,
            eot_id=t.eot_id,
            sampleable=t.sampleable,
        )

    def sampler(self) -> Sampler:
        """The experiment's samplers."""
        s = self.config.sampling
        return Sampler(
            self.networks,
            make_schedule(*(self.config.diffusion[name] for name in ("schedule", "d", "k", "t0"))),
            self.tokenizer.mask_id,
            self.tokenizer.sampleable,
            step_form=self.config.diladiff.step_form,
            prior_method=s.prior_method,
            prior_self_conditioning=s.prior_self_conditioning,
            gamma_warp=s.gamma_warp,
            refresh_every=s.refresh_every,
            skip_layers=tuple(s.skip_layers),
            skip_from=s.skip_from,
            order=s.order,
        )

    def own_directory(self, stage: str) -> pathlib.Path:
        """`WORKDIR/STAGE/checkpoints`, where this workdir's own training of the stage is saved."""
        return self.workdir / stage / "checkpoints"

    def trained_steps(self, stage: str, *, own: bool = False) -> int:
        """The step of the stage's last checkpoint; 0 if there is none. With `own`, in this workdir alone."""
        if own:
            return last_step(self.own_directory(stage))
        return lineage.trained_steps(self.workdir, stage)

    def restore(self, stage: str) -> Any:
        """The trained parameters of a stage (the average where one is kept), or those of "bert", laid out on the mesh.

        Raises:
          CheckpointError: the stage has no checkpoint, or one that cannot be read.
          PretrainedError: the published encoder's weights cannot be read.
        """
        if stage == "bert":
            network = self.networks.bert
            shardings = sharding.parameter_shardings(bert.abstract_parameters(network), self.mesh)
            return sharding.place(
                pretrained.encoder_parameters(self.features_directory, network), shardings
            )
        home = lineage.home_of_trained_stage(self.workdir, stage)
        boxed = jax.eval_shape(self.objective(stage).init, jax.random.key(0))
        abstract, shardings = nn.unbox(boxed), sharding.parameter_shardings(boxed, self.mesh)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read(stage, abstract, shardings)
        with Checkpoints(home / stage / "checkpoints") as checkpoints:
            item = "ema" if self.config[stage].ema > 0 else "params"
            return checkpoints.restore_item(item, abstract, shardings)

    def restore_statistics(self) -> dict[str, Any]:
        """The statistics frozen at the end of the autoencoder stage.

        Raises:
          CheckpointError: that stage has no checkpoint, or one that cannot be read.
        """
        home = lineage.home_of_trained_stage(self.workdir, "autoencoder")
        abstract = jax.eval_shape(self.objective("autoencoder").init_statistics)  # type: ignore[attr-defined]
        shardings = jax.tree.map(lambda _: sharding.replicated(self.mesh), abstract)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read_statistics(abstract, shardings)
        with Checkpoints(home / "autoencoder" / "checkpoints") as checkpoints:
            return checkpoints.restore_item("statistics", abstract, shardings)

    def context(self, stage: str) -> Context:
        """The frozen networks and statistics that a stage's loss reads, from its predecessors' checkpoints.

        Raises:
          CheckpointError: a predecessor is not trained, or cannot be read.
        """
        # The latest stage first, so that the one to train next is the one that is named as missing.
        sources = frozen_sources(stage, self.settings)
        needed = sorted(
            {source[0] for source in sources.values()}, key=["bert", *FROZEN].index, reverse=True
        )
        trained = {earlier: self.restore(earlier) for earlier in needed}
        frozen = {name: take(trained[earlier], path) for name, (earlier, *path) in sources.items()}
        return Context(frozen, self.restore_statistics() if "autoencoder" in needed else {})

    def restore_features(self) -> Any:
        """The parameters of the feature extractor alone. Raises as `restore` does."""
        return self.restore(features_source(self.settings))

    @property
    def features_directory(self) -> pathlib.Path:
        """`WORKDIR/features`, the published encoder's files: a workdir needs neither the network nor the folder they came from."""
        return self.workdir / "features"

    def _published_encoder(self) -> bert.Bert | None:
        """The encoder of `WORKDIR/features`, where the config asks for one; its ids must be the tokenizer's.

        Raises:
          PretrainedError: no such files, damaged ones, or another vocabulary.
        """
        if features_source(self.settings) != "bert":
            return None
        ours, theirs = (
            pretrained.read_vocabulary(folder)
            for folder in (self.workdir / "tokenizer", self.features_directory)
        )
        if ours != theirs:
            raise pretrained.PretrainedError(
                f"{self.features_directory / 'vocab.txt'} has {len(theirs)} pieces and differs from the tokenizer's {len(ours)}; "
                f"tokenizer.file must be the vocab.txt of the encoder in features.path"
            )
        return pretrained.load_encoder(
            self.features_directory, jnp.dtype(self.config.features.compute_dtype)
        )


def take(tree: Any, path: tuple[str, ...] | list[str]) -> Any:
    """The subtree at `path`."""
    return functools.reduce(lambda node, name: node[name], path, tree)
