"""Perplexity and features of texts under a published scorer: a GPT-2 or a Llama.

A text is one document, or several with END_OF_TEXT between them. The scorer's own tokenizer encodes
each document without special tokens, the scorer's own end-of-text takes the place of each boundary,
and the ids are cut at the number of positions that the model has. A text that does not begin with
end-of-text is scored after one, as the context of its first id.

The first position of a row, which is that end-of-text, does not count. All other ids count, but
end-of-text only where it is the first of the text. On rows that begin with end-of-text, as those of
MDLM do, this is what MDLM's published evaluation counts.

Rows of a batch are padded at the end to a common length, so that few programs are compiled. Causal
attention cannot see the padding, and the sums leave it out. A text without ids that count has no
perplexity: it is left out, and the proportion of such texts is reported.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.tokenizers.base import SPECIAL_TEXTS
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.model import Model
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import pretrained, scorers

Array = jax.Array

END_OF_TEXT = SPECIAL_TEXTS["eot"]
"""What separates the documents of a text, for any scorer."""

COUNTED = (
    "all ids of a text, the first one given end-of-text; of end-of-text ids only the first, and not"
    " where the text begins with it"
)

_SHORTEST = 32
_LARGEST_BATCH = 16_384  # tokens; wider batches are not faster on any device


@dataclasses.dataclass(frozen=True)
class Scored:
    """What a scorer finds in n texts.

    Attributes:
      nll: total negative log-likelihood of each text in nats, float64 `[n]`.
      counts: the number of ids that it is over, int64 `[n]`.
      features: the last hidden states, averaged over all ids of a text but the last, float32
        `[n, D]`; zeros for texts with fewer than two ids.
    """

    nll: np.ndarray
    counts: np.ndarray
    features: np.ndarray

    def measures(self) -> dict[str, Estimate]:
        """Generative perplexity, weighted by ids, and the proportion of texts without scored ids.

        Returns:
          `empty`, and `gen_ppl` of the other texts if there are any.
        """
        some = self.counts > 0
        found = {"empty": intervals.proportion(~some)}
        if some.any():
            counts = self.counts[some].astype(np.float64)
            found["gen_ppl"] = intervals.ratio_exp(self.nll[some], counts)
        return found


class Scorer:
    """A published scorer with its tokenizer, and its parameters on the devices.

    Attributes:
      length: the most ids of a text that are scored.
      end_id: the id of end-of-text.
      origin: which scorer it is, as in `scorers.PublishedScorer`, and the dtype it computes in.
    """

    def __init__(
        self,
        found: scorers.PublishedScorer,
        params: Any,
        *,
        batch: int,
        length: int | None = None,
        multiple: int = 1,
        batch_sharding: Any = None,
    ) -> None:
        """Compiles nothing yet.

        Args:
          found: the scorer, as it was read.
          params: its parameters, on the devices.
          batch: texts scored at a time; fewer if they are long.
          length: the most ids of a text to score; default: the network's positions.
          multiple: what the size of a batch must be a multiple of.
          batch_sharding: sharding of a batch, whose devices must divide `multiple`.

        Raises:
          PretrainedError: the tokenizer has ids that the network lacks.
        """
        network, tokenizer = found.network, found.tokenizer
        if tokenizer.get_vocab_size() > network.vocab_size:
            raise pretrained.PretrainedError(
                f"scorer's tokenizer: got {tokenizer.get_vocab_size()} ids, expected at most the"
                f" {network.vocab_size} of its network. Both must come from the same model."
            )
        self._positions = network.positions
        self.length = min(network.positions, length or network.positions)
        self.end_id = scorers.end_of_text(tokenizer)
        self.origin = {**found.origin, "dtype": np.dtype(network.dtype).name}
        self._params, self._tokenizer = params, tokenizer
        self._batch, self._multiple = sharding.round_up(batch, multiple), multiple
        shardings: dict[str, Any] = {}
        if batch_sharding is not None:
            shardings = {"in_shardings": (None, *[batch_sharding] * 4)}
            shardings["out_shardings"] = batch_sharding
        self._score_rows = jax.jit(functools.partial(_score_rows, network), **shardings)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text that are scored, int32 `[at most length]`."""
        documents = [text.split(END_OF_TEXT) for text in texts]
        encoded = iter(
            self._tokenizer.encode_batch(
                [document for parts in documents for document in parts], add_special_tokens=False
            )
        )
        rows = []
        for parts in documents:
            ids: list[int] = []
            for i in range(len(parts)):
                ids += [self.end_id] * bool(i) + next(encoded).ids
            rows.append(np.array(ids[: self.length], np.int32))
        return rows

    def row(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the network reads for the ids of a text `[L]`, and which of it counts; `[L + 1]`.

        A text that begins with end-of-text already is its own row.
        """
        ends = ids == self.end_id
        counted = ~ends | (np.cumsum(ends) == 1)
        if ends[:1].any():
            counted[0] = False
            return ids, counted
        return np.append(np.int32(self.end_id), ids), np.append(False, counted)

    def score(
        self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None
    ) -> Scored:
        """Negative log-likelihoods and features of texts.

        Args:
          texts: the texts, with END_OF_TEXT between documents.
          progress: called after each batch with the number of texts that are scored.
        """
        rows = [self.row(ids) for ids in self.encode(texts)]
        lengths = np.array([len(row) for row, _ in rows], np.int64)
        counts = np.array([counted.sum() for _, counted in rows], np.int64)
        nll, features = np.zeros(len(rows)), None
        order = np.argsort(-lengths, kind="stable")  # rows of similar length need little padding
        first = 0
        while first < len(order):
            size = min(padded_length(int(lengths[order[first]]) - 1), self._positions)
            count = max(1, min(self._batch, _LARGEST_BATCH // size) // self._multiple)
            chosen = order[first : first + count * self._multiple]
            first += len(chosen)
            batch = self._padded([rows[i] for i in chosen], count * self._multiple, size)
            found, averages = jax.device_get(self._score_rows(self._params, *batch))
            nll[chosen] = found[: len(chosen)]
            if features is None:
                features = np.zeros((len(rows), averages.shape[-1]), np.float32)
            features[chosen] = averages[: len(chosen)]
            progress(first)
        return Scored(nll, counts, np.zeros((0, 0), np.float32) if features is None else features)

    def _padded(
        self, rows: Sequence[tuple[np.ndarray, np.ndarray]], count: int, size: int
    ) -> tuple[np.ndarray, ...]:
        """Contexts, targets, which targets count, and which contexts are averaged, `[B, size]`."""
        context, targets = (np.full((count, size), self.end_id, np.int32) for _ in range(2))
        counts, averaged = (np.zeros((count, size), bool) for _ in range(2))
        for i, (row, counted) in enumerate(rows):
            n = len(row) - 1
            context[i, :n], targets[i, :n] = row[:-1], row[1:]
            counts[i, :n], averaged[i, 1:n] = counted[1:], True
        return context, targets, counts, averaged

    def measures(self, texts: Sequence[str]) -> dict[str, Estimate]:
        """`Scored.measures` of texts."""
        return self.score(texts).measures()


def padded_length(size: int) -> int:
    """The least of 32, 40, 48, 56, 64, 80, 96 ... that is at least `size`: four per octave."""
    if size <= _SHORTEST:
        return _SHORTEST
    step = 2 ** ((size - 1).bit_length() - 3)
    return -(-size // step) * step


def _score_rows(
    network: Any, params: Any, context: Array, targets: Array, counted: Array, averaged: Array
) -> tuple[Array, Array]:
    """Sums over what is counted `[B]`, and averaged hidden states `[B, D]`."""

    def run(network: Any, context: Array, targets: Array) -> tuple[Array, Array]:
        h = network.hidden_states(context)
        return h, network.nll_of_states(h, targets)

    h, nll = network.apply({"params": params}, context, targets, method=run)
    weight = averaged.astype(jnp.float32)[..., None]
    total = (h.astype(jnp.float32) * weight).sum(axis=1)
    return jnp.where(counted, nll, 0.0).sum(axis=1), total / jnp.maximum(weight.sum(axis=1), 1.0)


_SCORERS: weakref.WeakKeyDictionary[Model, Scorer] = weakref.WeakKeyDictionary()


def published_scorer(model: Model) -> Scorer | None:
    """The scorer that the config's `evaluation.scorer` names, or None if it names none.

    Its parameters are sharded over the model's mesh and kept as long as the model.

    Raises:
      PretrainedError: the files cannot be found or read.
    """
    name, mesh = model.config.evaluation.scorer, model.experiment.mesh
    if not name:
        return None
    if model not in _SCORERS:
        found = scorers.load_scorer(name)
        shardings = sharding.parameter_shardings(
            found.module.abstract_parameters(found.network), mesh
        )
        _SCORERS[model] = Scorer(
            found,
            sharding.place(found.params, shardings),
            batch=model.config.sampling.batch,
            multiple=model.devices,
            batch_sharding=sharding.batch_sharding(mesh),
        )
    return _SCORERS[model]
