"""The fault suite, in its short form and (marked slow) in a longer one."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SHORT = {"SIGKILL": 2, "metrics on a full device": 1, "not a number": 1}
LONGER = {
    "SIGKILL": 4,
    "SIGKILL, saving": 1,
    "SIGTERM": 2,
    "one of two": 1,
    "damage: a flipped bit": 1,
    "damage: a file cut short": 1,
    "damage: a file gone": 1,
    "damage of all": 1,
    "autoencoder: SIGKILL, saving": 1,
    "autoencoder: a flipped bit": 1,
    "file size limit": 1,
    "metrics on a full device": 1,
    "not a number": 1,
    "rows cut short for a second": 1,
    "rows cut short for good": 1,
    "5000 steps: memory, files, threads": 1,
    "bad config": 25,
    "bad command line": 35,
    "bad corpus": 25,
    "bad prompt": 5,
    "bad workdir": 10,
}


@pytest.mark.parametrize(
    "numbers, expected",
    [
        (["--kills=2", "--terms=0", "--several=0", "--damages=0", "--long=0", "--inputs=0"], SHORT),
        pytest.param(
            ["--kills=5", "--terms=2", "--several=1", "--damages=1", "--inputs=100"],
            LONGER,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["short", "longer"],
)
def test_faults_are_survived(tmp_path, numbers, expected):
    """Killed runs end with the parameters, average, optimizer and data position of the undisturbed one, bit for bit; what cannot go on ends in one line."""
    out = tmp_path / "faults.json"
    words = [sys.executable, "tools/reliability/faults.py", "--steps=200", *numbers, f"--out={out}"]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["fault"]: row for row in json.loads(out.read_text())["rows"]}
    assert {name: row["tried"] for name, row in rows.items()} == expected
    assert all(row["survived"] == row["tried"] and not row["lost"] for row in rows.values())
    assert "survived" in done.stdout


def test_growth_is_seen_through_the_noise():
    """Of made-up looks at a run of 5,000 steps: 450 MB that move by 2, fall by 200 at once, and have 20 more files open now and then; and the same with leaks."""
    code = """
import random, sys
sys.path.insert(0, "tools/reliability")
from resource_growth import GROWTH, Seen, grown
def growth(memory=0.0, files=0.0, threads=0.0):
    rng = random.Random(0)
    looks = [i * 20 for i in range(250)]
    return grown([Seen(s, int(450_000 - 200_000 * (s > 3_000) + rng.random() * 2_000 + memory * s), 6 + 20 * (s % 250 < 40) + int(files * s / 250), 93 + int(threads * s / 250)) for s in looks], 5_000)
memory, *others = growth()
assert abs(memory) < 0.5 and others == [0, 0], (memory, others)
assert growth(memory=5)[0] > GROWTH and growth(files=1)[1] > 0 and growth(threads=1)[2] > 4
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
