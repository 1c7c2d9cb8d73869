"""Times the update of every stage, and its parts.

For each stage: the loss, the loss with its gradient, the optimizer, and the whole update.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import config as config_lib
from diladiff_jax import preflight, stages
from diladiff_jax.benchmark.sizes import experiment_config
from diladiff_jax.benchmark.timing import (
    Program,
    compile_program,
    device_peak,
    matmul_rate,
    time_run,
)
from diladiff_jax.jax_settings import random_key
from diladiff_jax.parallel import sharding
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.state import TrainState, init_state, make_train_step

PIECES = ("loss", "gradient", "optimizer", "update")


@dataclasses.dataclass(frozen=True)
class TrainingBenchmark:
    """What to time.

    Attributes:
      size: one of `SIZES`.
      batch: texts in an update.
      rounds: how often each part runs, in turns.
      length: tokens per text; None takes that of the size.
      dtype: what networks compute in, "float32" or "bfloat16".
    """

    size: str
    batch: int
    rounds: int
    length: int | None = None
    dtype: str = "float32"


def run(benchmark: TrainingBenchmark) -> dict[str, Any]:
    """Runs the benchmark on one device.

    `fraction_of_matmul_rate` of a row counts the products that the model needs, not what a program
    computes in addition. All updates of the prior are self-conditioned here; in training half of
    them are.

    Returns:
      The machine, and a row for each stage.
    """
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, sharding.available_devices()[:1])
    experiment = preflight.AbstractExperiment(_config(benchmark), mesh)
    rates, rows = [matmul_rate(benchmark.dtype)], []
    for stage in _stages():
        rows.append(_stage_row(benchmark, experiment, stage))
        rates.append(matmul_rate(benchmark.dtype))
    for row in rows:
        row["fraction_of_matmul_rate"] = row["model_flops"] / row["seconds"] / max(rates)
    machine = {
        "device": sharding.available_devices()[0].device_kind,
        "count": 1,
        "matmul_flops_per_second": max(rates),
    }
    return {"machine": machine, "rows": rows}


def _stages() -> list[str]:
    """The stages of the method, without the baselines."""
    return [name for name, stage in stages.STAGES.items() if not stage.baseline]


def _config(benchmark: TrainingBenchmark) -> Any:
    config = experiment_config(benchmark.size, length=benchmark.length, dtype=benchmark.dtype)
    settings = config.to_dict()
    for stage in _stages():
        settings[stage]["batch"] = benchmark.batch
    # Whether an update self-conditions is random, which would make its time random too.
    settings["ladiff"]["self_conditioning"] = 1.0
    return config_lib.resolve(settings)


def _options(experiment: preflight.AbstractExperiment) -> Any:
    """The config, whose settings have types that only the schema knows."""
    return experiment.config


def _programs(
    experiment: preflight.AbstractExperiment, stage: str
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """By part, the function to compile and its arguments."""
    objective, options = experiment.objective(stage), _options(experiment)[stage]
    tx = make_optimizer(options, objective.group)

    def init(key: jax.Array) -> TrainState:
        return nn.unbox(init_state(objective, tx, key, ema=options.ema > 0))

    state = jax.jit(init)(random_key(0))
    context = jax.tree.map(_random_like, experiment.context(stage))
    shape = (options.batch, _options(experiment).data.length)
    ids = np.random.default_rng(0).integers(0, experiment.tokenizer.mask_id - 2, shape)
    tokens = jnp.asarray(ids, jnp.int32)
    loss_context = context.replace(statistics=state.statistics) if state.statistics else context

    def loss(params: Any, context: Any, tokens: jax.Array) -> jax.Array:
        return objective.loss(params, context, tokens, random_key(1), jnp.int32(0))[0]

    def optimizer(gradients: Any, optimizer_state: Any, params: Any) -> Any:
        return tx.update(gradients, optimizer_state, params)

    update = make_train_step(objective, tx, ema=options.ema, accumulate=1)
    return {
        "loss": (loss, (state.params, loss_context, tokens)),
        "gradient": (jax.grad(loss), (state.params, loss_context, tokens)),
        "optimizer": (optimizer, (state.params, state.optimizer, state.params)),
        "update": (update, (state, context, tokens)),
    }


def _random_like(x: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape) * 0.1 + 1, x.dtype)


def _stage_row(
    benchmark: TrainingBenchmark, experiment: preflight.AbstractExperiment, stage: str
) -> dict[str, Any]:
    flops = preflight.train_step_program(experiment, stage).flops
    functions = _programs(experiment, stage)
    compiled: dict[str, Program] = {
        piece: compile_program(function, *arguments, with_cached=piece == "update")
        for piece, (function, arguments) in functions.items()
    }
    peak = device_peak(lambda: compiled["update"].run(*functions["update"][1]))
    times: dict[str, list[float]] = {piece: [] for piece in PIECES}
    for _ in range(benchmark.rounds):
        for piece in PIECES:
            times[piece].append(time_run(compiled[piece].run, *functions[piece][1])[0])
    middle = {piece: statistics.median(times[piece]) for piece in PIECES}
    update, length = compiled["update"], _options(experiment).data.length
    return {
        "suite": "training",
        "case": stage,
        "size": benchmark.size,
        "dtype": benchmark.dtype,
        "batch": benchmark.batch,
        "length": length,
        "vocab": experiment.tokenizer.vocab_size,
        "decode_steps": None,
        "latent_steps": None,
        "rounds": benchmark.rounds,
        "seconds": middle["update"],
        "seconds_low": min(times["update"]),
        "seconds_high": max(times["update"]),
        "loss_seconds": middle["loss"],
        "gradient_seconds": middle["gradient"],
        "optimizer_seconds": middle["optimizer"],
        "tokens_per_second": benchmark.batch * length / middle["update"],
        "latent_seconds": None,
        "decode_seconds": None,
        "peak_memory_bytes": update.temporary_bytes,
        "device_peak_bytes": peak,
        "compile_seconds_cold": update.cold_seconds,
        "compile_seconds_cached": update.cached_seconds,
        "model_flops": flops,
    }
