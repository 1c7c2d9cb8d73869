"""Breaks training runs in every way at hand and shows that nothing is lost: a table of faults, times tried, times survived.

    python tools/reliability/faults.py --out=faults.json                                          # all of it, a quarter of an hour or more on two cores
    python tools/reliability/faults.py --steps=200 --kills=2 --terms=0 --several=0 --damages=0 --long=0 --inputs=0 --out=f.json   # the short form that the tests run

A small experiment (the first stage, a network of width 16) is trained once undisturbed. Then it is trained again and again under
a fault, each time restarted by the same command until it ends. Survived means: it ended, its parameters, average, optimizer state
and data position are those of the undisturbed run bit for bit, at no moment after the first checkpoint was there none to go on from,
every start went on from the last one (and not from scratch, whose end would be the same), and no command ended in a traceback.

  SIGKILL            at a random moment, the start included
  SIGKILL, saving    while a checkpoint is being written
  SIGTERM            at a random moment: exit code 75 and a checkpoint, where it was training
  one of two         SIGKILL to one of two processes on loopback, while a checkpoint is being written; compared with two undisturbed ones
  autoencoder        the second stage, which has statistics of its own, by SIGKILL while saving, and with a flipped bit in them
  damage             of the last checkpoint: a flipped bit, a file cut short, a file gone; training goes on from the one before
  damage of all      one line, exit code 1, no file changed
  file size limit    no file may grow past a random size below what a checkpoint needs: one line, exit code 1, nothing saved is lost
  metrics            on a device that is full: training ends as if nothing had been
  not a number       a learning rate of 1e30: one line, exit code 1, the batch kept
  rows               a file of rows cut short under a running process: for a second, and training ends as if nothing had been; for good: one
                     line, exit code 1, and once it is mended the same command goes on
  N steps            not a fault but time: open files end as few as they were, and threads (by 4) and memory (by 1 KiB a step) hardly grow
  bad config, command line, corpus, prompt, workdir
                     command lines of all scripts and what they read, by hypothesis (tools/reliability/bad_input.py): success, or one line and
                     a non-zero exit code; no traceback, no hang, no file damaged
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import resource_growth
from absl import flags
from training_process import (
    Lost,
    being_written,
    cli,
    ended,
    same,
    start,
    steps_of,
    there,
    until_saving,
)

_OUT = flags.DEFINE_string("out", None, "JSON file.", required=True)
_KILLS = flags.DEFINE_integer(
    "kills", 50, "SIGKILLs, every fifth of them while a checkpoint is written.", lower_bound=0
)
_TERMS = flags.DEFINE_integer("terms", 6, "SIGTERMs.", lower_bound=0)
_SEVERAL = flags.DEFINE_integer("several", 3, "SIGKILLs to one of two processes.", lower_bound=0)
_STEPS = flags.DEFINE_integer(
    "steps",
    1500,
    "Of the training; the damaged and limited runs begin at half of it.",
    lower_bound=200,
)
_DAMAGES = flags.DEFINE_integer(
    "damages", 4, "Of each kind of damage, and of limits.", lower_bound=0
)
_LONG = flags.DEFINE_integer(
    "long",
    5000,
    "Steps of the long run, whose memory, open files and threads are watched; 0 leaves it out. Linux alone.",
    lower_bound=0,
)
_INPUTS = flags.DEFINE_integer(
    "inputs", 2000, "Cases of bad input, of all kinds together.", lower_bound=0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments, places and cases.")


class Table:
    """Times tried and survived by fault."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def count(self, fault: str, survived: bool, why: str = "") -> None:
        """One trial."""
        row = self.rows.setdefault(fault, {"fault": fault, "tried": 0, "survived": 0, "lost": []})
        row["tried"] += 1
        row["survived"] += survived
        if why:
            row["lost"].append(why)
            print(f"{fault}: LOST: {why}", flush=True)

    def trial(self, fault: str, run: Callable[[], None]) -> None:
        """Runs one trial and counts it."""
        try:
            run()
        except Lost as error:
            return self.count(fault, False, str(error))
        self.count(fault, True)
        print(f"{fault}: survived", flush=True)


def stopped_runs(
    table: Table,
    rng: random.Random,
    folder: pathlib.Path,
    reference: pathlib.Path,
    moments: list[str],
    seconds: float,
) -> None:
    """SIGKILL and SIGTERM: runs, which undisturbed take so many seconds, that are stopped until all `moments` are used up, each run to its end."""
    run = went_on = stops = 0
    while moments:
        workdir, last, used = folder / f"stopped_{run}", 0, []
        run += 1
        try:
            while True:
                remains = being_written(workdir)
                process = start(workdir)
                if not moments:
                    ended(process, 0, stands=last)
                    break
                kind = moments[-1]
                if kind == "SIGKILL, saving":
                    until_saving(process, workdir, rng.randrange(6), remains)
                else:
                    # Some moments are before the first step, some long after.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(rng.uniform(0.1, 1.0) * seconds)
                process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
                # Before training begins SIGTERM ends a process as it does any other.
                out = ended(
                    process,
                    0,
                    *((75, -signal.SIGTERM) if kind == "SIGTERM" else (-signal.SIGKILL,)),
                    stands=last,
                )
                if process.returncode == 0:  # it was faster
                    break
                used.append(moments.pop())
                went_on, stops = went_on + ("goes on from step" in out), stops + 1
                before, last = last, there(workdir, last)
                if (
                    process.returncode == 75
                    and f"after step {last}, which is saved" not in out
                    and ("before training" not in out or last > before)
                ):
                    raise Lost(f"SIGTERM, and the last checkpoint is {last}: {out[-600:]}")
                if process.returncode == -signal.SIGTERM and last > before:
                    raise Lost(
                        f"SIGTERM killed it while it was training; {before} was saved before, now {last}"
                    )
                print(f"{kind}: step {last} is saved; {len(moments)} to come", flush=True)
            same(workdir, reference)
        except Lost as error:
            for kind in used or [moments.pop()]:
                table.count(kind, False, str(error))
        else:
            for kind in used:
                table.count(kind, True)
        shutil.rmtree(workdir, ignore_errors=True)
    print(f"{went_on} of {stops} stopped processes had gone on from a checkpoint", flush=True)
    if stops >= 10 and not went_on:
        table.count("SIGKILL", False, "no process ever went on from a checkpoint")


def pair(workdir: pathlib.Path) -> list[subprocess.Popen[str]]:
    """Two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            workdir,
            f"--distributed=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
            f"--stop_at={_STEPS.value // 2}",
        )
        for i in range(2)
    ]


def one_of_two(rng: random.Random, workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """One process dies; the other, which would wait for it until JAX's heartbeats run out, is ended a second later as a launcher does."""
    both, victim = pair(workdir), rng.randrange(2)
    if not until_saving(both[victim], workdir, rng.randrange(3), set()):
        raise Lost(f"no checkpoint was ever written: {ended(both[victim], 0)[-600:]}")
    last = there(workdir, 0)
    both[victim].send_signal(signal.SIGKILL)
    ended(both[victim], -signal.SIGKILL)
    time.sleep(1)
    if both[1 - victim].poll() == 0:
        raise Lost("the other process ended as if nothing had been")
    both[1 - victim].kill()
    both[1 - victim].communicate()
    last = there(workdir, last)
    for i, process in enumerate(pair(workdir)):
        ended(process, 0, stands=None if i else last)  # the first one says it for both
    same(workdir, reference)


def spoil(
    rng: random.Random, step_folder: pathlib.Path, how: str, items: tuple[str, ...] = ()
) -> None:
    """Damages one file of a checkpoint, of these items or any."""
    files = [
        p
        for item in step_folder.iterdir()
        if item.is_dir() and (not items or item.name in items)
        for p in item.rglob("*")
        if p.is_file() and p.stat().st_size
    ]
    path = rng.choice(sorted(files))
    data = bytearray(path.read_bytes())
    if how == "a file gone":
        path.unlink()
    elif how == "a file cut short":
        path.write_bytes(data[: rng.randrange(len(data))])
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


def damaged(
    rng: random.Random,
    half: pathlib.Path,
    workdir: pathlib.Path,
    reference: pathlib.Path,
    how: str,
    stage: str = "mdlm",
    items: tuple[str, ...] = (),
) -> None:
    """The last checkpoint is spoiled, in these items or any; training names it and goes on from the one before."""
    shutil.copytree(half, workdir)
    before, last = steps_of(workdir, stage)[-2:]
    spoil(rng, workdir / stage / "checkpoints" / str(last), how, items)
    out = ended(start(workdir, stage=stage), 0, stands=before)
    if f"{last} is damaged" not in out:
        raise Lost(f"the damage was not said: {out[-600:]}")
    same(workdir, reference, stage)


def autoencoder_killed(rng: random.Random, workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """The second stage, from the first one's end: SIGKILL while it saves, twice."""
    shutil.copytree(reference, workdir, ignore=shutil.ignore_patterns("autoencoder"))
    last = 0
    for _ in range(2):
        remains = being_written(workdir, "autoencoder")
        process = start(workdir, stage="autoencoder")
        if not until_saving(process, workdir, rng.randrange(3), remains, "autoencoder"):
            break
        process.send_signal(signal.SIGKILL)
        ended(process, 0, -signal.SIGKILL, stands=last)
        last = there(workdir, last, "autoencoder")
    ended(start(workdir, stage="autoencoder"), 0, stands=last)
    same(workdir, reference, "autoencoder")


def all_damaged(rng: random.Random, half: pathlib.Path, workdir: pathlib.Path) -> None:
    """No checkpoint is whole: one line, and every file as it was."""
    shutil.copytree(half, workdir)
    for step in steps_of(workdir):
        spoil(
            rng,
            workdir / "mdlm" / "checkpoints" / str(step),
            rng.choice(("a flipped bit", "a file cut short")),
        )
    contents = lambda: {
        p: p.read_bytes() for p in (workdir / "mdlm" / "checkpoints").rglob("*") if p.is_file()
    }
    before = contents()
    out = ended(start(workdir), 1)
    if "no intact checkpoint" not in out or contents() != before:
        raise Lost(f"files changed, or it was not said: {out[-600:]}")


def limited(
    rng: random.Random, half: pathlib.Path, workdir: pathlib.Path, reference: pathlib.Path
) -> None:
    """Files may not grow past a size below what a checkpoint needs: the run ends with one line, and without the limit goes on to its end."""
    shutil.copytree(half, workdir)
    last = there(workdir, 0)
    largest = max(
        p.stat().st_size for p in (workdir / "mdlm" / "checkpoints").rglob("*") if p.is_file()
    )
    out = ended(start(workdir, limit=max(1, int(rng.uniform(0, 0.9) * largest / 1024))), 1)
    if (
        not re.search(r"^error: .*cannot be written", out, re.MULTILINE)
        or there(workdir, last) != last
    ):
        raise Lost(f"it was not said, or something was saved: {out[-600:]}")
    ended(start(workdir), 0, stands=last)
    same(workdir, reference)


def without_metrics(half: pathlib.Path, workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """metrics.jsonl is a device that is full."""
    shutil.copytree(half, workdir)
    path = workdir / "mdlm" / "metrics" / "metrics.jsonl"
    path.unlink()
    path.symlink_to("/dev/full")
    if "metrics cannot be written" not in ended(start(workdir), 0, stands=steps_of(workdir)[-1]):
        raise Lost("it was not said")
    same(workdir, reference)


def cut_rows(
    half: pathlib.Path, workdir: pathlib.Path, reference: pathlib.Path, seconds: float
) -> None:
    """A file of rows is cut short under a running process, and put back after `seconds` or, with 0, when the process has ended."""
    shutil.copytree(half, workdir)
    (path,) = workdir.glob("data/rows-*/train-00000.array_record")
    whole = path.read_bytes()
    process = start(workdir)
    if not until_saving(process, workdir, 0, set()):
        raise Lost(f"no checkpoint was ever written: {ended(process, 0)[-600:]}")
    process.send_signal(signal.SIGSTOP)  # so that enough is left to be read
    os.truncate(path, 1000)  # half of it may hold every row: small files are padded
    process.send_signal(signal.SIGCONT)
    if seconds:
        time.sleep(seconds)
        path.write_bytes(whole)
        if "read again" not in (out := ended(process, 0)):
            raise Lost(f"it was not said: {out[-600:]}")
    else:
        if "train-00000.array_record cannot be read" not in (out := ended(process, 1)):
            raise Lost(f"it was not said: {out[-600:]}")
        path.write_bytes(whole)
        ended(start(workdir), 0, stands=there(workdir, 0))
    same(workdir, reference)


def long_run(workdir: pathlib.Path) -> str:
    """A run of --long steps with checkpoints, validations and metrics; what it grew by."""
    steps = _LONG.value
    every = [
        f"--config.logging.{name}_every={max(1, steps // n)}"
        for name, n in (("checkpoint", 20), ("validate", 20), ("metrics", 100))
    ]
    # One arena: what threads have freed in many looks like growth for thousands of steps.
    process, seen, began = (
        start(workdir, f"--config.mdlm.steps={steps}", *every, MALLOC_ARENA_MAX="1"),
        [],
        time.monotonic(),
    )
    while process.poll() is None and time.monotonic() - began < 3600:
        with contextlib.suppress(OSError, KeyError, IndexError, ValueError):
            seen.append(
                resource_growth.look(process, workdir / "mdlm" / "metrics" / "metrics.jsonl")
            )
        time.sleep(0.1)
    ended(process, 0)
    try:
        memory, files, threads = resource_growth.grown(seen, steps)
    except ValueError as error:
        raise Lost(str(error)) from None
    said = f"memory grew by {memory:.2f} KiB a step, open files by {files}, threads by {threads} ({len(seen)} looks)"
    if memory > resource_growth.GROWTH or files > 0 or threads > resource_growth.THREADS:
        raise Lost(said)
    return said


def not_a_number(workdir: pathlib.Path) -> None:
    """Training that diverges at once."""
    out = ended(
        start(
            workdir,
            "--config.mdlm.learning_rate=1e30",
            "--config.mdlm.clip=0.0",
            "--config.mdlm.warmup=0",
        ),
        1,
    )
    if "updates in a row were skipped" not in out or not list(
        (workdir / "mdlm" / "skipped").iterdir()
    ):
        raise Lost(f"it was not said, or the batch is not there: {out[-600:]}")


def bad_inputs(table: Table, folder: pathlib.Path) -> None:
    """Cases of bad input, each kind's share of `--inputs`, from the seed alone."""
    try:
        import bad_input
        import fork_server
    except ImportError as missing:
        raise cli.UsageError(
            f"the package {missing.name} is missing, which makes up bad input; pip install -r requirements.txt, or give --inputs=0"
        ) from None
    with fork_server.Commands(
        bad_input.ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(folder / "xla")}
    ) as commands:
        try:
            base = bad_input.make_base(commands, folder)
        except RuntimeError as error:
            raise cli.UsageError(str(error)) from None
        for kind, number in bad_input.shares(_INPUTS.value).items():
            began, succeeded = time.monotonic(), 0
            for case in bad_input.drawn(kind, bad_input.contents(base), number, _SEED.value):
                ended, fault = bad_input.trial(commands, base, folder / "case", case)
                succeeded += ended.code == 0
                table.count(kind, fault is None, f"{case}: {fault}" if fault else "")
            if number:
                table.rows[kind] |= {"succeeded": succeeded, "seconds": time.monotonic() - began}
            print(
                f"{kind}: {number} cases in {time.monotonic() - began:.0f} s; {succeeded} of the commands succeeded",
                flush=True,
            )


def undisturbed(*processes: subprocess.Popen[str]) -> None:
    """Waits for a run that nothing happens to. Raises UsageError where it does not end well: there is nothing to compare with."""
    try:
        for process in processes:
            ended(process, 0)
    except Lost as error:
        raise cli.UsageError(f"the undisturbed run did not end well: {error}") from None


def main(argv: list[str]) -> None:
    rng, table, began = random.Random(_SEED.value), Table(), time.monotonic()
    out = pathlib.Path(_OUT.value).absolute()
    cli.replaceable("out", out, {"seconds", "rows"}, "such result")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        reference, half = folder / "reference", folder / "half"
        undisturbed(start(half, f"--stop_at={_STEPS.value // 2}"))
        started = time.monotonic()
        undisturbed(start(reference))
        seconds = time.monotonic() - started
        moments = ["SIGKILL, saving" if i % 5 == 4 else "SIGKILL" for i in range(_KILLS.value)] + [
            "SIGTERM"
        ] * _TERMS.value
        rng.shuffle(moments)
        stopped_runs(table, rng, folder, reference, moments, seconds)
        if _SEVERAL.value:
            undisturbed(*pair(folder / "pair"))
        for i in range(_SEVERAL.value):
            table.trial(
                "one of two", lambda: one_of_two(rng, folder / f"pair_{i}", folder / "pair")
            )  # noqa: B023
        for how in ("a flipped bit", "a file cut short", "a file gone"):
            for i in range(_DAMAGES.value):
                table.trial(
                    f"damage: {how}",
                    lambda: damaged(rng, half, folder / f"{how}_{i}", reference, how),
                )  # noqa: B023
        if _DAMAGES.value:
            second, half_of_second = (
                shutil.copytree(reference, folder / "second"),
                shutil.copytree(reference, folder / "half_of_second"),
            )
            undisturbed(
                start(half_of_second, f"--stop_at={_STEPS.value // 2}", stage="autoencoder")
            )
            undisturbed(start(second, stage="autoencoder"))
        for i in range(_DAMAGES.value):
            table.trial("damage of all", lambda: all_damaged(rng, half, folder / f"all_{i}"))  # noqa: B023
            table.trial(
                "autoencoder: SIGKILL, saving",
                lambda: autoencoder_killed(rng, folder / f"second_killed_{i}", second),
            )  # noqa: B023
            table.trial(
                "autoencoder: a flipped bit",
                lambda: damaged(
                    rng,
                    half_of_second,
                    folder / f"second_flipped_{i}",
                    second,
                    "a flipped bit",
                    "autoencoder",
                    ("statistics",),
                ),
            )  # noqa: B023
            table.trial(
                "file size limit", lambda: limited(rng, half, folder / f"limit_{i}", reference)
            )  # noqa: B023
        table.trial(
            "metrics on a full device", lambda: without_metrics(half, folder / "metrics", reference)
        )
        table.trial("not a number", lambda: not_a_number(folder / "nan"))
        for i in range(_DAMAGES.value):
            table.trial(
                "rows cut short for a second",
                lambda: cut_rows(half, folder / f"second_{i}", reference, 1.0),
            )  # noqa: B023
            table.trial(
                "rows cut short for good",
                lambda: cut_rows(half, folder / f"good_{i}", reference, 0.0),
            )  # noqa: B023
        if _LONG.value and pathlib.Path("/proc/self/status").exists():
            table.trial(
                f"{_LONG.value} steps: memory, files, threads",
                lambda: print(long_run(folder / "long"), flush=True),
            )
        if _INPUTS.value:
            bad_inputs(table, folder)
    rows = list(table.rows.values())
    cli.write_json("out", out, {"seconds": time.monotonic() - began, "rows": rows})
    print(f"\n{'fault':28} {'tried':>6} {'survived':>9}")
    for row in sorted(rows, key=lambda row: row["fault"]):
        print(f"{row['fault']:28} {row['tried']:6} {row['survived']:9}")
    if any(row["survived"] < row["tried"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    cli.run(main, __doc__)
