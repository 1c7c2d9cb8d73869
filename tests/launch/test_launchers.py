"""The launchers for pods: linted, refusing in one line, printing exactly what they would do, and doing it against executables
that stand in for gcloud, sbatch, srun, scontrol and kubectl and record how they were called."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
POD = ROOT / "launch" / "pod"
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))

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
# What a shell, YAML or Kubernetes might take for its own.
AWKWARD = [
    "--a=two words",
    '--b=it\'s "q"',
    "--c=$(touch hacked)`id`",
    "--d=a;b&c|d>e",
    "--e=\\n: #tpu @NAME@ *",
    "--f=",
]
TRAIN = ["--", "--workdir=/shared/run", *AWKWARD]


@pytest.fixture
def fake(tmp_path):
    """fake("gcloud", script): an executable first in PATH that records its arguments and goes on as the script says."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(name, script="exit 0"):
        # A record is the words and a line's end, each ended by NUL.
        body = f'#!/usr/bin/env bash\nprintf "%s\\0" {name} "$@" $\'\\n\' >> {shlex.quote(str(tmp_path))}/calls\n{script}\n'
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


def launch(script, *words, fake=None, cwd=None, **environment):
    environment = (fake.environment if fake else os.environ) | environment
    command = ["bash", str(POD / script), *words]
    return subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def as_read(line):
    """The words that a shell finds in a line; whatever escaped its quotes would run, or be lost."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.split("\0")[:-1]


def commands(done):
    """What --dry-run printed, as a shell reads it."""
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [as_read(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def manifest(*words):
    done = launch("kubernetes.sh", *words, "--dry-run", *TRAIN)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return yaml.safe_load(done.stdout)


# Lint


def test_shellcheck_has_nothing_to_say():
    """All scripts of launch/, at the strictest level, following what they source."""
    optional = "avoid-nullary-conditions,check-unassigned-uppercase,deprecate-which,quote-safe-variables,require-double-brackets"
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
        f"--enable={optional}",
    ]
    done = subprocess.run(
        [*command, *SCRIPTS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def text(pattern):
    return {"type": "string", "pattern": f"^(?:{pattern})$"}


def record(required, **optional):
    """An object with these fields and no others."""
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


DNS, COUNT = text("[a-z0-9]([-a-z0-9.]*[a-z0-9])?"), {"type": "integer", "minimum": 1}
EXIT_CODES = record(
    {
        "operator": {"enum": ["In", "NotIn"]},
        "values": {"type": "array", "items": COUNT, "minItems": 1},
    },
    containerName=DNS,
)
CONDITION = record({"type": {"type": "string"}, "status": {"enum": ["True", "False", "Unknown"]}})
CONTAINER = record(
    {
        "name": DNS,
        "image": text(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*"),
        "command": {"type": "array", "items": {"type": "string"}},
        "args": {"type": "array", "items": {"type": "string"}},
        "resources": record(
            {"limits": record({}, **{"google.com/tpu": COUNT, "nvidia.com/gpu": COUNT})}
        ),
        "volumeMounts": {"type": "array", "items": record({"name": DNS, "mountPath": text("/.+")})},
    },
    env={
        "type": "array",
        "items": record(
            {"name": text("[A-Z_]+")},
            value={"type": "string"},
            valueFrom=record({"fieldRef": record({"fieldPath": {"type": "string"}})}),
        ),
    },
)
POD_SPEC = record(
    {
        "restartPolicy": {"const": "Never"},  # what a pod failure policy requires
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "volumes": {
            "type": "array",
            "items": record({"name": DNS, "persistentVolumeClaim": record({"claimName": DNS})}),
        },
        "terminationGracePeriodSeconds": COUNT,
    },
    nodeSelector={"type": "object", "additionalProperties": {"type": "string"}},
    tolerations={
        "type": "array",
        "items": record({"key": {"type": "string"}, "operator": {"enum": ["Exists", "Equal"]}}),
    },
)
FAILURE_RULE = record(
    {"action": {"enum": ["FailJob", "FailIndex", "Ignore", "Count"]}},
    onExitCodes=EXIT_CODES,
    onPodConditions={"type": "array", "items": CONDITION},
)
JOB_SPEC = record(
    {
        "parallelism": COUNT,
        "completions": COUNT,
        "completionMode": {"const": "Indexed"},
        "backoffLimit": {"type": "integer", "minimum": 0},
        "podFailurePolicy": record(
            {"rules": {"type": "array", "items": FAILURE_RULE, "minItems": 1, "maxItems": 20}}
        ),
        "template": record({"spec": POD_SPEC}),
    }
)
JOBSET_RULE = record(
    {
        "name": text("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    },
    onJobFailureReasons={
        "type": "array",
        "items": {
            "enum": [
                "BackoffLimitExceeded",
                "DeadlineExceeded",
                "FailedIndexes",
                "MaxFailedIndexesExceeded",
                "PodFailurePolicy",
            ]
        },
    },
    onJobFailureMessagePatterns={"type": "array", "items": {"type": "string", "format": "regex"}},
    targetReplicatedJobs={"type": "array", "items": DNS},
)
JOBSET = record(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": record(
            {"name": DNS},
            annotations={"type": "object", "additionalProperties": {"type": "string"}},
        ),
        "spec": record(
            {
                "replicatedJobs": {
                    "type": "array",
                    "items": record(
                        {"name": DNS, "replicas": COUNT, "template": record({"spec": JOB_SPEC})}
                    ),
                    "minItems": 1,
                },
                "failurePolicy": record(
                    {"maxRestarts": {"type": "integer", "minimum": 0}},
                    restartStrategy={"enum": ["Recreate", "BlockingRecreate"]},
                    rules={"type": "array", "items": JOBSET_RULE, "maxItems": 20},
                ),
            }
        ),
    }
)


@pytest.mark.parametrize(
    "words",
    [GKE, GPU, [*GPU, "--restarts=3", "--grace=600", "--mount=/shared/"]],
    ids=["tpu", "gpu", "options"],
)
def test_the_manifest_is_a_jobset(words):
    """Against the fields that the JobSet and Job APIs have, and no others."""
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(manifest(*words), JOBSET)


# Refusals


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("tpu.sh", [], "'' is not a command; there are create, setup, train"),
        ("tpu.sh", ["launch"], "'launch' is not a command"),
        ("tpu.sh", ["logs", "--name=pod"], "--zone is missing; give a zone such as"),
        ("tpu.sh", ["logs", "--name"], "--name needs a value"),
        ("tpu.sh", ["logs", *TPU, "--bogus=1"], "--bogus=1 is not an option"),
        ("tpu.sh", ["logs", *TPU, "--spot=1"], "--spot=1 is not an option"),
        ("tpu.sh", ["logs", *TPU, "stray"], "unexpected argument 'stray'"),
        ("tpu.sh", ["logs", *TPU, "--", "--x"], "logs takes no arguments"),
        ("tpu.sh", ["logs", "--name=p;id", "--zone=us-west4-a"], "--name=p;id cannot be"),
        ("tpu.sh", ["setup", *TPU, "--share=a:/b;id"], "--share=a:/b;id cannot be"),
        ("tpu.sh", ["create", *TPU], "--accelerator is missing"),
        ("tpu.sh", ["train", *TPU, "--recreate", *TRAIN], "--accelerator is missing"),
        ("tpu.sh", ["train", *TPU], "nothing to train"),
        ("tpu.sh", ["train", *TPU, "--", "--stage=all"], "--workdir is missing after --"),
        (
            "tpu.sh",
            ["train", *TPU, *TRAIN, "--distributed=auto"],
            "--distributed=auto is the launcher's to give",
        ),
        ("tpu.sh", ["train", *TPU, *TRAIN, "--dry-run"], "write it before --"),
        ("slurm.sh", [], "nothing to train"),
        ("slurm.sh", ["--nodes=0", *TRAIN], "--nodes=0 cannot be; give a number of nodes"),
        ("slurm.sh", ["--gpus=many", *TRAIN], "--gpus=many cannot be"),
        ("slurm.sh", ["--time=soon", *TRAIN], "--time=soon cannot be; give a time such as"),
        ("slurm.sh", ["--sbatch=mem=0", *TRAIN], "--sbatch=mem=0 is no option of sbatch"),
        ("slurm.sh", ["--partition"], "--partition needs a value"),
        ("kubernetes.sh", [*GPU], "nothing to train"),
        ("kubernetes.sh", [*GPU[1:], *TRAIN], "--name is missing"),
        ("kubernetes.sh", ["--name=Run_1", *GPU[1:], *TRAIN], "--name=Run_1 cannot be"),
        ("kubernetes.sh", [*GPU, "--image=a b", *TRAIN], "--image=a b cannot be"),
        (
            "kubernetes.sh",
            [*GPU[:3], *TRAIN],
            "no accelerator; give --tpu and --topology, or --gpus",
        ),
        (
            "kubernetes.sh",
            [*GPU, "--tpu=tpu-v6e-slice", *TRAIN],
            "--tpu and --gpus exclude each other",
        ),
        ("kubernetes.sh", [*GKE, "--hosts=4", *TRAIN], "--hosts follows from --topology"),
        ("kubernetes.sh", [*GKE, "--chips=5", *TRAIN], "--topology=4x8 has 32 chips"),
        ("kubernetes.sh", [*GKE, "--topology=4by8", *TRAIN], "--topology=4by8 cannot be"),
        ("kubernetes.sh", [*GKE, "--tpu=v5e", *TRAIN], "--tpu=v5e cannot be; give GKE's name"),
        (
            "kubernetes.sh",
            [*GKE, "--mount=/work", *TRAIN],
            "--workdir=/shared/run is no folder on the claim, which is mounted at /work",
        ),
        (
            "kubernetes.sh",
            [*GPU, "--", "--workdir=/shared/../run"],
            "--workdir=/shared/../run is no folder on the claim",
        ),
        (
            "kubernetes.sh",
            [*GPU, "--", "--workdir", "runs/big"],
            "--workdir=runs/big is no folder on the claim",
        ),
        ("kubernetes.sh", [*GPU, *TRAIN, "--x=a\nb"], "control character"),
    ],
)
def test_a_bad_parameter_is_one_line(script, words, said, fake):
    """Exit code 2, one line on standard error, and nothing called."""
    for name in ("gcloud", "sbatch", "kubectl"):
        fake(name)
    done = launch(script, *words, fake=fake)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and said in done.stderr
        and not done.stdout
    )
    assert len(done.stderr.splitlines()) == 1 and not fake.calls()


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh", "kubernetes.sh"])
def test_help_and_a_missing_tool(script, tmp_path):
    """--help begins with what it does and a line to copy; without its tool a launcher says what is missing."""
    done = launch(script, "--help")
    assert (
        done.returncode == 0
        and done.stdout.startswith("Trains ")
        and f"bash launch/pod/{script} " in done.stdout
        and "--dry-run" in done.stdout
    )
    for tool in ("bash", "dirname", "sed"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    words = {"tpu.sh": ["logs", *TPU], "slurm.sh": TRAIN, "kubernetes.sh": [*GPU, *TRAIN]}[script]
    done = launch(script, *words, PATH=str(tmp_path))
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and len(done.stderr.splitlines()) == 1
    )


# --dry-run


@pytest.mark.parametrize(
    ("script", "words"),
    [
        *(
            ("tpu.sh", [command, *TPU_CREATE])
            for command in ("create", "setup", "logs", "stop", "delete")
        )
    ]
    + [("tpu.sh", ["train", *TPU, *TRAIN]), ("slurm.sh", TRAIN), ("kubernetes.sh", [*GPU, *TRAIN])],
)
def test_a_dry_run_touches_nothing(script, words, fake, tmp_path):
    """No call of any tool, no file, whatever the arguments hold."""
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


def test_the_commands_for_a_tpu_pod():
    """Each subcommand's gcloud calls, word for word."""
    gcloud, place = ["gcloud", "compute", "tpus"], ["--zone=us-west4-a", "--project=p"]
    queued, machine = [*gcloud, "queued-resources"], [*gcloud, "tpu-vm"]

    def dry(command, *words, tail=()):
        return commands(
            launch(
                "tpu.sh", command, *TPU, "--project=p", *words, "--dry-run", *tail, TMPDIR="/tmp"
            )
        )

    flags = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"]
    assert dry(
        "create", "--accelerator=v5litepod-16", "--version=v2-alpha-tpuv5-lite", "--spot"
    ) == [
        [*queued, "create", "pod", "--node-id=pod", *place, *flags],
        [*queued, "describe", "pod", *place, "--format=value(state.state)"],
    ]
    archive = "/tmp/diladiff-pod.tgz"
    remote = "mkdir -p diladiff && tar -xzf diladiff.tgz -C diladiff && bash diladiff/launch/pod/worker.sh setup 10.0.0.2:/vol"
    assert dry("setup", "--share=10.0.0.2:/vol") == [
        [
            "tar",
            "-C",
            str(ROOT),
            "--exclude=./.git",
            "--exclude=./.venv",
            "--exclude=./runs",
            "-czf",
            archive,
            ".",
        ],
        [*machine, "scp", archive, "pod:diladiff.tgz", *place, "--worker=all"],
        ["rm", "-f", archive],
        [*machine, "ssh", "pod", *place, "--worker=all", f"--command={remote}"],
    ]
    [[*words, remote]] = dry("train", tail=TRAIN)
    assert words == [*machine, "ssh", "pod", *place, "--worker=all"]
    assert as_read(remote.removeprefix("--command=")) == [
        "bash",
        "diladiff/launch/pod/worker.sh",
        "run",
        "RUN",
        *TRAIN[1:],
    ]
    _, again, *rest = launch(
        "tpu.sh", "train", *TPU_CREATE, "--recreate", "--dry-run", *TRAIN
    ).stdout.splitlines()
    assert "exits with 75" in again and "taken away" in rest[0]
    assert [
        word
        for line in rest[1:]
        for word in as_read(line)
        if word in ("delete", "create", "describe", "scp", "ssh")
    ] == ["delete", "create", "describe", "scp", "ssh"]
    assert dry("stop") == [
        [
            *machine,
            "ssh",
            "pod",
            *place,
            "--worker=all",
            "--command=bash diladiff/launch/pod/worker.sh stop",
        ]
    ]
    assert dry("logs", "--worker=3") == [
        [
            *machine,
            "ssh",
            "pod",
            *place,
            "--worker=3",
            "--command=bash diladiff/launch/pod/worker.sh logs",
        ]
    ]
    assert dry("delete") == [[*queued, "delete", "pod", *place, "--force", "--quiet"]]


def test_the_command_for_slurm():
    """One process a GPU, a signal before the end, a log that goes on, and options of the site's own."""
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
    [words] = commands(launch("slurm.sh", "--dry-run", *TRAIN))
    assert "--ntasks-per-node=1" in words and not any(word.startswith("--gpus") for word in words)


def test_the_manifest_says_what_was_asked():
    """Hosts of a slice, devices, and arguments that reach the process as they were given."""

    def process_sees(words):
        # Kubernetes reads $$ as $, and $(NAME) as a variable.
        return [word.replace("$(PROCESS_ID)", "3").replace("$$", "$") for word in words]

    job = manifest(*GKE)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert process_sees(pod["containers"][0]["args"]) == ["--distributed=auto", *TRAIN[1:]]

    whole = manifest(*GPU, "--mount=/shared/")
    job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (
        job["parallelism"] == job["completions"] == 4
        and "nodeSelector" not in pod
        and "annotations" not in whole["metadata"]
    )
    [container] = pod["containers"]
    assert (
        container["resources"]["limits"] == {"nvidia.com/gpu": 8}
        and container["volumeMounts"][0]["mountPath"] == "/shared/"
    )
    assert process_sees(container["args"]) == [
        "--distributed=run1-workers-0-0.run1:8476",
        "--num_processes=4",
        *TRAIN[1:],
        "--process_id=3",
    ]


CODE = "Container train for pod default/run1-workers-0-2-x7k2p failed with exit code {} matching FailJob rule at index 1"


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (134, False, "RestartJobSet"),
        (1, False, "FailJobSet"),
        (2, False, "FailJobSet"),
        (137, False, "FailJobSet"),
    ],
)
def test_what_becomes_of_a_pod_that_ended(code, disrupted, action):
    """The two failure policies read as their controllers read them: the first rule that matches."""
    whole = manifest(*GPU, "--restarts=2")
    job = whole["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0 and whole["spec"]["failurePolicy"]["maxRestarts"] == 2
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in job["podFailurePolicy"]["rules"]:
        exits, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (disrupted and any(c["type"] == "DisruptionTarget" for c in conditions)) or (
            exits and code in exits["values"]
        ):
            assert rule["action"] == "FailJob" and (
                not exits or (exits["containerName"] == "train" and exits["operator"] == "In")
            )
            reason, message = (
                "PodFailurePolicy",
                CODE.format(code)
                if exits
                else "Pod default/x has condition DisruptionTarget matching FailJob rule at index 0",
            )
            break
    for rule in whole["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (
            not patterns or any(re.fullmatch(p, message) for p in patterns)
        ):
            assert rule["action"] == action
            return
    raise AssertionError("no rule matched: the set would restart")


# What they do

# Ends with the next code of the file "codes", for as long as there is one.
NEXT_CODE = 'code="$(head -n 1 "$STATE/codes")"; sed -i 1d "$STATE/codes"; exit "${code:-0}"'


def test_kubectl_gets_the_manifest(fake, tmp_path):
    """On standard input, in the namespace that was asked for."""
    fake("kubectl", 'cat > "$STATE/manifest"')
    done = launch("kubernetes.sh", *GPU, "--namespace=team", *TRAIN, fake=fake)
    assert done.returncode == 0, done.stderr
    assert fake.calls() == [["kubectl", "--namespace=team", "create", "--filename=-"]]
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest(*GPU)


def test_a_job_is_submitted_with_its_arguments(fake, tmp_path):
    """From a set-up checkout, through sbatch to srun, awkward words whole."""
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
    # A task that ends first must not have the others killed while they save, nor see one GPU only.
    assert {"--kill-on-bad-exit=0", "--wait=600", "--gpu-bind=none"} == set(srun[1:program])


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (137, False)])
def test_a_job_is_queued_again_on_75_alone(code, requeued, fake):
    """By the id that SLURM gave it."""
    fake("srun", f"exit {code}")
    fake("scontrol")
    done = launch("slurm.sh", "inside-job", "--workdir=/w", fake=fake, SLURM_JOB_ID="4711")
    assert done.returncode == code
    assert (["scontrol", "requeue", "4711"] in fake.calls()) == requeued


def gcloud_script(pod_state):
    return f'case "$*" in *tpu-vm\\ describe*) echo {pod_state} ;; *queued-resources\\ describe*) echo ACTIVE ;; *worker.sh\\ run*) {NEXT_CODE} ;; esac'


@pytest.mark.parametrize(
    ("codes", "pod_state", "code", "runs"),
    [
        ([0], "READY", 0, 1),
        ([1], "READY", 1, 1),
        ([75, 75, 0], "READY", 0, 3),
        ([75, 2], "READY", 2, 2),
        ([134, 0], "READY", 0, 2),  # a host died, and its peers with it
        ([134] * 4, "READY", 134, 4),
        ([1, 0], "REPAIRING", 0, 2),
        ([75], "PREEMPTED", 75, 1),
        ([143], "READY", 143, 1),  # stopped on request
    ],
)
def test_training_on_a_pod_is_tried_again(codes, pod_state, code, runs, fake, tmp_path):
    """On 75, while the pod is under repair, and three times after a host died; each time as another run, with the same arguments."""
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


def test_a_lost_connection_is_taken_up_again(fake, tmp_path):
    """255 is ssh's own code: the same run is followed, not another started."""
    (tmp_path / "codes").write_text("255\n0\n")
    fake("gcloud", gcloud_script("READY"))
    fake("date", "echo $RANDOM$RANDOM")
    assert launch("tpu.sh", "train", *TPU, *TRAIN, fake=fake).returncode == 0
    remote = [call[-1] for call in fake.calls() if "ssh" in call]
    assert len(remote) == 2 and remote[0] == remote[1]


def test_a_pod_that_was_taken_away_is_made_anew(fake, tmp_path):
    """With --recreate: deleted, created, set up, and trained on."""
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


def test_creating_waits_and_says_what_failed(fake, tmp_path):
    """Polls the request until it is active, and ends when it cannot become so."""
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


# On a host of the pod


@pytest.fixture
def host(fake, tmp_path):
    """A checkout on a host whose Python is a script: it records its words, and then does what a test says."""
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


def wait_for(path, seconds=20):
    for _ in range(int(seconds * 20)):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_host_reports_output_and_exit_code(code, host, fake):
    """Once for each run: asked again for the same one, it does not train again."""
    host(f"echo trained; exit {code}")
    for _ in range(2):
        process = host.worker("run", "first", *TRAIN[1:])
        assert "trained" in process.communicate(timeout=30)[0] and process.returncode == code
    [call] = fake.calls()
    assert call[1].endswith("/launch/train.py") and call[2:] == ["--distributed=auto", *TRAIN[1:]]
    assert host.worker("run", "second").wait(timeout=30) == code and len(fake.calls()) == 2


def test_training_outlives_its_connection(host, fake, tmp_path):
    """The terminal goes, training does not; the next call follows it to its end."""
    host(
        'echo begun; touch "$STATE/begun"; until [[ -e "$STATE/go" ]]; do sleep 0.05; done; echo finished; exit 75'
    )
    first = host.worker("run", "first", "--workdir=/w")
    wait_for(tmp_path / "begun")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=10)
    second = host.worker("run", "another", "--workdir=/w")
    assert "following" in second.stdout.readline()
    (tmp_path / "go").touch()
    output = second.communicate(timeout=30)[0]
    assert "begun" in output and "finished" in output and second.returncode == 75
    assert len(fake.calls()) == 1


def test_stopping_is_not_preemption(host, tmp_path):
    """SIGTERM reaches the training, which saves and ends with 75; the launcher sees another code, and does not try again."""
    host('trap "echo saved; exit 75" TERM; touch "$STATE/begun"; while true; do sleep 0.05; done')
    process = host.worker("run", "first", "--workdir=/w")
    wait_for(tmp_path / "begun")
    assert host.worker("stop").wait(timeout=10) == 0
    assert "saved" in process.communicate(timeout=30)[0] and process.returncode == 143
    idle = host.worker("stop")
    assert "nothing runs" in idle.communicate(timeout=10)[0] and idle.returncode == 0


def test_a_host_that_went_down_asks_for_another_run(host, fake, tmp_path):
    """Training that left no exit code was cut off with its host."""
    host("exit 0")
    (tmp_path / "diladiff" / ".worker").mkdir()
    (tmp_path / "diladiff" / ".worker" / "run").write_text("first\n")
    (tmp_path / "diladiff" / ".worker" / "pid").write_text("999999999\n")
    (tmp_path / "diladiff" / ".worker" / "log").touch()
    assert host.worker("run", "first", "--workdir=/w").wait(timeout=30) == 75 and not fake.calls()


def test_setting_up_a_host(fake, tmp_path):
    """The export mounted, a newer Python where the system's is too old, the locked packages, and JAX's TPU library of its lock."""
    shutil.copytree(ROOT / "launch", tmp_path / "diladiff" / "launch")
    fake("mountpoint", "exit 1")
    fake("sudo", '"$@"')
    fake("tee", 'cat > "$STATE/fstab"')
    for tool in ("mount", "mount.nfs", "chmod"):
        fake(tool)
    fake("mkdir", '[[ "$*" == *" /shared" ]] || exec /bin/mkdir "$@"')
    fake(
        "python3",
        'case "$*" in "-c "*) exit 1 ;; *"uv python find"*) echo "$STATE/bin/newer" ;; esac',
    )
    fake(
        "newer",
        'if [[ "$2" == venv ]]; then /bin/mkdir -p "$3/bin" "$3/lib/python3/site-packages"; cp "$0" "$3/bin/python"; fi',
    )
    done = subprocess.run(
        ["bash", "diladiff/launch/pod/worker.sh", "setup", "10.0.0.2:/vol"],
        cwd=tmp_path,
        env=fake.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = fake.calls()
    assert (tmp_path / "fstab").read_text().startswith("10.0.0.2:/vol /shared nfs ") and [
        "sudo",
        "mount",
        "/shared",
    ] in calls
    assert ["python3", "-m", "uv", "python", "install", "3.12"] in calls
    installed = [call for call in calls if call[:4] == ["newer", "-m", "pip", "install"]]
    assert [pathlib.Path(call[-1]).name for call in installed] == [
        "build.lock",
        "requirements.lock",
        "libtpu.lock",
    ]
    assert (
        all("--require-hashes" in call and call[-2] == "--requirement" for call in installed)
        and "--no-build-isolation" in installed[1]
    )


def test_from_the_workstation_to_the_hosts(host, fake, tmp_path):
    """The whole way, gcloud running its command here: preempted twice, then done, every word of the arguments intact."""
    (tmp_path / "codes").write_text("75\n75\n0\n")
    host(f"echo trained; {NEXT_CODE}")
    fake(
        "gcloud",
        'case "$*" in *tpu-vm\\ ssh*) cd "$STATE"; for word; do :; done; exec bash -c "${word#--command=}" ;; *describe*) echo READY ;; esac',
    )
    fake("date", "echo $RANDOM$RANDOM")
    done = launch("tpu.sh", "train", *TPU, *TRAIN, fake=fake)
    assert done.returncode == 0 and done.stdout.count("trained") == 3, done.stderr
    trained = [call for call in fake.calls() if call[0] == "python"]
    assert len(trained) == 3 and all(
        call[2:] == ["--distributed=auto", *TRAIN[1:]] for call in trained
    )
    assert not (tmp_path / "hacked").exists() and not pathlib.Path("hacked").exists()
