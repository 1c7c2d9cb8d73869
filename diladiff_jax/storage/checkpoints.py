"""Asynchronous Orbax checkpoints of a stage: parameters, average, optimizer, statistics, step, key, data position.

Parameters, average and statistics are items of their own, so that a sampler restores only what it reads.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from diladiff_jax.storage import checksums
from diladiff_jax.training.state import TrainState


class CheckpointError(RuntimeError):
    """A checkpoint that is missing or cannot be read: one line that says which and what to do."""


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


class Checkpoints:
    """The checkpoints under `WORKDIR/STAGE/checkpoints`."""

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2) -> None:
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._sealer = (
            checksums.ChecksumWriter(self.directory) if jax.process_index() == 0 else None
        )

    def latest_step(self) -> int | None:
        """The last committed step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data_position: dict[str, int]) -> None:
        """Starts a save and returns once the device arrays are copied; an unfinished earlier save is waited for.

        Raises:
          CheckpointError: this or the earlier one cannot be written.
        """
        items: dict[str, Any] = {
            "params": ocp.args.StandardSave(state.params),
            "training": ocp.args.StandardSave(
                {"optimizer": state.optimizer, "step": state.step, "key": state.key}
            ),
            "data": ocp.args.JsonSave(data_position),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        if state.statistics:
            items["statistics"] = ocp.args.StandardSave(state.statistics)
        step = int(state.step)
        if self._sealer is not None:  # of a checkpoint that was removed by hand
            checksums.sums_of(self.directory / str(step)).unlink(missing_ok=True)
        with self._written():
            if (
                self._sealer is not None
            ):  # asynchronously, Orbax would wait for minutes for a folder that it could not make
                (self.directory / "room").mkdir(exist_ok=True)
                (self.directory / "room").rmdir()
            self._manager.save(step, args=ocp.args.Composite(**items))
        if self._sealer is not None:
            self._sealer.expect(step)

    def restore(
        self, abstract: TrainState, shardings: TrainState, *, verify: bool = True
    ) -> tuple[TrainState, dict[str, int]]:
        """The latest state, laid out by `shardings`, and the data position; `verify` holds it against its checksums first.

        Raises:
          CheckpointError: it cannot be read, or has other shapes.
        """
        a = _abstract(abstract, shardings)
        items: dict[str, Any] = {
            "params": ocp.args.StandardRestore(a.params),
            "training": ocp.args.StandardRestore(
                {"optimizer": a.optimizer, "step": a.step, "key": a.key}
            ),
            "data": ocp.args.JsonRestore(),
        }
        if a.ema is not None:
            items["ema"] = ocp.args.StandardRestore(a.ema)
        if a.statistics:
            items["statistics"] = ocp.args.StandardRestore(a.statistics)
        found = self._read(items, verify=verify)
        training = found["training"]
        state = TrainState(
            step=training["step"],
            params=found["params"],
            ema=found.get("ema"),
            optimizer=training["optimizer"],
            statistics=found.get("statistics", {}),
            key=training["key"],
        )
        if self._sealer is not None and checksums.unverified(
            self.directory / str(self.latest_step())
        ):
            self._sealer.expect(self.latest_step())  # its process was killed before it could
        return state, found["data"]

    def restore_averaged(self, abstract_params: Any, shardings: Any, *, ema: bool) -> Any:
        """Only the parameters that samplers use: the average where one is kept.

        Raises:
          CheckpointError: none there, unreadable, or of other shapes.
        """
        item = "ema" if ema else "params"
        return self._read({item: ocp.args.StandardRestore(_abstract(abstract_params, shardings))})[
            item
        ]

    def restore_statistics(self, abstract: Any, shardings: Any) -> Any:
        """Only the statistics.

        Raises:
          CheckpointError: none there, unreadable, or of other shapes.
        """
        return self._read({"statistics": ocp.args.StandardRestore(_abstract(abstract, shardings))})[
            "statistics"
        ]

    def _read(self, items: dict[str, Any], *, verify: bool = True) -> Any:
        step = self.latest_step()
        if step is None:
            raise CheckpointError(f"{self.directory} holds no checkpoint; train that stage first")
        # Of several processes the first has looked before (`quarantine_corrupt`, `require_intact`): one that stops alone leaves the others waiting.
        why = (
            checksums.find_damage(self.directory / str(step), items)
            if verify and jax.process_count() == 1
            else None
        )
        if why is not None:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged: {why}; launch/train.py on its workdir and stage goes on from the one before"
            )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            first = (
                str(error).strip().partition("\n")[0].partition(" See full TensorStore details")[0]
            )
            reason = first[:200] or type(error).__name__
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read as this experiment's ({reason}); "
                f"remove that folder to go on from the one before, or use the config it was made with"
            ) from error

    def last(self) -> str:
        """What there is to go on from, in words; a save under way is waited for. Raises CheckpointError where that cannot be written."""
        with self._written():
            self.wait()
        return self._last()

    def _last(self) -> str:
        there = checkpoint_steps(self.directory)
        return f"the last one there is step {max(there)}" if there else "there is none before"

    def wait(self) -> None:
        """Until the save under way is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the save under way and ends the background threads. Raises CheckpointError where it cannot be written."""
        try:
            with self._written():
                self._manager.close()
        finally:
            if self._sealer is not None:
                self._sealer.close()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # Orbax's background threads hand on bare ones: no space, no permission
            text = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            reason = (
                text if len(text) <= 200 else f"... {text[-200:]}"
            )  # what the system said stands last
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); {self._last()}"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def quarantine_corrupt(checkpoints: pathlib.Path, say: Callable[[str], None]) -> None:
    """Moves damaged checkpoints that are newer than the last whole one to `STAGE/damaged/STEP`, so that training goes on from that one.

    Raises:
      CheckpointError: none is whole, or none is there where some were. Nothing is moved then: training must not begin anew unasked.
    """
    steps = sorted(checkpoint_steps(checkpoints), reverse=True)
    sealed = max(
        (
            int(path.stem)
            for path in (checkpoints.parent / "checksums").glob("*.json")
            if path.stem.isdecimal()
        ),
        default=0,
    )
    anew = f"put a copy back, or remove {checkpoints.parent} to train this stage anew"
    if sealed and not steps:
        raise CheckpointError(
            f"{checkpoints} holds no checkpoint, and step {sealed} was there; {anew}"
        )
    found: list[tuple[int, str]] = []
    for step in steps:
        why = checksums.find_damage(checkpoints / str(step))
        if why is None:
            break
        found.append((step, why))
    if sealed > max(steps, default=0) and len(found) < len(steps):
        say(
            f"checkpoint {checkpoints / str(sealed)} is gone; training goes on from step {steps[len(found)]}"
        )
    if len(found) < len(steps) and (
        why := checksums.unverified(checkpoints / str(steps[len(found)]))
    ):
        say(f"checkpoint {checkpoints / str(steps[len(found)])} {why}; it is read as it is")
    if not found:
        return
    if len(found) == len(steps):
        raise CheckpointError(
            f"no checkpoint in {checkpoints} is whole: "
            + "; ".join(f"{step}: {why}" for step, why in found)
            + f"; {anew}"
        )
    good = steps[len(found)]
    for step, why in found:
        goal = _free(checkpoints.parent / "damaged" / str(step))
        goal.parent.mkdir(exist_ok=True)
        os.replace(checkpoints / str(step), goal)
        if checksums.sums_of(checkpoints / str(step)).exists():
            os.replace(
                checksums.sums_of(checkpoints / str(step)), goal.with_name(f"{goal.name}.json")
            )
        say(
            f"checkpoint {checkpoints / str(step)} is damaged ({why}); it is now {goal}, and training goes on from step {good}"
        )


def checkpoint_steps(checkpoints: pathlib.Path) -> list[int]:
    """The committed steps under a checkpoint directory, in no order; none where there is no such folder."""
    if not checkpoints.is_dir():
        return []
    return [
        int(entry.name)
        for entry in checkpoints.iterdir()
        if entry.name.isdecimal() and entry.is_dir()
    ]


def require_intact(step_folder: pathlib.Path, items: Iterable[str]) -> None:
    """Raises CheckpointError where these items of a checkpoint are damaged."""
    why = checksums.find_damage(step_folder, items)
    if why is not None:
        raise CheckpointError(
            f"checkpoint {step_folder} is damaged: {why}; launch/train.py on its workdir and stage goes on from the one before"
        )


def _free(path: pathlib.Path) -> pathlib.Path:
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number}")
    return free
