"""The result of `judging.Judge` as a short table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diladiff_jax.evaluation.report.text import columns, estimate_text

Scores = Mapping[str, Any]


def scores_table(scores: Scores) -> str:
    """The scorer, a column of measures for each set of texts, MAUVE, and the notes."""
    rows, scorer = scores["rows"], scores["scorer"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = [["", *(row["name"] for row in rows)]]
    for key in ("texts", "tokens", "counted"):
        lines.append([key, *(f"{row[key]:,}" for row in rows)])
    for name in names:
        lines.append([name, *(estimate_text(row["metrics"].get(name)) for row in rows)])
    if scores["mauve"] is not None:
        lines.append(["mauve", estimate_text(scores["mauve"]), *[""] * (len(rows) - 1)])
    first = (
        f"scorer {scorer['name']}: {scorer['file']} (sha256 {scorer['sha256'][:16]}, quantization"
        f" {scorer['quantization']}), in {scorer['dtype']}, at most {scorer['max_tokens']:,} tokens"
        " of each text"
    )
    counted = f"gen_ppl: {scores['definitions']['gen_ppl']}"
    notes = [f"note: {note}" for note in scores["notes"]]
    return "\n".join([first, counted, "", columns(lines), *notes])
