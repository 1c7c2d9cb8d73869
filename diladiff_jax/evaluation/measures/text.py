"""Measures of sampled text: entropy, repetition, diversity, and the stories corpus's oracle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import scipy.stats

from diladiff_jax.data import stories
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate

_ENOUGH = 100  # valid documents, so that few of them do not look like a collapse


def unigram_entropy(row: np.ndarray) -> float:
    """Entropy in nats of the distribution of ids within one sample `[L]`."""
    counts = np.unique(row, return_counts=True)[1] / len(row)
    return float(-(counts * np.log(counts)).sum()) if len(row) else 0.0


def repetition(row: np.ndarray, n: int = 3) -> float:
    """Share of a sample's n-grams that occurred earlier in it; 0 for rows shorter than n."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(rows: Sequence[np.ndarray], n: int) -> Estimate | None:
    """Number of different n-grams over the number of all n-grams in a set of samples.

    n-grams do not cross rows. The measure falls as the set grows, so only values at equal sample
    counts compare. A bootstrap repeats rows and would lie below the value by construction, so the
    interval is a jackknife over samples.

    Args:
      rows: the ids of each sample, of any length.
      n: ids in an n-gram.

    Returns:
      The estimate, or None if no row has n ids.
    """
    grams = [
        np.lib.stride_tricks.sliding_window_view(row, n) if len(row) >= n else np.empty((0, n), int)
        for row in map(np.asarray, rows)
    ]
    counts = np.array([len(g) for g in grams])
    if not counts.sum():
        return None
    ids = np.unique(np.concatenate(grams), axis=0, return_inverse=True)[1].ravel()
    owners = np.repeat(np.arange(len(rows)), counts)

    def distinct_share(kept: np.ndarray) -> float:
        total = counts[kept].sum()
        return len(np.unique(ids[np.isin(owners, kept)])) / total if total else 1.0

    if len(rows) < 2:  # one sample says nothing about others
        return Estimate(value=distinct_share(np.arange(1)), low=0.0, high=1.0)
    return intervals.jackknife(distinct_share, len(rows), low=0.0, high=1.0)


def distinct_measures(tokens: Iterable[np.ndarray], eot_id: int) -> dict[str, Estimate]:
    """`distinct_1` to `distinct_4` of samples `[n, L]`, without their end-of-text tokens."""
    rows = [row[row != eot_id] for row in tokens]
    found = {f"distinct_{n}": distinct_n(rows, n) for n in range(1, 5)}
    return {name: value for name, value in found.items() if value is not None}


def token_measures(tokens: np.ndarray | Sequence[np.ndarray], eot_id: int) -> dict[str, Estimate]:
    """Entropy, repetition and distinct n-grams of samples `[n, L]`, or of rows of any length.

    Entropy is over the whole row, as in published results. Repetition leaves out end-of-text, so
    that a padded row does not count as repeating itself.
    """
    return {
        "entropy": intervals.mean(np.array([unigram_entropy(row) for row in tokens])),
        "repetition": intervals.mean(np.array([repetition(row[row != eot_id]) for row in tokens])),
    } | distinct_measures(tokens, eot_id)


def first_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each row `[n, L]` up to its first end-of-text.

    If anything but end-of-text follows, the document is the text of the whole row.
    """
    texts = []
    for row in tokens:
        ends = np.flatnonzero(row == tokenizer.eot_id)
        end = int(ends[0]) if len(ends) else len(row)
        padded = (row[end:] == tokenizer.eot_id).all()
        texts.append(tokenizer.decode(row[:end] if padded else row))
    return texts


def oracle_measures(texts: Sequence[str]) -> dict[str, Estimate]:
    """What the oracle of the stories corpus finds in documents.

    Returns:
      `valid` and `parses`, shares of the documents; `agreement`, the mean share of agreements that
      a document keeps; and, if any document is valid, `exact_nll`, the mean negative
      log-likelihood of the valid ones in nats per document (all others have probability zero; the
      data's own mean is `stories.entropy()`), `distinct`, the share of the valid ones that are
      not repeats of an earlier one, and, of at least 100 valid ones, `detail_entropy`.
    """
    reports = [stories.check(text) for text in texts]
    valid = [text for text, report in zip(texts, reports, strict=True) if report.valid]
    measures = {
        "valid": intervals.proportion(np.array([r.valid for r in reports])),
        "parses": intervals.proportion(np.array([r.parses for r in reports])),
        "agreement": intervals.mean(np.array([r.agreement for r in reports])),
    }
    if valid:
        nll = np.array([-stories.log_likelihood(text) for text in valid])
        measures["exact_nll"] = intervals.mean(nll)
        first = np.unique(valid, return_index=True)[1]
        measures["distinct"] = intervals.proportion(np.isin(np.arange(len(valid)), first))
    if len(valid) >= _ENOUGH:
        measures["detail_entropy"] = detail_entropy(valid)
    return measures


def detail_entropy(documents: Sequence[str]) -> Estimate:
    """The sum over details (who, what, where, ...) of the entropy of their values, in nats.

    Documents that are valid but always tell of the same people and things have a low value; the
    language's own is `stories.detail_entropy()`. The entropy of n draws is too low by about
    (k - 1) / 2n for k values, which is added (Miller and Madow).

    Args:
      documents: at least two valid stories.
    """
    found = [stories.details(document) or {} for document in documents]
    ids = np.array(
        [np.unique([d[name] for d in found], return_inverse=True)[1] for name in found[0]]
    )

    def entropy(kept: np.ndarray) -> float:
        total = 0.0
        for values in ids[:, kept]:
            counts = np.unique(values, return_counts=True)[1]
            total += scipy.stats.entropy(counts) + (len(counts) - 1) / (2 * len(values))
        return float(total)

    return intervals.jackknife(entropy, len(documents), low=0.0)
