"""The commands as a user types them: samples to a file, help, and one line for bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, str(ROOT / "launch" / script), *flags]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_sample_writes_one_json_line_a_sample(trained, tmp_path):
    """Index, seed, model, text and tokens; the same sample whatever --num and --batch."""
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, flags in zip(files, (["--num=5"], ["--num=2", "--start=3", "--batch=1"]), strict=True):
        done = run("sample.py", f"--workdir={trained}", "--seed=4", "--decode_steps=3", f"--out={path}", *flags)
        assert done.returncode == 0, done.stderr
    a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    assert [r["index"] for r in a] == list(range(5)) and [r["index"] for r in b] == [3, 4]
    assert all(r["model"] == "diladiff" and r["seed"] == 4 and r["decode_steps"] == 3 and len(r["tokens"]) == 32 for r in a + b)
    assert [r["tokens"] for r in a[3:]] == [r["tokens"] for r in b]


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "sample.py", "evaluate.py"])
def test_help_shows_how(script):
    """--help begins with what the command does and a command line to copy."""
    done = run(script, "--help")
    assert f"python launch/{script} --" in done.stdout and "--workdir" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("sample.py", ["--workdir=/nowhere"], "/nowhere/config.json does not exist"),
        ("sample.py", [], "--workdir"),
        ("train.py", ["--workdir=/tmp/w", "--config=/nowhere.py"], "--config=/nowhere.py cannot be read"),
        ("sample.py", ["--workdir=WORKDIR", "--num=0"], "--num=0"),
        ("sample.py", ["--workdir=WORKDIR", "--config.sampling.batc=3"], "Did you mean"),
        ("sample.py", ["--workdir=WORKDIR", "--model=gpt"], "model is 'gpt'"),
        ("evaluate.py", ["--workdir=WORKDIR", "--config.evaluation.samples=0"], "evaluation.samples is 0"),
        ("evaluate.py", ["--workdir=WORKDIR", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_input_is_one_line(trained, script, flags, words):
    """Non-zero exit, one line that says what, no traceback."""
    done = run(script, *[flag.replace("WORKDIR", str(trained)) for flag in flags])
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bogus"], "--bogus is not an option"),
        (["a", "b"], "two working folders"),
        (["--corpus=/nowhere/at/all"], "no such folder or file"),
        (["--config=/nowhere.py"], "no such file"),
    ],
)
def test_the_quickstart_refuses_before_it_installs(flags, words):
    """Bad options end at once."""
    done = subprocess.run(["bash", str(ROOT / "launch" / "quickstart.sh"), *flags], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_the_quickstart_has_help():
    """Usage without side effects."""
    done = subprocess.run(["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0 and "--corpus" in done.stdout and "WORKDIR" in done.stdout


def test_ci_calls_the_readmes_test_command():
    """.ci/run is that one command."""
    assert "launch/test.sh" in (ROOT / ".ci" / "run").read_text() and "bash launch/test.sh" in (ROOT / "README.md").read_text()
