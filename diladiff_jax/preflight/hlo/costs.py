"""Costs of a compiled program: arithmetic, bytes and collectives of each instruction that runs.

Every instruction that runs on its own becomes one `Cost` with the number of times that it runs. A
fusion is one such instruction, whatever it contains. Of a conditional, the most expensive branch
counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from diladiff_jax.preflight.hlo.arithmetic import arithmetic
from diladiff_jax.preflight.hlo.collectives import Collective, find_collective
from diladiff_jax.preflight.hlo.kernels import kernel_flops, uncounted_kernel
from diladiff_jax.preflight.hlo.loops import trip_count
from diladiff_jax.preflight.hlo.memory import moved_bytes
from diladiff_jax.preflight.hlo.program import Computation, Instruction, Module

_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "domain",
        "async-update",
        "async-done",
        "copy-done",
        "send",
        "recv",
        "send-done",
        "recv-done",
    }
)
"""Opcodes that move nothing: names, views, and the ends of operations counted at their start."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction costs each time it runs, and how often it runs.

    Attributes:
      instruction: its name.
      times: how often it runs in one call of the program.
      flops: FLOPs of matrix products and of the kernels that are known.
      passes: the same, times the passes over a bfloat16 matrix unit: six for float32 products at
        `highest` precision, three at `high`, one otherwise.
      elementwise: one per element of every elementwise result and of every input to a reduction.
      transcendentals: elements of exponentials, logarithms, roots and the like.
      bytes: to and from main memory.
      collective: the exchange that it makes, if any.
      uncounted_kernel: the name of a custom kernel whose work is missing from these figures.
    """

    instruction: str
    times: float
    flops: float = 0.0
    passes: float = 0.0
    elementwise: float = 0.0
    transcendentals: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None
    uncounted_kernel: str | None = None


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a program.

    Attributes:
      flops, passes, elementwise, transcendentals, bytes: as in `Cost`.
      collectives: kind -> (number of runs, bytes of all runs).
      uncounted_kernels: name -> number of runs.
    """

    flops: float
    passes: float
    elementwise: float
    transcendentals: float
    bytes: float
    collectives: dict[str, tuple[float, float]]
    uncounted_kernels: dict[str, float]


def program_costs(module: Module, unknown_trips: Sequence[float] = ()) -> list[Cost]:
    """Costs of every instruction that one call of the program runs, on one device.

    Args:
      module: the program.
      unknown_trips: trip counts of loops whose number of iterations is not in the program because
        it depends on data: first for the outermost such loop, then for such a loop inside it, and
        so on. Missing entries count as 1.
    """
    return list(_walk(module, module.entry, 1.0, tuple(unknown_trips)))


def totals(costs: Sequence[Cost]) -> Totals:
    """Sums of `program_costs`, each cost times the number of its runs."""

    def total(field: str) -> float:
        return float(sum(cost.times * getattr(cost, field) for cost in costs))

    collectives: dict[str, tuple[float, float]] = {}
    uncounted: dict[str, float] = {}
    for cost in costs:
        if cost.collective is not None:
            kind, size = cost.collective.kind, cost.times * cost.collective.bytes
            runs, before = collectives.get(kind, (0.0, 0.0))
            collectives[kind] = (runs + cost.times, before + size)
        if cost.uncounted_kernel is not None:
            name = cost.uncounted_kernel
            uncounted[name] = uncounted.get(name, 0.0) + cost.times
    return Totals(
        flops=total("flops"),
        passes=total("passes"),
        elementwise=total("elementwise"),
        transcendentals=total("transcendentals"),
        bytes=total("bytes"),
        collectives=collectives,
        uncounted_kernels=uncounted,
    )


def _walk(
    module: Module, name: str, times: float, unknown_trips: tuple[float, ...]
) -> Iterator[Cost]:
    """Costs of a computation that runs `times` times."""
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            trips, inner = trip_count(module, computation, instruction), unknown_trips
            if trips is None:
                trips, inner = (unknown_trips[0], unknown_trips[1:]) if unknown_trips else (1.0, ())
            for called in (*instruction.called("condition"), *instruction.called("body")):
                yield from _walk(module, called, times * trips, inner)
        elif opcode == "conditional":
            branches = (
                list(_walk(module, b, times, unknown_trips)) for b in _branches(instruction)
            )
            yield from max(branches, key=_expense)
        elif opcode == "call":
            for called in instruction.called("to_apply"):
                yield from _walk(module, called, times, unknown_trips)
        elif opcode == "async-start":
            for called in instruction.called("calls"):
                yield from map(_overlapped, _walk(module, called, times, unknown_trips))
        elif opcode not in _FREE and not opcode.endswith("-done"):
            yield _cost(module, computation, instruction, times)


def _branches(instruction: Instruction) -> list[str]:
    """Names of the computations that a conditional chooses from."""
    return instruction.called("branch_computations") or instruction.called(
        "true_computation"
    ) + instruction.called("false_computation")


def _expense(costs: Sequence[Cost]) -> tuple[float, float]:
    sums = totals(costs)
    return sums.flops, sums.bytes


def _overlapped(cost: Cost) -> Cost:
    """The same cost, its collective marked as running beside other work."""
    if cost.collective is None:
        return cost
    return dataclasses.replace(
        cost, collective=dataclasses.replace(cost.collective, overlapped=True)
    )


def _cost(module: Module, computation: Computation, instruction: Instruction, times: float) -> Cost:
    """The cost of one instruction that runs on its own."""
    work, uncounted = arithmetic(module, computation, instruction), None
    if instruction.opcode == "custom-call":
        flops = kernel_flops(computation, instruction)
        if flops is None:
            uncounted = uncounted_kernel(instruction)
        else:
            work = dataclasses.replace(work, flops=flops, passes=flops)
    return Cost(
        instruction.name,
        times,
        **dataclasses.asdict(work),
        bytes=moved_bytes(module, computation, instruction),
        collective=find_collective(module, computation, instruction),
        uncounted_kernel=uncounted,
    )
