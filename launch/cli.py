"""What every command shares: flags, one-line errors, the compilation cache."""

from __future__ import annotations

import errno
import json
import logging
import os
import pathlib
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_SCRIPT = (
    sys.argv[0].endswith(".py")
    and pathlib.Path(sys.argv[0]).resolve().parent == pathlib.Path(__file__).resolve().parent
)
if _SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # until everything is imported: libraries' initialization makes other errors of an exception

try:
    import absl.logging
    from absl import app, flags
    from ml_collections import ConfigDict, config_flags
except ImportError as missing:
    sys.exit(
        f"error: the package {missing.name} is missing; `source .venv/bin/activate` (made by launch/quickstart.sh), or `pip install -e .` first"
    )

ROOT = pathlib.Path(__file__).resolve().parent.parent
PREEMPTED = 75  # exit code "run the same command again" (EX_TEMPFAIL), which the launchers do
_OUT_OF_OUR_HANDS = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP,
))  # fmt: skip
_LARGEST = 1 << 24  # bytes of a file that is looked at before it is replaced
_LONGEST_LINE = 800  # characters of an error; of a longer one, which quotes what was given, the middle is left out
sys.path.insert(
    0, str(ROOT)
)  # the commands run from a checkout as well as from an installed package


def experiment_flags() -> flags.FlagHolder:
    """Defines --config and --workdir; `--config.KEY=VALUE` overrides a setting."""
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of the experiment: config, tokenizer, checkpoints, samples, report.",
        required=True,
    )
    return config_flag(
        "Experiment file, e.g. configs/tiny.py:pydocs; default WORKDIR/config.json. --config.KEY=VALUE overrides a setting."
    )


def config_flag(text: str) -> flags.FlagHolder:
    """Defines --config alone."""
    try:
        return config_flags.DEFINE_config_file("config", None, text, lock_config=True)
    except (
        flags.Error
    ) as error:  # it looks at the command line already here: a --flagfile that cannot be read
        raise SystemExit(_refuse(_said(error))) from None


def experiment(config_flag: flags.FlagHolder) -> ConfigDict:
    """The checked experiment that the command line asks for."""
    from diladiff_jax import config

    try:
        if (
            config_flag.value is None
        ):  # as where a flag without a value has taken --config=FILE for its own
            raise UsageError("--config is missing; give an experiment file such as configs/tiny.py")
        return config.resolve(config_flag.value)
    except OSError:  # the flag holder reports a file that it could not load only when it is read
        path = given(sys.argv, "config")
        raise UsageError(
            f"--config={path} cannot be read; give an experiment file such as configs/tiny.py, with :ARGUMENT if it takes one"
        ) from None


def distributed_flags() -> None:
    """Defines what joins several processes to one run."""
    flags.DEFINE_string(
        "distributed",
        "",
        "Several processes: auto (as the TPU pod, SLURM or Kubernetes says), or the first one's HOST:PORT.",
    )
    flags.DEFINE_integer(
        "num_processes", None, "With HOST:PORT, how many processes there are.", lower_bound=1
    )
    flags.DEFINE_integer(
        "process_id", None, "With HOST:PORT, which of them this is, from 0.", lower_bound=0
    )
    flags.DEFINE_integer(
        "distributed_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1
    )


def join_processes() -> None:
    """Starts the distributed runtime where the flags ask for it. Raises `DistributedError`."""
    from diladiff_jax.parallel import processes

    given = flags.FLAGS
    if given.distributed:
        processes.initialize_distributed(
            given.distributed,
            given.num_processes,
            given.process_id,
            timeout=given.distributed_timeout,
        )
    elif given.num_processes is not None or given.process_id is not None:
        raise UsageError(
            "--num_processes and --process_id need --distributed=HOST:PORT, the address of the first process"
        )


def run(main: Callable[[Sequence[str]], None], usage: str) -> None:
    """Runs a command: bad input ends in one line on standard error and exit code 1; a traceback means a bug."""

    def guarded(argv: Sequence[str]) -> int:
        from diladiff_jax import ConfigError, DataError
        from diladiff_jax.parallel.processes import DistributedError, Preempted
        from diladiff_jax.storage import StorageError
        from diladiff_jax.training.loop import TrainingError

        _quiet_logs()
        if len(argv) > 1:
            return _refuse(
                f"unexpected argument {argv[1]!r}; flags are written --name=value (see --help)"
            )
        _compilation_cache()
        try:
            if _SCRIPT and signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
                signal.signal(signal.SIGINT, _interrupt)
            main(argv)
        except (
            ConfigError,
            DataError,
            StorageError,
            TrainingError,
            DistributedError,
            UsageError,
        ) as error:
            return _refuse(str(error))
        except OSError as error:
            if error.errno not in _OUT_OF_OUR_HANDS:
                raise
            return _refuse(
                f"{error.filename or 'a file'} cannot be written or read ({error.strerror}); make room or give another place, and the same command goes on"
            )
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            return 130 if stopped.interrupted_by_user else PREEMPTED
        except Exception as error:
            if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return _refuse(
                f"this does not fit into memory ({str(error).strip().splitlines()[0] if str(error).strip() else 'out of memory'}); make batches or networks smaller"
            )
        except KeyboardInterrupt:
            return _refuse(
                "stopped; what was saved is kept, and the same command goes on from that", 130
            )
        return 0

    sys.modules["__main__"].__doc__ = usage
    for flag in flags.FLAGS.flags_by_module_dict().get(
        __name__, []
    ):  # --help shows those of the script alone
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, flags_parser=_parse)


class UsageError(ValueError):
    """A command line that cannot be: one line."""


def writable_folder(flag: str, path: str) -> None:
    """Makes the folder that a flag names, before work begins whose results it shall hold.

    Raises:
      UsageError: it cannot be made or written.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(
            f"--{flag}={path} cannot be written ({error.strerror}); give a folder that can be"
        ) from None


def replaceable(
    flag: str, path: pathlib.Path, keys: set[str], what: str, *, lines: bool = False
) -> None:
    """Looks, before work begins, at the file that a flag names: it may be new, empty, or an earlier one of its kind, whose JSON has these keys.

    Args:
      what: the kind, as "samples".
      lines: whether it is JSON Lines, of which the first is looked at.

    Raises:
      UsageError: its folder cannot be made or written, or something else is there.
    """
    writable_folder(flag, str(path.absolute().parent))
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"--{flag}={path} is no file; give one")
    try:
        with path.open("rb") as data:
            head = data.readline(_LARGEST) if lines else data.read(_LARGEST)
        if not head or keys <= json.loads(head).keys():
            return
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(
            f"--{flag}={path} cannot be written ({error.strerror}); give a file in a folder that can be"
        ) from None
    except (ValueError, RecursionError, AttributeError):
        pass
    raise UsageError(
        f"--{flag}={path} is there and holds no {what}; give another file, or remove it"
    )


def write_json(flag: str, path: pathlib.Path, document: dict[str, Any]) -> None:
    """Writes the file that a flag names, aside and then renamed.

    Raises:
      UsageError: it cannot be written.
    """
    from diladiff_jax import files

    try:
        files.atomic_write_text(path, json.dumps(document, indent=2) + "\n")
    except OSError as error:
        raise UsageError(
            f"--{flag}={path} cannot be written ({error.strerror}); give a file in a folder that can be"
        ) from None


def _parse(argv: Sequence[str]) -> Sequence[str]:
    argv, lent = list(argv), False
    workdir = given(argv, "workdir")
    for name in ("workdir", "init_from"):
        if given(argv, name) == "":
            raise SystemExit(
                _refuse(f"--{name} is empty; give an experiment's folder, --{name}=DIR")
            )
    if given(argv, "config") is None and workdir is not None and "config" in flags.FLAGS:
        # Before the overrides, which are laid over what it loads. A fresh workdir has the settings of the one it starts from.
        folder = (
            workdir
            if os.path.exists(os.path.join(workdir, "config.json"))
            else given(argv, "init_from") or workdir
        )
        argv.insert(1, f"--config={pathlib.Path(__file__).with_name('workdir_config.py')}:{folder}")
        lent = folder != workdir and os.path.exists(os.path.join(folder, "bundle.json"))
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        if any(
            word.startswith("-")
            and word.lstrip("-").partition("=")[0]
            in ("help", "helpshort", "helpfull", "helpxml", "?")
            for word in argv[1:]
        ):
            raise SystemExit(0) from None  # absl ends it with 1
        raise SystemExit(
            _refuse(
                f"--config={given(argv, 'config')} ends the command; it must define get_config()"
            )
        ) from None
    except flags.Error as error:
        if workdir is None and "--workdir" in str(error):
            raise SystemExit(
                _refuse("--workdir is missing; give the experiment's folder, --workdir=DIR")
            ) from None
        raise SystemExit(_refuse(_said(error))) from None
    except (AttributeError, KeyError) as error:  # an override of a setting that is not there
        reason = str(error.args[0])
        if "get_config" in reason:
            raise SystemExit(
                _refuse(
                    f"--config={given(argv, 'config')} is no experiment file: it has no get_config()"
                )
            ) from None
        raise SystemExit(_refuse(_unknown_setting(argv, reason))) from None
    except SyntaxError as error:
        raise SystemExit(
            _refuse(
                f"--config={given(argv, 'config')} is no experiment file, which is Python and defines get_config() ({error})"
            )
        ) from None
    except Exception as error:  # an experiment file may raise anything
        named = isinstance(error, OSError | ImportError | TypeError | ValueError) and str(error)
        reason = named or f"{type(error).__name__} {error}".strip()
        if isinstance(error, TypeError) and "get_config" in reason:
            reason = f"this experiment takes no :ARGUMENT ({reason})"
        raise SystemExit(
            _refuse(
                reason
                if given(argv, "config") is None or "config" in reason
                else f"--config={given(argv, 'config')}: {reason}"
            )
        ) from None
    # Settings that came from elsewhere fetch nothing by themselves.
    if (
        lent
        and given(argv, "config.data.corpus") is None
        and (corpus := flags.FLAGS.config.data.corpus) not in ("stories", "pydocs")
    ):
        if corpus == "text_files" and given(argv, "config.data.files") is None:
            raise SystemExit(
                _refuse(
                    f"the bundle {folder} was trained on files called {flags.FLAGS.config.data.files!r}; say where your text is, --config.data.files=FOLDER"
                )
            )
        if corpus != "text_files":
            raise SystemExit(
                _refuse(
                    f"the bundle {folder} was trained on {corpus!r}, which would be fetched; say --config.data.corpus={corpus} if it may be, or where it is, --config.data.corpus=FOLDER"
                )
            )
    return rest


def _said(error: flags.Error) -> str:
    """What a user reads of an error in the flags."""
    text = str(error)
    number = re.fullmatch(
        r"(?s)flag --([\w.]+)=(.*): (?:invalid literal for int|could not convert string to float|Exceeds the limit).*",
        text,
    )
    if number is not None:
        return f"--{number[1]}={number[2]}: it must be a {'' if 'to float' in text else 'whole '}number"
    if boolean := re.fullmatch(r"(?s)flag --([\w.]+)=(.*): \('Non-boolean.*", text):
        return f"--{boolean[1]}={boolean[2]}: it must be true or false"
    # A config file's own error arrives as a traceback in text; its last line is what happened.
    if "Traceback" in text:
        text = [line for line in text.splitlines() if line.strip()][-1]
    return re.sub(r"^[\w.]*Error: ", "", text.strip().removeprefix("ERROR:: "))


def _unknown_setting(argv: Sequence[str], reason: str) -> str:
    """What a user reads where ml_collections knows no such setting, with the flag that asked for it and the nearest one that is there."""
    found, near = re.search(r"\w+", reason), re.search(r'mean "(\w+)"', reason)
    name = found[0] if found else ""
    keys = [
        word.lstrip("-").partition("=")[0]
        for word in argv[1:]
        if word.lstrip("-").startswith("config.")
    ]
    asked = next((key for key in keys if name in key.split(".")[1:]), None)
    if asked is None:  # not by a flag: the experiment file's own doing
        return f"--config={given(argv, 'config')}: there is no {reason}"
    return f"--{asked}: there is no setting {name}" + (
        f"; did you mean {near[1]}?" if near else "; diladiff_jax/config.py has them all"
    )


def given(argv: Sequence[str], name: str) -> str | None:
    """The value of --NAME=VALUE or --NAME VALUE on the command line: of several the last, as flags have it."""
    found = None
    for i, word in enumerate(argv[1:], 1):
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("-") and key == name:
            found = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
    return found


def _refuse(message: str, code: int = 1) -> int:
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in " ".join(message.split())
    )  # it may quote any bytes
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    return code


def _interrupt(number: int, frame: FrameType | None) -> None:
    """KeyboardInterrupt; a moment later where it would be lost: in JAX's callback of the garbage collector, which no exception leaves."""
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def _quiet_logs() -> None:
    """The library's own notes are shown; its dependencies' only from warnings on."""
    absl.logging.set_verbosity(absl.logging.WARNING)
    # What fails in a thread of Orbax's is raised where it is waited for, and becomes one line there.
    absl.logging.get_absl_handler().addFilter(
        lambda record: not {"orbax", "asyncio"} & set(pathlib.Path(record.pathname).parts)
    )
    # Where one of many reads or writes fails, TensorStore's threads come back with the others when nobody waits for them any more.
    sys.unraisablehook = lambda found: (
        None if str(found.exc_value) == "Event loop is closed" else sys.__unraisablehook__(found)
    )
    ours, handler = logging.getLogger("diladiff_jax"), logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _compilation_cache() -> None:
    """Keeps compiled programs between runs; JAX_COMPILATION_CACHE_DIR moves it, an empty value turns it off."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update(
            "jax_compilation_cache_dir",
            str(pathlib.Path.home() / ".cache" / "diladiff_jax" / "xla"),
        )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
