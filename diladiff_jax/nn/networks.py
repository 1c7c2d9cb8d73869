"""All networks of an experiment, built from its (plain mapping) settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diladiff_jax.nn.autoencoder import LatentConditionedDecoder, LatentEncoder
from diladiff_jax.nn.bert import Bert
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.nn.transformer import TokenDenoiser


@dataclasses.dataclass(frozen=True)
class Networks:
    """Modules, without parameters. `teacher` is the prior's denoiser, `student` the same with an interval embedding;
    `bert` the published encoder where features are its."""

    denoiser: TokenDenoiser
    encoder: LatentEncoder
    decoder: LatentConditionedDecoder
    teacher: LatentDenoiser
    student: LatentDenoiser
    scorer: TokenDenoiser
    bert: Bert | None = None

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(N, D_lat)."""
        return self.encoder.num_latents, self.encoder.latent_dim


def build_networks(
    settings: Mapping[str, Any], length: int, vocab_size: int, bert: Bert | None = None
) -> Networks:
    """Builds every module from the blocks `backbone`, `encoder`, `decoder`, `latent_denoiser`, `scorer_network`, `memory` and `compute_dtype`.

    The student always computes in float32 and with plain attention: its loss is made of forward derivatives.
    """
    dtype, memory = jnp.dtype(settings["compute_dtype"]), settings["memory"]
    layers = {"scan": memory["scan"], "remat": memory["remat"]}
    backbone = dict(settings["backbone"])
    encoder, latent = dict(settings["encoder"]), dict(settings["latent_denoiser"])
    denoiser = TokenDenoiser(vocab_size, length, dtype=dtype, **backbone, **layers)
    latent_dim = encoder["latent_dim"]
    latent["num_latents"] = encoder["num_latents"] if latent.pop("learned_positions", False) else 0
    scorer = backbone | {"causal": True, "adaln": 0} | dict(settings["scorer_network"])
    return Networks(
        denoiser=denoiser,
        encoder=LatentEncoder(length=length, dtype=dtype, **encoder),
        decoder=LatentConditionedDecoder(
            denoiser.clone(name=None),
            encoder["num_latents"],
            tuple(settings["decoder"]["cross_layers"]),
        ),
        teacher=LatentDenoiser(latent_dim, dtype=dtype, **latent, **layers),
        student=LatentDenoiser(
            latent_dim, dtype=jnp.float32, interval=True, plain=True, **latent, **layers
        ),
        scorer=TokenDenoiser(vocab_size, length, dtype=dtype, **scorer, **layers),
        bert=None if bert is None else bert.clone(scan=memory["scan"]),
    )
