"""slurm.sh: the sbatch command, the batch script, and when a job is queued again."""

import shutil
import subprocess

import pytest
from launchers import POD, ROOT, TRAIN, commands, launch


def test_the_sbatch_command_has_all_options_and_one_process_per_gpu():
    options = [
        "--nodes=4",
        "--gpus=8",
        "--time=1-00:00",
        "--account=a",
        "--cpus=12",
        "--grace=300",
        "--sbatch=--mem=0",
        "--sbatch=--qos=big one",
        "--log=/l/%j",
    ]
    [words] = commands(launch("slurm.sh", *options, "--dry-run", *TRAIN))
    script = words.index(str(POD / "slurm.sh"))
    assert words[0] == "sbatch" and words[script + 1 :] == ["inside-job", *TRAIN[1:]]
    assert set(words[1:script]) == {
        *(
            "--job-name=diladiff",
            "--nodes=4",
            "--ntasks-per-node=8",
            "--gpus-per-node=8",
            "--cpus-per-task=12",
            "--time=1-00:00",
            "--account=a",
        ),
        *(
            f"--chdir={ROOT}",
            "--output=/l/%j",
            "--open-mode=append",
            "--requeue",
            "--signal=TERM@300",
            "--mem=0",
            "--qos=big one",
        ),
    }


def test_without_gpus_one_process_runs_per_node():
    [words] = commands(launch("slurm.sh", "--dry-run", *TRAIN))
    assert "--ntasks-per-node=1" in words and not any(word.startswith("--gpus") for word in words)


def test_a_job_is_submitted_with_its_arguments(fake, tmp_path):
    """The arguments pass unchanged through sbatch and srun to launch/train.py."""
    shutil.copytree(ROOT / "launch", tmp_path / "checkout" / "launch")
    submit = [
        "bash",
        str(tmp_path / "checkout" / "launch" / "pod" / "slurm.sh"),
        "--nodes=2",
        *TRAIN,
    ]
    fake("sbatch", 'while [[ "$1" == --* ]]; do shift; done; SLURM_JOB_ID=7 exec bash "$@"')
    fake("srun")
    done = subprocess.run(
        submit, env=fake.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and ".venv is not set up" in done.stderr
    python = tmp_path / "checkout" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(shutil.which("true"))
    done = subprocess.run(
        submit, env=fake.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    sbatch, srun = fake.calls()
    assert sbatch[0] == "sbatch" and srun[0] == "srun"
    program = srun.index(".venv/bin/python")
    assert srun[program + 1 :] == ["launch/train.py", "--distributed=auto", *TRAIN[1:]]
    # The first task that exits must not kill the others, and every task sees all GPUs.
    assert {"--kill-on-bad-exit=0", "--wait=600", "--gpu-bind=none"} == set(srun[1:program])


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_a_job_is_queued_again_only_after_exit_code_75(code, requeued, fake):
    fake("srun", f"exit {code}")
    fake("scontrol")
    done = launch("slurm.sh", "inside-job", "--workdir=/w", fake=fake, SLURM_JOB_ID="4711")
    assert done.returncode == code
    assert (["scontrol", "requeue", "4711"] in fake.calls()) == requeued
