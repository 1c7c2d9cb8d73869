"""Reads the text of a compiled program's optimized HLO.

The text is the only form the compiler prints that has everything the counts need: shapes with
their memory spaces, which instruction reads which, trip counts, and groups of devices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from diladiff_jax.preflight.hlo.program import NAME, Buffer, Computation, Instruction, Module

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(, \w+=.*)?\s*")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([^\s=]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_PARENTHESIS = re.compile(r"[()]")


def parse(text: str) -> Module:
    """Reads the text of an optimized program, as `compiled.as_text()` prints it.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = None, "", ""
    current: dict[str, Instruction] | None = None
    for line in _logical_lines(text):
        if current is None:
            header = _HEADER.match(line)
            if header:
                name, current = header.group(2), {}
                entry = name if header.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, current, root)
            current = None
        else:
            head = _INSTRUCTION.match(line)
            if head:
                instruction = _instruction(head.group(2), line[head.end() :])
                current[instruction.name] = instruction
                root = instruction.name if head.group(1) else root
    if entry is None:
        raise ValueError(
            "the HLO text has no entry computation; expected the text of a compiled program, as "
            "`compiled.as_text()` prints it"
        )
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def parse_shape(text: str) -> tuple[Buffer, ...]:
    """The arrays of `f32[8,128]{1,0:T(8,128)S(1)}`, or of a tuple of such shapes, in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip(" <=")) for d in dims.split(",") if d.strip())
        found.append(Buffer(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


def _logical_lines(text: str) -> Iterator[str]:
    """Joins continuation lines: the attributes of custom kernels are printed over several."""
    held = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _HEADER.match(line) or _END.fullmatch(line):
            yield held
            held = line
        else:
            held += " " + line
    yield held


def _instruction(name: str, text: str) -> Instruction:
    """Reads `SHAPE OPCODE(ARGUMENTS), ATTRIBUTES`."""
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    rest = text[shape_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : end - 1]
    return Instruction(
        name,
        opcode,
        parse_shape(text[:shape_end]),
        tuple(NAME.findall(arguments)),
        arguments,
        rest[end:],
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _PARENTHESIS.finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)
