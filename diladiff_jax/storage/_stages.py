"""What storage needs to know about training stages, read when asked so that new stages count."""

from __future__ import annotations

from diladiff_jax import config

_MEANING = {
    "mdlm": ("data.length", "backbone"),
    "autoencoder": ("features.source", "features.with_embeddings", "encoder", "decoder"),
    "ladiff": ("latent_denoiser", "diffusion"),
}


def stage_names() -> tuple[str, ...]:
    """All stages, baselines included, in the order of training."""
    return config.STAGES + config.BASELINES


def with_predecessors(stage: str) -> list[str]:
    """The stage, its predecessor, the predecessor of that one, and so on to the first."""
    chain = []
    current: str | None = stage
    while current is not None:
        chain.append(current)
        current = config.PREDECESSOR[current]
    return chain


def settings_inherited(stage: str) -> tuple[str, ...]:
    """Settings and blocks of the config that give the stage's parameters their meaning."""
    return _MEANING.get(stage, ())
