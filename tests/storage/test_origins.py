"""Stages record what they were made from, and a mismatch is reported with what to do."""

import json
import shutil

import pytest
from micro import micro_config

import diladiff_jax as dl
from diladiff_jax.storage import CheckpointError, origins
from diladiff_jax.training import continuation

SETTINGS = micro_config().to_dict()


@pytest.fixture
def workdir(tmp_path):
    """Folders of checkpoints alone: mdlm at step 40, and an autoencoder trained on it."""
    saved(tmp_path, "mdlm", 40)
    (tmp_path / "tokenizer").mkdir()
    about = {"kind": "unigram", "lowercase": False, "sha256": {"a": "b"}}
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(about))
    origins.record(tmp_path, "autoencoder", SETTINGS)
    saved(tmp_path, "autoencoder", 6)
    return tmp_path


def saved(workdir, stage, step, content="x"):
    folder = workdir / stage / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "params").mkdir()
    (folder / "params" / "array").write_text(content)
    (workdir / stage / "checksums").mkdir(exist_ok=True)
    (workdir / stage / "checksums" / f"{step}.json").write_text(content)


def check(workdir, stages, own, **steps):
    config = micro_config(**{name: {"steps": n} for name, n in steps.items()})
    continuation.require_fitting(workdir, stages, own, config)


def test_a_stage_reads_the_frozen_networks_of_its_predecessors():
    """A stage that only starts from another's parameters has its own copy of them."""
    assert origins.dependencies("mdlm", SETTINGS) == ()
    assert origins.dependencies("autoencoder", SETTINGS) == ("mdlm",)
    assert set(origins.dependencies("diladiff", SETTINGS)) == {"mdlm", "autoencoder", "ladiff"}
    assert origins.dependencies("mdlm_long", SETTINGS) == ()


def test_what_is_unchanged_is_accepted(workdir):
    assert origins.changes(workdir, "autoencoder", SETTINGS) == []
    check(workdir, ("mdlm", "autoencoder"), (), mdlm=40)
    check(workdir, ("mdlm",), ("mdlm",), mdlm=400)  # reported by `announce`, not refused


@pytest.mark.parametrize("stages", [("autoencoder",), ("mdlm", "autoencoder"), ("ladiff",)])
def test_a_predecessor_that_was_trained_further_is_found(workdir, stages):
    """By the stage itself, by a run of all, and by a later stage."""
    saved(workdir, "mdlm", 400)
    assert origins.changes(workdir, "autoencoder", SETTINGS) == ["mdlm went from step 40 to 400"]
    with pytest.raises(CheckpointError, match="on step 40 of mdlm, but it is at step 400") as error:
        check(workdir, stages, stages[-1:], mdlm=400)
    assert f"Move {workdir / 'autoencoder'} elsewhere to train it again" in str(error.value)


def test_a_run_that_would_train_a_predecessor_further_is_refused_before_it_does(workdir):
    with pytest.raises(CheckpointError, match="but this run trains it to step 400"):
        check(workdir, ("mdlm", "autoencoder"), ("mdlm",), mdlm=400)


def test_a_predecessor_that_lost_its_last_checkpoint_may_be_trained_to_it_again(workdir):
    """Training is deterministic, so the stage after it still fits."""
    shutil.rmtree(workdir / "mdlm" / "checkpoints" / "40")
    saved(workdir, "mdlm", 30)
    check(workdir, ("mdlm", "autoencoder"), ("mdlm",), mdlm=40)
    with pytest.raises(CheckpointError, match="but it is at step 30"):
        check(workdir, ("autoencoder",), ("autoencoder",), mdlm=40)


def test_another_checkpoint_of_the_same_step_and_another_tokenizer_are_reported(workdir):
    (workdir / "mdlm" / "checksums" / "40.json").write_text("another")
    about = {"kind": "unigram", "lowercase": True, "sha256": {"a": "b"}}
    (workdir / "tokenizer" / "tokenizer.json").write_text(json.dumps(about))
    assert origins.changes(workdir, "autoencoder", SETTINGS) == [
        "the checkpoint of mdlm at step 40 was replaced by another",
        "the tokenizer is another one",
    ]


@pytest.mark.parametrize("record", [None, "", "[]", '{"stages": {"mdlm": 3}}', '{"stages": {}}'])
def test_a_workdir_without_a_record_is_accepted(workdir, record):
    """Of an earlier version, or with a damaged file."""
    path = workdir / "autoencoder" / "made_from.json"
    path.unlink() if record is None else path.write_text(record)
    saved(workdir, "mdlm", 400)
    assert origins.changes(workdir, "autoencoder", SETTINGS) == []
    check(workdir, ("autoencoder",), (), mdlm=400)


def test_more_steps_of_a_finished_stage_are_announced_and_its_checkpoint_is_kept(workdir):
    """With what happens to the learning rate, and with the stages that depend on it."""
    config = micro_config(mdlm={"steps": 40})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    lines = []
    more = micro_config(mdlm={"steps": 400})
    continuation.announce(workdir, "mdlm", more, lines.append)
    assert "had finished its 40 steps and is given 400" in lines[0]
    assert "the learning rate goes from 0.0003 to 0.00274" in lines[0]
    assert "step 40, which autoencoder was trained on, is kept in" in lines[1]
    shutil.rmtree(workdir / "mdlm" / "checkpoints")  # as retention does
    assert (workdir / "mdlm" / "kept" / "40" / "params" / "array").read_text() == "x"
    assert (workdir / "mdlm" / "kept" / "40.json").exists()


def test_an_interrupted_stage_is_not_announced(workdir):
    (workdir / "config.json").write_text(json.dumps(micro_config(mdlm={"steps": 400}).to_dict()))
    shutil.rmtree(workdir / "autoencoder")
    lines = []
    continuation.announce(workdir, "mdlm", micro_config(mdlm={"steps": 400}), lines.append)
    assert lines == []


def test_trained_stages_have_their_record_and_loading_reports_a_change(trained, tmp_path, caplog):
    """In a real workdir, whose autoencoder is given another predecessor."""
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    found = json.loads((workdir / "diladiff" / "made_from.json").read_text())
    assert set(found["stages"]) == {"mdlm", "autoencoder", "ladiff"} and found["tokenizer"]
    with caplog.at_level("WARNING", "diladiff_jax"):
        dl.load(workdir)
        assert not caplog.records
        last = workdir / "mdlm" / "checkpoints" / "6"
        last.rename(last.with_name("9"))
        dl.load(workdir)
    messages = [record.getMessage() for record in caplog.records]
    assert "stage autoencoder does not fit any more: mdlm went from step 6 to 9" in messages
