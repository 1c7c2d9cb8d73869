"""The text of a compiled program's optimized HLO, read into computations and instructions.

What `hlo_costs` needs to count from is here: shapes with the memory they lie in, who reads what, how often loops run, and which
devices exchange. The compiler prints no other form that keeps all of these.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"\}(, \w+=.*)?\s*")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([^\s=]+) = ")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One array: its type, its dimensions, and the memory it lies in (0: main memory)."""

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
        """Its bytes where it lies in main memory, else 0."""
        return 0 if self.space else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. `shape` holds the arrays of its result, a tuple's in order; `arguments` the text between the parentheses."""

    name: str
    opcode: str
    shape: tuple[Buffer, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def called(self, attribute: str) -> list[str]:
        """Names of the computations under `attribute`: `calls`, `body`, `branch_computations` ..."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(found.group(1)) if found else []

    def numbers(self, attribute: str) -> list[int]:
        """`attribute={1,2}` as numbers; none if it is not there."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return [int(n) for n in found.group(1).split(",") if n] if found else []

    @property
    def op_name(self) -> str:
        """The source's name of what it computes, from its metadata."""
        return self._text(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return self._text(r'custom_call_target="([^"]*)"')

    @property
    def channel(self) -> str:
        """The number of an exchange; "" where it is none."""
        return self._text(r"\bchannel_id=(\d+)")

    def _text(self, pattern: str) -> str:
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order in which they run."""

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
        """Name -> who reads it, and as which operand."""
        found: dict[str, list[tuple[Instruction, int]]] = {}
        for instruction in self.instructions.values():
            for position, name in enumerate(instruction.operands):
                found.setdefault(name, []).append((instruction, position))
        return found


@dataclasses.dataclass
class Module:
    """A whole program, for so many devices."""

    computations: dict[str, Computation]
    entry: str
    devices: int = 1

    @functools.cached_property
    def started(self) -> frozenset[str]:
        """Channels of exchanges that a fusion starts and another ends; a TPU's program names them again in every fusion between."""
        starts = (
            c
            for c in self.computations.values()
            if c.instructions[c.root].target == "AsyncCollectiveStart"
        )
        return frozenset(i.channel for c in starts for i in c.instructions.values() if i.channel)


def bits(dtype: str) -> int:
    """Bits of one element of an HLO type: bf16 16, pred 8, s4 4, f8e4m3fn 8, token 0."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found.group(1)) if found else 0


def parse_shape(text: str) -> tuple[Buffer, ...]:
    """`f32[8,128]{1,0:T(8,128)S(1)}`, or a tuple of such, as its arrays in order."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip(" <=")) for d in dims.split(",") if d.strip())
        found.append(Buffer(dtype, sizes, int(space.group(1)) if space else 0))
    return tuple(found)


def parse(text: str) -> Module:
    """Reads the text of an optimized program.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root, current = None, "", "", None
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
            "the text holds no entry computation; it must be a compiled program's, as `compiled.as_text()` prints it"
        )
    cut = re.search(r"^HloModule .*\bnum_partitions=(\d+)", text)
    return Module(computations, entry, int(cut.group(1)) if cut else 1)


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, each with those that only go on with it: attributes of custom kernels are printed over several."""
    held = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(line) or _HEADER.match(line) or _END.fullmatch(line):
            yield held
            held = line
        else:
            held += " " + line
    yield held


def _instruction(name: str, text: str) -> Instruction:
    """`SHAPE OPCODE(ARGUMENTS), ATTRIBUTES`."""
    shape_end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    rest = text[shape_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    arguments = rest[len(opcode) + 1 : end - 1]
    return Instruction(
        name,
        opcode,
        parse_shape(text[:shape_end]),
        tuple(_NAME.findall(arguments)),
        arguments,
        rest[end:],
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first of the groups of devices that exchange among themselves; empty where none is named, which means all devices.

    Groups are written one by one, `{{0,1},{2,3}}`; as an iota reshaped, `[2,2]<=[4]`, and before that transposed, `[2,2]<=[2,2]T(1,0)`;
    or as axes of a mesh, `mesh['a'=2,'b'=4] {'b'}`, whose devices may be given as such an iota, `mesh[...], device_ids=([2,4]T(1,0)) {'b'}`,
    and of whose axes parts may be meant, `{'b':(2)2}` (within 2, so many).

    Raises:
      ValueError: another form.
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    if found is None or found.group(1).startswith("{}"):
        return ()
    text = found.group(1)
    if each := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in each.group(1).split(","))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota.group(3):
            ids = ids.transpose([int(n) for n in iota.group(3).split(",")])
        return tuple(int(n) for n in ids.reshape(shape)[0])
    if axes := re.match(
        r"mesh\[((?:'[^']+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}",
        text,
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes.group(1))}
        dims = (
            [int(n) for n in axes.group(2).split(",")]
            if axes.group(2)
            else [math.prod(sizes.values())]
        )
        ids = np.arange(math.prod(dims)).reshape(dims)
        if axes.group(3):
            ids = ids.transpose([int(n) for n in axes.group(3).split(",")])
        places = np.zeros(1, np.int64)
        for name, _, before, part in re.findall(r"'([^']+)'(:\((\d+)\)(\d+))?", axes.group(4)):
            count = int(part or sizes[name])
            stride = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :]) * (
                sizes[name] // (int(before or 1) * count)
            )
            places = (places[:, None] + stride * np.arange(count)[None, :]).reshape(-1)
        return tuple(int(n) for n in ids.reshape(-1)[places])
    raise ValueError(f"devices of a collective are written in a way that is not known: {text[:80]}")


# Loops.


def unknown_loops(module: Module) -> list[str]:
    """Names of the loops whose number of trips the program does not tell."""
    return [
        instruction.name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while" and trip_count(module, computation, instruction) is None
    ]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs: as the compiler noted it, else from its condition, where that compares a counter with a constant."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known.group(1))
    condition, body = (module.computations[loop.called(name)[0]] for name in ("condition", "body"))
    compared = _comparison(module, condition)
    if compared is None:
        return None
    index, bound, direction = compared
    start = _affine(module, computation, _element(computation, loop.operands[0], index), {})
    step = _affine(module, body, _element(body, body.root, index), {})
    if start is None or start[0] is not None or step is None or step[0] != index or step[1] <= 0:
        return None
    last = bound if direction == "LE" else bound - 1
    return max(0, (last - start[1]) // step[1] + 1) if direction in ("LT", "LE") else None


def _comparison(module: Module, condition: Computation) -> tuple[int, int, str] | None:
    """(element of the loop's state, constant, direction) of a condition `element < constant`."""
    where, name, bound = condition, condition.root, {}
    while where.instructions[name].opcode in ("fusion", "call"):
        outer = where.instructions[name]
        inner = module.computations[(outer.called("calls") or outer.called("to_apply"))[0]]
        bound = {
            p: _affine(module, where, operand, bound)
            for p, operand in zip(inner.parameters, outer.operands, strict=True)
        }
        where, name = inner, inner.root
    root = where.instructions[name]
    direction = re.search(r"direction=(\w+)", root.attributes)
    if root.opcode != "compare" or direction is None:
        return None
    left, right = (_affine(module, where, operand, bound) for operand in root.operands)
    if left is None or right is None or left[0] is None or right[0] is not None:
        return None
    return left[0], right[1] - left[1], direction.group(1)


def _element(computation: Computation, name: str, index: int) -> str | None:
    """The name of element `index` of a tuple made here."""
    instruction = computation.instructions[name]
    return instruction.operands[index] if instruction.opcode == "tuple" else None


def _affine(
    module: Module,
    computation: Computation,
    name: str | None,
    bound: Mapping[str, tuple[int | None, int] | None],
) -> tuple[int | None, int] | None:
    """A whole number as (element of the computation's tuple parameter or None, offset); None where it is neither."""
    if name is None:
        return None
    if name in bound:
        return bound[name]
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return (
            (None, int(instruction.arguments))
            if re.fullmatch(r"-?\d+", instruction.arguments)
            else None
        )
    if (
        instruction.opcode == "get-tuple-element"
        and computation.instructions[instruction.operands[0]].opcode == "parameter"
    ):
        index = re.search(r"index=(\d+)", instruction.attributes)
        return (int(index.group(1)), 0) if index else None
    if instruction.opcode in ("copy", "bitcast", "reshape", "convert"):
        return _affine(module, computation, instruction.operands[0], bound)
    if instruction.opcode == "add":
        a, b = (_affine(module, computation, operand, bound) for operand in instruction.operands)
        if a is None or b is None or (a[0] is not None and b[0] is not None):
            return None
        return (a[0] if a[0] is not None else b[0], a[1] + b[1])
    if instruction.opcode in ("fusion", "call"):
        inner = module.computations[
            (instruction.called("calls") or instruction.called("to_apply"))[0]
        ]
        given = {
            p: _affine(module, computation, operand, bound)
            for p, operand in zip(inner.parameters, instruction.operands, strict=True)
        }
        return _affine(module, inner, inner.root, given)
    return None
