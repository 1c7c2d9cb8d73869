"""Costs counted from the text of a compiled program's optimized HLO.

    module = hlo.parse(compiled.as_text())
    sums = hlo.totals(hlo.program_costs(module))

The compiler's own `cost_analysis` counts the body of a loop once and does not see inside custom
kernels, so a step that scans over its layers looks far too cheap there. Here each instruction is
multiplied by the number of times that it runs, and the kernels of splash attention are counted.
"""

from diladiff_jax.preflight.hlo.collectives import Collective, replica_group
from diladiff_jax.preflight.hlo.costs import Cost, Totals, program_costs, totals
from diladiff_jax.preflight.hlo.loops import trip_count, unknown_loops
from diladiff_jax.preflight.hlo.parser import parse, parse_shape
from diladiff_jax.preflight.hlo.program import Buffer, Computation, Instruction, Module, bits

__all__ = [
    "Buffer",
    "Collective",
    "Computation",
    "Cost",
    "Instruction",
    "Module",
    "Totals",
    "bits",
    "parse",
    "parse_shape",
    "program_costs",
    "replica_group",
    "totals",
    "trip_count",
    "unknown_loops",
]
