"""A very small Llama with random weights, and its files: a folder as published, and a GGUF file."""

import json

import gguf
import numpy as np
import safetensors.numpy

CONFIG = dict(
    model_type="llama",
    vocab_size=261,
    max_position_embeddings=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    rms_norm_eps=1e-5,
    rope_theta=100.0,
    tie_word_embeddings=True,
)
MERGES = ["Ġ t", "h e", "Ġt he", "1 9"]

_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def words():
    """The vocabulary: all bytes, the results of the merges, and end-of-text."""
    from tokenizers import pre_tokenizers

    merged = [merge.replace(" ", "") for merge in MERGES]
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *merged, "<|endoftext|>"]


def random_tensors(config=CONFIG):
    """Tensors with the names and shapes of a published file."""
    rng, width, hidden = (
        np.random.default_rng(0),
        config["hidden_size"],
        config["intermediate_size"],
    )
    head = config.get("head_dim", width // config["num_attention_heads"])
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    table = (config["vocab_size"], width)
    shapes = {"model.embed_tokens": table, "model.norm": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head"] = table
    for i in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{i}.self_attn.q_proj": (q, width),
            f"model.layers.{i}.self_attn.k_proj": (kv, width),
            f"model.layers.{i}.self_attn.v_proj": (kv, width),
            f"model.layers.{i}.self_attn.o_proj": (width, q),
            f"model.layers.{i}.mlp.gate_proj": (hidden, width),
            f"model.layers.{i}.mlp.up_proj": (hidden, width),
            f"model.layers.{i}.mlp.down_proj": (width, hidden),
            f"model.layers.{i}.input_layernorm": (width,),
            f"model.layers.{i}.post_attention_layernorm": (width,),
        }
    return {f"{n}.weight": rng.normal(size=s).astype(np.float32) / 2 for n, s in shapes.items()}


def write_folder(folder, **changes):
    """A folder with config.json, model.safetensors, vocab.json and merges.txt."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words())}))
    (folder / "merges.txt").write_text("\n".join(MERGES))
    safetensors.numpy.save_file(random_tensors(CONFIG | changes), folder / "model.safetensors")
    return folder


def gguf_name(name):
    """What a GGUF file calls a tensor."""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_NAMES[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.weight"


def interleaved(rows, heads):
    """Outputs of heads in the order for rotations of (2 i, 2 i + 1), from that for (i, i + K/2)."""
    first, second = np.split(rows.reshape(heads, -1, rows.shape[-1]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def write_gguf(path, *, kind=None, architecture="llama", pre="smollm", without=None, fields=()):
    """A GGUF file as llama.cpp's converter writes it.

    Args:
      path: the file to write.
      kind: the type to quantize matrices to; default: none.
      architecture: what the file says.
      pre: the name of the splitting before the BPE.
      without: the GGUF name of a tensor to leave out.
      fields: more string fields, by name.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words())
    writer.add_token_merges(MERGES)
    for name, value in dict(fields).items():
        writer.add_string(name, value)
    for name, tensor in random_tensors().items():
        ours = gguf_name(name)
        if ours.endswith(("attn_q.weight", "attn_k.weight")):
            key = "num_attention_heads" if "attn_q" in ours else "num_key_value_heads"
            tensor = interleaved(tensor, CONFIG[key])
        if ours == without:
            continue
        if kind is None or tensor.ndim < 2:
            writer.add_tensor(ours, tensor)
        else:
            writer.add_tensor(ours, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
