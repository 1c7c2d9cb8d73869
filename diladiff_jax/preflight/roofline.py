"""A roofline of a compiled program on a TPU slice: counted costs over published rates.

An instruction takes as long as its products or its traffic to main memory, whichever is longer.
Instructions run one after the other. A collective that overlaps other work adds only what exceeds
that work; any other adds its full time.

This is an estimate, not a bound. It leaves out vector arithmetic, padding of small shapes and the
time between instructions. On the other hand it counts memory traffic that is prefetched during
other instructions as if it were not, and the most expensive branch of every conditional.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from diladiff_jax.preflight.hlo import Collective, Cost
from diladiff_jax.preflight.topology import Coordinates, Slice

HOP = 1e-6
"""Latency of one link in seconds.

This is not published; it is the order of magnitude that is commonly measured. It matters only for
small collectives on large slices.
"""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Estimated seconds of one call of a program.

    Attributes:
      seconds: the whole call.
      compute_seconds, memory_seconds, interconnect_seconds: each resource alone.
      exposed_seconds: what collectives add to the rest, included in `seconds`.
    """

    seconds: float
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    exposed_seconds: float

    @property
    def bound_by(self) -> str:
        """The resource that takes longest: "compute", "memory" or "interconnect"."""
        parts = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(parts, key=lambda name: parts[name])


def estimate(costs: Sequence[Cost], where: Slice, coordinates: Sequence[Coordinates]) -> Estimate:
    """The roofline of a program.

    Args:
      costs: from `hlo.program_costs`, for one device.
      where: the slice that the program runs on.
      coordinates: of every device, in the mesh's order; one number per axis of the slice.
    """
    chip = where.chip
    flops, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    work = compute = memory = overlapped = alone = 0.0
    for cost in costs:
        computing, moving = cost.times * cost.passes / flops, cost.times * cost.bytes / bandwidth
        compute, memory, work = compute + computing, memory + moving, work + max(computing, moving)
        if cost.collective is not None:
            exchanging = cost.times * collective_seconds(cost.collective, where, coordinates)
            if cost.collective.overlapped:
                overlapped += exchanging
            else:
                alone += exchanging
    exposed = alone + max(0.0, overlapped - work)
    return Estimate(work + exposed, compute, memory, overlapped + alone, exposed)


def wire_bytes(collective: Collective) -> float:
    """The least that each device has to send, in bytes.

    Of an array of n parts this is n - 1 parts for a gather or a reduce-scatter, and twice that for
    an all-reduce.
    """
    if collective.kind == "collective-permute":
        return float(collective.bytes)
    n = len(collective.group)
    share = (n - 1) / n * collective.bytes
    return 2.0 * share if collective.kind == "all-reduce" else share


def collective_seconds(
    collective: Collective, where: Slice, coordinates: Sequence[Coordinates]
) -> float:
    """Seconds of one collective, in rings along the torus axes over which its group extends.

    A closed axis has two rings, one in each direction; an open axis is as fast as one ring. If a
    group's devices are not adjacent, they share the links between them with the devices in between.
    A group that is not a box counts as having a single link.
    """
    link = where.chip.link / where.chip.devices
    if collective.kind == "collective-permute":
        passed = [where.distance(coordinates[a], coordinates[b]) for a, b in collective.pairs]
        passed = passed or [0]
        # A link carries everything that passes over it.
        return collective.bytes * (sum(passed) / len(passed)) / link + max(passed) * HOP
    points = [coordinates[i] for i in collective.group]
    places = [sorted({point[axis] for point in points}) for axis in range(len(where.sides))]
    extended = [axis for axis, at in enumerate(places) if len(at) > 1]
    if not extended:
        return 0.0  # all on one chip
    is_box = math.prod(len(at) for at in places) * (len(points) // len(set(points))) == len(points)
    links = hops = 0.0
    for axis in extended:
        stride = min(b - a for a, b in zip(places[axis], places[axis][1:], strict=False))
        around = where.closed(axis) and len(places[axis]) * stride == where.sides[axis]
        links += (2 if around else 1) / stride
        hops += where.sides[axis] / 2 if around else places[axis][-1] - places[axis][0]
    latency = hops * HOP
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        # Half of everything crosses the middle of the longest axis; a closed axis has two cuts.
        axis = max(extended, key=lambda a: len(places[a]))
        crossing = collective.bytes * len(places[axis]) / (8 if where.closed(axis) else 4)
        return crossing / link + latency
    rounds = 2 if collective.kind == "all-reduce" else 1
    links = links if is_box else 1.0
    return wire_bytes(collective) / (links * link) + rounds * latency
