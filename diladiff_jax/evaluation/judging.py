"""Judges texts of any origin, and the documented form of the result, which `score.py` writes.

    scores = {"scorer": {"name", "file", "sha256", "quantization", "dtype", "max_tokens"},
              "definitions": {NAME: sentence}, "rows": [row], "mauve": {...} or null,
              "nearest": [{"index", "overlap", "text", "document"}], "notes": [sentence]}
    row    = {"name", "texts", "tokens", "counted", "seconds",
              "metrics": {NAME: {"value", "low", "high"}}}

A row is the judged `texts`, or the `reference`. `tokens` are those of the scorer, `counted` is the
number of negative log-likelihoods in `gen_ppl`, and `seconds` is how long the scorer took. `low`
and `high` are null if the interval would be one value repeated, which means too few texts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diladiff_jax.evaluation.measures import mauve as mauve_lib
from diladiff_jax.evaluation.measures import memorization as memorization_lib
from diladiff_jax.evaluation.measures import scorer as scorer_lib
from diladiff_jax.evaluation.measures import text as text_lib
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.scorer import Scored, Scorer
from diladiff_jax.evaluation.schema import Fields, check_fields
from diladiff_jax.storage import scorers

SCHEMA: dict[str, Fields] = {
    "scores": {
        "scorer": (dict,),
        "definitions": (dict,),
        "rows": (list,),
        "mauve": (dict, type(None)),
        "nearest": (list,),
        "notes": (list,),
    },
    "scorer": {
        "name": (str,),
        "file": (str,),
        "sha256": (str,),
        "quantization": (str,),
        "dtype": (str,),
        "max_tokens": (int,),
    },
    "row": {
        "name": (str,),
        "texts": (int,),
        "tokens": (int,),
        "counted": (int,),
        "seconds": (float,),
        "metrics": (dict,),
    },
    "metric": {
        "value": (float,),
        "low": (float, type(None)),
        "high": (float, type(None)),
    },
    "nearest": {"index": (int,), "overlap": (float,), "text": (str,), "document": (str,)},
}

DEFINITIONS = {
    "gen_ppl": f"exp of the mean negative log-likelihood of {scorer_lib.COUNTED}",
    "empty": "share of texts without an id that counts; gen_ppl leaves them out",
    "entropy": "entropy in nats of the scorer's ids within a text, averaged over texts",
    "repetition": "share of a text's 3-grams of the scorer's ids that occurred earlier in it",
    "distinct_n": "different n-grams of the scorer's ids over all n-grams; falls with more texts",
    "mauve": "MAUVE of the scorer's last hidden states, averaged over a text",
    "copied_8grams": f"share of word 8-grams in the training text; words: {memorization_lib.WORDS}",
    "nearest_overlap": "share of a text's different word 3-grams in the nearest training document",
}
"""What each number means."""

_NEAREST = 5


class Judge:
    """A published scorer that measures texts.

    Attributes:
      origin: the `scorer` of the result.
    """

    def __init__(
        self, found: scorers.PublishedScorer, *, batch: int, max_tokens: int | None = None
    ) -> None:
        """Moves the parameters to the default device.

        Args:
          found: the scorer.
          batch: texts scored at a time.
          max_tokens: the most tokens of a text that are judged; default: the scorer's positions.
        """
        self._scorer = Scorer(found, jax.device_put(found.params), batch=batch, length=max_tokens)
        self.origin = {**self._scorer.origin, "max_tokens": self._scorer.length}

    def judge(
        self,
        texts: Sequence[str],
        reference: Sequence[str] | None = None,
        training: Iterable[str] | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Measures texts.

        Args:
          texts: the texts, with END_OF_TEXT between the documents of one.
          reference: texts that they should be like, which are measured too.
          training: the documents that the model was trained on.
          progress: called after each batch with the number of texts that are scored, those of the
            reference included.

        Returns:
          The result, as in the module's description.
        """
        sets = {"texts": list(texts)} | (
            {} if reference is None else {"reference": list(reference)}
        )
        scored: dict[str, Scored] = {}
        rows: list[dict[str, Any]] = []
        for name, each in sets.items():
            before = sum(row["texts"] for row in rows)
            scored[name], row = self._row(name, each, lambda n, before=before: progress(before + n))
            rows.append(row)
        notes: list[str] = []
        result = {
            "scorer": self.origin,
            "definitions": DEFINITIONS,
            "rows": rows,
            "mauve": _mauve(scored, notes),
            "nearest": [] if training is None else _add_memorization(sets, rows, training),
            "notes": notes,
        }
        check_scores(result)
        return result

    def _row(
        self, name: str, texts: Sequence[str], progress: Callable[[int], None]
    ) -> tuple[Scored, dict[str, Any]]:
        start = time.perf_counter()
        scored = self._scorer.score(texts, progress)
        seconds = time.perf_counter() - start
        ids = self._scorer.encode(texts)
        found = scored.measures() | text_lib.token_measures(ids, self._scorer.end_id)
        return scored, {
            "name": name,
            "texts": len(texts),
            "tokens": sum(map(len, ids)),
            "counted": int(scored.counts.sum()),
            "seconds": seconds,
            "metrics": _without_point_intervals(found),
        }


def check_scores(scores: Any) -> None:
    """Validates a result against `SCHEMA`.

    Raises:
      NotFiniteError: a number is not finite.
      ValueError: anything else is not as documented; the message names the first such thing.
    """
    check_fields(scores, SCHEMA["scores"], "scores")
    check_fields(scores["scorer"], SCHEMA["scorer"], "scorer")
    for i, row in enumerate(scores["rows"]):
        check_fields(row, SCHEMA["row"], f"rows[{i}]")
        for name, metric in row["metrics"].items():
            check_fields(metric, SCHEMA["metric"], f"rows[{i}].metrics.{name}")
    for i, each in enumerate(scores["nearest"]):
        check_fields(each, SCHEMA["nearest"], f"nearest[{i}]")


def _without_point_intervals(found: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates with null for an interval of one value repeated."""
    return {
        name: {
            "value": float(e["value"]),
            "low": float(e["low"]) if e["low"] < e["high"] else None,
            "high": float(e["high"]) if e["low"] < e["high"] else None,
        }
        for name, e in found.items()
    }


def _mauve(scored: Mapping[str, Scored], notes: list[str]) -> dict[str, Any] | None:
    """MAUVE of the texts that have features; None with a note if it cannot be computed."""
    if "reference" not in scored:
        return None
    texts, reference = (scored[name] for name in ("texts", "reference"))
    features = [each.features[each.counts > 1] for each in (reference, texts)]
    if min(map(len, features)) < mauve_lib.FEWEST_SAMPLES:
        notes.append(
            f"no MAUVE: got {len(features[1])} texts and {len(features[0])} of the reference,"
            f" expected at least {mauve_lib.FEWEST_SAMPLES} of each"
        )
        return None
    try:
        return dict(mauve_lib.mauve(*features))
    except mauve_lib.MissingPackage as error:
        notes.append(f"no MAUVE: {error}")
        return None


def _add_memorization(
    sets: Mapping[str, Sequence[str]], rows: Sequence[dict[str, Any]], training: Iterable[str]
) -> list[dict[str, Any]]:
    """Adds what is shared with the training text to the rows' metrics.

    Returns:
      The judged texts that are most like one training document, and these documents.
    """
    every = [text for texts in sets.values() for text in texts]
    found = memorization_lib.memorization(every, training)
    first = 0
    for row in rows:
        part = found.part(first, first + row["texts"])
        row["metrics"] |= _without_point_intervals(part.measures())
        first += row["texts"]
    order = np.argsort(-found.overlap[: rows[0]["texts"]], kind="stable")[:_NEAREST]
    return [
        {
            "index": int(i),
            "overlap": float(found.overlap[i]),
            "text": every[i],
            "document": found.nearest[i],
        }
        for i in order
    ]
