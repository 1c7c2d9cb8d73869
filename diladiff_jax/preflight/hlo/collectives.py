"""Collectives of an HLO program: what is exchanged, and among which devices."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from diladiff_jax.preflight.hlo.program import Computation, Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Opcodes of the collectives."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `KINDS`.
      bytes: size of the complete array: the result of an all-gather, or one device's input of any
        other kind.
      group: one set of devices that exchange among themselves, as positions in the mesh. All groups
        of a collective have the same form. Empty for a permutation.
      pairs: all (source, target) of a permutation.
      overlapped: whether other work runs at the same time.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    overlapped: bool = False


def find_collective(
    module: Module, computation: Computation, instruction: Instruction
) -> Collective | None:
    """The collective that an instruction is, starts or contains; None if there is none."""
    if instruction.opcode == "fusion":
        return _inside_fusion(module, instruction)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    overlapped = kind != instruction.opcode
    permutes = kind == "collective-permute"
    size = sum(
        b.bytes
        for name in (instruction.operands[:1] if permutes else instruction.operands)
        for b in computation.buffers(name)
    )
    if permutes:
        return Collective(kind, size, (), _pairs(instruction.attributes), overlapped)
    group = replica_group(instruction.attributes) or tuple(range(module.devices))
    if kind == "all-gather":
        size *= len(group)
    return Collective(kind, size, group, (), overlapped)


def _inside_fusion(module: Module, instruction: Instruction) -> Collective | None:
    inner = module.fused(instruction)
    starts = inner.instructions[inner.root].target == "AsyncCollectiveStart"
    found = [
        c
        for i in inner.instructions.values()
        if (c := find_collective(module, inner, i)) is not None
        and (starts or i.channel not in module.started)
    ]
    if not found:
        return None
    first, opcodes = found[0], {i.opcode for i in inner.instructions.values()}
    # A sum of which each device keeps its slice is written like this, and runs as a reduce-scatter.
    scattered = (
        first.kind == "all-reduce"
        and "dynamic-slice" in opcodes
        and instruction.result_bytes < first.bytes
    )
    return dataclasses.replace(
        first,
        kind="reduce-scatter" if scattered else first.kind,
        bytes=sum(c.bytes for c in found),
        overlapped=starts or first.overlapped or bool(opcodes & {"convolution", "dot"}),
    )


def _pairs(attributes: str) -> tuple[tuple[int, int], ...]:
    """The (source, target) pairs of a permutation."""
    found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    pairs = re.findall(r"\{(\d+),(\d+)\}", found.group(1)) if found else []
    return tuple((int(a), int(b)) for a, b in pairs)


def replica_group(attributes: str) -> tuple[int, ...]:
    """The first group of devices that exchange among themselves.

    Groups are written in one of three ways:

    - explicitly: `{{0,1},{2,3}}`;
    - as a reshaped iota, possibly transposed first: `[2,2]<=[4]`, `[2,2]<=[2,2]T(1,0)`;
    - as axes of a mesh: `mesh['a'=2,'b'=4] {'b'}`. The mesh may list its devices as an iota,
      `mesh[...], device_ids=([2,4]T(1,0)) {'b'}`, and an axis may be a part of one: `{'b':(2)2}` is
      the part of size 2 after a first factor of 2.

    Returns:
      Positions of the devices; empty if no group is named, which means all devices.

    Raises:
      ValueError: the groups are written in another way.
    """
    found = re.search(r"replica_groups=(.*)", attributes)
    if found is None or found.group(1).startswith("{}"):
        return ()
    text = found.group(1)
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return tuple(_integers(listed.group(1)))
    if iota := re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        ids = _iota(_integers(iota.group(2)), iota.group(3))
        return tuple(int(n) for n in ids.reshape(_integers(iota.group(1)))[0])
    if axes := re.match(
        r"mesh\[((?:'[^']+'=\d+,?)+)\]"  # names and sizes
        r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
        r"\s*\{([^}]*)\}",  # the axes of the group
        text,
    ):
        return _mesh_group(*axes.groups())
    raise ValueError(f"unknown form of replica_groups in HLO: {text[:80]}")


def _mesh_group(mesh: str, dims: str | None, order: str | None, axes: str) -> tuple[int, ...]:
    """The first group over `axes` of a mesh whose devices are an iota of `dims` in this `order`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    ids = _iota(_integers(dims) if dims else [math.prod(sizes.values())], order)
    positions = np.zeros(1, np.int64)
    for name, _, before, part in re.findall(r"'([^']+)'(:\((\d+)\)(\d+))?", axes):
        count = int(part or sizes[name])
        minor = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :])
        stride = minor * (sizes[name] // (int(before or 1) * count))
        positions = (positions[:, None] + stride * np.arange(count)[None, :]).reshape(-1)
    return tuple(int(n) for n in ids.reshape(-1)[positions])


def _iota(dims: list[int], order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(_integers(order)) if order else ids


def _integers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
