#!/usr/bin/env bash
# Trains as a JobSet on the Kubernetes cluster that kubectl points to.
#
#   bash launch/pod/kubernetes.sh --name=run1 --image=IMAGE --claim=CLAIM --tpu=tpu-v5-lite-podslice --topology=4x4 \
#     -- --config=configs/large.py --workdir=/shared/run1 --stage=all
#   bash launch/pod/kubernetes.sh --name=run1 --image=IMAGE --claim=CLAIM --gpus=8 --hosts=4 -- ...
#
#   --name        name of the JobSet.
#   --image       image with the packages and, as its working folder, the checkout (see docs/pods.md).
#   --claim       persistent volume claim that all hosts can write (ReadWriteMany). Workdirs belong there.
#   --mount       where the claim is mounted; default /shared.
#   --tpu, --topology   GKE's names of the accelerator and the slice. The number of hosts follows from them.
#   --chips       with --tpu: chips per host; default 4.
#   --gpus        GPUs per host (nvidia.com/gpu). One process runs on each host.
#   --hosts       with --gpus: number of hosts; default 1.
#   --namespace   default: the namespace that kubectl uses.
#   --restarts    how often the run may restart after a host died unnoticed by Kubernetes; default 3.
#   --grace       seconds that a pod has to save a checkpoint and exit; default 120.
#   --dry-run     prints the manifest without sending it.
#
# The run restarts without limit when a pod exits with 75 (preempted, checkpoint saved), is evicted, or
# loses its node. It restarts up to --restarts times when a pod exits with 134 (JAX lost another host).
# Any other exit code ends it as failed. A run that has ended keeps its name until you run
# `kubectl delete jobset NAME`; after that the same command resumes it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PORT=8476

name="" image="" claim="" mount=/shared tpu="" topology="" chips="" gpus="" hosts="" namespace="" restarts=3 grace=120
parse "name image claim mount tpu topology chips gpus hosts namespace restarts grace" "" "$@"

need name '[a-z]([a-z0-9-]{0,38}[a-z0-9])?' "a name of at most 40 lower-case letters, digits and hyphens"
need image '[A-Za-z0-9][A-Za-z0-9._/:@-]*' "the image to run"
need claim '[a-z0-9]([a-z0-9.-]*[a-z0-9])?' "the name of a persistent volume claim, in lower-case letters, digits, dots and hyphens"
need mount '/[A-Za-z0-9._/-]+' "an absolute path"
need restarts '[0-9]+' "a number"
need grace '[1-9][0-9]*' "a number of seconds above 0"
[[ -z "$namespace" ]] || need namespace '[a-z0-9]([a-z0-9-]*[a-z0-9])?' "a namespace"
[[ -z "$tpu" || -z "$gpus" ]] || refuse "--tpu and --gpus: got both, expected one of them"
if [[ -n "$tpu" ]]; then
  need tpu 'tpu[a-z0-9-]+' "GKE's name of a TPU, for example tpu-v5-lite-podslice"
  need topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "the topology of the slice, for example 4x4"
  [[ -z "$hosts" ]] || refuse "--hosts: with --tpu it follows from --topology and --chips. Remove it."
  chips="${chips:-4}"
  need chips '[1-9][0-9]*' "the number of chips per host"
  slice="$((${topology//x/*}))"
  ((slice % chips == 0)) || refuse "--chips: got $chips, expected a divisor of the $slice chips of --topology=$topology"
  kind=tpu resource=google.com/tpu devices="$chips" hosts="$((slice / chips))"
elif [[ -n "$gpus" ]]; then
  [[ -z "$topology$chips" ]] || refuse "--topology and --chips: expected only with --tpu. Remove them."
  hosts="${hosts:-1}"
  need gpus '[1-9][0-9]*' "the number of GPUs per host"
  need hosts '[1-9][0-9]*' "the number of hosts"
  kind=gpu resource=nvidia.com/gpu devices="$gpus"
else
  refuse "no accelerator: expected --tpu and --topology, or --gpus and --hosts"
fi
check_arguments "$mount"
workdir_on "$mount"
[[ "${arguments[*]}" != *[[:cntrl:]]* ]] || refuse "an argument contains a control character such as a newline. Remove it."
"$dry_run" || [[ -n "$(type -P kubectl)" ]] || refuse "kubectl is not installed. See https://kubernetes.io/docs/tasks/tools"

# Prints a word as a YAML string. Kubernetes expands $(NAME) but reads $$ as a plain dollar sign.
yaml_string() {
  local word="$1"
  word="${word//\\/\\\\}"
  word="${word//\"/\\\"}"
  echo "\"${word//\$/\$\$}\""
}

# Prints the manifest. On TPUs, JAX finds the other hosts through GKE; on GPUs it gets their number and
# the address of the first host, the coordinator.
render() {
  local line word
  local words=(--distributed=auto)
  if [[ "$kind" == gpu ]]; then words=(--distributed="$name-workers-0-0.$name:$PORT" --num_processes="$hosts"); fi
  while IFS= read -r line; do
    case "$line" in
      '#'*) continue ;;
      *'#tpu') [[ "$kind" == tpu ]] || continue ;;
      *@ARGUMENTS@*)
        for word in "${words[@]}" "${arguments[@]}"; do
          echo "${line%%\"*}$(yaml_string "$word")"
        done
        if [[ "$kind" == gpu ]]; then echo "${line%%\"*}\"--process_id=\$(PROCESS_ID)\""; fi
        continue
        ;;
    esac
    line="${line% #tpu}"
    line="${line//@NAME@/$name}"
    line="${line//@RESTARTS@/$restarts}"
    line="${line//@HOSTS@/$hosts}"
    line="${line//@GRACE@/$grace}"
    line="${line//@TPU@/$tpu}"
    line="${line//@TOPOLOGY@/$topology}"
    line="${line//@RESOURCE@/$resource}"
    line="${line//@DEVICES@/$devices}"
    line="${line//@IMAGE@/$image}"
    line="${line//@MOUNT@/$mount}"
    echo "${line//@CLAIM@/$claim}"
  done < "$ROOT/launch/pod/jobset.yaml"
}

manifest="$(render)"
if "$dry_run"; then echo "$manifest"; exit 0; fi
kubectl=(kubectl)
[[ -z "$namespace" ]] || kubectl+=(--namespace="$namespace")
"${kubectl[@]}" create --filename=- <<< "$manifest"
echo "follow: ${kubectl[*]} logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
echo "stop:   ${kubectl[*]} delete jobset $name   (saves a checkpoint; the same command resumes the run)"
