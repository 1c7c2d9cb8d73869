#!/usr/bin/env bash
# Sets up and runs the tests; arguments go to pytest (for example: -m slow, or tests/diffusion -x).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
setup_environment || exit 1
setup_libtpu
cd "$ROOT"
exec "$PYTHON" -m pytest "$@"
