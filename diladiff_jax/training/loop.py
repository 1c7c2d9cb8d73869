"""The one train loop that runs every stage."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diladiff_jax import config as config_lib
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepare import Prepared, load_prepared, prepare
from diladiff_jax.data.tokenizers import printable
from diladiff_jax.experiment import (
    Experiment,
    check_source,
    last_checkpoint,
    not_trained,
    remember_source,
    require_source,
    trained_steps,
)
from diladiff_jax.objectives.base import Context, Objective
from diladiff_jax.objectives.diladiff import student_from_teacher
from diladiff_jax.parallel import sharding
from diladiff_jax.parallel.processes import Preempted, StopSignal, run_on_process_zero
from diladiff_jax.storage import config_file, pretrained
from diladiff_jax.storage.checkpoints import Checkpoints, quarantine_corrupt, require_intact
from diladiff_jax.training.anomalies import TrainingError, Watch
from diladiff_jax.training.flops import model_flops
from diladiff_jax.training.metrics import MetricsWriter, Progress
from diladiff_jax.training.optimizer import make_optimizer
from diladiff_jax.training.preview import make_preview
from diladiff_jax.training.state import (
    TrainState,
    compile_steps,
    init_state,
    is_finite,
    state_shardings,
)
from diladiff_jax.training.throughput import Throughput, local_peak

Array = jax.Array


def train(
    config: ConfigDict,
    workdir: str | pathlib.Path,
    stages: tuple[str, ...],
    *,
    init_from: str | pathlib.Path | None = None,
    stop_at: int | None = None,
) -> None:
    """Trains the given stages in order; a finished one is passed over, a stopped one goes on where it was.

    Initialization of a stage: its own checkpoint in the workdir; else its predecessors', in the workdir or, where
    it lacks them, in the workdir `init_from`; else from scratch (the first stage and the baselines).
    `stop_at` ends a stage early after that many steps, as an interruption at a checkpoint would.

    Raises:
      ConfigError, DataError, PretrainedError, CheckpointError, TrainingError: bad settings, text, published files, checkpoints, or numbers.
      Preempted: SIGTERM or Ctrl-C came, and everything is saved.
    """
    main = jax.process_index() == 0

    for stage in stages:
        if not config[stage].steps:
            raise config_lib.ConfigError(
                f"config key {stage}.steps is 0; it must be above 0 to train that stage"
            )
    mesh = make_mesh(config)

    def prepare_all() -> None:
        # What can be refused is, before anything is written, and before text is prepared, which may take hours.
        config_file.require_own(config, workdir)
        there, locked = pathlib.Path(workdir).is_dir(), False
        if there:
            locked = held.enter_context(workdir_lock(pathlib.Path(workdir)))
        for stage in stages:
            quarantine_corrupt(
                pathlib.Path(workdir) / stage / "checkpoints", lambda text: print(text, flush=True)
            )
        if init_from is not None:
            check_source(workdir, init_from)
        # Of several stages those that the source has are passed over; one alone is trained here.
        own = [
            stage
            for stage in stages
            if len(stages) == 1 or trained_steps(workdir, stage, init_from) < config[stage].steps
        ]
        if init_from is not None:
            config_file.require_taken(config, init_from, own[0] if own else stages[-1])
        else:
            require_source(workdir)
        for stage in own:
            _require_divisible(config, mesh, stage)
        first = config_lib.PREDECESSOR[stages[0]] if stages else None
        if first is not None and not trained_steps(workdir, first, init_from):
            raise not_trained(workdir, first)
        config_file.save(config, workdir, first=True)
        if not there:
            locked = held.enter_context(workdir_lock(pathlib.Path(workdir)))
        if init_from is not None:
            remember_source(workdir, init_from)
        if (
            jax.process_count() > 1
        ):  # alone, a process looks when it restores; one of several that stopped there would leave the others waiting
            read = list(stages)
            while first is not None:
                read, first = [*read, first], config_lib.PREDECESSOR[first]
            for stage in read:
                folder = last_checkpoint(workdir, stage)
                # Its own have been looked at; a bundle's are when they are read.
                if folder.is_dir() and (
                    stage not in stages or folder.parents[2] != pathlib.Path(workdir)
                ):
                    require_intact(folder, ("params", "ema", "statistics"))
        if config.features.source == "bert":
            pretrained.adopt(config.features.path, pathlib.Path(workdir) / "features")
        prepare(config.data, config.tokenizer, workdir, alone=locked)

    with contextlib.ExitStack() as held:
        run_on_process_zero("prepare", prepare_all)
        prepared = load_prepared(config.data, workdir)
        experiment = Experiment(config, workdir, prepared.tokenizer, mesh)
        with StopSignal() as stop_signal:
            for stage in stages:
                steps = config[stage].steps
                # A stage that is asked for by name is trained here, even where the workdir that we start from has it.
                if experiment.trained_steps(stage, own=len(stages) == 1) >= steps:
                    if main:
                        print(f"{stage}: trained already ({steps} steps)", flush=True)
                    continue
                previous = config_lib.PREDECESSOR[stage]
                stands = (
                    0 if previous is None else experiment.trained_steps(previous, own=True)
                )  # how long a lent one was trained is its lender's affair
                if 0 < stands < config[previous].steps:
                    raise TrainingError(
                        f"stage {previous} in {workdir} stands at step {stands} of {config[previous].steps}; "
                        f"finish it before {stage} (launch/train.py --stage={previous})"
                    )
                if stop_signal.agreed:  # restoring and compiling the next stage may take longer than the scheduler waits
                    raise Preempted(
                        f"stopped by {stop_signal.name} before stage {stage}; the same command goes on",
                        interrupted_by_user=stop_signal.interrupted_by_user,
                    )
                state = train_stage(experiment, prepared, stage, stop_signal, stop_at=stop_at)
                if int(state.step) < steps:  # stop_at: what would follow needs a finished stage
                    break
            if main:  # where all was trained before
                config_file.save(config, workdir)


@contextlib.contextmanager
def workdir_lock(workdir: pathlib.Path) -> Iterator[bool]:
    """Holds the workdir's lock, which ends with the process, however that ends; gives False on file systems without locks, which go without.

    Raises:
      TrainingError: another training or preparation has it.
    """
    locked = True
    with contextlib.ExitStack() as opened:
        try:
            fcntl.flock(
                opened.enter_context((workdir / "training.lock").open("a")),
                fcntl.LOCK_EX | fcntl.LOCK_NB,
            )
        except BlockingIOError:
            raise TrainingError(
                f"another training or preparation runs in {workdir} (training.lock is held); wait for it or end it, or give another workdir"
            ) from None
        except OSError:  # no locks, or no writing, of which training itself has more to say
            locked = False
        yield locked


def make_mesh(config: ConfigDict) -> jax.sharding.Mesh:
    """The config's mesh over all devices.

    Raises:
      ConfigError: its sizes do not fit the devices.
    """
    try:
        return sharding.make_mesh(config.mesh)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from None


def train_stage(
    experiment: Experiment,
    prepared: Prepared,
    stage: str,
    stop_signal: StopSignal,
    *,
    stop_at: int | None = None,
) -> TrainState:
    """Runs one stage to its last step (or `stop_at`) and returns the final state. See `train`."""
    config, settings, mesh = experiment.config, experiment.config[stage], experiment.mesh
    objective = experiment.objective(stage)
    tx = make_optimizer(settings, objective.group)

    # 1. Shapes first, then shardings, then arrays born in place.
    stage_key = jax.random.fold_in(jax.random.key(config.seed), _stage_number(stage))
    key, validation_key, preview_key = jax.random.split(stage_key, 3)

    def fresh(key: Array) -> TrainState:
        return init_state(
            objective, tx, key, ema=settings.ema > 0, dtype=jnp.dtype(config.memory.param_dtype)
        )

    boxed = jax.eval_shape(fresh, key)
    shardings, abstract = state_shardings(boxed, mesh), nn.unbox(boxed)
    shardings = nn.unbox(shardings)
    _require_memory(stage, abstract, shardings)
    context = experiment.context(stage)

    # 2. Where it stood, or a start from the predecessor.
    rows = prepared.rows("scorer" if stage == "scorer" else "train")
    batches = Batches(
        rows,
        settings.batch,
        config.seed + _stage_number(stage),
        sharding.local_rows(mesh, settings.batch),
    )
    checkpoints, skipped = (
        Checkpoints(experiment.own_directory(stage), keep=config.logging.keep_checkpoints),
        0,
    )
    if checkpoints.latest_step() is not None:
        state, position = checkpoints.restore(
            abstract, shardings, verify=False
        )  # `quarantine_corrupt` has looked
        batches.set_state(position)
        skipped = position.get("skipped", 0)
    else:
        state = jax.jit(lambda key: nn.unbox(fresh(key)), out_shardings=shardings)(key)
        state = start_from_predecessor(state, stage, context)
    context = context.replace(
        frozen={name: tree for name, tree in context.frozen.items() if name != "start"}
    )  # its memory is free again
    start, stop = int(state.step), min(settings.steps, stop_at or settings.steps)

    # 3. The loop: dispatch a step, then look at the one before it, so that the device never waits.
    train_step, validate = compile_steps(
        objective, tx, shardings, context, mesh, ema=settings.ema, accumulate=settings.accumulate
    )
    main = jax.process_index() == 0
    progress = Progress(stage, start, settings.steps, out=main)
    if start:
        progress.say(
            f"{stage}: goes on from step {start} of {settings.steps}"
            + (f", which is not below stop_at = {stop_at}" if start >= stop else "")
        )
    if len(rows) < settings.batch:
        progress.say(
            f"{stage}: there are {len(rows)} rows, so that a batch of {settings.batch} holds each of them about {settings.batch / len(rows):.1f} times"
        )
    writer = MetricsWriter(experiment.workdir / stage / "metrics", progress.say) if main else None
    validation = _validation_batches(prepared, config, settings.batch, mesh)
    preview = (
        make_preview(experiment, stage, prepared)
        if config.logging.samples and stage != "scorer"
        else None
    )
    if main:  # all that can be refused has been looked at
        config_file.save(config, experiment.workdir)
    log, window, pending, profiling, due = config.logging, [], None, False, False
    watch = Watch(
        stage,
        experiment.workdir / stage / "skipped",
        config.logging.max_skips,
        progress.say,
        skipped=skipped,
    )
    sound = jax.jit(is_finite, out_shardings=sharding.replicated(mesh))
    throughput = _throughput(objective, settings, context, abstract, prepared.length, mesh)
    whole = sharding.replicated_parameters(abstract.params, shardings.params, mesh)
    if whole:
        progress.say(
            f"{stage}: on every device whole, though fsdp x tensor could cut them: "
            + ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for name, size in whole)
        )

    def look() -> None:
        if (found := watch.look(*pending)) is not None:
            window.append(found)

    try:
        for step in range(start, stop):
            tokens = sharding.batch_array(mesh, next(batches), settings.batch)
            if step == log.profile_at and log.profile_steps:
                jax.profiler.start_trace(str(experiment.workdir / stage / "profile"))
                profiling = True
            state, metrics = train_step(state, context, tokens)
            if step == start:
                gc.collect()  # of compiling: 200 MiB for a tiny network, which Python would come to thousands of steps later
            throughput.updated()
            if profiling and (step + 1 == log.profile_at + log.profile_steps or step + 1 == stop):
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()
                profiling = False
            if pending is not None:
                look()
            pending, done = (step, metrics, tokens), step + 1
            told = stop_signal.reached()
            last, due = done == stop, due or done % log.checkpoint_every == 0
            if last or told or due:  # nothing is saved before it was looked at
                look()
                pending = None
            if (done % log.metrics_every == 0 or last or told) and window:
                means = {name: float(np.mean([m[name] for m in window])) for name in window[0]}
                window.clear()
                if writer:
                    writer.write(
                        done, means | {"skipped": watch.skipped} | throughput.lap(), "train"
                    )
                progress.advance(done, means)
            else:
                progress.advance(done, {})
            if last or (done % log.validate_every == 0 and not told):
                with throughput.paused():
                    values = _mean_metrics(validate, state, context, validation(), validation_key)
                    if writer:
                        writer.write(done, values, "validation")
                    progress.say(
                        f"{stage} {done}: validation "
                        + ", ".join(f"{k} {v:.4g}" for k, v in values.items())
                    )
                    if last and not math.isfinite(values["loss"]):
                        raise TrainingError(
                            f"the validation loss of stage {stage} is {values['loss']} after step {done}; that is not saved ({checkpoints.last()}), and a lower learning rate may help"
                        )
                    if preview is not None:
                        for text in preview(state, preview_key):
                            progress.say("  | " + printable(text).replace("\n", "\n  | "))
            # While updates are skipped what they start from may be what is wrong: it must not push out the checkpoints of before.
            save = done == settings.steps or ((last or told or due) and not watch.in_a_row)
            if save:
                with throughput.paused():
                    if not sound(state):
                        raise TrainingError(
                            f"parameters of stage {stage} are not finite after step {done}; that is not saved ({checkpoints.last()}), and a lower learning rate may help"
                        )
                    checkpoints.save(state, batches.get_state() | {"skipped": watch.skipped})
                due = False
            if told or (last and not save):
                saved = (
                    "which is saved"
                    if save
                    else f"which was skipped and is not saved ({checkpoints.last()})"
                )
                if not last:
                    raise Preempted(
                        f"stage {stage} was stopped by {stop_signal.name} after step {done}, {saved}; the same command goes on",
                        interrupted_by_user=stop_signal.interrupted_by_user,
                    )
                progress.say(f"stage {stage} ends at step {done}, {saved}")
        return state
    finally:
        if profiling:
            jax.profiler.stop_trace()
        with (
            contextlib.ExitStack() as closing
        ):  # all of them, whichever fails; the checkpoints first
            for opened in (writer, progress, batches, checkpoints):
                if opened is not None:
                    closing.callback(opened.close)


def _require_divisible(config: ConfigDict, mesh: jax.sharding.Mesh, stage: str) -> None:
    """Raises ConfigError where a microbatch of the stage cannot be cut into equal parts for the devices."""
    parts = sharding.batch_devices(mesh) * config[stage].accumulate
    if config[stage].batch % parts:
        raise config_lib.ConfigError(
            f"config key {stage}.batch is {config[stage].batch}; it must be a multiple of data x fsdp devices x accumulate = {parts}"
        )


def start_from_predecessor(state: TrainState, stage: str, context: Context) -> TrainState:
    """Puts trained networks of the stage before into a fresh state (parameters and average alike)."""
    params = state.params
    if stage == "autoencoder":
        decoder = {**params["decoder"], "backbone": context.frozen["start"]}
        params = {**params, "decoder": decoder}
    elif stage == "mdlm_long":
        params = context.frozen["start"]
    elif stage == "diladiff":
        params = student_from_teacher(params, context.frozen["teacher"])
    else:
        return state

    # Copies: the state is donated, the frozen networks are not.
    def copied(like: Any) -> Any:
        return jax.tree.map(
            lambda new, old: jax.device_put(jnp.array(new, old.dtype, copy=True), old.sharding),
            params,
            like,
        )

    return state.replace(
        params=copied(state.params), ema=None if state.ema is None else copied(state.ema)
    )


def _throughput(
    objective: Objective,
    settings: ConfigDict,
    context: Context,
    abstract: TrainState,
    length: int,
    mesh: jax.sharding.Mesh,
) -> Throughput:
    """The clock of a stage; the model's FLOPs are counted where the devices' rate, and so a utilization, is known."""
    flops, peak = None, local_peak()
    if peak:
        context = context.replace(statistics=abstract.statistics or context.statistics)
        expensive_branch_probability = getattr(objective, "expensive_branch_probability", 1.0)
        tokens, key = (
            jax.ShapeDtypeStruct((settings.batch, length), jnp.int32),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        flops = model_flops(
            lambda *args: objective.loss(*args, jnp.zeros((), jnp.int32)),
            abstract.params,
            context,
            tokens,
            key,
            expensive_branch_probability=expensive_branch_probability,
        )
    return Throughput(settings.batch * length, mesh.size, flops, peak)


def _require_memory(stage: str, abstract: TrainState, shardings: TrainState) -> None:
    """Raises ConfigError where a device cannot hold its part of the state: XLA would end the process with a signal, not an exception, on CPUs."""
    parts = zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    needed = sum(
        math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in parts
    )
    there = sharding.device_memory()
    if there is not None and needed > there:
        raise config_lib.ConfigError(
            f"stage {stage} keeps {needed / 2**30:.1f} GiB of parameters, average and optimizer on every device, which has {there / 2**30:.1f}; "
            f"make its network smaller, or cut it over more devices (mesh.fsdp, mesh.tensor)"
        )


def _stage_number(stage: str) -> int:
    return (config_lib.STAGES + config_lib.BASELINES).index(stage)


def _validation_batches(
    prepared: Prepared, config: ConfigDict, batch: int, mesh: jax.sharding.Mesh
) -> Callable[[], Iterator[Array]]:
    """The same first validation rows every time, in batches that the devices divide."""
    rows, devices = prepared.rows("validation"), sharding.batch_devices(mesh)
    size = min(batch, len(rows)) // devices * devices
    if not size:
        raise TrainingError(
            f"{len(rows)} validation rows do not fill one batch on {devices} devices; hold out more (data.validation_fraction)"
        )
    fixed = Batches.fixed(
        rows, size, size * config.logging.validation_batches, sharding.local_rows(mesh, size)
    )
    return lambda: (sharding.batch_array(mesh, fixed[i], size) for i in range(len(fixed)))


def _mean_metrics(
    validate: Any, state: TrainState, context: Context, batches: Iterator[Array], key: Array
) -> dict[str, float]:
    found = []
    for i, tokens in enumerate(batches):
        found.append(jax.device_get(validate(state, context, tokens, jax.random.fold_in(key, i))))
    return {name: float(np.mean([m[name] for m in found])) for name in found[0]}
