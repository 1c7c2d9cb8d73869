"""Runs that are stopped by signals, and started again by the same command until they end."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import shutil
import signal
import subprocess

from training_process import FaultNotSurvived, TrainingRun, resumed, wait_for_end

KILL, KILL_SAVING, TERMINATE, HANG_UP = "SIGKILL", "SIGKILL, saving", "SIGTERM", "SIGHUP"
_SENT = {TERMINATE: signal.SIGTERM, HANG_UP: signal.SIGHUP}  # SIGKILL is any other


@dataclasses.dataclass
class StoppedRuns:
    """Stops runs until all faults are used up.

    Attributes:
      rng: chooses the moments.
      reference: the undisturbed run.
      seconds: how long the undisturbed run took.
      faults: the faults that are left; each is used once, from the end.
      stops: how many processes were stopped.
      resumes: how many of them had resumed from a checkpoint.
    """

    rng: random.Random
    reference: TrainingRun
    seconds: float
    faults: list[str]
    stops: int = 0
    resumes: int = 0

    def run_once(self, workdir: pathlib.Path) -> tuple[list[str], str | None]:
        """Trains one run to its end, stopping it as long as faults are left.

        Returns:
          The faults it was stopped by, and what was wrong; None if it survived them.
        """
        run, used = dataclasses.replace(self.reference, workdir=workdir), []
        try:
            self._train(run, used)
            run.require_same_arrays(self.reference)
        except FaultNotSurvived as error:
            return used or [self.faults.pop()], str(error)
        finally:
            shutil.rmtree(workdir, ignore_errors=True)
        return used, None

    def _train(self, run: TrainingRun, used: list[str]) -> None:
        last = 0
        while True:
            existing = run.temporary_checkpoints()
            process = run.start()
            if not self.faults:
                wait_for_end(process, 0, resumes_from=last)
                return
            fault = self.faults[-1]
            self._wait_for_moment(fault, run, process, existing)
            number = _SENT.get(fault, signal.SIGKILL)
            process.send_signal(number)
            # Before training begins, SIGTERM may end a process like any other.
            codes = (75, -number) if fault in _SENT else (-number,)
            out = wait_for_end(process, 0, *codes, resumes_from=last)
            if process.returncode == 0:  # it ended before the signal
                return
            used.append(self.faults.pop())
            self.stops += 1
            self.resumes += bool(resumed(out))
            before, last = last, run.last_intact_step(last)
            _check_terminated(process.returncode, out, before, last)
            print(f"{fault}: step {last} is saved; {len(self.faults)} faults to come", flush=True)

    def _wait_for_moment(
        self,
        fault: str,
        run: TrainingRun,
        process: subprocess.Popen[str],
        existing: set[tuple[str, int]],
    ) -> None:
        if fault == KILL_SAVING:
            run.wait_until_saving(process, self.rng.randrange(6), existing)
        else:
            # Some moments are before the first step, some long after it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.rng.uniform(0.1, 1.0) * self.seconds)


def _check_terminated(code: int, out: str, before: int, last: int) -> None:
    """Checks that a signal made a training process save before it ended.

    Args:
      code: the exit code of the process.
      out: what it printed.
      before: the last saved step when it started.
      last: the last saved step when it had ended.
    """
    if code == 75:
        saved = f"after step {last}, which is saved" in out
        had_not_begun = "before training" in out and last <= before
        if not saved and not had_not_begun:
            raise FaultNotSurvived(f"stopped, and the last checkpoint is {last}: {out[-600:]}")
    if -code in _SENT.values() and last > before:
        raise FaultNotSurvived(
            f"a signal killed it during training: step {before} was saved before, now {last}"
        )
