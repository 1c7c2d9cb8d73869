"""Asynchronous Orbax checkpoints of a stage.

A checkpoint `STAGE/checkpoints/STEP` consists of named items: pytrees of arrays such as "params",
"ema", "training" (optimizer, step, random key) and "statistics", and the JSON item "data", the
position in the data. Sampling restores only the items that it reads.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from diladiff_jax.storage import checksums, stored_arrays
from diladiff_jax.storage.errors import CheckpointError
from diladiff_jax.storage.quarantine import checkpoint_steps, require_intact

_DATA = "data"
_REASON_LENGTH = 200


class Checkpoints:
    """Saves and restores the checkpoints in one folder, `WORKDIR/STAGE/checkpoints`.

    Args:
      directory: the folder; it is created if necessary.
      keep: how many of the latest checkpoints retention keeps.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 2) -> None:
        self.directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, create=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._checksum_writer = (
            checksums.ChecksumWriter(self.directory) if jax.process_index() == 0 else None
        )

    def latest_step(self) -> int | None:
        """The last committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: Mapping[str, Any], data_position: Mapping[str, int]) -> None:
        """Starts to save a checkpoint and returns once the arrays are copied to the host.

        An unfinished earlier save is waited for.

        Args:
          step: number of updates so far.
          items: pytrees of arrays by item name.
          data_position: the position in the data, saved as JSON.

        Raises:
          CheckpointError: this checkpoint or the earlier one cannot be written.
        """
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[_DATA] = ocp.args.JsonSave(dict(data_position))
        if self._checksum_writer is not None:
            # They may be those of a checkpoint of this step that somebody deleted.
            checksums.checksums_path(self.directory / str(step)).unlink(missing_ok=True)
        with self._write_errors():
            if self._checksum_writer is not None:
                self._require_writable()
            self._manager.save(step, args=ocp.args.Composite(**args))
        if self._checksum_writer is not None:
            self._checksum_writer.expect(step)

    def restore(
        self, abstract: Mapping[str, Any], shardings: Mapping[str, Any], *, verify: bool = True
    ) -> tuple[dict[str, Any], dict[str, int]]:
        """Restores the latest checkpoint.

        Args:
          abstract: shapes and dtypes of each item's arrays, by item name.
          shardings: the sharding of each array, in trees of the same structure.
          verify: whether to compare the files with their checksums first.

        Returns:
          The items by name, sharded as asked, and the position in the data.

        Raises:
          CheckpointError: there is no checkpoint, it is damaged, or its shapes differ.
        """
        args = _restore_args(abstract, shardings)
        args[_DATA] = ocp.args.JsonRestore()
        found = self._read(args, verify=verify)
        step_folder = self.directory / str(self.latest_step())
        if self._checksum_writer is not None and checksums.why_unverifiable(step_folder):
            # The process that saved it was killed before it could write them.
            self._checksum_writer.expect(int(step_folder.name))
        return {name: found[name] for name in abstract}, found[_DATA]

    def restore_item(self, name: str, abstract: Any, shardings: Any) -> Any:
        """Restores one item of the latest checkpoint, for example "ema".

        Args:
          name: the item's name.
          abstract: shapes and dtypes of its arrays.
          shardings: the sharding of each array, in a tree of the same structure.

        Raises:
          CheckpointError: there is no checkpoint, it is damaged, or its shapes differ.
        """
        return self._read(_restore_args({name: abstract}, {name: shardings}))[name]

    def describe_last(self) -> str:
        """Describes the last checkpoint in a few words, after waiting for an unfinished save.

        Raises:
          CheckpointError: the unfinished save failed.
        """
        with self._write_errors():
            self.wait()
        return self._describe_last()

    def wait(self) -> None:
        """Waits until the unfinished save is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the unfinished save and ends the background threads.

        Raises:
          CheckpointError: the unfinished save failed.
        """
        try:
            with self._write_errors():
                self._manager.close()
        finally:
            if self._checksum_writer is not None:
                self._checksum_writer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, args: dict[str, Any], *, verify: bool = True) -> Any:
        step = self.latest_step()
        if step is None:
            raise CheckpointError(
                f"{self.directory}: got no checkpoint, expected at least one. "
                f"Train that stage first."
            )
        step_folder = self.directory / str(step)
        # With several processes, the first has verified it before (`quarantine_corrupt` or
        # `require_intact`): if one process alone raised here, the others would wait for it.
        if verify and jax.process_count() == 1:
            require_intact(step_folder, args)
        stored_arrays.require_same_shapes(step_folder, args)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # Orbax raises bare exceptions for damaged files
            line = str(error).strip().partition("\n")[0]
            reason = line.partition(" See full TensorStore details")[0][:_REASON_LENGTH]
            raise CheckpointError(
                stored_arrays.describe_failure(step_folder, args, reason or type(error).__name__)
            ) from error

    def _require_writable(self) -> None:
        """Raises OSError at once; Orbax's background threads would retry for minutes."""
        probe = self.directory / "room"
        probe.mkdir(exist_ok=True)
        probe.rmdir()

    def _describe_last(self) -> str:
        steps = checkpoint_steps(self.directory)
        return (
            f"the last checkpoint is step {max(steps)}" if steps else "there is no checkpoint yet"
        )

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns what Orbax's background threads raise into one line."""
        try:
            yield
        except Exception as error:  # bare exceptions, for example of a full disk
            lines = str(error).strip().splitlines()
            text = lines[0] if lines else type(error).__name__
            # The operating system's own message is at the end.
            reason = text if len(text) <= _REASON_LENGTH else f"... {text[-_REASON_LENGTH:]}"
            raise CheckpointError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); "
                f"{self._describe_last()}. Make room or fix the folder's permissions, "
                f"then run the same command again."
            ) from error


def _restore_args(abstract: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    def with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return {
        name: ocp.args.StandardRestore(jax.tree.map(with_sharding, abstract[name], shardings[name]))
        for name in abstract
    }
