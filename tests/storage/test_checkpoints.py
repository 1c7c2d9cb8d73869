"""Saving and restoring checkpoints."""

import json
import shutil

import jax
import numpy as np
import pytest
from storage.checkpoint_files import STEPS, files_of, items_at, restored_step

from diladiff_jax.storage import CheckpointError, Checkpoints, checksums


def test_every_committed_checkpoint_has_checksums_of_all_files_of_its_items(written):
    assert {int(path.stem) for path in (written / "checksums").iterdir()} == set(STEPS)
    for step in STEPS:
        recorded = json.loads((written / "checksums" / f"{step}.json").read_text())["files"]
        paths = {written / "checkpoints" / str(step) / name for name in recorded}
        assert paths == set(files_of(written, step)) and len(paths) > 10
        assert checksums.find_damage(written / "checkpoints" / str(step)) is None
    assert restored_step(written) == 8


def test_retention_deletes_checksums_with_their_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "mdlm" / "checkpoints", keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(step, items_at(step), {"position": step})
    kept = {path.name for path in (tmp_path / "mdlm" / "checkpoints").iterdir()}
    recorded = {path.stem for path in (tmp_path / "mdlm" / "checksums").iterdir()}
    assert {name for name in kept if name.isdigit()} == recorded == {"4", "5"}


def test_one_item_is_restored_without_the_others(stage):
    """Other items may even be gone."""
    shutil.rmtree(stage / "checkpoints" / "8" / "training")
    abstract = jax.eval_shape(lambda: items_at(0)["ema"])
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(stage / "checkpoints") as checkpoints:
        found = checkpoints.restore_item(
            "ema", abstract, jax.tree.map(lambda _: sharding, abstract)
        )
    jax.tree.map(np.testing.assert_array_equal, found, items_at(8)["ema"])


def test_an_unwritable_folder_is_reported_at_once(stage):
    """Orbax would let training continue, and then retry for minutes."""
    checkpoints = Checkpoints(stage / "checkpoints", keep=3)
    shutil.rmtree(stage / "checkpoints")
    (stage / "checkpoints").write_text("a file instead of the folder")
    with pytest.raises(CheckpointError, match="cannot be written to .*checkpoints") as error:
        checkpoints.save(9, items_at(9), {"position": 9})
    assert "\n" not in str(error.value)
    checkpoints.close()


def test_stale_checksums_do_not_condemn_a_new_checkpoint_of_the_same_step(stage, monkeypatch):
    """The old checkpoint was removed manually; the new one's process is killed before it writes
    checksums."""
    shutil.rmtree(stage / "checkpoints" / "8")
    monkeypatch.setattr(checksums.ChecksumWriter, "expect", lambda self, step: None)
    with Checkpoints(stage / "checkpoints", keep=3) as checkpoints:
        checkpoints.save(8, items_at(8), {"position": 8})
    assert checksums.find_damage(stage / "checkpoints" / "8") is None
    assert restored_step(stage) == 8
