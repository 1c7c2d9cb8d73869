#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments go to pytest, such as -m slow or tests/nn -x.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in -h | --help)
  sed -n '2s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
setup_environment || exit 1
setup_libtpu
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
