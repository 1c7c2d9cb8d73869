"""Perplexity of texts under a published GPT-2.

The scorer's own byte-level BPE encodes a text without special tokens, and cuts it after as many
ids as the model has positions. `<|endoftext|>` precedes it as the context of its first id and is
not scored itself, so a text of n ids gives n negative log-likelihoods.

Rows of a batch are padded at the end with `<|endoftext|>` to a common length, a power of two times
64 (or the model's positions), so that few programs are compiled. Causal attention cannot see the
padding, and the sums leave it out. A text without ids (an empty one) has no perplexity: it is left
out, and the proportion of such texts is reported.
"""

from __future__ import annotations

import functools
import math
import pathlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.model import Model
from diladiff_jax.nn import gpt2
from diladiff_jax.nn.gpt2 import GPT2
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import pretrained

if TYPE_CHECKING:
    import tokenizers

Array = jax.Array

_EOT = "<|endoftext|>"
_SHORTEST = 64


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The byte-level BPE in a GPT-2's folder: tokenizer.json, else vocab.json with merges.txt.

    Raises:
      PretrainedError: neither exists, a file is damaged, or the vocabulary has no end-of-text.
    """
    import tokenizers

    whole, parts = folder / "tokenizer.json", (folder / "vocab.json", folder / "merges.txt")
    try:
        if whole.is_file():
            engine = tokenizers.Tokenizer.from_file(str(whole))
            engine.no_truncation()
            engine.no_padding()
        elif all(part.is_file() for part in parts):
            engine = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*map(str, parts)))
            engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            raise pretrained.PretrainedError(
                f"{folder}: no tokenizer, expected tokenizer.json, or vocab.json and merges.txt"
            )
    except pretrained.PretrainedError:
        raise
    except Exception as error:  # the engine raises plain `Exception`
        raise pretrained.PretrainedError(
            f"{folder}: the tokenizer cannot be read ({error}), expected the files of a GPT-2."
        ) from None
    if engine.token_to_id(_EOT) is None:
        raise pretrained.PretrainedError(
            f"{folder}: the tokenizer has no {_EOT}, expected the files of a GPT-2."
        )
    return engine


class Scorer:
    """A GPT-2 with its tokenizer, and its parameters on the devices.

    Attributes:
      length: the most ids of a text that are scored.
    """

    def __init__(
        self,
        network: GPT2,
        params: Any,
        tokenizer: tokenizers.Tokenizer,
        *,
        batch: int,
        batch_sharding: Any = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          network: the GPT-2.
          params: its parameters, on the devices.
          tokenizer: its byte-level BPE, of `load_tokenizer`.
          batch: texts scored at a time.
          batch_sharding: sharding of a batch, whose devices must divide `batch`.

        Raises:
          PretrainedError: the tokenizer has ids that the network lacks.
        """
        if tokenizer.get_vocab_size() > network.vocab_size:
            raise pretrained.PretrainedError(
                f"scorer's tokenizer: got {tokenizer.get_vocab_size()} ids, expected at most the"
                f" {network.vocab_size} of its network. Both must come from the same model."
            )
        self.length = network.positions
        self._params, self._tokenizer, self._batch = params, tokenizer, batch
        self._eot: Any = tokenizer.token_to_id(_EOT)
        shardings: dict[str, Any] = {}
        if batch_sharding is not None:
            shardings = {"in_shardings": (None, *[batch_sharding] * 3)}
            shardings["out_shardings"] = batch_sharding
        self._row_nll = jax.jit(functools.partial(_row_nll, network), **shardings)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text that are scored."""
        return [
            encoding.ids[: self.length]
            for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]

    def nll(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Total negative log-likelihood of each text, and the number of ids that it is over.

        Returns:
          Nats, float64 `[n]`, and counts, int64 `[n]`.
        """
        encoded = self.encode(texts)
        counts = np.array([len(ids) for ids in encoded], np.int64)
        found = np.zeros(len(encoded))
        order = np.argsort(counts, kind="stable")  # texts of similar length need little padding
        for first in range(0, len(order), self._batch):
            chosen = order[first : first + self._batch]
            size = self._padded_length(int(counts[chosen].max()))
            targets = np.full((self._batch, size), self._eot, np.int32)
            for row, i in zip(targets, chosen, strict=False):
                row[: counts[i]] = encoded[i]
            context = np.roll(targets, 1, axis=1)
            context[:, 0] = self._eot
            scored = np.zeros(self._batch, np.int32)
            scored[: len(chosen)] = counts[chosen]
            nll = np.asarray(self._row_nll(self._params, context, targets, scored))
            found[chosen] = nll[: len(chosen)]
        return found, counts

    def _padded_length(self, ids: int) -> int:
        doublings = max(0, math.ceil(math.log2(max(1, ids) / _SHORTEST)))
        return min(self.length, _SHORTEST * 2**doublings)

    def measures(self, texts: Sequence[str]) -> dict[str, Estimate]:
        """Generative perplexity of texts, weighted by ids, and the proportion of empty texts.

        Returns:
          `empty`, and `gen_ppl` of the other texts if there are any.
        """
        nll, counts = self.nll(texts)
        some = counts > 0
        found = {"empty": intervals.proportion(~some)}
        if some.any():
            found["gen_ppl"] = intervals.ratio_exp(nll[some], counts[some].astype(np.float64))
        return found


def _row_nll(network: GPT2, params: Any, context: Array, targets: Array, counts: Array) -> Array:
    """Sums over the first `counts [B]` targets of each row, `[B]`."""
    scored = jnp.arange(targets.shape[1])[None, :] < counts[:, None]
    nll: Any = network.apply({"params": params}, context, targets, method=GPT2.nll)
    return jnp.where(scored, nll, 0.0).sum(axis=1)


_SCORERS: weakref.WeakKeyDictionary[Model, Scorer] = weakref.WeakKeyDictionary()


def published_scorer(model: Model) -> Scorer | None:
    """The GPT-2 that the config's `evaluation.scorer` names, or None if it names none.

    Its parameters are sharded over the model's mesh and kept as long as the model.

    Raises:
      PretrainedError: the files cannot be found or read.
    """
    name, mesh = model.config.evaluation.scorer, model.experiment.mesh
    if not name:
        return None
    if model not in _SCORERS:
        folder = pretrained.locate(name, pretrained.SCORER_FILES)
        network, params = pretrained.load_scorer(folder)
        shardings = sharding.parameter_shardings(gpt2.abstract_parameters(network), mesh)
        _SCORERS[model] = Scorer(
            network,
            sharding.place(params, shardings),
            load_tokenizer(folder),
            batch=sharding.round_up(model.config.sampling.batch, model.devices),
            batch_sharding=sharding.batch_sharding(mesh),
        )
    return _SCORERS[model]
