"""The schema of an experiment, generated from the options dataclasses, and its one validator.

Every block of the config is an options class declared beside what it configures; `blocks` lists
them. The defaults are the paper's published setting. An experiment file in `configs/` starts from
`default_config()` and changes what differs. Whatever a file, a command line or a workdir gives
passes through `resolve`, which rejects unknown keys, wrong types and impossible combinations with
one line each. docs/settings.md, generated from the same classes, lists every setting.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from diladiff_jax import stages
from diladiff_jax.data import corpora
from diladiff_jax.data.options import DataOptions, TokenizerOptions
from diladiff_jax.diffusion.gaussian import ScheduleOptions, make_schedule
from diladiff_jax.nn.options import (
    BackboneOptions,
    DecoderOptions,
    EncoderOptions,
    FeaturesOptions,
    LatentDenoiserOptions,
    ScorerOptions,
)
from diladiff_jax.options import OptionError, Options
from diladiff_jax.run_options import (
    EvaluationOptions,
    ExperimentOptions,
    LoggingOptions,
    MemoryOptions,
    MeshOptions,
)
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.sampling.solvers import SOLVERS

Config = Any
"""A checked experiment: an `ml_collections.ConfigDict`, whose attributes no type checker knows."""


class ConfigError(ValueError):
    """An invalid setting: one line with the key, the value and what would be valid."""


def blocks() -> dict[str, tuple[Options, ...]]:
    """Every block of the config with the defaults of the options in it; "" is the top level.

    Raises:
      ValueError: a stage has the name of another block.
    """
    before: dict[str, tuple[Options, ...]] = {
        "": (ExperimentOptions(),),
        "data": (DataOptions(),),
        "tokenizer": (TokenizerOptions(),),
        "features": (FeaturesOptions(),),
        "backbone": (BackboneOptions(),),
        "encoder": (EncoderOptions(),),
        "decoder": (DecoderOptions(),),
        "latent_denoiser": (LatentDenoiserOptions(),),
        "scorer_network": (ScorerOptions(),),
        "diffusion": (ScheduleOptions(),),
    }
    of_stages = {name: (stage.training, stage.options) for name, stage in stages.STAGES.items()}
    after: dict[str, tuple[Options, ...]] = {
        "sampling": (SamplingOptions(),),
        "evaluation": (EvaluationOptions(),),
        "mesh": (MeshOptions(),),
        "memory": (MemoryOptions(),),
        "logging": (LoggingOptions(),),
    }
    taken = {*before, *after, *(field.name for field in dataclasses.fields(ExperimentOptions))}
    if clash := sorted(taken & of_stages.keys()):
        raise ValueError(f"stage {clash[0]}: the config has other settings of that name")
    return before | of_stages | after


def default_config() -> Config:
    """The published setting on OpenWebText, with the pretrained denoiser's own features."""
    config = ConfigDict()
    for name, parts in blocks().items():
        settings = {key: value for part in parts for key, value in dataclasses.asdict(part).items()}
        if name:
            config[name] = ConfigDict(settings)
        else:
            config.update(settings)
    return config


def resolve(given: Mapping[str, Any] | ConfigDict) -> Config:
    """Overlays `given` on the defaults and checks the result.

    Raises:
      ConfigError: unknown key, wrong type, or an impossible combination.
    """
    config = default_config()
    _overlay(config, given.to_dict() if isinstance(given, ConfigDict) else given, "")
    check(config)
    config.lock()
    return config


def check(config: Config) -> None:
    """Rejects invalid values and combinations.

    Raises:
      ConfigError: with the key, its value, and what would be valid.
    """
    for name, parts in blocks().items():
        for part in parts:
            try:
                type(part).of(config[name] if name else config)
            except OptionError as error:
                key = f"{name}.{error.name}" if name else error.name
                raise ConfigError(f"{key}: got {error.value!r}, expected {error.valid}") from None
    for key, valid in _conflicts(config):
        raise ConfigError(f"{key}: got {_value(config, key)!r}, expected {valid}")


def stages_of(config: Config) -> tuple[str, ...]:
    """The stages that `--stage=all` trains, in order: all that have steps."""
    return tuple(name for name in stages.STAGES if config[name].steps > 0)


def _conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """(key, what would be valid) of settings that contradict those of another block."""
    data = DataOptions.of(config.data)
    corpus = corpora.corpus_of(data.corpus)
    yield from ((f"data.{name}", valid) for name, valid in corpus.conflicts(data))
    if config.features.source == "bert" and config.tokenizer.kind != "wordpiece":
        yield "tokenizer.kind", "wordpiece when features.source is bert, which reads its own ids"
    if config.encoder.num_latents > config.data.length:
        yield "encoder.num_latents", f"at most data.length = {config.data.length}"
    depth = config.backbone.num_layers
    layers = config.decoder.cross_layers
    if not layers or not all(0 <= layer < depth for layer in layers):
        yield "decoder.cross_layers", f"layer indices from 0 to {depth - 1}"
    scorer = config.scorer_network
    if config.backbone.positions == "rotary" and scorer.width // scorer.heads % 2:
        yield "scorer_network.heads", "such that width / heads is even (rotary positions)"
    yield from _sampling_conflicts(config)
    if config.scorer.steps:
        key = corpus.scorer_setting
        if not config.data[key]:
            yield f"data.{key}", "above 0 when scorer.steps is: the scorer needs text of its own"


def _sampling_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Conflicts of samplers with the depth of the backbone and with the noise schedule."""
    depth = config.backbone.num_layers
    if not all(0 <= layer < depth - 1 for layer in config.sampling.skip_layers):
        allowed = f"layer indices from 0 to {depth - 2}" if depth > 1 else "empty"
        yield "sampling.skip_layers", f"{allowed}: the last layer computes the logits"
    if make_schedule(ScheduleOptions.of(config.diffusion)).finite_velocity:
        return
    why = f"when diffusion.schedule is {config.diffusion.schedule}, whose velocity is infinite at"
    for key in ("p_noise", "p_clean"):
        if config.diladiff[key]:
            yield f"diladiff.{key}", f"0 {why} both ends"
    if config.diladiff.step_form == "velocity":
        yield "diladiff.step_form", f"rotation {why} t = 1"
    if SOLVERS[config.sampling.prior_method].uses_velocity:
        able = " or ".join(name for name, solver in SOLVERS.items() if not solver.uses_velocity)
        yield "sampling.prior_method", f"{able} {why} t = 1"


def _overlay(target: Config, given: Mapping[str, Any], prefix: str) -> None:
    """Writes `given` over `target`, checking keys and types."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if not isinstance(key, str):
            raise ConfigError(f"{name}: got a key of type {type(key).__name__}, expected text")
        if key not in target:
            near = difflib.get_close_matches(key, list(target), n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(target)}."
            raise ConfigError(f"{name}: unknown config key; {hint}")
        if isinstance(target[key], ConfigDict):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name}: got {value!r}, expected a block of settings")
            _overlay(target[key], value, name + ".")
        else:
            target[key] = _convert(name, value, target[key])


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    tuple: "a sequence of whole numbers",
}


def _convert(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of the default.

    Raises:
      ConfigError: it has another type, or does not fit into 32 bits.
    """
    kind = type(default)
    valid = _KINDS[kind]
    if kind is tuple and isinstance(value, list | tuple):
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in value):
            raise ConfigError(f"{name}: got {value!r}, expected {valid}")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**128 else math.inf
    if kind is not type(value):
        raise ConfigError(f"{name}: got {value!r}, expected {valid}")
    if kind is int and not name.endswith("seed") and abs(value) >= 2**31:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number of 32 bits")
    if kind is float and not abs(value) < 2.0**128:
        raise ConfigError(f"{name}: got {value!r}, expected a finite number of 32 bits")
    return value


def _value(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value
