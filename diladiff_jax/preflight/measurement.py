"""Compiles a program for a TPU slice and measures the result: memory, counts and a roofline."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh

from diladiff_jax.preflight import hlo, roofline
from diladiff_jax.preflight.abstract import parameter_bytes
from diladiff_jax.preflight.programs import Program
from diladiff_jax.preflight.topology import Slice

_NEEDS_A_PROGRAM = (
    "flops",
    "bytes_accessed",
    "collectives",
    "estimated_seconds",
    "estimated_utilization",
    "bound_by",
)
"""Results that are None if the compiler runs out of memory and so returns no program."""


class CompileError(RuntimeError):
    """The compiler rejects a program for another reason than memory; the message is one line."""


def measure(program: Program, where: Slice, mesh: Mesh) -> dict[str, Any]:
    """Compiles a program, counts its costs and estimates its time.

    Args:
      program: what to compile.
      where: the slice; `mesh` is over its devices.
      mesh: the program's mesh.

    Returns:
      The entries `fits` and `per_device` of the document that launch/compile.py writes. If the
      program does not fit, all of `per_device` but the parameters and the memory is None.

    Raises:
      CompileError: the compiler rejects the program for another reason than memory.
    """
    capacity = where.chip.memory / where.chip.devices
    per_device: dict[str, Any] = {
        "parameter_bytes": parameter_bytes(program.parameters),
        "peak_bytes": None,
        "capacity_bytes": int(capacity),
    }
    try:
        compiled = program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = exhausted_bytes(str(error))
        if needed is None:
            raise CompileError(_first_line(str(error))) from None
        per_device |= {"peak_bytes": needed} | dict.fromkeys(_NEEDS_A_PROGRAM)
        return {"fits": False, "per_device": per_device}
    peak = _peak_bytes(compiled.memory_analysis())
    per_device |= {"peak_bytes": int(peak)} | _counts(compiled, program, where, mesh)
    return {"fits": peak <= capacity, "per_device": per_device}


def _peak_bytes(memory: Any) -> int:
    """Peak memory by the compiler's own account."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(
        held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        getattr(memory, "peak_memory_in_bytes", 0),
    )


def _counts(
    compiled: jax.stages.Compiled, program: Program, where: Slice, mesh: Mesh
) -> dict[str, Any]:
    """The costs of the compiled program and their roofline."""
    memory: Any = compiled.memory_analysis()
    costs = hlo.program_costs(hlo.parse(compiled.as_text() or ""), program.unknown_trips)
    sums = hlo.totals(costs)
    coordinates = [tuple(device.coords[: len(where.sides)]) for device in mesh.devices.flat]
    bound = roofline.estimate(costs, where, coordinates)
    flops = sums.flops if program.flops is None else program.flops / mesh.size
    peak = where.chip.flops / where.chip.devices
    return {
        "flops": sums.flops,
        "bytes_accessed": sums.bytes,
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in sorted(sums.collectives.items())
        },
        "estimated_seconds": bound.seconds,
        "estimated_utilization": flops / (bound.seconds * peak) if bound.seconds else 0.0,
        "bound_by": bound.bound_by,
        "argument_bytes": int(memory.argument_size_in_bytes),
        "temporary_bytes": int(memory.temp_size_in_bytes),
        "model_flops": flops,
        "elementwise_flops": sums.elementwise,
        "compute_seconds": bound.compute_seconds,
        "memory_seconds": bound.memory_seconds,
        "interconnect_seconds": bound.interconnect_seconds,
        "exposed_interconnect_seconds": bound.exposed_seconds,
        "uncounted_kernels": sums.uncounted_kernels,
    }


def exhausted_bytes(message: str) -> int | None:
    """Bytes per device that a program would need, from the compiler's out-of-memory error.

    Returns:
      The bytes, or None if the error is not about memory.
    """
    found = re.search(
        r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"
        r"|required for HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM",
        message,
    )
    if found is None:
        return None
    number, unit = (found.group(i) or found.group(i + 2) for i in (1, 2))
    return int(float(number) * 1024 ** " KMGT".index(unit or " "))


def _first_line(text: str) -> str:
    lines = (line.strip() for line in text.splitlines())
    return next((line for line in lines if line), "no reason given")[:300]
