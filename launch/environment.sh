# Sourced by the other scripts. `setup_environment` creates .venv in the checkout and installs the
# packages of launch/*.lock, again whenever these files change. Sets PYTHON and ROOT.
# DILADIFF_PYTHON is the interpreter to create it with (default: python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="$ROOT/.venv/bin/python"

# Let the C allocator use huge pages (Linux). XLA on CPUs allocates memory all the time, and spent a
# third of each step on page faults.
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
    echo "error: DILADIFF_PYTHON: got $base, expected Python 3.11 or later. Set it to one." >&2
    return 1
  fi
  echo "setting up $ROOT/.venv (about a minute, once) ..."
  if ! "$base" -m venv "$ROOT/.venv"; then
    echo "error: $base -m venv failed. Install Python's venv module (on Debian: apt install python3-venv)." >&2
    return 1
  fi
  install_locked --requirement "$ROOT/launch/build.lock" || return 1
  # With build isolation, packages that come as source (promise, on some machines also
  # the shellcheck package) would be built with the newest setuptools, whose hash nobody has checked.
  install_locked --no-build-isolation --requirement "$ROOT/launch/requirements.lock" || return 1
  echo "$wanted" > "$stamp"
  link_library
}

# Checks every file against the hashes of its lock. A lock begins with the command that renews it.
install_locked() { "$PYTHON" -m pip install --quiet --quiet --disable-pip-version-check --require-hashes "$@"; }

# Installs the TPU compiler for launch/compile.py. Not where it can be imported, because JAX would
# then look for a TPU.
setup_libtpu() {
  local target="$ROOT/.venv/libtpu" lock="$ROOT/launch/libtpu.lock" # the version of the pinned jax
  [[ -f "$target/libtpu/libtpu.so" ]] && cmp --silent "$lock" "$target/lock" && return 0
  echo "installing libtpu in $target (once) ..."
  if ! install_locked --no-deps --upgrade --target "$target" --requirement "$lock"; then
    echo "warning: libtpu could not be installed. Tests that compile for TPUs will be skipped." >&2
    return 0
  fi
  cp "$lock" "$target/lock"
}

# Makes `import diladiff_jax` work in .venv from any folder, not only from the checkout.
link_library() {
  local folder
  for folder in "$ROOT"/.venv/lib/python*/site-packages; do
    echo "$ROOT" > "$folder/diladiff_jax.pth"
  done
}
