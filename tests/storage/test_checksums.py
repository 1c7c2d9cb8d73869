"""Damaged checkpoints: found, named, moved aside, and never taken for whole or for nothing."""

import json
import os
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.test_anomalies import Root

from diladiff_jax.storage import checksums
from diladiff_jax.storage.checkpoints import CheckpointError, Checkpoints, quarantine_corrupt
from diladiff_jax.training.state import init_state

STEPS = (3, 5, 8)


def state_at(step):
    state = init_state(Root(), optax.adam(0.1), jax.random.key(0), ema=True)
    return state.replace(step=jnp.int32(step), params={"w": jnp.float32(step)})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A stage with three checkpoints."""
    stage = tmp_path_factory.mktemp("run") / "mdlm"
    with Checkpoints(stage / "checkpoints", keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(state_at(step), {"position": step})
    return stage


@pytest.fixture
def stage(written, tmp_path):
    shutil.copytree(written, tmp_path / "mdlm")
    return tmp_path / "mdlm"


def restored(stage):
    abstract = jax.eval_shape(lambda: state_at(0))
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(stage / "checkpoints") as checkpoints:
        state, position = checkpoints.restore(abstract, jax.tree.map(lambda _: whole, abstract))
    assert position == {"position": int(state.step)} and float(state.params["w"]) == int(state.step)
    return int(state.step)


def files(stage, step):
    return [
        path
        for item in ("params", "ema", "training", "data", "statistics")
        for path in (stage / "checkpoints" / str(step) / item).rglob("*")
        if path.is_file()
    ]


def test_every_committed_checkpoint_has_its_checksums_and_no_other(written):
    """Of all that were kept, all files of their items; those of a checkpoint that retention removed are gone."""
    assert {int(path.stem) for path in (written / "checksums").iterdir()} == set(STEPS)
    for step in STEPS:
        recorded = json.loads((written / "checksums" / f"{step}.json").read_text())["files"]
        assert {written / "checkpoints" / str(step) / name for name in recorded} == set(
            files(written, step)
        ) and len(recorded) > 10
        assert checksums.find_damage(written / "checkpoints" / str(step)) is None
    assert restored(written) == 8


def test_retention_takes_the_checksums_along(tmp_path):
    with Checkpoints(tmp_path / "mdlm" / "checkpoints", keep=2) as checkpoints:
        for step in range(1, 6):
            checkpoints.save(state_at(step), {"position": step})
    assert (
        {path.stem for path in (tmp_path / "mdlm" / "checksums").iterdir()}
        == {
            path.name
            for path in (tmp_path / "mdlm" / "checkpoints").iterdir()
            if path.name.isdigit()
        }
        == {"4", "5"}
    )


def flip(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


@pytest.mark.parametrize(
    "spoil", [flip, truncate, lambda path, rng: path.unlink()], ids=["flip", "truncate", "remove"]
)
def test_any_damage_of_any_file_is_found(stage, spoil):
    """One bit of each file, each file cut short, each file gone: 100% found, and told from the other items."""
    rng, step = random.Random(0), stage / "checkpoints" / "8"
    for path in files(stage, 8):
        if not path.stat().st_size:
            continue
        before, item = path.read_bytes(), path.relative_to(step).parts[0]
        spoil(path, rng)
        assert str(path.relative_to(step)) in checksums.find_damage(step)
        assert checksums.find_damage(step, [item]) and not checksums.find_damage(
            step, {"params", "ema", "training", "data"} - {item}
        )
        path.write_bytes(before)
    assert checksums.find_damage(step) is None


def test_training_goes_on_from_the_last_whole_checkpoint(stage):
    """The damaged ones are named and moved, nothing is deleted; what was whole is as it was."""
    rng, said = random.Random(1), []
    for step in (8, 5):
        flip(rng.choice([p for p in files(stage, step) if p.stat().st_size]), rng)
    with pytest.raises(CheckpointError, match="8 is damaged: .* was changed"):
        restored(stage)
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert restored(stage) == 3
    assert len(said) == 2 and all(
        "goes on from step 3" in line and str(stage / "damaged") in line for line in said
    )
    assert sorted(path.name for path in (stage / "damaged").iterdir()) == [
        "5",
        "5.json",
        "8",
        "8.json",
    ]
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert len(said) == 2
    with Checkpoints(
        stage / "checkpoints"
    ) as checkpoints:  # the same steps can be reached and saved again
        checkpoints.save(state_at(5), {"position": 5})
    assert restored(stage) == 5


def test_where_none_is_whole_nothing_is_begun_anew(stage):
    """One line that names all; every file stays where it is."""
    rng = random.Random(2)
    for step in STEPS:
        flip(rng.choice([p for p in files(stage, step) if p.stat().st_size]), rng)
    before = {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match="no checkpoint in .* is whole: 8: .*; 5: .*; 3: "
    ) as stopped:
        quarantine_corrupt(stage / "checkpoints", print)
    assert "\n" not in str(stopped.value)
    assert {path: path.read_bytes() for path in stage.rglob("*") if path.is_file()} == before


RECORDS = [
    "{",
    "",
    "[]",
    '{"files": {}}',
    '{"files": {}, "crc32": 0}',
    "[" * 20_000,
    '{"files": {"a": [1e999, 0]}, "crc32": 0}',
    '{"files": {"\\u0000": [1, 0], "\\ud800": [1, 0]}, "crc32": 0}',
]


@pytest.mark.parametrize("record", [None, *RECORDS])
def test_checkpoints_without_checksums_are_read_as_they_are(stage, record):
    """Of a process that was killed before they were written, or with a record that cannot be read: that is said, and they are written anew."""
    path, said = stage / "checksums" / "8.json", []
    path.unlink() if record is None else path.write_text(record)
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert (
        len(said) == 1
        and f"{stage / 'checkpoints' / '8'} has " in said[0]
        and "read as it is" in said[0]
    )
    assert checksums.find_damage(stage / "checkpoints" / "8") is None and restored(stage) == 8
    assert checksums.unverified(stage / "checkpoints" / "8") is None
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert len(said) == 1


def test_checksums_of_earlier_versions_hold(stage):
    """Which had no total of their own."""
    path = stage / "checksums" / "8.json"
    path.write_text(json.dumps({"files": json.loads(path.read_text())["files"]}))
    assert (
        checksums.unverified(stage / "checkpoints" / "8") is None
        and checksums.find_damage(stage / "checkpoints" / "8") is None
    )
    flip(next(p for p in files(stage, 8) if p.stat().st_size), random.Random(4))
    assert "was changed" in checksums.find_damage(stage / "checkpoints" / "8")


def test_items_that_a_checkpoint_need_not_have_are_not_missed(stage):
    """Asked for by whoever does not know whether the stage keeps an average, or statistics; what is there is looked at."""
    read = ("params", "ema", "statistics")
    for _ in range(2):
        assert checksums.find_damage(stage / "checkpoints" / "8", read) is None
        shutil.rmtree(stage / "checksums", ignore_errors=True)
    (stage / "checkpoints" / "8" / "ema" / "_METADATA").unlink()
    assert checksums.find_damage(stage / "checkpoints" / "8", read) == "ema/_METADATA is missing"


def test_a_checkpoint_that_retention_takes_away_is_called_so(stage):
    for _ in range(2):
        shutil.rmtree(stage / "checkpoints" / "8", ignore_errors=True)
        assert checksums.find_damage(stage / "checkpoints" / "8", ["data"]).endswith(
            ("is missing", "cannot be read (No such file or directory)")
        )
        shutil.rmtree(stage / "checksums", ignore_errors=True)


def test_a_flipped_bit_in_the_record_condemns_nothing_and_passes_for_nothing(stage):
    """Of 200 flips of a record none makes a whole checkpoint a damaged one, and none is taken for the record that was written, but where the text means the same."""
    path, rng = stage / "checksums" / "8.json", random.Random(3)
    before, meaning = path.read_bytes(), json.loads(path.read_bytes())
    for _ in range(200):
        path.write_bytes(before)
        flip(path, rng)
        assert checksums.find_damage(stage / "checkpoints" / "8") is None
        if checksums.unverified(stage / "checkpoints" / "8") is None:
            assert json.loads(path.read_bytes())["files"] == meaning["files"]


def test_a_file_that_was_not_there_is_damage(stage):
    (stage / "checkpoints" / "8" / "params" / "more").write_text("x")
    assert (
        checksums.find_damage(stage / "checkpoints" / "8") == "params/more was not among its files"
    )
    assert checksums.find_damage(stage / "checkpoints" / "8", ["data"]) is None
    (stage / "checkpoints" / "8" / "params" / "more").rename(
        stage / "checkpoints" / "8" / "params" / ".DS_Store"
    )
    assert checksums.find_damage(stage / "checkpoints" / "8") is None


@pytest.mark.parametrize(
    "gone", ["training", "params/_METADATA", "training/manifest.ocdbt", "data/metadata"]
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_copy_that_ended_early_is_no_checkpoint(stage, gone, how):
    """Without checksums: files that are missing, or empty as a power cut leaves them; the one before is gone on from."""
    shutil.rmtree(stage / "checksums")
    path, said = stage / "checkpoints" / "8" / gone, []
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink() if how == "missing" else path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"8 is damaged: .* (is missing|is empty);"):
        restored(stage)
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert (
        restored(stage) == 5
        and len(said) == 2
        and "goes on from step 5" in said[1]
        and "no checksums" in said[0]
    )


def test_checkpoints_that_are_gone_are_missed(stage):
    """The last one: that is said. All of them, or their folder: training does not begin anew without being asked to."""
    said = []
    shutil.rmtree(stage / "checkpoints" / "8")
    quarantine_corrupt(stage / "checkpoints", said.append)
    assert said == [
        f"checkpoint {stage / 'checkpoints' / '8'} is gone; training goes on from step 5"
    ]
    for _ in range(2):
        for step in ("5", "3"):
            shutil.rmtree(stage / "checkpoints" / step, ignore_errors=True)
        with pytest.raises(
            CheckpointError,
            match=f"holds no checkpoint, and step 8 was there; put a copy back, or remove {stage} to",
        ):
            quarantine_corrupt(stage / "checkpoints", said.append)
        shutil.rmtree(stage / "checkpoints", ignore_errors=True)


def test_a_folder_that_cannot_be_written_is_said_at_once(stage):
    """Orbax would train on, and then wait for minutes."""
    checkpoints = Checkpoints(stage / "checkpoints", keep=3)
    shutil.rmtree(stage / "checkpoints")
    (stage / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be written to .*checkpoints"):
        checkpoints.save(state_at(9), {"position": 9})
    checkpoints.close()


def test_checksums_that_outlived_their_checkpoint_condemn_no_other(stage):
    """A checkpoint folder removed by hand; the same step saved again, its process killed before it was sealed."""
    shutil.rmtree(stage / "checkpoints" / "8")
    checkpoints = Checkpoints(stage / "checkpoints", keep=3)
    checkpoints._sealer.expect = lambda step: None
    with checkpoints:
        checkpoints.save(state_at(8), {"position": 8})
    assert checksums.find_damage(stage / "checkpoints" / "8") is None and restored(stage) == 8


def test_the_checksum_is_the_standard_one(tmp_path):
    """CRC-32 of "123456789" is cbf43926, and of any cut of a large file the same."""
    (tmp_path / "check").write_bytes(b"123456789")
    assert checksums.crc32(tmp_path / "check") == 0xCBF43926
    data = np.random.default_rng(0).bytes((5 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    import binascii

    assert checksums.crc32(tmp_path / "large") == binascii.crc32(data)
