"""Bundles: what is written is read back to the bit, on any mesh; damage and malice end in one error and take no memory."""

import contextlib
import hashlib
import json
import os
import shutil
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config
from safetensors.numpy import load_file, save_file

import diladiff_jax as dl
from diladiff_jax import config as config_lib
from diladiff_jax.experiment import (
    Experiment,
    check_source,
    not_trained,
    remember_source,
    trained_steps,
)
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import bundles, config_file
from diladiff_jax.training.loop import train

NO_JSON = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError)
REFUSALS = (dl.CheckpointError, dl.ConfigError, dl.DataError, dl.PretrainedError)


@pytest.fixture(scope="module")
def bundle(trained, tmp_path_factory):
    return bundles.export(dl.load(trained).experiment, tmp_path_factory.mktemp("bundles") / "whole")


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copy")


def leaves(tree):
    return {
        bundles._name(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


def reseal(folder):
    """Sums, the tokenizer's own too, of the files as they now are: what a stranger would write."""
    with contextlib.suppress(*NO_JSON):
        record = json.loads((folder / "tokenizer/tokenizer.json").read_text())
        record["sha256"] = {
            name: hashlib.sha256((folder / "tokenizer" / name).read_bytes()).hexdigest()
            for name in record["sha256"]
        }
        (folder / "tokenizer/tokenizer.json").write_text(json.dumps(record))
    path = folder / "bundle.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            manifest["files"][name] = {
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
    path.write_text(json.dumps(manifest))


def read(folder, stages=("mdlm", "autoencoder")):
    """What a reader asks for; fewer stages than there are, for each one's networks are traced for their shapes."""
    model = dl.load(folder)
    for stage in stages:
        model.trained(stage)
    return model.statistics


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_bundle_is_the_workdir(trained, bundle, mesh):
    """Parameters and statistics to the bit, laid out as the mesh wants them; the same experiment and tokenizer."""
    ours, theirs = (dl.load(folder, mesh=mesh_of(*mesh)) for folder in (trained, bundle))
    for stage in config_lib.STAGES + config_lib.BASELINES:
        a, b = ours.trained(stage), theirs.trained(stage)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        assert jax.tree.map(lambda x: x.sharding, a) == jax.tree.map(lambda x: x.sharding, b)
        assert ours.trained_steps(stage) == theirs.trained_steps(stage) == 6
    jax.tree.map(np.testing.assert_array_equal, ours.statistics, theirs.statistics)
    assert ours.config == theirs.config and ours.models == theirs.models
    np.testing.assert_array_equal(
        ours.tokenizer.encode("Mia won one red kite."),
        theirs.tokenizer.encode("Mia won one red kite."),
    )


def test_each_device_reads_its_own_part(bundle, monkeypatch):
    """Of a mesh that cuts parameters, each device is handed its part and no more."""
    handed = []
    original = jax.make_array_from_callback

    def spy(shape, placed, take):
        return original(
            shape,
            placed,
            lambda index: (
                handed.append((shape, placed.shard_shape(shape), take(index).shape)) or take(index)
            ),
        )

    monkeypatch.setattr(jax, "make_array_from_callback", spy)
    dl.load(bundle, mesh=mesh_of(2, 2, 2)).trained("mdlm")
    assert all(part == given for _, part, given in handed)
    assert any(given != whole for whole, _, given in handed)


def test_bfloat16_rounds_matrices_alone(trained, tmp_path):
    """Matrices come back as the nearest bfloat16 numbers, in float32; gains, biases and statistics as they were; the files are about half as large."""
    ours = dl.load(trained)
    out = bundles.export(ours.experiment, tmp_path / "half", dtype=jnp.bfloat16)
    theirs = dl.load(out)
    for stage in ("mdlm", "diladiff"):
        b = leaves(theirs.trained(stage))
        for key, value in leaves(ours.trained(stage)).items():
            assert b[key].dtype == np.float32
            np.testing.assert_array_equal(
                b[key], value.astype(jnp.bfloat16).astype(np.float32) if value.ndim > 1 else value
            )
    jax.tree.map(np.testing.assert_array_equal, ours.statistics, theirs.statistics)
    assert (out / "mdlm.safetensors").stat().st_size < 0.6 * sum(
        value.nbytes for value in leaves(ours.trained("mdlm")).values()
    )


def test_large_stages_are_cut_into_files(trained, tmp_path, monkeypatch):
    """With files of at most 8 KiB: more than one of them, none with two tensors that do not fit, the same parameters."""
    monkeypatch.setattr(bundles, "_FILE_BYTES", 8192)
    ours = dl.load(trained)
    out = bundles.export(ours.experiment, tmp_path / "cut", stages=("mdlm",))
    files = sorted(out.glob("mdlm-*-of-*.safetensors"))
    assert len(files) > 2 and not (out / "mdlm.safetensors").exists()
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 8192
    jax.tree.map(np.testing.assert_array_equal, ours.trained("mdlm"), dl.load(out).trained("mdlm"))


def test_training_goes_on_from_a_bundle(trained, bundle, tmp_path):
    """As a source of earlier stages it gives what the workdir gives, of its tokenizer's folder only what is known, and itself it is not trained in."""
    source, config = shutil.copytree(bundle, tmp_path / "source"), config_file.load(trained)
    (source / "tokenizer" / "secret").symlink_to("/etc/passwd")
    (tmp_path / "new").mkdir()
    remember_source(tmp_path / "new", source)
    assert {path.name for path in (tmp_path / "new" / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "sentencepiece.model",
    }
    assert [trained_steps(tmp_path / "new", stage) for stage in ("mdlm", "ladiff")] == [6, 6]
    tokenizer = dl.load(bundle).tokenizer
    ours, theirs = (
        Experiment(config, folder, tokenizer, mesh_of(8, 1, 1)).context("diladiff")
        for folder in (trained, tmp_path / "new")
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    before = sorted(path.name for path in bundle.iterdir())
    with pytest.raises(dl.ConfigError, match="is a bundle"):
        train(config, bundle, ("mdlm",))
    assert sorted(path.name for path in bundle.iterdir()) == before


def test_a_stage_is_trained_on_other_text_from_a_bundle(bundle, tmp_path):
    """On another corpus, with the bundle's tokenizer, from its MDLM; not where a setting gives the earlier stages another meaning."""
    change = dict(
        data=dict(documents=200, seed=5),
        mdlm_long=dict(steps=2, optimizer="adamw"),
        logging=dict(samples=0),
    )
    with jax.numpy_rank_promotion("allow"):  # optax promotes
        train(micro_config(**change), tmp_path / "new", ("mdlm_long",), init_from=bundle)
    assert dl.load(tmp_path / "new").trained_steps("mdlm_long") == 2
    with pytest.raises(dl.ConfigError, match="diffusion.d differs"):
        train(
            micro_config(diffusion=dict(d=3.0)), tmp_path / "other", ("diladiff",), init_from=bundle
        )
    with pytest.raises(
        dl.ConfigError, match="decoder.cross_layers differs"
    ):  # of several, those that are taken over
        train(
            micro_config(decoder=dict(cross_layers=(1,)), ladiff=dict(steps=9)),
            tmp_path / "third",
            config_lib.STAGES,
            init_from=bundle,
        )
    for refused in (dict(mesh=dict(data=3)), dict(mdlm_long=dict(batch=12, steps=2))):
        with pytest.raises(dl.ConfigError, match="mesh|batch"):
            train(micro_config(**refused), tmp_path / "fourth", ("mdlm_long",), init_from=bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]  # what is refused leaves nothing


def test_stages_made_from_others_are_not_lent(trained, bundle, tmp_path):
    """A workdir that has trained its own MDLM takes from its source nothing that was made from another one; what stands alone it does. The source
    cannot be changed under it, and one that is gone is named, by training too, which would begin anew."""
    source, new = shutil.copytree(bundle, tmp_path / "source"), tmp_path / "new"
    new.mkdir()
    remember_source(new, source)
    config_file.save(config_file.load(trained), new)
    (new / "mdlm" / "checkpoints").mkdir(parents=True)
    shutil.copytree(trained / "mdlm" / "checkpoints" / "6", new / "mdlm" / "checkpoints" / "6")
    assert {stage: trained_steps(new, stage) for stage in config_lib.PREDECESSOR} == {
        "mdlm": 6,
        "autoencoder": 0,
        "ladiff": 0,
        "diladiff": 0,
        "mdlm_long": 0,
        "scorer": 6,
    }
    with pytest.raises(dl.CheckpointError, match="was started from"):
        check_source(new, trained)
    source.rename(tmp_path / "moved")
    for call in (
        lambda: not_trained(new, "scorer"),
        lambda: train(config_file.load(trained), new, config_lib.STAGES),
    ):
        with pytest.raises(
            dl.CheckpointError, match="source, which .* was started from, is not there"
        ):
            call()
    assert {path.name for path in (new / "mdlm" / "checkpoints").iterdir()} == {"6"}
    remember_source(new, tmp_path / "moved")
    assert trained_steps(new, "scorer") == 6


def test_exports_that_cannot_be(trained, bundle, tmp_path):
    """A folder that is there, a stage that is not trained, a place that cannot be written: one error, and nothing left behind."""
    experiment = dl.load(trained).experiment
    with pytest.raises(dl.CheckpointError, match="exists already"):
        bundles.export(experiment, bundle)
    one = bundles.export(experiment, tmp_path / "one", stages=("mdlm",))
    with pytest.raises(dl.CheckpointError, match="does not hold|ladiff is not trained"):
        bundles.export(dl.load(one).experiment, tmp_path / "two", stages=("ladiff",))
    with pytest.raises(dl.CheckpointError, match="does not hold stage ladiff"):
        dl.load(one).trained("ladiff")
    (tmp_path / "file").write_text("")
    with pytest.raises(dl.CheckpointError, match="cannot be written"):
        bundles.export(experiment, tmp_path / "file" / "bundle")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one"]


def test_a_bundle_without_its_manifest_is_no_workdir(copy):
    """What is left of a bundle is named as that, by the library and by training; one of a later format is not called damaged."""
    manifest = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(
        dl.CheckpointError, match="is of format 9, and this library reads format 1; use a newer one"
    ):
        dl.load(copy)
    (copy / "bundle.json").unlink()
    with pytest.raises(dl.CheckpointError, match="safetensors of a bundle and no bundle.json"):
        dl.load(copy)
    with pytest.raises(dl.ConfigError, match="is a bundle"):
        train(config_file.load(copy), copy, ("mdlm",))
    assert not (copy / "prepared.json").exists()


@pytest.mark.parametrize("how", ["flipped", "short", "gone", "folder"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/sentencepiece.model",
        "autoencoder.safetensors",
        "statistics.safetensors",
    ],
)
def test_damage_is_named(copy, name, how):
    """Every file is held against the manifest before it is used, and the error says which."""
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        path.write_bytes(data if how == "flipped" else data[:-1])
    with pytest.raises(
        dl.CheckpointError, match=f"{name} (was changed|has .* bytes of|is missing)"
    ):
        read(copy)


def rewritten(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def taller(tensors):
    key = max(tensors, key=lambda k: tensors[k].ndim)
    tensors[key] = np.zeros((tensors[key].shape[0] + 1, *tensors[key].shape[1:]), np.float32)


@pytest.mark.parametrize(
    "change, words",
    [
        (taller, "it must be F32 or BF16"),
        (lambda t: t.update(stranger=np.zeros(3, np.float32)), "'stranger' that"),
        (lambda t: t.pop(sorted(t)[0]), "has no tensor"),
        (lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()}), "as I32"),
        (lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}), "as F64"),
    ],
    ids=["shape", "extra", "missing", "integers", "doubles"],
)
def test_tensors_of_another_experiment(copy, change, words):
    """With sums that are right, the header is held against the experiment."""
    rewritten(copy, "mdlm.safetensors", change)
    reseal(copy)
    with pytest.raises(dl.CheckpointError, match=words):
        read(copy)


def test_a_header_takes_no_memory(copy):
    """A file that says of itself that it holds a tebibyte is refused for what it says: what tracing the networks takes, and no more."""
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}}
    ).encode()
    (copy / "mdlm.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    reseal(copy)
    model = dl.load(copy)
    tracemalloc.start()
    with pytest.raises(dl.CheckpointError, match="not a whole safetensors file"):
        model.trained("mdlm")
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name",
    [
        "../outside.json",
        "/etc/passwd",
        "tokenizer/../../x",
        "tokenizer/a/b",
        "evil.pkl",
        "mdlm.safetensors/..",
        "tokenizer/.hidden",
        "mdlm.safetensors\n",
    ],
)
def test_names_are_confined(copy, name):
    """A manifest that names anything else is refused before that is opened."""
    path = copy / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(dl.CheckpointError, match="no file of a bundle"):
        dl.load(copy)


@pytest.mark.parametrize(
    "name", ["tokenizer/sentencepiece.model", "config.json", "tokenizer/tokenizer.json"]
)
def test_what_is_read_must_be_named(copy, name):
    """A manifest that leaves out a file which opening reads is refused, before that (a pipe, which would be waited for) is opened."""
    path = copy / "bundle.json"
    manifest = json.loads(path.read_text())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(dl.CheckpointError, match=f"names no {name}"):
        dl.load(copy)
    if name == "config.json":
        with pytest.raises(dl.ConfigError, match="is no file"):
            config_file.load(copy)


def test_links_lead_nowhere_else(copy, tmp_path):
    """A link to the same bytes is as good as the file (hubs' caches are made of them); one to anything else is not."""
    kept = shutil.copy(copy / "mdlm.safetensors", tmp_path / "blob")
    (copy / "mdlm.safetensors").unlink()
    (copy / "mdlm.safetensors").symlink_to(kept)
    read(copy)
    (copy / "mdlm.safetensors").unlink()
    (copy / "mdlm.safetensors").symlink_to("/dev/zero")
    with pytest.raises(dl.CheckpointError, match="no regular file"):
        read(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("evaluation.scorer", "somebody/model", "must be empty, for nothing is fetched"),
        ("data.directory", "/tmp/outside", "must be empty"),
        ("data.files", "../private/*.txt", "a last name alone"),
        ("data.files", "~somebody", "a last name alone"),
        ("data.validation_files", "/etc/passwd", "a last name alone"),
        ("tokenizer.file", "..", "a last name alone"),
        ("features.path", "owner/model", "a last name alone"),
        ("data.corpus", "/tmp/dataset", "a name, and no folder"),
        ("data.corpus", "../dataset", "a name, and no folder"),
        ("data.corpus", "community:dataset", "a name, and no folder"),
    ],
)
def test_a_strangers_settings_reach_nothing(copy, tmp_path, key, value, words):
    """What would be fetched, read or written outside the experiment is refused when the bundle is opened, and before it is trained from."""
    path, (block, name) = copy / "config.json", key.split(".")
    settings = json.loads(path.read_text())
    settings[block][name] = value
    if key == "data.corpus":
        settings["data"]["scorer_fraction"] = 0.1
    path.write_text(json.dumps(settings))
    reseal(copy)
    for opened in (lambda: dl.load(copy), lambda: check_source(tmp_path / "new", copy)):
        with pytest.raises(
            dl.CheckpointError, match=f"config.json (names|has) {key} .*{words}"
        ) as refused:
            opened()
        assert "\n" not in str(refused.value)


def test_a_note_of_a_source_that_cannot_be_read_is_written_anew(bundle, tmp_path):
    """As its own message advises."""
    remember_source(tmp_path, bundle)
    (tmp_path / "mdlm" / "checkpoints" / "6").mkdir(parents=True)
    (tmp_path / "init_from.json").write_text("")
    with pytest.raises(dl.CheckpointError, match="give it again, launch/train.py --init_from"):
        trained_steps(tmp_path, "scorer")
    check_source(tmp_path, bundle)
    remember_source(tmp_path, bundle)
    assert trained_steps(tmp_path, "scorer") == 6


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
def test_names_that_export_keeps_are_read(trained, tmp_path, name):
    """Of any file's or folder's path, what is written is what the reader takes."""
    model = dl.load(trained)
    with model.config.unlocked():
        for key in ("files", "validation_files", "corpus"):
            model.config.data[key] = f"/somewhere/{name}"
        model.config.data.scorer_fraction = 0.1
    experiment = Experiment(model.config, trained, model.tokenizer, mesh_of(8, 1, 1))
    out = bundles.export(experiment, tmp_path / "out", stages=("mdlm",))
    assert "somewhere" not in (out / "config.json").read_text()
    dl.load(out)


def test_what_else_lies_in_a_bundle_is_left_alone(trained, copy, tmp_path):
    """A note of a source, which would lend it stages from any folder, or is a pipe; features that its settings do not use, links to somewhere."""
    for stage in ("autoencoder", "ladiff", "diladiff"):
        (copy / f"{stage}.safetensors").unlink()
    manifest = json.loads((copy / "bundle.json").read_text())
    manifest["stages"] = {"mdlm": manifest["stages"]["mdlm"]}
    (copy / "bundle.json").write_text(json.dumps(manifest))
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


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_are_finite(copy, number):
    """One parameter, or one of the statistics, that is not: refused by name when it is read, though all sums are right."""

    def spoiled(tensors):
        key = sorted(tensors)[-1]
        tensors[key] = tensors[key].copy()
        tensors[key].flat[0] = number
        return tensors

    for name in ("mdlm", "statistics"):
        before = (copy / f"{name}.safetensors").read_bytes()
        rewritten(copy, f"{name}.safetensors", spoiled)
        reseal(copy)
        with pytest.raises(
            dl.CheckpointError, match=f"{name}.safetensors has numbers in .* that are not finite"
        ):
            read(copy)
        (copy / f"{name}.safetensors").write_bytes(before)
        reseal(copy)
    read(copy)


def test_a_tensor_has_one_place(trained, tmp_path, monkeypatch):
    """Of two files of a stage that both have it neither is taken."""
    monkeypatch.setattr(bundles, "_FILE_BYTES", 8192)
    out = bundles.export(dl.load(trained).experiment, tmp_path / "cut", stages=("mdlm",))
    first, second = sorted(out.glob("mdlm-*-of-*.safetensors"))[:2]
    twice = load_file(first)
    save_file(load_file(second) | {name: value + 1 for name, value in twice.items()}, second)
    reseal(out)
    with pytest.raises(dl.CheckpointError, match=f"has the tensor .*, which {first.name} has too"):
        dl.load(out).trained("mdlm")


def test_what_has_diverged_is_not_exported(trained, tmp_path, monkeypatch):
    experiment = dl.load(trained).experiment
    restore = experiment.restore
    monkeypatch.setattr(
        experiment,
        "restore",
        lambda stage: jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), restore(stage)),
    )
    with pytest.raises(dl.CheckpointError, match="mdlm has numbers in .* that are not finite"):
        bundles.export(experiment, tmp_path / "out", stages=("mdlm",))
    assert not list(tmp_path.iterdir())


SMALL = 1 << 16
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def attacks(draw):
    """(file, change of its bytes): cut, spliced, bits flipped, or of JSON one value put in place of another."""
    name = draw(
        st.sampled_from(
            [
                "bundle.json",
                "config.json",
                "tokenizer/tokenizer.json",
                "tokenizer/sentencepiece.model",
                "mdlm.safetensors",
                "statistics.safetensors",
            ]
        )
    )
    kind = draw(st.sampled_from(["bytes", "cut", "header", "value"]))
    if name.endswith(".json") and kind in ("value", "header"):
        place, value = draw(st.integers(0, 10_000)), draw(JSON)
        return name, lambda data: _replaced(data, place, value)
    at, new = draw(st.integers(0, SMALL)), draw(st.binary(max_size=12))
    if kind == "cut":
        return name, lambda data: data[: at % (len(data) + 1)]
    limit = 200 if kind == "header" else None  # where lengths and types stand
    return name, lambda data: _spliced(data, at % min(len(data) + 1, limit or len(data) + 1), new)


def _spliced(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def _replaced(data, place, value):
    """One node of a JSON document, counted in depth, is another value."""
    document = json.loads(data)
    nodes = []

    def walk(node):
        for key, below in (
            node.items()
            if isinstance(node, dict)
            else enumerate(node)
            if isinstance(node, list)
            else ()
        ):
            nodes.append((node, key))
            walk(below)

    walk(document)
    node, key = nodes[place % len(nodes)]
    node[key] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("cases", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_the_reader_survives_anything(bundle, tmp_path_factory, cases):
    """Whatever is done to a bundle, its sums as they were or made right again: it opens, or one of the library's errors says in one line why not."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"

    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(attacks(), min_size=1, max_size=3), st.booleans())
    def attacked(changes, right_sums):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle, folder)
        for name, change in changes:
            with contextlib.suppress(
                ValueError, RecursionError
            ):  # JSON that an earlier change has spoilt
                (folder / name).write_bytes(change((folder / name).read_bytes()))
        if right_sums:
            with contextlib.suppress(*NO_JSON):  # of a manifest that is none any more
                reseal(folder)
        try:
            read(folder, ("mdlm",))
        except REFUSALS as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000

    attacked()
