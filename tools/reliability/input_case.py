"""A case of bad input: a command line with the files that it finds, and the judge of its outcome.

Each case runs in a folder of its own beside a copy of a small trained workdir `w`. It ended well if
it succeeded, or was rejected with one line, within the time limit, and left every file as it was
except those it is meant to change.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping

import fork_server

TINY = str(fork_server.LAUNCH.parent / "configs" / "tiny.py")
TIME_LIMIT = 120.0
"""Seconds after which a command counts as hanging.

The slowest good command, two compiled training steps, takes a tenth of this.
"""
MAX_LINE = 1000  # characters of an error
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "HF_HUB_OFFLINE": "1",  # nothing is downloaded
    # A command that passes all checks still compiles nothing for TPUs.
    "TPU_LIBRARY_PATH": "/nowhere/libtpu.so",
}
STAGES = ("mdlm", "autoencoder", "ladiff", "diladiff")
SMALL_NETWORKS = [
    *(
        f"--config.{block}.{name}={value}"
        for block in ("backbone", "encoder", "latent_denoiser")
        for name, value in (("width", 16), ("num_layers", 1), ("heads", 2))
    ),
    "--config.decoder.cross_layers=(0,)",
    "--config.encoder.num_latents=4",
    "--config.encoder.latent_dim=8",
    "--config.logging.samples=0",
    "--config.logging.keep_checkpoints=1",
    "--config.mdlm_long.steps=0",
    *(
        f"--config.{stage}.{name}={value}"
        for stage in STAGES
        for name, value in (("steps", 2), ("batch", 8), ("optimizer", "adamw"))
    ),
]
SMALL = [
    f"--config={TINY}",
    "--config.data.documents=300",
    "--config.data.validation_documents=40",
    "--config.data.scorer_documents=60",
    *SMALL_NETWORKS,
]
"""The experiment of the base workdir: all four stages of width 16, two steps each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line and changes to the files in its folder.

    Attributes:
      script: the script in launch/.
      words: its command line.
      files: by path, the content of a file, or None to remove it; a path that ends in "/" is an
        empty folder.
    """

    script: str
    words: tuple[str, ...]
    files: tuple[tuple[str, bytes | None], ...] = ()

    def __repr__(self) -> str:
        files = [(path, data if data is None else data[:200]) for path, data in self.files]
        return f"{self.script} {' '.join(map(repr, self.words))} with {files}"


def file_contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file under a folder, by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def place_files(case: Case, folder: pathlib.Path) -> None:
    """Applies the case's changes to the files in its folder; later changes win."""
    for name, data in case.files:
        path = folder / name
        relative = path.relative_to(folder)
        for part in (*reversed(relative.parents), relative):
            if (folder / part).is_file():
                (folder / part).unlink()
        if path.is_dir():
            shutil.rmtree(path)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def find_problem(
    case: Case,
    outcome: fork_server.Outcome,
    before: Mapping[str, bytes],
    after: Mapping[str, bytes],
) -> str | None:
    """Says what is wrong with how a case ended; None if nothing is.

    Args:
      case: the case.
      outcome: how its command ended.
      before: all files of its folder before the command.
      after: all files after it.
    """
    printed = outcome.out + outcome.err
    if outcome.code is None:
        return f"hangs: it was killed after {outcome.seconds:.0f} s"
    if "Traceback" in printed:
        return f"a traceback: {printed[-1500:]}"
    if outcome.code < 0:
        return f"signal {-outcome.code}: {outcome.err[-600:]}"
    if outcome.code and not _is_one_error_line(outcome.err):
        return f"exit code {outcome.code} and not one clear line: {outcome.err[-1500:]!r}"
    changed = [
        name
        for name in before
        if not _may_change(name, case, outcome.code) and after.get(name) != before[name]
    ]
    if not changed:
        return None
    return (
        f"exit code {outcome.code}, and {len(changed)} files changed or removed,"
        f" {changed[0]} first: {outcome.err[-300:]}"
    )


def _is_one_error_line(err: str) -> bool:
    lines = err.splitlines()
    if len(lines) != 1:
        return False
    return lines[0].startswith("error: ") and len(lines[0]) <= MAX_LINE and lines[0].isprintable()


def _may_change(name: str, case: Case, code: int) -> bool:
    """Whether a command is meant to change this file.

    Training changes its workdir. If it fails, only the metrics until then stay.
    """
    trains = case.script in ("train.py", "prepare.py")
    return trains and name.startswith("w/") and (code == 0 or "/metrics/" in name)


def run_case(
    server: fork_server.ForkServer, base: pathlib.Path, folder: pathlib.Path, case: Case
) -> tuple[fork_server.Outcome, str | None]:
    """Runs one case beside a copy of the base workdir.

    Args:
      server: runs the command.
      base: the base workdir.
      folder: where to run it; the folder is created and removed.
      case: the case.

    Returns:
      How it ended, and what is wrong with that (or None).
    """
    shutil.copytree(base, folder / "w")
    try:
        place_files(case, folder)
        before = file_contents(folder)
        outcome = server.run(
            fork_server.LAUNCH / case.script, case.words, cwd=folder, limit=TIME_LIMIT
        )
        return outcome, find_problem(case, outcome, before, file_contents(folder))
    finally:
        shutil.rmtree(folder)


def train_base(server: fork_server.ForkServer, folder: pathlib.Path) -> pathlib.Path:
    """Trains the base workdir. Returns its path, `folder/w`.

    Raises:
      RuntimeError: training failed.
    """
    outcome = server.run(
        fork_server.LAUNCH / "train.py", ["--workdir=w", *SMALL], cwd=folder, limit=900
    )
    if outcome.code != 0:
        raise RuntimeError(f"the base workdir could not be trained: {outcome.err[-600:]}")
    return folder / "w"


def quick_flags(script: str) -> list[str]:
    """Flags that keep a good command short; flags that come after them take precedence."""
    return {
        "sample.py": ["--num=1", "--model=mdlm", "--decode_steps=1"],
        "train.py": ["--stage=all"],
    }.get(script, [])
