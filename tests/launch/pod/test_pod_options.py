"""The launchers' options: errors, help, and dry runs; and shellcheck for all scripts."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from launchers import GKE, GPU, ROOT, TPU, TPU_CREATE, TRAIN, launch

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))


def test_shellcheck_is_clean():
    """It checks all scripts of launch/ at the strictest level, following what they source."""
    optional = [
        "avoid-nullary-conditions",
        "check-unassigned-uppercase",
        "deprecate-which",
        "quote-safe-variables",
        "require-double-brackets",
    ]
    shellcheck = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    command = [
        shellcheck,
        "--norc",
        "--shell=bash",
        "--severity=style",
        "--external-sources",
        "--source-path=SCRIPTDIR",
        f"--enable={','.join(optional)}",
    ]
    done = subprocess.run(
        [*command, *SCRIPTS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("tpu.sh", [], "command: got '', expected create, setup, train"),
        ("tpu.sh", ["launch"], "command: got 'launch'"),
        ("tpu.sh", ["logs", "--name=pod"], "--zone: missing, expected a zone, for example"),
        ("tpu.sh", ["logs", "--name"], "--name: got no value"),
        ("tpu.sh", ["logs", *TPU, "--bogus=1"], "--bogus=1: unknown option"),
        ("tpu.sh", ["logs", *TPU, "--spot=1"], "--spot=1: unknown option"),
        ("tpu.sh", ["logs", *TPU, "stray"], "unexpected argument: got 'stray'"),
        ("tpu.sh", ["logs", *TPU, "--", "--x"], "logs: got arguments after --"),
        ("tpu.sh", ["logs", "--name=p;id", "--zone=us-west4-a"], "--name: got 'p;id'"),
        ("tpu.sh", ["setup", *TPU, "--share=a:/b;id"], "--share: got 'a:/b;id'"),
        ("tpu.sh", ["create", *TPU], "--accelerator: missing"),
        ("tpu.sh", ["train", *TPU, "--recreate", *TRAIN], "--accelerator: missing"),
        ("tpu.sh", ["train", *TPU], "no arguments of launch/train.py"),
        ("tpu.sh", ["train", *TPU, "--", "--stage=all"], "--workdir: missing after --"),
        (
            "tpu.sh",
            ["train", *TPU, *TRAIN, "--distributed=auto"],
            "--distributed=auto: the launcher sets this option",
        ),
        ("tpu.sh", ["train", *TPU, *TRAIN, "--dry-run"], "expected it before"),
        ("slurm.sh", [], "no arguments of launch/train.py"),
        ("slurm.sh", ["--nodes=0", *TRAIN], "--nodes: got '0', expected a number of nodes"),
        ("slurm.sh", ["--gpus=many", *TRAIN], "--gpus: got 'many'"),
        ("slurm.sh", ["--time=soon", *TRAIN], "--time: got 'soon', expected a time"),
        ("slurm.sh", ["--sbatch=mem=0", *TRAIN], "--sbatch: got '--sbatch=mem=0', expected"),
        ("slurm.sh", ["--partition"], "--partition: got no value"),
        ("kubernetes.sh", [*GPU], "no arguments of launch/train.py"),
        ("kubernetes.sh", [*GPU[1:], *TRAIN], "--name: missing"),
        ("kubernetes.sh", ["--name=Run_1", *GPU[1:], *TRAIN], "--name: got 'Run_1'"),
        ("kubernetes.sh", [*GPU, "--image=a b", *TRAIN], "--image: got 'a b'"),
        (
            "kubernetes.sh",
            [*GPU[:3], *TRAIN],
            "no accelerator: expected --tpu and --topology, or --gpus",
        ),
        (
            "kubernetes.sh",
            [*GPU, "--tpu=tpu-v6e-slice", *TRAIN],
            "--tpu and --gpus: got both, expected one of them",
        ),
        ("kubernetes.sh", [*GKE, "--hosts=4", *TRAIN], "--hosts: with --tpu it follows"),
        (
            "kubernetes.sh",
            [*GKE, "--chips=5", *TRAIN],
            "--chips: got 5, expected a divisor of the 32 chips of --topology=4x8",
        ),
        ("kubernetes.sh", [*GKE, "--topology=4by8", *TRAIN], "--topology: got '4by8'"),
        ("kubernetes.sh", [*GKE, "--tpu=v5e", *TRAIN], "--tpu: got 'v5e', expected GKE's name"),
        (
            "kubernetes.sh",
            [*GKE, "--mount=/work", *TRAIN],
            "--workdir: got '/shared/run', expected a folder inside the claim's mount /work",
        ),
        (
            "kubernetes.sh",
            [*GPU, "--", "--workdir=/shared/../run"],
            "--workdir: got '/shared/../run'",
        ),
        ("kubernetes.sh", [*GPU, "--", "--workdir", "runs/big"], "--workdir: got 'runs/big'"),
        ("kubernetes.sh", [*GPU, *TRAIN, "--x=a\nb"], "control character"),
    ],
)
def test_a_bad_option_is_an_error_of_one_line_and_calls_nothing(script, words, message, fake):
    for name in ("gcloud", "sbatch", "kubectl"):
        fake(name)
    done = launch(script, *words, fake=fake)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not fake.calls()


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh", "kubernetes.sh"])
def test_help_begins_with_the_purpose_and_an_example(script):
    done = launch(script, "--help")
    assert done.returncode == 0 and done.stdout.startswith("Trains ")
    assert f"bash launch/pod/{script} " in done.stdout and "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("tpu.sh", ["logs", *TPU]),
        ("slurm.sh", TRAIN),
        ("kubernetes.sh", [*GPU, *TRAIN]),
    ],
)
def test_a_missing_tool_is_an_error_of_one_line(script, words, tmp_path):
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = launch(script, *words, PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("tpu.sh", ["create", *TPU_CREATE]),
        ("tpu.sh", ["setup", *TPU_CREATE]),
        ("tpu.sh", ["logs", *TPU_CREATE]),
        ("tpu.sh", ["stop", *TPU_CREATE]),
        ("tpu.sh", ["delete", *TPU_CREATE]),
        ("tpu.sh", ["train", *TPU, *TRAIN]),
        ("slurm.sh", TRAIN),
        ("kubernetes.sh", [*GPU, *TRAIN]),
    ],
)
def test_a_dry_run_calls_no_tool_and_writes_no_file(script, words, fake, tmp_path):
    for name in ("gcloud", "sbatch", "srun", "scontrol", "kubectl", "tar", "rm"):
        fake(name)
    before = sorted(tmp_path.rglob("*"))
    place = words.index("--") if "--" in words else len(words)
    done = launch(
        script,
        *words[:place],
        "--dry-run",
        *words[place:],
        fake=fake,
        cwd=tmp_path,
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0 and done.stdout and not done.stderr
    assert sorted(tmp_path.rglob("*")) == before and not fake.calls()
