"""A roofline of a compiled program on a TPU slice: the counts of `hlo_costs` over the rates that the chips' maker publishes.

An instruction takes as long as its products or its traffic to main memory, whichever is more; instructions run one after the
other; an exchange that other work overlaps costs only what exceeds that work, any other its full time. That is an estimate and
no bound: vector arithmetic, the padding of small shapes and the time between instructions are not in it, while what is fetched from
memory ahead of its use, beside products, is counted after them, and of a conditional the dearest branch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from diladiff_jax.preflight.hlo_costs import Collective, Cost

Coordinates = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one chip.

    Attributes:
      flops: bfloat16 products, FLOP/s.
      memory: bytes of main memory (HBM).
      bandwidth: of that memory, bytes/s.
      link: one direction of one of its links to a neighbour, bytes/s (the published bandwidth both ways over all links, halved,
        over two links an axis).
      axes: of the torus that a slice is a part of, 2 or 3.
      pod: most chips that one slice can have.
      devices: JAX devices on a chip; they share all of the above evenly.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    axes: int
    pod: int
    devices: int = 1


GIB = 2**30

CHIPS: dict[str, Chip] = {
    #               FLOP/s    memory     bytes/s   link    axes  pod
    "v4": Chip(275e12, 32 * GIB, 1.200e12, 50e9, 3, 4096),
    "v5e": Chip(197e12, 16 * GIB, 0.819e12, 50e9, 2, 256),
    "v5p": Chip(459e12, 95 * GIB, 2.765e12, 100e9, 3, 8960),
    "v6e": Chip(918e12, 32 * GIB, 1.638e12, 100e9, 2, 256),
    "tpu7x": Chip(2307e12, 192 * GIB, 7.380e12, 100e9, 3, 9216, devices=2),
}
"""By generation, from the maker's documentation of each (system architecture), November 2026."""

HOP = 1e-6
"""Seconds to a neighbouring chip: not published, of the order that is commonly measured. It matters for small exchanges on large slices alone."""


class TopologyError(ValueError):
    """A slice that cannot be: one line with what was given and what would be valid."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one generation in a box of the given sides, `v5e:4x8`."""

    generation: str
    sides: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.sides))}"

    def closed(self, axis: int) -> bool:
        """Whether the last chip along an axis is linked to the first: along 16 chips in two dimensions, in whole cubes of 4 x 4 x 4 in three."""
        if self.chip.axes == 2:
            return self.sides[axis] == 16
        return all(side % 4 == 0 for side in self.sides)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one call of the program, on the busiest of three and in all; `exposed_seconds` is what exchanges add to the work."""

    seconds: float
    compute_seconds: float
    memory_seconds: float
    interconnect_seconds: float
    exposed_seconds: float

    @property
    def bound_by(self) -> str:
        """What takes longest: compute, memory or interconnect."""
        parts = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "interconnect": self.interconnect_seconds,
        }
        return max(parts, key=lambda name: parts[name])


def parse_topology(text: str) -> Slice:
    """`v5e:4x4`, `v5p:4x4x8` ...

    Raises:
      TopologyError: an unknown generation, or sides that it cannot have.
    """
    generation, _, box = text.partition(":")
    if generation not in CHIPS:
        raise TopologyError(
            f"topology {text!r} names no known generation; it must be one of {', '.join(CHIPS)}, as in v5e:4x4"
        )
    chip = CHIPS[generation]
    example = "4x4" if chip.axes == 2 else "4x4x4"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", box) or box.count("x") != chip.axes - 1:
        raise TopologyError(
            f"topology {text!r} must have {chip.axes} whole sides with an x between, as in {generation}:{example}"
        )
    found = Slice(generation, tuple(int(side) for side in box.split("x")))
    if found.chips > chip.pod:
        raise TopologyError(
            f"topology {text!r} has {found.chips} chips; one slice of {generation} has at most {chip.pod}"
        )
    return found


def slice_of(generation: str, chips: int) -> Slice:
    """The box of so many chips that is most like a cube, sides powers of two.

    Raises:
      TopologyError: no power of two, or more than a slice can have.
    """
    if generation not in CHIPS:
        raise TopologyError(
            f"generation {generation!r} is unknown; it must be one of {', '.join(CHIPS)}"
        )
    exponent = chips.bit_length() - 1
    if chips < 1 or chips != 1 << exponent:
        raise TopologyError(f"{chips} chips make no box; give a power of two")
    axes = CHIPS[generation].axes
    sides = [1 << (exponent + axis) // axes for axis in range(axes)]
    return parse_topology(f"{generation}:{'x'.join(map(str, sides))}")


def estimate(costs: Sequence[Cost], where: Slice, coordinates: Sequence[Coordinates]) -> Estimate:
    """The roofline of a program.

    Args:
      costs: of `hlo_costs.costs`, for one device.
      coordinates: of every device of the mesh, in its order; the first of a slice's axes first.
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
    """What each device has to send at least: of an array of n parts, n - 1 for a gather or a reduce-scatter, twice that for a sum."""
    if collective.kind == "collective-permute":
        return float(collective.bytes)
    n = len(collective.group)
    share = (n - 1) / n * collective.bytes
    return 2.0 * share if collective.kind == "all-reduce" else share


def collective_seconds(
    collective: Collective, where: Slice, coordinates: Sequence[Coordinates]
) -> float:
    """Seconds of one exchange, in rings along the axes of the torus that its devices are spread over.

    A closed axis has two rings, one each way, an open one is as fast as one. Devices that lie apart share the links between them
    with those that lie there. A set of devices that is no box is given a single link.
    """
    link = where.chip.link / where.chip.devices
    if collective.kind == "collective-permute":
        hops = [_distance(coordinates[a], coordinates[b], where) for a, b in collective.pairs] or [
            0
        ]
        return (
            collective.bytes * (sum(hops) / len(hops)) / link + max(hops) * HOP
        )  # a link carries all that passes over it
    points = [coordinates[i] for i in collective.group]
    places = [sorted({point[axis] for point in points}) for axis in range(len(where.sides))]
    spread = [axis for axis, at in enumerate(places) if len(at) > 1]
    if not spread:
        return 0.0  # on one chip
    box = math.prod(len(at) for at in places) * (len(points) // len(set(points))) == len(points)
    links = hops = 0.0
    for axis in spread:
        stride = min(b - a for a, b in zip(places[axis], places[axis][1:], strict=False))
        around = where.closed(axis) and len(places[axis]) * stride == where.sides[axis]
        links += (2 if around else 1) / stride
        hops += where.sides[axis] / 2 if around else places[axis][-1] - places[axis][0]
    links = links if box else 1.0
    if collective.kind in ("all-to-all", "ragged-all-to-all"):
        # Half of everything crosses the middle of the longest axis, through two cuts of it where that is closed.
        axis = max(spread, key=lambda a: len(places[a]))
        crossing = collective.bytes * len(places[axis]) / (8 if where.closed(axis) else 4)
        return crossing / link + hops * HOP
    rounds = 2 if collective.kind == "all-reduce" else 1
    return wire_bytes(collective) / (links * link) + rounds * hops * HOP


def _distance(a: Coordinates, b: Coordinates, where: Slice) -> int:
    """Chips to pass from one place to another."""
    steps = 0
    for axis, side in enumerate(where.sides):
        apart = abs(a[axis] - b[axis])
        steps += min(apart, side - apart) if where.closed(axis) else apart
    return steps
