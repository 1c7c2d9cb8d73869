"""The benchmark command at its smallest."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_sampling_rows_name_their_case_and_its_cost(tmp_path):
    """A row for each case in the documented form; the exact ones draw the same tokens; the library's takes less temporary memory; scaled times say so."""
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
    assert rows["ours"]["decode_memory_bytes"] < 0.5 * rows["naive"]["decode_memory_bytes"]
    assert out.with_suffix(".png").exists() and "naive" in done.stdout and "4 timed steps" in done.stdout


PRODUCTS = """
import json, sys
sys.path.insert(0, "launch")
import benchmark, jax, jax.numpy as jnp
from diladiff_jax.nn.networks import build_networks
from diladiff_jax.training.flops import model_flops
c, batch, steps, vocab = benchmark.settings("tiny"), 4, 8, 512
length = c.data.length
decoder = build_networks(c.to_dict(), length, vocab).decoder
x, z = jax.ShapeDtypeStruct((batch, length), jnp.int32), jax.ShapeDtypeStruct((batch, c.encoder.num_latents, c.encoder.latent_dim), jnp.float32)
some = jax.ShapeDtypeStruct((batch, length // steps), jnp.int32)
params = jax.eval_shape(lambda: benchmark.random_parameters(decoder, jnp.zeros(x.shape, jnp.int32), jnp.zeros(z.shape)))
shape = lambda method, *given: jax.eval_shape(lambda params, *given: decoder.apply({"params": params}, *given, method=method), params, *given)

def count(method, *given, **how):
    return model_flops(lambda _, params, *given: jax.tree.leaves(decoder.apply({"params": params}, *given, method=method, **how)), {}, params, *given)

memory = shape("memory", z)
h = shape("before_last", x, memory)
kv = shape("last_keys_values", h)
states = shape("finish_at", h, kv, some)
finishing = count("last_keys_values", h) + count("finish_at", h, kv, some) + count("project", states)
late = benchmark.skipped(c.backbone.num_layers)
print(json.dumps({
    "naive": steps * count("__call__", x, z),
    "bisection": steps * count("__call__", x, z),
    "ours": count("memory", z) + steps * (count("before_last", x, memory) + finishing),
    "approx_skip": count("memory", z) + steps / 2 * (count("before_last", x, memory) + count("before_last", x, memory, skip=late)) + steps * finishing,
} | {"formula": {case: benchmark.decoding_flops(case, c, vocab, batch, steps, 4) for case in ("naive", "bisection", "ours", "approx_skip")}}))
"""


def test_decoding_products_are_those_of_the_networks():
    """The formulas of the FLOPs of a decoding against the products counted in the traced pieces of the network."""
    done = subprocess.run([sys.executable, "-c", PRODUCTS], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    formula = found.pop("formula")
    assert formula["approx_skip"] < formula["ours"] < formula["naive"]
    for case, counted in found.items():
        assert abs(formula[case] / counted - 1) < 1e-3, case


def test_steps_with_something_to_do_are_those_that_are_drawn():
    """The expected number of busy steps, and of busy groups of four, against 4,000 draws (z < 5, false alarm 1e-6)."""
    script = "import sys; sys.path.insert(0, 'launch'); import benchmark; print(benchmark.busy(40, 64), benchmark.busy(40, 64, 4))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    steps = np.random.default_rng(0).integers(0, 64, (4_000, 40))
    for expected, groups in zip(map(float, done.stdout.split()), (steps, steps // 4), strict=True):
        counts = np.array([len(np.unique(row)) for row in groups])
        assert abs(counts.mean() - expected) < 5 * counts.std() / np.sqrt(len(counts))


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
