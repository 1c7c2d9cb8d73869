"""Checksums of checkpoints. Orbax notices a file that is missing, and of one that was changed after it was committed most often nothing:
a flipped bit comes back as another parameter. Here a checkpoint is held against what was written before anything is read from it.

`STAGE/checksums/STEP.json` is written by the first process once `STAGE/checkpoints/STEP` is committed:
`{"files": {path: [bytes, crc32]}, "crc32": of "files" as text}`.
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

_CHUNK = 1 << 20


def sums_of(step_folder: pathlib.Path) -> pathlib.Path:
    """Where the checksums of a checkpoint are."""
    return step_folder.parents[1] / "checksums" / f"{step_folder.name}.json"


def crc32(path: pathlib.Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as data:
        while chunk := data.read(_CHUNK):
            found = zlib.crc32(chunk, found)
    return found


def _item_files(step_folder: pathlib.Path) -> Iterator[pathlib.Path]:
    # Orbax may still touch what lies beside the items when the folder is there, and systems leave hidden files of their own anywhere.
    return (
        path
        for item in sorted(step_folder.iterdir())
        if item.is_dir()
        for path in sorted(item.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    )


def write_checksums(step_folder: pathlib.Path) -> None:
    """Has a committed checkpoint on the disk, and then writes its checksums.

    Raises:
      OSError: it is gone, or there is no space.
    """
    found, folders = {}, {step_folder, step_folder.parent}
    for path in _item_files(step_folder):
        found[str(path.relative_to(step_folder))] = [path.stat().st_size, crc32(path)]
        files.sync(path)  # Orbax leaves some of them, the data position too, to the system
        folders |= {path.parent}
    for folder in folders:
        files.sync(folder)
    target = sums_of(step_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write_text(target, json.dumps({"files": found, "crc32": _total(found)}))


def _total(found: dict[str, list[int]]) -> int:
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())


def _recorded(step_folder: pathlib.Path) -> dict[str, list[int]]:
    """`{path: [bytes, crc32]}`. Raises OSError where there is no record, ValueError where it is not as it was written."""
    try:
        record = json.loads(sums_of(step_folder).read_text())
        found = record["files"]
        formed = bool(found) and all(
            type(size) is int and type(total) is int for size, total in found.values()
        )
        if formed and record.get("crc32", _total(found)) == _total(
            found
        ):  # earlier versions wrote no total
            return found
    except (KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ValueError("another total")


def unverified(step_folder: pathlib.Path) -> str | None:
    """Why a checkpoint cannot be held against checksums; None where it can."""
    try:
        _recorded(step_folder)
    except FileNotFoundError:
        return "has no checksums (its process ended before they were written, or they were not copied along)"
    except (OSError, ValueError):
        return f"has checksums, {sums_of(step_folder)}, that cannot be read"
    return None


def find_damage(step_folder: pathlib.Path, items: Iterable[str] | None = None) -> str | None:
    """What is not as it was written, in these items or in all: "FILE is missing", "FILE has 10 bytes of 20", "FILE was changed".

    None where all is well. Without checksums to hold it against (see `unverified`) only files that are missing or empty are seen, as
    they are where a copy or a disk ended early.
    """
    items = None if items is None else set(items)
    try:
        wanted = _recorded(step_folder)
    except (OSError, ValueError):
        return _gap(step_folder, items)
    try:
        for path in _item_files(step_folder):
            if (name := str(path.relative_to(step_folder))) not in wanted and (
                items is None or name.split("/")[0] in items
            ):
                return f"{name} was not among its files"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    for name, (size, total) in wanted.items():
        if items is not None and name.split("/")[0] not in items:
            continue
        path = step_folder / name
        try:
            found = path.stat().st_size
            if found != size:
                return f"{name} has {found} bytes of {size}"
            if crc32(path) != total:
                return f"{name} was changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


_ALWAYS = {"params", "training", "data"}  # items of every checkpoint


def _gap(step_folder: pathlib.Path, items: set[str] | None) -> str | None:
    try:
        for item in sorted(_ALWAYS if items is None else items):
            if item not in _ALWAYS and not (step_folder / item).is_dir():
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


class ChecksumWriter:
    """Seals checkpoints in a thread, as soon as they are committed."""

    def __init__(self, checkpoints: pathlib.Path) -> None:
        self._checkpoints, self._steps, self._closing = (
            checkpoints,
            queue.SimpleQueue[int | None](),
            threading.Event(),
        )
        self._thread: threading.Thread | None = None

    def expect(self, step: int) -> None:
        """A save of `step` is under way."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="checksums", daemon=True)
            self._thread.start()
        self._steps.put(step)

    def close(self) -> None:
        """To be called when everything is committed: seals what is left, and ends the thread."""
        if self._thread is not None:
            self._closing.set()
            self._steps.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            # Retention may be faster, or the disk full: a checkpoint without checksums is read as it is.
            with contextlib.suppress(OSError):
                folder = self._checkpoints / str(step)
                while not folder.is_dir() and not self._closing.wait(0.1):
                    pass
                write_checksums(folder)
                for old in sums_of(folder).parent.glob("*.json"):
                    if not (self._checkpoints / old.stem).is_dir():
                        old.unlink(missing_ok=True)
