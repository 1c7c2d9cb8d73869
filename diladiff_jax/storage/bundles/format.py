"""The names of a bundle's files and tensors, and its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from typing import Any

from diladiff_jax import files, stages
from diladiff_jax.storage.errors import CheckpointError

MANIFEST = "bundle.json"
STATISTICS = "statistics"

_FORMAT = 1
_MAX_MANIFEST_BYTES = 4 << 20
_QUOTED = 100  # characters of a stranger's text that a message quotes


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """A file's size and hash."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: pathlib.Path) -> FileEntry:
        """Reads a file. Raises OSError if that fails."""
        return cls(path.stat().st_size, sha256(path))


@dataclasses.dataclass(frozen=True)
class StageEntry:
    """How many updates a stage was trained for, and the files that hold its parameters."""

    steps: int
    files: list[str]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`, by file name and by stage."""

    files: dict[str, FileEntry]
    stages: dict[str, StageEntry]

    def write(self, folder: pathlib.Path) -> None:
        """Writes `bundle.json`. Raises OSError if that fails."""
        content = {"format": _FORMAT} | {
            field: {name: dataclasses.asdict(entry) for name, entry in entries.items()}
            for field, entries in (("stages", self.stages), ("files", self.files))
        }
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder is a bundle.

    Raises:
      CheckpointError: it has a bundle's tensors but no manifest, so it is neither a bundle nor a
        workdir.
    """
    folder = files.expand(folder)
    if (folder / MANIFEST).is_file():
        return True
    for path in folder.glob("*.safetensors"):
        if _is_allowed(path.name):
            raise CheckpointError(
                f"{folder} has {path.name} of a bundle but no {MANIFEST}. "
                f"Download the bundle again, or export it again with launch/export.py."
            )
    return False


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads and checks `bundle.json`.

    Raises:
      CheckpointError: it is missing, malformed, of a later format, or names a file that a bundle
        does not have.
    """
    content = _read_json(folder)
    try:
        version = content["format"]
        if type(version) is int and version > _FORMAT:
            raise CheckpointError(
                f"bundle {folder}: format: got {version}, expected {_FORMAT}. "
                f"Use a newer version of this library."
            )
        if version != _FORMAT:
            raise bundle_error(
                folder, f"{MANIFEST}: format: got {quoted(version)}, expected {_FORMAT}"
            )
        manifest = Manifest(
            files={
                name: FileEntry(entry["bytes"], entry["sha256"])
                for name, entry in content["files"].items()
            },
            stages={
                stage: StageEntry(entry["steps"], [str(name) for name in entry["files"]])
                for stage, entry in content["stages"].items()
            },
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _malformed(folder, error) from None
    _check_entries(folder, manifest)
    return manifest


def bundle_error(folder: pathlib.Path, problem: str) -> CheckpointError:
    """The error for a bundle that is damaged or manipulated."""
    return CheckpointError(
        f"bundle {folder}: {problem}. "
        f"Download the bundle again, or export it again with launch/export.py."
    )


def quoted(value: Any) -> str:
    """A stranger's value, short enough for a message."""
    return repr(str(value)[:_QUOTED])


def sha256(path: pathlib.Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError if the file cannot be read."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def tensor_name(path: Any) -> str:
    """The name of a tensor: its path in the tree, with slashes."""
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def _is_allowed(name: str) -> bool:
    """Whether a bundle may have a file of that name."""
    stems = "|".join((*stages.STAGES, STATISTICS))
    return bool(
        re.fullmatch(
            rf"config\.json|(tokenizer|features)/\w[\w.-]*|({stems})(-\d+-of-\d+)?\.safetensors",
            name,
        )
    )


def _read_json(folder: pathlib.Path) -> Any:
    path = folder / MANIFEST
    try:
        with path.open("rb") as data:
            text = data.read(_MAX_MANIFEST_BYTES + 1)
        if len(text) > _MAX_MANIFEST_BYTES:
            raise bundle_error(folder, f"{MANIFEST} is larger than {_MAX_MANIFEST_BYTES} bytes")
        return json.loads(text)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Create a bundle with launch/export.py."
        ) from None
    except (ValueError, RecursionError) as error:
        raise _malformed(folder, error) from None


def _malformed(folder: pathlib.Path, error: Exception) -> CheckpointError:
    reason = f"{type(error).__name__}: {str(error)[:_QUOTED]}"
    return bundle_error(folder, f"{MANIFEST} is not a bundle's manifest ({reason})")


def _check_entries(folder: pathlib.Path, manifest: Manifest) -> None:
    """Raises CheckpointError unless all names are allowed and all values have the right type."""
    for name, entry in manifest.files.items():
        if not _is_allowed(name):
            raise bundle_error(
                folder, f"{MANIFEST} lists {quoted(name)}, which is not a file of a bundle"
            )
        if type(entry.bytes) is not int or entry.bytes < 0 or not isinstance(entry.sha256, str):
            raise bundle_error(folder, f"{MANIFEST} lacks the bytes or the sha256 of {name}")
    known = stages.STAGES
    for stage, entry in manifest.stages.items():
        if stage not in known:
            raise bundle_error(folder, f"{MANIFEST} lists an unknown stage {quoted(stage)}")
        if type(entry.steps) is not int or entry.steps < 1:
            raise bundle_error(
                folder,
                f"{MANIFEST}: steps of stage {stage}: got {quoted(entry.steps)}, "
                f"expected an integer of at least 1",
            )
        names = entry.files
        ours = all(
            name in manifest.files and name.startswith((f"{stage}.", f"{stage}-")) for name in names
        )
        if not names or len(set(names)) < len(names) or not ours:
            raise bundle_error(
                folder,
                f"{MANIFEST}: files of stage {stage}: got {quoted(names)}, "
                f"expected different files of that stage in the list of files",
            )
