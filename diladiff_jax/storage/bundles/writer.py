"""Exporting a trained experiment as a bundle."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from diladiff_jax import files
from diladiff_jax.config import Config
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.stages import ENCODER, STAGES
from diladiff_jax.storage import pretrained
from diladiff_jax.storage.bundles.format import (
    STATISTICS,
    FileEntry,
    Manifest,
    StageEntry,
    tensor_name,
)
from diladiff_jax.storage.bundles.reader import Bundle
from diladiff_jax.storage.bundles.settings import portable_settings
from diladiff_jax.storage.errors import CheckpointError

_FILE_BYTES = 4 << 30
"""Size of the tensors in one file: how much `export` holds in host memory at a time, and what file
systems and hubs accept."""


class TrainedExperiment(Protocol):
    """What `export` needs; `diladiff_jax.experiment.Experiment` provides it."""

    config: Config
    workdir: pathlib.Path
    tokenizer: Tokenizer

    @property
    def features_directory(self) -> pathlib.Path:
        """The folder of the published encoder's files, if the config uses one."""
        ...

    def trained_steps(self, stage: str) -> int:
        """How many updates a stage was trained for."""
        ...

    def restore(self, stage: str) -> Any:
        """The trained parameters of a stage, on the devices."""
        ...

    def restore_statistics(self) -> Any:
        """The statistics of features and latents, on the devices."""
        ...


def export(
    experiment: TrainedExperiment,
    out: str | os.PathLike[str],
    *,
    stages: tuple[str, ...] | None = None,
    dtype: Any = np.float32,
) -> pathlib.Path:
    """Writes a bundle to a temporary folder and renames it to `out`.

    Tensors move from the devices to the host one file at a time and are then deleted on both. No
    device ever holds all of a tensor that the experiment's mesh shards. The paths and hub names in
    the config are reduced to their last parts.

    Args:
      experiment: the experiment to export.
      out: the folder to create.
      stages: the stages to include; default all that are trained.
      dtype: of matrices, float32 or bfloat16, which rounds and halves the size. Gains, biases and
        statistics stay in float32.

    Returns:
      The absolute path of the bundle.

    Raises:
      CheckpointError: a requested stage, or every stage, is not trained; a parameter is not
        finite; or `out` already exists or cannot be written.
    """
    import safetensors

    out = files.expand(out).absolute()
    if out.exists():
        raise CheckpointError(f"{out} already exists. Give a folder that does not.")
    steps = _steps_to_export(experiment, stages)
    try:
        with files.atomic_folder(out) as folder:
            _write(experiment, folder, steps, dtype)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{out} cannot be written ({reason}). Give a writable folder with enough space."
        ) from None
    return out


def _steps_to_export(
    experiment: TrainedExperiment, stages: tuple[str, ...] | None
) -> dict[str, int]:
    """`{stage: updates}`. Raises CheckpointError if a requested stage, or every one, has none."""
    steps = {stage: experiment.trained_steps(stage) for stage in stages or STAGES}
    for stage in stages or ():
        if not steps[stage]:
            raise CheckpointError(
                f"stage {stage} is not trained in {experiment.workdir}. "
                f"Train it first, or export without it."
            )
    trained = {stage: count for stage, count in steps.items() if count}
    if not trained:
        raise CheckpointError(
            f"{experiment.workdir} has no trained stage. "
            f"Run launch/train.py --workdir={experiment.workdir} --stage=all first."
        )
    return trained


def _write(
    experiment: TrainedExperiment, folder: pathlib.Path, steps: dict[str, int], dtype: Any
) -> None:
    settings = portable_settings(experiment.config)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    experiment.tokenizer.save(folder / "tokenizer")
    if settings["features"]["source"] == "bert":
        pretrained.adopt(str(experiment.features_directory), folder / "features")
    stages = {
        stage: StageEntry(count, _save_tree(folder, stage, experiment.restore(stage), dtype))
        for stage, count in steps.items()
    }
    if ENCODER[0] in steps:
        _save_tree(folder, STATISTICS, experiment.restore_statistics(), np.float32)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    Manifest({name: FileEntry.of(folder / name) for name in names}, stages).write(folder)
    Bundle(folder).check()  # that the reader accepts it


def _save_tree(folder: pathlib.Path, stem: str, tree: Any, dtype: Any) -> list[str]:
    """Writes the arrays of a tree, deletes them from the devices, and returns the file names."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    parts = list(_split({tensor_name(path): leaf for path, leaf in leaves}))
    names = [f"{stem}.safetensors"]
    if len(parts) > 1:
        names = [f"{stem}-{i}-of-{len(parts)}.safetensors" for i in range(1, len(parts) + 1)]
    for name, part in zip(names, parts, strict=True):
        _save_part(folder / name, stem, part, dtype)
    return names


def _save_part(path: pathlib.Path, stem: str, part: dict[str, Any], dtype: Any) -> None:
    from safetensors.numpy import save_file

    for key, leaf in part.items():
        if not np.isfinite(np.asarray(leaf)).all():
            raise CheckpointError(
                f"{stem} has non-finite values in {key}. A model that diverged cannot be exported."
            )
    arrays = {
        # safetensors ignores strides, so arrays must be contiguous.
        key: np.asarray(leaf).astype(dtype if leaf.ndim > 1 else np.float32, order="C")
        for key, leaf in part.items()
    }
    save_file(arrays, path)
    for leaf in part.values():
        leaf.delete()  # and with it the copy on the host that jax caches
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def _split(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Consecutive leaves of at most `_FILE_BYTES` in float32; a larger leaf is on its own."""
    part: dict[str, Any] = {}
    size = 0
    for key, leaf in leaves.items():
        if part and size + 4 * leaf.size > _FILE_BYTES:
            yield part
            part, size = {}, 0
        part[key] = leaf
        size += 4 * leaf.size
    yield part
