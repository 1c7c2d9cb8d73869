#!/usr/bin/env bash
# Runs on one host of a TPU pod; tpu.sh calls it.
#
#   bash launch/pod/worker.sh setup [SERVER:/EXPORT]   installs Python and packages, and mounts an NFS
#                                                      export at /shared.
#   bash launch/pod/worker.sh run RUN ARGUMENTS...     starts launch/train.py detached from this connection,
#                                                      follows it, and exits with its exit code. For the
#                                                      same RUN, or during another one, it only follows.
#   bash launch/pod/worker.sh logs | stop
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
state="$ROOT/.worker"
mkdir -p "$state"

setup() {
  if (($#)); then # in fstab, so that it is mounted again when the host reboots
    command -v mount.nfs > /dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; } || return
    grep -qs ' /shared nfs ' /etc/fstab || echo "$1 /shared nfs defaults,nofail,_netdev 0 0" | sudo tee -a /etc/fstab > /dev/null || return
    mountpoint -q /shared || { sudo mkdir -p /shared && sudo mount /shared; } || return
    [[ -w /shared ]] || sudo chmod a+rwx /shared || return
  fi
  if ! python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then # TPU images come with 3.10
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && python3 -m uv python install 3.12 || return
    DILADIFF_PYTHON="$(python3 -m uv python find --no-project 3.12)" || return
  fi
  setup_environment || return
  install_locked --requirement "$ROOT/launch/libtpu.lock" # everything that jax[tpu] adds to jax
}

# The training process and its children hold the lock, so it is free after a reboot.
running() { ! flock --nonblock "$state/lock" true; }

run() {
  local run="$1"
  shift
  if running; then
    echo "training is already running; following it"
  elif [[ "$(cat "$state/run" 2> /dev/null)" != "$run" ]]; then
    rm -f "$state/code" "$state/stopped" "$state/pid"
    echo "$run" > "$state/run"
    : > "$state/log"
    # shellcheck disable=SC2016  # the inner shell expands these
    setsid flock "$state/lock" bash -c '
      state="$1"; shift
      "$@" & echo $! > "$state/pid"; wait $!; echo $? > "$state/code"
    ' bash "$state" "$PYTHON" "$ROOT/launch/train.py" --distributed=auto "$@" >> "$state/log" 2>&1 < /dev/null &
    until [[ -s "$state/pid" ]]; do sleep 0.1; done
  fi
  tail -n +1 -f --pid="$(cat "$state/pid")" "$state/log"
  flock "$state/lock" true
  # No exit code means that the host went down during the training.
  [[ -s "$state/code" ]] || return "$PREEMPTED"
  if [[ -e "$state/stopped" ]]; then echo "stopped on request; run the same train command to resume"; return 143; fi
  return "$(cat "$state/code")"
}

logs() { tail -n 100 -F "$state/log"; }

stop() {
  running || { echo "no training is running"; return 0; }
  touch "$state/stopped"
  kill -TERM "$(cat "$state/pid")"
}

"$@"
