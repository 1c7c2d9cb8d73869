"""Runs the commands of launch/ in a twentieth of their time: a server imports, and forks run them.

One process imports what all commands import. Each command runs in a fork of it, which behaves like
`python launch/X.py ...` except for the imports: it parses the flags, waits for its threads and ends
with an exit code. It is killed with everything that it started if it exceeds a time limit. No JAX
backend is started before a fork, because threads do not survive it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"
_IMPORTS = (
    "diladiff_jax.evaluation.sweep",
    "diladiff_jax.training.loop",
    "grain",
    "matplotlib.pyplot",
    "ml_collections.config_flags",
    "pyarrow.parquet",
    "sentencepiece",
    "tokenizers",
)


class Outcome(NamedTuple):
    """How a command ended.

    Attributes:
      code: its exit code; -N if signal N killed it, None if it exceeded the time limit.
      out: its standard output.
      err: its standard error.
      seconds: how long it took.
    """

    code: int | None
    out: str
    err: str
    seconds: float


class ForkServer:
    """The process that forks, from `__enter__` to `__exit__`.

    Args:
      environment: environment variables to add to this process's.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(os.environ) | dict(environment)

    def __enter__(self) -> ForkServer:
        self._folder = tempfile.TemporaryDirectory()
        # TFDS leaves an empty temporary folder for every corpus that it opens.
        environment = self._environment | {"TMPDIR": self._folder.name}
        self._server = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).resolve())],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # it exits at the end of its input
        self._folder.cleanup()

    def run(
        self, script: pathlib.Path, words: Sequence[str], *, cwd: pathlib.Path, limit: float
    ) -> Outcome:
        """Runs a script and waits for it.

        Args:
          script: the Python file.
          words: its command line.
          cwd: the folder to run it in.
          limit: seconds until it is killed.

        Raises:
          RuntimeError: the server has ended.
        """
        out, err = (pathlib.Path(self._folder.name) / name for name in ("out", "err"))
        request = {
            "script": str(script),
            "words": list(words),
            "cwd": str(cwd),
            "out": str(out),
            "err": str(err),
            "limit": limit,
        }
        started = time.monotonic()
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server has ended with code {self._server.wait()}")
        texts = (path.read_text(errors="replace") for path in (out, err))
        return Outcome(json.loads(answer)["code"], *texts, time.monotonic() - started)


def _serve() -> None:
    """Runs one command for each line of standard input."""
    _import_libraries()
    gc.collect()
    gc.freeze()  # memory stays shared with the forks if their collectors do not touch it
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            _run_command(request)
        print(json.dumps({"code": _wait(child, request["limit"])}), flush=True)


def _import_libraries() -> None:
    sys.path.insert(0, str(LAUNCH.parent))
    # JAX would print a warning if it does not exist; launch/compile.py checks it.
    libtpu = os.environ.pop("TPU_LIBRARY_PATH", None)
    import tensorflow_datasets as tfds
    from jax._src import xla_bridge

    for name in _IMPORTS:
        importlib.import_module(name)
    _ = tfds.builder  # TFDS imports its modules when they are first used
    if xla_bridge.backends_are_initialized():
        raise SystemExit("error: an import has started a JAX backend, so nothing can be forked.")
    if libtpu is not None:
        os.environ["TPU_LIBRARY_PATH"] = libtpu


def _run_command(request: dict[str, Any]) -> NoReturn:
    """Turns this fork into the process of a command."""
    os.setsid()
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(path, mode | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["words"]]
    code = _run_script(request["script"])
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    # A normal exit would copy all shared memory, which takes ten times as long as a command that
    # rejects its input.
    os._exit(code)


def _run_script(script: str) -> int:
    """Runs a script as `__main__`. Returns its exit code."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def _wait(child: int, limit: float) -> int | None:
    """Waits for a fork and kills it at the time limit. Returns its code, None if it was killed."""
    end = time.monotonic() + limit
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    _serve()
