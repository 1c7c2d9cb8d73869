"""The Llama family against NumPy in float64, and against transformers where torch is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_llama import CONFIG, random_tensors

from diladiff_jax.nn import llama

LLAMA = CONFIG | dict(
    vocab_size=40,
    hidden_size=24,
    num_attention_heads=6,
    intermediate_size=36,
)
VARIANTS = [
    {},
    {"tie_word_embeddings": False},
    {"num_key_value_heads": 6},
    {"num_key_value_heads": 1, "head_dim": 8},
]


def numpy_logits(tensors, config, ids):
    """The equations of arXiv 2302.13971 for one row of ids, position by position, in float64."""
    w = {name.removeprefix("model."): t.astype(np.float64) for name, t in tensors.items()}
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim", config["hidden_size"] // heads)
    angles = config["rope_theta"] ** (-2 * np.arange(size // 2) / size)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x) + config["rms_norm_eps"]) * scale

    def rotate(x, place):
        """Each pair (i, i + size/2) as a complex number, turned by its angle."""
        z = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * place * angles)
        return np.concatenate([z.real, z.imag])

    rows = [w["embed_tokens.weight"][i] for i in ids]
    for i in range(config["num_hidden_layers"]):
        part = {n.removeprefix(f"layers.{i}."): t for n, t in w.items()}
        past, after = [], []
        for place, h in enumerate(rows):
            x = norm(h, part["input_layernorm.weight"])
            q, k, v = (
                (part[f"self_attn.{n}_proj.weight"] @ x).reshape(-1, size) for n in ("q", "k", "v")
            )
            past.append(([rotate(key, place) for key in k], v))
            out = []
            for head in range(heads):
                group, turned = head // (heads // groups), rotate(q[head], place)
                scores = np.array([turned @ keys[group] for keys, _ in past]) / np.sqrt(size)
                p = np.exp(scores - scores.max())
                out.append(sum(a * values[group] for a, (_, values) in zip(p, past, strict=True)))
                out[-1] /= p.sum()
            h = h + part["self_attn.o_proj.weight"] @ np.concatenate(out)
            x = norm(h, part["post_attention_layernorm.weight"])
            gate = part["mlp.gate_proj.weight"] @ x
            up = part["mlp.up_proj.weight"] @ x
            after.append(h + part["mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up))
        rows = after
    table = w.get("lm_head.weight", w["embed_tokens.weight"])
    return np.stack([table @ norm(h, w["norm.weight"]) for h in rows])


@pytest.mark.parametrize("changes", VARIANTS)
def test_it_agrees_with_numpy_in_float64(changes):
    """Logits and `nll`; with a tied and a separate head, and 1, 2 or all groups of heads."""
    config = LLAMA | changes
    network, tensors = llama.from_config(config), random_tensors(config)
    params = llama.parameters(tensors, network)
    bare = {name.removeprefix("model."): t for name, t in tensors.items()}
    jax.tree.map(np.testing.assert_array_equal, params, llama.parameters(bare, network))
    ids = np.random.default_rng(1).integers(0, 40, (2, 11))
    theirs = np.stack([numpy_logits(tensors, config, row) for row in ids])
    ours = jax.jit(network.apply)({"params": params}, jnp.asarray(ids))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    log_p = theirs - np.log(np.exp(theirs).sum(axis=-1, keepdims=True))
    picked = -np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    nll = network.apply({"params": params}, ids[:, :-1], ids[:, 1:], method="nll")
    np.testing.assert_allclose(nll, picked, atol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS)
def test_it_agrees_with_transformers(changes):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = LLAMA | changes
    names = {k: v for k, v in config.items() if k not in ("model_type", "rope_theta")}
    rope = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    settings = transformers.LlamaConfig(**names, rope_parameters=rope, bos_token_id=0)
    model, tensors = transformers.LlamaForCausalLM(settings).eval(), random_tensors(config)
    left = model.load_state_dict({n: torch.tensor(t) for n, t in tensors.items()}, strict=False)
    assert not left.unexpected_keys
    network = llama.from_config(settings.to_dict())
    ids = np.random.default_rng(1).integers(0, 40, (2, 16))
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    ours = network.apply({"params": llama.parameters(tensors, network)}, jnp.asarray(ids))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, "model_type: got 'mamba', expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias: got True, expected False"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: got {'factor': 2.0}, expected None"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: got 'yarn', expected 'default'"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: got 4, expected a divisor of"),
        ({"num_attention_heads": 5}, "num_key_value_heads: got 2, expected a divisor of"),
        ({"head_dim": 3}, "head_dim: got 3, expected an even number"),
        ({"num_hidden_layers": None}, "num_hidden_layers: got None, expected a whole number"),
    ],
)
def test_invalid_configs_are_rejected(changes, words):
    """The message is one line with the setting, its value, and what is valid."""
    with pytest.raises(ValueError) as error:
        llama.from_config(LLAMA | changes)
    assert words in str(error.value) and "\n" not in str(error.value)
