"""The benchmark command at its smallest."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_sampling_rows_name_their_case_and_its_cost(tmp_path):
    """A row for each case in the documented form; every case draws the same tokens; the library's takes less temporary memory; scaled times say so."""
    out = tmp_path / "bench.json"
    flags = ["--suite=sampling", "--size=tiny", "--batch=4", "--decode_steps=8", "--timed_steps=4", "--latent_steps=1", "--prior_steps=8", "--rounds=1", f"--out={out}"]
    done = subprocess.run([sys.executable, "launch/benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["machine"]["matmul_flops_per_second"] > 0 and document["machine"]["count"] >= 1
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["naive", "bisection", "ours", "approx_skip", "approx_refresh_4"]
    assert [(row["sampler"], row["steps"], row["timed_steps"]) for row in document["latents"]] == [("student", 1, 1), ("prior", 8, 4)]
    for row in rows.values():
        assert (row["suite"], row["batch"], row["length"], row["vocab"], row["decode_steps"], row["timed_steps"]) == ("sampling", 4, 32, 512, 8, 4)
        assert row["tokens_as_first"] > 0.95 or row["case"].startswith("approx")
        assert min(row["linear_maps_seconds"], row["attention_products_seconds"]) > 0
        assert abs(row["seconds"] - row["latent_seconds"] - row["decode_seconds"]) < 1e-9
        assert abs(row["tokens_per_second"] * row["seconds"] - 4 * 32) < 1e-6
        assert min(row["compile_seconds_cold"], row["compile_seconds_cached"], row["peak_memory_bytes"], row["fraction_of_matmul_rate"]) > 0
    assert rows["ours"]["peak_memory_bytes"] <= rows["naive"]["peak_memory_bytes"]
    assert out.with_suffix(".png").exists() and "naive" in done.stdout and "4 timed steps" in done.stdout


@pytest.mark.slow
def test_training_rows_are_the_stages_and_their_pieces(tmp_path):
    """A row for each stage; what the model needs is a part of the machine's rate."""
    out = tmp_path / "bench.json"
    flags = ["--suite=training", "--size=tiny", "--batch=64", "--rounds=3", f"--out={out}"]
    done = subprocess.run([sys.executable, "launch/benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == ["mdlm", "autoencoder", "ladiff", "diladiff"]
    for row in rows:
        assert (row["suite"], row["batch"], row["length"]) == ("training", 64, 32) and 0 < row["fraction_of_matmul_rate"] < 1
        assert abs(row["tokens_per_second"] * row["seconds"] - 64 * 32) < 1e-6
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
    assert out.with_suffix(".png").exists() and "diladiff" in done.stdout
