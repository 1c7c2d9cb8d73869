"""Damaged and hostile bundles end in a one-line error before memory is allocated."""

import contextlib
import json
import os
import shutil
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from storage.bundle_files import (
    NOT_JSON,
    read,
    read_manifest,
    rewrite_tensors,
    update_hashes,
    write_manifest,
)

import diladiff_jax as dl
from diladiff_jax.storage import config_file
from diladiff_jax.storage.lineage import check_source

ERRORS = (dl.CheckpointError, dl.ConfigError, dl.DataError, dl.PretrainedError)


@pytest.mark.parametrize("how", ["flipped", "short", "missing", "folder"])
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
def test_a_damaged_file_is_named(copy, name, how):
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "flipped":
        path.write_bytes(data)
    elif how == "short":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
    with pytest.raises(
        dl.CheckpointError, match=f"{name} (was changed|has .* bytes instead of|is missing)"
    ):
        read(copy)


def taller(tensors):
    key = max(tensors, key=lambda k: tensors[k].ndim)
    tensors[key] = np.zeros((tensors[key].shape[0] + 1, *tensors[key].shape[1:]), np.float32)


@pytest.mark.parametrize(
    "change, words",
    [
        (taller, "expected F32 or BF16"),
        (lambda t: t.update(stranger=np.zeros(3, np.float32)), "has a tensor 'stranger' that"),
        (lambda t: t.pop(sorted(t)[0]), "has no tensor"),
        (lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()}), "got I32"),
        (lambda t: t.update({k: v.astype(np.float64) for k, v in t.items()}), "got F64"),
    ],
    ids=["shape", "extra", "missing", "integers", "doubles"],
)
def test_tensors_of_another_experiment_are_rejected(copy, change, words):
    """Though all hashes are right."""
    rewrite_tensors(copy, "mdlm.safetensors", change)
    update_hashes(copy)
    with pytest.raises(dl.CheckpointError, match=words):
        read(copy)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["mdlm", "statistics"])
def test_non_finite_numbers_are_rejected(copy, name, number):
    """A single one suffices, though all hashes are right."""

    def spoil(tensors):
        key = sorted(tensors)[-1]
        tensors[key] = tensors[key].copy()
        tensors[key].flat[0] = number

    rewrite_tensors(copy, f"{name}.safetensors", spoil)
    update_hashes(copy)
    with pytest.raises(dl.CheckpointError, match=f"{name}.safetensors has non-finite values in "):
        read(copy)


def test_a_header_cannot_make_the_reader_allocate_memory(copy):
    """The file claims to hold a tebibyte; only tracing the networks takes memory."""
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [1 << 20, 1 << 18], "data_offsets": [0, 1 << 40]}}
    ).encode()
    (copy / "mdlm.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    update_hashes(copy)
    model = dl.load(copy)
    tracemalloc.start()
    with pytest.raises(dl.CheckpointError, match="not a complete safetensors file"):
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
def test_only_known_names_are_allowed(copy, name):
    """A manifest with any other name is rejected before that file is opened."""
    manifest = read_manifest(copy)
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    write_manifest(copy, manifest)
    with pytest.raises(dl.CheckpointError, match="not a file of a bundle"):
        dl.load(copy)


@pytest.mark.parametrize(
    "name", ["tokenizer/sentencepiece.model", "config.json", "tokenizer/tokenizer.json"]
)
def test_a_file_that_the_manifest_omits_is_not_opened(copy, name):
    """Here it is a pipe: opening it would block."""
    manifest = read_manifest(copy)
    del manifest["files"][name]
    write_manifest(copy, manifest)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises(dl.CheckpointError, match=f"does not list {name}"):
        dl.load(copy)
    if name == "config.json":
        with pytest.raises(dl.ConfigError, match="is not a file"):
            config_file.load(copy)


def test_a_link_may_lead_only_to_the_same_bytes(copy, tmp_path):
    """Hub caches consist of links."""
    kept = shutil.copy(copy / "mdlm.safetensors", tmp_path / "blob")
    (copy / "mdlm.safetensors").unlink()
    (copy / "mdlm.safetensors").symlink_to(kept)
    read(copy)
    (copy / "mdlm.safetensors").unlink()
    (copy / "mdlm.safetensors").symlink_to("/dev/zero")
    with pytest.raises(dl.CheckpointError, match="not a regular file"):
        read(copy)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("evaluation.scorer", "somebody/model", "an empty value, because nothing is downloaded"),
        ("data.directory", "/tmp/outside", "an empty value"),
        ("data.files", "../private/*.txt", "the last part of a path"),
        ("data.files", "~somebody", "the last part of a path"),
        ("data.validation_files", "/etc/passwd", "the last part of a path"),
        ("tokenizer.file", "..", "the last part of a path"),
        ("features.path", "owner/model", "the last part of a path"),
        ("data.corpus", "/tmp/dataset", "a name and not a folder"),
        ("data.corpus", "../dataset", "a name and not a folder"),
        ("data.corpus", "community:dataset", "a name and not a folder"),
    ],
)
def test_settings_that_point_outside_the_bundle_are_rejected(copy, tmp_path, key, value, words):
    """By loading and by training from it."""
    path, (block, name) = copy / "config.json", key.split(".")
    settings = json.loads(path.read_text())
    settings[block][name] = value
    if key == "data.corpus":
        settings["data"]["scorer_fraction"] = 0.1
    path.write_text(json.dumps(settings))
    update_hashes(copy)
    for call in (lambda: dl.load(copy), lambda: check_source(tmp_path / "new", copy)):
        with pytest.raises(
            dl.CheckpointError, match=f"config.json: {key}: got .*, expected {words}"
        ) as error:
            call()
        assert "\n" not in str(error.value)


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
    """(file, change of its bytes): truncated, overwritten, or one value of JSON replaced."""
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
        return name, lambda data: replace_value(data, place, value)
    at, new = draw(st.integers(0, SMALL)), draw(st.binary(max_size=12))
    if kind == "cut":
        return name, lambda data: data[: at % (len(data) + 1)]
    limit = 200 if kind == "header" else None  # lengths and types are at the beginning
    return name, lambda data: overwrite(data, at % min(len(data) + 1, limit or len(data) + 1), new)


def overwrite(data, at, new):
    return data[:at] + new + data[at + len(new) :]


def replace_value(data, place, value):
    """Replaces one node of a JSON document, counted depth first."""
    document = json.loads(data)
    nodes = []

    def walk(node):
        children = []
        if isinstance(node, dict):
            children = node.items()
        elif isinstance(node, list):
            children = enumerate(node)
        for key, below in children:
            nodes.append((node, key))
            walk(below)

    walk(document)
    node, key = nodes[place % len(nodes)]
    node[key] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize("cases", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_attack_is_survived(bundle, tmp_path_factory, cases):
    """With or without matching hashes, the bundle opens or one of our errors says why in a line."""
    folder = tmp_path_factory.mktemp("fuzz") / "bundle"

    @hypothesis.settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(attacks(), min_size=1, max_size=3), st.booleans())
    def attack(changes, matching_hashes):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(bundle, folder)
        for name, change in changes:
            # An earlier change may have broken the JSON.
            with contextlib.suppress(ValueError, RecursionError):
                (folder / name).write_bytes(change((folder / name).read_bytes()))
        if matching_hashes:
            with contextlib.suppress(*NOT_JSON):  # the manifest may be broken
                update_hashes(folder)
        try:
            read(folder, ("mdlm",))
        except ERRORS as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000

    attack()
