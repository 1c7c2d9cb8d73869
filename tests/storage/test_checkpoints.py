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


def other_key(tree):
    tree["training"]["key"] = np.zeros(4, np.uint32)


def other_width(tree):
    tree["params"]["w"] = np.zeros((3, 5), np.float32)


def another_array(tree):
    tree["params"]["v"] = np.zeros(2, np.float32)


def no_bias(tree):
    del tree["params"]["b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_key, "intact, but its random key has 2 words, expected 4: .*another random"),
        (other_width, r"intact, but its array params/w has shape \[3, 2\], expected \[3, 5\]"),
        (another_array, "other arrays than these settings ask for: it lacks params/v"),
        (no_bias, "other arrays than these settings ask for: it also has params/b"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_reported_with_its_cause(tmp_path, change, words):
    """The cause is in the message, no remedy removes anything, and nothing is changed."""

    def items():
        return {
            "params": {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)},
            "training": {"key": np.zeros(2, np.uint32)},
        }

    folder = tmp_path / "mdlm" / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, items(), {"position": 3})
    before = sorted(tmp_path.rglob("*"))
    asked = items()
    change(asked)
    abstract = jax.eval_shape(lambda: asked)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: sharding, abstract)
    with Checkpoints(folder) as checkpoints, pytest.raises(CheckpointError, match=words) as error:
        checkpoints.restore(abstract, shardings)
    assert "\n" not in str(error.value) and "remove" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before
