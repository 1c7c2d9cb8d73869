"""The benchmark command at its smallest."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_sampling_rows_name_their_case_and_its_cost(tmp_path):
    """A row for each case in the documented form; every case draws the same tokens; the library's takes less temporary memory; scaled times say so."""
    out = tmp_path / "bench.json"
    flags = ["--suite=sampling", "--size=tiny", "--batch=4", "--decode_steps=8", "--timed_steps=4", "--latent_steps=1", "--rounds=1", f"--out={out}"]
    done = subprocess.run([sys.executable, "launch/benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["machine"]["matmul_flops_per_second"] > 0 and document["machine"]["count"] >= 1
    rows = {row["case"]: row for row in document["rows"]}
    assert list(rows) == ["naive", "bisection", "ours"]
    for row in rows.values():
        assert (row["suite"], row["batch"], row["length"], row["vocab"], row["decode_steps"], row["timed_steps"]) == ("sampling", 4, 32, 512, 8, 4)
        assert row["tokens_as_naive"] > 0.95
        assert abs(row["seconds"] - row["latent_seconds"] - row["decode_seconds"]) < 1e-9
        assert abs(row["tokens_per_second"] * row["seconds"] - 4 * 32) < 1e-6
        assert min(row["compile_seconds_cold"], row["compile_seconds_cached"], row["peak_memory_bytes"], row["fraction_of_matmul_rate"]) > 0
    assert rows["ours"]["peak_memory_bytes"] <= rows["naive"]["peak_memory_bytes"]
    assert out.with_suffix(".png").exists() and "naive" in done.stdout and "4 timed steps" in done.stdout
