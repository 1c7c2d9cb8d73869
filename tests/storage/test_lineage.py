"""Workdirs that inherit earlier stages from a bundle or another workdir."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
from micro import micro_config
from storage.bundle_files import mesh_of, read_manifest, write_manifest

import diladiff_jax as dl
from diladiff_jax.experiment import Experiment
from diladiff_jax.stages import STAGES
from diladiff_jax.storage import config_file
from diladiff_jax.storage.lineage import (
    check_source,
    inherited_stages,
    not_trained_error,
    remember_source,
    trained_steps,
)
from diladiff_jax.training import train

METHOD = tuple(name for name, stage in STAGES.items() if not stage.baseline)


def test_a_bundle_is_as_good_a_source_as_its_workdir(trained, bundle, tmp_path):
    """Of its tokenizer's folder only the known files are copied."""
    source, new = shutil.copytree(bundle, tmp_path / "source"), tmp_path / "new"
    (source / "tokenizer" / "secret").symlink_to("/etc/passwd")
    new.mkdir()
    remember_source(new, source)
    copied = {path.name for path in (new / "tokenizer").iterdir()}
    assert copied == {"tokenizer.json", "sentencepiece.model"}
    assert [trained_steps(new, stage) for stage in ("mdlm", "ladiff")] == [6, 6]
    tokenizer, config = dl.load(bundle).tokenizer, config_file.load(trained)
    ours, theirs = (
        Experiment(config, folder, tokenizer, mesh_of(8, 1, 1)).context("diladiff")
        for folder in (trained, new)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_bundle_is_never_trained_in(trained, bundle):
    before = sorted(path.name for path in bundle.iterdir())
    with pytest.raises(dl.ConfigError, match="is a bundle"):
        train(config_file.load(trained), bundle, ("mdlm",))
    assert sorted(path.name for path in bundle.iterdir()) == before


@pytest.mark.slow
def test_a_stage_is_trained_on_other_text_from_a_bundle(bundle, tmp_path):
    """With the bundle's tokenizer and MDLM."""
    config = micro_config(
        data=dict(documents=200, seed=5),
        mdlm_long=dict(steps=2, optimizer="adamw"),
        logging=dict(samples=0),
    )
    with jax.numpy_rank_promotion("allow"):  # optax promotes
        train(config, tmp_path / "new", ("mdlm_long",), init_from=bundle)
    assert dl.load(tmp_path / "new").trained_steps("mdlm_long") == 2


@pytest.mark.parametrize(
    ("changes", "stages", "words"),
    [
        (dict(diffusion=dict(d=3.0)), ("diladiff",), r"diffusion\.d differs"),
        # Of several stages, those that are inherited count.
        (
            dict(decoder=dict(cross_layers=(1,)), ladiff=dict(steps=9)),
            METHOD,
            r"decoder\.cross_layers differs",
        ),
        (dict(mesh=dict(data=3)), ("mdlm_long",), "mesh"),
        (dict(mdlm_long=dict(batch=12, steps=2)), ("mdlm_long",), "batch"),
    ],
)
def test_settings_that_do_not_fit_the_source_are_rejected(bundle, tmp_path, changes, stages, words):
    """Nothing is written."""
    with pytest.raises(dl.ConfigError, match=words):
        train(micro_config(**changes), tmp_path / "new", stages, init_from=bundle)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half(tmp_path):
    """Empty checkpoints: a source of all stages, and a workdir with its own autoencoder."""
    source, workdir = tmp_path / "source", tmp_path / "workdir"
    config_file.save(micro_config(), source)
    for stage in STAGES:
        (source / stage / "checkpoints" / "6").mkdir(parents=True)
    (workdir / "autoencoder" / "checkpoints" / "6").mkdir(parents=True)
    return source, workdir


def test_only_stages_that_are_taken_from_the_source_are_compared_with_it(half):
    """The workdir's own autoencoder may have another latent than the source's; the backbone, which
    is the source's, may not be another."""
    source, workdir = half
    inherited = inherited_stages(workdir, source, ("ladiff", "diladiff"))
    assert inherited == ["mdlm"]
    config_file.require_inherited(micro_config(encoder=dict(latent_dim=6)), source, inherited)
    with pytest.raises(dl.ConfigError, match=r"backbone\.width differs .* stage mdlm is inherited"):
        changed = micro_config(backbone=dict(width=32))
        config_file.require_inherited(changed, source, inherited)


def test_a_new_workdir_inherits_every_stage_before_those_that_it_trains(half):
    source, workdir = half
    assert inherited_stages(workdir / "new", source, ("diladiff",)) == [
        "ladiff",
        "autoencoder",
        "mdlm",
    ]
    assert inherited_stages(workdir / "new", source, METHOD) == []


@pytest.fixture
def retrained(trained, bundle, tmp_path):
    """A workdir that was started from a bundle, `source`, and has its own MDLM."""
    source, new = shutil.copytree(bundle, tmp_path / "source"), tmp_path / "new"
    new.mkdir()
    remember_source(new, source)
    config_file.save(config_file.load(trained), new)
    (new / "mdlm" / "checkpoints").mkdir(parents=True)
    shutil.copytree(trained / "mdlm" / "checkpoints" / "6", new / "mdlm" / "checkpoints" / "6")
    return new


def test_stages_with_a_retrained_predecessor_are_not_inherited(retrained):
    """The source trained them on its own MDLM. Autoregressive model and scorer have none."""
    steps = {stage: trained_steps(retrained, stage) for stage in STAGES}
    assert steps == dict.fromkeys(STAGES, 0) | {"mdlm": 6, "autoregressive": 6, "scorer": 6}


def test_the_source_of_trained_stages_cannot_be_changed(retrained, trained):
    with pytest.raises(dl.CheckpointError, match="was started from"):
        check_source(retrained, trained)


def test_a_source_that_is_gone_is_an_error(retrained, trained):
    """Training would otherwise start again from scratch. A source that was moved may be given."""
    moved = (retrained.parent / "source").rename(retrained.parent / "moved")
    for call in (
        lambda: not_trained_error(retrained, "scorer"),
        lambda: train(config_file.load(trained), retrained, METHOD),
    ):
        with pytest.raises(
            dl.CheckpointError, match="source does not exist, and .* was started from it"
        ):
            call()
    assert {path.name for path in (retrained / "mdlm" / "checkpoints").iterdir()} == {"6"}
    check_source(retrained, moved)
    remember_source(retrained, moved)
    assert trained_steps(retrained, "scorer") == 6


def test_an_unreadable_record_of_the_source_is_replaced(bundle, tmp_path):
    """Its error message recommends that."""
    remember_source(tmp_path, bundle)
    (tmp_path / "mdlm" / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "init_from.json").write_text("")
    with pytest.raises(dl.CheckpointError, match="again with launch/train.py --init_from"):
        trained_steps(tmp_path, "scorer")
    check_source(tmp_path, bundle)
    remember_source(tmp_path, bundle)
    assert trained_steps(tmp_path, "scorer") == 6


def test_other_files_in_a_bundle_are_ignored(trained, copy, tmp_path):
    """They might be a stranger's: a record of a source (a file or a pipe) would inherit stages from
    any folder, and links instead of features would be followed."""
    for stage in ("autoencoder", "ladiff", "diladiff"):
        (copy / f"{stage}.safetensors").unlink()
    manifest = read_manifest(copy)
    write_manifest(copy, manifest | {"stages": {"mdlm": manifest["stages"]["mdlm"]}})
    (copy / "init_from.json").write_text(json.dumps({"workdir": str(trained)}))
    assert dl.load(copy).models == ("mdlm",)
    (copy / "init_from.json").unlink()
    os.mkfifo(copy / "init_from.json")
    assert dl.load(copy).models == ("mdlm",) and trained_steps(copy, "autoencoder") == 0
    (copy / "features").mkdir()
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        (copy / "features" / name).symlink_to("/dev/zero")
    (tmp_path / "new").mkdir()
    check_source(tmp_path / "new", copy)
    remember_source(tmp_path / "new", copy)
    assert not (tmp_path / "new" / "features").exists()
