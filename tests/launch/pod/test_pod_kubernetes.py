"""kubernetes.sh: a valid JobSet with what the options ask for, and its restarts."""

import re

import jsonschema
import pytest
import yaml
from launchers import GKE, GPU, TRAIN, launch, manifest


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
def test_the_manifest_is_a_valid_jobset(words):
    """The schema has the fields of the JobSet and Job APIs, and allows no others."""
    jsonschema.Draft202012Validator.check_schema(JOBSET)
    jsonschema.validate(manifest(*words), JOBSET)


def process_sees(words):
    """The arguments that a container receives: Kubernetes reads $(NAME) as a variable, $$ as $."""
    return [word.replace("$(PROCESS_ID)", "3").replace("$$", "$") for word in words]


def test_the_manifest_for_tpus_has_the_slice_its_hosts_and_the_arguments():
    job = manifest(*GKE)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8 and job["backoffLimit"] == 0
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert process_sees(pod["containers"][0]["args"]) == ["--distributed=auto", *TRAIN[1:]]


def test_the_manifest_for_gpus_has_the_hosts_the_coordinator_and_the_arguments():
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


# The messages that the Job controller writes.
EXITED = (
    "Container train for pod default/run1-workers-0-2-x7k2p failed with exit code {} "
    "matching FailJob rule at index 1"
)
DISRUPTED = "Pod default/x has condition DisruptionTarget matching FailJob rule at index 0"


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
def test_preemption_restarts_the_run_without_limit_and_other_failures_end_it(
    code, disrupted, action
):
    """Each controller applies the first rule of its failure policy that matches."""
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
            reason, message = "PodFailurePolicy", EXITED.format(code) if exits else DISRUPTED
            break
    for rule in whole["spec"]["failurePolicy"]["rules"]:
        reasons, patterns = rule.get("onJobFailureReasons"), rule.get("onJobFailureMessagePatterns")
        if (not reasons or reason in reasons) and (
            not patterns or any(re.fullmatch(p, message) for p in patterns)
        ):
            assert rule["action"] == action
            return
    raise AssertionError("no rule matched, so the run would restart")


def test_kubectl_receives_the_manifest_on_standard_input(fake, tmp_path):
    fake("kubectl", 'cat > "$STATE/manifest"')
    done = launch("kubernetes.sh", *GPU, "--namespace=team", *TRAIN, fake=fake)
    assert done.returncode == 0, done.stderr
    assert fake.calls() == [["kubectl", "--namespace=team", "create", "--filename=-"]]
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == manifest(*GPU)
