"""The paper's figures (arXiv 2605.23605) as data, and a run's own beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diladiff_jax.evaluation.figures import NAMES, Table, table

MAIN: tuple[dict[str, Any], ...] = (
    {"name": "data", "model": "data", "gen_ppl": 14.8, "entropy": 5.44, "mauve": 1.00},
    {
        "name": "MDLM",
        "model": "mdlm",
        "decode_steps": 1024,
        "gen_ppl": 90.5,
        "entropy": 5.50,
        "mauve": 0.74,
    },
    {"name": "SDDM", "gen_ppl": 75.3, "entropy": 5.31},
    {"name": "DUO", "gen_ppl": 71.7, "entropy": 5.22},
    {
        "name": "LaDiff 200 + 1024",
        "model": "ladiff",
        "latent_steps": 200,
        "decode_steps": 1024,
        "gen_ppl": 62.9,
        "entropy": 5.40,
        "mauve": 0.82,
    },
    {
        "name": "LaDiff, temperature 0.7",
        "model": "ladiff",
        "latent_steps": 200,
        "decode_steps": 1024,
        "temperature": 0.7,
        "gen_ppl": 47.8,
        "entropy": 5.26,
    },
    {
        "name": "LaDiff 200 + 64",
        "model": "ladiff",
        "latent_steps": 200,
        "decode_steps": 64,
        "gen_ppl": 68.3,
        "entropy": 5.40,
    },
    {
        "name": "DiLaDiff 5 + 64",
        "model": "diladiff",
        "latent_steps": 5,
        "decode_steps": 64,
        "gen_ppl": 97.0,
        "entropy": 5.50,
        "mauve": 0.79,
    },
    {
        "name": "DiLaDiff 5 + 32",
        "model": "diladiff",
        "latent_steps": 5,
        "decode_steps": 32,
        "gen_ppl": 108.7,
        "entropy": 5.53,
    },
    {
        "name": "DiLaDiff 5 + 32, temperature 0.7",
        "model": "diladiff",
        "latent_steps": 5,
        "decode_steps": 32,
        "temperature": 0.7,
        "gen_ppl": 76.3,
        "entropy": 5.39,
    },
    {"name": "MDLM + SDTT, 32 steps", "gen_ppl": 62.3, "entropy": 5.49},
    {"name": "DUO + DCD, 32 steps (greedy tail)", "gen_ppl": 46.3, "entropy": 5.38},
)
"""OpenWebText, L = 1024, GPT-2 large. Rows with a `model` are of models that exist here; temperature is 1 where none stands.
MAUVE of LaDiff 200 + 64 is printed as 0.775 in one place and 0.81 in another, so it is left out."""

COMPRESSION: tuple[dict[str, float], ...] = (
    {"compression": 32, "bound": 6.83, "recovery": 0.533, "mauve": 0.77},
    {"compression": 16, "bound": 6.83, "recovery": 0.533, "mauve": 0.80},
    {"compression": 8, "bound": 3.28, "recovery": 0.610, "mauve": 0.77},
    {"compression": 4, "bound": 2.58, "recovery": 0.683, "mauve": 0.74},
    {"compression": 2, "bound": 2.25, "recovery": 0.752, "mauve": 0.73},
    {"compression": 1, "bound": 2.15, "recovery": 0.745, "mauve": 0.14},
)
"""The autoencoder at Mild augmentation: bound as printed, share of masked tokens recovered, MAUVE of what is then generated."""

CHOSEN_AUTOENCODER = {"compression": 2, "bound": 3.25, "recovery": 0.694, "mauve": 0.82}
"""With the model's own augmentation."""

SCHEDULE: tuple[dict[str, float], ...] = tuple(
    {"d": d, "gen_ppl": ppl} for d, ppl in ((2.0, 92.0), (5.0, 71.4), (10.0, 62.3), (15.0, 75.4))
)

OVERHEAD: tuple[dict[str, Any], ...] = (
    {"model": "ladiff", "latent_steps": 200, "decode_steps": 1024, "share": 0.07},
    {"model": "ladiff", "latent_steps": 200, "decode_steps": 64, "share": 1.12},
    {"model": "diladiff", "latent_steps": 5, "decode_steps": 64, "share": 0.05},
)
"""Time of the latent over the time of decoding, batch 32."""

SPEEDUP = {
    "model": "ladiff",
    "decode_steps": 64,
    "baseline": "mdlm",
    "baseline_steps": 1024,
    "times": 7.0,
}

PUBLISHED_CORPUS, PUBLISHED_LENGTH = "openwebtext", 1024


def main_comparison(results: Mapping[str, Any]) -> Table:
    """The paper's main rows with this run's beside them: the same model and temperature, at the nearest number of decoding steps.

    `results` is the content of `results.json`. The last column says of every row whether it can be compared, or why not.
    """
    rows: list[list[Any]] = []
    for theirs in MAIN:
        ours = _nearest(results["rows"], theirs)
        metrics = ours["metrics"] if ours else {}
        for name in ("gen_ppl", "entropy", "mauve"):
            if name in theirs:
                found = metrics.get(name)
                rows.append(
                    [
                        theirs["name"],
                        name,
                        theirs[name],
                        *(found[end] if found else None for end in ("value", "low", "high")),
                        _setting(ours),
                        reach(results, theirs, ours, name),
                    ]
                )
    return table(
        "published_main",
        "table 1",
        "The paper's figures and this run's",
        ("paper's row", "measure", "paper", "here", "low", "high", "setting here", "comparable"),
        rows,
        "The paper: OpenWebText, L = 1024, scored by GPT-2 large, nucleus 0.9. Generative perplexity means little without the entropy beside it.",
    )


def autoencoder_comparison(results: Mapping[str, Any], compression: float) -> Table:
    """The autoencoder's recovery at the published compressions, with this run's beside the one that has its own."""
    found = next(
        (
            row["metrics"].get("recovery")
            for row in results["rows"]
            if row["model"] == "autoencoder bound"
        ),
        None,
    )
    rows = []
    for theirs in (*COMPRESSION, CHOSEN_AUTOENCODER):
        same = found if theirs["compression"] == compression else None
        kind = "the model's" if theirs is CHOSEN_AUTOENCODER else "Mild"
        why = _why(
            results,
            "not measured here"
            if found is None
            else "no run at this compression here"
            if same is None
            else "",
        )
        rows.append(
            [
                f"{theirs['compression']}x, {kind}",
                theirs["bound"],
                theirs["recovery"],
                *(same[end] if same else None for end in ("value", "low", "high")),
                why,
            ]
        )
    columns = (
        "paper's row",
        "paper's bound",
        "paper's recovery",
        "recovery here",
        "low",
        "high",
        "comparable",
    )
    return table(
        "published_autoencoder",
        "table 3",
        "The autoencoder against compression",
        columns,
        rows,
        "Recovery is over masking ratios drawn uniformly.",
    )


def schedule_comparison(results: Mapping[str, Any], schedule: str, d: float) -> Table:
    """Generative perplexity of LaDiff against the schedule's d, with this run's beside the d that it was trained with."""
    ours = _nearest(results["rows"], {"model": "ladiff", "decode_steps": PUBLISHED_LENGTH})
    found = ours["metrics"].get("gen_ppl") if ours and schedule == "tangent" else None
    rows = []
    for theirs in SCHEDULE:
        same = found if theirs["d"] == d else None
        why = _why(results, "no run at this d here" if same is None else "")
        rows.append(
            [
                theirs["d"],
                theirs["gen_ppl"],
                *(same[end] if same else None for end in ("value", "low", "high")),
                why,
            ]
        )
    return table(
        "published_schedule",
        "",
        "LaDiff against the schedule's d",
        ("d", "paper's gen_ppl", "here", "low", "high", "comparable"),
        rows,
    )


def speed_comparison(results: Mapping[str, Any]) -> Table:
    """The paper's speed claim, LaDiff at a sixteenth of MDLM's decoding steps, with this run's ratio of seconds a document."""
    factor = SPEEDUP["baseline_steps"] // SPEEDUP["decode_steps"]

    def timed(model: str) -> dict[int, float]:
        return {
            r["decode_steps"]: r["seconds"] / r["samples"]
            for r in results["rows"]
            if r["model"] == model and r["seconds"] is not None
        }

    ours, baseline = timed(SPEEDUP["model"]), timed(SPEEDUP["baseline"])
    steps = max((n for n in baseline if n // factor in ours and n % factor == 0), default=None)
    row = [
        f"LaDiff {SPEEDUP['decode_steps']} against MDLM {SPEEDUP['baseline_steps']}",
        SPEEDUP["times"],
    ]
    if steps is None:
        row += [
            None,
            "",
            _why(
                results,
                f"not measured here: LaDiff at a {factor}th of a measured number of MDLM's steps",
            ),
        ]
    else:
        row += [
            baseline[steps] / ours[steps // factor],
            f"{steps // factor} against {steps} steps",
            _why(results),
        ]
    return table(
        "published_speed",
        "",
        "How many times as fast",
        ("paper's row", "paper", "here", "setting here", "comparable"),
        [row],
    )


def reach(
    results: Mapping[str, Any],
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any] | None,
    metric: str,
) -> str:
    """Whether a published row can be compared with this run's, or plainly why not."""
    if "model" not in theirs:
        return "out of reach: another method, not part of this project's training"
    if ours is None:
        return _why(
            results,
            f"not measured here: {theirs['model']}"
            + (f" at temperature {theirs['temperature']:g}" if "temperature" in theirs else ""),
        )
    if metric not in ours["metrics"]:
        return _why(results, f"{metric} was not measured here")
    if _other_setting(results):
        return _why(results)
    different = [
        f"{ours[name]} {name.replace('_', ' ')} here"
        for name in ("latent_steps", "decode_steps")
        if name in theirs and ours[name] != theirs[name]
    ]
    return ", ".join(different) or (
        "same setting but for the scorer: see this run's settings"
        if metric == "gen_ppl"
        else "same setting"
    )


def _why(results: Mapping[str, Any], missing: str = "") -> str:
    """Whether a row compares: first whether a run like this could reach it at all, then what this one lacks."""
    other = _other_setting(results)
    if not other:
        return missing or "same setting"
    return f"{other}; {missing or 'same role, another measurement'}"


def _other_setting(results: Mapping[str, Any]) -> str:
    corpus = results["rows"][0]["corpus"] if results["rows"] else "?"
    length = results["setting"].get("length")
    if corpus != PUBLISHED_CORPUS or length != PUBLISHED_LENGTH:
        return f"out of reach of this run: {corpus} at L = {length}, not OpenWebText at L = {PUBLISHED_LENGTH}"
    return ""


def _nearest(
    rows: Sequence[Mapping[str, Any]], theirs: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    same = [
        r
        for r in rows
        if r["model"] == theirs.get("model")
        and (r["temperature"] is None or r["temperature"] == theirs.get("temperature", 1.0))
    ]
    if "decode_steps" not in theirs:
        return same[0] if same else None
    return min(
        (r for r in same if r["decode_steps"]),
        key=lambda r: abs(r["decode_steps"] - theirs["decode_steps"]),
        default=None,
    )


def _setting(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    parts = [
        f"{row[name]} {word}"
        for name, word in (("latent_steps", "latent steps"), ("decode_steps", "decoding steps"))
        if row[name] is not None
    ]
    return ", ".join([NAMES.get(row["model"], row["model"]), *parts])
