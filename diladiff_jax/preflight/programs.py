"""The programs that preflight compiles: a stage's training step and a model's sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import stages
from diladiff_jax.config import ConfigError
from diladiff_jax.experiment import Experiment
from diladiff_jax.parallel import sharding
from diladiff_jax.preflight.abstract import abstract_arrays, abstract_key
from diladiff_jax.sampling.sampler import Controls
from diladiff_jax.training.flops import model_flops
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.run import require_divisible
from diladiff_jax.training.state import compile_steps, init_state, state_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program to compile.

    Attributes:
      lower: traces and lowers it.
      parameters: shapes with shardings of all parameters that it receives.
      batch: examples per call, over all devices.
      flops: model FLOPs per call, over all devices; None means that the FLOPs counted in the
        compiled program are used instead.
      unknown_trips: see `hlo.program_costs`.
    """

    lower: Callable[[], jax.stages.Lowered]
    parameters: Any
    batch: int
    flops: float | None = None
    unknown_trips: tuple[float, ...] = ()


def train_step_program(experiment: Experiment, stage: str) -> Program:
    """The update of a stage, as the training loop compiles it.

    Raises:
      ConfigError: the batch cannot be sharded equally over the devices.
    """
    config: Any = experiment.config
    settings, mesh = config[stage], experiment.mesh
    objective = experiment.objective(stage)
    require_divisible(config, mesh, stage)
    tx = make_optimizer(settings, objective.group)
    dtype = jnp.dtype(config.memory.param_dtype)
    boxed = jax.eval_shape(
        lambda key: init_state(objective, tx, key, ema=settings.ema > 0, dtype=dtype),
        abstract_key(),
    )
    shardings = nn.unbox(state_shardings(boxed, mesh))
    state = abstract_arrays(nn.unbox(boxed), shardings)
    context = experiment.context(stage)
    tokens = jax.ShapeDtypeStruct(
        (settings.batch, config.data.length), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    update, _ = compile_steps(
        objective, tx, shardings, context, mesh, ema=settings.ema, accumulate=settings.accumulate
    )
    return Program(
        lambda: update.lower(state, context, tokens),
        (state.params, context.frozen),
        settings.batch,
        settings.batch * _flops_per_example(objective, state, context, config.data.length),
    )


def _flops_per_example(objective: Any, state: Any, context: Any, length: int) -> float:
    """Model FLOPs of a batch of one example; no product of a step contracts over examples."""

    def loss(params: Any, frozen: Any, statistics: Any, tokens: Any, key: Any, step: Any) -> Any:
        inputs = context.replace(frozen=frozen, statistics=statistics)
        return objective.loss(params, inputs, tokens, key, step)[0]

    return model_flops(
        loss,
        state.params,
        context.frozen,
        state.statistics or context.statistics,
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        abstract_key(),
        jax.ShapeDtypeStruct((), jnp.int32),
    )


def sampler_program(experiment: Experiment, model: str) -> Program:
    """The complete sampler of a model, at the config's batch and numbers of steps.

    It is the program that `Model` compiles, except that the number of latent steps is a constant,
    so that the trip count of the latent sampler's loop is known. The trip counts of the decoding
    loops depend on the sample; `decoding_trips` estimates them.

    Raises:
      ConfigError: there is no such model.
    """
    params, latent_steps = _sampler_inputs(experiment, model)
    config: Any = experiment.config
    settings, mesh, length = config.sampling, experiment.mesh, config.data.length
    batch = sharding.round_up(settings.batch, sharding.batch_devices(mesh))
    replicated, sharded = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    scalars = {
        name: jax.ShapeDtypeStruct((), dtype, sharding=replicated)
        for name, dtype in dict(
            decode_steps=jnp.int32,
            temperature=jnp.float32,
            top_p=jnp.float32,
            gamma=jnp.float32,
            threshold=jnp.float32,
            eta=jnp.float32,
            final_noise=jnp.float32,
        ).items()
    }
    sampler = stages.MODELS[model].sampler(experiment.sampler)
    source = stages.MODELS[model].source

    def sample(params: Any, key: Any, indices: Any, prompt: Any, given: dict[str, Any]) -> Any:
        controls = Controls(latent_steps=latent_steps, **given)
        return sampler.generate(source, params, key, indices, prompt, controls)

    jitted = jax.jit(
        sharding.on_mesh(sample, mesh),
        in_shardings=(None, replicated, sharded, sharded, replicated),
        out_shardings=sharded,
    )
    indices = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=sharded)
    prompt = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=sharded)
    return Program(
        lambda: jitted.lower(params, abstract_key(replicated), indices, prompt, scalars),
        params,
        batch,
        None,
        decoding_trips(batch, length, settings.decode_steps, settings.order),
    )


def _sampler_inputs(experiment: Experiment, model: str) -> tuple[dict[str, Any], int]:
    """(shapes of the parameters, number of latent steps) of a model's sampler."""
    try:
        record = stages.model_named(model)
    except ValueError as error:
        raise ConfigError(f"sampler: {error}") from None
    params = {name: experiment.restore_source(source) for name, source in record.parameters.items()}
    steps = record.latent_steps(experiment.sampler.options) if record.latent_steps else 1
    return params, steps


def decoding_trips(
    batch: int, length: int, steps: int, order: str = "random", *, rows: int = 256, draws: int = 64
) -> tuple[float, float]:
    """Trip counts of the two nested loops of `sampling.ancestral` without a prompt.

    The outer loop runs once for each decoding step in which some position is unmasked. The inner
    loop processes up to `rows` positions at a time, until the example with the most positions in
    this step is finished.

    Args:
      batch: examples per batch.
      length: tokens per example.
      steps: decoding steps.
      order: the unmasking order. For "random" the counts are means over random examples, in which
        every position is unmasked at a uniformly random step. With "confidence" every step
        processes all masked positions; "threshold" depends on the text and is counted the same.
      rows: positions that the inner loop processes at a time, over the batch.
      draws: number of random examples.

    Returns:
      (decoding steps, mean number of inner iterations per step).
    """
    size = max(1, min(length, rows // batch))
    if order == "count":
        return float(min(steps, length)), float(-(-max(1, length // steps) // size))
    if order in ("confidence", "threshold"):
        masked = length - length * np.arange(steps) // steps
        return float(steps), float(np.mean(-(-masked // size)))
    rng = np.random.default_rng(0)
    busy, rounds = [], []
    for _ in range(max(1, draws // batch)):
        counts = rng.multinomial(length, np.full(steps, 1.0 / steps), size=batch)
        most = counts.max(axis=0)
        busy.append(np.count_nonzero(most))
        rounds.append(np.mean(-(-most[most > 0] // size)))
    return float(np.mean(busy)), float(np.mean(rounds))
