"""tpu.sh: the gcloud commands, and when training is run again."""

import pathlib

import pytest
from launchers import NEXT_CODE, ROOT, TPU, TPU_CREATE, TRAIN, as_read, commands, launch

GCLOUD = ["gcloud", "compute", "tpus"]
QUEUED, MACHINE = [*GCLOUD, "queued-resources"], [*GCLOUD, "tpu-vm"]
PLACE = ["--zone=us-west4-a", "--project=p"]


def dry_run(command, *words, arguments=()):
    """The commands that a subcommand would run."""
    options = [*TPU, "--project=p", *words, "--dry-run"]
    return commands(launch("tpu.sh", command, *options, *arguments, TMPDIR="/tmp"))


def ssh(worker, remote):
    """The command that runs a shell command on a host."""
    return [*MACHINE, "ssh", "pod", *PLACE, f"--worker={worker}", f"--command={remote}"]


def test_create_requests_the_pod_and_polls_its_state():
    assert dry_run(
        "create", "--accelerator=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"
    ) == [
        [
            *[*QUEUED, "create", "pod", "--node-id=pod", *PLACE],
            "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot",
        ],
        [*QUEUED, "describe", "pod", *PLACE, "--format=value(state.state)"],
    ]


def test_setup_copies_the_checkout_to_all_hosts_and_sets_them_up():
    archive = "/tmp/diladiff-pod.tgz"
    excluded = [f"--exclude=./{folder}" for folder in (".git", ".venv", "runs")]
    unpack = "mkdir -p diladiff && tar -xzf diladiff.tgz -C diladiff"
    assert dry_run("setup", "--share=10.0.0.2:/vol") == [
        ["tar", "-C", str(ROOT), *excluded, "-czf", archive, "."],
        [*MACHINE, "scp", archive, "pod:diladiff.tgz", *PLACE, "--worker=all"],
        ["rm", "-f", archive],
        ssh("all", f"{unpack} && bash diladiff/launch/pod/worker.sh setup 10.0.0.2:/vol"),
    ]


def test_train_passes_its_arguments_unchanged_to_all_hosts():
    [[*words, remote]] = dry_run("train", arguments=TRAIN)
    assert words == [*MACHINE, "ssh", "pod", *PLACE, "--worker=all"]
    worker = ["bash", "diladiff/launch/pod/worker.sh", "run", "RUN"]
    assert as_read(remote.removeprefix("--command=")) == [*worker, *TRAIN[1:]]


def test_train_with_recreate_shows_how_a_preempted_pod_is_replaced():
    _, repeated, *rest = launch(
        "tpu.sh", "train", *TPU_CREATE, "--recreate", "--dry-run", *TRAIN
    ).stdout.splitlines()
    assert "exits with 75" in repeated and "preempted" in rest[0]
    steps = ["delete", "create", "describe", "scp", "ssh"]
    assert [word for line in rest[1:] for word in as_read(line) if word in steps] == steps


def test_stop_logs_and_delete_are_one_command_each():
    assert dry_run("stop") == [ssh("all", "bash diladiff/launch/pod/worker.sh stop")]
    assert dry_run("logs", "--worker=3") == [ssh("3", "bash diladiff/launch/pod/worker.sh logs")]
    assert dry_run("delete") == [[*QUEUED, "delete", "pod", *PLACE, "--force", "--quiet"]]


def gcloud_script(pod_state):
    """A gcloud that reports this state of the pod, and ends each training with the next code."""
    return f"""case "$*" in
      *tpu-vm\\ describe*) echo {pod_state} ;;
      *queued-resources\\ describe*) echo ACTIVE ;;
      *worker.sh\\ run*) {NEXT_CODE} ;;
    esac"""


@pytest.mark.parametrize(
    ("codes", "pod_state", "code", "runs"),
    [
        ([0], "READY", 0, 1),
        ([1], "READY", 1, 1),
        ([75, 75, 0], "READY", 0, 3),
        ([75, 2], "READY", 2, 2),
        ([134, 0], "READY", 0, 2),  # a host died, and with it the others
        ([134] * 4, "READY", 134, 4),
        ([1, 0], "REPAIRING", 0, 2),
        ([75], "PREEMPTED", 75, 1),
        ([143], "READY", 143, 1),  # stopped on request
    ],
)
def test_training_runs_again_after_preemption_repair_and_up_to_three_dead_hosts(
    codes, pod_state, code, runs, fake, tmp_path
):
    """Each time it is another run with the same arguments."""
    (tmp_path / "codes").write_text("".join(f"{c}\n" for c in codes))
    fake("gcloud", gcloud_script(pod_state))
    fake("date", "echo $RANDOM$RANDOM")
    done = launch("tpu.sh", "train", *TPU, *TRAIN, fake=fake)
    assert done.returncode == code, done.stderr
    remote = [
        as_read(call[-1].removeprefix("--command=")) for call in fake.calls() if "ssh" in call
    ]
    assert len(remote) == runs and all(
        words[:3] == ["bash", "diladiff/launch/pod/worker.sh", "run"] and words[4:] == TRAIN[1:]
        for words in remote
    )
    assert len({words[3] for words in remote}) == runs


def test_after_a_lost_connection_the_same_run_is_followed(fake, tmp_path):
    """255 is the exit code of ssh itself."""
    (tmp_path / "codes").write_text("255\n0\n")
    fake("gcloud", gcloud_script("READY"))
    fake("date", "echo $RANDOM$RANDOM")
    assert launch("tpu.sh", "train", *TPU, *TRAIN, fake=fake).returncode == 0
    remote = [call[-1] for call in fake.calls() if "ssh" in call]
    assert len(remote) == 2 and remote[0] == remote[1]


def test_recreate_replaces_a_preempted_pod_and_resumes(fake, tmp_path):
    (tmp_path / "codes").write_text("75\n0\n")
    fake("gcloud", gcloud_script("PREEMPTED"))
    done = launch(
        "tpu.sh", "train", *TPU_CREATE, "--recreate", *TRAIN, fake=fake, TMPDIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    steps = ["ssh", "describe", "delete", "create", "describe", "scp", "ssh", "ssh"]
    assert [
        next(word for word in call if word in steps) for call in fake.calls() if call[0] == "gcloud"
    ] == steps


def test_create_polls_until_the_pod_is_active_or_the_request_failed(fake, tmp_path):
    for states, code in (
        (["ACCEPTED", "PROVISIONING", "ACTIVE"], 0),
        (["WAITING_FOR_RESOURCES", "FAILED"], 1),
    ):
        (tmp_path / "codes").write_text("".join(f"{s}\n" for s in states))
        fake(
            "gcloud",
            'case "$*" in *describe*) head -n 1 "$STATE/codes"; sed -i 1d "$STATE/codes" ;; esac',
        )
        done = launch("tpu.sh", "create", *TPU_CREATE, fake=fake)
        assert done.returncode == code and all(state in done.stdout for state in states)
        assert ("FAILED" in done.stderr) == bool(code)


def test_a_training_that_is_preempted_twice_from_the_workstation_to_the_host(host, fake, tmp_path):
    """gcloud runs the remote command on this machine, and every argument arrives unchanged."""
    (tmp_path / "codes").write_text("75\n75\n0\n")
    host(f"echo trained; {NEXT_CODE}")
    fake(
        "gcloud",
        """case "$*" in
          *tpu-vm\\ ssh*) cd "$STATE"; for word; do :; done; exec bash -c "${word#--command=}" ;;
          *describe*) echo READY ;;
        esac""",
    )
    fake("date", "echo $RANDOM$RANDOM")
    done = launch("tpu.sh", "train", *TPU, *TRAIN, fake=fake)
    assert done.returncode == 0 and done.stdout.count("trained") == 3, done.stderr
    trained = [call for call in fake.calls() if call[0] == "python"]
    assert len(trained) == 3 and all(
        call[2:] == ["--distributed=auto", *TRAIN[1:]] for call in trained
    )
    assert not (tmp_path / "hacked").exists() and not pathlib.Path("hacked").exists()
