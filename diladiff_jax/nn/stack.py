"""Runs identical layers in sequence: traced once and called per layer, or as one scanned layer.

Everywhere else, each layer keeps its own parameters under its own name, so checkpoints, optimizers
and published weights do not depend on how the layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Layer = Callable[[Array, Any, Any], tuple[Array, Any]]

REMAT: dict[str, Callable[..., bool]] = {
    "matmuls": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
"""What a rematerialized layer keeps for its gradient, by the value of `memory.remat`.

"matmuls" keeps the results of its linear maps, and recomputes attention. "full" keeps only the
layer's input.
"""


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
    """Runs `h, y = layer(h, parameters[i], inputs[i])` for each layer i in turn.

    Args:
      layer: a pure function, the same for all layers.
      h: the input of the first layer.
      parameters: one tree per layer, all of the same structure and shapes.
      inputs: a tree of arrays with a leading axis over the layers, or None.
      scan: whether to scan one compiled layer over stacked parameters. The size of the program then
        does not depend on the depth.
      remat: "none", or a key of `REMAT`.
      reverse: whether to read `inputs` from the last to the first.

    Returns:
      The output of the last layer, and the `y` of all layers with a leading axis, in the order in
      which the layers ran.
    """

    def run(h: Array, each: tuple[Any, Any]) -> tuple[Array, Any]:
        return layer(h, *each)

    if remat != "none":
        run = jax.checkpoint(run, policy=REMAT[remat], prevent_cse=not scan)
    if reverse:
        inputs = jax.tree.map(lambda x: x[::-1], inputs)
    if scan:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parameters)
        return jax.lax.scan(run, h, (stacked, inputs))
    # The inner jit traces the layer once for all calls; tracing took half of the startup time when
    # programs came from the compilation cache. XLA inlines the calls, so the compiled program is
    # the same. (Outside any jit, every call compiles the layer again.)
    called, out = jax.jit(run), []
    for i, own in enumerate(parameters):
        h, y = called(h, (own, jax.tree.map(lambda x, i=i: x[i], inputs)))
        out.append(y)
    return h, jax.tree.map(lambda *ys: jnp.stack(ys), *out)


def cast_matrices(parameters: Any, dtype: Any) -> Any:
    """Casts matrices, and no vectors, to the type that they are multiplied in.

    In bfloat16, this halves what a scan copies to stack the layers, and what is gathered over
    devices.
    """
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, parameters)
