"""What a stage needs before its first update: keys, initial values, a clock, validation batches."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import stages
from diladiff_jax.config import Config, ConfigError
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepared import Prepared
from diladiff_jax.jax_settings import random_key
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.parallel import sharding
from diladiff_jax.training.anomalies import TrainingError
from diladiff_jax.training.flops import model_flops
from diladiff_jax.training.state import TrainState
from diladiff_jax.training.throughput import Throughput, local_peak

Array = jax.Array


def stage_keys(seed: int, stage: str) -> Array:
    """Three keys of a stage: for its state, its validations and its previews."""
    return jax.random.split(jax.random.fold_in(random_key(seed), _fold_of_name(stage)), 3)


def data_seed(seed: int, stage: str) -> int:
    """The seed of a stage's batch order."""
    return seed + _fold_of_name(stage)


def _fold_of_name(stage: str) -> int:
    """31 bits of the stage's name: other stages, registered before or after, do not change it."""
    return zlib.crc32(stage.encode()) >> 1


def start_from(state: TrainState, start: stages.Start, source: Any) -> TrainState:
    """Merges trained parameters into an initial state: parameters and average alike."""
    merged = start.merge(state.params, source)

    def copied(like: Any) -> Any:
        # Copies in our types and shardings: the state is donated, the source may be in use.
        return jax.tree.map(
            lambda new, old: jax.device_put(jnp.array(new, old.dtype, copy=True), old.sharding),
            merged,
            like,
        )

    average = None if state.ema is None else copied(state.ema)
    return state.replace(params=copied(state.params), ema=average)


def stage_throughput(
    objective: Objective,
    settings: Config,
    context: Context,
    abstract: TrainState,
    rows: jax.ShapeDtypeStruct,
    length: int,
    mesh: jax.sharding.Mesh,
) -> Throughput:
    """The clock of a stage; model FLOPs are counted only if the devices' peak rate is known.

    `rows` are the shapes of a batch: of tokens, or of latents that were computed before.
    """
    flops, peak = None, local_peak()
    if peak:
        context = context.replace(statistics=abstract.statistics or context.statistics)
        flops = model_flops(
            functools.partial(objective.loss, step=jnp.zeros((), jnp.int32)),
            abstract.params,
            context,
            rows,
            jax.eval_shape(lambda: random_key(0)),
            expensive_branch_probability=getattr(objective, "expensive_branch_probability", 1.0),
        )
    return Throughput(settings.batch * length, mesh.size, flops, peak)


def require_memory(stage: str, abstract: TrainState, shardings: TrainState) -> None:
    """Raises ConfigError if a device cannot hold its shard of the state.

    On CPUs, XLA would end the process with a signal instead of an exception.
    """
    leaves = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    needed = sum(
        math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, placed in leaves
    )
    available = sharding.device_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"stage {stage}: parameters, average and optimizer need {needed / 2**30:.1f} GiB per "
            f"device, which has {available / 2**30:.1f}. Make the network smaller, or shard it "
            f"over more devices (mesh.fsdp, mesh.tensor)."
        )


def start_notes(
    rows: int, batch: int, abstract: TrainState, shardings: TrainState, mesh: jax.sharding.Mesh
) -> list[str]:
    """What the user of a stage may not expect: a small corpus, or replicated parameters."""
    notes = []
    if rows < batch:
        notes.append(
            f"the corpus has {rows} rows, so a batch of {batch} contains each of them about "
            f"{batch / rows:.1f} times"
        )
    replicated = sharding.replicated_parameters(abstract.params, shardings.params, mesh)
    if replicated:
        names = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in replicated)
        notes.append(f"replicated although fsdp x tensor could shard them: {names}")
    return notes


def mean_metrics(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each metric."""
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def validation_batches(
    prepared: Prepared, config: Config, batch: int, mesh: jax.sharding.Mesh
) -> Callable[[Array], Iterator[tuple[Array, Array]]]:
    """`key -> (batch, key)`: the same first validation rows and keys at every call.

    Raises:
      TrainingError: there are fewer rows than devices.
    """
    rows, devices = prepared.rows("validation"), sharding.batch_devices(mesh)
    size = min(batch, len(rows)) // devices * devices
    if not size:
        raise TrainingError(
            f"data.validation_fraction: got {len(rows)} validation rows, expected at least one per "
            f"device ({devices}). Hold out more text."
        )
    total = size * config.logging.validation_batches
    fixed: Any = Batches.fixed(rows, size, total, sharding.local_rows(mesh, size))

    def batches(key: Array) -> Iterator[tuple[Array, Array]]:
        for i in range(len(fixed)):
            yield sharding.batch_array(mesh, fixed[i], size), jax.random.fold_in(key, i)

    return batches
