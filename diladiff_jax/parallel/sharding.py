"""How arrays are sharded: the mesh, and one table from logical axis names to mesh axes."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diladiff_jax.nn.placement import partition

RULES: dict[str, str | tuple[str, ...]] = {
    # Axes of parameters.
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "embed": "fsdp",
    # Activations also have heads, mlp and vocab; tokens and latents are sharded by example.
    "batch": ("data", "fsdp"),
}
"""Logical axis -> mesh axis or axes. Axes with other names are replicated."""


class DeviceError(RuntimeError):
    """JAX cannot use the devices that it was asked to use; the message is one line."""


def available_devices() -> list[Any]:
    """`jax.devices()`.

    Raises:
      DeviceError: there is none, for example because JAX_PLATFORMS asks for one that is not here.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # a missing GPU is a bare assertion
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).strip().partition("\n")[0].partition(" (set JAX_PLATFORMS")[0][:200]
        raise DeviceError(
            f"JAX_PLATFORMS: got {asked!r}, but {reason or 'this machine has no such device'}. "
            f"Set JAX_PLATFORMS=cpu, or unset it to use what there is; for a GPU or TPU, install "
            f"the JAX build for it."
        ) from None


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Makes the mesh (data, fsdp, tensor).

    Args:
      sizes: size of each axis; one of them may be -1, which means all remaining devices.
      devices: the devices to use; by default all.

    Raises:
      DeviceError: JAX has no device.
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = available_devices() if devices is None else devices
    names = ("data", "fsdp", "tensor")
    shape = [int(sizes[name]) for name in names]
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"config.mesh: got {dict(zip(names, shape, strict=True))}, expected sizes whose "
            f"product is the number of devices, {len(devices)}"
        )
    return Mesh(_arrange(devices, shape), names, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: Sequence[Any], shape: list[int]) -> np.ndarray:
    """Arranges devices in the mesh's shape, with `tensor` over the nearest neighbours.

    TPU slices are joined by a slower network, so only `data` extends over several slices.

    Raises:
      ValueError: `data` is not a multiple of the number of slices.
    """
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if shape[0] % slices:
        raise ValueError(
            f"config.mesh.data: got {shape[0]}, expected a multiple of the {slices} slices, "
            "because only this axis may extend over several slices"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [shape[0] // slices, *shape[1:]], [slices, 1, 1], devices, allow_split_physical_axes=True
    )


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Wraps `function`, to be jitted, so that it is traced with `mesh` and `RULES` in effect.

    The networks that it calls then constrain the sharding of their activations.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with (
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
            nn.logical_axis_rules(tuple(RULES.items())),
        ):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def device_memory() -> int | None:
    """Memory of one local device in bytes: on CPUs its share of the RAM; None if unknown."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def batch_devices(mesh: Mesh) -> int:
    """Number of parts into which a batch is sharded: data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `size`.

    With `multiple=batch_devices(mesh)`, this pads a batch so that it can be sharded.
    """
    return -(-size // multiple) * multiple


def local_rows(mesh: Mesh, batch: int) -> list[int]:
    """Indices of the rows of a global batch that this process's devices hold, in order.

    Several processes hold the same rows if `tensor` extends over them.
    """
    parts: Any = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(batch))})


def batch_array(mesh: Mesh, rows: np.ndarray, batch: int) -> jax.Array:
    """Makes the global batch `[batch, ...]` from this process's rows `[len(local_rows), ...]`."""
    return jax.make_array_from_process_local_data(
        batch_sharding(mesh), rows, (batch, *rows.shape[1:])
    )


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a tree of (abstract) boxed parameters, as an unboxed tree.

    An axis whose size is not a multiple of its mesh axis is replicated.
    """

    def sharding_of(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.Partitioned) else (None,) * leaf.ndim
        shape = leaf.value.shape if isinstance(leaf, nn.Partitioned) else leaf.shape
        return NamedSharding(mesh, partition(shape, names, RULES, mesh.shape))

    return jax.tree.map(sharding_of, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def replicated_parameters(
    abstract: Any, shardings: Any, mesh: Mesh, *, at_least: int = 2**20
) -> list[tuple[str, int]]:
    """Large parameters that stay replicated although the mesh has fsdp or tensor devices.

    Args:
      abstract: shapes of the parameters.
      shardings: their shardings, as `parameter_shardings` returns them.
      mesh: the mesh that they are sharded over.
      at_least: smallest size in bytes of a parameter to report.

    Returns:
      (path, bytes) of each such parameter.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return []
    leaves, found = jax.tree_util.tree_flatten_with_path(abstract)[0], []
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        size = leaf.size * leaf.dtype.itemsize
        if sharding.is_fully_replicated and size >= at_least:
            found.append(("/".join(_names(path)), size))
    return found


def like_parameters(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a tree that contains copies of the parameters, such as an optimizer's state.

    A leaf whose path ends in a parameter's path gets that parameter's sharding; all other leaves
    are replicated.
    """
    by_path = {
        _names(path): sharding
        for path, sharding in jax.tree_util.tree_flatten_with_path(shardings)[0]
    }

    def sharding_of(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            sharding = by_path.get(names[start:])
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                return sharding
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def place(tree: Any, shardings: Any) -> Any:
    """Puts host arrays that every process has on the mesh; each device receives only its part."""
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
