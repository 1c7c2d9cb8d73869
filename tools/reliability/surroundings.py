"""What surrounds a training process and must not matter: settings of JAX, and its output."""

from __future__ import annotations

import pathlib

from training_faults import copy_run
from training_process import FaultNotSurvived, TrainingRun, wait_for_end

_TALKATIVE = ("--config.logging.samples=2", "--config.logging.validate_every=50")
_NOWHERE = ">/dev/full"
_ONE_READER = "> >(head -1)"

SURROUNDINGS: dict[str, dict[str, str]] = {
    "JAX_DEFAULT_PRNG_IMPL=rbg": {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
    "JAX_ENABLE_X64=1": {"JAX_ENABLE_X64": "1"},
    "JAX_THREEFRY_PARTITIONABLE=0": {"JAX_THREEFRY_PARTITIONABLE": "0"},
    "strict types and keys": {
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_DEBUG_KEY_REUSE": "1",
    },
    "an output in ASCII": {"PYTHONIOENCODING": "ascii"},
    "an output that is full": {"output": _NOWHERE},
    "an output that is closed": {"output": _ONE_READER},
}
"""Names of what a run may be surrounded by; environment variables, and where its output goes."""


def continue_in(
    half: TrainingRun, workdir: pathlib.Path, reference: TrainingRun, name: str
) -> None:
    """Half a run is continued in other surroundings, and ends as if nothing were different.

    Args:
      half: the run to copy.
      workdir: where to copy it.
      reference: the undisturbed run.
      name: a key of `SURROUNDINGS`.

    Raises:
      FaultNotSurvived: it does not.
    """
    run, about = copy_run(half, workdir), SURROUNDINGS[name]
    variables = {key: value for key, value in about.items() if key != "output"}
    process = run.start(*_TALKATIVE, output=about.get("output"), **variables)
    wait_for_end(process, 0)
    if run.saved_steps()[-1] != reference.steps:
        raise FaultNotSurvived(f"it ended at step {run.saved_steps()[-1]}")
    run.require_same_arrays(reference)
