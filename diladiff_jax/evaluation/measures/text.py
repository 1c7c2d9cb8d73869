"""Measures of sampled text: entropy, repetition, and the exact oracle of the stories corpus (METHOD section 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diladiff_jax.data import stories
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.measures.intervals import Estimate


def unigram_entropy(row: np.ndarray) -> float:
    """Entropy in nats of the distribution of ids within one sample `[L]`."""
    counts = np.unique(row, return_counts=True)[1] / len(row)
    return float(-(counts * np.log(counts)).sum()) if len(row) else 0.0


def repetition(row: np.ndarray, n: int = 3) -> float:
    """Share of the sample's n-grams that occurred earlier in it; 0 for rows shorter than n."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(rows: Sequence[np.ndarray], n: int) -> Estimate | None:
    """Different n-grams over all n-grams of a set of samples, each a row of ids `[any]`; None where no row has n ids.

    n-grams do not cross rows. The measure falls as the set grows, so values compare at equal sample counts alone; and a
    bootstrap, which repeats rows, would lie below it by construction: the interval is a jackknife over samples.
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

    def share_kept(kept: np.ndarray) -> float:
        total = counts[kept].sum()
        return len(np.unique(ids[np.isin(owners, kept)])) / total if total else 1.0

    if len(rows) < 2:
        return Estimate(
            value=share_kept(np.arange(1)), low=0.0, high=1.0
        )  # one sample tells nothing about others
    return intervals.jackknife(share_kept, len(rows), low=0.0, high=1.0)


def distinct_measures(tokens: np.ndarray, eot_id: int) -> dict[str, Estimate]:
    """`distinct_1` to `distinct_4` of samples `[n, L]`, over the tokens that are text."""
    rows = [row[row != eot_id] for row in tokens]
    found = {f"distinct_{n}": distinct_n(rows, n) for n in range(1, 5)}
    return {name: value for name, value in found.items() if value is not None}


def token_measures(tokens: np.ndarray, eot_id: int) -> dict[str, Estimate]:
    """Entropy, repetition and distinct n-grams of samples `[n, L]`.

    Entropy is over the whole row, as published figures count it; repetition over the tokens that are text, so
    that a row filled up with end-of-text does not count as repeating itself.
    """
    return {
        "entropy": intervals.mean(np.array([unigram_entropy(row) for row in tokens])),
        "repetition": intervals.mean(np.array([repetition(row[row != eot_id]) for row in tokens])),
    } | distinct_measures(tokens, eot_id)


def first_documents(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each row `[n, L]` up to its first end-of-text. What follows one must be end-of-text alone, or the whole row is the text."""
    texts = []
    for row in tokens:
        end = (
            int(np.argmax(row == tokenizer.eot_id)) if (row == tokenizer.eot_id).any() else len(row)
        )
        clean = (row[end:] == tokenizer.eot_id).all()
        texts.append(tokenizer.decode(row[:end] if clean else row))
    return texts


def oracle_measures(texts: Sequence[str]) -> dict[str, Estimate]:
    """The stories oracle: shares that are fully valid, that parse, of agreements kept; exact NLL of the valid ones; of them, the share not seen earlier among them.

    `exact_nll` in nats per document is over valid texts only (all others have probability zero) and is left
    out where there are none; the data's own mean is `stories.entropy()`.
    """
    reports = [stories.check(text) for text in texts]
    valid = [text for text, report in zip(texts, reports, strict=True) if report.valid]
    measures = {
        "valid": intervals.share(np.array([r.valid for r in reports])),
        "parses": intervals.share(np.array([r.parses for r in reports])),
        "agreement": intervals.mean(np.array([r.agreement for r in reports])),
    }
    if valid:
        measures["exact_nll"] = intervals.mean(
            np.array([-stories.log_likelihood(text) for text in valid])
        )
        measures["distinct"] = intervals.share(
            np.isin(np.arange(len(valid)), np.unique(valid, return_index=True)[1])
        )
    return measures
