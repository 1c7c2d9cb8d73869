"""What a trained stage was made from, recorded when its training starts.

`WORKDIR/STAGE/made_from.json` has the step and a digest of each stage whose frozen parameters this
one was trained with, and the digest of the tokenizer:

    {"tokenizer": DIGEST, "stages": {"mdlm": {"step": 40, "digest": DIGEST}}}

Without it, a predecessor that is trained further would go unnoticed, and a latent would be encoded
from other features than those that the later stages know.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from diladiff_jax import files, stages
from diladiff_jax.data.hashing import short_hash
from diladiff_jax.storage import bundles, checksums, lineage
from diladiff_jax.storage.quarantine import last_step

_FILE = "made_from.json"


def dependencies(stage: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages whose frozen parameters a stage reads, the earliest first."""
    sources = stages.stage_named(stage).frozen.values()
    found = {stages.resolve_source(source, settings)[0] for source in sources}
    return tuple(name for name in stages.STAGES if name in found)


def record(workdir: pathlib.Path, stage: str, settings: Mapping[str, Any]) -> None:
    """Records what the stage is trained from, unless it has a checkpoint already.

    Raises:
      OSError: the workdir cannot be written.
    """
    if last_step(workdir / stage / "checkpoints"):
        return
    (workdir / stage).mkdir(parents=True, exist_ok=True)
    content = _present(workdir, stage, settings)
    files.atomic_write_text(workdir / stage / _FILE, json.dumps(content, indent=2) + "\n")


def changes(workdir: pathlib.Path, stage: str, settings: Mapping[str, Any]) -> list[str]:
    """What has changed since a stage of this workdir was trained, in words; usually nothing.

    What is not recorded, as in workdirs of earlier versions, counts as unchanged.
    """
    if bundles.is_bundle(workdir) or not last_step(workdir / stage / "checkpoints"):
        return []
    then, now = _recorded(workdir, stage), _present(workdir, stage, settings)
    found = list(_differences(then["stages"], now["stages"]))
    if then["tokenizer"] not in (None, now["tokenizer"]):
        found.append("the tokenizer is another one")
    return found


def recorded_steps(workdir: pathlib.Path, stage: str) -> dict[str, int]:
    """The steps of the stages that a trained stage of this workdir read; {} if not recorded."""
    if bundles.is_bundle(workdir) or not last_step(workdir / stage / "checkpoints"):
        return {}
    return {name: found["step"] for name, found in _recorded(workdir, stage)["stages"].items()}


def dependents(workdir: pathlib.Path, stage: str, settings: Mapping[str, Any]) -> list[str]:
    """The stages trained in this workdir that read the stage's frozen parameters."""
    return [
        other
        for other in stages.STAGES
        if stage in dependencies(other, settings) and last_step(workdir / other / "checkpoints")
    ]


def keep_checkpoint(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Keeps the last checkpoint in `STAGE/kept/STEP`, which retention does not remove.

    Files are linked where the file system allows it, so that no space is needed.

    Raises:
      OSError: the workdir cannot be written.
    """
    source = lineage.last_checkpoint(workdir, stage)
    kept = workdir / stage / "kept" / source.name
    if not kept.exists():
        with files.atomic_folder(kept) as folder:
            shutil.copytree(source, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        recorded = checksums.checksums_path(source)
        if recorded.exists():
            shutil.copy2(recorded, kept.with_name(f"{kept.name}.json"))
    return kept


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _recorded(workdir: pathlib.Path, stage: str) -> dict[str, Any]:
    """The content of the record; an empty one if it is missing or damaged."""
    try:
        found = json.loads((workdir / stage / _FILE).read_text())
        complete = all(isinstance(about["step"], int) for about in found["stages"].values())
        if complete and "tokenizer" in found:
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return {"tokenizer": None, "stages": {}}


def _present(workdir: pathlib.Path, stage: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the record for the workdir as it is now."""
    return {
        "tokenizer": _tokenizer_digest(workdir),
        "stages": {
            name: {"step": lineage.trained_steps(workdir, name), "digest": _digest(workdir, name)}
            for name in dependencies(stage, settings)
        },
    }


def _digest(workdir: pathlib.Path, stage: str) -> str | None:
    """A digest of the stage's last checkpoint; None if it has no checksums."""
    home = lineage.home_of_stage(workdir, stage)
    if bundles.is_bundle(home):
        path = home / "bundle.json"
    else:
        path = checksums.checksums_path(lineage.last_checkpoint(workdir, stage))
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _tokenizer_digest(workdir: pathlib.Path) -> str | None:
    try:
        recorded = json.loads((workdir / "tokenizer" / "tokenizer.json").read_text())
        return short_hash([recorded[name] for name in ("kind", "lowercase", "sha256")])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, before in then.items():
        after = now.get(name)
        if after is None:
            continue
        if before["step"] != after["step"]:
            yield f"{name} went from step {before['step']} to {after['step']}"
        elif None not in (before.get("digest"), after["digest"]) and (
            before["digest"] != after["digest"]
        ):
            yield f"the checkpoint of {name} at step {after['step']} was replaced by another"
