"""The benchmark command at its smallest."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diladiff_jax.benchmark import decoding_flops
from diladiff_jax.training.flops import model_flops

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_sampling_rows_name_their_case_and_its_cost(tmp_path):
    """A row for each case in the documented form; the exact ones draw the same tokens; the library's takes less temporary memory; scaled times say so."""
    out = tmp_path / "bench.json"
    flags = [
        "--suite=sampling",
        "--size=tiny",
        "--batch=4",
        "--decode_steps=8",
        "--timed_steps=4",
        "--latent_steps=1",
        "--prior_steps=8",
        "--rounds=1",
        f"--out={out}",
    ]
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["machine"]["matmul_flops_per_second"] > 0 and document["machine"]["count"] >= 1
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["naive", "bisection", "ours", "approx_skip", "approx_refresh_4"]
    assert [(row["sampler"], row["steps"], row["timed_steps"]) for row in document["latents"]] == [
        ("student", 1, 1),
        ("prior", 8, 4),
    ]
    for row in rows.values():
        assert (
            row["suite"],
            row["batch"],
            row["length"],
            row["vocab"],
            row["decode_steps"],
            row["timed_steps"],
        ) == ("sampling", 4, 32, 512, 8, 4)
        assert row["tokens_as_first"] > 0.95 or row["case"].startswith("approx")
        assert min(row["linear_maps_seconds"], row["attention_products_seconds"]) > 0
        assert abs(row["seconds"] - row["latent_seconds"] - row["decode_seconds"]) < 1e-9
        assert abs(row["tokens_per_second"] * row["seconds"] - 4 * 32) < 1e-6
        assert (
            min(
                row["compile_seconds_cold"],
                row["compile_seconds_cached"],
                row["peak_memory_bytes"],
                row["fraction_of_matmul_rate"],
            )
            > 0
        )
    assert rows["ours"]["decode_memory_bytes"] < 0.5 * rows["naive"]["decode_memory_bytes"]
    assert (
        out.with_suffix(".png").exists()
        and "naive" in done.stdout
        and "4 timed steps" in done.stdout
    )


def test_decoding_products_are_those_of_the_networks(networks, network_settings, random_parameters):
    """The formulas of the FLOPs of a decoding against the products counted in the traced pieces of the network, with three layers of which one is skipped."""
    batch, steps = 16, 4
    backbone = networks.decoder.backbone.clone(num_layers=3, name=None)
    decoder = networks.decoder.clone(backbone=backbone, cross_layers=(0, 2))
    c = ConfigDict(network_settings | {"data": {"length": backbone.length}})
    c.unlock()
    c.backbone.num_layers, c.backbone.mlp_ratio, c.decoder.cross_layers = (
        3,
        backbone.mlp_ratio,
        (0, 2),
    )
    x, z, some = (
        jnp.zeros((batch, backbone.length), jnp.int32),
        jnp.zeros((batch, *networks.latent_shape)),
        jnp.zeros((batch, backbone.length // steps), jnp.int32),
    )
    params = random_parameters(decoder, x, z)

    def run(method, *given, **how):
        return decoder.apply({"params": params}, *given, method=method, **how)

    def count(method, *given, **how):  # nothing is trained: once forwards
        return model_flops(
            lambda _, *given: jax.tree.leaves(run(method, *given, **how)), {}, *given
        )

    def shapes(method, *given):
        return jax.eval_shape(lambda *given: run(method, *given), *given)

    memory = shapes("memory", z)
    h = shapes("before_last", x, memory)
    kept = shapes("last_keys_values", h)
    finishing = (
        count("last_keys_values", h)
        + count("finish_at", h, kept, some)
        + count("project", shapes("finish_at", h, kept, some))
    )
    whole, late = (
        count("before_last", x, memory),
        count("before_last", x, memory, skip=decoding_flops.skipped_layers(3)),
    )
    assert late < whole
    counted = {
        "naive": steps * count("__call__", x, z),
        "bisection": steps * count("__call__", x, z),
        "ours": count("memory", z) + steps * (whole + finishing),
        "approx_skip": count("memory", z) + steps / 2 * (whole + late) + steps * finishing,
    }
    formula = {
        case: decoding_flops.decoding_flops(case, c, backbone.vocab_size, batch, steps, 4)
        for case in counted
    }
    assert formula == pytest.approx(counted, rel=1e-6)
    assert formula["approx_skip"] < formula["ours"] < formula["naive"]


def test_steps_with_something_to_do_are_those_that_are_drawn():
    """The expected number of busy steps, and of busy groups of four, against 4,000 draws (z < 5, false alarm 1e-6)."""
    steps = np.random.default_rng(0).integers(0, 64, (4_000, 40))
    for expected, groups in (
        (decoding_flops.expected_busy_steps(40, 64), steps),
        (decoding_flops.expected_busy_steps(40, 64, 4), steps // 4),
    ):
        counts = np.array([len(np.unique(row)) for row in groups])
        assert abs(counts.mean() - expected) < 5 * counts.std() / np.sqrt(len(counts))


@pytest.mark.slow
def test_training_rows_are_the_stages_and_their_pieces(tmp_path):
    """A row for each stage; what the model needs is a part of the machine's rate."""
    out = tmp_path / "bench.json"
    flags = ["--suite=training", "--size=tiny", "--batch=64", "--rounds=3", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, "launch/benchmark.py", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["mdlm", "autoencoder", "ladiff", "diladiff"]
    for row in rows:
        assert (row["suite"], row["batch"], row["length"]) == ("training", 64, 32) and 0 < row[
            "fraction_of_matmul_rate"
        ] < 1
        assert abs(row["tokens_per_second"] * row["seconds"] - 64 * 32) < 1e-6
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
    assert out.with_suffix(".png").exists() and "diladiff" in done.stdout
