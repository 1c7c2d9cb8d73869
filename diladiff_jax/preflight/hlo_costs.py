"""What a compiled program does: products, bytes and collectives of each instruction of its HLO, times the trips of its loops.

The compiler's own `cost_analysis` counts the body of a loop once and knows nothing of custom kernels, so a step with a scan over
its layers looks cheap there. Here every instruction that runs by itself (a fusion is one, whatever is inside it) becomes one `Cost`
with the number of times that it runs.

Conventions: a multiplication and an addition are two FLOPs; bytes are those that cross the main memory (buffers whose layout
names another memory space, such as a TPU's VMEM, are not in it); collectives carry the bytes of the whole array that they make or
sum. Of a conditional, the dearest branch counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from diladiff_jax.preflight.hlo import (
    Buffer,
    Computation,
    Instruction,
    Module,
    replica_group,
    trip_count,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Collectives, by opcode."""

_TRANSCENDENTAL = frozenset(
    [
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
    ]
)
_ELEMENTWISE = frozenset(
    [
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
    ]
)
# Nothing moves for these: names, views, and the ends of what was counted at its start.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "domain",
        "async-update",
        "async-done",
        "copy-done",
        "send",
        "recv",
        "send-done",
        "recv-done",
    ]
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange. `bytes` is the whole array: what an all-gather makes, what the others are given (on one device).

    `groups` is one set of devices that exchange among themselves, as numbers in the mesh's order (all groups are alike);
    for a permutation, all its pairs. `overlapped` says that other work goes on meanwhile.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    overlapped: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction costs each time, and how often it runs.

    Attributes:
      times: runs in one call of the program.
      flops: of matrix products and of the kernels that are known.
      passes: the same, counted as often as the products are really made: six times for float32 at full precision on a matrix
        unit that multiplies bfloat16, three times at `high`.
      elementwise: one an element of every elementwise result, and of every reduction's input.
      transcendentals: elements of exponentials, logarithms, roots and the like.
      bytes: to and from main memory.
      unseen: the name of a custom kernel whose work is not in the figures.
    """

    instruction: str
    times: float
    flops: float = 0.0
    passes: float = 0.0
    elementwise: float = 0.0
    transcendentals: float = 0.0
    bytes: float = 0.0
    collective: Collective | None = None
    unseen: str | None = None


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over a program; `collectives` by kind as (how many are run, their bytes); `unseen` kernels by name, as often as they run."""

    flops: float
    passes: float
    elementwise: float
    transcendentals: float
    bytes: float
    collectives: dict[str, tuple[float, float]]
    unseen: dict[str, float]


def costs(module: Module, unknown_trips: Sequence[float] = ()) -> list[Cost]:
    """Everything that a call of the program runs.

    Args:
      unknown_trips: how often a loop runs whose count the program does not tell (it may depend on its data): the first entry
        for such a loop, the next for such a loop inside one, and so on; 1 where there is no entry.
    """
    return list(_walk(module, module.entry, 1.0, tuple(unknown_trips)))


def totals(found: Sequence[Cost]) -> Totals:
    """Sums of `costs`."""

    def total(field: str) -> float:
        return float(sum(cost.times * getattr(cost, field) for cost in found))

    collectives: dict[str, tuple[float, float]] = {}
    unseen: dict[str, float] = {}
    for cost in found:
        if cost.collective is not None:
            count, size = collectives.get(cost.collective.kind, (0.0, 0.0))
            collectives[cost.collective.kind] = (
                count + cost.times,
                size + cost.times * cost.collective.bytes,
            )
        if cost.unseen is not None:
            unseen[cost.unseen] = unseen.get(cost.unseen, 0.0) + cost.times
    return Totals(
        *(total(name) for name in ("flops", "passes", "elementwise", "transcendentals", "bytes")),
        collectives,
        unseen,
    )


def _walk(
    module: Module, name: str, times: float, unknown_trips: tuple[float, ...]
) -> Iterator[Cost]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == "while":
            trips, inner = trip_count(module, computation, instruction), unknown_trips
            if trips is None:
                trips, inner = (unknown_trips[0], unknown_trips[1:]) if unknown_trips else (1.0, ())
            for called in (*instruction.called("condition"), *instruction.called("body")):
                yield from _walk(module, called, times * trips, inner)
        elif opcode == "conditional":
            names = instruction.called("branch_computations") or instruction.called(
                "true_computation"
            ) + instruction.called("false_computation")
            yield from max(
                (list(_walk(module, branch, times, unknown_trips)) for branch in names), key=_weight
            )
        elif opcode == "call":
            for called in instruction.called("to_apply"):
                yield from _walk(module, called, times, unknown_trips)
        elif opcode == "async-start":
            for called in instruction.called("calls"):
                for cost in _walk(module, called, times, unknown_trips):
                    yield (
                        cost
                        if cost.collective is None
                        else dataclasses.replace(
                            cost, collective=dataclasses.replace(cost.collective, overlapped=True)
                        )
                    )
        elif opcode not in _FREE:
            cost = _cost(module, computation, instruction, times)
            if cost is not None:
                yield cost


def _weight(found: Sequence[Cost]) -> tuple[float, float]:
    sums = totals(found)
    return sums.flops, sums.bytes


def _cost(
    module: Module, computation: Computation, instruction: Instruction, times: float
) -> Cost | None:
    """The cost of one instruction that runs by itself; None where nothing happens."""
    if instruction.opcode.endswith("-done"):
        return None
    work = _work(module, computation, instruction)
    collective = _collective(module, computation, instruction)
    moved = _moved(module, computation, instruction)
    unseen = None
    if instruction.opcode == "custom-call":
        kernel, target = kernel_flops(computation, instruction), instruction.target
        if kernel is not None:
            work = dataclasses.replace(work, flops=kernel, passes=kernel)
        elif target not in _NO_WORK:
            unseen = (
                instruction.op_name.rsplit("/", 1)[-1]
                if target == "tpu_custom_call" and instruction.op_name
                else target
            )
    return Cost(
        instruction.name,
        times,
        work.flops,
        work.passes,
        work.elementwise,
        work.transcendentals,
        moved,
        collective,
        unseen,
    )


# Work.


@dataclasses.dataclass(frozen=True)
class _Work:
    flops: float = 0.0
    passes: float = 0.0
    elementwise: float = 0.0
    transcendentals: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        return _Work(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )


def _work(module: Module, computation: Computation, instruction: Instruction) -> _Work:
    """Arithmetic of one instruction, with what is inside where it is a fusion."""
    opcode, out = instruction.opcode, sum(buffer.elements for buffer in instruction.shape)
    if opcode == "fusion":
        inner = (module.computations[name] for name in instruction.called("calls"))
        return sum((_work(module, c, i) for c in inner for i in c.instructions.values()), _Work())
    if opcode in ("dot", "convolution"):
        flops = product_flops(computation, instruction)
        return _Work(flops, flops * _passes(computation, instruction))
    if opcode in _TRANSCENDENTAL:
        return _Work(transcendentals=out)
    if opcode in _ELEMENTWISE:
        return _Work(elementwise=out)
    if opcode == "reduce":
        arrays = len(instruction.shape)
        return _Work(
            elementwise=sum(
                _buffers(computation, name)[0].elements for name in instruction.operands[:arrays]
            )
            - out
        )
    return _Work()


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or a `convolution`: two for each multiplication whose factor is neither padding nor a hole of dilation.

    TPU programs write batched products as convolutions whose windows lie almost wholly on padding, so that counts.
    """
    left, right = (_buffers(computation, name)[0] for name in instruction.operands[:2])
    out = instruction.shape[0]
    if instruction.opcode == "dot":
        return (
            2.0
            * out.elements
            * math.prod(left.dims[d] for d in instruction.numbers("lhs_contracting_dims"))
        )
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    if labels is None:
        return 0.0
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(instruction)
    groups, batch_groups = (
        int(m.group(1)) if (m := re.search(rf"\b{name}=(\d+)", instruction.attributes)) else 1
        for name in ("feature_group_count", "batch_group_count")
    )
    valid = 1
    for digit in sorted(label for label in left_labels if label.isdigit()):
        sizes = (
            shape.dims[names.index(digit)]
            for shape, names in ((left, left_labels), (right, right_labels), (out, out_labels))
        )
        valid *= _valid_positions(*sizes, *window.get(int(digit), (1, 0, 1, 1)))
    features = left.dims[left_labels.index("f")] // groups * right.dims[right_labels.index("o")]
    return 2.0 * left.dims[left_labels.index("b")] // batch_groups * features * valid


def _window(instruction: Instruction) -> dict[int, tuple[int, int, int, int]]:
    """Spatial dimension -> (stride, padding before, dilation of the input, dilation of the window)."""
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
    """Pairs of an output and a window position that meet an element of the input, along one dimension."""
    at = np.arange(out)[:, None] * stride - before + np.arange(window)[None, :] * window_dilation
    return int(((at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)).sum())


def _passes(computation: Computation, instruction: Instruction) -> int:
    """How often a matrix unit of bfloat16 factors makes the product: float32 factors are split in three parts at full precision."""
    factors = [_buffers(computation, name)[0].dtype for name in instruction.operands[:2]]
    precision = re.search(r"operand_precision=\{([\w,]*)\}", instruction.attributes)
    if precision is None or "f32" not in factors:
        return 1
    asked = precision.group(1).split(",")
    return 6 if "highest" in asked else 3 if "high" in asked else 1


# Custom kernels.

_NO_WORK = frozenset(
    (
        "AllocateBuffer",
        "Sharding",
        "SPMDFullToShardShape",
        "SPMDShardToFullShape",
        "AssumeGatherIndicesInBound",
        "annotate_device_placement",
        "AsyncCollectiveStart",
        "AsyncCollectiveDone",
        "ConcatBitcast",
    )
)
_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mqa_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mqa_dq": 3,
    "splash_mha_dkv": 4,
    "splash_mqa_dkv": 4,
}
"""Splash attention's kernels -> products of size L x M x K that each makes a head (scores and what they weigh; scores, dP and dQ;
scores, dV, dP and dK; the backward pass in one kernel makes dQ too)."""


def kernel_flops(computation: Computation, instruction: Instruction) -> float | None:
    """FLOPs of a custom kernel that is recognized by its name: Pallas splash attention without a causal mask. None for others."""
    text = (
        instruction.op_name
        + " "
        + "".join(re.findall(r'"?kernel_name"?[:=]\s*"([^"]*)"', instruction.attributes))
    )
    for name, products in _PRODUCTS.items():
        if name in text:
            # Queries, keys and values [..., H, L, K] are the operands of floating point with the most dimensions.
            floats = [
                b
                for operand in instruction.operands
                for b in _buffers(computation, operand)
                if b.dtype in ("f32", "bf16", "f16")
            ]
            rank = max(len(b.dims) for b in floats)
            q, k = [b for b in floats if len(b.dims) == rank][:2]
            fused = (
                name.endswith("dkv")
                and len([b for b in instruction.shape if len(b.dims) >= rank]) > 2
            )
            return 2.0 * (products + fused) * math.prod(q.dims) * k.dims[-2]
    return None


# Memory.


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes to and from main memory of an instruction that runs by itself."""
    opcode = instruction.opcode
    if opcode == "iota" or opcode in KINDS or opcode.removesuffix("-start") in KINDS:
        return (
            float(sum(b.main_bytes for b in instruction.shape))
            if opcode == "iota"
            else float(sum(_main(computation, n) for n in instruction.operands) * 2)
        )
    if opcode == "copy-start":
        return float(instruction.shape[0].main_bytes + _main(computation, instruction.operands[0]))
    if opcode in ("slice-start", "dynamic-slice-start"):
        result = instruction.shape[1]
        return float(
            result.main_bytes + (result.bytes if _main(computation, instruction.operands[0]) else 0)
        )
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        read = 0
        for position, (operand, parameter) in enumerate(
            zip(instruction.operands, inner.parameters, strict=False)
        ):
            outer = _buffers(computation, operand)
            if any(b.space for b in outer):
                continue  # on the chip already
            read += _read(module, inner, parameter, sum(b.bytes for b in outer))
        return float(read + _written(module, inner, inner.root, instruction.shape))
    return float(
        sum(_operand_read(computation, instruction, p) for p in range(len(instruction.operands)))
        + _result_written(computation, instruction, instruction.shape)
    )


def _operand_read(computation: Computation, instruction: Instruction, position: int) -> int:
    """Bytes that an instruction outside of a fusion reads of one operand."""
    buffers = _buffers(computation, instruction.operands[position])
    if any(b.space for b in buffers):
        return 0
    return _part(computation, instruction, position, sum(b.bytes for b in buffers))


def _part(computation: Computation, instruction: Instruction, position: int, whole: int) -> int:
    """Bytes of an operand that an instruction touches: of a slice or a gather, what comes out; of an update in place, nothing."""
    if instruction.opcode in ("dynamic-slice", "slice", "gather") and position == 0:
        return min(whole, sum(b.bytes for b in instruction.shape))
    if instruction.opcode in ("dynamic-update-slice", "scatter") and position == 0:
        return 0
    return whole


def _read(module: Module, computation: Computation, name: str, whole: int) -> int:
    """Bytes that a fusion reads of its parameter `name`, `whole` bytes large."""
    total = 0
    for user, position in computation.users.get(name, []):
        if (
            user.opcode in ("bitcast", "reshape", "copy", "convert")
            and user.name != computation.root
        ):
            # A view, or computed where it is used: what is read is what its users read, in the parameter's own size.
            ratio = whole / max(1, sum(b.bytes for b in user.shape))
            total += int(
                ratio * _read(module, computation, user.name, sum(b.bytes for b in user.shape))
            )
        elif user.opcode == "fusion":
            inner = module.computations[user.called("calls")[0]]
            total += _read(module, inner, inner.parameters[position], whole)
        else:
            total += _part(computation, user, position, whole)
        if total >= whole:
            return whole
    return total


def _written(module: Module, computation: Computation, root: str, shape: Sequence[Buffer]) -> int:
    """Bytes that a fusion with this root writes into its results `shape`; of one updated in place, the update."""
    instruction = computation.instructions[root]
    if instruction.opcode == "tuple":
        if len(instruction.operands) != len(shape):
            return sum(b.main_bytes for b in shape)
        return sum(
            _written(module, computation, name, [buffer])
            for name, buffer in zip(instruction.operands, shape, strict=True)
        )
    if (
        instruction.opcode in ("bitcast", "copy", "convert", "reshape")
        and len(instruction.operands) == 1
        and instruction.operands[0] in computation.instructions
    ):
        before = computation.instructions[instruction.operands[0]]
        if before.opcode in ("dynamic-update-slice", "scatter", "bitcast"):
            return _written(module, computation, before.name, shape)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return _written(module, inner, inner.root, shape)
    return _result_written(computation, instruction, shape)


def _result_written(
    computation: Computation, instruction: Instruction, shape: Sequence[Buffer]
) -> int:
    if any(b.space for b in shape):
        return 0
    if instruction.opcode == "dynamic-update-slice":
        return sum(b.bytes for b in _buffers(computation, instruction.operands[1]))
    if instruction.opcode == "scatter":
        return sum(b.bytes for b in _buffers(computation, instruction.operands[-1]))
    return sum(b.bytes for b in shape)


def _buffers(computation: Computation, name: str) -> tuple[Buffer, ...]:
    return computation.instructions[name].shape


def _main(computation: Computation, name: str) -> int:
    return sum(b.main_bytes for b in _buffers(computation, name))


# Collectives.


def _collective(
    module: Module, computation: Computation, instruction: Instruction
) -> Collective | None:
    """The exchange that an instruction is, starts, or has inside."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        starts = inner.instructions[inner.root].target == "AsyncCollectiveStart"
        found = [
            c
            for i in inner.instructions.values()
            if (c := _collective(module, inner, i)) is not None
            and (starts or i.channel not in module.started)
        ]
        if not found:
            return None
        first, opcodes = found[0], {i.opcode for i in inner.instructions.values()}
        # A sum of which each device keeps its slice: written so, and run as a reduce-scatter.
        scattered = (
            first.kind == "all-reduce"
            and "dynamic-slice" in opcodes
            and sum(b.bytes for b in instruction.shape) < first.bytes
        )
        return dataclasses.replace(
            first,
            kind="reduce-scatter" if scattered else first.kind,
            bytes=sum(c.bytes for c in found),
            overlapped=starts or first.overlapped or bool(opcodes & {"convolution", "dot"}),
        )
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    overlapped = kind != instruction.opcode
    given = sum(
        b.bytes
        for name in (
            instruction.operands[:1] if kind == "collective-permute" else instruction.operands
        )
        for b in _buffers(computation, name)
    )
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
        pairs = (
            tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found.group(1)))
            if found
            else ()
        )
        return Collective(kind, given, (), pairs, overlapped)
    group = replica_group(instruction.attributes) or tuple(range(module.devices))
    return Collective(
        kind, given * len(group) if kind == "all-gather" else given, group, (), overlapped
    )
