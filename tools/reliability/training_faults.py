"""Faults of training runs: each function disturbs a run and raises FaultNotSurvived if it is lost.

Runs are compared with an undisturbed `reference`. `half` is an undisturbed run that was stopped
half way; it is copied first, and continued under the fault.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import time

import resource_growth
from training_process import FaultNotSurvived, TrainingRun, wait_for_end

DAMAGES = ("a flipped bit", "a file cut short", "a file gone")


def copy_run(source: TrainingRun, workdir: pathlib.Path) -> TrainingRun:
    """Copies a run's workdir."""
    shutil.copytree(source.workdir, workdir)
    return dataclasses.replace(source, workdir=workdir)


def start_pair(run: TrainingRun) -> list[subprocess.Popen[str]]:
    """Starts two processes on loopback that train together for half of the steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        run.start(
            f"--distributed=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            f"--stop_at={run.steps // 2}",
        )
        for i in range(2)
    ]


def kill_one_of_two(rng: random.Random, run: TrainingRun, reference: TrainingRun) -> None:
    """SIGKILL to one of two processes while a checkpoint is being written.

    The other process would wait until JAX's heartbeats time out, so it is killed a second later, as
    a launcher does.
    """
    pair, victim = start_pair(run), rng.randrange(2)
    if not run.wait_until_saving(pair[victim], rng.randrange(3)):
        out = wait_for_end(pair[victim], 0)
        raise FaultNotSurvived(f"no checkpoint was ever written: {out[-600:]}")
    last = run.last_intact_step(0)
    pair[victim].send_signal(signal.SIGKILL)
    wait_for_end(pair[victim], -signal.SIGKILL)
    time.sleep(1)
    if pair[1 - victim].poll() == 0:
        raise FaultNotSurvived("the other process ended successfully")
    pair[1 - victim].kill()
    pair[1 - victim].communicate()
    last = run.last_intact_step(last)
    first, second = start_pair(run)
    wait_for_end(first, 0, resumes_from=last)  # it reports for both
    wait_for_end(second, 0)
    run.require_same_arrays(reference)


def damage_checkpoint(
    rng: random.Random, checkpoint: pathlib.Path, damage: str, items: tuple[str, ...] = ()
) -> None:
    """Damages one file of a checkpoint.

    Args:
      rng: chooses the file and the place in it.
      checkpoint: the folder of one step.
      damage: one of `DAMAGES`.
      items: which parts of the checkpoint may be damaged; all if empty.
    """
    files = [
        path
        for item in checkpoint.iterdir()
        if item.is_dir() and (not items or item.name in items)
        for path in item.rglob("*")
        if path.is_file() and path.stat().st_size
    ]
    path = rng.choice(sorted(files))
    data = bytearray(path.read_bytes())
    if damage == "a file gone":
        path.unlink()
    elif damage == "a file cut short":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def damage_last(
    rng: random.Random,
    half: TrainingRun,
    workdir: pathlib.Path,
    reference: TrainingRun,
    damage: str,
    items: tuple[str, ...] = (),
) -> None:
    """The last checkpoint is damaged: training reports it and resumes from the one before."""
    run = copy_run(half, workdir)
    before, last = run.saved_steps()[-2:]
    damage_checkpoint(rng, run.checkpoints / str(last), damage, items)
    out = wait_for_end(run.start(), 0, resumes_from=before)
    if f"{last} is damaged" not in out:
        raise FaultNotSurvived(f"the damage was not reported: {out[-600:]}")
    run.require_same_arrays(reference)


def damage_all(rng: random.Random, half: TrainingRun, workdir: pathlib.Path) -> None:
    """Every checkpoint is damaged: training ends with one line and changes no file."""
    run = copy_run(half, workdir)
    for step in run.saved_steps():
        damage_checkpoint(rng, run.checkpoints / str(step), rng.choice(DAMAGES[:2]))
    before = _file_contents(run.checkpoints)
    out = wait_for_end(run.start(), 1)
    if "no intact checkpoint" not in out or _file_contents(run.checkpoints) != before:
        raise FaultNotSurvived(f"files were changed, or nothing was reported: {out[-600:]}")


def _file_contents(folder: pathlib.Path) -> dict[pathlib.Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_autoencoder(
    rng: random.Random, first_stage: TrainingRun, workdir: pathlib.Path, reference: TrainingRun
) -> None:
    """SIGKILL to the second stage while it saves, twice."""
    run = dataclasses.replace(copy_run(first_stage, workdir), stage="autoencoder")
    last = 0
    for _ in range(2):
        existing = run.temporary_checkpoints()
        process = run.start()
        if not run.wait_until_saving(process, rng.randrange(3), existing):
            break
        process.send_signal(signal.SIGKILL)
        wait_for_end(process, 0, -signal.SIGKILL, resumes_from=last)
        last = run.last_intact_step(last)
    wait_for_end(run.start(), 0, resumes_from=last)
    run.require_same_arrays(reference)


def limit_file_size(
    rng: random.Random, half: TrainingRun, workdir: pathlib.Path, reference: TrainingRun
) -> None:
    """No file can become as large as a checkpoint needs.

    The run ends with one line, and without the limit it resumes and finishes.
    """
    run = copy_run(half, workdir)
    last = run.last_intact_step(0)
    largest = max(len(data) for data in _file_contents(run.checkpoints).values())
    limit_kib = max(1, int(rng.uniform(0, 0.9) * largest / 1024))
    out = wait_for_end(run.start(file_limit_kib=limit_kib), 1)
    reported = re.search(r"^error: .*cannot be written", out, re.MULTILINE)
    if not reported or run.last_intact_step(last) != last:
        raise FaultNotSurvived(f"nothing was reported, or something was saved: {out[-600:]}")
    wait_for_end(run.start(), 0, resumes_from=last)
    run.require_same_arrays(reference)


def fill_metrics_device(half: TrainingRun, workdir: pathlib.Path, reference: TrainingRun) -> None:
    """metrics.jsonl is on a full device: training reports it and finishes."""
    run = copy_run(half, workdir)
    run.metrics.unlink()
    run.metrics.symlink_to("/dev/full")
    out = wait_for_end(run.start(), 0, resumes_from=run.saved_steps()[-1])
    if "metrics cannot be written" not in out:
        raise FaultNotSurvived(f"it was not reported: {out[-600:]}")
    run.require_same_arrays(reference)


def cut_rows(
    half: TrainingRun, workdir: pathlib.Path, reference: TrainingRun, seconds: float | None
) -> None:
    """A file of rows is cut short under a running process.

    Args:
      half: the run to copy.
      workdir: where to copy it.
      reference: the undisturbed run.
      seconds: the file is restored after this time, and training reads it again; None: when the
        process has ended with one line, and the same command resumes.
    """
    run = copy_run(half, workdir)
    (path,) = workdir.glob("data/rows-*/train-00000.array_record")
    intact = path.read_bytes()
    process = run.start()
    if not run.wait_until_saving(process, 0):
        out = wait_for_end(process, 0)
        raise FaultNotSurvived(f"no checkpoint was ever written: {out[-600:]}")
    process.send_signal(signal.SIGSTOP)  # so that enough rows are left to be read
    os.truncate(path, 1000)  # half of it may hold every row: small files are padded
    process.send_signal(signal.SIGCONT)
    if seconds is not None:
        time.sleep(seconds)
        path.write_bytes(intact)
        out, message = wait_for_end(process, 0), "retrying in"
    else:
        out, message = wait_for_end(process, 1), "train-00000.array_record cannot be read"
    if message not in out:
        raise FaultNotSurvived(f"it was not reported: {out[-600:]}")
    if seconds is None:
        path.write_bytes(intact)
        wait_for_end(run.start(), 0, resumes_from=run.last_intact_step(0))
    run.require_same_arrays(reference)


def diverge(run: TrainingRun) -> None:
    """The learning rate is 1e30: training ends with one line and keeps the batch."""
    process = run.start(
        "--config.mdlm.learning_rate=1e30", "--config.mdlm.clip=0.0", "--config.mdlm.warmup=0"
    )
    out = wait_for_end(process, 1)
    kept = list((run.workdir / "mdlm" / "skipped").iterdir())
    if "consecutive updates were skipped" not in out or not kept:
        raise FaultNotSurvived(f"it was not reported, or the batch is missing: {out[-600:]}")


def run_long(run: TrainingRun) -> str:
    """A long run with checkpoints, validations and metrics hardly grows.

    Returns:
      A sentence with what it grew by.
    """
    intervals = {"checkpoint": 20, "validate": 20, "metrics": 100}
    settings = [
        f"--config.logging.{name}_every={max(1, run.steps // times)}"
        for name, times in intervals.items()
    ]
    # With several arenas, memory that threads have freed looks like growth for thousands of steps.
    process = run.start(*settings, MALLOC_ARENA_MAX="1")
    usages: list[resource_growth.Usage] = []
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < 3600:
        with contextlib.suppress(OSError, KeyError, IndexError, ValueError):
            usages.append(resource_growth.read_usage(process, run.metrics))
        time.sleep(0.1)
    wait_for_end(process, 0)
    try:
        memory, files, threads = resource_growth.growth(usages, run.steps)
    except ValueError as error:
        raise FaultNotSurvived(str(error)) from None
    summary = (
        f"memory grew by {memory:.2f} KiB per step, open files by {files}, threads by {threads}"
        f" ({len(usages)} readings)"
    )
    too_much = memory > resource_growth.MAX_MEMORY_KIB_PER_STEP or files > 0
    if too_much or threads > resource_growth.MAX_THREADS:
        raise FaultNotSurvived(summary)
    return summary
