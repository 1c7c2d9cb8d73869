"""The parts of an HLO program: modules, computations, instructions and the arrays they produce."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array.

    Attributes:
      dtype: its HLO type, such as "bf16".
      dims: its dimensions.
      space: the memory space that holds it; 0 is main memory, others are on the chip (VMEM).
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.elements * bits(self.dtype) // 8)

    @property
    def main_bytes(self) -> int:
        """Its bytes in main memory: 0 if another memory space holds it."""
        return 0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, unique within the computation.
      opcode: what it does, such as "fusion" or "all-gather".
      shape: the arrays of its result; several if the result is a tuple.
      operands: names of the instructions that it reads.
      arguments: the text between the parentheses.
      attributes: the text after the parentheses.
    """

    name: str
    opcode: str
    shape: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under `calls`, `body`, `branch_computations` and so on."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return NAME.findall(found.group(1)) if found else []

    def numbers(self, attribute: str) -> list[int]:
        """The numbers of `attribute={1,2}`; empty if the attribute is missing."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found.group(1).split(",") if n] if found else []

    @property
    def result_bytes(self) -> int:
        return sum(buffer.bytes for buffer in self.shape)

    @property
    def op_name(self) -> str:
        """The JAX name of the operation, from the metadata; "" if there is none."""
        return self._text(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return self._text(r'custom_call_target="([^"]*)"')

    @property
    def channel(self) -> str:
        """The channel number of a collective; "" for other instructions."""
        return self._text(r"\bchannel_id=(\d+)")

    def _text(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order in which they run; `root` names the one that returns."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> list[str]:
        """Names of the parameters, by number."""
        found = {
            int(i.arguments): name
            for name, i in self.instructions.items()
            if i.opcode == "parameter"
        }
        return [found[n] for n in sorted(found)]

    @functools.cached_property
    def users(self) -> dict[str, list[tuple[Instruction, int]]]:
        """Name -> the instructions that read it, each with the position of that operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, position))
        return found

    def buffers(self, name: str) -> tuple[Buffer, ...]:
        """The arrays that instruction `name` produces."""
        return self.instructions[name].shape

    def main_bytes(self, name: str) -> int:
        """Bytes in main memory of what instruction `name` produces."""
        return sum(buffer.main_bytes for buffer in self.buffers(name))


@dataclasses.dataclass
class Module:
    """A complete program, compiled for `devices` devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int = 1

    def fused(self, instruction: Instruction) -> Computation:
        """The computation inside a fusion."""
        return self.computations[instruction.called("calls")[0]]

    @functools.cached_property
    def started(self) -> frozenset[str]:
        """Channels of the collectives that one fusion starts and another one ends.

        A TPU program repeats such a collective in every fusion between the two.
        """
        starts = (
            c
            for c in self.computations.values()
            if c.instructions[c.root].target == "AsyncCollectiveStart"
        )
        return frozenset(i.channel for c in starts for i in c.instructions.values() if i.channel)


def bits(dtype: str) -> int:
    """Bits per element of an HLO type: bf16 16, pred 8, s4 4, f8e4m3fn 8, token 0."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0
