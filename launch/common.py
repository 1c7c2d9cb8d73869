"""What every command shares: flags, one-line errors, the compilation cache."""

from __future__ import annotations

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence

import absl.logging
from absl import app, flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the commands run from a checkout as well as from an installed package


def experiment_flags(*, config_required: bool) -> flags.FlagHolder:
    """Defines --config and --workdir; `--config.KEY=VALUE` overrides a setting."""
    flags.DEFINE_string("workdir", None, "Folder of the experiment: config, tokenizer, checkpoints, samples, report.", required=True)
    return config_flags.DEFINE_config_file(
        "config", None, "Experiment file, e.g. configs/tiny.py:stories." + ("" if config_required else " Default: WORKDIR/config.json."), lock_config=True
    )


def run(main: Callable[[Sequence[str]], None], usage: str) -> None:
    """Runs a command: bad input ends in one line on standard error and exit code 1; a traceback means a bug."""

    def guarded(argv: Sequence[str]) -> int:
        from diladiff_jax import CheckpointError, ConfigError, DataError
        from diladiff_jax.training.loop import TrainingError

        _quiet_logs()
        if len(argv) > 1:
            return _refuse(f"unexpected argument {argv[1]!r}; flags are written --name=value (see --help)")
        _compilation_cache()
        try:
            main(argv)
        except (ConfigError, DataError, CheckpointError, TrainingError, UsageError) as error:
            return _refuse(str(error))
        except KeyboardInterrupt:
            return _refuse("stopped; the same command goes on from the last checkpoint", 130)
        return 0

    sys.modules["__main__"].__doc__ = usage
    app.run(guarded, flags_parser=_parse)


class UsageError(ValueError):
    """A command line that cannot be: one line."""


def _parse(argv: Sequence[str]) -> Sequence[str]:
    try:
        return app.parse_flags_with_usage(list(argv))
    except (AttributeError, FileNotFoundError, ImportError, KeyError, SyntaxError, TypeError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise SystemExit(_refuse(lines[0] if lines else type(error).__name__)) from None


def _refuse(message: str, code: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _quiet_logs() -> None:
    """The library's own notes are shown; its dependencies' only from warnings on."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    ours, handler = logging.getLogger("diladiff_jax"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _compilation_cache() -> None:
    """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR moves it, an empty value turns it off."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "diladiff_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
