"""Checksums of checkpoints. Orbax notices a file that is missing, and of one that was changed after it was committed most often nothing:
a flipped bit comes back as another parameter. Here a checkpoint is held against what was written before anything is read from it.

`STAGE/checksums/STEP.json` is written by the first process once `STAGE/checkpoints/STEP` is committed: `{"files": {path: [bytes, crc32]}}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import threading
import zlib
from collections.abc import Iterable, Iterator

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
    # Orbax may still touch what lies beside the items when the folder is there.
    return (path for item in sorted(step_folder.iterdir()) if item.is_dir() for path in sorted(item.rglob("*")) if path.is_file())


def seal(step_folder: pathlib.Path) -> None:
    """Writes the checksums of a committed checkpoint, aside and renamed.

    Raises:
      OSError: it is gone, or there is no space.
    """
    files = {str(path.relative_to(step_folder)): [path.stat().st_size, crc32(path)] for path in _item_files(step_folder)}
    target = sums_of(step_folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".tmp")
    with aside.open("w") as out:
        out.write(json.dumps({"files": files}))
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, target)


def damage(step_folder: pathlib.Path, items: Iterable[str] | None = None) -> str | None:
    """What is not as it was written, in these items or in all: "FILE is missing", "FILE has 10 bytes of 20", "FILE was changed".

    None where all is well, and where there are no checksums to hold it against: of an older checkpoint, of one whose process was killed
    before they were written, or where they themselves cannot be read.
    """
    try:
        files = json.loads(sums_of(step_folder).read_text())["files"]
        wanted = {name: (int(size), int(total)) for name, (size, total) in files.items() if items is None or name.split("/")[0] in items}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for name, (size, total) in wanted.items():
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


class Sealer:
    """Seals checkpoints in a thread, as soon as they are committed."""

    def __init__(self, checkpoints: pathlib.Path) -> None:
        self._checkpoints, self._steps, self._closing = checkpoints, queue.SimpleQueue[int | None](), threading.Event()
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
                seal(folder)
                for old in sums_of(folder).parent.glob("*.json"):
                    if not (self._checkpoints / old.stem).is_dir():
                        old.unlink(missing_ok=True)
