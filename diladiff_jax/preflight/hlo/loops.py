"""How often the loops of an HLO program run."""

from __future__ import annotations

import re
from collections.abc import Mapping

from diladiff_jax.preflight.hlo.program import Computation, Instruction, Module

_Affine = tuple[int | None, int]
"""An integer as (element of the computation's tuple parameter, offset); (None, n) is a constant."""


def unknown_loops(module: Module) -> list[str]:
    """Names of the loops whose trip count cannot be read from the program."""
    return [
        instruction.name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while" and trip_count(module, computation, instruction) is None
    ]


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs, or None if it may depend on data.

    This is the compiler's annotation if there is one. Otherwise it is derived from a condition that
    compares a counter with a constant.
    """
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
    where, name = condition, condition.root
    bound: dict[str, _Affine | None] = {}
    while where.instructions[name].opcode in ("fusion", "call"):
        outer = where.instructions[name]
        inner = _called(module, outer)
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
    """The name of element `index` of a tuple that this computation makes."""
    instruction = computation.instructions[name]
    return instruction.operands[index] if instruction.opcode == "tuple" else None


def _affine(
    module: Module,
    computation: Computation,
    name: str | None,
    bound: Mapping[str, _Affine | None],
) -> _Affine | None:
    """The integer that instruction `name` computes; None if it has another form than `_Affine`.

    `bound` holds the values of the computation's parameters that are known.
    """
    if name is None:
        return None
    if name in bound:
        return bound[name]
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        number = re.fullmatch(r"-?\d+", instruction.arguments)
        return (None, int(number.group())) if number else None
    if (
        opcode == "get-tuple-element"
        and computation.instructions[operands[0]].opcode == "parameter"
    ):
        index = re.search(r"index=(\d+)", instruction.attributes)
        return (int(index.group(1)), 0) if index else None
    if opcode in ("copy", "bitcast", "reshape", "convert"):
        return _affine(module, computation, operands[0], bound)
    if opcode == "add":
        a, b = (_affine(module, computation, operand, bound) for operand in operands)
        if a is None or b is None or (a[0] is not None and b[0] is not None):
            return None
        return (a[0] if a[0] is not None else b[0], a[1] + b[1])
    if opcode in ("fusion", "call"):
        inner = _called(module, instruction)
        given = {
            p: _affine(module, computation, operand, bound)
            for p, operand in zip(inner.parameters, operands, strict=True)
        }
        return _affine(module, inner, inner.root, given)
    return None


def _called(module: Module, instruction: Instruction) -> Computation:
    """The computation that a fusion or a call runs."""
    return module.computations[(instruction.called("calls") or instruction.called("to_apply"))[0]]
