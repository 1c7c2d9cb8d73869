"""The documented form of a sweep's results, `results.json`.

    results = {"setting": {...}, "rows": [row]}
    row     = {"corpus", "model", "latent_steps", "decode_steps", "temperature", "top_p", "samples",
               "seconds", "tokens_per_second", "metrics": {name: {"value", "low", "high"}}}

Rows without `decode_steps` measure data or networks, not samples. `seconds` is the time of all
`samples`, without compilation. `low` and `high` are 95% intervals over samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diladiff_jax.evaluation.schema import Fields, check_fields

Row = Mapping[str, Any]
Results = Mapping[str, Any]

SCHEMA: dict[str, Fields] = {
    "row": {
        "corpus": (str,),
        "model": (str,),
        "latent_steps": (int, type(None)),
        "decode_steps": (int, type(None)),
        "temperature": (float, type(None)),
        "top_p": (float, type(None)),
        "samples": (int,),
        "seconds": (float, type(None)),
        "tokens_per_second": (float, type(None)),
        "metrics": (dict,),
    },
    "metric": {"value": (float,), "low": (float,), "high": (float,)},
}


def check_results(results: Any) -> None:
    """Validates the content of `results.json` against `SCHEMA`.

    Raises:
      NotFiniteError: a number is not finite.
      ValueError: anything else is not as documented; the message names the first such thing.
    """
    if not isinstance(results, dict) or set(results) != {"setting", "rows"}:
        raise ValueError("results: got other keys, expected the keys setting and rows.")
    for i, row in enumerate(results["rows"]):
        check_fields(row, SCHEMA["row"], f"rows[{i}]")
        for name, metric in row["metrics"].items():
            check_fields(metric, SCHEMA["metric"], f"rows[{i}].metrics.{name}")


def corpus(results: Results) -> str:
    """The name of the corpus of the rows."""
    return results["rows"][0]["corpus"] if results["rows"] else "an unknown corpus"


def quality_metric(results: Results) -> str:
    """The metric that measures quality: "valid" with an oracle, else "gen_ppl", else "entropy"."""
    names = {name for row in results["rows"] for name in row["metrics"]}
    return next(name for name in ("valid", "gen_ppl", "entropy") if name in names)


def milliseconds(row: Row) -> float:
    """Milliseconds per document of a timed row."""
    return 1e3 * row["seconds"] / row["samples"]
