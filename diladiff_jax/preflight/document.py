"""One program of an experiment compiled for one slice, as the JSON document of compile.py."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import topologies

from diladiff_jax import config as config_lib
from diladiff_jax.preflight.abstract import AbstractExperiment, device_mesh
from diladiff_jax.preflight.measurement import measure
from diladiff_jax.preflight.programs import sampler_program, train_step_program
from diladiff_jax.preflight.topology import Slice, TopologyError


def compile_for_slice(
    config: Any,
    where: Slice,
    first: Slice,
    *,
    stage: str | None,
    sampler: str | None,
    source: str,
) -> dict[str, Any]:
    """Compiles the update of a stage, or a sampler, for a slice of TPUs that need not be here.

    libtpu must be where JAX finds it (TPU_LIBRARY_PATH).

    Args:
      config: the experiment's validated ConfigDict.
      where: the slice to compile for.
      first: the slice that the config's batch is meant for; on others the batch is scaled with the
        number of chips, so that each chip's share stays the same.
      stage: the stage whose update is compiled; None for a sampler.
      sampler: the model whose sampler is compiled; None for a stage.
      source: the config's file, for the document.

    Returns:
      The document of one program: what it is, whether it fits, and its costs per device.

    Raises:
      TopologyError: the TPU compiler does not know the slice.
      CompileError: the TPU compiler rejects the program for a reason other than its memory.
      ConfigError: the config cannot run on the slice.
    """
    devices = _devices(where)
    block = stage or "sampling"
    batch = config[block].batch * where.chips // first.chips
    changed = {block: config[block].to_dict() | {"batch": batch}}
    config = config_lib.resolve(config.to_dict() | changed)
    mesh = device_mesh(config, devices)
    experiment = AbstractExperiment(config, mesh)
    if stage is not None:
        program = train_step_program(experiment, stage)
    else:
        assert sampler is not None
        program = sampler_program(experiment, sampler)
    found = measure(program, where, mesh)
    jax.clear_caches()  # the programs are large, and each is compiled only once
    return {
        "config": source,
        "stage": stage or f"{sampler} sampler",
        "topology": where.name,
        "devices": len(devices),
        "chips": where.chips,
        "mesh": {name: int(size) for name, size in mesh.shape.items()},
        "batch": program.batch,
        **found,
    }


def _devices(where: Slice) -> list[Any]:
    """The devices of a slice, as the TPU compiler describes them."""
    options: dict[str, Any] = {}
    if where.generation == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, the default on v5p
    if where.chips == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=where.name, **options
        ).devices
    except (RuntimeError, ValueError) as error:
        raise TopologyError(
            f"topology: {where.name} is rejected by the TPU compiler:"
            f" {str(error).strip().splitlines()[0]}"
        ) from None
    expected = where.chips * where.chip.devices
    if len(devices) != expected:
        raise TopologyError(
            f"topology: {where.name} has {len(devices)} devices for the TPU compiler, expected"
            f" {expected}. Another version of libtpu may know it better."
        )
    return list(devices)
