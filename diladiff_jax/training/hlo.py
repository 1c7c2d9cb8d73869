"""What a compiled program does, counted from its optimized HLO text: products, bytes and collectives, times the trips of its loops.

The compiler's own `cost_analysis` counts the body of a loop once and knows nothing of custom kernels, so a step with a scan over
its layers looks cheap there. Here the text is read into computations and instructions, and every instruction that runs by itself
(a fusion is one, whatever is inside it) becomes one `Cost` with the number of times that it runs.

Conventions: a multiplication and an addition are two FLOPs; bytes are those that cross the main memory (buffers whose layout
names another memory space, such as a TPU's VMEM, are not in it); collectives carry the bytes of the whole array that they make or
sum. Of a conditional, the dearest branch counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")
"""Collectives, by opcode."""

_TRANSCENDENTAL = frozenset(
    "atan2 cbrt cosine erf exponential exponential-minus-one log log-plus-one logistic power rsqrt sine sqrt tan tanh".split()
)
_ELEMENTWISE = frozenset(
    "abs add and ceil clamp clz compare complex convert count-leading-zeros divide floor imag is-finite maximum minimum multiply negate not or "
    "popcnt real remainder round-nearest-afz round-nearest-even select shift-left shift-right-arithmetic shift-right-logical sign subtract "
    "stochastic-convert xor".split()
)
# Nothing moves for these: names, views, and the ends of what was counted at its start.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier add-dependency domain "
    "async-update async-done copy-done send recv send-done recv-done".split()
)
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
        found = re.search(r'op_name="([^"]*)"', self.attributes)
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
        found = {int(i.arguments): name for name, i in self.instructions.items() if i.opcode == "parameter"}
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
        return frozenset(
            channel for c in self.computations.values() if _fused_target(c) == "AsyncCollectiveStart" for i in c.instructions.values() if (channel := _channel(i))
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
        raise ValueError("the text holds no entry computation; it must be a compiled program's, as `compiled.as_text()` prints it")
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
    return Instruction(name, opcode, parse_shape(text[:shape_end]), tuple(_NAME.findall(arguments)), arguments, rest[end:])


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


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
            collectives[cost.collective.kind] = (count + cost.times, size + cost.times * cost.collective.bytes)
        if cost.unseen is not None:
            unseen[cost.unseen] = unseen.get(cost.unseen, 0.0) + cost.times
    return Totals(*(total(name) for name in ("flops", "passes", "elementwise", "transcendentals", "bytes")), collectives, unseen)


def unknown_loops(module: Module) -> list[str]:
    """Names of the loops whose number of trips the program does not tell."""
    return [
        instruction.name
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while" and trip_count(module, computation, instruction) is None
    ]


def _walk(module: Module, name: str, times: float, unknown_trips: tuple[float, ...]) -> Iterator[Cost]:
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
            names = instruction.called("branch_computations") or instruction.called("true_computation") + instruction.called("false_computation")
            yield from max((list(_walk(module, branch, times, unknown_trips)) for branch in names), key=_weight)
        elif opcode == "call":
            for called in instruction.called("to_apply"):
                yield from _walk(module, called, times, unknown_trips)
        elif opcode == "async-start":
            for called in instruction.called("calls"):
                for cost in _walk(module, called, times, unknown_trips):
                    yield cost if cost.collective is None else dataclasses.replace(cost, collective=dataclasses.replace(cost.collective, overlapped=True))
        elif opcode not in _FREE:
            cost = _cost(module, computation, instruction, times)
            if cost is not None:
                yield cost


def _weight(found: Sequence[Cost]) -> tuple[float, float]:
    sums = totals(found)
    return sums.flops, sums.bytes


def _cost(module: Module, computation: Computation, instruction: Instruction, times: float) -> Cost | None:
    """The cost of one instruction that runs by itself; None where nothing happens."""
    if instruction.opcode.endswith("-done"):
        return None
    work = _work(module, computation, instruction)
    collective = _collective(module, computation, instruction)
    moved = _moved(module, computation, instruction)
    unseen = None
    if instruction.opcode == "custom-call":
        kernel, target = kernel_flops(computation, instruction), _target(instruction)
        if kernel is not None:
            work = dataclasses.replace(work, flops=kernel, passes=kernel)
        elif target not in _NO_WORK:
            unseen = instruction.op_name.rsplit("/", 1)[-1] if target == "tpu_custom_call" and instruction.op_name else target
    return Cost(instruction.name, times, work.flops, work.passes, work.elementwise, work.transcendentals, moved, collective, unseen)


# Work.


@dataclasses.dataclass(frozen=True)
class _Work:
    flops: float = 0.0
    passes: float = 0.0
    elementwise: float = 0.0
    transcendentals: float = 0.0

    def __add__(self, other: _Work) -> _Work:
        return _Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


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
        return _Work(elementwise=sum(_buffers(computation, name)[0].elements for name in instruction.operands[:arrays]) - out)
    return _Work()


def product_flops(computation: Computation, instruction: Instruction) -> float:
    """FLOPs of a `dot` or a `convolution`: two for each multiplication whose factor is neither padding nor a hole of dilation.

    TPU programs write batched products as convolutions whose windows lie almost wholly on padding, so that counts.
    """
    left, right = (_buffers(computation, name)[0] for name in instruction.operands[:2])
    out = instruction.shape[0]
    if instruction.opcode == "dot":
        return 2.0 * out.elements * math.prod(left.dims[d] for d in instruction.numbers("lhs_contracting_dims"))
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", instruction.attributes)
    if labels is None:
        return 0.0
    left_labels, right_labels, out_labels = labels.groups()
    window = _window(instruction)
    groups, batch_groups = (int(m.group(1)) if (m := re.search(rf"\b{name}=(\d+)", instruction.attributes)) else 1 for name in ("feature_group_count", "batch_group_count"))
    valid = 1
    for digit in sorted(label for label in left_labels if label.isdigit()):
        sizes = (shape.dims[names.index(digit)] for shape, names in ((left, left_labels), (right, right_labels), (out, out_labels)))
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

    rows = zip(values("stride", "1"), values("pad", "0_0"), values("lhs_dilate", "1"), values("rhs_dilate", "1"), strict=True)
    return {d: (int(s), int(p.split("_")[0]), int(a), int(b)) for d, (s, p, a, b) in enumerate(rows)}


@functools.lru_cache(maxsize=4096)
def _valid_positions(size: int, window: int, out: int, stride: int, before: int, dilation: int, window_dilation: int) -> int:
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

_NO_WORK = frozenset(("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndicesInBound", "annotate_device_placement", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast"))
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mqa_fwd": 2, "splash_mha_dq": 3, "splash_mqa_dq": 3, "splash_mha_dkv": 4, "splash_mqa_dkv": 4}
"""Splash attention's kernels -> products of size L x M x K that each makes a head (scores and what they weigh; scores, dP and dQ;
scores, dV, dP and dK; the backward pass in one kernel makes dQ too)."""


def _target(instruction: Instruction) -> str:
    found = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    return found.group(1) if found else ""


def kernel_flops(computation: Computation, instruction: Instruction) -> float | None:
    """FLOPs of a custom kernel that is recognized by its name: Pallas splash attention without a causal mask. None for others."""
    text = instruction.op_name + " " + "".join(re.findall(r'"?kernel_name"?[:=]\s*"([^"]*)"', instruction.attributes))
    for name, products in _PRODUCTS.items():
        if name in text:
            # Queries, keys and values [..., H, L, K] are the operands of floating point with the most dimensions.
            floats = [b for operand in instruction.operands for b in _buffers(computation, operand) if b.dtype in ("f32", "bf16", "f16")]
            rank = max(len(b.dims) for b in floats)
            q, k = [b for b in floats if len(b.dims) == rank][:2]
            fused = name.endswith("dkv") and len([b for b in instruction.shape if len(b.dims) >= rank]) > 2
            return 2.0 * (products + fused) * math.prod(q.dims) * k.dims[-2]
    return None


# Memory.


def _moved(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes to and from main memory of an instruction that runs by itself."""
    opcode = instruction.opcode
    if opcode == "iota" or opcode in KINDS or opcode.removesuffix("-start") in KINDS:
        return float(sum(b.main_bytes for b in instruction.shape)) if opcode == "iota" else float(sum(_main(computation, n) for n in instruction.operands) * 2)
    if opcode == "copy-start":
        return float(instruction.shape[0].main_bytes + _main(computation, instruction.operands[0]))
    if opcode in ("slice-start", "dynamic-slice-start"):
        result = instruction.shape[1]
        return float(result.main_bytes + (result.bytes if _main(computation, instruction.operands[0]) else 0))
    if opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        read = 0
        for position, (operand, parameter) in enumerate(zip(instruction.operands, inner.parameters, strict=False)):
            outer = _buffers(computation, operand)
            if any(b.space for b in outer):
                continue  # on the chip already
            read += _read(module, inner, parameter, sum(b.bytes for b in outer))
        return float(read + _written(module, inner, inner.root, instruction.shape))
    return float(sum(_operand_read(computation, instruction, p) for p in range(len(instruction.operands))) + _result_written(computation, instruction, instruction.shape))


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
        if user.opcode in ("bitcast", "reshape", "copy", "convert") and user.name != computation.root:
            # A view, or computed where it is used: what is read is what its users read, in the parameter's own size.
            ratio = whole / max(1, sum(b.bytes for b in user.shape))
            total += int(ratio * _read(module, computation, user.name, sum(b.bytes for b in user.shape)))
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
        return sum(_written(module, computation, name, [buffer]) for name, buffer in zip(instruction.operands, shape, strict=True))
    if instruction.opcode in ("bitcast", "copy", "convert", "reshape") and len(instruction.operands) == 1 and instruction.operands[0] in computation.instructions:
        before = computation.instructions[instruction.operands[0]]
        if before.opcode in ("dynamic-update-slice", "scatter", "bitcast"):
            return _written(module, computation, before.name, shape)
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        return _written(module, inner, inner.root, shape)
    return _result_written(computation, instruction, shape)


def _result_written(computation: Computation, instruction: Instruction, shape: Sequence[Buffer]) -> int:
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


def _collective(module: Module, computation: Computation, instruction: Instruction) -> Collective | None:
    """The exchange that an instruction is, starts, or has inside."""
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called("calls")[0]]
        starts = _fused_target(inner) == "AsyncCollectiveStart"
        found = [
            c for i in inner.instructions.values()
            if (c := _collective(module, inner, i)) is not None and (starts or _channel(i) not in module.started)
        ]
        if not found:
            return None
        first, opcodes = found[0], {i.opcode for i in inner.instructions.values()}
        # A sum of which each device keeps its slice: written so, and run as a reduce-scatter.
        scattered = first.kind == "all-reduce" and "dynamic-slice" in opcodes and sum(b.bytes for b in instruction.shape) < first.bytes
        return dataclasses.replace(
            first, kind="reduce-scatter" if scattered else first.kind, bytes=sum(c.bytes for c in found),
            overlapped=starts or first.overlapped or bool(opcodes & {"convolution", "dot"}),
        )
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    overlapped = kind != instruction.opcode
    given = sum(b.bytes for name in (instruction.operands[:1] if kind == "collective-permute" else instruction.operands) for b in _buffers(computation, name))
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", instruction.attributes)
        pairs = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", found.group(1))) if found else ()
        return Collective(kind, given, (), pairs, overlapped)
    group = replica_group(instruction.attributes) or tuple(range(module.devices))
    return Collective(kind, given * len(group) if kind == "all-gather" else given, group, (), overlapped)


def _channel(instruction: Instruction) -> str:
    """The number of an exchange, where it is one."""
    found = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
    return found.group(1) if found else ""


def _fused_target(computation: Computation) -> str:
    """The target of the custom call that a fusion ends with, if any."""
    root = computation.instructions[computation.root]
    return _target(root) if root.opcode == "custom-call" else ""


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
    if axes := re.match(r"mesh\[((?:'[^']+'=\d+,?)+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes.group(1))}
        dims = [int(n) for n in axes.group(2).split(",")] if axes.group(2) else [math.prod(sizes.values())]
        ids = np.arange(math.prod(dims)).reshape(dims)
        if axes.group(3):
            ids = ids.transpose([int(n) for n in axes.group(3).split(",")])
        places = np.zeros(1, np.int64)
        for name, _, before, part in re.findall(r"'([^']+)'(:\((\d+)\)(\d+))?", axes.group(4)):
            count = int(part or sizes[name])
            stride = math.prod(list(sizes.values())[list(sizes).index(name) + 1 :]) * (sizes[name] // (int(before or 1) * count))
            places = (places[:, None] + stride * np.arange(count)[None, :]).reshape(-1)
        return tuple(int(n) for n in ids.reshape(-1)[places])
    raise ValueError(f"devices of a collective are written in a way that is not known: {text[:80]}")


# Loops.


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
        bound = {p: _affine(module, where, operand, bound) for p, operand in zip(inner.parameters, outer.operands, strict=True)}
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
    module: Module, computation: Computation, name: str | None, bound: Mapping[str, tuple[int | None, int] | None]
) -> tuple[int | None, int] | None:
    """A whole number as (element of the computation's tuple parameter or None, offset); None where it is neither."""
    if name is None:
        return None
    if name in bound:
        return bound[name]
    instruction = computation.instructions[name]
    if instruction.opcode == "constant":
        return (None, int(instruction.arguments)) if re.fullmatch(r"-?\d+", instruction.arguments) else None
    if instruction.opcode == "get-tuple-element" and computation.instructions[instruction.operands[0]].opcode == "parameter":
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
        inner = module.computations[(instruction.called("calls") or instruction.called("to_apply"))[0]]
        given = {p: _affine(module, computation, operand, bound) for p, operand in zip(inner.parameters, instruction.operands, strict=True)}
        return _affine(module, inner, inner.root, given)
    return None
