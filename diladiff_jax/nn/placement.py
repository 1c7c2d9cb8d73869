"""Where activations lie: by logical names, under the rules and the mesh of whoever runs the network.

Networks know no mesh. `diladiff_jax.parallel.sharding.on_mesh` puts a mesh and its table of rules in force; outside of
it, all this does nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec

Array = jax.Array


def partition(
    shape: tuple[int, ...],
    names: Sequence[str | None],
    rules: Mapping[str, str | tuple[str, ...]],
    sizes: Mapping[str, int],
) -> PartitionSpec:
    """How an array of this shape, its axes named, lies on mesh axes of these `sizes`: an axis that they do not divide, or whose mesh axis
    another one has, stays whole."""
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
    """The mesh in force, and the `partition` of an array of this shape on it.

    None where no mesh of several devices or no rules are in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(nn.get_logical_axis_rules())
    if mesh.empty or mesh.size == 1 or not rules:
        return None
    return mesh, partition(shape, names, rules, mesh.shape)


def constrain_sharding(x: Array, *names: str | None) -> Array:
    """Holds the activation `x` to the layout of its axes' logical names ("batch", "heads", "mlp", "vocab" or None)."""
    found = placement(x.shape, names)
    return x if found is None else jax.lax.with_sharding_constraint(x, found[1])
