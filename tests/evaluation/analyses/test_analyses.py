"""Analyses of cases with known answers, and all analyses of a trained workdir."""

import fnmatch
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation.measures.test_measures import LENGTH, MASK, Vocabulary, posterior_logits

from diladiff_jax.diffusion import gaussian
from diladiff_jax.evaluation import analyses, figures
from diladiff_jax.evaluation.analyses import (
    compression,
    latent_noise,
    masked_counts,
    published,
    schedules,
    similarity,
    sweep_curves,
)
from diladiff_jax.evaluation.analyses.attention import attention_share
from diladiff_jax.evaluation.measures.likelihood import Denoiser
from diladiff_jax.nn.layers import Norm, SelfAttention


def estimate(value, half=0.1):
    return {"value": float(value), "low": value - half, "high": value + half}


def row(
    model,
    value=0.5,
    *,
    decode=None,
    latent=None,
    temperature=1.0,
    seconds=2.0,
    metric="gen_ppl",
    **metrics,
):
    found = {metric: estimate(value)} | {name: estimate(v) for name, v in metrics.items()}
    return {
        "corpus": "stories",
        "model": model,
        "latent_steps": latent,
        "decode_steps": decode,
        "temperature": temperature if decode else None,
        "top_p": 0.9 if decode else None,
        "samples": 4,
        "seconds": seconds if decode else None,
        "tokens_per_second": 1.0 if decode else None,
        "metrics": found,
    }


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-5), (0.005, 0.15)])
def test_the_fit_of_omega_recovers_its_parameters(noise, tolerance):
    """Exactly without noise, and nearly with a little."""
    u = np.linspace(0, 1, 21)
    for planted in (
        latent_noise.Omega(0.05, 0.9, 6.0, 0.6),
        latent_noise.Omega(0.2, 0.7, 12.0, 0.3),
    ):
        found = latent_noise.fit_omega(
            u, planted(u) + noise * np.random.default_rng(0).normal(size=21)
        )
        np.testing.assert_allclose(
            [found.w0, found.w1, found.k / 10, found.t0],
            [planted.w0, planted.w1, planted.k / 10, planted.t0],
            atol=tolerance,
        )
    with pytest.raises(ValueError, match="at least 5"):
        latent_noise.fit_omega(u[:4], u[:4])


def test_the_fitted_schedule_makes_the_error_linear():
    """It is the inverse of omega; if that is too steep for float32, it is lowered to the limit."""
    omega = latent_noise.Omega(0.1, 0.8, 5.0, 0.6)
    t = np.linspace(0, 1, 11)
    error = omega(np.asarray(omega.schedule().angle(jnp.asarray(t, jnp.float32))) * 2 / np.pi)
    np.testing.assert_allclose(error, omega(0) + t * (omega(1) - omega(0)), atol=1e-5)
    assert latent_noise.Omega(0, 1, 50.0, 0.5).schedule() == gaussian.EmpiricalSchedule(8.0, 0.5)


def test_loss_and_recovery_by_count_match_enumeration():
    """Of all subsets of each size; 3,000 random ones per row agree within 5 standard errors."""
    rows = np.array([[0, 1, 2], [2, 2, 0], [1, 0, 0]], np.int32)
    found = masked_counts.by_masked_count(
        Denoiser(posterior_logits, None),
        rows,
        masked_counts.Masks((1, 2, 3), draws=3000),
        Vocabulary(),
        batch=2,
    )
    for i, count in enumerate((1, 2, 3)):
        patterns = [p for p in itertools.product([0, 1], repeat=LENGTH) if sum(p) == count]
        nll, right = [], []
        for clean, pattern in itertools.product(rows, patterns):
            logits = np.asarray(
                posterior_logits(None, jnp.asarray(np.where(pattern, MASK, clean)[None]))
            )[0, :, :3]
            nll.append(sum(-logits[p, clean[p]] for p in range(LENGTH) if pattern[p]))
            right.append(sum(logits[p].argmax() == clean[p] for p in range(LENGTH) if pattern[p]))
        assert (found.masked[i] == 3000 * count).all()
        for measured, exact in ((found.loss(i), nll), (found.recovery(i), right)):
            assert measured["value"] == pytest.approx(
                np.mean(exact) / count, abs=5 * np.std(exact) / count / np.sqrt(9000) + 1e-5
            )


def test_masked_counts_spread_from_one_to_all():
    assert masked_counts.count_grid(32) == [1, 4, 8, 12, 16, 20, 24, 28, 32]
    assert masked_counts.count_grid(3) == [1, 2, 3]


def test_similarity_of_equal_disjoint_and_independent_rows():
    """It is 1, 0 and, for 8 ids, 1/8 within 5 standard errors. Padding does not count."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 9, (2, 400, 20))
    for same in (similarity.equal_positions(a, a, 0), similarity.jaccard(a, a, 2, 0)):
        np.testing.assert_array_equal(same, 1)
    assert (
        similarity.equal_positions(a, a + 10, 0).max()
        == similarity.jaccard(a, a + 10, 1, 0).max()
        == 0
    )
    assert similarity.equal_positions(a, b, 0).mean() == pytest.approx(
        1 / 8, abs=5 * np.sqrt(7 / 64 / 8000)
    )
    x, y = np.array([[1, 2, 3, 0, 0, 0]]), np.array([[1, 2, 4, 0, 0, 0]])
    assert similarity.equal_positions(x, y, 0) == [
        3 / 4
    ]  # three words and the end that closes them
    assert (
        similarity.jaccard(x, y, 1, 0) == [2 / 4]
        and similarity.jaccard(x, y, 2, 0) == [1 / 3]
        and similarity.jaccard(x, y, 4, 0) == [1]
    )


def test_latent_noise_preserves_variance():
    """At u the latent keeps the factor cos(pi u / 2): all of it at 0, nothing at 1."""
    z = np.random.default_rng(1).normal(size=(200, 10, 10))
    np.testing.assert_allclose(latent_noise.noisy_latents(z, 0.0), z, rtol=1e-6)
    for u in (0.3, 0.7, 1.0):
        noisy = latent_noise.noisy_latents(z, u)
        assert noisy.std() == pytest.approx(1, abs=0.03)
        assert (noisy * z).mean() == pytest.approx(np.cos(np.pi * u / 2), abs=0.05)


def test_attention_share_is_the_ratio_of_the_layers_updates(networks, random_parameters):
    """It matches the two attentions applied separately, and is zero if the last map is zero."""
    tokens = np.random.default_rng(0).integers(0, 10, (5, 8)).astype(np.int32)
    z = np.random.default_rng(1).normal(size=(5, 4, 6)).astype(np.float32)
    params = random_parameters(networks.decoder, jnp.asarray(tokens), jnp.asarray(z))

    def share(params):
        vocabulary = Vocabulary(mask_id=10)
        found = attention_share(networks.decoder, params, tokens, z, vocabulary, (8,))
        return found["series"][0]["y"][0]

    bound = networks.decoder.bind({"params": params})
    h = bound.backbone.embed(jnp.full((5, 8), 10))
    after = bound.cross["0"](h, jnp.asarray(z))
    block = params["backbone"]["block_0"]
    own = SelfAttention(16, 2).apply(
        {"params": block["attention"]}, Norm().apply({"params": block["attention_norm"]}, after)
    )
    norm = lambda x: np.linalg.norm(np.asarray(x).reshape(5, -1), axis=1)
    assert share(params) == pytest.approx((norm(after - h) / norm(own)).mean(), rel=1e-4)
    params["cross_0"]["zero_out"] = jax.tree.map(jnp.zeros_like, params["cross_0"]["zero_out"])
    assert share(params) == 0


def test_schedule_curves_match_the_closed_forms():
    """alpha(0.2) = 0.294 at d = 10, and log-SNR = -2 log(d tan(pi t / 2))."""
    alpha, snr = schedules.schedule_curves(gaussian.TangentSchedule(1.0))
    lines = {s["name"]: s for s in alpha["series"]}
    assert list(lines) == ["d = 2", "d = 5", "d = 10", "d = 15", "this experiment"]
    assert lines["d = 10"]["y"][20] == pytest.approx(0.294, abs=5e-4)
    first = snr["series"][0]
    np.testing.assert_allclose(
        first["y"], -2 * np.log(2 * np.tan(np.pi * np.array(first["x"]) / 2)), atol=1e-4
    )


def test_rows_of_a_sweep_become_curves_and_tables():
    """One sorted series per model, with intervals. Rows without the measure are left out."""
    rows = [
        row("mdlm", 30, decode=8),
        row("mdlm", 40, decode=2, seconds=1.0),
        row("ladiff", 20, decode=8, latent=50),
        row("data", 10),
    ]
    (figure,) = sweep_curves.speed_quality(rows)
    assert (
        figure["id"] == "speed_gen_ppl"
        and figure["series"][0]["x"] == [250, 500]
        and figure["series"][0]["y"] == [40, 30]
    )
    assert figure["series"][0]["low"] == [39.9, 29.9] and len(figure["series"]) == 2
    (figure,) = sweep_curves.quality_by_setting(rows, "decode_steps")
    assert [s["name"] for s in figure["series"]] == ["MDLM"] and figure["series"][0]["x"] == [2, 8]
    table = sweep_curves.main_table(rows)
    assert [r[0] for r in table["rows"]] == ["MDLM", "MDLM", "LaDiff", "data"] and table["rows"][0][
        4
    ] == 500
    bound = sweep_curves.autoencoder_table(
        [row("autoencoder bound", 3.0, metric="bound_ppl", recovery=0.7), rows[0]]
    )
    assert bound["rows"] == [
        ["autoencoder", 3.0, 2.9, 3.1, 0.7, pytest.approx(0.6), pytest.approx(0.8)]
    ]
    with pytest.raises(ValueError, match="got a row of 1, expected 2"):
        figures.table("x", "", "", ("a", "b"), [[1]])


def test_compression_over_workdirs(tmp_path):
    """One series per augmentation, with the best generated row of each workdir."""
    for name, latents, p_lat, recovery in (
        ("a", 16, 0.4, 0.7),
        ("b", 8, 0.4, 0.5),
        ("c", 16, 0.7, 0.6),
    ):
        (tmp_path / name / "report").mkdir(parents=True)
        config = {
            "data": {"length": 32},
            "encoder": {"num_latents": latents},
            "autoencoder": {"noise": 0.3, "p_feat": 0.3, "p_lat": p_lat, "p_drop": 0.5},
        }
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        rows = [
            row("autoencoder bound", 3.0, metric="bound_ppl", recovery=recovery),
            row("ladiff", 30, decode=8),
            row("diladiff", 20 + latents, decode=8),
            row("mdlm", 1, decode=8),
        ]
        (tmp_path / name / "report" / "results.json").write_text(
            json.dumps({"setting": {}, "rows": rows})
        )
    runs = [compression.evaluated(tmp_path / name) for name in "abc"]
    figures = {f["id"]: f for f in compression.compression_tradeoff(runs)}
    assert set(figures) == {
        "compression_recovery",
        "compression_bound_ppl",
        "compression_gen_ppl",
        "tradeoff_gen_ppl",
    }
    lines = figures["compression_recovery"]["series"]
    assert [(s["x"], s["y"]) for s in lines] == [([2, 4], [0.7, 0.5]), ([2], [0.6])]
    assert [(s["x"], s["y"]) for s in figures["tradeoff_gen_ppl"]["series"]] == [
        ([0.5, 0.7], [28, 30]),
        ([0.6], [30]),
    ]
    path = tmp_path / "c" / "report" / "results.json"
    for damage in ("{", "[]", '{"setting": {}, "rows": [{}]}'):
        path.write_text(damage)
        with pytest.raises(ValueError, match="results.json is not what its command writes"):
            compression.evaluated(tmp_path / "c")
    (tmp_path / "b" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json is not what its command writes"):
        compression.evaluated(tmp_path / "b")
    path.unlink()
    with pytest.raises(ValueError, match="results.json does not exist"):
        compression.evaluated(tmp_path / "c")


def test_published_rows_say_whether_they_compare():
    """A row names what differs (corpus, method, number of steps), or says that nothing does."""
    rows = [
        row("data", 15),
        row("mdlm", 91, decode=1024),
        row("ladiff", 60, decode=32, latent=200),
        row("diladiff", 99, decode=32, latent=5, temperature=0.7),
    ]
    small = published.main_comparison({"setting": {"length": 32}, "rows": rows})["rows"]
    said = {r[0]: r for r in small if r[1] == "gen_ppl"}
    assert (
        said["MDLM"][2:4] == [90.5, 91.0]
        and "stories at L = 32, not OpenWebText" in said["MDLM"][7]
    )
    assert "another method" in said["DUO"][7] and said["DUO"][3] is None
    assert "not measured here: diladiff" in said["DiLaDiff 5 + 64"][7]
    for r in rows:
        r["corpus"] = "openwebtext"
    whole = {
        r[0]: r
        for r in published.main_comparison({"setting": {"length": 1024}, "rows": rows})["rows"]
        if r[1] == "gen_ppl"
    }
    assert (
        whole["MDLM"][7].startswith("same setting")
        and "32 decode steps here" in whole["LaDiff 200 + 64"][7]
    )
    assert whole["DiLaDiff 5 + 32, temperature 0.7"][3] == 99
    results = {
        "setting": {"length": 1024},
        "rows": [
            *rows,
            row("autoencoder bound", 3.0, metric="bound_ppl", recovery=0.7),
            row("ladiff", 60, decode=64, latent=200, seconds=0.5),
        ],
    }
    table = published.autoencoder_comparison(results, 2.0)["rows"]
    assert [r[3] for r in table] == [None, None, None, None, 0.7, None, 0.7]
    assert [r[2] for r in published.schedule_comparison(results, "tangent", 10.0)["rows"]] == [
        None,
        None,
        60.0,
        None,
    ]
    assert published.speed_comparison(results)["rows"][0][1:3] == [7.0, 4.0]
    assert published.speed_comparison({"setting": {}, "rows": []})["rows"][0][2] is None


@pytest.mark.slow
def test_all_analyses_of_a_trained_workdir(trained):
    """Figures and tables are of the documented form, with values inside their intervals.

    What is left out is reported.
    """
    import diladiff_jax as dl
    from diladiff_jax.data import DataOptions, load_prepared

    model, lines = dl.load(trained), []
    results = {
        "setting": {"length": 32},
        "rows": [row("mdlm", 30, decode=8), row("mdlm", 40, decode=2)],
    }
    prepared = load_prepared(DataOptions.of(model.config.data), trained)
    with jax.numpy_rank_promotion("allow"):
        found = analyses.analyse(model, prepared, results, lines.append, samples=24)
    content = found.as_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert not [line for line in lines if "left out" in line and "MAUVE" not in line]
    figures.check_analyses(content)
    of_rows = {f["id"] for f in analyses.analyse_rows(model, results).figures}
    assert of_rows < {f["id"] for f in found.figures}
    ids = [f["id"] for f in found.figures + found.tables]
    assert {
        "speed_gen_ppl",
        "gen_ppl_by_decode_steps",
        "schedule_alpha",
        "loss_by_ratio",
        "recovery_by_ratio",
        "attention_share",
        "robustness",
        "decoding_error",
        "reparameterization",
        "equal_positions",
        "ngram_overlap",
        "valid_by_latent_steps",
        "valid_by_temperature",
        "main",
        "published_main",
        "omega",
        "latent_overhead",
        "latent_samplers",
        "ladiff_likelihood",
    } <= set(ids)
    section = (pathlib.Path(__file__).parents[3] / "docs" / "paper_figures.md").read_text()
    named = {
        name
        for line in section.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"`([\w*]+)`", line.split("|")[3])
    }
    assert {"speed_gen_ppl", "omega", "tradeoff_*"} <= named
    for name in named - {
        "compression_*",
        "tradeoff_*",
        "mauve",
        "speed_valid",
    }:  # several workdirs, a package, and rows that this test does not have
        assert fnmatch.filter(ids, name), (
            f"docs/paper_figures.md names {name}, but no figure or table has that name"
        )
    for figure in found.figures:
        for s in figure["series"]:
            if s["low"] is not None:
                assert all(
                    low <= y + 1e-9 and y <= high + 1e-9
                    for low, y, high in zip(s["low"], s["y"], s["high"], strict=True)
                ), figure["id"]
    samplers = next(t for t in found.tables if t["id"] == "latent_samplers")
    assert {(r[0], r[1], r[2]) for r in samplers["rows"]} >= {
        ("Euler", 200, 200),
        ("Heun", 3, 5),
        ("Heun", 10, 19),
        ("DPM-Solver++(2M)", 20, 20),
        ("DDIM, eta 1", 8, 8),
        ("student", 4, 8),
    }
    likelihood = next(t for t in found.tables if t["id"] == "ladiff_likelihood")
    for r in likelihood["rows"]:
        assert r[4] == pytest.approx(r[7] + r[8] - r[9], rel=1e-6) and r[1] == pytest.approx(
            np.exp(r[4]), rel=1e-6
        )
