"""Model FLOPs of a training step: its matrix products, forward and backward.

They are counted from the traced loss, without compiling or running anything. The backward pass has
one more product for each factor that needs a gradient: a product whose weights alone are trained
costs twice its forward pass, and one inside a frozen network or under `stop_gradient` costs only
the forward pass. What a program adds on top (rematerialization, padding, the optimizer's own
products) is not counted, because utilization is measured against what the model needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

_SPLASH = "splash_m"  # prefix of the names of Pallas splash attention's kernels

_Choose = Callable[..., float]  # max or min: which branch of a conditional counts


def model_flops(
    loss: Callable[..., Any], params: Any, *others: Any, expensive_branch_probability: float = 1.0
) -> float:
    """FLOPs of a loss and its gradient. A multiplication and an addition are two FLOPs.

    Args:
      loss: called as `loss(params, *others)`; its first result is the loss, the rest are metrics.
      params: what is differentiated, as arrays or their shapes.
      *others: further arguments, as arrays or their shapes.
      expensive_branch_probability: how often conditionals take their most expensive branch; they
        take the cheapest one otherwise. At 1 only the most expensive branch counts.

    Raises:
      ValueError: a loop whose number of iterations depends on its data contains matrix products.
    """
    traced = jax.make_jaxpr(loss)(params, *others)
    trained = len(jax.tree.leaves(params))
    active = [True] * trained + [False] * (len(traced.jaxpr.invars) - trained)
    needed = [True] + [False] * (len(traced.jaxpr.outvars) - 1)
    most = _analyse(traced.jaxpr, active, needed, max).flops
    if expensive_branch_probability == 1:
        return most
    least = _analyse(traced.jaxpr, active, needed, min).flops
    return expensive_branch_probability * most + (1 - expensive_branch_probability) * least


@dataclasses.dataclass(frozen=True)
class _Result:
    """FLOPs of an equation or jaxpr, and how gradients pass through it.

    Attributes:
      flops: forward and backward.
      active: for each output, whether it depends on the trained parameters.
      needed: for each input, whether a gradient flows back to it.
    """

    flops: float
    active: list[bool]
    needed: list[bool]


def _analyse(
    jaxpr: Any, active: Sequence[bool], needed: Sequence[bool], choose: _Choose
) -> _Result:
    """Analyses a jaxpr, given which inputs are active and which outputs need a gradient."""
    depends = dict(zip(jaxpr.invars, active, strict=True))
    for equation in jaxpr.eqns:  # forward: what depends on the parameters
        inputs = [_get(depends, v) for v in equation.invars]
        outputs = _equation(equation, inputs, None, choose).active
        for v, is_active in zip(equation.outvars, outputs, strict=True):
            depends[v] = is_active
    wanted: dict[Any, bool] = {}
    for v, is_needed in zip(jaxpr.outvars, needed, strict=True):
        _mark(wanted, v, is_needed)
    flops = 0.0
    for equation in reversed(jaxpr.eqns):  # backward: what the loss depends on
        inputs = [_get(depends, v) for v in equation.invars]
        outputs = [_get(wanted, v) for v in equation.outvars]
        result = _equation(equation, inputs, outputs, choose)
        flops += result.flops
        for v, is_needed in zip(equation.invars, result.needed, strict=True):
            _mark(wanted, v, is_needed)
    return _Result(
        flops, [_get(depends, v) for v in jaxpr.outvars], [_get(wanted, v) for v in jaxpr.invars]
    )


def _equation(
    equation: Any, active: list[bool], needed: list[bool] | None, choose: _Choose
) -> _Result:
    """Analyses one equation. With `needed` None only the result's `active` is meaningful."""
    name, params = equation.primitive.name, equation.params
    outputs = len(equation.outvars)
    needed = [False] * outputs if needed is None else needed
    if name == "stop_gradient":
        return _Result(0.0, [False] * outputs, [False] * len(active))
    if name == "dot_general":
        backward = sum(active) if needed[0] else 0
        return _Result(_dot_flops(equation) * (1 + backward), [any(active)], [needed[0]] * 2)
    if name == "scan":
        return _scan(equation, active, needed, choose)
    if name == "while":
        return _while(params, active, needed, choose)
    if name == "cond":
        return _cond(params, active, needed, choose)
    flops = 0.0
    if name == "pallas_call":
        flops = _kernel_flops(equation) * (1 + 2 * (any(active) and any(needed)))
    elif (inner := _inner_jaxpr(params, len(active), outputs)) is not None:
        result = _analyse(inner, active, needed, choose)
        if name == "shard_map":  # the shapes inside are those of one device
            return dataclasses.replace(result, flops=result.flops * params["mesh"].size)
        return result
    return _Result(flops, [any(active)] * outputs, [any(needed)] * len(active))


def _scan(equation: Any, active: list[bool], needed: list[bool], choose: _Choose) -> _Result:
    """Analyses the body until the carry's marks no longer change from one iteration to the next.

    What is carried, or constant, has the same shape inside and outside the body; JAX names it
    differently from version to version.
    """
    body, length = _open(equation.params["jaxpr"]), equation.params["length"]

    def unstacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(outer, inner, strict=True)
        return sum(a.aval.ndim == b.aval.ndim for a, b in pairs)

    carried = unstacked(equation.outvars, body.outvars)
    constants = unstacked(equation.invars, body.invars) - carried
    carry = slice(constants, constants + carried)
    active, needed = list(active), list(needed)
    while True:
        result = _analyse(body, active, needed, choose)
        forward = [a or b for a, b in zip(active[carry], result.active[:carried], strict=True)]
        backward = [a or b for a, b in zip(needed[:carried], result.needed[carry], strict=True)]
        if forward == active[carry] and backward == needed[:carried]:
            return dataclasses.replace(result, flops=result.flops * length)
        active[carry], needed[:carried] = forward, backward


def _while(
    params: dict[str, Any], active: list[bool], needed: list[bool], choose: _Choose
) -> _Result:
    body = _open(params["body_jaxpr"])
    if _analyse(body, [False] * len(body.invars), [False] * len(body.outvars), choose).flops:
        raise ValueError(
            "cannot count the FLOPs of this loss: a loop with an unknown number of iterations "
            "contains matrix products. Use `jax.lax.scan` or a `fori_loop` with constant bounds."
        )
    return _Result(0.0, [any(active)] * len(needed), [any(needed)] * len(active))


def _cond(
    params: dict[str, Any], active: list[bool], needed: list[bool], choose: _Choose
) -> _Result:
    branches = [_analyse(_open(b), active[1:], needed, choose) for b in params["branches"]]
    return _Result(
        choose(b.flops for b in branches),
        [any(each) for each in zip(*(b.active for b in branches), strict=True)],
        [False] + [any(each) for each in zip(*(b.needed for b in branches), strict=True)],
    )


def _inner_jaxpr(params: dict[str, Any], inputs: int, outputs: int) -> Any | None:
    """The jaxpr that an equation such as `jit` or `remat` calls; None if it calls none."""
    found = next(
        (params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None
    )
    inner = _open(found)
    if inner is None or len(inner.invars) != inputs or len(inner.outvars) != outputs:
        return None
    return inner


def _open(jaxpr: Any) -> Any:
    """A jaxpr, whether it was closed or not."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _dot_flops(equation: Any) -> float:
    """Forward FLOPs of a `dot_general`."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[d] for d in contracted)


def _kernel_flops(equation: Any) -> float:
    """Forward FLOPs of splash attention; other kernels count as zero."""
    params = equation.params
    if _SPLASH not in str(params.get("name", "")) + str(params.get("name_and_src_info", "")):
        return 0.0
    floats = [
        v.aval for v in equation.invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)
    ]
    rank = max(len(a.shape) for a in floats)
    q, k = [a for a in floats if len(a.shape) == rank][:2]
    return 4.0 * math.prod(q.shape) * k.shape[-2]


def _get(marks: dict[Any, bool], variable: Any) -> bool:
    return False if isinstance(variable, core.Literal) else marks.get(variable, False)


def _mark(marks: dict[Any, bool], variable: Any, value: bool) -> None:
    if not isinstance(variable, core.Literal):
        marks[variable] = marks.get(variable, False) or value
