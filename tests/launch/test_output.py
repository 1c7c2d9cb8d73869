"""Commands whose output goes nowhere, cannot be encoded, or is not wanted any more."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def words(script, *flags):
    return [sys.executable, str(ROOT / "launch" / script), *flags]


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"JAX_PLATFORMS": "cpu"} | changes


def last_step(workdir, stage):
    folder = workdir / stage / "checkpoints"
    return max(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def closed_pipe():
    """The writing end of a pipe that nobody reads, as after `| head -1`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return os.fdopen(write_end, "wb")


OUTPUTS = {
    "a reader that is gone": closed_pipe,
    "a full disk": lambda: open("/dev/full", "wb"),  # noqa: SIM115  (the test closes it)
}


@pytest.mark.parametrize(
    ("out", "encoding"),
    [
        ("a reader that is gone", "utf-8"),
        pytest.param("a full disk", "utf-8", marks=pytest.mark.slow),
        pytest.param(None, "ascii", marks=pytest.mark.slow),
    ],
)
def test_training_ends_saved_whatever_happens_to_its_output(trained, tmp_path, out, encoding):
    """Its log and previews are lost or escaped; its checkpoints are not."""
    workdir = tmp_path / "w"
    shutil.copytree(trained, workdir)
    shutil.rmtree(workdir / "mdlm" / "checkpoints")
    shutil.rmtree(workdir / "mdlm" / "checksums")
    with OUTPUTS[out]() if out else open(tmp_path / "log", "wb") as stream:
        done = subprocess.run(
            words("train.py", f"--workdir={workdir}", "--stage=mdlm", "--config.logging.samples=1"),
            env=environment(PYTHONIOENCODING=encoding),
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert last_step(workdir, "mdlm") == 6
    if out is None:
        assert b"mdlm 6: validation" in (tmp_path / "log").read_bytes()


@pytest.mark.parametrize(
    ("out", "code", "message"),
    [
        ("a reader that is gone", 141, "standard output was closed by its reader"),
        pytest.param("a full disk", 1, "No space left on device", marks=pytest.mark.slow),
    ],
)
def test_printed_samples_that_cannot_be_written_are_an_error_of_one_line(
    trained, out, code, message
):
    """The samples are what is wanted, so that the command cannot go on."""
    with OUTPUTS[out]() as stream:
        done = subprocess.run(
            words("sample.py", f"--workdir={trained}", "--num=4", "--batch=2", "--model=mdlm"),
            env=environment(),
            stdout=stream,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == code and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "script",
    ["sample.py", *(pytest.param(s, marks=pytest.mark.slow) for s in ("train.py", "benchmark.py"))],
)
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_device_that_is_not_there_is_an_error_of_one_line(trained, tmp_path, script, platform):
    """On a machine without it; JAX answers with a page, or with a bare assertion."""
    flags = [f"--workdir={trained}"] if script != "benchmark.py" else [f"--out={tmp_path}/b.json"]
    done = subprocess.run(
        words(script, *flags),
        env=environment(JAX_PLATFORMS=platform),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode == 0:
        pytest.skip(f"this machine has a {platform}")
    assert done.returncode == 1 and f"JAX_PLATFORMS: got '{platform}', but" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
