"""Networks of the Llama family from a GGUF file, the format of llama.cpp, through package gguf."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from diladiff_jax.storage.errors import PretrainedError

_ARCHITECTURE = "llama"
_NAMES = {
    "token_embd": "embed_tokens",
    "output": "lm_head",
    "output_norm": "norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
"""What tensors are called in a GGUF file, and in a safetensors file."""

_SETTINGS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
"""What settings are called in config.json, and in a GGUF file."""


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The content of a GGUF file, in the terms of a published folder.

    Attributes:
      config: what config.json would say.
      tensors: dequantized tensors, float32, with the names and layouts of a safetensors file.
      metadata: all fields of the file.
      quantization: the types of its tensors, the most frequent first, such as "Q4_1, F32, Q8_0".
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    metadata: Mapping[str, Any]
    quantization: str


def read_gguf(path: pathlib.Path) -> GGUF:
    """Reads a GGUF file of the Llama family.

    Raises:
      PretrainedError: the file cannot be read, is damaged, or holds another architecture.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except OSError as error:
        raise PretrainedError(
            f"{path} cannot be read ({error.strerror or error}), expected a GGUF file."
        ) from None
    except Exception as error:  # the reader indexes into whatever the file holds
        raise _damaged(path, error) from None
    config = _config(path, metadata)
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads", heads)
    tensors, types = {}, collections.Counter()
    for tensor in reader.tensors:
        name = _name(path, tensor.name)
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _halved_pairs(values, heads if "q_proj" in name else groups)
        except Exception as error:  # as above
            raise _damaged(path, error) from None
        tensors[name] = np.asarray(values, np.float32)
        types[tensor.tensor_type.name] += 1
    config["vocab_size"] = len(tensors.get("embed_tokens.weight", ()))
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return GGUF(config, tensors, metadata, ", ".join(name for name, _ in types.most_common()))


def _config(path: pathlib.Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the terms of config.json."""
    architecture = metadata.get("general.architecture")
    if architecture != _ARCHITECTURE:
        raise PretrainedError(
            f"{path}: general.architecture: got {architecture!r}, expected {_ARCHITECTURE!r}. Other"
            " architectures are not supported."
        )
    prefix = f"{_ARCHITECTURE}."
    scaling = metadata.get(f"{prefix}rope.scaling.type", "none")
    if scaling != "none":
        raise PretrainedError(
            f"{path}: {prefix}rope.scaling.type: got {scaling!r}, expected 'none'. Scaled rotary"
            " positions are not supported."
        )
    config: dict[str, Any] = {"model_type": "llama"}
    for ours, theirs in _SETTINGS.items():
        if prefix + theirs in metadata:
            config[ours] = metadata[prefix + theirs]
    for name in ("num_attention_heads", "num_key_value_heads"):
        value = config.get(name, 1 if name == "num_key_value_heads" else None)
        if not isinstance(value, int) or value < 1:
            raise PretrainedError(
                f"{path}: {prefix}{_SETTINGS[name]}: got {value!r}, expected one whole number above"
                " 0 for all layers."
            )
    return config


def _name(path: pathlib.Path, name: str) -> str:
    """What a safetensors file calls a tensor."""
    stem, _, kind = name.rpartition(".")
    block, _, part = stem.rpartition(".")
    if part not in _NAMES or kind != "weight":
        raise PretrainedError(
            f"{path}: tensor {name!r} is not part of a Llama without biases and with plain rotary"
            " positions. Other architectures are not supported."
        )
    if not block:
        return f"{_NAMES[part]}.weight"
    return f"layers.{block.removeprefix('blk.')}.{_NAMES[part]}.weight"


def _halved_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders a head's outputs for rotations of pairs (i, i + K/2) instead of (2 i, 2 i + 1)."""
    pairs = rows.reshape(heads, -1, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _damaged(path: pathlib.Path, error: Exception) -> PretrainedError:
    reason = str(error) or type(error).__name__
    return PretrainedError(
        f"{path} is not a complete GGUF file ({reason}). Copy or download it again."
    )
