"""A stage with three checkpoints, a bundle of the trained workdir, and copies of both to damage."""

import shutil

import pytest
from storage.checkpoint_files import STEPS, items_at

import diladiff_jax as dl
from diladiff_jax.storage import Checkpoints, bundles


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The folder of a stage with checkpoints of `STEPS`; do not change it."""
    stage = tmp_path_factory.mktemp("run") / "mdlm"
    with Checkpoints(stage / "checkpoints", keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, items_at(step), {"position": step})
    return stage


@pytest.fixture
def stage(written, tmp_path):
    """A copy of `written`."""
    return shutil.copytree(written, tmp_path / "mdlm")


@pytest.fixture(scope="session")
def bundle(trained, tmp_path_factory):
    """A bundle of all trained stages; do not change it."""
    return bundles.export(dl.load(trained).experiment, tmp_path_factory.mktemp("bundles") / "whole")


@pytest.fixture
def copy(bundle, tmp_path):
    """A copy of `bundle`."""
    return shutil.copytree(bundle, tmp_path / "copy")
