"""A small training run under test: starting it, waiting for its end, and checking its files.

A run has survived a fault if it ends with the arrays of an undisturbed run, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "launch"))
import cli

CHECKPOINT_EVERY = 25  # steps
_SETTINGS = {
    "data.documents": 300,
    "data.validation_documents": 40,
    "data.scorer_documents": 60,
    "backbone.width": 16,
    "backbone.num_layers": 1,
    "backbone.heads": 2,
    "decoder.cross_layers": "(0,)",
    "encoder.width": 16,
    "encoder.heads": 2,
    "encoder.num_layers": 1,
    "encoder.num_latents": 4,
    "encoder.latent_dim": 8,
    "mdlm.batch": 8,
    "mdlm.optimizer": "adamw",
    "autoencoder.batch": 8,
    "autoencoder.optimizer": "adamw",
    "logging.checkpoint_every": CHECKPOINT_EVERY,
    "logging.validate_every": 100000,
    "logging.metrics_every": 100,
    "logging.samples": 0,
}
_TIMEOUT = 600  # seconds


class FaultNotSurvived(Exception):
    """A fault that a run did not survive; the message says what was wrong."""


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """A stage of the small experiment in a workdir.

    Attributes:
      workdir: the folder of the experiment.
      steps: number of updates of each stage.
      stage: the stage that is trained, mdlm or autoencoder.
    """

    workdir: pathlib.Path
    steps: int
    stage: str = "mdlm"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the stage's checkpoints."""
        return self.workdir / self.stage / "checkpoints"

    @property
    def metrics(self) -> pathlib.Path:
        """The file of the stage's metrics."""
        return self.workdir / self.stage / "metrics" / "metrics.jsonl"

    def start(
        self,
        *words: str,
        file_limit_kib: int | None = None,
        output: str | None = None,
        **variables: str,
    ) -> subprocess.Popen[str]:
        """Starts launch/train.py on one device.

        Args:
          *words: more flags.
          file_limit_kib: no file that the process writes can become larger than this.
          output: a redirection of the shell for standard output.
          **variables: more environment variables.
        """
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        environment |= {"JAX_PLATFORMS": "cpu"} | variables
        command = [
            sys.executable,
            str(cli.ROOT / "launch" / "train.py"),
            f"--config={cli.ROOT / 'configs' / 'tiny.py'}",
            f"--workdir={self.workdir}",
            f"--stage={self.stage}",
            *(f"--config.{name}={value}" for name, value in _SETTINGS.items()),
            f"--config.mdlm.steps={self.steps}",
            f"--config.autoencoder.steps={self.steps}",
            *words,
        ]
        if file_limit_kib is not None:
            command = ["bash", "-c", f'ulimit -f {file_limit_kib}; exec "$@"', "-", *command]
        if output is not None:
            command = ["bash", "-c", f'exec "$@" {output}', "-", *command]
        return subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def saved_steps(self) -> list[int]:
        """Steps of the committed checkpoints, in order."""
        from diladiff_jax.storage.quarantine import checkpoint_steps

        return sorted(checkpoint_steps(self.checkpoints))

    def last_intact_step(self, not_before: int) -> int:
        """The step of the last committed checkpoint, 0 if there is none.

        Raises:
          FaultNotSurvived: it is before `not_before`, or its checksums do not match.
        """
        from diladiff_jax.storage import checksums

        steps = self.saved_steps()
        if not_before and (not steps or steps[-1] < not_before):
            raise FaultNotSurvived(
                f"checkpoint {not_before} existed and is lost; the checkpoints are now {steps}"
            )
        if steps and (damage := checksums.find_damage(self.checkpoints / str(steps[-1]))):
            raise FaultNotSurvived(f"checkpoint {steps[-1]}: {damage}")
        return steps[-1] if steps else 0

    def require_same_arrays(self, reference: TrainingRun) -> None:
        """Raises FaultNotSurvived if the last checkpoints differ in a single bit."""
        ours, theirs = _last_arrays(self), _last_arrays(reference)
        different = [name for name in theirs if ours.get(name) != theirs[name]]
        if different or ours.keys() != theirs.keys():
            raise FaultNotSurvived(
                f"{len(different)} of {len(theirs)} arrays differ from those of the undisturbed"
                f" run, {different[:1]} first"
            )

    def temporary_checkpoints(self) -> set[tuple[str, int]]:
        """Folders of unfinished checkpoints, by name and inode.

        Those of killed processes stay until their step is saved again.
        """
        found = set()
        for path in self.checkpoints.glob("*tmp*"):
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def wait_until_saving(
        self,
        process: subprocess.Popen[str],
        skip: int,
        existing: set[tuple[str, int]] | None = None,
    ) -> bool:
        """Waits until the process is writing a checkpoint.

        Args:
          process: the running process.
          skip: how many checkpoints to let pass.
          existing: unfinished checkpoints that were there before.

        Returns:
          Whether it is writing one now; False if it ended before.
        """
        seen: set[tuple[str, int]] = set()
        while process.poll() is None:
            now = self.temporary_checkpoints() - (existing or set())
            if now - seen and len(seen | now) > skip:
                return True
            seen |= now
            time.sleep(0.0005)
        return False


def wait_for_end(
    process: subprocess.Popen[str], *allowed: int, resumes_from: int | None = None
) -> str:
    """Waits until a process ends, and checks how it did.

    Args:
      process: the running process.
      *allowed: the exit codes that are right.
      resumes_from: the step of the last checkpoint when the process started, from which it must
        have resumed if it came that far; None if that is not to be checked.

    Returns:
      What it printed.

    Raises:
      FaultNotSurvived: it hangs, ended with another code, with a traceback or with an error that
        is not one line, or did not resume from `resumes_from`.
    """
    try:
        out = process.communicate(timeout=_TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise FaultNotSurvived(f"it hangs: {process.communicate()[0][-600:]}") from None
    if process.returncode not in allowed or "Traceback" in out:
        raise FaultNotSurvived(f"exit code {process.returncode}: {out[-600:]}")
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    if process.returncode == 1 and len(errors) != 1:
        raise FaultNotSurvived(f"not one line of error: {out[-600:]}")
    if resumes_from is not None and not _resumed_from(resumes_from, process.returncode, out):
        raise FaultNotSurvived(f"it did not resume from step {resumes_from}: {out[-600:]}")
    return out


def resumed(out: str) -> list[int]:
    """The steps that a process reported to resume from."""
    return [int(step) for step in re.findall(r": resumes from step (\d+) of", out)]


def _resumed_from(step: int, code: int, out: str) -> bool:
    steps = resumed(out)
    if steps:
        return steps == [step]
    # A process that was killed may not have come so far.
    reached_training = code == 0 or "which is saved" in out
    return not reached_training or step == 0 or "already trained" in out


@functools.cache
def _last_arrays(run: TrainingRun) -> dict[str, bytes]:
    """Every array of the last checkpoint, and the data position, as bytes."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = run.checkpoints.absolute() / str(run.saved_steps()[-1])
    found = {
        "step": folder.name.encode(),
        "data": next((folder / "data").rglob("metadata")).read_bytes(),
    }
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "ema", "training", "statistics"):
        if not (folder / item).is_dir():  # the same ones are missing in the reference
            continue
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            tree = reader.restore(
                folder / item, args=ocp.args.StandardRestore(fallback_sharding=placement)
            )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found
