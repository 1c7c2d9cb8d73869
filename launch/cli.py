"""What all commands share: their flags, their errors, their logs and the compilation cache."""

from __future__ import annotations

import errno
import pathlib
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_IS_SCRIPT = (
    sys.argv[0].endswith(".py")
    and pathlib.Path(sys.argv[0]).resolve().parent == pathlib.Path(__file__).resolve().parent
)
if _IS_SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C kills the process until everything is imported: libraries that are being initialized
    # turn a KeyboardInterrupt into other errors.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    from absl import app, flags
    from cli_cache import keep_compiled_programs
    from cli_errors import UsageError, describe_flag_error, flag_value, print_error
    from cli_files import check_replaceable, check_writable_folder, write_json
    from cli_parse import CLOSED_OUTPUT, parse
    from cli_process import (
        configure_logs,
        escape_unencodable_output,
        interrupt,
        release_output,
    )
    from ml_collections import ConfigDict, config_flags
except ImportError as missing:
    sys.exit(
        f"error: the package {missing.name} is missing. Run `source .venv/bin/activate` (made by"
        " launch/quickstart.sh), or `pip install -e .`."
    )

__all__ = [
    "PREEMPTED",
    "ROOT",
    "UsageError",
    "check_replaceable",
    "check_writable_folder",
    "compute_dtype_flag",
    "config_flag",
    "distributed_flags",
    "experiment_flags",
    "flag_value",
    "join_processes",
    "load_config",
    "load_model",
    "require_one_of",
    "run",
    "write_json",
]

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREEMPTED = 75  # EX_TEMPFAIL: the launchers run the same command again
_ENVIRONMENT_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EIO,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""Errors of the operating system that are no bug of the program."""

sys.path.insert(0, str(ROOT))  # the commands also run from a checkout that is not installed


def experiment_flags() -> flags.FlagHolder:
    """Defines --workdir and --config, whose settings `--config.KEY=VALUE` overrides."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the experiment: its config, tokenizer, checkpoints, samples and report."
        " Commands that do not train also accept a bundle or the name of a released model.",
        required=True,
    )
    return config_flag(
        "Experiment file, such as configs/tiny.py:pydocs; default: WORKDIR/config.json."
        " --config.KEY=VALUE overrides a setting."
    )


def config_flag(help_text: str) -> flags.FlagHolder:
    """Defines only --config."""
    try:
        return config_flags.DEFINE_config_file("config", None, help_text, lock_config=True)
    except flags.Error as error:  # it already reads the command line, with its --flagfile
        raise SystemExit(print_error(describe_flag_error(sys.argv, error))) from None


def load_config(holder: flags.FlagHolder) -> ConfigDict:
    """Returns the validated config that the command line asks for.

    Args:
      holder: what `experiment_flags` or `config_flag` returned.

    Raises:
      UsageError: there is no config, or its file cannot be read.
      ConfigError: a setting is invalid.
    """
    from diladiff_jax import config

    try:
        # None if, for example, a flag without a value has taken --config=FILE as its value.
        if holder.value is None:
            raise UsageError(
                "--config is missing. Give an experiment file such as configs/tiny.py."
            )
        return config.resolve(holder.value)
    except OSError:  # config_flags reports an unreadable file only when its value is read
        raise UsageError(
            f"--config={flag_value(sys.argv, 'config')} cannot be read. Give an experiment file"
            " such as configs/tiny.py, followed by :ARGUMENT if it takes one."
        ) from None


def compute_dtype_flag() -> flags.FlagHolder:
    """Defines --compute_dtype."""
    return flags.DEFINE_enum(
        "compute_dtype",
        None,
        ["float32", "bfloat16"],
        "What the networks compute in, whatever they were trained in; default: float32 on CPUs,"
        " where bfloat16 is slow, and what they were trained in on accelerators.",
    )


def load_model(config: flags.FlagHolder, compute_dtype: flags.FlagHolder) -> Any:
    """Opens the workdir or bundle of --workdir, and prints a note if it computes in another type.

    Args:
      config: what `experiment_flags` returned.
      compute_dtype: what `compute_dtype_flag` returned.

    Returns:
      A `diladiff_jax.Model`.

    Raises:
      UsageError, and what `diladiff_jax.load` raises.
    """
    import diladiff_jax as dl

    workdir = flags.FLAGS.workdir
    model = dl.load(workdir, config=load_config(config), compute_dtype=compute_dtype.value)
    ours, theirs = model.experiment.compute_dtype, model.config.compute_dtype
    if ours != theirs:
        print(
            f"note: computes in {ours}; the config says {theirs} (--compute_dtype={theirs})",
            file=sys.stderr,
        )
    return model


def distributed_flags() -> None:
    """Defines the flags that join several processes in one run."""
    flags.DEFINE_string(
        "distributed",
        "",
        "How several processes find each other: auto (on a TPU pod, under SLURM or on Kubernetes), "
        "or HOST:PORT of the first process. Default: this is the only process.",
    )
    flags.DEFINE_integer(
        "num_processes",
        None,
        "With --distributed=HOST:PORT, the number of processes.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "process_id",
        None,
        "With --distributed=HOST:PORT, the number of this process, counted from 0.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "distributed_timeout",
        300,
        "Seconds to wait at startup for the other processes.",
        lower_bound=1,
    )


def require_one_of(flag: str, value: str, valid: Iterable[str]) -> None:
    """Checks a name that a flag gives.

    Raises:
      UsageError: it is not one of the valid names.
    """
    names = list(valid)
    if value not in names:
        raise UsageError(f"--{flag}: got {value!r}, expected one of {', '.join(names)}.")


def join_processes() -> None:
    """Starts the distributed runtime if the flags ask for it.

    Raises:
      UsageError: the flags do not belong together.
      DistributedError: the other processes cannot be reached.
    """
    from diladiff_jax.parallel import processes

    values = flags.FLAGS
    if values.distributed:
        processes.initialize_distributed(
            values.distributed,
            values.num_processes,
            values.process_id,
            timeout=values.distributed_timeout,
        )
    elif values.num_processes is not None or values.process_id is not None:
        raise UsageError(
            "--num_processes and --process_id need --distributed=HOST:PORT, the address of the"
            " first process."
        )


def run(main: Callable[[Sequence[str]], None], usage: str | None) -> None:
    """Runs a command and exits: 0 on success, 1 with one line on standard error on bad input.

    A traceback means a bug.

    Args:
      main: the command; it receives the program's name.
      usage: the text that --help begins with.
    """
    sys.modules["__main__"].__doc__ = usage
    # --help lists the flags of the script only, so count those defined here among them.
    for flag in flags.FLAGS.flags_by_module_dict().get(__name__, []):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    escape_unencodable_output()
    try:
        app.run(lambda argv: _run_guarded(main, argv), flags_parser=parse)
    finally:
        release_output()


def _run_guarded(main: Callable[[Sequence[str]], None], argv: Sequence[str]) -> int:
    """Runs `main` and maps its exceptions to an exit code and one line."""
    from diladiff_jax import ConfigError, DataError
    from diladiff_jax.console import say
    from diladiff_jax.jax_settings import pin_process
    from diladiff_jax.parallel import DeviceError, DistributedError, Preempted
    from diladiff_jax.storage import StorageError
    from diladiff_jax.training import TrainingError

    bad_input = (ConfigError, DataError, StorageError, UsageError)
    configure_logs()
    pin_process()
    if len(argv) > 1:
        return print_error(
            f"unexpected argument {argv[1]!r}, expected flags --NAME=VALUE. See --help."
        )
    keep_compiled_programs()
    try:
        if _IS_SCRIPT and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, interrupt)
        main(argv)
    except (*bad_input, TrainingError, DistributedError, DeviceError) as error:
        return print_error(str(error))
    except BrokenPipeError:
        return print_error(
            "standard output was closed by its reader. What was printed is complete up to there.",
            CLOSED_OUTPUT,
        )
    except OSError as error:
        if error.errno not in _ENVIRONMENT_ERRORS:
            raise
        return print_error(
            f"{error.filename or 'a file'} cannot be written or read: {error.strerror}. Free some"
            " space or give another path, and run the same command to resume."
        )
    except Preempted as stopped:
        say(str(stopped), error=True)
        return 130 if stopped.interrupted_by_user else PREEMPTED
    except KeyboardInterrupt:
        return print_error(
            "interrupted. What was saved is kept; run the same command to resume.", 130
        )
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).strip() or "out of memory").splitlines()[0]
        return print_error(
            f"this does not fit into memory: {reason}. Make the batches or the networks smaller."
        )
    return 0
