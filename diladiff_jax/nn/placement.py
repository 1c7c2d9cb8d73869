"""Where activations lie: by logical names, under the rules and the mesh of whoever runs the network.

Networks know no mesh. `diladiff_jax.training.sharding.on_mesh` puts a mesh and its table of rules in force; outside of
it, all this does nothing.
"""

from __future__ import annotations

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, PartitionSpec

Array = jax.Array


def placement(shape: tuple[int, ...], names: tuple[str | None, ...]) -> tuple[AbstractMesh, PartitionSpec] | None:
    """The mesh in force, and how an array of this shape lies on it; an axis that its mesh axes do not divide stays whole.

    None where no mesh of several devices or no rules are in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rules = dict(nn.get_logical_axis_rules())
    if mesh.empty or mesh.size == 1 or not rules:
        return None
    spec: list[str | tuple[str, ...] | None] = []
    for size, name in zip(shape, names, strict=True):
        axes = rules.get(name) if name else None
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        parts = 1
        for axis in axes:
            parts *= mesh.shape[axis]
        spec.append(None if not axes or size % parts else axes[0] if len(axes) == 1 else axes)
    return mesh, PartitionSpec(*spec)


def spread(x: Array, *names: str | None) -> Array:
    """Holds the activation `x` to the layout of its axes' logical names ("batch", "heads", "mlp", "vocab" or None)."""
    found = placement(x.shape, names)
    return x if found is None else jax.lax.with_sharding_constraint(x, found[1])
