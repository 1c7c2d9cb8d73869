"""One experiment in its workdir: config, tokenizer, networks, mesh; objectives, samplers, and what is trained so far."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diladiff_jax import config, files
from diladiff_jax.data import tokenizers
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion.schedules import ScheduleOptions, make_schedule
from diladiff_jax.nn import bert
from diladiff_jax.nn.networks import NetworkOptions, build_networks
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.objectives.build import FROZEN, build_objective, features_source, frozen_sources
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.pipeline import Sampler
from diladiff_jax.storage import bundles, checksums, config_file, pretrained
from diladiff_jax.storage.checkpoints import CheckpointError, Checkpoints, checkpoint_steps


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
            NetworkOptions.of(self.settings),
            config.data.length,
            tokenizer.vocab_size,
            self._published_encoder(),
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
            make_schedule(ScheduleOptions.of(self.config.diffusion)),
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
        return _last_step(self.own_directory(stage)) if own else trained_steps(self.workdir, stage)

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
        home = self._home(stage)
        boxed = jax.eval_shape(self.objective(stage).init, jax.random.key(0))
        abstract, shardings = nn.unbox(boxed), sharding.parameter_shardings(boxed, self.mesh)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read(stage, abstract, shardings)
        with Checkpoints(home / stage / "checkpoints") as checkpoints:
            return checkpoints.restore_averaged(abstract, shardings, ema=self.config[stage].ema > 0)

    def restore_statistics(self) -> dict[str, Any]:
        """The statistics frozen at the end of the autoencoder stage.

        Raises:
          CheckpointError: that stage has no checkpoint, or one that cannot be read.
        """
        home = self._home("autoencoder")
        abstract = jax.eval_shape(self.objective("autoencoder").init_statistics)  # type: ignore[attr-defined]
        shardings = jax.tree.map(lambda _: sharding.replicated(self.mesh), abstract)
        if bundles.is_bundle(home):
            return bundles.Bundle(home).read_statistics(abstract, shardings)
        with Checkpoints(home / "autoencoder" / "checkpoints") as checkpoints:
            return checkpoints.restore_statistics(abstract, shardings)

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

    def _home(self, stage: str) -> pathlib.Path:
        if not self.trained_steps(stage):
            raise not_trained(self.workdir, stage)
        return _home(self.workdir, stage)


_SOURCE = "init_from.json"


def check_source(workdir: str | pathlib.Path, source: str | pathlib.Path) -> None:
    """Whether `workdir` can take stages before its own from the workdir or bundle `source`; nothing is written.

    Raises:
      CheckpointError: `source` is neither, has another tokenizer or encoder than `workdir`, or stages here were trained from another source.
      DataError: a tokenizer of theirs is damaged.
    """
    workdir, source = pathlib.Path(workdir), pathlib.Path(source).absolute()
    if bundles.is_bundle(source):
        bundles.Bundle(source).check()
    noted = None
    if _noted(workdir) and any(
        _last_step(workdir / stage / "checkpoints") for stage in config.PREDECESSOR
    ):
        with contextlib.suppress(CheckpointError):  # a note that cannot be read is written anew
            noted = _source(workdir)
        if noted not in (None, source) and noted.is_dir():  # one that was moved may be given again
            raise CheckpointError(
                f"{workdir} was started from {noted}, and stages here were trained from that; start from {source} in a fresh workdir"
            )
    theirs, ours = source / "tokenizer" / "tokenizer.json", workdir / "tokenizer" / "tokenizer.json"
    if not theirs.is_file():
        raise CheckpointError(
            f"{source} has no tokenizer; it must be the workdir of a trained experiment, or a bundle"
        )
    hashes = tokenizers.load(theirs.parent).file_hashes()
    if ours.exists() and tokenizers.load(ours.parent).file_hashes() != hashes:
        raise CheckpointError(
            f"{workdir} has another tokenizer than {source}; start from it in a fresh workdir"
        )
    if _has_features(source) and (workdir / "features").is_dir():
        for name in pretrained.ENCODER_FILES:
            if checksums.crc32(source / "features" / name) != checksums.crc32(
                workdir / "features" / name
            ):
                raise CheckpointError(
                    f"{workdir / 'features' / name} differs from that of {source}; start from it in a fresh workdir"
                )


def remember_source(workdir: str | pathlib.Path, source: str | pathlib.Path) -> None:
    """Notes in `workdir` that stages before its own are those of `source`, which `check_source` has looked at, and takes over its tokenizer and features.

    Raises:
      PretrainedError: a file of the features is missing.
    """
    workdir, source = pathlib.Path(workdir), pathlib.Path(source).absolute()
    if not (workdir / "tokenizer" / "tokenizer.json").exists():
        # By name, aside and renamed: what else lies in a stranger's folder stays there.
        tokenizers.load(source / "tokenizer").save(
            workdir / "tokenizer", {"taken_from": str(source)}
        )
    if _has_features(source):  # the encoder that its stages were trained on
        pretrained.adopt(str(source / "features"), workdir / "features")
    files.atomic_write_text(workdir / _SOURCE, json.dumps({"workdir": str(source)}) + "\n")


def _has_features(source: pathlib.Path) -> bool:
    """Whether the source's settings use the published encoder in its folder; what else lies there is nobody's."""
    return config_file.load(source).features.source == "bert" and (source / "features").is_dir()


def _noted(workdir: pathlib.Path) -> bool:
    """Whether the workdir was started from another; a bundle never is, whatever lies in it."""
    return (workdir / _SOURCE).exists() and not bundles.is_bundle(workdir)


def _source(workdir: pathlib.Path) -> pathlib.Path:
    """The workdir or bundle that `remember_source` noted."""
    try:
        return pathlib.Path(json.loads((workdir / _SOURCE).read_text())["workdir"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{workdir / _SOURCE} does not say which workdir this one was started from ({error}); give it again, launch/train.py --init_from=WORKDIR, or remove that file"
        ) from None


def _home(workdir: pathlib.Path, stage: str, source: pathlib.Path | None = None) -> pathlib.Path:
    """The workdir or bundle that a stage is read from: this one, or the one it was started from where that alone has the stage, and has it made
    from the same: a stage whose predecessors were trained here anew is not lent. `source` stands in for the one that it was started from."""
    before: str | None = stage
    while before is not None:
        if _steps(workdir, before):
            return workdir
        before = config.PREDECESSOR[before]
    if source is None and _noted(workdir):
        source = _source(workdir)
    return source if source is not None and _steps(source, stage) else workdir


def require_source(workdir: str | pathlib.Path) -> None:
    """Raises CheckpointError where the workdir or bundle that this workdir was started from is gone: what it lent would be trained anew."""
    workdir = pathlib.Path(workdir)
    if _noted(workdir) and not (theirs := _source(workdir)).is_dir():
        raise CheckpointError(
            f"{theirs}, which {workdir} was started from, is not there; put it back, or tell where it is now with launch/train.py --init_from=FOLDER"
        )


def trained_steps(
    workdir: str | pathlib.Path, stage: str, source: str | pathlib.Path | None = None
) -> int:
    """The step of the stage's last checkpoint in a workdir or bundle, or in the one it was started from (or, if given, would be: `source`); 0 if there is none.

    Raises:
      CheckpointError: a bundle that cannot be read.
    """
    return _steps(
        _home(pathlib.Path(workdir), stage, None if source is None else pathlib.Path(source)), stage
    )


def last_checkpoint(workdir: str | pathlib.Path, stage: str) -> pathlib.Path:
    """The folder of the stage's last checkpoint, in a workdir or in the one it was started from; one that is not there, if it has none."""
    return (
        _home(pathlib.Path(workdir), stage)
        / stage
        / "checkpoints"
        / str(trained_steps(workdir, stage))
    )


def not_trained(workdir: str | pathlib.Path, stage: str) -> CheckpointError:
    """What is raised for a stage without a checkpoint. Raises as `require_source`, where that is why."""
    if bundles.is_bundle(workdir):
        return CheckpointError(
            f"bundle {workdir} does not hold stage {stage}; get or export one that does"
        )
    require_source(workdir)
    return CheckpointError(
        f"stage {stage} is not trained in {workdir}; run launch/train.py --workdir={workdir} --stage={stage} first"
    )


def _steps(home: pathlib.Path, stage: str) -> int:
    return (
        bundles.Bundle(home).steps(stage)
        if bundles.is_bundle(home)
        else _last_step(home / stage / "checkpoints")
    )


def _last_step(directory: pathlib.Path) -> int:
    """The highest committed step under a checkpoint directory; 0 if there is none."""
    return max(checkpoint_steps(directory), default=0)


def take(tree: Any, path: tuple[str, ...] | list[str]) -> Any:
    """The subtree at `path`."""
    return functools.reduce(lambda node, name: node[name], path, tree)
