"""A trained model as one object: load, sample, encode, decode, infill."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diladiff_jax import config as config_lib
from diladiff_jax.data import tokenizers
from diladiff_jax.evaluation.measures.likelihood import content_mask
from diladiff_jax.evaluation.measures.scorer import Scorer, load_tokenizer
from diladiff_jax.experiment import Experiment
from diladiff_jax.nn import gpt2
from diladiff_jax.objectives.autoregressive import next_token_nll
from diladiff_jax.objectives.build import features_source, text_encoder
from diladiff_jax.parallel import sharding
from diladiff_jax.sampling.pipeline import MODELS, Controls, Sample, Sampler
from diladiff_jax.storage import bundles, config_file, pretrained
from diladiff_jax.storage.errors import CheckpointError
from diladiff_jax.storage.lineage import require_source

Array = jax.Array

NEEDED = {
    "mdlm": ("mdlm",),
    "mdlm_long": ("mdlm_long",),
    "ladiff": ("autoencoder", "ladiff"),
    "diladiff": ("autoencoder", "diladiff"),
}
"""Model -> the stages whose networks it samples with."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """texts; tokens int32 `[num, L]`; the decoding step that unmasked each position `[num, L]` (-1: given); latents `[num, N, D_lat]` or None;
    with `score`, the negative log-likelihood of each text under the trained scorer, nats a token `[num]`: of the tokens as they were drawn, which
    a word written in unusual pieces makes larger than that of the text tokenized anew."""

    texts: list[str]
    tokens: np.ndarray
    unmasked_at: np.ndarray
    latents: np.ndarray | None
    nll: np.ndarray | None = None


class Model:
    """A trained experiment, its parameters on the devices of a mesh. Made by `load`."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.config = experiment.config
        self.tokenizer = experiment.tokenizer
        self.networks = experiment.networks
        self.sampler: Sampler = experiment.sampler()
        self.length: int = self.config.data.length

    @property
    def models(self) -> tuple[str, ...]:
        """What this workdir can sample, best last."""
        order = ("mdlm", "mdlm_long", "ladiff", "diladiff")
        return tuple(m for m in order if all(self.has(stage) for stage in NEEDED[m]))

    @property
    def devices(self) -> int:
        """How many parts a batch is cut into."""
        return sharding.batch_devices(self.experiment.mesh)

    def trained_steps(self, stage: str) -> int:
        """The step of the stage's last checkpoint; 0 if there is none."""
        return self.experiment.trained_steps(stage)

    def has(self, stage: str) -> bool:
        """Whether the stage has a checkpoint here."""
        return self.trained_steps(stage) > 0

    @functools.cached_property
    def _trained(self) -> dict[str, Any]:
        return {}

    def trained(self, stage: str) -> Any:
        """Parameters of a stage (its average where one is kept), restored once, when first needed.

        Raises:
          CheckpointError: that stage is not trained here.
        """
        if stage not in self._trained:
            self._trained[stage] = self.experiment.restore(stage)
        return self._trained[stage]

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:
        """The frozen statistics of features and latents."""
        return self.experiment.restore_statistics()

    @functools.cached_property
    def published_scorer(self) -> Scorer | None:
        """The GPT-2 that `evaluation.scorer` names, its parameters laid out on the mesh; None where it names none.

        Raises:
          PretrainedError: it cannot be had or read.
        """
        name, mesh = self.config.evaluation.scorer, self.experiment.mesh
        if not name:
            return None
        folder = pretrained.locate(name, pretrained.SCORER_FILES)
        network, params = pretrained.load_scorer(folder)
        params = sharding.place(
            params, sharding.parameter_shardings(gpt2.abstract_parameters(network), mesh)
        )
        batch = -(-self.config.sampling.batch // self.devices) * self.devices
        return Scorer(
            network,
            params,
            load_tokenizer(folder),
            batch=batch,
            batch_sharding=sharding.batch_sharding(mesh),
        )

    def parameters(self, model: str) -> dict[str, Any]:
        """What `Sampler.generate(model, ...)` reads.

        Raises:
          ValueError: no such model.
          CheckpointError: a stage of it is not trained here.
        """
        if model not in MODELS:
            raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
        if model in ("mdlm", "mdlm_long"):
            return {"denoiser": self.trained(model)}
        network = "teacher" if model == "ladiff" else "student"
        return {"decoder": self.trained("autoencoder")["decoder"], network: self.trained(model)}

    def controls(
        self,
        model: str = "diladiff",
        *,
        decode_steps: int | None = None,
        latent_steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        gamma: float | None = None,
        threshold: float | None = None,
        **others: Any,
    ) -> Controls:
        """Settings of a draw; what is not given is the config's (`latent_steps`: prior_steps or student_steps).

        Raises:
          ValueError: a number out of range, or a setting that is none of a draw's.
        """
        s = self.config.sampling
        if others:
            name = next(iter(others))
            hint = (
                f"the config's sampling.{name} has it (dl.load(workdir, config=...))"
                if name in s
                else f"known are {', '.join(Controls._fields)}"
            )
            raise ValueError(f"{name} is no setting of a draw; {hint}")
        steps = s.prior_steps if model == "ladiff" else s.student_steps
        values = dict(
            decode_steps=s.decode_steps if decode_steps is None else decode_steps,
            latent_steps=steps if latent_steps is None else latent_steps,
            temperature=s.temperature if temperature is None else temperature,
            top_p=s.top_p if top_p is None else top_p,
            gamma=s.gamma if gamma is None else gamma,
            threshold=s.threshold if threshold is None else threshold,
        )
        for name in ("decode_steps", "latent_steps"):
            most = 2**31 // self.length - 1  # places times steps are counted in 32 bits
            if not isinstance(values[name], numbers.Integral) or not 1 <= values[name] <= most:
                raise ValueError(
                    f"{name} is {values[name]!r}; it must be a whole number from 1 to {most}"
                )
        for name in ("temperature", "top_p", "gamma", "threshold"):
            if not isinstance(values[name], numbers.Real):
                raise ValueError(f"{name} is {values[name]!r}; it must be a number")
        if not 0 <= values["temperature"] < math.inf:  # nor NaN
            raise ValueError(
                f"temperature is {values['temperature']}; it must be 0 or more, and finite"
            )
        for name in ("top_p", "threshold"):
            if not 0 <= values[name] <= 1:
                raise ValueError(f"{name} is {values[name]}; it must be between 0 and 1")
        if not 0 <= values["gamma"] < 1:
            raise ValueError(f"gamma is {values['gamma']}; it must be in [0, 1)")
        return Controls(
            jnp.int32(values["decode_steps"]),
            jnp.int32(values["latent_steps"]),
            *(jnp.float32(values[n]) for n in ("temperature", "top_p", "gamma", "threshold")),
        )

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
        """Draws `num` texts; sample i of a key has the same draws whatever `num`, `batch` or the number of devices, and so, up to rounding, is the same.

        Args:
          key: a JAX key, or an int seed.
          model: "diladiff", "ladiff", "mdlm" or "mdlm_long"; default the best one trained here.
          batch: examples at a time; default the config's, or `num` if that is smaller.
          start: index of the first sample.
          score: whether the trained scorer judges each text too, in the same program (`Samples.nll`).
          **controls: decode_steps, latent_steps, temperature, top_p, gamma, threshold.

        Raises:
          ValueError: a setting out of range.
          CheckpointError: the model, or the scorer that is asked for, is not trained here.
        """
        if not isinstance(num, numbers.Integral) or num < 1:
            raise ValueError(f"num is {num!r}; it must be a whole number of at least 1")
        prompt = np.full((num, self.length), self.tokenizer.mask_id, np.int32)
        return self._fill(key, prompt, self._best(model), batch, start, controls, score=score)

    def stream(
        self,
        key: Array | int,
        num: int,
        *,
        model: str | None = None,
        batch: int | None = None,
        start: int = 0,
        prompt: str | Sequence[str] | np.ndarray | None = None,
        score: bool = False,
        **controls: Any,
    ) -> Iterator[Samples]:
        """`sample` (or `infill`, where one prompt is given) batch by batch, each given out as soon as it is drawn: any number of samples in
        the memory of one batch. Whoever stops after n goes on with `start` raised by n. Arguments and errors are those of `sample`.
        """
        if not isinstance(num, numbers.Integral) or num < 1:
            raise ValueError(f"num is {num!r}; it must be a whole number of at least 1")
        if isinstance(start, numbers.Integral) and start + num > 2**31:
            raise ValueError(
                f"num is {num} from start = {start} on; the last sample's index must be below 2^31"
            )
        blank = (
            np.full((1, self.length), self.tokenizer.mask_id, np.int32)
            if prompt is None
            else self.prompt_tokens(prompt)
        )
        if len(blank) != 1:
            raise ValueError(f"{len(blank)} prompts are given; a stream fills in one")
        if batch is not None and (not isinstance(batch, numbers.Integral) or batch < 1):
            raise ValueError(f"batch is {batch!r}; it must be a whole number of at least 1")
        size, model = (
            -(-min(batch or self.config.sampling.batch, num) // self.devices) * self.devices,
            self._best(model),
        )
        for first in range(0, num, size):
            # The last batch is drawn whole and cut, so that one compiled program serves all.
            drawn, n = (
                self._fill(
                    key,
                    np.repeat(blank, size, axis=0),
                    model,
                    size,
                    start + first,
                    controls,
                    score=score,
                ),
                min(size, num - first),
            )
            yield Samples(
                *(
                    None if part is None else part[:n]
                    for part in (
                        drawn.texts,
                        drawn.tokens,
                        drawn.unmasked_at,
                        drawn.latents,
                        drawn.nll,
                    )
                )
            )

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
        """Fills in what is masked; everything given is held fixed, and the latent is drawn from the prior.

        Args:
          prompt: text or texts in which each `[MASK]` stands for one token to fill and what follows the text is
            free too; or int32 tokens `[B, L]` with the mask's id at the free positions.

        Raises:
          ValueError: a prompt that is empty, longer than the model or without a free position, a mask written otherwise, of another shape, or with ids that are not its own.
        """
        return self._fill(
            key, self.prompt_tokens(prompt), self._best(model), batch, start, controls, score=score
        )

    def prompt_tokens(self, prompt: str | Sequence[str] | np.ndarray) -> np.ndarray:
        """Prompts as int32 `[B, L]`, the mask's id wherever the model is free. Raises as `infill` does."""
        if isinstance(prompt, np.ndarray | jax.Array):
            return self._checked_tokens(prompt)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        rows = np.full((len(texts), self.length), self.tokenizer.mask_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.tokenizer.encode_masked(text)
            if near := re.search(
                r"[\[<]\s*mask\s*[\]>]", text.replace(tokenizers.MASK_TEXT, " "), re.IGNORECASE
            ):
                raise ValueError(
                    f"prompt {text[:40]!r} has {near[0]!r}; a token to fill in is written {tokenizers.MASK_TEXT}"
                )
            if not len(ids):
                raise ValueError("the prompt is empty; give text, or none at all to sample freely")
            if len(ids) > self.length:
                raise ValueError(
                    f"prompt {text[:40]!r} has {len(ids)} tokens; the model holds {self.length}"
                )
            if len(ids) == self.length and self.tokenizer.mask_id not in ids:
                raise ValueError(
                    f"prompt {text[:40]!r} fills all {self.length} tokens that the model holds; put {tokenizers.MASK_TEXT} where it shall write, or shorten it"
                )
            row[: len(ids)] = ids
        return rows

    def _checked_tokens(self, tokens: np.ndarray | Array) -> np.ndarray:
        """Tokens as int32 `[B, L]`; raises ValueError for another shape or type, or ids that are not the tokenizer's."""
        tokens = np.asarray(tokens)
        if (
            tokens.ndim != 2
            or tokens.shape[1] != self.length
            or not np.issubdtype(tokens.dtype, np.integer)
        ):
            raise ValueError(
                f"tokens are {tokens.dtype} {tokens.shape}; they must be integers of shape [B, {self.length}]"
            )
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self.tokenizer.vocab_size):
            raise ValueError(
                f"tokens reach from {tokens.min()} to {tokens.max()}; ids go from 0 to {self.tokenizer.vocab_size - 1}"
            )
        return tokens.astype(np.int32)

    def encode(self, texts: str | Sequence[str] | np.ndarray, *, batch: int | None = None) -> Array:
        """Text or texts (or tokens `[B, L]`) to standardized latents, float32 `[B, N, D_lat]`; a text is filled up with end-of-text.

        `batch` texts at a time, spread over the mesh; default the config's.

        Raises:
          ValueError: no text, one longer than the model, or tokens of another shape or with ids that are not its own.
        """
        if isinstance(texts, np.ndarray | jax.Array):
            tokens = self._checked_tokens(texts)
        else:
            tokens = self.text_tokens([texts] if isinstance(texts, str) else texts)
        frozen = {
            "features": self.trained(features_source(self.experiment.settings)),
            "encoder": self.trained("autoencoder")["encoder"],
        }
        parts = [
            self._encode(frozen, self.statistics, jnp.asarray(tokens[rows]))
            for rows in self._batches(len(tokens), batch)
        ]
        return jnp.concatenate(parts)[: len(tokens)]

    def text_tokens(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as rows of tokens, int32 `[B, L]`, filled up with end-of-text. Raises as `encode` does."""
        rows = np.full((len(texts), self.length), self.tokenizer.eot_id, np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.tokenizer.encode(text)
            if len(ids) > self.length:
                raise ValueError(
                    f"text {text[:40]!r} has {len(ids)} tokens; the model holds {self.length}"
                )
            row[: len(ids)] = ids
        return rows

    def decode(
        self,
        key: Array | int,
        latents: Array,
        *,
        batch: int | None = None,
        score: bool = False,
        **controls: Any,
    ) -> Samples:
        """Standardized latents `[B, N, D_lat]` (encoded, drawn, interpolated) to text.

        Raises:
          ValueError: latents of another shape, or a setting out of range.
        """
        latents = np.asarray(latents, np.float32)
        if latents.ndim != 3 or latents.shape[1:] != self.networks.latent_shape:
            raise ValueError(
                f"latents have shape {latents.shape}; it must be [B, {self.networks.latent_shape[0]}, {self.networks.latent_shape[1]}]"
            )
        prompt = np.full((len(latents), self.length), self.tokenizer.mask_id, np.int32)
        return self._fill(key, prompt, "given", batch, 0, controls, latents, score=score)

    @functools.cached_property
    def _encode(self) -> Any:
        mesh = self.experiment.mesh
        batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        encode = sharding.on_mesh(
            text_encoder(self.experiment.settings, self.networks).__call__, mesh
        )
        return jax.jit(encode, in_shardings=(None, whole, batch), out_shardings=batch)

    def _batches(self, num: int, batch: int | None) -> list[np.ndarray]:
        """Indices 0 to num - 1 in batches of one size that the devices divide; the last one is filled up with repeats, so
        that one compiled program serves all.

        Raises:
          ValueError: nothing to do, or a batch below 1.
        """
        if num < 1:
            raise ValueError("nothing is given; at least one text, prompt or latent is needed")
        if batch is not None and (not isinstance(batch, numbers.Integral) or batch < 1):
            raise ValueError(f"batch is {batch!r}; it must be a whole number of at least 1")
        size = -(-min(batch or self.config.sampling.batch, num) // self.devices) * self.devices
        return [
            np.minimum(np.arange(first, first + size), num - 1) for first in range(0, num, size)
        ]

    @functools.cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    def compiled(self, model: str) -> Any:
        """One jitted program: `(params, key, indices [B], prompt [B, L], controls) -> Sample`, the batch spread over
        the mesh. Model "given" takes latents `[B, N, D_lat]` before the controls; "noise" decodes a null latent;
        "prior_METHOD" is "ladiff" by that latent sampler whatever the config's, self-conditioned on the previous step. Parameters with a
        "scorer" have the text scored in the same program. The prompt's memory becomes the tokens': a device array is given up with the call."""
        own = (
            f"prior_{self.sampler.prior_method}"
            if self.sampler.prior_self_conditioning == "previous"
            else None
        )
        model = {"mdlm_long": "mdlm", own: "ladiff"}.get(
            model, model
        )  # the same program: compiled once
        if model not in self._compiled:
            sampler, mesh = self.sampler, self.experiment.mesh
            batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
            if model.startswith("prior_"):
                sampler = dataclasses.replace(
                    sampler,
                    prior_method=model.removeprefix("prior_"),
                    prior_self_conditioning="previous",
                )
                function, extra = functools.partial(sampler.generate, "ladiff"), ()
            elif model == "given":
                function, extra = sampler.decode_latents, (batch,)
            else:
                function, extra = (
                    (
                        sampler.decode_noise
                        if model == "noise"
                        else functools.partial(sampler.generate, model)
                    ),
                    (),
                )
            self._compiled[model] = jax.jit(
                sharding.on_mesh(self._scored(function), mesh),
                in_shardings=(None, whole, batch, batch, *extra, whole),
                out_shardings=batch,
                donate_argnums=3,
            )
        return self._compiled[model]

    def _scored(self, function: Callable[..., Sample]) -> Callable[..., Sample]:
        """`function`, whose sample is scored where its parameters hold a scorer's."""
        network, tokenizer = self.networks.scorer, self.tokenizer

        def run(params: dict[str, Any], *arguments: Any) -> Sample:
            sample = function(params, *arguments)
            if "scorer" not in params:
                return sample
            nll = next_token_nll(
                network,
                params["scorer"],
                sample.tokens,
                tokenizer.eot_id,
                jnp.asarray(tokenizer.sampleable),
            )
            text = content_mask(sample.tokens, tokenizer.eot_id)
            return sample._replace(nll=jnp.sum(nll * text, axis=-1) / jnp.sum(text, axis=-1))

        return run

    def _best(self, model: str | None) -> str:
        if model is None:
            if not self.models:
                require_source(self.experiment.workdir)
                raise CheckpointError(
                    f"{self.experiment.workdir} has no trained model; run launch/train.py --workdir={self.experiment.workdir} --stage=all"
                )
            return self.models[-1]
        if model not in MODELS:
            raise ValueError(f"model is {model!r}; it must be one of {', '.join(MODELS)}")
        return model

    def _fill(
        self,
        key: Array | int,
        prompt: np.ndarray,
        model: str,
        batch: int | None,
        start: int,
        controls: dict[str, Any],
        latents: np.ndarray | None = None,
        *,
        score: bool = False,
    ) -> Samples:
        num = len(prompt)
        if not isinstance(start, numbers.Integral) or not 0 <= start <= 2**31 - num:
            raise ValueError(
                f"start is {start!r}; it must be a whole number of 0 or more, and the last sample's index below 2^31"
            )
        if isinstance(key, numbers.Integral):
            if not -(2**63) <= key < 2**63:
                raise ValueError(f"the seed is {key}; it must be a whole number of 64 bits")
            key = jax.random.key(int(key))
        elif not isinstance(key, jax.Array) or not (
            (key.shape == () and jnp.issubdtype(key.dtype, jax.dtypes.prng_key))
            or (key.dtype == jnp.uint32 and key.ndim == 1)
        ):
            raise ValueError(
                f"key is {key!r}; it must be a whole number or one key of jax.random.key"
            )
        settings = self.controls("diladiff" if model == "given" else model, **controls)
        params = (
            {"decoder": self.trained("autoencoder")["decoder"]}
            if model == "given"
            else self.parameters(model)
        )
        params |= {"scorer": self.trained("scorer")} if score else {}
        parts: list[Sample] = []
        for rows in self._batches(num, batch):
            extra = () if latents is None else (jnp.asarray(latents[rows]),)
            parts.append(
                jax.device_get(
                    self.compiled(model)(
                        params,
                        key,
                        jnp.asarray(start + rows),
                        jnp.asarray(prompt[rows]),
                        *extra,
                        settings,
                    )
                )
            )

        def joined(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)[:num]

        tokens = joined("tokens")
        return Samples(
            [self.tokenizer.decode(row) for row in tokens],
            tokens,
            joined("unmasked_at"),
            joined("latents"),
            joined("nll"),
        )


def load(
    workdir: str | pathlib.Path, *, config: ConfigDict | None = None, mesh: Mesh | None = None
) -> Model:
    """Opens a workdir that `launch/train.py` made, or a bundle by `launch/export.py`; networks are restored when first needed, straight onto the mesh.

    Args:
      config: the workdir's own experiment with other settings of sampling, evaluation or logging; default as it is.
      mesh: with axes (data, fsdp, tensor); default all devices along data.

    Raises:
      ConfigError, DataError, PretrainedError, CheckpointError: neither, or a damaged one.
    """
    if bundles.is_bundle(workdir):
        bundles.Bundle(workdir).check()
    if config is None:
        config = config_file.load(workdir)
    else:
        config_lib.check(config)
        config_file.require_same(config, workdir)
    tokenizer = tokenizers.load(pathlib.Path(workdir) / "tokenizer")
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}) if mesh is None else mesh
    return Model(Experiment(config, workdir, tokenizer, mesh))
