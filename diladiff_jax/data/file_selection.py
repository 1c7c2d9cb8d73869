"""Which files a corpus consists of: a folder, a glob or a path, as the user wrote it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from diladiff_jax.data.errors import DataError
from diladiff_jax.files import expand

_COMPRESSED = (".gz", ".xz", ".zst")
_KINDS = (".txt", ".jsonl", ".parquet")
READABLE = ".txt, .jsonl (either also .gz, .xz or .zst) or .parquet"
_SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "__pycache__", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The files of a corpus, and what was left out of it.

    Attributes:
      paths: the readable files, sorted by path; each file once, however many links lead to it.
      left_out: why, and how many files each, for the log.
    """

    paths: tuple[Path, ...]
    left_out: dict[str, int]


def matching(files: str) -> list[Path]:
    """The readable files in a folder, of a glob, or at a path, sorted by path.

    Raises:
      DataError: nothing matches, or a matching file outside a folder has an unknown format.
    """
    return list(select(files).paths)


def select(files: str) -> Selection:
    """`matching`, and what was left out. Raises as `matching` does.

    A path that exists is never taken for a glob. Hidden files and folders (such as
    `.ipynb_checkpoints`) and those that operating systems add are left out, unless the path itself
    names them. Links are followed once.
    """
    if not files:
        raise DataError(f"data.files: got '', expected a folder, a glob or a file of {READABLE}")
    path, left_out = expand(files), collections.Counter[str]()
    if path.is_dir():
        found = [p for p in _files_below(path, left_out) if kind(p) or _note(left_out, p)]
    else:
        found = [path] if path.exists() else _globbed(path, left_out)
        unreadable = [p for p in found if not kind(p)]
        if unreadable:
            raise DataError(f"{unreadable[0]} has an unknown format, expected {READABLE}")
    found = _each_once(found, left_out)
    if not found:
        raise DataError(
            f"data.files={files!r} matches no file; "
            f"expected a folder, a glob or a file of {READABLE}"
        )
    return Selection(tuple(found), dict(left_out))


def describe(selection: Selection) -> Iterator[str]:
    """Lines for the log: every file with its size and the start of its SHA-256; what is left out.

    The last line has one digest for all files, so that two preparations can be compared.
    """
    together, size = hashlib.sha256(), 0
    for path in selection.paths:
        digest, bytes_ = file_digest(path), path.stat().st_size
        together.update(f"{digest}\n".encode())
        size += bytes_
        yield f"corpus: {path} ({bytes_:,} bytes, sha256 {digest[:12]})"
    for why, count in selection.left_out.items():
        yield f"corpus: {count} left out ({why})"
    count = len(selection.paths)
    noun = "file" if count == 1 else "files"
    yield f"corpus: {count} {noun}, {size:,} bytes, sha256 of all {together.hexdigest()[:12]}"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
      DataError: it cannot be read.
    """
    try:
        with path.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def kind(path: Path) -> str:
    """'.txt', '.jsonl', '.parquet', or '' for a file of unknown format."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in (".txt", ".jsonl") else ""
    return suffix if suffix in _KINDS else ""


def _note(left_out: collections.Counter[str], path: Path) -> bool:
    left_out[f"format {path.suffix or 'without a suffix'}"] += 1
    return False


def _is_extra(name: str) -> bool:
    """Whether a file or folder is hidden, or one that operating systems add."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _files_below(folder: Path, left_out: collections.Counter[str]) -> list[Path]:
    """All files in a folder but hidden and system ones. Linked folders come after real ones."""
    found: list[Path] = []
    waiting, visited = collections.deque([folder]), set[tuple[int, int]]()
    while waiting:
        for root, folders, names in os.walk(waiting.popleft()):
            about = os.stat(root)
            if (about.st_dev, about.st_ino) in visited:
                folders.clear()
                continue
            visited.add((about.st_dev, about.st_ino))
            for name in (*folders, *names):
                if _is_extra(name):
                    left_out["hidden, or added by the operating system"] += 1
            folders[:] = sorted(name for name in folders if not _is_extra(name))
            linked = [
                Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))
            ]
            waiting.extend(linked)
            paths = [Path(root, name) for name in names if not _is_extra(name)]
            found += [path for path in paths if path.is_file()]
    return sorted(found)


def _globbed(pattern: Path, left_out: collections.Counter[str]) -> list[Path]:
    """The files that match a glob. The part of it that is an existing folder is taken literally."""
    parts, literal = pattern.parts, 0
    while literal < len(parts) and Path(*parts[: literal + 1]).exists():
        literal += 1
    escaped = [glob.escape(part) for part in parts[:literal]]
    written = os.path.join(*escaped, *parts[literal:])
    found = sorted(p for p in map(Path, glob.glob(written, recursive=True)) if p.is_file())
    kept = [p for p in found if not any(map(_is_system, p.parts[literal:]))]
    if len(kept) < len(found):
        left_out["hidden, or added by the operating system"] += len(found) - len(kept)
    return kept


def _is_system(name: str) -> bool:
    return name in _SYSTEM_FOLDERS


def _each_once(paths: Iterable[Path], left_out: collections.Counter[str]) -> list[Path]:
    """Each file once. Of several paths to a file, one that is no link is kept."""
    chosen: dict[tuple[int, int], Path] = {}
    for path in sorted(paths, key=lambda path: (_through_link(path), path)):
        about = path.stat()
        if (about.st_dev, about.st_ino) in chosen:
            left_out["another path to a file that is read already"] += 1
        else:
            chosen[about.st_dev, about.st_ino] = path
    return sorted(chosen.values())


@functools.cache
def _folder_through_link(folder: Path) -> bool:
    return folder.resolve() != folder.absolute()


def _through_link(path: Path) -> bool:
    return path.is_symlink() or _folder_through_link(path.parent)
