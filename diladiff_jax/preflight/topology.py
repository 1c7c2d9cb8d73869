"""TPU slices: boxes of chips that are linked to their neighbours along the axes of a torus."""

from __future__ import annotations

import dataclasses
import math
import re

from diladiff_jax.parallel.chips import CHIPS, Chip

Coordinates = tuple[int, ...]


class TopologyError(ValueError):
    """A slice that does not exist; the message is one line that names what would be valid."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A box of chips: `v5e:4x8` is `Slice("v5e", (4, 8))`."""

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
        """Whether the last chip along an axis is linked to the first.

        With two axes this is so along 16 chips, with three if the slice consists of complete
        4 x 4 x 4 cubes.
        """
        if self.chip.axes == 2:
            return self.sides[axis] == 16
        return all(side % 4 == 0 for side in self.sides)

    def distance(self, a: Coordinates, b: Coordinates) -> int:
        """Number of links from chip `a` to chip `b`."""
        steps = 0
        for axis, side in enumerate(self.sides):
            apart = abs(a[axis] - b[axis])
            steps += min(apart, side - apart) if self.closed(axis) else apart
        return steps


def parse_topology(text: str) -> Slice:
    """Reads a slice such as `v5e:4x4` or `v5p:4x4x8`.

    Raises:
      TopologyError: the generation is unknown, or has no slice with these sides.
    """
    generation, _, box = text.partition(":")
    if generation not in CHIPS:
        raise TopologyError(
            f"topology: got {text!r}, expected one of {', '.join(CHIPS)} and the sides of a "
            "slice, as in v5e:4x4"
        )
    chip = CHIPS[generation]
    example = "4x4" if chip.axes == 2 else "4x4x4"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", box) or box.count("x") != chip.axes - 1:
        raise TopologyError(
            f"topology: got {text!r}, expected {chip.axes} sides separated by x, as in "
            f"{generation}:{example}"
        )
    found = Slice(generation, tuple(int(side) for side in box.split("x")))
    if found.chips > chip.max_chips:
        raise TopologyError(
            f"topology: got {text!r} with {found.chips} chips, expected at most {chip.max_chips} "
            f"in one slice of {generation}"
        )
    return found


def slice_of(generation: str, chips: int) -> Slice:
    """The most cube-like slice with this number of chips and sides that are powers of two.

    Raises:
      TopologyError: the generation is unknown, the number is not a power of two, or it exceeds the
        largest slice.
    """
    if generation not in CHIPS:
        raise TopologyError(f"generation: got {generation!r}, expected one of {', '.join(CHIPS)}")
    exponent = chips.bit_length() - 1
    if chips < 1 or chips != 1 << exponent:
        raise TopologyError(f"number of chips: got {chips}, expected a power of two")
    axes = CHIPS[generation].axes
    sides = [1 << (exponent + axis) // axes for axis in range(axes)]
    return parse_topology(f"{generation}:{'x'.join(map(str, sides))}")
