"""Why a checkpoint cannot be restored: its arrays, compared with those that are asked for."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from diladiff_jax.storage.errors import CheckpointError

_KEY = "training/key"


def require_same_shapes(step_folder: pathlib.Path, args: Mapping[str, Any]) -> None:
    """Checks the shapes of arrays that are both stored and asked for.

    Args:
      step_folder: `STAGE/checkpoints/STEP`.
      args: Orbax's restore arguments by item name.

    Raises:
      CheckpointError: a shape differs.
    """
    stored = _stored_shapes(step_folder, args)
    for name, shape in _shapes_asked_for(args).items():
        found = stored.get(name, shape)
        if found == shape:
            continue
        if name == _KEY:
            raise CheckpointError(
                f"checkpoint {step_folder} is intact, but its random key has {found[0]} words, "
                f"expected {shape[0]}: it was trained with another random generator "
                f"(JAX_DEFAULT_PRNG_IMPL), and would continue with other numbers. Resume it with "
                f"the version that saved it, or train in a new workdir. It can be sampled as it is."
            )
        raise CheckpointError(
            f"checkpoint {step_folder} is intact, but its array {name} has shape "
            f"{_text(found)}, expected {_text(shape)} with these settings. Use the config that it "
            f"was trained with."
        )


def describe_failure(step_folder: pathlib.Path, args: Mapping[str, Any], reason: str) -> str:
    """The error of a restore that failed although no shape differs."""
    stored, asked = _stored_shapes(step_folder, args), _shapes_asked_for(args)
    lacking = sorted(asked.keys() - stored.keys())
    extra = sorted(stored.keys() - asked.keys())
    if stored and (lacking or extra):
        parts = [f"it lacks {lacking[0]}"] if lacking else []
        parts += [f"it also has {extra[0]}"] if extra else []
        return (
            f"checkpoint {step_folder} has other arrays than these settings ask for: "
            f"{' and '.join(parts)}. Use the config that it was trained with."
        )
    return (
        f"checkpoint {step_folder} cannot be read ({reason}). Nothing was changed. If a reread "
        f"fails too, restore a copy, or move that folder elsewhere to resume from the previous "
        f"checkpoint."
    )


def _text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _shapes_asked_for(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    trees = {name: arg.item for name, arg in args.items() if hasattr(arg, "item")}
    return _named_shapes({name: tree for name, tree in trees.items() if tree is not None})


def _stored_shapes(step_folder: pathlib.Path, args: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes by name; empty if the metadata cannot be read, which the restore itself reports."""
    found = {}
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        for name, arg in args.items():
            if getattr(arg, "item", None) is None or not (step_folder / name).is_dir():
                continue
            try:
                metadata: Any = reader.metadata(step_folder / name)
                found[name] = metadata.item_metadata.tree
            except Exception:  # bare exceptions, as of restores
                return {}
    return _named_shapes(found)


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
        if hasattr(leaf, "shape") and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
