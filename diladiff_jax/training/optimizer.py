"""Optimizers from a stage's settings: AdamW or Muon (optax's), warm-up, decay, clipping, groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

FROZEN = "frozen"
"""The optimizer group that is never updated."""

GroupOf = Callable[[tuple[str, ...]], str]


def decay_schedule(settings: Mapping[str, Any], peak: float) -> optax.Schedule:
    """`peak` through the warm-up, then constant, linear or cosine decay to final_ratio * peak."""
    steps = max(settings["steps"] - settings["warmup"], 1)
    final = settings["final_ratio"]
    decay = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * final, steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps, final),
    }[settings["schedule"]]()
    return lambda step: decay(jnp.maximum(step - settings["warmup"], 0))


def warmup_schedule(warmup: int) -> optax.Schedule:
    """The factor (n + 1) / warmup, at most 1: the first update is already above zero."""
    return lambda step: jnp.minimum(1.0, (step + 1) / max(warmup, 1))


def path_names(path: Any) -> tuple[str, ...]:
    """A pytree path as its dictionary keys."""
    return tuple(str(getattr(part, "key", part)) for part in path)


def is_block_matrix(path: tuple[str, ...], leaf: Any) -> bool:
    """Whether Muon orthogonalizes the update: kernels of linear maps, except the head's.

    Embeddings, positions, norms, biases and the head go to Adam.
    """
    return leaf.ndim == 2 and path[-1] == "kernel" and "head" not in path


def scale_by_group_warmup(
    settings: Mapping[str, Any], group_of: GroupOf
) -> optax.GradientTransformation:
    """Scales each update by the warm-up of its group.

    Group NAME warms up over `settings["NAME_warmup"]` updates if that is given, else over
    `settings["warmup"]`.
    """

    def init(params: Any) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params

        def scaled(path: Any, update: Any) -> Any:
            group = group_of(path_names(path))
            steps = settings.get(f"{group}_warmup", settings["warmup"])
            factor = warmup_schedule(steps)(state.count)
            return jnp.asarray(factor, update.dtype) * update

        count = optax.safe_increment(state.count)
        updates = jax.tree_util.tree_map_with_path(scaled, updates)
        return updates, optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformation(init, update)


def make_optimizer(settings: Mapping[str, Any], group_of: GroupOf) -> optax.GradientTransformation:
    """The stage's optimizer: clipping, AdamW or Muon, then each group's warm-up.

    Args:
      settings: the stage's block of the config.
      group_of: the optimizer group of a parameter's path; see `Objective.group`. Clipping is by the
        global norm of all groups but "frozen".
    """

    def is_frozen(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: group_of(path_names(path)) == FROZEN, params
        )

    freeze = optax.masked(optax.set_to_zero(), is_frozen)
    clip = [optax.clip_by_global_norm(settings["clip"])] if settings["clip"] else []
    warmup = scale_by_group_warmup(settings, group_of)
    return optax.chain(freeze, *clip, _base_optimizer(settings), warmup, freeze)


def _base_optimizer(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    """AdamW or Muon with the decay schedule, without warm-up."""
    rate = decay_schedule(settings, settings["learning_rate"])
    if settings["optimizer"] == "adamw":
        return optax.adamw(
            rate,
            settings["b1"],
            settings["b2"],
            settings["epsilon"],
            weight_decay=settings["weight_decay"],
            mask=_kernels,
        )
    return contrib.muon(
        decay_schedule(settings, settings["muon_learning_rate"]),
        weight_decay=settings["weight_decay"],
        eps=settings["epsilon"],
        adam_learning_rate=rate,
        adam_b1=settings["b1"],
        adam_b2=settings["b2"],
        muon_weight_dimension_numbers=_muon_dimensions,
    )


def _kernels(params: Any) -> Any:
    # Decay pulls matrices only: gains, biases and learned positions have no scale to shrink
    # towards. (Muon decays what it orthogonalizes; optax's has no mask for the rest.)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_names(path)[-1] == "kernel", params
    )


def _muon_dimensions(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            contrib.MuonDimensionNumbers() if is_block_matrix(path_names(path), leaf) else None
        ),
        params,
    )
