"""Perplexity of texts under a published GPT-2 (METHOD section 6).

A text is encoded by the scorer's own byte-level BPE, special tokens not added, and cut after as many ids as the model
has positions. `<|endoftext|>` stands before it as the context of its first id and is not scored itself, so a text of n
ids gives n negative log-likelihoods. Rows of a batch are filled up at the end with `<|endoftext|>`, to a common length that
is a power of two times 64 (or the model's positions), so that few programs are compiled; nothing of a row comes after what is
scored of it but this fill, which causal attention cannot see and the sums leave out. A text without ids (an empty one) has
no perplexity: it is left out, and the share of such texts is given beside.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.nn.gpt2 import GPT2
from diladiff_jax.storage import pretrained

if TYPE_CHECKING:
    import tokenizers

Array = jax.Array

_EOT = "<|endoftext|>"
_SHORTEST = 64


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
    """The byte-level BPE of a GPT-2's folder: tokenizer.json, else vocab.json with merges.txt.

    Raises:
      PretrainedError: neither is there, they are damaged, or have no end-of-text.
    """
    import tokenizers  # here, for `import diladiff_jax` loads none of the heavy packages

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
                f"{folder} has no tokenizer; it must hold tokenizer.json, or vocab.json and merges.txt"
            )
    except pretrained.PretrainedError:
        raise
    except Exception as error:  # the engine raises bare exceptions
        raise pretrained.PretrainedError(
            f"{folder}: the tokenizer's files cannot be read ({error}); they must be a GPT-2's"
        ) from None
    if engine.token_to_id(_EOT) is None:
        raise pretrained.PretrainedError(
            f"{folder}: the tokenizer has no {_EOT}; it must be a GPT-2's"
        )
    return engine


class Scorer:
    """A GPT-2 with its tokenizer and parameters on the devices. `length` is the most ids of a text that are scored."""

    def __init__(
        self,
        network: GPT2,
        params: Any,
        tokenizer: tokenizers.Tokenizer,
        *,
        batch: int,
        batch_sharding: Any = None,
    ) -> None:
        """`batch` texts are scored at a time, laid out by `batch_sharding`, whose devices must divide it.

        Raises:
          PretrainedError: the tokenizer has ids that the network lacks.
        """
        if tokenizer.get_vocab_size() > network.vocab_size:
            raise pretrained.PretrainedError(
                f"the scorer's tokenizer has {tokenizer.get_vocab_size()} ids, its network {network.vocab_size}; they must be of one model"
            )
        self.length = network.positions
        self._params, self._tokenizer, self._batch = params, tokenizer, batch
        self._eot = tokenizer.token_to_id(_EOT)
        rows = (
            {}
            if batch_sharding is None
            else {
                "in_shardings": (None, batch_sharding, batch_sharding, batch_sharding),
                "out_shardings": batch_sharding,
            }
        )
        self._row_nll = jax.jit(functools.partial(_row_nll, network), **rows)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text that are scored."""
        return [
            encoding.ids[: self.length]
            for encoding in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        ]

    def nll(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Total negative log-likelihood in nats of each text `[n]`, float64, and how many ids it is of `[n]`."""
        encoded = self.encode(texts)
        counts = np.array([len(ids) for ids in encoded], np.int64)
        found = np.zeros(len(encoded))
        order = np.argsort(counts, kind="stable")  # texts of like length together: little fill
        for first in range(0, len(order), self._batch):
            chosen = order[first : first + self._batch]
            size = min(
                self.length,
                _SHORTEST
                * 2 ** max(0, int(np.ceil(np.log2(max(1, counts[chosen].max()) / _SHORTEST)))),
            )
            targets = np.full((self._batch, size), self._eot, np.int32)
            for row, i in zip(targets, chosen, strict=False):
                row[: counts[i]] = encoded[i]
            context = np.concatenate(
                [np.full((self._batch, 1), self._eot, np.int32), targets[:, :-1]], axis=1
            )
            scored = np.zeros(self._batch, np.int32)
            scored[: len(chosen)] = counts[chosen]
            found[chosen] = np.asarray(self._row_nll(self._params, context, targets, scored))[
                : len(chosen)
            ]
        return found, counts

    def measures(self, texts: Sequence[str]) -> dict[str, Estimate]:
        """`gen_ppl`: exp of total negative log-likelihood over total ids (left out where no text has any);
        `empty`: the share of texts without ids, which `gen_ppl` leaves out."""
        nll, counts = self.nll(texts)
        some = counts > 0
        found = {"empty": intervals.share(~some)}
        if some.any():
            found["gen_ppl"] = intervals.ratio_exp(nll[some], counts[some].astype(np.float64))
        return found


def _row_nll(network: GPT2, params: Any, context: Array, targets: Array, counts: Array) -> Array:
    """`[B]` sums over the first `counts` targets of each row."""
    scored = jnp.arange(targets.shape[1])[None, :] < counts[:, None]
    return jnp.where(
        scored, network.apply({"params": params}, context, targets, method=GPT2.nll), 0.0
    ).sum(axis=1)
