"""Checksums find any damage of a checkpoint and condemn no intact one."""

import binascii
import json
import random
import shutil

import numpy as np
import pytest
from storage.checkpoint_files import files_of, flip, items_at, remove, truncate

from diladiff_jax.storage import checksums


def test_the_checksum_is_the_standard_crc32(tmp_path):
    """Its check value is cbf43926, and files longer than a chunk are read in full."""
    (tmp_path / "check").write_bytes(b"123456789")
    assert checksums.crc32(tmp_path / "check") == 0xCBF43926
    data = np.random.default_rng(0).bytes((5 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    assert checksums.crc32(tmp_path / "large") == binascii.crc32(data)


@pytest.mark.parametrize("damage", [flip, truncate, remove])
def test_any_damage_of_any_file_is_found(stage, damage):
    """It is attributed to the right file and item."""
    rng, step = random.Random(0), stage / "checkpoints" / "8"
    for path in files_of(stage, 8):
        if not path.stat().st_size:
            continue
        before, item = path.read_bytes(), path.relative_to(step).parts[0]
        damage(path, rng)
        assert str(path.relative_to(step)) in checksums.find_damage(step)
        assert checksums.find_damage(step, [item])
        assert not checksums.find_damage(step, {*items_at(0), "data"} - {item})
        path.write_bytes(before)
    assert checksums.find_damage(step) is None


def test_an_added_file_is_damage_unless_it_is_hidden(stage):
    """Operating systems add hidden files such as .DS_Store."""
    step = stage / "checkpoints" / "8"
    (step / "params" / "more").write_text("x")
    assert checksums.find_damage(step) == "params/more was added"
    assert checksums.find_damage(step, ["data"]) is None
    (step / "params" / "more").rename(step / "params" / ".DS_Store")
    assert checksums.find_damage(step) is None


def test_optional_items_may_be_absent(stage):
    """Callers ask for "ema" and "statistics" without knowing whether the stage has them; if they
    exist, they are checked."""
    step, items = stage / "checkpoints" / "8", ("params", "ema", "statistics")
    assert checksums.find_damage(step, items) is None
    shutil.rmtree(stage / "checksums")
    assert checksums.find_damage(step, items) is None
    (step / "ema" / "_METADATA").unlink()
    assert checksums.find_damage(step, items) == "ema/_METADATA is missing"


@pytest.mark.parametrize("recorded", [True, False])
def test_a_checkpoint_deleted_meanwhile_is_missing(stage, recorded):
    """Retention may delete it at any time."""
    shutil.rmtree(stage / "checkpoints" / "8")
    if not recorded:
        shutil.rmtree(stage / "checksums")
    damage = checksums.find_damage(stage / "checkpoints" / "8", ["data"])
    assert damage.endswith(("is missing", "cannot be read (No such file or directory)"))


def test_records_of_earlier_versions_are_valid(stage):
    """They have no checksum of their own."""
    path, step = stage / "checksums" / "8.json", stage / "checkpoints" / "8"
    path.write_text(json.dumps({"files": json.loads(path.read_text())["files"]}))
    assert checksums.why_unverifiable(step) is None and checksums.find_damage(step) is None
    flip(next(p for p in files_of(stage, 8) if p.stat().st_size), random.Random(4))
    assert "was changed" in checksums.find_damage(step)


def test_a_flipped_bit_in_the_record_does_not_condemn_the_checkpoint(stage):
    """200 flips. A record that is still accepted must mean the same as before."""
    path, rng, step = stage / "checksums" / "8.json", random.Random(3), stage / "checkpoints" / "8"
    before, meaning = path.read_bytes(), json.loads(path.read_bytes())
    for _ in range(200):
        path.write_bytes(before)
        flip(path, rng)
        assert checksums.find_damage(step) is None
        if checksums.why_unverifiable(step) is None:
            assert json.loads(path.read_bytes())["files"] == meaning["files"]
