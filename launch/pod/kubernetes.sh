#!/usr/bin/env bash
# Trains as a JobSet on the Kubernetes cluster that kubectl points to.
#
#   bash launch/pod/kubernetes.sh --name=run1 --image=IMAGE --claim=CLAIM --tpu=tpu-v5-lite-podslice --topology=4x4 \
#     -- --config=configs/large.py --workdir=/shared/run1 --stage=all
#   bash launch/pod/kubernetes.sh --name=run1 --image=IMAGE --claim=CLAIM --gpus=8 --hosts=4 -- ...
#
#   --image       holds the checkout as its working folder, and its packages (docs/pods.md shows how to build it).
#   --claim       a persistent volume claim that all hosts may write (ReadWriteMany), mounted at --mount, by default /shared;
#                 workdirs belong there.
#   --tpu, --topology   GKE's names of the accelerator and of the slice; --chips of one host, default 4. The number of hosts follows.
#   --gpus, --hosts     GPUs of one host (nvidia.com/gpu), and the number of hosts, default 1. One process a host.
#   --namespace   default: kubectl's.
#   --restarts    how often the run may restart after a host died unseen by Kubernetes; default 3.
#   --grace       seconds that a pod has to save and end; default 120.
#   --dry-run     prints the manifest, and sends nothing.
#
# A pod that ends with 75 (preempted, checkpoint saved), or is evicted, or loses its node, restarts the whole run, without
# limit; one that ends with 134 (JAX gave up on a lost host) restarts it --restarts times; any other exit code fails it.
# A run that ended keeps its name until `kubectl delete jobset NAME`; after that the same command goes on with it.
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
need grace '[1-9][0-9]*' "a number of seconds"
[[ -z "$namespace" ]] || need namespace '[a-z0-9]([a-z0-9-]*[a-z0-9])?' "a namespace"
[[ -z "$tpu" || -z "$gpus" ]] || refuse "--tpu and --gpus exclude each other"
if [[ -n "$tpu" ]]; then
  need tpu 'tpu[a-z0-9-]+' "GKE's name of a TPU, such as tpu-v5-lite-podslice"
  need topology '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "the slice's topology, such as 4x4"
  [[ -z "$hosts" ]] || refuse "--hosts follows from --topology and --chips; leave it out"
  chips="${chips:-4}"
  need chips '[1-9][0-9]*' "the chips of one host"
  slice="$((${topology//x/*}))"
  ((slice % chips == 0)) || refuse "--topology=$topology has $slice chips, which hosts of --chips=$chips do not divide"
  kind=tpu resource=google.com/tpu devices="$chips" hosts="$((slice / chips))"
elif [[ -n "$gpus" ]]; then
  [[ -z "$topology$chips" ]] || refuse "--topology and --chips are for --tpu"
  hosts="${hosts:-1}"
  need gpus '[1-9][0-9]*' "the GPUs of one host"
  need hosts '[1-9][0-9]*' "the number of hosts"
  kind=gpu resource=nvidia.com/gpu devices="$gpus"
else
  refuse "no accelerator; give --tpu and --topology, or --gpus and --hosts"
fi
check_arguments "$mount"
workdir_on "$mount"
[[ "${arguments[*]}" != *[[:cntrl:]]* ]] || refuse "an argument has a control character (a line's end, say); leave it out"
"$dry_run" || [[ -n "$(type -P kubectl)" ]] || refuse "kubectl is not installed; see https://kubernetes.io/docs/tasks/tools"

# A word as YAML writes it; $$ is Kubernetes's $, so that it expands no $(NAME) in it.
yaml_string() {
  local word="$1"
  word="${word//\\/\\\\}"
  word="${word//\"/\\\"}"
  echo "\"${word//\$/\$\$}\""
}

# GKE tells TPU hosts about each other, which JAX reads. GPU hosts are told here: the first is the coordinator.
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
echo "stop:   ${kubectl[*]} delete jobset $name   (a checkpoint is saved first; the same command goes on)"
