"""Where the stages of a workdir come from: the workdir itself, or the one it was started from.

`launch/train.py --init_from=SOURCE` starts a workdir from another workdir or a bundle, and records
that in `WORKDIR/init_from.json`. From then on, a stage that the workdir has not trained is read
from the source. The exception is a stage with a predecessor that the workdir has trained itself:
the source trained that stage on another predecessor, so it counts as not trained.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Sequence

from diladiff_jax import files, stages
from diladiff_jax.data import tokenizers
from diladiff_jax.storage import bundles, checksums, config_file, pretrained
from diladiff_jax.storage.errors import CheckpointError
from diladiff_jax.storage.quarantine import last_step

Path = str | pathlib.Path

_SOURCE_FILE = "init_from.json"


def home_of_stage(workdir: Path, stage: str, source: Path | None = None) -> pathlib.Path:
    """The workdir or bundle that a stage is read from.

    Args:
      workdir: a workdir or bundle.
      stage: name of the stage.
      source: the workdir or bundle to inherit stages from; default the recorded one.

    Returns:
      The source if only that has the stage and `workdir` has trained none of its predecessors;
      else `workdir`, whether or not it has the stage.

    Raises:
      CheckpointError: a bundle, or the record of the source, cannot be read.
    """
    workdir = pathlib.Path(workdir)
    if any(_steps_in(workdir, earlier) for earlier in (stage, *stages.predecessors(stage))):
        return workdir
    if source is None and _has_source(workdir):
        source = _recorded_source(workdir)
    if source is not None and _steps_in(pathlib.Path(source), stage):
        return pathlib.Path(source)
    return workdir


def trained_steps(workdir: Path, stage: str, source: Path | None = None) -> int:
    """How many updates a stage was trained for, here or in the source; 0 if it was not.

    Takes and raises the same as `home_of_stage`.
    """
    return _steps_in(home_of_stage(workdir, stage, source), stage)


def inherited_stages(workdir: Path, source: Path, trained: Sequence[str]) -> list[str]:
    """The stages that training the stages `trained` in `workdir` reads from `source`.

    The source's other stages do not matter: this workdir has its own, or will.

    Raises:
      CheckpointError: a bundle, or the record of the source, cannot be read.
    """
    needed = (earlier for stage in trained for earlier in stages.predecessors(stage))
    return [
        stage
        for stage in dict.fromkeys(needed)
        if stage not in trained
        and home_of_stage(workdir, stage, source) == pathlib.Path(source) != pathlib.Path(workdir)
    ]


def home_of_trained_stage(workdir: Path, stage: str) -> pathlib.Path:
    """The workdir or bundle that holds the trained stage.

    Raises:
      CheckpointError: the stage is not trained.
    """
    home = home_of_stage(workdir, stage)
    if not _steps_in(home, stage):
        raise not_trained_error(workdir, stage)
    return home


def last_checkpoint(workdir: Path, stage: str) -> pathlib.Path:
    """The folder of the stage's last checkpoint, here or in the source.

    It does not exist if the stage is not trained, or if a bundle holds it.
    """
    home = home_of_stage(workdir, stage)
    return home / stage / "checkpoints" / str(_steps_in(home, stage))


def not_trained_error(workdir: Path, stage: str) -> CheckpointError:
    """The error to raise for a stage that is not trained.

    Raises:
      CheckpointError: the source is gone, which would explain it (see `require_source`).
    """
    if bundles.is_bundle(workdir):
        return CheckpointError(
            f"bundle {workdir} does not hold stage {stage}. Download or export one that does."
        )
    require_source(workdir)
    return CheckpointError(
        f"stage {stage} is not trained in {workdir}. "
        f"Run launch/train.py --workdir={workdir} --stage={stage} first."
    )


def check_source(workdir: Path, source: Path) -> None:
    """Checks that `workdir` can inherit stages from `source`. Writes nothing.

    Args:
      workdir: the workdir to train in; it need not exist.
      source: a workdir or bundle.

    Raises:
      CheckpointError: `source` is neither; its tokenizer or published encoder differs from the
        workdir's; or stages in the workdir were trained from another source.
      DataError: one of the two tokenizers is damaged.
    """
    workdir, source = pathlib.Path(workdir), pathlib.Path(source).absolute()
    if bundles.is_bundle(source):
        bundles.Bundle(source).check()
    _require_no_other_source(workdir, source)
    theirs, ours = source / "tokenizer", workdir / "tokenizer"
    if not (theirs / "tokenizer.json").is_file():
        raise CheckpointError(
            f"--init_from: {source} has no tokenizer, expected the workdir of a trained "
            f"experiment or a bundle."
        )
    hashes = tokenizers.load(theirs).file_hashes()
    if (ours / "tokenizer.json").exists() and tokenizers.load(ours).file_hashes() != hashes:
        raise CheckpointError(
            f"--init_from: the tokenizer of {source} differs from that of {workdir}. "
            f"Use a new workdir."
        )
    if _uses_own_features(source) and (workdir / "features").is_dir():
        for name in pretrained.ENCODER_FILES:
            inherited, present = source / "features" / name, workdir / "features" / name
            if checksums.crc32(inherited) != checksums.crc32(present):
                raise CheckpointError(
                    f"--init_from: {inherited} differs from {present}. Use a new workdir."
                )


def remember_source(workdir: Path, source: Path) -> None:
    """Records the source of a workdir and copies its tokenizer and published encoder.

    Args:
      workdir: an existing workdir.
      source: a workdir or bundle that `check_source` has accepted.

    Raises:
      PretrainedError: a file of the published encoder is missing.
    """
    workdir, source = pathlib.Path(workdir), pathlib.Path(source).absolute()
    if not (workdir / "tokenizer" / "tokenizer.json").exists():
        # This copies the known files only; the folder may be a stranger's and hold others.
        tokenizers.load(source / "tokenizer").save(
            workdir / "tokenizer", {"taken_from": str(source)}
        )
    if _uses_own_features(source):
        pretrained.adopt(str(source / "features"), workdir / "features")
    files.atomic_write_text(workdir / _SOURCE_FILE, json.dumps({"workdir": str(source)}) + "\n")


def require_source(workdir: Path) -> None:
    """Checks that the source of a workdir still exists, if it has one.

    Without this check, training would silently train the inherited stages again.

    Raises:
      CheckpointError: the source does not exist.
    """
    workdir = pathlib.Path(workdir)
    if _has_source(workdir) and not (source := _recorded_source(workdir)).is_dir():
        raise CheckpointError(
            f"{source} does not exist, and {workdir} was started from it. Restore that folder, "
            f"or give its new place with launch/train.py --init_from=FOLDER."
        )


def _require_no_other_source(workdir: pathlib.Path, source: pathlib.Path) -> None:
    """Raises CheckpointError if stages in `workdir` depend on a source other than this one."""
    trained = any(last_step(workdir / stage / "checkpoints") for stage in stages.STAGES)
    if not trained or not _has_source(workdir):
        return
    recorded = None
    with contextlib.suppress(CheckpointError):  # `remember_source` replaces an unreadable record
        recorded = _recorded_source(workdir)
    # If the recorded folder is gone, the source was probably moved.
    if recorded is not None and recorded != source and recorded.is_dir():
        raise CheckpointError(
            f"--init_from: got {source}, but {workdir} was started from {recorded}, and its "
            f"stages were trained from that. Use a new workdir."
        )


def _uses_own_features(source: pathlib.Path) -> bool:
    """Whether the source uses the published encoder in its folder. Without the look at the
    settings, links that a stranger put into a bundle's folder would be followed."""
    settings = config_file.load(source).to_dict()
    return settings["features"]["source"] == "bert" and (source / "features").is_dir()


def _has_source(workdir: pathlib.Path) -> bool:
    """Whether the workdir records a source. A record in a bundle is ignored."""
    return (workdir / _SOURCE_FILE).exists() and not bundles.is_bundle(workdir)


def _recorded_source(workdir: pathlib.Path) -> pathlib.Path:
    path = workdir / _SOURCE_FILE
    try:
        return pathlib.Path(json.loads(path.read_text())["workdir"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not say which workdir this one was started from ({error}). Give it "
            f"again with launch/train.py --init_from=WORKDIR, or move that file elsewhere."
        ) from None


def _steps_in(home: pathlib.Path, stage: str) -> int:
    """Updates of a stage in this workdir or bundle itself."""
    if bundles.is_bundle(home):
        return bundles.Bundle(home).steps(stage)
    return last_step(home / stage / "checkpoints")
