#!/usr/bin/env bash
# Sets up the environment and checks everything: formatting, lint, types and tests.
# With arguments it runs only pytest, with these arguments (for example: -m slow, or tests/diffusion -x).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in -h | --help)
  sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
  ;;
esac
setup_environment || exit 1
setup_libtpu
cd "$ROOT"
if (($# == 0)); then
  "$PYTHON" -m ruff format --check
  "$PYTHON" -m ruff check
  "$PYTHON" -m pyright
fi
exec "$PYTHON" -m pytest "$@"
