"""Layers of one kind run one after the other: traced once and called for each, rematerialized, or as one compiled layer under a scan.

Parameters are a layer's own everywhere else, under its own name: checkpoints, optimizers and published weights know nothing of how
the layers are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Layer = Callable[[Array, Any, Any], tuple[Array, Any]]

REMAT: dict[str, Callable[..., bool]] = {
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a rematerialized layer keeps for its gradient: the results of its linear maps (attention is made anew), or only what enters it."""


def run_layers(
    layer: Layer,
    h: Array,
    parameters: Sequence[Any],
    inputs: Any = None,
    *,
    scan: bool,
    remat: str,
    reverse: bool = False,
) -> tuple[Array, Any]:
    """`h, y = layer(h, parameters[i], inputs[i])` for each layer in turn.

    Args:
      layer: a pure function; the same for all.
      h: what enters the first layer.
      parameters: a tree for each layer, all alike.
      inputs: a tree of arrays with a leading axis over the layers, or None.
      scan: whether one compiled layer runs them all, on parameters stacked for it; the program does not grow with depth.
      remat: "none", or one of `REMAT`.
      reverse: whether the last of the `inputs` goes to the first layer, and so on back.

    Returns:
      what leaves the last layer, and the `y` with a leading axis over the layers, first layer first.
    """

    def run(h: Array, each: tuple[Any, Any]) -> tuple[Array, Any]:
        return layer(h, *each)

    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=not scan)
    if reverse:
        inputs = jax.tree.map(lambda x: x[::-1], inputs)
    if scan:
        return jax.lax.scan(
            run, h, (jax.tree.map(lambda *leaves: jnp.stack(leaves), *parameters), inputs)
        )
    # Traced for the first layer and called for all: half of a start from stored programs was tracing. The compiler puts each call's layer
    # in its place, so that what runs is as if they were written out. (Outside any jit this compiles the layer anew at each call.)
    called, out = jax.jit(run), []
    for i, own in enumerate(parameters):
        h, y = called(h, (own, jax.tree.map(lambda x, i=i: x[i], inputs)))
        out.append(y)
    return h, jax.tree.map(lambda *ys: jnp.stack(ys), *out)


def as_used(parameters: Any, dtype: Any) -> Any:
    """Matrices in the type they are multiplied in: of what a scan stacks, half the copy, and half of what is gathered over devices."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, parameters)
