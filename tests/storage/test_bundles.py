"""A bundle holds what the workdir held, bit for bit, on any mesh."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diladiff_jax.storage._stages import stage_names
from safetensors.numpy import load_file, save_file
from storage.bundle_files import mesh_of, read_manifest, update_hashes, write_manifest

import diladiff_jax as dl
from diladiff_jax.experiment import Experiment
from diladiff_jax.storage import bundles, config_file
from diladiff_jax.storage.bundles import writer
from diladiff_jax.storage.bundles.format import tensor_name
from diladiff_jax.training.loop import train


def leaves(tree):
    return {
        tensor_name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_bundle_equals_its_workdir(trained, bundle, mesh):
    """Parameters, statistics, shardings, settings and tokenizer are the same."""
    ours, theirs = (dl.load(folder, mesh=mesh_of(*mesh)) for folder in (trained, bundle))
    for stage in stage_names():
        a, b = ours.trained(stage), theirs.trained(stage)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert jax.tree.map(lambda x: x.sharding, a) == jax.tree.map(lambda x: x.sharding, b)
        assert ours.trained_steps(stage) == theirs.trained_steps(stage) == 6
    jax.tree.map(np.testing.assert_array_equal, ours.statistics, theirs.statistics)
    assert ours.config == theirs.config and ours.models == theirs.models
    text = "Mia won one red kite."
    np.testing.assert_array_equal(ours.tokenizer.encode(text), theirs.tokenizer.encode(text))


def test_each_device_reads_only_its_own_part(bundle, monkeypatch):
    parts = []
    original = jax.make_array_from_callback

    def spy(shape, sharding, read_part):
        def recorded(index):
            part = read_part(index)
            parts.append((shape, sharding.shard_shape(shape), part.shape))
            return part

        return original(shape, sharding, recorded)

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    dl.load(bundle, mesh=mesh_of(2, 2, 2)).trained("mdlm")
    assert all(read == expected for _, expected, read in parts)
    assert any(read != full for full, _, read in parts)


def test_bfloat16_rounds_only_matrices(trained, tmp_path):
    """Matrices are rounded to the nearest bfloat16 and read as float32. The file is about half as
    large."""
    ours = dl.load(trained)
    out = bundles.export(ours.experiment, tmp_path / "half", dtype=jnp.bfloat16)
    theirs = dl.load(out)
    for stage in ("mdlm", "diladiff"):
        read = leaves(theirs.trained(stage))
        for key, value in leaves(ours.trained(stage)).items():
            rounded = value.astype(jnp.bfloat16).astype(np.float32) if value.ndim > 1 else value
            assert read[key].dtype == np.float32
            np.testing.assert_array_equal(read[key], rounded)
    jax.tree.map(np.testing.assert_array_equal, ours.statistics, theirs.statistics)
    full = sum(value.nbytes for value in leaves(ours.trained("mdlm")).values())
    assert (out / "mdlm.safetensors").stat().st_size < 0.6 * full


def test_large_stages_are_split_into_files(trained, tmp_path, monkeypatch):
    """With a limit of 8 KiB, a larger file holds a single tensor; parameters stay the same."""
    monkeypatch.setattr(writer, "_FILE_BYTES", 8192)
    ours = dl.load(trained)
    out = bundles.export(ours.experiment, tmp_path / "split", stages=("mdlm",))
    files = sorted(out.glob("mdlm-*-of-*.safetensors"))
    assert len(files) > 2 and not (out / "mdlm.safetensors").exists()
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 8192
    jax.tree.map(np.testing.assert_array_equal, ours.trained("mdlm"), dl.load(out).trained("mdlm"))


def test_a_tensor_in_two_files_is_an_error(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_FILE_BYTES", 8192)
    out = bundles.export(dl.load(trained).experiment, tmp_path / "split", stages=("mdlm",))
    first, second = sorted(out.glob("mdlm-*-of-*.safetensors"))[:2]
    twice = load_file(first)
    save_file(load_file(second) | {name: value + 1 for name, value in twice.items()}, second)
    update_hashes(out)
    with pytest.raises(
        dl.CheckpointError, match=f"has the tensor .*, which is also in {first.name}"
    ):
        dl.load(out).trained("mdlm")


def test_a_failed_export_leaves_nothing_behind(trained, bundle, tmp_path):
    experiment = dl.load(trained).experiment
    with pytest.raises(dl.CheckpointError, match="already exists"):
        bundles.export(experiment, bundle)
    one = bundles.export(experiment, tmp_path / "one", stages=("mdlm",))
    with pytest.raises(dl.CheckpointError, match="ladiff is not trained"):
        bundles.export(dl.load(one).experiment, tmp_path / "two", stages=("ladiff",))
    with pytest.raises(dl.CheckpointError, match="does not hold stage ladiff"):
        dl.load(one).trained("ladiff")
    (tmp_path / "file").write_text("")
    with pytest.raises(dl.CheckpointError, match="cannot be written"):
        bundles.export(experiment, tmp_path / "file" / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one"]


def test_a_diverged_model_is_not_exported(trained, tmp_path, monkeypatch):
    experiment = dl.load(trained).experiment
    restore = experiment.restore
    monkeypatch.setattr(
        experiment,
        "restore",
        lambda stage: jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), restore(stage)),
    )
    with pytest.raises(dl.CheckpointError, match="mdlm has non-finite values in "):
        bundles.export(experiment, tmp_path / "out", stages=("mdlm",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "_train.txt",
        ".cache",
        "(1).txt",
        "x:1.txt",
        "*.txt",
        "{a,b}.txt",
        "~user",
        "a\\b",
        "-x",
        "my set",
    ],
)
def test_the_reader_accepts_what_export_keeps_of_any_path(trained, tmp_path, name):
    model = dl.load(trained)
    with model.config.unlocked():
        for key in ("files", "validation_files", "corpus"):
            model.config.data[key] = f"/somewhere/{name}"
        model.config.data.scorer_fraction = 0.1
    experiment = Experiment(model.config, trained, model.tokenizer, mesh_of(8, 1, 1))
    out = bundles.export(experiment, tmp_path / "out", stages=("mdlm",))
    assert "somewhere" not in (out / "config.json").read_text()
    dl.load(out)


def test_a_later_format_is_not_called_damaged(copy):
    write_manifest(copy, read_manifest(copy) | {"format": 9})
    with pytest.raises(dl.CheckpointError, match="format: got 9, expected 1. Use a newer version"):
        dl.load(copy)


def test_a_bundle_without_its_manifest_is_not_a_workdir(copy):
    """Neither loading nor training mistakes it for one."""
    (copy / "bundle.json").unlink()
    with pytest.raises(dl.CheckpointError, match=r"safetensors of a bundle but no bundle\.json"):
        dl.load(copy)
    with pytest.raises(dl.ConfigError, match="is a bundle"):
        train(config_file.load(copy), copy, ("mdlm",))
    assert not (copy / "prepared.json").exists()


def test_a_stage_that_is_registered_later_may_be_in_a_bundle(copy, monkeypatch):
    """The names that a bundle may have are those of the stages at the time of reading."""
    manifest = read_manifest(copy)
    manifest["files"]["toy.safetensors"] = manifest["files"]["mdlm.safetensors"]
    manifest["stages"]["toy"] = {"steps": 2, "files": ["toy.safetensors"]}
    write_manifest(copy, manifest)
    with pytest.raises(dl.CheckpointError, match=r"toy\.safetensors', which is not a file"):
        bundles.Bundle(copy)
    monkeypatch.setattr(
        "diladiff_jax.storage.bundles.format.stage_names", lambda: (*stage_names(), "toy")
    )
    assert bundles.Bundle(copy).steps("toy") == 2


def test_the_manifest_is_what_the_documentation_says(bundle):
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert list(manifest) == ["format", "stages", "files"] and manifest["format"] == 1
    assert manifest["stages"]["mdlm"] == {"steps": 6, "files": ["mdlm.safetensors"]}
    assert set(manifest["files"]["config.json"]) == {"bytes", "sha256"}
    present = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert set(manifest["files"]) == present - {"bundle.json"}
