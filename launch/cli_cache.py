"""The cache of compiled programs between runs, which repairs itself."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import re
import warnings
from typing import Any

_READ_ERROR = re.compile(r"Error reading persistent compilation cache entry for '(.+?)'")
_WRITE_ERROR = re.compile(r"(?s)Error writing persistent compilation cache entry for '.+?': (.*)")


def keep_compiled_programs() -> None:
    """Keeps compiled programs between runs.

    JAX_COMPILATION_CACHE_DIR moves the cache; an empty value turns it off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = pathlib.Path.home() / ".cache" / "diladiff_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    repair_damaged_entries()


def repair_damaged_entries() -> None:
    """Removes an entry that JAX cannot read, in time for JAX to write it again.

    JAX itself warns at each start, compiles, and leaves the damaged file where it is.
    """
    show, reported = warnings.showwarning, set[str]()

    def say_once(line: str) -> None:
        from diladiff_jax.console import say

        if line not in reported:
            reported.add(line)
            say(line, error=True)

    def repair(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = str(message)
        if found := _READ_ERROR.search(text):
            count = _remove(found[1])
            outcome = "removed and compiled again" if count else "compiled again"
            say_once(f"compilation cache: a damaged entry of {found[1]} is {outcome}")
        elif found := _WRITE_ERROR.search(text):
            reason = found[1].strip().partition("\n")[0][:200]
            say_once(f"compilation cache: cannot be written ({reason}); programs compile each time")
        else:
            show(message, category, *place, **more)

    warnings.filterwarnings("always", message="Error (reading|writing) persistent compilation")
    warnings.showwarning = repair


def _remove(program: str) -> int:
    """Removes the damaged entries of a program; all of its entries if none looks damaged."""
    import jax

    folder = pathlib.Path(jax.config.jax_compilation_cache_dir or "")
    entries = [path for path in folder.glob(f"{glob.escape(program)}-*-cache") if path.is_file()]
    damaged = [path for path in entries if not _unpacks(path)]
    for path in damaged or entries:
        with contextlib.suppress(OSError):
            path.unlink()
    return len(damaged or entries)


def _unpacks(path: pathlib.Path) -> bool:
    """Whether the entry can be decompressed."""
    import zstandard

    try:
        zstandard.ZstdDecompressor().decompress(path.read_bytes(), max_output_size=1 << 32)
    except (OSError, zstandard.ZstdError, MemoryError):
        return False
    return True
