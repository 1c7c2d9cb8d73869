#!/usr/bin/env bash
# On one host of a TPU pod, called by tpu.sh.
#
#   bash launch/pod/worker.sh setup [SERVER:/EXPORT]   Python, packages, and an NFS export mounted at /shared
#   bash launch/pod/worker.sh run RUN ARGUMENTS...     launch/train.py, apart from this connection; follows it and ends with its exit
#                                                      code. Called again for the same RUN, or while one runs, it only follows.
#   bash launch/pod/worker.sh logs | stop
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
state="$ROOT/.worker"
mkdir -p "$state"

setup() {
  if (($#)); then # in fstab, so that a host that starts again has it
    command -v mount.nfs > /dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; } || return
    grep -qs ' /shared nfs ' /etc/fstab || echo "$1 /shared nfs defaults,nofail,_netdev 0 0" | sudo tee -a /etc/fstab > /dev/null || return
    mountpoint -q /shared || { sudo mkdir -p /shared && sudo mount /shared; } || return
    [[ -w /shared ]] || sudo chmod a+rwx /shared || return
  fi
  if ! python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then # TPU images had 3.10
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && python3 -m uv python install 3.12 || return
    DILADIFF_PYTHON="$(python3 -m uv python find --no-project 3.12)" || return
  fi
  setup_environment || return
  install_locked --requirement "$ROOT/launch/libtpu.lock" # all that jax[tpu] adds to jax
}

# The lock belongs to the training and its children: a host that starts again has none.
running() { ! flock --nonblock "$state/lock" true; }

run() {
  local run="$1"
  shift
  if running; then
    echo "training runs already; following it"
  elif [[ "$(cat "$state/run" 2> /dev/null)" != "$run" ]]; then
    rm -f "$state/code" "$state/stopped" "$state/pid"
    echo "$run" > "$state/run"
    : > "$state/log"
    # shellcheck disable=SC2016  # expanded by the inner shell
    setsid flock "$state/lock" bash -c '
      state="$1"; shift
      "$@" & echo $! > "$state/pid"; wait $!; echo $? > "$state/code"
    ' bash "$state" "$PYTHON" "$ROOT/launch/train.py" --distributed=auto "$@" >> "$state/log" 2>&1 < /dev/null &
    until [[ -s "$state/pid" ]]; do sleep 0.1; done
  fi
  tail -n +1 -f --pid="$(cat "$state/pid")" "$state/log"
  flock "$state/lock" true
  # Without a code the host went down with the training.
  [[ -s "$state/code" ]] || return "$PREEMPTED"
  if [[ -e "$state/stopped" ]]; then echo "stopped on request; the same train goes on"; return 143; fi
  return "$(cat "$state/code")"
}

logs() { tail -n 100 -F "$state/log"; }

stop() {
  running || { echo "nothing runs"; return 0; }
  touch "$state/stopped"
  kill -TERM "$(cat "$state/pid")"
}

"$@"
