"""The sweep on a trained workdir, and its files."""

import json

import pytest

pytestmark = pytest.mark.slow

import diladiff_jax as dl
from diladiff_jax.data import DataOptions, load_prepared
from diladiff_jax.evaluation import sweep
from diladiff_jax.evaluation.report import report
from diladiff_jax.evaluation.schema import NotFiniteError


@pytest.fixture(scope="module")
def results(trained):
    model = dl.load(trained)
    return sweep.evaluate(
        model, load_prepared(DataOptions.of(model.config.data), trained), say=lambda _: None
    )


def test_every_model_and_control_has_its_rows(results):
    """All models over all steps, all controls, data and bounds, each with intervals; the schema holds."""
    report.check_results(results)
    rows = {(r["model"], r["decode_steps"]) for r in results["rows"]}
    for name in ("mdlm", "mdlm_long", "ladiff", "diladiff"):
        assert {(name, 1), (name, 4)} <= rows
    for name in sweep.CONTROLS:
        assert (name, 2) in rows
    assert {("data", None), ("mdlm bound", None), ("autoencoder bound", None)} <= rows
    data = next(r for r in results["rows"] if r["model"] == "data")
    assert data["metrics"]["valid"]["value"] == 1.0 and data["metrics"]["gen_ppl"]["value"] > 1
    for name in sweep.PRIORS:
        few = next(r for r in results["rows"] if r["model"] == name)
        assert few["latent_steps"] == 2 * results["setting"]["student_steps"]


def test_files(results, tmp_path):
    """results.json reads back the same; the table names every row; the picture is a PNG."""
    picture = report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "table.txt").read_text()
    assert all(r["model"] in table for r in results["rows"])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_schema_refuses(results):
    """A missing key, a wrong type or a number that is not finite is named."""
    for damage, words in (
        (lambda r: r["rows"][0].pop("samples"), r"rows\[0\] has the keys"),
        (lambda r: r["rows"][0].update(samples="many"), r"rows\[0\].samples is 'many'"),
        (lambda r: r["rows"][0]["metrics"]["entropy"].update(low=float("nan")), "must be finite"),
        (lambda r: r.pop("setting"), "keys setting and rows"),
    ):
        copy = json.loads(json.dumps(results))
        damage(copy)
        with pytest.raises(ValueError, match=words) as refused:
            report.check_results(copy)
        assert isinstance(refused.value, NotFiniteError) == (words == "must be finite")


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


def test_the_summary_tells_either_way():
    """Speed is at equal quality: the fastest row that reaches MDLM's best; and it says when none does."""
    good = {
        "setting": {},
        "rows": rows("mdlm", (0.0, 0.1, 0.3), (1.0, 2.0, 8.0))
        + rows("diladiff", (0.2, 0.4, 0.5), (1.0, 2.0, 8.0)),
    }
    said = report.summary(
        good
        | {
            "setting": good["setting"]
            | {"order": "random", "refresh_every": 4, "skip_layers": [], "skip_from": 0.5}
        }
    )
    assert said == ["sampled with sampling.refresh_every=4", *report.summary(good)]
    assert (
        "DiLaDiff passes it at 8 steps (0.400), 4.0 times as fast as that"
        in report.summary(good)[-1]
    )
    bad = {
        "setting": {},
        "rows": rows("mdlm", (0.0, 0.1, 0.6), (1.0, 2.0, 8.0))
        + rows("diladiff", (0.2, 0.4, 0.5), (1.0, 2.0, 8.0)),
    }
    assert "does not clearly pass it (best 0.500)" in report.summary(bad)[-1]


def test_the_summary_counts_intervals_and_lengths():
    """A baseline row within its best one's interval gives the time; steps beyond the length, and entropy alone, claim nothing."""
    control = rows("mdlm_long", (0.1, 0.28, 0.3), (1.0, 2.0, 8.0))
    control[1]["metrics"]["valid"]["high"] = 0.31
    ours = rows("diladiff", (0.2, 0.4, 0.5), (1.0, 2.0, 8.0))
    assert "not clearly worse at 8" in report.summary({"setting": {}, "rows": control + ours})[-1]
    assert "1.0 times as fast" in report.summary({"setting": {}, "rows": control + ours})[-1]
    assert (
        "best at 8 steps" in report.summary({"setting": {"length": 16}, "rows": control + ours})[-1]
    )
    for row in control + ours:
        row["metrics"] = {"entropy": row["metrics"]["valid"]}
    assert report.summary({"setting": {}, "rows": control + ours}) == [
        "no oracle and no scorer: nothing here measures quality (entropy alone does not)"
    ]
