"""Bytes that HLO instructions read from and write to main memory.

Buffers in another memory space, such as a TPU's VMEM, do not count.
"""

from __future__ import annotations

from collections.abc import Sequence

from diladiff_jax.preflight.hlo.collectives import KINDS
from diladiff_jax.preflight.hlo.program import Buffer, Computation, Instruction, Module


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes to and from main memory of an instruction that runs on its own."""
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "iota":
        return float(sum(b.main_bytes for b in instruction.shape))
    if opcode in KINDS or opcode.removesuffix("-start") in KINDS:
        return float(sum(computation.main_bytes(name) for name in operands) * 2)
    if opcode == "copy-start":
        return float(instruction.shape[0].main_bytes + computation.main_bytes(operands[0]))
    if opcode in ("slice-start", "dynamic-slice-start"):
        result = instruction.shape[1]
        read = result.bytes if computation.main_bytes(operands[0]) else 0
        return float(result.main_bytes + read)
    if opcode == "fusion":
        return float(_fusion(module, computation, instruction))
    return float(
        sum(_operand_read(computation, instruction, p) for p in range(len(operands)))
        + _result_written(computation, instruction, instruction.shape)
    )


def _fusion(module: Module, computation: Computation, instruction: Instruction) -> int:
    inner, read = module.fused(instruction), 0
    for operand, parameter in zip(instruction.operands, inner.parameters, strict=False):
        outer = computation.buffers(operand)
        if any(b.space for b in outer):
            continue  # already on the chip
        read += _read(module, inner, parameter, sum(b.bytes for b in outer))
    return read + _written(module, inner, inner.root, instruction.shape)


def _operand_read(computation: Computation, instruction: Instruction, position: int) -> int:
    """Bytes that an instruction outside of a fusion reads of one operand."""
    buffers = computation.buffers(instruction.operands[position])
    if any(b.space for b in buffers):
        return 0
    return _touched(instruction, position, sum(b.bytes for b in buffers))


def _touched(instruction: Instruction, position: int, size: int) -> int:
    """Bytes that an instruction touches of an operand of `size` bytes.

    A slice or gather reads what it returns; an update in place does not read its target.
    """
    if instruction.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        return min(size, instruction.result_bytes)
    if instruction.opcode in ("dynamic-update-slice", "scatter") and position == 0:
        return 0
    return size


def _read(module: Module, computation: Computation, name: str, size: int) -> int:
    """Bytes that a fusion reads of its parameter `name`, which has `size` bytes."""
    total = 0
    for user, position in computation.users.get(name, []):
        view = user.opcode in ("bitcast", "reshape", "copy", "convert")
        if view and user.name != computation.root:
            # A view or a conversion reads what its users read, in the parameter's element size.
            ratio = size / max(1, user.result_bytes)
            total += int(ratio * _read(module, computation, user.name, user.result_bytes))
        elif user.opcode == "fusion":
            inner = module.fused(user)
            total += _read(module, inner, inner.parameters[position], size)
        else:
            total += _touched(user, position, size)
        if total >= size:
            return size
    return total


def _written(module: Module, computation: Computation, root: str, shape: Sequence[Buffer]) -> int:
    """Bytes that a fusion with this root writes into its results `shape`.

    An update in place writes only the update.
    """
    instruction = computation.instructions[root]
    operands = instruction.operands
    if instruction.opcode == "tuple":
        if len(operands) != len(shape):
            return sum(b.main_bytes for b in shape)
        return sum(
            _written(module, computation, name, [buffer])
            for name, buffer in zip(operands, shape, strict=True)
        )
    if (
        instruction.opcode in ("bitcast", "copy", "convert", "reshape")
        and len(operands) == 1
        and operands[0] in computation.instructions
    ):
        before = computation.instructions[operands[0]]
        if before.opcode in ("dynamic-update-slice", "scatter", "bitcast"):
            return _written(module, computation, before.name, shape)
    if instruction.opcode == "fusion":
        inner = module.fused(instruction)
        return _written(module, inner, inner.root, shape)
    return _result_written(computation, instruction, shape)


def _result_written(
    computation: Computation, instruction: Instruction, shape: Sequence[Buffer]
) -> int:
    """Bytes that one instruction writes into its results `shape`."""
    if any(b.space for b in shape):
        return 0
    if instruction.opcode == "dynamic-update-slice":
        return sum(b.bytes for b in computation.buffers(instruction.operands[1]))
    if instruction.opcode == "scatter":
        return sum(b.bytes for b in computation.buffers(instruction.operands[-1]))
    return sum(b.bytes for b in shape)
