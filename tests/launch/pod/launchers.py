"""Helpers of the tests of launch/pod: typical options, and how to read what the launchers print."""

import os
import pathlib
import subprocess

import yaml

ROOT = pathlib.Path(__file__).parents[3]
POD = ROOT / "launch" / "pod"

TPU = ["--name=pod", "--zone=us-west4-a"]
TPU_CREATE = [*TPU, "--accelerator=v5litepod-16", "--version=v2-alpha-tpuv5-lite"]
GKE = [
    "--name=run1",
    "--image=gcr.io/p/diladiff:1",
    "--claim=work",
    "--tpu=tpu-v5-lite-podslice",
    "--topology=4x8",
]
GPU = ["--name=run1", "--image=diladiff", "--claim=work", "--gpus=8", "--hosts=4"]
# Characters with a meaning to the shell, YAML or Kubernetes.
AWKWARD = [
    "--a=two words",
    '--b=it\'s "q"',
    "--c=$(touch hacked)`id`",
    "--d=a;b&c|d>e",
    "--e=\\n: #tpu @NAME@ *",
    "--f=",
]
TRAIN = ["--", "--workdir=/shared/run", *AWKWARD]

# Prints nothing and exits with the next code of the file "codes"; with 0 once the file is empty.
NEXT_CODE = 'code="$(head -n 1 "$STATE/codes")"; sed -i 1d "$STATE/codes"; exit "${code:-0}"'


def launch(script, *words, fake=None, cwd=None, **environment):
    """Runs a launcher, with the fake executables of the fixture `fake` if it is given."""
    environment = (fake.environment if fake else os.environ) | environment
    command = ["bash", str(POD / script), *words]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def as_read(line):
    """The words that a shell reads in a line."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def commands(done):
    """The commands that --dry-run printed, each as a list of words."""
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [as_read(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def manifest(*words):
    """The manifest that kubernetes.sh prints with these options."""
    done = launch("kubernetes.sh", *words, "--dry-run", *TRAIN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return yaml.safe_load(done.stdout)
