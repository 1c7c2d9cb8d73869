"""Training resumes from the last intact checkpoint, and never silently from scratch."""

import random
import shutil

import pytest
from storage.checkpoint_files import STEPS, flip_in_checkpoint, items_at, restored_step

from diladiff_jax.storage import CheckpointError, Checkpoints, checksums, quarantine_corrupt


def test_corrupt_checkpoints_are_moved_and_training_resumes_before_them(stage):
    """Nothing is deleted, and the quarantined steps can be saved again."""
    rng, reported = random.Random(1), []
    for step in (8, 5):
        flip_in_checkpoint(stage, step, rng)
    with pytest.raises(CheckpointError, match="8 is damaged: .* was changed"):
        restored_step(stage)
    quarantine_corrupt(stage / "checkpoints", reported.append)
    assert restored_step(stage) == 3
    assert len(reported) == 2
    for line in reported:
        assert "resumes from step 3" in line and str(stage / "damaged") in line
    moved = {path.name for path in (stage / "damaged").iterdir()}
    assert moved == {"5", "5.json", "8", "8.json"}
    quarantine_corrupt(stage / "checkpoints", reported.append)
    assert len(reported) == 2, "a second call has nothing to do"
    with Checkpoints(stage / "checkpoints") as checkpoints:
        checkpoints.save(5, items_at(5), {"position": 5})
    assert restored_step(stage) == 5


def test_without_an_intact_checkpoint_nothing_is_moved(stage):
    """One line names all of them; every file stays as it is."""
    rng = random.Random(2)
    for step in STEPS:
        flip_in_checkpoint(stage, step, rng)
    before = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match="no intact checkpoint in .*: 8: .*; 5: .*; 3: "
    ) as error:
        quarantine_corrupt(stage / "checkpoints", print)
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == before


BAD_RECORDS = [
    "{",
    "",
    "[]",
    '{"files": {}}',
    '{"files": {}, "crc32": 0}',
    "[" * 20_000,
    '{"files": {"a": [1e999, 0]}, "crc32": 0}',
    '{"files": {"\\u0000": [1, 0], "\\ud800": [1, 0]}, "crc32": 0}',
]


@pytest.mark.parametrize("record", [None, *BAD_RECORDS])
def test_a_checkpoint_without_valid_checksums_is_restored_and_reported(stage, record):
    """The process may have been killed before it wrote them. Restoring writes them again."""
    path, step, reported = stage / "checksums" / "8.json", stage / "checkpoints" / "8", []
    path.unlink() if record is None else path.write_text(record)
    quarantine_corrupt(stage / "checkpoints", reported.append)
    assert len(reported) == 1
    assert f"{step} has " in reported[0] and "restored unverified" in reported[0]
    assert checksums.find_damage(step) is None and restored_step(stage) == 8
    assert checksums.why_unverifiable(step) is None
    quarantine_corrupt(stage / "checkpoints", reported.append)
    assert len(reported) == 1


@pytest.mark.parametrize(
    "lost", ["training", "params/_METADATA", "training/manifest.ocdbt", "data/metadata"]
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_an_incomplete_copy_is_found_without_checksums(stage, lost, how):
    """Files are missing, or empty as a power cut leaves them."""
    shutil.rmtree(stage / "checksums")
    path, reported = stage / "checkpoints" / "8" / lost, []
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"8 is damaged: .* (is missing|is empty)\."):
        restored_step(stage)
    quarantine_corrupt(stage / "checkpoints", reported.append)
    assert restored_step(stage) == 5
    assert len(reported) == 2
    assert "no checksums" in reported[0] and "resumes from step 5" in reported[1]


def test_a_last_checkpoint_that_disappeared_is_reported(stage):
    reported = []
    shutil.rmtree(stage / "checkpoints" / "8")
    quarantine_corrupt(stage / "checkpoints", reported.append)
    gone = stage / "checkpoints" / "8"
    assert reported == [f"checkpoint {gone} is gone; training resumes from step 5"]


@pytest.mark.parametrize("folder_left", [True, False])
def test_training_does_not_restart_when_all_checkpoints_disappeared(stage, folder_left):
    shutil.rmtree(stage / "checkpoints")
    if folder_left:
        (stage / "checkpoints").mkdir()
    with pytest.raises(
        CheckpointError,
        match=f"got no checkpoint, expected step 8, .* Restore a copy, or move {stage} elsewhere",
    ):
        quarantine_corrupt(stage / "checkpoints", print)
