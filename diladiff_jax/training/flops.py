"""Model FLOPs of a training step: its matrix products once forwards, and once more for every factor that a gradient flows to.

Counted from the traced loss, without compiling or running anything: a product of which only the weights are trained costs twice
its forward pass, one inside a frozen network or under a stopped gradient costs that pass alone. What a program does on top of
this (rematerialization, padding, an optimizer's own products) is not in it: utilization is measured against what the model needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

_SPLASH = "splash_m"  # how the names of Pallas splash attention's kernels begin


def model_flops(
    loss: Callable[..., Any], params: Any, *others: Any, expensive_branch_probability: float = 1.0
) -> float:
    """FLOPs of the value and gradient in `params` of `loss(params, *others)`, whose first result is the loss and the rest metrics.

    Arguments are arrays or their shapes. A multiplication and an addition are two FLOPs. Of conditionals the dearest branch counts, or the
    mean where it is taken with probability `expensive_branch_probability` and the cheapest one otherwise.

    Raises:
      ValueError: a loop whose number of trips depends on its data has matrix products inside.
    """
    traced = jax.make_jaxpr(loss)(params, *others)
    trained = len(jax.tree.leaves(params))
    active = [True] * trained + [False] * (len(traced.jaxpr.invars) - trained)
    needed = [True] + [False] * (len(traced.jaxpr.outvars) - 1)
    dearest = _analyse(traced.jaxpr, active, needed, max).flops
    return (
        dearest
        if expensive_branch_probability == 1
        else expensive_branch_probability * dearest
        + (1 - expensive_branch_probability) * _analyse(traced.jaxpr, active, needed, min).flops
    )


@dataclasses.dataclass(frozen=True)
class _Result:
    flops: float
    active: list[bool]  # of each output: whether it depends on what is trained
    needed: list[bool]  # of each input: whether a gradient comes back to it


def _analyse(
    jaxpr: Any, active: Sequence[bool], needed: Sequence[bool], chosen: Callable[..., float]
) -> _Result:
    """FLOPs of a jaxpr given which inputs are trained and which outputs the loss depends on, and which branch is `chosen`, max or min."""
    depends = {v: a for v, a in zip(jaxpr.invars, active, strict=True)}
    for equation in jaxpr.eqns:  # forwards: what depends on the parameters
        given = [_of(depends, v) for v in equation.invars]
        for v, a in zip(
            equation.outvars, _equation(equation, given, None, chosen).active, strict=True
        ):
            depends[v] = a
    wanted: dict[Any, bool] = {}
    for v, n in zip(jaxpr.outvars, needed, strict=True):
        _mark(wanted, v, n)
    flops = 0.0
    for equation in reversed(jaxpr.eqns):  # backwards: what the loss depends on
        given = [_of(depends, v) for v in equation.invars]
        result = _equation(equation, given, [_of(wanted, v) for v in equation.outvars], chosen)
        flops += result.flops
        for v, n in zip(equation.invars, result.needed, strict=True):
            _mark(wanted, v, n)
    return _Result(
        flops, [_of(depends, v) for v in jaxpr.outvars], [_of(wanted, v) for v in jaxpr.invars]
    )


def _equation(
    equation: Any, given: list[bool], wanted: list[bool] | None, chosen: Callable[..., float]
) -> _Result:
    """One equation; `wanted` None asks only for what depends on what."""
    name, params = equation.primitive.name, equation.params
    outputs = len(equation.outvars)
    want = [False] * outputs if wanted is None else wanted
    if name == "stop_gradient":
        return _Result(0.0, [False] * outputs, [False] * len(given))
    if name == "dot_general":
        once = _dot_flops(equation)
        return _Result(once * (1 + (sum(given) if want[0] else 0)), [any(given)], [want[0]] * 2)
    if name == "scan":
        return _scan(params, given, want, chosen)
    if name == "while":
        return _while(params, given, want, chosen)
    if name == "cond":
        branches = [
            _analyse(branch.jaxpr, given[1:], want, chosen) for branch in params["branches"]
        ]
        return _Result(
            chosen(b.flops for b in branches),
            [any(each) for each in zip(*(b.active for b in branches), strict=True)],
            [False] + [any(each) for each in zip(*(b.needed for b in branches), strict=True)],
        )
    if name == "pallas_call":
        return _Result(
            _kernel_flops(equation) * (1 + 2 * (any(given) and any(want))),
            [any(given)] * outputs,
            [any(want)] * len(given),
        )
    inner = next(
        (params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None
    )
    if (
        inner is not None
        and len(_plain(inner).invars) == len(given)
        and len(_plain(inner).outvars) == outputs
    ):
        result = _analyse(_plain(inner), given, want, chosen)
        if name == "shard_map":  # shapes inside are those of one device
            return dataclasses.replace(result, flops=result.flops * params["mesh"].size)
        return result
    return _Result(0.0, [any(given)] * outputs, [any(want)] * len(given))


def _scan(
    params: dict[str, Any], given: list[bool], want: list[bool], chosen: Callable[..., float]
) -> _Result:
    consts, carried, body = params["num_consts"], params["num_carry"], params["jaxpr"].jaxpr
    state, back = list(given), list(want)
    while True:  # what depends on the parameters, or is wanted, in a later trip
        result = _analyse(body, state, back, chosen)
        onward = [
            a or b
            for a, b in zip(state[consts : consts + carried], result.active[:carried], strict=True)
        ]
        backward = [
            a or b
            for a, b in zip(back[:carried], result.needed[consts : consts + carried], strict=True)
        ]
        if onward == state[consts : consts + carried] and backward == back[:carried]:
            return dataclasses.replace(result, flops=result.flops * params["length"])
        state[consts : consts + carried], back[:carried] = onward, backward


def _while(
    params: dict[str, Any], given: list[bool], want: list[bool], chosen: Callable[..., float]
) -> _Result:
    body = params["body_jaxpr"].jaxpr
    if _analyse(body, [False] * len(body.invars), [False] * len(body.outvars), chosen).flops:
        raise ValueError(
            "a loop with an unknown number of trips has matrix products inside; its FLOPs cannot be counted"
        )
    return _Result(0.0, [any(given)] * len(want), [any(want)] * len(given))


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[d] for d in contracted)


def _kernel_flops(equation: Any) -> float:
    """Forward FLOPs of splash attention; other kernels are not counted."""
    if _SPLASH not in str(equation.params.get("name", "")) + str(
        equation.params.get("name_and_src_info", "")
    ):
        return 0.0
    floats = [
        v.aval for v in equation.invars if jax.numpy.issubdtype(v.aval.dtype, jax.numpy.floating)
    ]
    rank = max(len(a.shape) for a in floats)
    q, k = [a for a in floats if len(a.shape) == rank][:2]
    return 4.0 * math.prod(q.shape) * k.shape[-2]


def _plain(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _of(marks: dict[Any, bool], variable: Any) -> bool:
    return False if isinstance(variable, core.Literal) else marks.get(variable, False)


def _mark(marks: dict[Any, bool], variable: Any, value: bool) -> None:
    if not isinstance(variable, core.Literal):
        marks[variable] = marks.get(variable, False) or value
