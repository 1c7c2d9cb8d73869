"""What the published networks (BERT, GPT-2) share: settings out of a config.json, parameters out of a file's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

Array = jax.Array
Source = tuple[
    str, Callable[[np.ndarray], np.ndarray]
]  # a tensor's name, and how the parameter comes out of it

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": lambda x: nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
"""The names of config.json; the plain "gelu" is the exact one, x Phi(x)."""


def setting(config: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of config.json; numbers must be above 0, and no larger than any network has (of layers 1,024).

    Raises:
      ValueError: missing without a default, or not of the kind.
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
            float: f"a number above 0, and {most} at most",
            str: "text",
        }[kind]
        raise ValueError(f"{name} is {repr(value)[:100]}; it must be {words}")
    return value


def require(config: Mapping[str, Any], name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """A value of config.json that must be one of `allowed`.

    Raises:
      ValueError: it is something else.
    """
    value = config.get(name, default)
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be {' or '.join(map(repr, allowed))}")
    return value


def assemble(
    tensors: Mapping[str, np.ndarray], sources: Mapping[str, Source], shapes: Any, prefix: str
) -> dict[str, Any]:
    """A parameter tree, float32, out of named tensors.

    Args:
      tensors: by the names of the published file, all with `prefix` or all without; others than `sources` asks for are left alone.
      sources: for each "/"-joined path in the tree where it comes from.
      shapes: the tree of arrays or shapes that it must match.

    Raises:
      ValueError: a tensor is missing, is not of floating point, or has another shape than the network.
    """
    tree: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = [part.key for part in path]
        name, read = sources["/".join(keys)]
        found = next((n for n in (name, prefix + name) if n in tensors), None)
        if found is None:
            raise ValueError(
                f"tensor {name} is missing (with and without {prefix!r} in front); the file must hold every layer of the network"
            )
        tensor = tensors[found]
        if tensor.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            raise ValueError(
                f"tensor {found} is {tensor.dtype.name}; it must be float32, float16 or bfloat16"
            )
        value = read(tensor)
        if value.shape != leaf.shape:
            raise ValueError(
                f"tensor {found} has shape {list(tensor.shape)}, which gives {list(value.shape)}; the network's config needs {list(leaf.shape)}"
            )
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = np.ascontiguousarray(value, dtype=np.float32)
    return tree


def as_it_is(tensor: np.ndarray) -> np.ndarray:
    """The tensor itself."""
    return tensor


def transposed(tensor: np.ndarray) -> np.ndarray:
    """PyTorch's linear layers keep `[out, in]`; ours `[in, out]`."""
    return tensor.T
