#!/usr/bin/env bash
# Trains on a TPU pod (v2 to v6e; for later ones see kubernetes.sh) from a workstation, through gcloud.
#
#   bash launch/pod/tpu.sh create --name=NAME --zone=ZONE --accelerator=v5litepod-16 --version=v2-alpha-tpuv5-lite [--spot]
#   bash launch/pod/tpu.sh setup  --name=NAME --zone=ZONE [--share=SERVER:/EXPORT]
#   bash launch/pod/tpu.sh train  --name=NAME --zone=ZONE -- --config=configs/large.py --workdir=/shared/run --stage=all
#   bash launch/pod/tpu.sh logs | stop | delete  --name=NAME --zone=ZONE
#
#   create   asks for the pod (a queued resource) and waits until it is there.
#   setup    copies this checkout to every host, with its Python and packages. --share: an NFS export (Filestore, say),
#            mounted at /shared on every host; workdirs belong there.
#   train    runs launch/train.py on every host, and again for as long as it exits with 75 (preempted, checkpoint saved) or
#            the pod is under repair; after a host died unseen (134), --restarts times. Ends with the exit code of the
#            training. Training goes on without this terminal; the same command, or logs, follows it again.
#   stop     asks the training to save a checkpoint and end; train with the same arguments goes on from there.
#
#   --name, --zone            of the pod; needed by all.
#   --project                 default: gcloud's.
#   --accelerator, --version  type and runtime, as gcloud compute tpus accelerator-types list and versions list show them.
#   --recreate                with train (and create's options): a pod that was taken away is deleted, created, set up and trained on.
#   --restarts                with train; default 3.
#   --worker                  with logs: the host to follow, or all; default 0.
#   --dry-run                 prints the commands, and runs none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

[[ "${1:-}" != -h && "${1:-}" != --help ]] || { usage; exit 0; }
command="${1:-}"
case "$command" in
  create | setup | train | logs | stop | delete) shift ;;
  *) refuse "'$command' is not a command; there are create, setup, train, logs, stop and delete (see --help)" ;;
esac
name="" zone="" project="" accelerator="" version="" share="" worker=0 restarts=3 spot=false recreate=false
parse "name zone project accelerator version share worker restarts" "spot recreate" "$@"

need name '[a-z]([a-z0-9-]*[a-z0-9])?' "the pod's name, in lower-case letters, digits and hyphens"
need zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
need worker '[0-9]+|all' "the number of a host, or all"
need restarts '[0-9]+' "a number"
[[ -z "$project" ]] || need project '[a-z][a-z0-9.:-]*' "a project's id"
[[ -z "$share" ]] || need share '[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*' "an NFS export, SERVER:/EXPORT"
if [[ "$command" == create || "$recreate" == true ]]; then
  need accelerator '[a-z0-9]+-[0-9]+' "a type such as v5litepod-16"
  need version '[a-z0-9.-]+' "a runtime such as v2-alpha-tpuv5-lite"
fi
if [[ "$command" == train ]]; then
  check_arguments /shared
elif ((${#arguments[@]})); then
  refuse "$command takes no arguments after --"
fi
"$dry_run" || [[ -n "$(type -P gcloud)" ]] || refuse "gcloud is not installed; see https://cloud.google.com/sdk/docs/install"
place=(--zone="$zone")
[[ -z "$project" ]] || place+=(--project="$project")

# on HOSTS COMMAND: runs a shell command on one host, or on all; ends with the first exit code that is not 0.
on() { execute gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" --command="$2"; }

create() {
  local state flags=(--accelerator-type="$accelerator" --runtime-version="$version")
  if "$spot"; then flags+=(--spot); fi
  execute gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" "${flags[@]}" || return
  while true; do
    state="$(execute gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format='value(state.state)')" || return
    if "$dry_run"; then echo "$state  # until it is ACTIVE"; return 0; fi
    echo "$name is $state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPEND* | DELETING) echo "error: the request for $name is $state; delete it and ask again" >&2; return 1 ;;
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
    # After a lost connection (255 is ssh's own code) the same run is followed; any other time it is another.
    "$dry_run" || ((code == 255)) || run="$(date +%Y%m%d-%H%M%S)"
    code=0
    on all "bash diladiff/launch/pod/worker.sh run $run $(quoted "${arguments[@]}")" || code=$?
    if "$dry_run"; then
      echo "# again, as another RUN, for as long as it exits with $PREEMPTED"
      "$recreate" || return 0
      echo "# and each time that the pod was taken away, before that:"
      delete && create && setup
      return
    fi
    ((code)) || return 0
    state="$(gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)')" || state="out of reach"
    echo "exit code $code; $name is $state"
    case "$code/$state" in
      "$PREEMPTED/READY" | 255/READY | */CREATING | */STARTING | */RESTARTING | */REIMAGING | */REPAIRING) ;;
      "$ABORTED/READY") ((restarts-- > 0)) || return "$code" ;;
      */PREEMPTED | */TERMINATED)
        if ! "$recreate"; then
          echo "error: the pod was taken away; after delete, create and setup the same train goes on (--recreate does all that)" >&2
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
