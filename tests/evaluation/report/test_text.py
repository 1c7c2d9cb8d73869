"""The sentences that summarize a sweep."""

import copy

import numpy as np
import pytest

from diladiff_jax.evaluation.measures import intervals
from diladiff_jax.evaluation.report import summary, text


def rows(model, values, seconds):
    return [
        dict(
            corpus="stories",
            model=model,
            latent_steps=None,
            decode_steps=s,
            temperature=1.0,
            top_p=0.9,
            samples=100,
            seconds=t,
            tokens_per_second=1.0,
            metrics={"valid": {"value": v, "low": v, "high": v}},
        )
        for s, v, t in zip((2, 8, 32), values, seconds, strict=True)
    ]


SECONDS = (1.0, 2.0, 8.0)
OURS = rows("diladiff", (0.2, 0.4, 0.5), SECONDS)


def summary_of(rows, **setting):
    return summary({"setting": setting, "rows": rows})


def test_speed_is_that_of_the_fastest_row_at_the_baselines_best_quality():
    claim = summary_of(rows("mdlm", (0.0, 0.1, 0.3), SECONDS) + OURS)[-1]
    assert "DiLaDiff passes it at 8 steps (0.400), 4.0 times as fast as that" in claim


def test_the_summary_says_if_no_row_reaches_the_baseline():
    claim = summary_of(rows("mdlm", (0.0, 0.1, 0.6), SECONDS) + OURS)[-1]
    assert "does not clearly pass it (best 0.500)" in claim


def test_unusual_sampling_settings_come_first():
    baseline = rows("mdlm", (0.0, 0.1, 0.3), SECONDS)
    lines = summary_of(
        baseline + OURS, order="random", refresh_every=4, skip_layers=[], skip_from=0.5
    )
    assert lines == ["sampled with sampling.refresh_every=4", *summary_of(baseline + OURS)]


def test_a_baseline_row_within_the_interval_of_its_best_gives_the_time():
    control = rows("mdlm_long", (0.1, 0.28, 0.3), SECONDS)
    control[1]["metrics"]["valid"]["high"] = 0.31
    claim = summary_of(control + OURS)[-1]
    assert "not clearly worse at 8" in claim and "1.0 times as fast" in claim


def test_more_steps_than_tokens_do_not_count():
    control = rows("mdlm_long", (0.1, 0.28, 0.3), SECONDS)
    assert "best at 8 steps" in summary_of(control + OURS, length=16)[-1]


def test_entropy_alone_supports_no_claim():
    only_entropy = copy.deepcopy(OURS)
    for row in only_entropy:
        row["metrics"] = {"entropy": row["metrics"]["valid"]}
    assert summary_of(only_entropy) == [
        "no oracle and no scorer: nothing here measures quality (entropy alone does not)"
    ]


@pytest.mark.parametrize(
    ("estimate", "shown"),
    [
        (intervals.ratio_exp(np.full(4, 13.0), np.full(4, 4.0)), "25.8 [too few texts]"),
        (intervals.mean(np.full(500, 0.25)), "0.250 [too few texts]"),
        (intervals.mean(np.array([7.0])), "7.000 [too few texts]"),
        ({"value": 25.8, "low": 25.79, "high": 25.81}, "25.8 [25.8, 25.8]"),
        ({"value": 2.0, "low": 1.0, "high": 3.0}, "2.000 [1.000, 3.000]"),
    ],
)
def test_samples_that_do_not_differ_have_no_interval(estimate, shown):
    """A width of zero would claim certainty. A narrow interval is printed as it is."""
    assert text.estimate_text(estimate) == shown
