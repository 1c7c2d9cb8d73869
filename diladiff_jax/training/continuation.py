"""What is checked and reported where a stage meets those that were trained before or after it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diladiff_jax.config import Config, ConfigError
from diladiff_jax.stages import STAGES, predecessors
from diladiff_jax.storage import config_file, lineage, origins
from diladiff_jax.storage.errors import CheckpointError
from diladiff_jax.storage.quarantine import last_step
from diladiff_jax.training.optimizer import decay_schedule


def require_fitting(
    workdir: pathlib.Path,
    stages: Sequence[str],
    own: Sequence[str],
    config: Config,
    source: pathlib.Path | None = None,
) -> None:
    """Checks that no trained stage of a run would meet predecessors that it was not trained with.

    Args:
      workdir: the workdir.
      stages: the stages of the run.
      own: those of them that this run trains, up to the steps in the config.
      config: the experiment.
      source: the workdir or bundle that earlier stages are inherited from, if it is a new one.

    Raises:
      CheckpointError: it would.
    """
    needed = {stage for name in stages for stage in (name, *predecessors(name))}
    for stage in (name for name in STAGES if name in needed):
        for other, step in origins.recorded_steps(workdir, stage).items():
            if other in own:
                becomes, words = config[other].steps, "this run trains it to step {}"
            else:
                becomes, words = lineage.trained_steps(workdir, other, source), "it is at step {}"
            if becomes != step:
                raise CheckpointError(
                    f"stage {stage} in {workdir} was trained on step {step} of {other}, but "
                    f"{words.format(becomes)}, and the two would not fit. Move {workdir / stage} "
                    f"elsewhere to train it again, or restore that step of {other} (a copy is in "
                    f"{workdir / other / 'kept'} if training went on from it)."
                )


def announce(workdir: pathlib.Path, stage: str, config: Config, log: Callable[[str], None]) -> None:
    """Reports what it means to give a finished stage more steps, and keeps what others depend on.

    Raises:
      OSError: the workdir cannot be written.
    """
    done, settings = last_step(workdir / stage / "checkpoints"), config.to_dict()
    if not done:
        return
    for line in _learning_rate(workdir, stage, settings[stage], done):
        log(line)
    others = origins.dependents(workdir, stage, settings)
    if others:
        kept = origins.keep_checkpoint(workdir, stage)
        log(
            f"{stage}: step {done}, which {', '.join(others)} was trained on, is kept in {kept}. "
            f"After more steps of {stage}, move the folder of {others[0]} elsewhere and train it "
            f"again."
        )


def _learning_rate(
    workdir: pathlib.Path, stage: str, settings: Mapping[str, Any], done: int
) -> list[str]:
    """One line if the stage had finished a shorter schedule; else none."""
    try:
        before = config_file.load(workdir).to_dict()[stage]
    except (ConfigError, KeyError):
        return []
    if not before["steps"] == done < settings["steps"]:
        return []
    last, then = (
        float(np.asarray(decay_schedule(given, given["learning_rate"])(done)))
        for given in (before, settings)
    )
    return [
        f"{stage}: had finished its {done} steps and is given {settings['steps']}. Its schedule is "
        f"now that of {settings['steps']} steps, so the learning rate goes from {last:.3g} to "
        f"{then:.3g} and decays from there."
    ]
