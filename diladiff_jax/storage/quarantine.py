"""Which checkpoints of a stage are intact, and what happens to those that are not."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterable

from diladiff_jax.storage import checksums
from diladiff_jax.storage.errors import CheckpointError


def checkpoint_steps(checkpoints: pathlib.Path) -> list[int]:
    """The committed steps in a folder of checkpoints, in no order; empty if it does not exist."""
    if not checkpoints.is_dir():
        return []
    return [
        int(entry.name)
        for entry in checkpoints.iterdir()
        if entry.name.isdecimal() and entry.is_dir()
    ]


def last_step(checkpoints: pathlib.Path) -> int:
    """The last committed step in a folder of checkpoints; 0 if there is none."""
    return max(checkpoint_steps(checkpoints), default=0)


def require_intact(step_folder: pathlib.Path, items: Iterable[str]) -> None:
    """Verifies some items of a checkpoint.

    Raises:
      CheckpointError: one of them is damaged.
    """
    damage = checksums.find_damage(step_folder, items)
    if damage is not None:
        raise CheckpointError(
            f"checkpoint {step_folder} is damaged: {damage}. Run launch/train.py on its workdir "
            f"and stage to resume from the previous checkpoint."
        )


def quarantine_corrupt(checkpoints: pathlib.Path, report: Callable[[str], None]) -> None:
    """Moves corrupt checkpoints newer than the last intact one to `STAGE/damaged/STEP`.

    Training then resumes from the intact one. If no checkpoint is intact, nothing is moved: a
    stage must not silently restart from scratch.

    Args:
      checkpoints: `STAGE/checkpoints`; it need not exist.
      report: receives one line for each thing the user should know.

    Raises:
      CheckpointError: no checkpoint is intact, or all of them have disappeared.
    """
    steps = sorted(checkpoint_steps(checkpoints), reverse=True)
    last_recorded = _last_recorded_step(checkpoints)
    remedy = (
        f"Restore a copy, or move {checkpoints.parent} elsewhere to train this stage again from "
        f"scratch."
    )
    if not steps:
        if last_recorded:
            raise CheckpointError(
                f"{checkpoints}: got no checkpoint, expected step {last_recorded}, "
                f"which was saved there. {remedy}"
            )
        return

    corrupt: dict[int, str] = {}
    for step in steps:
        damage = checksums.find_damage(checkpoints / str(step))
        if damage is None:
            break
        corrupt[step] = damage
    if len(corrupt) == len(steps):
        listed = "; ".join(f"{step}: {damage}" for step, damage in corrupt.items())
        raise CheckpointError(f"no intact checkpoint in {checkpoints}: {listed}. {remedy}")

    intact = steps[len(corrupt)]
    if last_recorded > steps[0]:
        report(
            f"checkpoint {checkpoints / str(last_recorded)} is gone; "
            f"training resumes from step {intact}"
        )
    why = checksums.why_unverifiable(checkpoints / str(intact))
    if why is not None:
        report(f"checkpoint {checkpoints / str(intact)} {why}; it is restored unverified")
    for step, damage in corrupt.items():
        target = _quarantine(checkpoints / str(step))
        report(
            f"checkpoint {checkpoints / str(step)} is damaged ({damage}); it was moved to "
            f"{target}, and training resumes from step {intact}"
        )


def _last_recorded_step(checkpoints: pathlib.Path) -> int:
    """The last step that has checksums; 0 if none has."""
    names = [path.stem for path in (checkpoints.parent / "checksums").glob("*.json")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _quarantine(step_folder: pathlib.Path) -> pathlib.Path:
    """Moves a checkpoint and its checksums to `STAGE/damaged` and returns the new path."""
    target = _unused_path(step_folder.parents[1] / "damaged" / step_folder.name)
    target.parent.mkdir(exist_ok=True)
    os.replace(step_folder, target)
    recorded = checksums.checksums_path(step_folder)
    if recorded.exists():
        os.replace(recorded, target.with_name(f"{target.name}.json"))
    return target


def _unused_path(path: pathlib.Path) -> pathlib.Path:
    number, unused = 1, path
    while unused.exists():
        number, unused = number + 1, path.with_name(f"{path.name}.{number}")
    return unused
