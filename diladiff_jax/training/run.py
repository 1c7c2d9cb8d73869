"""A run of `launch/train.py`: validates and prepares everything first, then trains stages."""

from __future__ import annotations

import contextlib
import pathlib

import jax

from diladiff_jax import files
from diladiff_jax import stages as stages_lib
from diladiff_jax.config import Config, ConfigError
from diladiff_jax.console import say
from diladiff_jax.data.options import DataOptions, TokenizerOptions
from diladiff_jax.data.prepared import load_prepared, prepare
from diladiff_jax.experiment import Experiment
from diladiff_jax.jax_settings import under_pinned_settings
from diladiff_jax.parallel import sharding
from diladiff_jax.parallel.processes import Preempted, StopSignal, run_on_process_zero
from diladiff_jax.storage import config_file, lineage, origins, pretrained
from diladiff_jax.storage.quarantine import last_step, quarantine_corrupt, require_intact
from diladiff_jax.storage.workdir import workdir_lock
from diladiff_jax.training import continuation
from diladiff_jax.training.anomalies import TrainingError
from diladiff_jax.training.loop import train_stage


@under_pinned_settings
def train(
    config: Config,
    workdir: str | pathlib.Path,
    stages: tuple[str, ...],
    *,
    init_from: str | pathlib.Path | None = None,
    stop_at: int | None = None,
) -> None:
    """Trains stages in order. A finished stage is skipped; an interrupted one resumes.

    A stage starts from its own checkpoint in the workdir; else from its predecessor's, in the
    workdir or, if that lacks it, in `init_from`; else (the first stage and some baselines) from
    random parameters.

    Args:
      config: the checked experiment.
      workdir: the folder of the experiment; created if necessary.
      stages: names of stages.
      init_from: a workdir or bundle whose earlier stages are reused.
      stop_at: ends a stage after this many steps, as an interruption at a checkpoint would.

    Raises:
      ConfigError, DataError, PretrainedError, CheckpointError, WorkdirError, TrainingError: invalid
        settings, text, published files, checkpoints, workdir, or numbers that are not finite.
      Preempted: stopped by SIGTERM or Ctrl-C, after saving what can be saved.
    """
    workdir = files.expand(workdir)
    init_from = None if init_from is None else files.expand(init_from)
    for stage in stages:
        if not config[stage].steps:
            raise ConfigError(f"{stage}.steps: got 0, expected above 0 to train that stage")
    mesh = make_mesh(config)
    with contextlib.ExitStack() as held:  # the workdir's lock, until training ends
        run_on_process_zero(
            "prepare", lambda: _prepare(config, workdir, stages, init_from, mesh, held)
        )
        prepared = load_prepared(DataOptions.of(config.data), workdir)
        experiment = Experiment(config, workdir, prepared.tokenizer, mesh)
        with StopSignal() as stop_signal:
            for stage in stages:
                if _is_trained(experiment, stage, only=len(stages) == 1):
                    continue
                if stop_signal.agreed:  # compiling may take longer than the scheduler waits
                    raise Preempted(
                        f"stopped by {stop_signal.name} before stage {stage}; the same command "
                        f"resumes",
                        interrupted_by_user=stop_signal.interrupted_by_user,
                    )
                if jax.process_index() == 0:
                    continuation.announce(workdir, stage, config, say)
                    origins.record(workdir, stage, experiment.settings)
                state = train_stage(experiment, prepared, stage, stop_signal, stop_at=stop_at)
                if int(state.step) < config[stage].steps:
                    break  # stop_at: what follows needs a finished stage
            if jax.process_index() == 0:  # if every stage was trained before
                config_file.save(config, workdir)


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The config's mesh over all devices.

    Raises:
      ConfigError: its sizes do not fit the devices.
    """
    try:
        return sharding.make_mesh(config.mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def require_divisible(config: Config, mesh: jax.sharding.Mesh, stage: str) -> None:
    """Checks that the devices divide a microbatch of the stage.

    Raises:
      ConfigError: they do not.
    """
    settings = config[stage]
    parts = sharding.batch_devices(mesh) * settings.accumulate
    if settings.batch % parts:
        raise ConfigError(
            f"{stage}.batch: got {settings.batch}, expected a multiple of "
            f"data x fsdp devices x accumulate = {parts}"
        )


def _prepare(
    config: Config,
    workdir: pathlib.Path,
    stages: tuple[str, ...],
    init_from: pathlib.Path | None,
    mesh: jax.sharding.Mesh,
    held: contextlib.ExitStack,
) -> None:
    """Validates everything, then writes the workdir's config and prepares its text.

    Preparing text may take hours, so every other reason to stop comes before it.
    """
    config_file.require_own(config, workdir)
    existed, locked = workdir.is_dir(), False
    if existed:
        locked = held.enter_context(workdir_lock(workdir))
    _check_stages(config, workdir, stages, init_from, mesh)
    for note in config_file.continuation_notes(config, workdir):
        say(f"note: {note}")
    config_file.save(config, workdir, first=True)
    if not existed:
        locked = held.enter_context(workdir_lock(workdir))
    if init_from is not None:
        lineage.remember_source(workdir, init_from)
    if jax.process_count() > 1:
        _verify_checkpoints(workdir, stages)
    if config.features.source == "bert":
        pretrained.adopt(config.features.path, workdir / "features")
    data, tokenizer = DataOptions.of(config.data), TokenizerOptions.of(config.tokenizer)
    prepare(data, tokenizer, workdir, locked=locked)


def _check_stages(
    config: Config,
    workdir: pathlib.Path,
    stages: tuple[str, ...],
    init_from: pathlib.Path | None,
    mesh: jax.sharding.Mesh,
) -> None:
    """Checks checkpoints, the source of earlier stages, batches, and that predecessors exist."""
    for stage in stages:
        quarantine_corrupt(workdir / stage / "checkpoints", say)
    if init_from is not None:
        lineage.check_source(workdir, init_from)
    # Of several stages, those of the source are skipped; a single one is trained here.
    own = [
        stage
        for stage in stages
        if len(stages) == 1
        or lineage.trained_steps(workdir, stage, init_from) < config[stage].steps
    ]
    if init_from is not None:
        inherited = lineage.inherited_stages(workdir, init_from, own or stages[-1:])
        config_file.require_inherited(config, init_from, inherited)
    else:
        lineage.require_source(workdir)
    continuation.require_fitting(workdir, stages, own, config, init_from)
    for stage in own:
        require_divisible(config, mesh, stage)
    for stage in own:
        previous = stages_lib.stage_named(stage).predecessor
        if previous is None or previous in stages[: stages.index(stage)]:
            continue
        if not lineage.trained_steps(workdir, previous, init_from):
            raise lineage.not_trained_error(workdir, previous)


def _verify_checkpoints(workdir: pathlib.Path, stages: tuple[str, ...]) -> None:
    """Verifies the checkpoints that this run reads, before other processes depend on them.

    A single process verifies them when it restores. One of several that stopped there would leave
    the others waiting.
    """
    read = (name for stage in stages for name in (stage, *stages_lib.predecessors(stage)))
    for stage in dict.fromkeys(read):
        folder = lineage.last_checkpoint(workdir, stage)
        # `quarantine_corrupt` has verified this workdir's own; a bundle is verified on reading.
        inherited = folder.parents[2] != workdir
        if folder.is_dir() and (stage not in stages or inherited):
            require_intact(folder, ("params", "ema", "statistics"))


def _is_trained(experiment: Experiment, stage: str, *, only: bool) -> bool:
    """Whether the stage has all its steps already.

    Args:
      only: whether it is the only stage of the run, which is trained here even if the workdir that
        this one was started from has it.

    Raises:
      TrainingError: it is not, and neither is its predecessor in this workdir.
    """
    config = experiment.config

    def own_steps(stage: str) -> int:
        return last_step(experiment.checkpoints_directory(stage))

    trained = own_steps(stage) if only else experiment.trained_steps(stage)
    if trained >= config[stage].steps:
        if jax.process_index() == 0:
            say(f"{stage}: already trained ({trained} steps)")
        return True
    previous = stages_lib.stage_named(stage).predecessor
    # How long an inherited stage was trained is not checked.
    steps = 0 if previous is None else own_steps(previous)
    if previous is not None and 0 < steps < config[previous].steps:
        raise TrainingError(
            f"stage {previous} in {experiment.workdir} is at step {steps} of "
            f"{config[previous].steps}. Finish it before {stage} "
            f"(launch/train.py --stage={previous})."
        )
    return False
