"""The sweep on a trained workdir, its files, and the form of its results."""

import json

import pytest

import diladiff_jax as dl
from diladiff_jax.data import DataOptions, load_prepared
from diladiff_jax.evaluation import NotFiniteError, check_results, evaluate, report
from diladiff_jax.evaluation.models import controls
from diladiff_jax.stages import MODELS


@pytest.fixture(scope="module")
def results(trained):
    model = dl.load(trained)
    prepared = load_prepared(DataOptions.of(model.config.data), trained)
    return evaluate(model, prepared, say=lambda _: None)


@pytest.mark.slow
def test_every_model_and_control_has_its_rows(results):
    """Models at all numbers of steps, controls, data and bounds, in the documented form."""
    check_results(results)
    rows = {(r["model"], r["decode_steps"]) for r in results["rows"]}
    for name in MODELS:
        steps = (2,) if name in controls() else (1, 4)
        steps = steps if MODELS[name].decode is None else (32,)
        assert {(name, n) for n in steps} <= rows
    assert {("data", None), ("mdlm bound", None), ("autoencoder bound", None)} <= rows
    data = next(r for r in results["rows"] if r["model"] == "data")
    assert data["metrics"]["valid"]["value"] == 1.0 and data["metrics"]["gen_ppl"]["value"] > 1


@pytest.mark.slow
def test_the_undistilled_prior_has_the_network_calls_of_the_student(results):
    """The student calls its network twice per step, the prior once."""
    for name in ("prior_ddim", "prior_dpmpp_2m"):
        row = next(r for r in results["rows"] if r["model"] == name)
        assert row["latent_steps"] == 2 * results["setting"]["student_steps"]


@pytest.mark.slow
def test_the_sweep_is_written_as_json_table_and_picture(results, tmp_path):
    picture = report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    table = (tmp_path / "table.txt").read_text()
    assert all(r["model"] in table for r in results["rows"])
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: r["rows"][0].pop("samples"), r"rows\[0\]: got the keys"),
        (lambda r: r["rows"][0].update(samples="many"), r"rows\[0\]\.samples: got 'many'"),
        (lambda r: r["rows"][0]["metrics"]["entropy"].update(low=float("nan")), "a finite number"),
        (lambda r: r.pop("setting"), "the keys setting and rows"),
    ],
)
def test_invalid_results_are_rejected_with_their_place(damage, words):
    row = dict.fromkeys(("latent_steps", "decode_steps", "temperature", "top_p"))
    row |= {"corpus": "stories", "model": "data", "samples": 4}
    row |= {"seconds": None, "tokens_per_second": None}
    row["metrics"] = {"entropy": {"value": 2.0, "low": 1.5, "high": 2.5}}
    results = {"setting": {}, "rows": [row]}
    check_results(results)
    damage(results)
    with pytest.raises(ValueError, match=words) as rejected:
        check_results(results)
    assert isinstance(rejected.value, NotFiniteError) == (words == "a finite number")
