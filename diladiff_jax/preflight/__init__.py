"""Programs compiled ahead of time for TPUs that are not attached: memory, collectives, roofline.

where = preflight.parse_topology("v5e:4x4")
mesh = preflight.device_mesh(config, devices)
experiment = preflight.AbstractExperiment(config, mesh)
preflight.measure(preflight.train_step_program(experiment, "mdlm"), where, mesh)
"""

from diladiff_jax.preflight import hlo
from diladiff_jax.preflight.abstract import (
    AbstractExperiment,
    Vocabulary,
    device_mesh,
    parameter_bytes,
)
from diladiff_jax.preflight.measurement import CompileError, exhausted_bytes, measure
from diladiff_jax.preflight.programs import (
    Program,
    decoding_trips,
    sampler_program,
    train_step_program,
)
from diladiff_jax.preflight.roofline import Estimate, collective_seconds, estimate
from diladiff_jax.preflight.topology import Slice, TopologyError, parse_topology, slice_of

__all__ = [
    "AbstractExperiment",
    "CompileError",
    "Estimate",
    "Program",
    "Slice",
    "TopologyError",
    "Vocabulary",
    "collective_seconds",
    "decoding_trips",
    "device_mesh",
    "estimate",
    "exhausted_bytes",
    "hlo",
    "measure",
    "parameter_bytes",
    "parse_topology",
    "sampler_program",
    "slice_of",
    "train_step_program",
]
