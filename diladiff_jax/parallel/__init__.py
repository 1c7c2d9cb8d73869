"""Meshes and shardings, runs of several processes, and published rates of chips."""

from diladiff_jax.parallel.chips import CHIPS, PEAK_FLOPS, Chip, peak_flops
from diladiff_jax.parallel.processes import (
    DistributedError,
    Preempted,
    StopSignal,
    initialize_distributed,
    run_on_process_zero,
)
from diladiff_jax.parallel.sharding import (
    RULES,
    batch_array,
    batch_devices,
    batch_sharding,
    device_memory,
    like_parameters,
    local_rows,
    make_mesh,
    on_mesh,
    parameter_shardings,
    place,
    replicated,
    replicated_parameters,
    round_up,
)

__all__ = [
    "CHIPS",
    "PEAK_FLOPS",
    "RULES",
    "Chip",
    "DistributedError",
    "Preempted",
    "StopSignal",
    "batch_array",
    "batch_devices",
    "batch_sharding",
    "device_memory",
    "initialize_distributed",
    "like_parameters",
    "local_rows",
    "make_mesh",
    "on_mesh",
    "parameter_shardings",
    "peak_flops",
    "place",
    "replicated",
    "replicated_parameters",
    "round_up",
    "run_on_process_zero",
]
