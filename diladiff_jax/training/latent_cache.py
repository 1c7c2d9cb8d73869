"""Latents of all rows, computed once: in stages with a frozen encoder they never change.

    WORKDIR/latents/SPLIT.npy    float32 [rows, N, D]
    WORKDIR/latents/SPLIT.json   what they were made from

Both are derived: they may be removed at any time, and are made again when they are needed.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import files, stages
from diladiff_jax.console import say
from diladiff_jax.data.prepared import Prepared
from diladiff_jax.experiment import Experiment
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.objectives.encoding import TextEncoder
from diladiff_jax.parallel import sharding
from diladiff_jax.parallel.processes import run_on_process_zero

Array = jax.Array

_BATCH = 1024


class Latents:
    """The latents of rows, as a source of `data.pipeline.Batches`: `rows[i]` is float32 [N, D]."""

    def __init__(self, path: pathlib.Path) -> None:
        """Opens the file that `cached_latents` wrote."""
        self._latents = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._latents[index]

    def __getitems__(self, indices: Sequence[int]) -> np.ndarray:
        return self._latents[np.asarray(indices)]


def fingerprint(tree: Any) -> str:
    """A hash of the values of arrays, equal for any sharding of them.

    Each leaf contributes a sum of its bits, modulo 2^32, that weighs every place differently.
    """

    @jax.jit
    def sums(leaves: list[Array]) -> list[Array]:
        found = []
        for leaf in leaves:
            bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32).reshape(-1)
            places = jnp.arange(bits.size, dtype=jnp.uint32)
            weights = (2 * places + 1) * jnp.uint32(2654435761)
            found.append(jnp.sum((bits ^ (bits >> 15)) * weights, dtype=jnp.uint32))
        return found

    values = [int(value) for value in sums(jax.tree.leaves(tree))]
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def stage_latents(
    experiment: Experiment, stage: str, objective: Objective, context: Context, prepared: Prepared
) -> Latents | None:
    """The latents of a stage's rows, if its objective reads only them, and each more than once."""
    settings, split = experiment.config[stage], stages.stage_named(stage).rows
    rows, text_encoder = prepared.rows(split), getattr(objective, "text_encoder", None)
    if text_encoder is None or settings.steps * settings.batch <= len(rows):
        return None

    def log(text: str) -> None:
        if jax.process_index() == 0:
            say(f"{stage}: {text}")

    return cached_latents(
        experiment.workdir / "latents",
        split,
        rows,
        prepared.rows_folder.name,
        text_encoder,
        context,
        experiment.mesh,
        limit_gib=experiment.config.memory.latent_cache_gib,
        log=log,
    )


def cached_latents(
    folder: pathlib.Path,
    split: str,
    rows: Any,
    origin: str,
    text_encoder: TextEncoder,
    context: Context,
    mesh: jax.sharding.Mesh,
    *,
    limit_gib: float,
    log: Callable[[str], None],
) -> Latents | None:
    """The latents of all rows of a split; None if they would take more than `limit_gib` of disk.

    Process 0 writes the file, in a folder that all processes share.

    Args:
      folder: where they are kept.
      split: the split's name.
      rows: its rows of tokens.
      origin: a name that changes with the rows.
      text_encoder: computes the latents.
      context: what it reads.
      mesh: the devices; each encodes a part of every batch.
      limit_gib: the greatest size of the file.
      log: receives a line when the latents are computed.
    """
    encoder = text_encoder.encoder
    shape = (len(rows), encoder.num_latents, encoder.latent_dim)
    size = math.prod(shape) * 4
    if size > limit_gib * 2**30:
        return None
    frozen = {name: context.frozen[name] for name in ("features", "encoder")}
    record = {
        "rows": origin,
        "encoder": fingerprint([frozen, dict(context.statistics)]),
        "computed_in": jnp.dtype(encoder.dtype).name,
        "shape": list(shape),
    }
    path, described = folder / f"{split}.npy", folder / f"{split}.json"
    if not _is_current(path, described, record):
        log(f"latents of {len(rows)} rows are computed once ({size / 2**20:.0f} MiB)")
        batches = _encoded(rows, text_encoder, frozen, dict(context.statistics), mesh)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            described.unlink(missing_ok=True)
            with files.atomic_file(path, "wb") as out:
                header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(out, header)
                for batch in batches:
                    out.write(batch.tobytes())
            files.atomic_write_text(described, json.dumps(record) + "\n")
        else:
            for _ in batches:  # every process takes part in the computation
                pass
        run_on_process_zero(f"latents of {split}", lambda: None)
    return Latents(path)


def _is_current(path: pathlib.Path, described: pathlib.Path, record: dict[str, Any]) -> bool:
    """Whether the file is complete and was made from the same rows and networks."""
    try:
        same = json.loads(described.read_text()) == record
        return same and list(np.load(path, mmap_mode="r").shape) == record["shape"]
    except (OSError, ValueError):
        return False


def _encoded(
    rows: Any,
    text_encoder: TextEncoder,
    frozen: dict[str, Any],
    statistics: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> Any:
    """Latents of consecutive batches of rows, each complete in every process."""
    encode = jax.jit(
        sharding.on_mesh(text_encoder.__call__, mesh), out_shardings=sharding.replicated(mesh)
    )
    size = sharding.round_up(min(_BATCH, len(rows)), sharding.batch_devices(mesh))
    places = sharding.local_rows(mesh, size)
    ahead = None
    for first in range(0, len(rows), size):
        indices = [min(first + place, len(rows) - 1) for place in places]
        tokens = np.stack(rows.__getitems__(indices))
        found = encode(frozen, statistics, sharding.batch_array(mesh, tokens, size))
        if ahead is not None:
            yield np.asarray(ahead)
        ahead = found[: len(rows) - first]
    yield np.asarray(ahead)
