"""Where arrays lie: the mesh, and one table from logical axis names to mesh axes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diladiff_jax.nn.placement import partition

RULES: dict[str, str | tuple[str, ...]] = {
    # of parameters
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    # of activations, which also have heads, mlp and vocab: tokens and latents are cut by examples
    "batch": ("data", "fsdp"),
}
"""Logical axis -> mesh axis or axes; names that are not here stay whole on every device."""


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
        raise ValueError(
            f"mesh sizes {dict(zip(names, shape, strict=True))} do not multiply to the {len(devices)} devices at hand; set config.mesh"
        )
    return Mesh(_arrange(devices, shape), names, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: list[jax.Device], shape: list[int]) -> np.ndarray:
    """Devices in the mesh's shape, `tensor` over the nearest neighbours; of several TPU slices, which only a slow network joins, `data`
    alone reaches across.

    Raises:
      ValueError: `data` is no multiple of the number of slices.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise ValueError(
            f"mesh size data is {shape[0]}; it must be a multiple of the {slices} slices, for only it may reach across them"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [shape[0] // slices, *shape[1:]], [slices, 1, 1], devices, allow_split_physical_axes=True
    )


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function`, to be jitted, with the mesh and `RULES` in force while it is traced: its networks lay their activations out."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(tuple(RULES.items())),
        ):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """The same whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def device_memory() -> int | None:
    """Bytes that one device here can hold: its own, or on CPUs its share of the machine's; None where that is not known."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def batch_devices(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def local_places(mesh: Mesh, batch: int) -> list[int]:
    """Which rows of a global batch this process's devices hold, in order: several processes hold the same ones where
    `tensor` reaches across them."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({place for (part,) in parts for place in range(*part.indices(batch))})


def batch_array(mesh: Mesh, rows: np.ndarray, batch: int) -> jax.Array:
    """This process's rows `[len(local_places), ...]` as its part of the global batch `[batch, ...]`."""
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh), rows, (batch, *rows.shape[1:])
    )


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of (abstract) boxed parameters, unboxed; an axis that a mesh axis does not divide stays whole."""

    def one(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        return NamedSharding(mesh, partition(shape, names, RULES, mesh.shape))

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def replicated_parameters(
    abstract: Any, shardings: Any, mesh: Mesh, *, at_least: int = 2**20
) -> list[tuple[str, int]]:
    """(path, bytes) of parameters of `at_least` bytes that lie whole on every device of a mesh that cuts parameters."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    leaves, found = jax.tree_util.tree_flatten_with_path(abstract)[0], []
    for (path, leaf), placed in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if placed.is_fully_replicated and size >= at_least:
            found.append(("/".join(_names(path)), size))
    return found


def like_parameters(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that holds copies of the parameters (an optimizer's state): a leaf whose path ends in a
    parameter's path lies as that parameter does, all else is replicated."""
    by_path = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }

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
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index]),
        tree,
        shardings,
    )


def _names(path: Any) -> tuple[str, ...]:
    return tuple(
        str(getattr(part, "key", getattr(part, "name", getattr(part, "idx", part))))
        for part in path
    )
