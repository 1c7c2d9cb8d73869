"""A trained model as one object: load, sample, encode, decode, infill.

This file is longer than others because it is the whole public interface of a model, and most of it
is documentation.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diladiff_jax import arguments, stages
from diladiff_jax import config as config_lib
from diladiff_jax.config import Config
from diladiff_jax.data import tokenizers
from diladiff_jax.experiment import Experiment
from diladiff_jax.jax_settings import under_pinned_settings
from diladiff_jax.parallel import sharding
from diladiff_jax.programs import Programs
from diladiff_jax.sampling.sampler import Controls, Sample, Sampler
from diladiff_jax.stages import MODELS, SampledModel
from diladiff_jax.storage import bundles, config_file, lineage, origins, released
from diladiff_jax.storage.errors import CheckpointError

Array = jax.Array
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sampled texts.

    Attributes:
      texts: one string per sample.
      tokens: int32 `[num, L]`.
      unmasked_at: the decoding step that unmasked each position, `[num, L]`; -1 where it was given.
      latents: `[num, N, D_lat]`, or None without a latent.
      nll: with `score`, the negative log-likelihood of each text under the trained scorer in nats
        per token, `[num]`. It is computed on the sampled tokens: a text whose words are split in
        unusual ways has a larger value than the same text tokenized again.
    """

    texts: list[str]
    tokens: np.ndarray
    unmasked_at: np.ndarray
    latents: np.ndarray | None
    nll: np.ndarray | None = None

    def __getitem__(self, rows: slice) -> Samples:
        """Some of the samples."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cut: dict[str, Any] = {
            name: part if part is None else part[rows] for name, part in parts.items()
        }
        return Samples(**cut)


class Model:
    """A trained experiment with its parameters on the devices of a mesh. Made by `load`."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.config: Any = experiment.config  # ConfigDict does not type its fields
        self.tokenizer = experiment.tokenizer
        self.networks = experiment.networks
        self.sampler: Sampler = experiment.sampler
        self.length: int = self.config.data.length
        self._trained: dict[str, Any] = {}
        self._programs = Programs(experiment)

    def __reduce__(self) -> Any:
        """Pickles and copies as its workdir and settings; parameters are read again when needed.

        Raises:
          TypeError: it is on a mesh of its own, which names this process's devices.
        """
        if self.experiment.mesh != _default_mesh():
            raise TypeError(
                "a Model loaded with mesh=... cannot be pickled, because a mesh names the devices "
                "of one process. Send the workdir, and call dl.load in the other process."
            )
        experiment = self.experiment
        return _reload, (
            experiment.workdir.absolute(),
            experiment.settings,
            experiment.compute_dtype,
        )

    # What is trained.

    @property
    def models(self) -> tuple[str, ...]:
        """The models that can be sampled, in the order in which they were registered."""
        return tuple(
            name
            for name in stages.sampled_models()
            if all(self.has(stage) for stage in MODELS[name].stages)
        )

    @property
    def best(self) -> str | None:
        """The model that is sampled where none is named; None if none is trained."""
        preferred = [name for name in self.models if MODELS[name].preferred]
        found = preferred or self.models
        return found[-1] if found else None

    @property
    def devices(self) -> int:
        """The number of parts that a batch is divided into."""
        return sharding.batch_devices(self.experiment.mesh)

    def trained_steps(self, stage: str) -> int:
        """The step of the stage's last checkpoint; 0 if there is none."""
        return self.experiment.trained_steps(stage)

    def has(self, stage: str) -> bool:
        """Whether the stage has a checkpoint."""
        return self.trained_steps(stage) > 0

    @under_pinned_settings
    def trained(self, stage: str) -> Any:
        """Parameters of a stage (the average, if one is kept), restored when first needed.

        Raises:
          CheckpointError: the stage is not trained.
        """
        if stage not in self._trained:
            self._trained[stage] = self.experiment.restore(stage)
        return self._trained[stage]

    @functools.cached_property
    @under_pinned_settings
    def statistics(self) -> dict[str, Any]:
        """The frozen statistics of features and latents."""
        return self.experiment.restore_statistics()

    def parameters(self, model: str) -> dict[str, Any]:
        """What the sampler of a model or control reads.

        Raises:
          ValueError: there is no such model.
          CheckpointError: a stage of it is not trained.
        """
        record = stages.model_named(model, controls=True)
        return {
            name: stages.take(self.trained(stage), tuple(path))
            for name, (stage, *path) in record.parameters.items()
        }

    @under_pinned_settings
    def controls(self, model: str | None = None, **given: Any) -> Controls:
        """Settings of a sampling call; those that are not given come from the config.

        Args:
          model: the model to sample; it decides the default of `latent_steps`. Default `best`.
          **given: the fields of `Controls`.

        Raises:
          ValueError: a number out of range, or a name that is not a setting of a call.
          CheckpointError: no model is given, and none is trained.
        """
        record = self._record(None) if model is None else stages.model_named(model, controls=True)
        return arguments.controls(self.sampler.options, record, self.length, given)

    def sampling_settings(self, model: str | None = None, **given: Any) -> dict[str, Any]:
        """All settings of a sampling call by name, for a record of how samples were made.

        Arguments and errors are those of `controls`.

        Returns:
          The `sampling` block of the config with what is `given` in place of its values; where the
          latent comes from and in how many steps; all as plain Python values.
        """
        record = self._record(None) if model is None else stages.model_named(model, controls=True)
        self.controls(record.name, **given)  # raises if a value is out of range
        options = self.sampler.options
        settings = dataclasses.asdict(options)
        for name in ("batch", "prior_steps", "student_steps", "prior_method"):
            del settings[name]  # it changes no sample, or what follows says it
        if record.source is not None:
            settings["latent_source"] = repr(record.source.bind(options))
        if record.latent_steps is not None:
            settings["latent_steps"] = record.latent_steps(options)
        if record.decode is not None:
            settings |= {"order": record.decode.__name__, "decode_steps": self.length}
        plain = {name: np.asarray(v).item() for name, v in given.items() if v is not None}
        return settings | plain

    # Sampling.

    @under_pinned_settings
    def sample(
        self,
        key: Array | int,
        num: int = 1,
        *,
        model: str | None = None,
        batch: int | None = None,
        start: int = 0,
        score: bool = False,
        **controls: Any,
    ) -> Samples:
        """Samples `num` texts.

        Sample i of a key uses the same random numbers regardless of `num`, `batch` and the number
        of devices, and so, up to rounding, is the same text.

        Args:
          key: a JAX key, or an int seed.
          num: number of texts.
          model: a name in `models`; default `best`.
          batch: texts at a time; default the config's, or `num` if that is smaller.
          start: index of the first sample.
          score: whether the trained scorer judges each text too, in the same program.
          **controls: the fields of `Controls`: decode_steps, latent_steps, temperature, ...

        Raises:
          ValueError: an argument out of range.
          CheckpointError: the model, or the scorer that is asked for, is not trained.
        """
        prompt = self.experiment.process.initial((arguments.whole_number("num", num), self.length))
        record = self._record(model)
        return self._run(record, key, prompt, batch, start, controls, score=score)

    def stream(
        self,
        key: Array | int,
        num: int,
        *,
        prompt: str | Sequence[str] | np.ndarray | None = None,
        model: str | None = None,
        batch: int | None = None,
        start: int = 0,
        score: bool = False,
        **controls: Any,
    ) -> Iterator[Samples]:
        """`sample`, or `infill` of one prompt, as a stream with one batch in memory at a time.

        To continue after n samples, raise `start` by n. Arguments and errors are those of `sample`.
        """
        arguments.first_index(start, arguments.whole_number("num", num))
        if prompt is None:
            blank = self.experiment.process.initial((1, self.length))
        else:
            blank = self.prompt_tokens(prompt)
        if len(blank) != 1:
            raise ValueError(f"prompt: got {len(blank)} prompts, expected one")
        record, size = self._record(model), self._batch_size(num, batch)
        for first in range(0, num, size):
            # The last batch is sampled in full and cut, so that one compiled program serves all.
            prompts = np.repeat(blank, size, axis=0)
            found = self._run(record, key, prompts, size, start + first, controls, score=score)
            yield found[: min(size, num - first)]

    @under_pinned_settings
    def infill(
        self,
        key: Array | int,
        prompt: str | Sequence[str] | np.ndarray,
        *,
        model: str | None = None,
        batch: int | None = None,
        start: int = 0,
        score: bool = False,
        **controls: Any,
    ) -> Samples:
        """Fills in what is masked and keeps the rest; the latent is sampled from the prior.

        Args:
          key: a JAX key, or an int seed.
          prompt: text or texts in which each `[MASK]` is one token to fill in and what follows the
            text is free too; or int32 tokens `[B, L]` with the mask's id where the model is free.
          model, batch, start, score, **controls: as in `sample`.

        Raises:
          ValueError: a prompt is empty, too long, leaves nothing to fill in or misspells the mask;
            or tokens of another shape or vocabulary.
        """
        tokens, record = self.prompt_tokens(prompt), self._record(model)
        return self._run(record, key, tokens, batch, start, controls, score=score)

    def prompt_tokens(self, prompt: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """Prompts as int32 `[B, L]`, masked where the model is free. Raises as `infill` does."""
        process = self.experiment.process
        return arguments.prompt_tokens(prompt, self.tokenizer, process, self.length)

    # Latents.

    @under_pinned_settings
    def encode(self, texts: str | Sequence[str] | np.ndarray, *, batch: int | None = None) -> Array:
        """Encodes texts to standardized latents, float32 `[B, N, D_lat]`.

        Args:
          texts: a text, texts, or tokens `[B, L]`; a text is padded with end-of-text.
          batch: texts at a time; default the config's.

        Raises:
          ValueError: no text, one that is too long, or tokens of another shape or vocabulary.
        """
        if isinstance(texts, np.ndarray | jax.Array):
            tokens = arguments.token_rows(texts, self.tokenizer, self.length)
        else:
            tokens = self.text_tokens([texts] if isinstance(texts, str) else texts)
        features = stages.features_source(self.experiment.settings)
        frozen = {
            "features": self.trained(features),
            "encoder": stages.take(self.trained(stages.ENCODER[0]), stages.ENCODER[1:]),
        }
        parts = [
            self._programs.encode(frozen, self.statistics, jnp.asarray(tokens[rows]))
            for rows in self._batches(len(tokens), batch)
        ]
        return jnp.concatenate(parts)[: len(tokens)]

    def text_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as int32 `[B, L]`, padded with end-of-text. Raises as `encode` does."""
        return arguments.text_tokens(texts, self.tokenizer, self.length)

    @under_pinned_settings
    def decode(
        self,
        key: Array | int,
        latents: Array | np.ndarray,
        *,
        batch: int | None = None,
        score: bool = False,
        **controls: Any,
    ) -> Samples:
        """Decodes standardized latents `[B, N, D_lat]`: encoded, sampled or interpolated ones.

        The other arguments are those of `sample`.

        Raises:
          ValueError: latents of another shape, or an argument out of range.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 3 or latents.shape[1:] != self.networks.latent_shape:
            n, d = self.networks.latent_shape
            raise ValueError(f"latents: got shape {latents.shape}, expected [B, {n}, {d}]")
        prompt = self.experiment.process.initial((len(latents), self.length))
        record = stages.TRUE_LATENT
        return self._run(record, key, prompt, batch, 0, controls, latents=latents, score=score)

    def program(self, model: str | SampledModel) -> Callable[..., Sample]:
        """The jitted sampler of a model or control; see `Programs.sampler`.

        Raises:
          ValueError: there is no such model.
        """
        if not isinstance(model, SampledModel):
            model = stages.model_named(model, controls=True)
        return self._programs.sampler(model)

    @under_pinned_settings
    def _run(
        self,
        record: SampledModel,
        key: Array | int,
        prompt: np.ndarray,
        batch: int | None,
        start: int,
        controls: dict[str, Any],
        *,
        latents: np.ndarray | None = None,
        score: bool = False,
    ) -> Samples:
        """Samples one text per prompt, batch by batch."""
        num, key = len(prompt), arguments.sampling_key(key)
        start = arguments.first_index(start, num)
        settings = self.controls(record.name, **controls)
        params = self.parameters(record.name)
        if score:
            params["scorer"] = self.trained("scorer")
        parts: list[Sample] = []
        program = self.program(record.name)
        for rows in self._batches(num, batch):
            extra = () if latents is None else (jnp.asarray(latents[rows]),)
            indices, given = jnp.asarray(start + rows), jnp.asarray(prompt[rows])
            parts.append(jax.device_get(program(params, key, indices, given, *extra, settings)))

        def joined(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)[:num]

        tokens = joined("tokens")
        texts = [self.tokenizer.decode(row) for row in tokens]
        return Samples(texts, tokens, joined("unmasked_at"), joined("latents"), joined("nll"))

    def _record(self, model: str | None) -> SampledModel:
        """The record of a model; by default of the best one."""
        if model is not None:
            return stages.model_named(model)
        if self.best is None:
            workdir = self.experiment.workdir
            lineage.require_source(workdir)
            raise CheckpointError(
                f"{workdir} has no trained model. "
                f"Run launch/train.py --workdir={workdir} --stage=all."
            )
        return MODELS[self.best]

    def _batch_size(self, num: int, batch: int | None) -> int:
        """Texts at a time: `batch` or the config's, at most `num`, divisible by the devices."""
        if batch is not None:
            batch = arguments.whole_number("batch", batch)
        return sharding.round_up(min(batch or self.sampler.options.batch, num), self.devices)

    def _batches(self, num: int, batch: int | None) -> list[np.ndarray]:
        """Indices 0 to num - 1 in batches of one size; the last one is padded with repeats.

        Raises:
          ValueError: there is nothing to do, or a batch below 1.
        """
        if num < 1:
            raise ValueError("got no text, prompt or latent, expected at least one")
        size = self._batch_size(num, batch)
        return [
            np.minimum(np.arange(first, first + size), num - 1) for first in range(0, num, size)
        ]


@under_pinned_settings
def load(
    workdir: str | pathlib.Path,
    *,
    config: Config | None = None,
    mesh: Mesh | None = None,
    compute_dtype: str | None = None,
) -> Model:
    """Opens a workdir of `launch/train.py`, a bundle of `launch/export.py`, or a released model.

    Networks are restored when first needed, each device reading only its own shards.

    Args:
      workdir: the folder, or a name in `models()`.
      config: the workdir's config, in which settings that may change (docs/architecture.md) may
        differ; default: the config as saved.
      mesh: with axes (data, fsdp, tensor); default all devices along data.
      compute_dtype: "float32" or "bfloat16", what networks compute in, whatever they were trained
        in. Default: what `config` asks for, if that is not what the workdir has; else float32 on
        CPUs, where bfloat16 is slow, and what the workdir has on accelerators. Parameters are
        float32 either way.

    Raises:
      ConfigError, DataError, PretrainedError, CheckpointError: it is neither, or damaged; or an
        argument is invalid.
    """
    workdir = released.locate(workdir)
    if bundles.is_bundle(workdir):
        bundles.Bundle(workdir).check()
    if config is None:
        config = config_file.load(workdir)
    else:
        config_lib.check(config)
        config_file.require_same(config, workdir)
    tokenizer = tokenizers.load(workdir / "tokenizer")
    experiment: Any = config
    for stage in stages.STAGES:
        if found := origins.changes(workdir, stage, experiment.to_dict()):
            _log.warning("stage %s does not fit any more: %s", stage, "; ".join(found))
    mesh = _default_mesh() if mesh is None else mesh
    dtype = _run_dtype(compute_dtype, config, workdir, mesh.devices.flat[0].platform)
    return Model(Experiment(config, workdir, tokenizer, mesh, compute_dtype=dtype))


def _run_dtype(
    asked: str | None, config: Any, workdir: str | pathlib.Path, platform: str
) -> str | None:
    """What a loaded model computes in, given what `load` was asked for; None is the config's.

    Raises:
      ConfigError: networks cannot compute in this type.
    """
    if asked is not None:
        resolved: Any = config_lib.resolve(config.to_dict() | {"compute_dtype": asked})
        return resolved.compute_dtype
    if platform != "cpu" or config_file.changed_keys(config, workdir, config_file.PRECISION):
        return None
    return "float32"


def _default_mesh() -> Mesh:
    """All devices along data."""
    return sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})


def _reload(workdir: pathlib.Path, settings: dict[str, Any], compute_dtype: str) -> Model:
    """The model that `Model.__reduce__` describes."""
    return load(workdir, config=config_lib.resolve(settings), compute_dtype=compute_dtype)
