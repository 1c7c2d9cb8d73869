"""Where arrays lie: the mesh, and one table from logical axis names to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
}
"""Logical parameter axis -> mesh axis; names that are not here stay whole on every device."""

BATCH = PartitionSpec(("data", "fsdp"))
"""Token and latent batches: the leading axis over data and fsdp."""


def make_mesh(sizes: Mapping[str, int], devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh (data, fsdp, tensor) of the given sizes; one size may be -1 and takes all devices that are left.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    names = ("data", "fsdp", "tensor")
    shape = [int(sizes[name]) for name in names]
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(f"mesh sizes {dict(zip(names, shape, strict=True))} do not multiply to the {len(devices)} devices at hand; set config.mesh")
    return Mesh(np.array(devices).reshape(shape), names, axis_types=(AxisType.Auto,) * 3)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def batch_devices(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of (abstract) boxed parameters, unboxed; an axis that a mesh axis does not divide stays whole."""

    def one(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        spec: list[str | None] = []
        for size, name in zip(shape, names, strict=True):
            axis = RULES.get(name) if name else None
            fits = axis is not None and axis not in spec and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def like_parameters(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds copies of the parameters (an optimizer's state): a leaf whose path ends in a
    parameter's path lies as that parameter does, all else is replicated."""
    by_path = {_names(path): sharding for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]}

    def one(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            sharding = by_path.get(names[start:])
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same on every process, as arrays on the mesh; each device is given its own part alone."""
    return jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]), tree, shardings)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part)))) for part in path)
