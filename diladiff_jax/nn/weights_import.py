"""What importing published weights shares: reading config.json, and assembling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array

Source = tuple[str, Callable[[np.ndarray], np.ndarray]]
"""Where a parameter comes from: a tensor's name, and the function to apply to the tensor."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
"""Activations by their names in config.json. Plain "gelu" is the exact one, x Phi(x)."""


def read_number(config: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Reads a number from a config.json.

    Raises:
      ValueError: the value is missing without a default, of another kind, not positive, or above a
        sanity limit (1,024 layers; 2^24 for everything else).
    """
    value, most = config.get(name, default), 1024 if "layer" in name else 2**24
    if (
        kind is float
        and isinstance(value, int)
        and not isinstance(value, bool)
        and abs(value) <= most
    ):
        value = float(value)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (kind is int and not 1 <= value <= most)
        or (kind is float and not 0 < value <= most)
    ):
        words = {
            int: f"a whole number from 1 to {most}",
            float: f"a number above 0 and at most {most}",
        }[kind]
        raise ValueError(f"{name}: got {repr(value)[:100]}, expected {words}")
    return value


def read_choice(
    config: Mapping[str, Any], name: str, default: Any, allowed: tuple[Any, ...]
) -> Any:
    """Reads a value from a config.json that must be one of `allowed`.

    Raises:
      ValueError: it is something else.
    """
    value = config.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected {' or '.join(map(repr, allowed))}")
    return value


def assemble_parameters(
    tensors: Mapping[str, np.ndarray], sources: Mapping[str, Source], shapes: Any, prefix: str
) -> dict[str, Any]:
    """Assembles a float32 parameter tree from named tensors.

    Args:
      tensors: the tensors of a published file. Either all or none of their names start with
        `prefix`. Tensors that `sources` does not name are ignored.
      sources: the source of each parameter, by its "/"-joined path in the tree.
      shapes: a tree of arrays or shapes, which the result must match.
      prefix: what the file may put in front of every name, such as "bert.".

    Returns:
      The parameters as numpy arrays.

    Raises:
      ValueError: a tensor is missing, does not hold floating-point numbers, or has the wrong shape.
    """
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = [part.key for part in path]
        name, read = sources["/".join(keys)]
        found = next((n for n in (name, prefix + name) if n in tensors), None)
        if found is None:
            raise ValueError(
                f"tensor {name}: missing (with and without {prefix!r} in front), expected every "
                "layer of the network. Use a complete weights file."
            )
        tensor = tensors[found]
        if tensor.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            raise ValueError(
                f"tensor {found}: got {tensor.dtype.name}, expected float32, float16 or bfloat16"
            )
        value = read(tensor)
        if value.shape != leaf.shape:
            raise ValueError(
                f"tensor {found}: got shape {list(tensor.shape)}, which gives {list(value.shape)}, "
                f"expected {list(leaf.shape)} by the network's config"
            )
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.ascontiguousarray(value, dtype=np.float32)
    return tree


def identity(tensor: np.ndarray) -> np.ndarray:
    """The tensor itself."""
    return tensor


def transpose(tensor: np.ndarray) -> np.ndarray:
    """Transposes a matrix: PyTorch's linear layers store `[out, in]`, and ours `[in, out]`."""
    return tensor.T
