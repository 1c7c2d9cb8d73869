"""Sharding of activations by the logical names of their axes.

Networks know no mesh. `diladiff_jax.parallel.sharding.on_mesh` activates a mesh and rules that map
logical names to mesh axes. Without them, the functions here do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Shaped


def partition(
    shape: tuple[int, ...],
    names: Sequence[str | None],
    rules: Mapping[str, str | tuple[str, ...]],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """The sharding of an array over a mesh.

    An axis stays unsharded if the mesh axes do not divide its size, or if an earlier axis of the
    array already uses them.

    Args:
      shape: shape of the array.
      names: logical name of each axis, or None for an axis that is never sharded.
      rules: mesh axis or axes of each logical name.
      sizes: number of devices along each mesh axis.

    Returns:
      The mesh axis or axes of each array axis.
    """
    spec: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        axes = rules.get(name) if name else None
        parts = math.prod(
            sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
        )
        spec.append(axes if axes and axes not in spec and size % parts == 0 else None)
    return PartitionSpec(*spec)


def placement(
    shape: tuple[int, ...], names: tuple[str | None, ...]
) -> tuple[AbstractMesh, PartitionSpec] | None:
    """The active mesh, and the `partition` of an array of this shape over it.

    Returns:
      None if no rules are active, or no mesh of several devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules: Any = dict(nn.get_logical_axis_rules())
    if mesh.empty or mesh.size == 1 or not rules:
        return None
    return mesh, partition(shape, names, rules, mesh.shape)


def constrain_sharding(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """Constrains an activation to the sharding of its axes' logical names.

    Args:
      x: the activation.
      *names: "batch", "heads", "mlp", "vocab" or None for each axis.

    Returns:
      `x`, with the constraint if a mesh is active.
    """
    found = placement(x.shape, names)
    return x if found is None else jax.lax.with_sharding_constraint(x, found[1])
