"""Fake executables, and a fake host of a pod."""

import os
import shlex
import shutil
import subprocess

import pytest
from launchers import ROOT


@pytest.fixture
def fake(tmp_path):
    """fake("gcloud", script) puts an executable into PATH that records its calls and runs a script.

    `fake.calls()` lists the recorded calls.
    """
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script="exit 0"):
        # A record is the words and a newline, each terminated by NUL.
        record = f'printf "%s\\0" {name} "$@" $\'\\n\' >> {shlex.quote(str(tmp_path / "calls"))}'
        body = f"#!/usr/bin/env bash\n{record}\n{script}\n"
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)

    def calls():
        text = (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
        return [record.split("\0")[:-1] for record in text.split("\n\0") if record]

    make.calls = calls
    make.environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "DILADIFF_POLL_SECONDS": "0",
        "STATE": str(tmp_path),
    }
    return make


@pytest.fixture
def host(fake, tmp_path):
    """host(script) makes a checkout on a host whose Python records its arguments and runs a script.

    `host.worker(...)` starts worker.sh there.
    """
    checkout = tmp_path / "diladiff"
    shutil.copytree(ROOT / "launch", checkout / "launch")
    (checkout / ".venv" / "bin").mkdir(parents=True)

    def make(script):
        fake("python", script)
        link = checkout / ".venv" / "bin" / "python"
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "bin" / "python")

    def worker(*words):
        return subprocess.Popen(
            ["bash", "diladiff/launch/pod/worker.sh", *words],
            cwd=tmp_path,
            env=fake.environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    make.worker = worker
    return make
