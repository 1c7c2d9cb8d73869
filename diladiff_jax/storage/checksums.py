"""Checksums that detect any change to a checkpoint after it was committed.

`STAGE/checksums/STEP.json` lists every file of `STAGE/checkpoints/STEP`. The first process writes
it once Orbax has committed the step:

    {"files": {path: [bytes, crc32]}, "crc32": CRC-32 of "files" as text}

Orbax itself detects a missing file but few changed ones, and restores a flipped bit as another
parameter. Its zarr3 format does not help: the public option (`use_zarr3`) puts zarr's `crc32c`
codec on the index of a shard, not on the numbers. The table counts restores that raised no error,
and those of them that returned other values, with orbax-checkpoint 0.12.8. Each of 400 restores
was of a checkpoint of 62 kB with one random bit flipped, half of them uniform over files and half
uniform over bytes.

    format                                                no error    other values
    zarr2 in OCDBT, the default (used here)                    304             146
    zarr3 in OCDBT                                             312             183
    zarr3 in OCDBT, crc32c on chunks (private function)        127               4
    any of them, checksums verified first (600 flips)            0               0

The third row needs a patched Orbax and another format on disk, misses flips in the data position
(which is JSON), and could not tell which of several steps is intact without restoring each.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import queue
import threading
import zlib
from collections.abc import Iterable, Iterator

from diladiff_jax import files

_CHUNK_BYTES = 1 << 20
_REQUIRED_ITEMS = {"params", "training", "data"}


def checksums_path(step_folder: pathlib.Path) -> pathlib.Path:
    """The file with the checksums of a checkpoint."""
    return step_folder.parents[1] / "checksums" / f"{step_folder.name}.json"


def crc32(path: pathlib.Path) -> int:
    """The CRC-32 of a file.

    Raises:
      OSError: the file cannot be read.
    """
    value = 0
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def write_checksums(step_folder: pathlib.Path) -> None:
    """Syncs a committed checkpoint to disk, then writes its checksums.

    Raises:
      OSError: the checkpoint is gone, or the disk is full.
    """
    record, folders = {}, {step_folder, step_folder.parent}
    for path in _item_files(step_folder):
        record[str(path.relative_to(step_folder))] = [path.stat().st_size, crc32(path)]
        files.sync(path)  # Orbax does not sync all of its files, for example the data position.
        folders.add(path.parent)
    for folder in folders:
        files.sync(folder)
    target = checksums_path(step_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write_text(
        target, json.dumps({"files": record, "crc32": _record_checksum(record)})
    )


def why_unverifiable(step_folder: pathlib.Path) -> str | None:
    """Why a checkpoint cannot be verified, as the predicate of a sentence; None if it can be."""
    try:
        _recorded(step_folder)
    except FileNotFoundError:
        return "has no checksums (training was killed before it wrote them, or a copy omitted them)"
    except (OSError, ValueError):
        return f"has unreadable checksums in {checksums_path(step_folder)}"
    return None


def find_damage(step_folder: pathlib.Path, items: Iterable[str] | None = None) -> str | None:
    """Compares a checkpoint with its checksums.

    Without readable checksums (see `why_unverifiable`), only missing and empty files are found:
    the traces of a copy or a disk write that ended early.

    Args:
      step_folder: `STAGE/checkpoints/STEP`.
      items: the items to check, for example "params"; default all.

    Returns:
      The first damage, such as "FILE is missing" or "FILE was changed"; None if there is none.
    """
    items = None if items is None else set(items)
    try:
        recorded = _recorded(step_folder)
    except (OSError, ValueError):
        return _missing_or_empty(step_folder, items)
    try:
        for path in _item_files(step_folder):
            name = str(path.relative_to(step_folder))
            if name not in recorded and _is_part_of(name, items):
                return f"{name} was added"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, (size, checksum) in recorded.items():
        if _is_part_of(name, items):
            damage = _file_damage(step_folder / name, name, size, checksum)
            if damage is not None:
                return damage
    return None


class ChecksumWriter:
    """Writes the checksums of each checkpoint in a thread, as soon as Orbax has committed it."""

    def __init__(self, checkpoints: pathlib.Path) -> None:
        self._checkpoints = checkpoints
        self._steps: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, step: int) -> None:
        """Announces that a save of `step` has started, or that its checksums are missing."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def close(self) -> None:
        """Writes the remaining checksums and ends the thread. Call it when all saves are done."""
        if self._thread is not None:
            self._closing.set()
            self._steps.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            # Retention may have deleted the step, or the disk may be full. A checkpoint without
            # checksums can still be restored, so this must not stop training.
            with contextlib.suppress(OSError):
                self._write(step)

    def _write(self, step: int) -> None:
        folder = self._checkpoints / str(step)
        while not folder.is_dir() and not self._closing.wait(0.1):
            pass
        write_checksums(folder)
        for old in checksums_path(folder).parent.glob("*.json"):
            if not (self._checkpoints / old.stem).is_dir():
                old.unlink(missing_ok=True)


def _item_files(step_folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files inside the items. Orbax may still write files beside them after the commit, and
    operating systems add hidden files anywhere."""
    return (
        path
        for item in sorted(step_folder.iterdir())
        if item.is_dir()
        for path in sorted(item.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    )


def _record_checksum(record: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _recorded(step_folder: pathlib.Path) -> dict[str, list[int]]:
    """`{path: [bytes, crc32]}`. Raises OSError if there is no record, ValueError if it is bad."""
    try:
        record = json.loads(checksums_path(step_folder).read_text())
        found = record["files"]
        well_formed = bool(found) and all(
            type(size) is int and type(checksum) is int for size, checksum in found.values()
        )
        if well_formed:
            expected = _record_checksum(found)
            # Records of earlier versions have no checksum of their own.
            if record.get("crc32", expected) == expected:
                return found
    except (KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("the record's own checksum differs")


def _is_part_of(name: str, items: set[str] | None) -> bool:
    return items is None or name.split("/")[0] in items


def _file_damage(path: pathlib.Path, name: str, size: int, checksum: int) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
        if crc32(path) != checksum:
            return f"{name} was changed"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None


def _missing_or_empty(step_folder: pathlib.Path, items: set[str] | None) -> str | None:
    """The damage that can be found without checksums."""
    try:
        for item in sorted(_REQUIRED_ITEMS if items is None else items):
            if item not in _REQUIRED_ITEMS and not (step_folder / item).is_dir():
                continue
            for name in ("metadata",) if item == "data" else ("_METADATA", "manifest.ocdbt"):
                if not (step_folder / item / name).is_file():
                    return f"{item}/{name} is missing"
        for path in _item_files(step_folder):
            if not path.stat().st_size:
                return f"{path.relative_to(step_folder)} is empty"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None
