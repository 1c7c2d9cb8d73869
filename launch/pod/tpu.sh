#!/usr/bin/env bash
# Trains on a TPU pod (v2 to v6e; see kubernetes.sh for later ones) from a workstation with gcloud.
#
#   bash launch/pod/tpu.sh create --name=NAME --zone=ZONE --accelerator=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot]
#   bash launch/pod/tpu.sh setup  --name=NAME --zone=ZONE [--share=SERVER:/EXPORT]
#   bash launch/pod/tpu.sh train  --name=NAME --zone=ZONE -- --config=configs/large.py --workdir=/shared/run --stage=all
#   bash launch/pod/tpu.sh logs | stop | delete  --name=NAME --zone=ZONE
#
#   create   requests the pod as a queued resource, and waits until it is active.
#   setup    copies this checkout to every host, and installs Python and the packages there.
#   train    runs launch/train.py on every host, prints its output and exits with its exit code. It runs
#            it again while the exit code is 75 (preempted, checkpoint saved) or the pod is under repair,
#            and up to --restarts times after a host died unnoticed (134). Training does not need this
#            terminal: it continues without it, and the same command, or logs, follows it again.
#   logs     follows the output of the training.
#   stop     makes the training save a checkpoint and exit; train with the same arguments resumes it.
#   delete   deletes the pod.
#
#   --name, --zone            of the pod; required.
#   --project                 default: the project that gcloud uses.
#   --accelerator, --version  type and runtime of the pod, as listed by
#                             gcloud compute tpus accelerator-types list and versions list.
#   --spot                    with create: a spot pod, which is cheaper and may be preempted.
#   --share                   with setup: an NFS export, such as Filestore, to mount at /shared on every
#                             host. Workdirs belong there.
#   --recreate                with train and the options of create and setup: if the pod is preempted,
#                             deletes it, creates and sets up another one, and resumes training.
#   --restarts                with train; default 3.
#   --worker                  with logs: the number of the host, or all; default 0.
#   --dry-run                 prints the commands without running them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ "${1:-}" != -h && "${1:-}" != --help ]] || { usage; exit 0; }
command="${1:-}"
case "$command" in
  create | setup | train | logs | stop | delete) shift ;;
  *) refuse "command: got '$command', expected create, setup, train, logs, stop or delete. See --help." ;;
esac
name="" zone="" project="" accelerator="" version="" share="" worker=0 restarts=3 spot=false recreate=false
parse "name zone project accelerator version share worker restarts" "spot recreate" "$@"

need name '[a-z]([a-z0-9-]*[a-z0-9])?' "a name of lower-case letters, digits and hyphens"
need zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone, for example us-west4-a"
need worker '[0-9]+|all' "the number of a host or all"
need restarts '[0-9]+' "a number"
[[ -z "$project" ]] || need project '[a-z][a-z0-9.:-]*' "the id of a project"
[[ -z "$share" ]] || need share '[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*' "an NFS export in the form SERVER:/EXPORT"
if [[ "$command" == create || "$recreate" == true ]]; then
  need accelerator '[a-z0-9]+-[0-9]+' "a type, for example v5litepod-16"
  need version '[a-z0-9.-]+' "a runtime, for example v2-alpha-tpuv5-lite"
fi
if [[ "$command" == train ]]; then
  check_arguments /shared
elif ((${#arguments[@]})); then
  refuse "$command: got arguments after --, expected none"
fi
"$dry_run" || [[ -n "$(type -P gcloud)" ]] || refuse "gcloud is not installed. See https://cloud.google.com/sdk/docs/install"
place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")

# on HOSTS COMMAND: runs a shell command on one host or all; returns the first exit code other than 0.
on() { execute gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

create() {
  local state flags=(--accelerator-type="$accelerator" --runtime-version="$version")
  if "$spot"; then flags+=(--spot); fi
  execute gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" "${flags[@]}" || return
  while true; do
    state="$(execute gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')" || return
    if "$dry_run"; then echo "$state  # repeated until the state is ACTIVE"; return 0; fi
    echo "$name is $state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND* | DELETING) echo "error: the request for $name is $state, expected ACTIVE. Delete it and create it again." >&2; return 1 ;;
    esac
    sleep "${DILADIFF_POLL_SECONDS:-30}"
  done
}

setup() {
  local archive="${TMPDIR:-/tmp}/diladiff-$name.tgz"
  execute tar -C "$ROOT" --exclude=./.git --exclude=./.venv --exclude=./runs -czf "$archive" . || return
  execute gcloud compute tpus tpu-vm scp "$archive" "$name:diladiff.tgz" "${place[@]}" --worker=all || return
  execute rm -f "$archive"
  on all "mkdir -p diladiff && tar -xzf diladiff.tgz -C diladiff && bash diladiff/launch/pod/worker.sh setup $share"
}

train() {
  local run=RUN code=0 state
  while true; do
    # 255 is ssh's own exit code: the connection was lost, so follow the same run instead of starting
    # another one.
    "$dry_run" || ((code == 255)) || run="$(date +%Y%m%d-%H%M%S)"
    code=0
    on all "bash diladiff/launch/pod/worker.sh run $run $(quoted "${arguments[@]}")" || code=$?
    if "$dry_run"; then
      echo "# repeated with another RUN while it exits with $PREEMPTED"
      "$recreate" || return 0
      echo "# each time the pod is preempted, before the next run:"
      delete && create && setup
      return
    fi
    ((code)) || return 0
    state="$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)')" || state="unreachable"
    echo "exit code $code; $name is $state"
    case "$code/$state" in
      "$PREEMPTED/READY" | 255/READY | */CREATING | */STARTING | */RESTARTING | */REIMAGING | */REPAIRING) ;;
      "$ABORTED/READY") ((restarts-- > 0)) || return "$code" ;;
      */PREEMPTED | */TERMINATED)
        if ! "$recreate"; then
          echo "error: the pod was preempted. Run delete, create and setup, then the same train to resume (or use --recreate)." >&2
          return "$code"
        fi
        delete && create && setup || return
        ;;
      *) return "$code" ;;
    esac
    sleep "${DILADIFF_POLL_SECONDS:-30}"
  done
}

logs() { on "$worker" "bash diladiff/launch/pod/worker.sh logs"; }
stop() { on all "bash diladiff/launch/pod/worker.sh stop"; }
delete() { execute gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet; }

"$command"
