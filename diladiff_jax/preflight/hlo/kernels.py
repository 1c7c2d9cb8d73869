"""Custom calls of an HLO program: the kernels whose work is known, and those whose work is not."""

from __future__ import annotations

import math
import re

from diladiff_jax.preflight.hlo.program import Computation, Instruction

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
"""Targets of custom calls that only annotate or allocate."""

_PRODUCTS = {
    "splash_mha_fwd": 2,
    "splash_mqa_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mqa_dq": 3,
    "splash_mha_dkv": 4,
    "splash_mqa_dkv": 4,
}
"""Kernel of splash attention -> products of size L x M x K per head.

Forward: the scores, and the weighted values. dq: the scores, dP and dQ. dkv: the scores, dV, dP and
dK, and also dQ if one kernel makes the complete backward pass.
"""


def kernel_flops(computation: Computation, instruction: Instruction) -> float | None:
    """FLOPs of a Pallas splash attention kernel without a causal mask; None for other kernels."""
    names = re.findall(r'"?kernel_name"?[:=]\s*"([^"]*)"', instruction.attributes)
    text = instruction.op_name + " " + "".join(names)
    name = next((name for name in _PRODUCTS if name in text), None)
    if name is None:
        return None
    # Queries, keys and values [..., H, L, K] are the floating-point operands of the highest rank.
    floats = [
        b
        for operand in instruction.operands
        for b in computation.buffers(operand)
        if b.dtype in ("f32", "bf16", "f16")
    ]
    rank = max(len(b.dims) for b in floats)
    q, k = [b for b in floats if len(b.dims) == rank][:2]
    results = [b for b in instruction.shape if len(b.dims) >= rank]
    makes_dq = name.endswith("dkv") and len(results) > 2
    return 2.0 * (_PRODUCTS[name] + makes_dq) * math.prod(q.dims) * k.dims[-2]


def uncounted_kernel(instruction: Instruction) -> str | None:
    """The name of a custom call whose work is unknown; None if it does no work."""
    if instruction.target in _NO_WORK:
        return None
    if instruction.target == "tpu_custom_call" and instruction.op_name:
        return instruction.op_name.rsplit("/", 1)[-1]
    return instruction.target
