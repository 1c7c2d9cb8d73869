"""The paper's numbers (arXiv 2605.23605) with a run's own beside them.

The last column of every table says whether a row compares, or why not. Rows that this run could
not reach begin with "out of reach", which the report's page marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diladiff_jax.evaluation.analyses import published_values as paper
from diladiff_jax.evaluation.analyses.published_values import MainRow
from diladiff_jax.evaluation.figures import Table, cells, table
from diladiff_jax.evaluation.models import title
from diladiff_jax.evaluation.results import Results, Row, corpus


def main_comparison(results: Results) -> Table:
    """The paper's main rows with this run's beside them.

    They are matched by model and temperature, at the nearest number of decoding steps.
    """
    rows: list[list[Any]] = []
    for theirs in paper.MAIN:
        ours = _nearest(results["rows"], theirs)
        for metric in ("gen_ppl", "entropy", "mauve"):
            value = getattr(theirs, metric)
            if value is not None:
                found = cells(ours["metrics"].get(metric) if ours else None)
                compares = comparability(results, theirs, ours, metric)
                rows.append([theirs.name, metric, value, *found, _setting(ours), compares])
    return table(
        "published_main",
        "table 1",
        "The paper's numbers and this run's",
        ("paper's row", "measure", "paper", "here", "low", "high", "setting here", "comparable"),
        rows,
        "The paper: OpenWebText, L = 1024, scored by GPT-2 large, nucleus 0.9."
        " Generative perplexity means little without the entropy beside it.",
    )


def autoencoder_comparison(results: Results, compression: float) -> Table:
    """The autoencoder's recovery by compression; this run's is beside its own compression L / N."""
    bounds = (r["metrics"] for r in results["rows"] if r["model"] == "autoencoder bound")
    found = next(bounds, {}).get("recovery")
    rows = []
    for theirs in paper.AUTOENCODERS:
        same = found if theirs.compression == compression else None
        missing = "" if same else "no run at this compression here"
        compares = _compares(results, missing if found else "not measured here")
        name = f"{theirs.compression}x, {theirs.augmentation}"
        rows.append([name, theirs.bound, theirs.recovery, *cells(same), compares])
    return table(
        "published_autoencoder",
        "table 3",
        "The autoencoder against compression",
        (
            *("paper's row", "paper's bound", "paper's recovery"),
            *("recovery here", "low", "high", "comparable"),
        ),
        rows,
        "Recovery is over masking ratios drawn uniformly.",
    )


def schedule_comparison(results: Results, schedule: str, d: float) -> Table:
    """Generative perplexity of LaDiff by the schedule's d; this run's is beside its own d."""
    ours = _nearest(results["rows"], MainRow("", "ladiff", decode_steps=paper.LENGTH))
    found = ours["metrics"].get("gen_ppl") if ours and schedule == "tangent" else None
    rows = []
    for their_d, value in paper.SCHEDULE.items():
        same = found if their_d == d else None
        compares = _compares(results, "" if same else "no run at this d here")
        rows.append([their_d, value, *cells(same), compares])
    return table(
        "published_schedule",
        "",
        "LaDiff against the schedule's d",
        ("d", "paper's gen_ppl", "here", "low", "high", "comparable"),
        rows,
    )


def speed_comparison(results: Results) -> Table:
    """The paper's speed claim: LaDiff at a sixteenth of MDLM's decoding steps, in time per text."""
    claim = paper.SPEEDUP
    fewer = claim.baseline_steps // claim.decode_steps

    def seconds(model: str) -> dict[int, float]:
        return {
            r["decode_steps"]: r["seconds"] / r["samples"]
            for r in results["rows"]
            if r["model"] == model and r["seconds"] is not None
        }

    ours, baseline = seconds(claim.model), seconds(claim.baseline)
    steps = max((n for n in baseline if n % fewer == 0 and n // fewer in ours), default=None)
    if steps is None:
        missing = f"not measured here: LaDiff at 1/{fewer} of a measured number of MDLM's steps"
        found = [None, "", _compares(results, missing)]
    else:
        factor = baseline[steps] / ours[steps // fewer]
        found = [factor, f"{steps // fewer} against {steps} steps", _compares(results)]
    name = f"LaDiff {claim.decode_steps} against MDLM {claim.baseline_steps}"
    return table(
        "published_speed",
        "",
        "Speedup at fewer decoding steps",
        ("paper's row", "paper", "here", "setting here", "comparable"),
        [[name, claim.factor, *found]],
    )


def comparability(results: Results, theirs: MainRow, ours: Row | None, metric: str) -> str:
    """Whether a published row can be compared with this run's, or why not."""
    if theirs.model is None:
        return "out of reach: another method, not part of this project"
    if ours is None:
        at = "" if theirs.temperature == 1 else f" at temperature {theirs.temperature:g}"
        return _compares(results, f"not measured here: {theirs.model}{at}")
    if metric not in ours["metrics"]:
        return _compares(results, f"{metric} was not measured here")
    if _other_setting(results):
        return _compares(results)
    different = [
        f"{ours[name]} {name.replace('_', ' ')} here"
        for name in ("latent_steps", "decode_steps")
        if getattr(theirs, name) is not None and ours[name] != getattr(theirs, name)
    ]
    if different:
        return ", ".join(different)
    if metric == "gen_ppl":
        return "same setting except for the scorer: see this run's settings"
    return "same setting"


def _compares(results: Results, missing: str = "") -> str:
    """Whether a run like this one could reach a row at all, and then what this one lacks."""
    other = _other_setting(results)
    if not other:
        return missing or "same setting"
    return f"{other}; {missing or 'same role, another measurement'}"


def _other_setting(results: Results) -> str:
    length = results["setting"].get("length")
    if corpus(results) == paper.CORPUS and length == paper.LENGTH:
        return ""
    here = f"{corpus(results)} at L = {length}"
    return f"out of reach of this run: {here}, not OpenWebText at L = {paper.LENGTH}"


def _nearest(rows: Sequence[Row], theirs: MainRow) -> Row | None:
    same = [
        r
        for r in rows
        if r["model"] == theirs.model and r["temperature"] in (None, theirs.temperature)
    ]
    wanted = theirs.decode_steps
    if wanted is None:
        return same[0] if same else None
    return min(
        (r for r in same if r["decode_steps"]),
        key=lambda r: abs(r["decode_steps"] - wanted),
        default=None,
    )


def _setting(row: Row | None) -> str:
    if row is None:
        return ""
    parts = [
        f"{row[name]} {words}"
        for name, words in (("latent_steps", "latent steps"), ("decode_steps", "decoding steps"))
        if row[name] is not None
    ]
    return ", ".join([title(row["model"]), *parts])
