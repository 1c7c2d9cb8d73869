"""A damaged cache of compiled programs is repaired, and reported in one line."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT / "launch")!r}, {str(ROOT)!r}]
import cli_cache, jax
cli_cache.keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: x * 2 + 1)(3.0))
"""


def start(folder):
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "7.0\n"
    return done.stderr


def cut_short(data):
    return data[: len(data) // 2]


def other_bytes(data):
    return os.urandom(50)


@pytest.mark.parametrize("damage", [cut_short, other_bytes, lambda data: b""])
def test_a_damaged_entry_is_replaced(tmp_path, damage):
    """The second start compiles and reports it; the third finds a sound entry."""
    assert start(tmp_path) == ""
    entries = sorted(tmp_path.glob("*-cache"))
    sound = [path.stat().st_size for path in entries]
    for path in entries:
        path.write_bytes(damage(path.read_bytes()))
    lines = start(tmp_path).splitlines()
    assert lines and all(line.startswith("compilation cache: a damaged entry") for line in lines)
    assert [path.stat().st_size for path in sorted(tmp_path.glob("*-cache"))] == sound
    assert start(tmp_path) == ""
