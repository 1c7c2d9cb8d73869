"""Arithmetic of HLO instructions: matrix products, elementwise operations and transcendentals.

A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

from diladiff_jax.preflight.hlo.program import Computation, Instruction, Module

_TRANSCENDENTAL = frozenset(
    {
        "atan2",
        "cbrt",
        "cosine",
        "erf",
        "exponential",
        "exponential-minus-one",
        "log",
        "log-plus-one",
        "logistic",
        "power",
        "rsqrt",
        "sine",
        "sqrt",
        "tan",
        "tanh",
    }
)
_ELEMENTWISE = frozenset(
    {
        "abs",
        "add",
        "and",
        "ceil",
        "clamp",
        "clz",
        "compare",
        "complex",
        "convert",
        "count-leading-zeros",
        "divide",
        "floor",
        "imag",
        "is-finite",
        "maximum",
        "minimum",
        "multiply",
        "negate",
        "not",
        "or",
        "popcnt",
        "real",
        "remainder",
        "round-nearest-afz",
        "round-nearest-even",
        "select",
        "shift-left",
        "shift-right-arithmetic",
        "shift-right-logical",
        "sign",
        "subtract",
        "stochastic-convert",
        "xor",
    }
)


@dataclasses.dataclass(frozen=True)
class Work:
    """Amounts of arithmetic; the fields are those of `costs.Cost`."""

    flops: float = 0.0
    passes: float = 0.0
    elementwise: float = 0.0
    transcendentals: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.passes + other.passes,
            self.elementwise + other.elementwise,
            self.transcendentals + other.transcendentals,
        )


def arithmetic(module: Module, computation: Computation, instruction: Instruction) -> Work:
    """The arithmetic of one instruction, including everything inside a fusion."""
    opcode, out = instruction.opcode, sum(buffer.elements for buffer in instruction.shape)
    if opcode == "fusion":
        inner = (module.computations[name] for name in instruction.called("calls"))
        parts = (arithmetic(module, c, i) for c in inner for i in c.instructions.values())
        return sum(parts, Work())
    if opcode in ("dot", "convolution"):
        flops = product_flops(computation, instruction)
        return Work(flops, flops * _passes(computation, instruction))
    if opcode in _TRANSCENDENTAL:
        return Work(transcendentals=out)
    if opcode in _ELEMENTWISE:
        return Work(elementwise=out)
    if opcode == "reduce":
        arrays = instruction.operands[: len(instruction.shape)]  # the others are initial values
        return Work(elementwise=sum(computation.buffers(name)[0].elements for name in arrays) - out)
    return Work()


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or a `convolution`.

    Factors that are padding or holes of a dilation do not count. This matters because TPU programs
    write batched products as convolutions whose windows cover almost only padding.
    """
    left, right = (computation.buffers(name)[0] for name in instruction.operands[:2])
    out = instruction.shape[0]
    if instruction.opcode == "dot":
        contracted = instruction.numbers("lhs_contracting_dims")
        return 2.0 * out.elements * math.prod(left.dims[d] for d in contracted)
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    if labels is None:
        return 0.0
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(instruction)
    valid = 1
    for digit in sorted(label for label in left_labels if label.isdigit()):
        sizes = (
            shape.dims[names.index(digit)]
            for shape, names in ((left, left_labels), (right, right_labels), (out, out_labels))
        )
        valid *= _valid_positions(*sizes, *window.get(int(digit), (1, 0, 1, 1)))
    groups, batch_groups = (
        int(m.group(1)) if (m := re.search(rf"\b{name}=(\d+)", instruction.attributes)) else 1
        for name in ("feature_group_count", "batch_group_count")
    )
    features = left.dims[left_labels.index("f")] // groups * right.dims[right_labels.index("o")]
    return 2.0 * left.dims[left_labels.index("b")] // batch_groups * features * valid


def _window(instruction: Instruction) -> dict[int, tuple[int, int, int, int]]:
    """Spatial dimension -> (stride, padding before, input dilation, window dilation)."""
    text = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in text.group(1).split()) if text else {}
    sizes = fields["size"].split("x") if fields else []

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * len(sizes)

    rows = zip(
        values("stride", "1"),
        values("pad", "0_0"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        strict=True,
    )
    return {
        d: (int(s), int(p.split("_")[0]), int(a), int(b)) for d, (s, p, a, b) in enumerate(rows)
    }


@functools.lru_cache(maxsize=4096)
def _valid_positions(
    size: int, window: int, out: int, stride: int, before: int, dilation: int, window_dilation: int
) -> int:
    """Pairs (output, window position) that meet an input element, along one dimension."""
    at = np.arange(out)[:, None] * stride - before + np.arange(window)[None, :] * window_dilation
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _passes(computation: Computation, instruction: Instruction) -> int:
    """Passes of a bfloat16 matrix unit per product: float32 factors are split into three parts."""
    factors = [computation.buffers(name)[0].dtype for name in instruction.operands[:2]]
    precision = re.search(r"operand_precision=\{([\w,]*)\}", instruction.attributes)
    if precision is None or "f32" not in factors:
        return 1
    requested = precision.group(1).split(",")
    return 6 if "highest" in requested else 3 if "high" in requested else 1
