"""Optimizers from a stage's settings: AdamW or Muon (optax's own), warm-up and decay, clipping, frozen groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib


def decay_schedule(settings: Mapping[str, Any], peak: float) -> optax.Schedule:
    """`peak` through the warm-up, then constant, or linear or cosine decay to final_ratio * peak at the last step."""
    steps = max(settings["steps"] - settings["warmup"], 1)
    final = settings["final_ratio"]
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * final, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, final),
    }[settings["schedule"]]()
    return lambda step: decay(jnp.maximum(step - settings["warmup"], 0))


def warmup_schedule(warmup: int) -> optax.Schedule:
    """Factor (n + 1) / warmup up to 1: the first update already moves."""
    return lambda step: jnp.minimum(1.0, (step + 1) / max(warmup, 1))


def path_names(path: Any) -> tuple[str, ...]:
    """A pytree path as its dictionary keys."""
    return tuple(str(getattr(part, "key", part)) for part in path)


def is_block_matrix(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether Muon orthogonalizes this update: kernels of linear maps, except the head; embeddings, positions, norms and biases go to Adam."""
    return leaf.ndim == 2 and path[-1] == "kernel" and "head" not in path


def make_optimizer(
    settings: Mapping[str, Any], group_of: Callable[[tuple[str, ...]], str]
) -> optax.GradientTransformation:
    """The stage's optimizer: clip by the global norm of what is trained, AdamW or Muon, then each group's warm-up.

    Group "frozen" is never updated; group NAME warms up over `settings["NAME_warmup"]` steps where that is given.
    """

    def group_mask(name: str) -> Callable[[Any], Any]:
        return lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: group_of(path_names(path)) == name, params
        )

    def kernels(params: Any) -> Any:
        # Decay pulls matrices only: gains, biases and learned positions have no scale to shrink towards. (Of Muon's, those that it
        # orthogonalizes: optax's has no mask for the rest.)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path_names(path)[-1] == "kernel", params
        )

    def dimensions(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: (
                contrib.MuonDimensionNumbers() if is_block_matrix(path_names(path), leaf) else None
            ),
            params,
        )

    rate = decay_schedule(settings, settings["learning_rate"])
    if settings["optimizer"] == "adamw":
        update = optax.adamw(
            rate,
            settings["b1"],
            settings["b2"],
            settings["epsilon"],
            weight_decay=settings["weight_decay"],
            mask=kernels,
        )
    else:
        update = contrib.muon(
            decay_schedule(settings, settings["muon_learning_rate"]),
            weight_decay=settings["weight_decay"],
            eps=settings["epsilon"],
            adam_learning_rate=rate,
            adam_b1=settings["b1"],
            adam_b2=settings["b2"],
            muon_weight_dimension_numbers=dimensions,
        )
    freeze = optax.masked(optax.set_to_zero(), group_mask("frozen"))
    clip = [optax.clip_by_global_norm(settings["clip"])] if settings["clip"] else []
    warmups = [
        optax.masked(
            optax.scale_by_schedule(
                warmup_schedule(settings.get(f"{name}_warmup", settings["warmup"]))
            ),
            group_mask(name),
        )
        for name in ("all", "encoder", "decoder")
    ]
    return optax.chain(freeze, *clip, update, *warmups, freeze)
