"""All networks of an experiment, built from their options."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diladiff_jax.nn.autoencoder import LatentConditionedDecoder, LatentEncoder
from diladiff_jax.nn.bert import Bert
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.nn.options import (
    BackboneOptions,
    DecoderOptions,
    EncoderOptions,
    LatentDenoiserOptions,
    ScorerOptions,
)
from diladiff_jax.nn.transformer import TokenDenoiser


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Everything that `build_networks` reads from a config.

    `scan` and `remat` say how deep networks run their layers, as in `stack.run_layers`.
    """

    backbone: BackboneOptions = dataclasses.field(default_factory=BackboneOptions)
    encoder: EncoderOptions = dataclasses.field(default_factory=EncoderOptions)
    decoder: DecoderOptions = dataclasses.field(default_factory=DecoderOptions)
    latent_denoiser: LatentDenoiserOptions = dataclasses.field(
        default_factory=LatentDenoiserOptions
    )
    scorer_network: ScorerOptions = dataclasses.field(default_factory=ScorerOptions)
    compute_dtype: str = "float32"
    scan: bool = False
    remat: str = "none"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> NetworkOptions:
        """Reads the network options from a complete config, and ignores its other blocks.

        Raises:
          OptionError: a value that its rule excludes, or a conflict within one block.
        """
        return cls(
            BackboneOptions.of(settings["backbone"]),
            EncoderOptions.of(settings["encoder"]),
            DecoderOptions.of(settings["decoder"]),
            LatentDenoiserOptions.of(settings["latent_denoiser"]),
            ScorerOptions.of(settings["scorer_network"]),
            compute_dtype=settings["compute_dtype"],
            scan=settings["memory"]["scan"],
            remat=settings["memory"]["remat"],
        )


@dataclasses.dataclass(frozen=True)
class Networks:
    """The modules of an experiment, without parameters.

    `teacher` is the prior's denoiser; `student` is the same network with an interval embedding, and
    `sampling_student` computes the student as the other networks compute.
    `bert` is the published encoder, where features come from one.
    """

    denoiser: TokenDenoiser
    encoder: LatentEncoder
    decoder: LatentConditionedDecoder
    teacher: LatentDenoiser
    student: LatentDenoiser
    sampling_student: LatentDenoiser
    scorer: TokenDenoiser
    bert: Bert | None = None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """Number and width of the latents, (N, D_lat)."""
        return self.encoder.num_latents, self.encoder.latent_dim


def build_networks(
    options: NetworkOptions, length: int, vocab_size: int, bert: Bert | None = None
) -> Networks:
    """Builds every module of an experiment.

    The student is trained in float32 and with plain attention, because its loss contains forward
    derivatives, which fused attention kernels do not define.

    Args:
      options: sizes and variants of all networks.
      length: tokens per text, L.
      vocab_size: entries in the vocabulary, V, including the mask and padding.
      bert: the published encoder, if features come from one.

    Returns:
      The modules, without parameters.
    """
    dtype = jnp.dtype(options.compute_dtype)
    layers: dict[str, Any] = {"scan": options.scan, "remat": options.remat}
    backbone = dataclasses.asdict(options.backbone)
    scorer = backbone | {"causal": True, "adaln": 0} | dataclasses.asdict(options.scorer_network)
    encoder = options.encoder
    latent = dataclasses.asdict(options.latent_denoiser) | layers
    latent["num_latents"] = encoder.num_latents if latent.pop("learned_positions") else 0
    student = LatentDenoiser(encoder.latent_dim, dtype=dtype, interval=True, **latent)
    denoiser = TokenDenoiser(vocab_size, length, dtype=dtype, **backbone, **layers)
    return Networks(
        denoiser=denoiser,
        encoder=LatentEncoder(length=length, dtype=dtype, **dataclasses.asdict(encoder)),
        decoder=LatentConditionedDecoder(
            denoiser.clone(name=None), encoder.num_latents, tuple(options.decoder.cross_layers)
        ),
        teacher=LatentDenoiser(encoder.latent_dim, dtype=dtype, **latent),
        student=student.clone(dtype=jnp.float32, plain=True, name=None),
        sampling_student=student,
        scorer=TokenDenoiser(vocab_size, length, dtype=dtype, **scorer, **layers),
        bert=None if bert is None else bert.clone(scan=options.scan),
    )
