"""Names and titles of the models and controls in an evaluation, from their records in `stages`."""

from __future__ import annotations

from diladiff_jax.stages import MODELS


def title(name: str) -> str:
    """What a reader calls a model or control; the name itself if it has no record."""
    return MODELS[name].title if name in MODELS else name


def controls() -> tuple[str, ...]:
    """Names of the controls, which are compared with DiLaDiff."""
    return tuple(name for name, model in MODELS.items() if model.control)


def latent_models() -> tuple[str, ...]:
    """Names of the models, without controls, that sample a latent."""
    return tuple(name for name, m in MODELS.items() if m.has_latent and not m.control)
