"""A sweep as plain text: the table of all rows, and the sentences that the rows support."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diladiff_jax.evaluation.models import title
from diladiff_jax.evaluation.results import Results, Row, milliseconds, quality_metric

_METRICS = (
    "valid",
    "agreement",
    "parses",
    "exact_nll",
    "distinct",
    "detail_entropy",
    "gen_ppl",
    "empty",
    "entropy",
    "repetition",
    "bound_ppl",
    "recovery",
)
_PLAIN_SAMPLING = {"order": "random", "refresh_every": 1, "skip_layers": []}
_FEW_STEPS = (2, 4, 8)


def table(results: Results) -> str:
    """All rows as aligned plain text, with intervals in brackets."""
    present = {name for row in results["rows"] for name in row["metrics"]}
    names = [name for name in _METRICS if name in present]
    head = ["model", "latent", "decode", "ms/document", *names]
    lines = [head]
    for row in results["rows"]:
        time = "" if row["seconds"] is None else f"{milliseconds(row):.2f}"
        steps = ["" if (n := row[k]) is None else str(n) for k in ("latent_steps", "decode_steps")]
        estimates = [estimate_text(row["metrics"].get(name)) for name in names]
        lines.append([row["model"], *steps, time, *estimates])
    return columns(lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as aligned plain text, with the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def estimate_text(metric: Mapping[str, Any] | None) -> str:
    """A value with its interval in brackets. One value repeated counts as too few texts."""
    if metric is None:
        return ""
    digits = 3 if abs(metric["value"]) < 10 else 1
    interval = interval_words(metric["low"], metric["high"], digits)
    return f"{metric['value']:.{digits}f} [{interval}]"


def interval_words(low: float | None, high: float | None, digits: int) -> str:
    """Both ends; if the samples do not differ, nothing is known of the spread: "too few texts"."""
    if low is None or high is None or low == high:
        return "too few texts"
    return f"{low:.{digits}f}, {high:.{digits}f}"


def summary(results: Results) -> list[str]:
    """Sentences on the results: unusual sampling settings, then the paper's claim on these rows.

    The claim is stated whichever way it turns out, for few steps against few steps and for speed
    at equal quality. Without an oracle or a scorer, nothing is claimed: entropy alone does not
    measure quality.
    """
    lines = _unusual_sampling(results["setting"])
    metric = quality_metric(results)
    if metric == "entropy":
        reason = "entropy alone does not"
        return [*lines, f"no oracle and no scorer: nothing here measures quality ({reason})"]
    claim = _Claim(results, metric)
    return [*lines, *claim.few_steps(), *claim.speed("mdlm"), *claim.speed("mdlm_long")]


def _unusual_sampling(setting: Mapping[str, Any]) -> list[str]:
    unusual = {
        name: setting[name]
        for name, plain in _PLAIN_SAMPLING.items()
        if setting.get(name, plain) != plain
    }
    if "skip_layers" in unusual:
        unusual["skip_from"] = setting["skip_from"]
    if not unusual:
        return []
    changes = ", ".join(f"sampling.{name}={value}" for name, value in unusual.items())
    return [f"sampled with {changes}"]


@dataclasses.dataclass(frozen=True)
class _Claim:
    """The paper's claim, DiLaDiff against the baselines, on the rows of one sweep."""

    results: Results
    metric: str

    def rows(self, model: str) -> list[Row]:
        """Timed rows of a model, without those that take more decoding steps than tokens."""
        length = self.results["setting"].get("length", math.inf)
        return [
            r
            for r in self.results["rows"]
            if r["model"] == model
            and r["seconds"] is not None
            and self.metric in r["metrics"]
            and r["decode_steps"] <= length
        ]

    def quality(self, row: Row, end: str = "value") -> float:
        """The value of a row, or its "worst" or "best" end, so that more is better."""
        more_is_better = self.metric == "valid"
        if end != "value":
            end = "low" if (end == "worst") == more_is_better else "high"
        return row["metrics"][self.metric][end] * (1.0 if more_is_better else -1.0)

    def words(self, row: Row) -> str:
        metrics = row["metrics"]
        entropy = (
            f" at entropy {metrics['entropy']['value']:.2f}" if self.metric == "gen_ppl" else ""
        )
        return f"{metrics[self.metric]['value']:.3f}{entropy}"

    def few_steps(self) -> list[str]:
        """DiLaDiff and MDLM at the same few decoding steps."""
        lines = []
        for steps in _FEW_STEPS:
            ours, theirs = (
                next((r for r in self.rows(model) if r["decode_steps"] == steps), None)
                for model in ("diladiff", "mdlm")
            )
            if ours and theirs:
                lines.append(
                    f"{self.metric} at {steps} decoding steps:"
                    f" DiLaDiff {self.words(ours)}, MDLM {self.words(theirs)}"
                )
        return lines

    def speed(self, baseline: str) -> list[str]:
        """How much faster DiLaDiff reaches a baseline's best quality.

        The baseline's time is that of its fastest row whose interval holds its best value;
        DiLaDiff's that of its fastest row whose whole interval is at least as good.
        """
        theirs, ours = self.rows(baseline), self.rows("diladiff")
        if not theirs or not ours:
            return []
        name, top = title(baseline), max(theirs, key=self.quality)
        best = self.quality(top)
        if self.metric == "valid" and best == 0:
            return [f"{name} makes no valid document at any number of steps measured"]
        as_good = min(
            (r for r in theirs if self.quality(r, "best") >= best), key=lambda r: r["seconds"]
        )
        line = (
            f"{name} is best at {top['decode_steps']} steps ({self.metric} {self.words(top)}),"
            f" and not clearly worse at {as_good['decode_steps']}; DiLaDiff"
        )
        passing = [r for r in ours if self.quality(r, "worst") >= best]
        if not passing:
            return [
                f"{line} does not clearly pass it (best {self.words(max(ours, key=self.quality))})"
            ]
        fast = min(passing, key=lambda r: r["seconds"])
        steps = fast["decode_steps"]
        factor = as_good["seconds"] / fast["seconds"]
        return [
            f"{line} passes it at {steps} {'step' if steps == 1 else 'steps'} ({self.words(fast)}),"
            f" {factor:.1f} times as fast as that"
        ]
