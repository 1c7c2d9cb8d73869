"""Published encoders from files: exact parameters, and one-line errors for bad files."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from diladiff_jax.objectives.build import frozen_sources, text_encoder
from micro import micro_config

from diladiff_jax.config import ConfigError
from diladiff_jax.data import tokenizers
from diladiff_jax.experiment import Experiment
from diladiff_jax.nn import bert
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import pretrained

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s", "ran", "home", ".", ","]
CONFIG = dict(
    model_type="bert",
    vocab_size=16,
    max_position_embeddings=14,
    type_vocab_size=2,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=32,
)


def write_encoder(folder, dtype=np.float32, **changes):
    """An encoder's folder with random weights under the published names."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    rng, d = np.random.default_rng(0), 16
    shapes = {
        "word_embeddings": (16, d),
        "position_embeddings": (14, d),
        "token_type_embeddings": (2, d),
    }
    shapes = {f"embeddings.{name}.weight": shape for name, shape in shapes.items()}
    linear = {
        "attention.self.query": (d, d),
        "attention.self.key": (d, d),
        "attention.self.value": (d, d),
        "attention.output.dense": (d, d),
    }
    linear |= {"intermediate.dense": (32, d), "output.dense": (d, 32)}
    for i in range(2):
        for name, shape in linear.items():
            shapes |= {
                f"encoder.layer.{i}.{name}.weight": shape,
                f"encoder.layer.{i}.{name}.bias": shape[:1],
            }
    for name in (
        "embeddings",
        *(f"encoder.layer.{i}.{part}output" for i in range(2) for part in ("attention.", "")),
    ):
        shapes |= {f"{name}.LayerNorm.weight": (d,), f"{name}.LayerNorm.bias": (d,)}
    tensors = {
        f"bert.{name}": (rng.normal(size=shape) / 4).astype(dtype) for name, shape in shapes.items()
    }
    tensors["bert.embeddings.position_ids"] = np.arange(14)
    safetensors.numpy.save_file(tensors | changes, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "e")


def experiment(workdir, encoder, sizes=(8, 1, 1), **changes):
    """An experiment with the encoder's features: rows of 32 tokens, windows of at most 12."""
    vocabulary = changes.pop("vocabulary", encoder / "vocab.txt")
    config = micro_config(
        features=dict(
            source="bert", path=str(encoder), with_embeddings=False, compute_dtype="float32"
        )
        | changes,
        tokenizer=dict(kind="wordpiece", file=str(vocabulary), lowercase=True),
    )
    tokenizer = tokenizers.from_vocabulary(vocabulary, "wordpiece", lowercase=True)
    if not (workdir / "tokenizer").exists():
        tokenizer.save(workdir / "tokenizer")
    pretrained.adopt(config.features.path, workdir / "features")
    return Experiment(
        config,
        workdir,
        tokenizer,
        sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
    )


def test_sharded_parameters_give_the_features_of_replicated_ones(tmp_path, encoder):
    """On 2 x 2 x 2 devices no device holds a complete matrix. The workdir needs the encoder's
    original folder no more, and the parameters have no gradient."""
    source = shutil.copytree(encoder, tmp_path / "source")
    replicated, rough, split = (
        experiment(tmp_path, source),
        experiment(tmp_path, source, compute_dtype="bfloat16"),
        experiment(tmp_path, source, (2, 2, 2)),
    )
    shutil.rmtree(source)
    tokens = jnp.asarray(np.random.default_rng(0).integers(5, 12, (8, 32)))
    found = []
    for e in (replicated, split):
        params = e.restore("bert")
        features = text_encoder(e.settings, e.networks).features
        assert features.dim == 16
        tokens_there = jax.device_put(tokens, sharding.batch_sharding(e.mesh))
        found.append(jax.jit(features.__call__)(params, tokens_there))
    assert found[0].shape == (8, 32, 16) and found[0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = leaf.size // leaf.addressable_shards[0].data.size
        name = [p.key for p in path]
        assert parts == (
            4 if name[-1] == "kernel" or name[0] == "words" else 2 if leaf.ndim == 2 else parts
        ), name  # positions are sharded over fsdp only
    gradient = jax.grad(lambda p: features(p, tokens).sum())(params)
    assert all(not np.asarray(g).any() for g in jax.tree.leaves(gradient))
    half = text_encoder(e.settings, rough.networks).features(params, tokens)
    assert half.dtype == jnp.float32 and 0 < float(jnp.abs(half - found[0]).max()) < 0.3


def test_the_decoder_starts_from_the_mdlm_whatever_the_features_are(encoder, tmp_path):
    """Features come from the encoder or the MDLM; the decoder's backbone always from the MDLM."""
    settings = experiment(tmp_path, encoder).settings
    assert frozen_sources("autoencoder", settings) == {"features": ("bert",), "start": ("mdlm",)}
    settings["features"]["source"] = "denoiser"
    assert frozen_sources("diladiff", settings)["features"] == ("mdlm",)


def test_bfloat16_files_are_read_as_float32(tmp_path, encoder):
    network = pretrained.load_encoder(encoder, jnp.float32)
    exact = pretrained.encoder_parameters(encoder, network)
    rough = pretrained.encoder_parameters(
        write_encoder(tmp_path / "half", ml_dtypes.bfloat16), network
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(
            a.astype(ml_dtypes.bfloat16).astype(np.float32), b
        ),
        exact,
        rough,
    )


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "model.safetensors is not a complete safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"{}"),
            "model.safetensors is not a complete safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "model.safetensors cannot be read",
        ),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: got list"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (
            lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 20})),
            r"model.safetensors: tensor .* by the network's config",
        ),
        (
            lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3})),
            r"tensor encoder.layer.2.*: missing",
        ),
        (
            lambda f: (f / "config.json").write_text(json.dumps(CONFIG | {"model_type": "t5"})),
            "config.json: model_type: got 't5'",
        ),
        (lambda f: (f / "vocab.txt").write_text("a\nb\n"), r"vocab.txt has no piece \[CLS\]"),
        (
            lambda f: write_encoder(f, **{"bert.encoder.layer.0.output.dense.bias": np.arange(16)}),
            "got int64, expected float32",
        ),
    ],
)
def test_a_damaged_file_is_a_one_line_error_that_names_it(tmp_path, encoder, damage, words):
    folder = shutil.copytree(encoder, tmp_path / "e")
    damage(folder)
    with pytest.raises(pretrained.PretrainedError, match=words) as error:
        pretrained.encoder_parameters(folder, pretrained.load_encoder(folder, jnp.float32))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_adopt_copies_all_files_or_none(tmp_path, encoder):
    """A folder that exists is left unchanged."""
    short = shutil.copytree(encoder, tmp_path / "short")
    (short / "vocab.txt").unlink()
    with pytest.raises(pretrained.PretrainedError, match="vocab.txt is missing"):
        pretrained.adopt(str(short), tmp_path / "features")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["short"]
    pretrained.adopt(str(encoder), tmp_path / "features")
    pretrained.adopt("/nowhere/at/all", tmp_path / "features")
    copied = {p.name: p.read_bytes() for p in (tmp_path / "features").iterdir()}
    assert copied == {name: (encoder / name).read_bytes() for name in pretrained.ENCODER_FILES}


def test_only_hub_names_are_downloaded_and_only_the_needed_files(tmp_path, encoder, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(encoder),
    )
    pretrained.adopt("owner/name", tmp_path / "features")
    assert asked == [("owner/name", list(pretrained.ENCODER_FILES))]
    assert sorted(p.name for p in (tmp_path / "features").iterdir()) == sorted(
        pretrained.ENCODER_FILES
    )
    with pytest.raises(
        pretrained.PretrainedError,
        match="/nowhere/at/all is not a folder, expected one with config.json",
    ):
        pretrained.adopt("/nowhere/at/all", tmp_path / "other")

    def fails(name, allow_patterns):
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(
        pretrained.PretrainedError, match=r"owner/name is not a folder, .* failed \(no network\)"
    ):
        pretrained.adopt("owner/name", tmp_path / "other")


def test_the_tokenizer_must_have_the_vocabulary_of_the_encoder(tmp_path, encoder):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]) + "\n")
    with pytest.raises(
        pretrained.PretrainedError, match="has 12 pieces and differs from the tokenizer's 11"
    ):
        experiment(tmp_path, encoder, vocabulary=tmp_path / "vocab.txt")


@pytest.mark.parametrize(
    ("features", "tokenizer", "words"),
    [
        (
            dict(source="bert"),
            {},
            "features.path is ''; it must be an encoder's folder or hub name",
        ),
        (
            dict(source="bert", path="e", with_embeddings=True),
            {},
            "features.with_embeddings is True; it must be false when features.source is bert",
        ),
        (
            dict(source="bert", path="e", with_embeddings=False),
            {},
            "tokenizer.kind is 'unigram'; it must be wordpiece",
        ),
        (dict(source="elmo"), {}, "features.source is 'elmo'; it must be one of denoiser, bert"),
        (dict(compute_dtype="int8"), {}, "features.compute_dtype is 'int8'"),
    ],
)
def test_impossible_settings_are_rejected_before_any_file_is_opened(features, tokenizer, words):
    with pytest.raises(ConfigError) as error:
        micro_config(features=features, tokenizer=tokenizer)
    assert words in str(error.value)


def test_ids_beyond_the_encoders_pieces_are_read_as_sep(encoder):
    """Our tokenizer adds mask and end-of-text there, even if the encoder's table has such rows."""
    network = pretrained.load_encoder(encoder, jnp.float32)
    params = pretrained.encoder_parameters(encoder, network)
    assert (network.pieces, network.vocab_size, network.cls_id, network.sep_id) == (12, 16, 2, 3)
    apply = lambda tokens: network.apply(
        {"params": params}, jnp.asarray([tokens]), method=bert.Bert.features
    )
    np.testing.assert_array_equal(apply([5, 6, 13, 127]), apply([5, 6, 3, 3]))
