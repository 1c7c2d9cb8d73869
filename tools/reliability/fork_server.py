"""Command lines of this folder at a twentieth of their time: one process imports what all commands import, and a fork of it runs each.

A fork is what `python launch/X.py ...` is but for its imports: it parses the words, waits for its threads, ends with an exit code, and is killed
with all that it started where it passes a time limit. No JAX backend is started before a fork, for threads do not survive it.
"""

from __future__ import annotations

import atexit
import gc
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


class Ended(NamedTuple):
    """How a command ended; `code` is None where it was killed at the time limit, and -N where signal N killed it."""

    code: int | None
    out: str
    err: str
    seconds: float


class Commands:
    """The process that forks, from `__enter__` to `__exit__`; `environment` is laid over ours."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(os.environ) | dict(environment)

    def __enter__(self) -> Commands:
        self._folder = tempfile.TemporaryDirectory()
        words = [sys.executable, str(pathlib.Path(__file__).resolve())]
        environment = self._environment | {
            "TMPDIR": self._folder.name
        }  # TFDS leaves an empty folder for every corpus that it opens
        self._server = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()  # at the end of its input it ends
        self._folder.cleanup()

    def run(
        self, script: pathlib.Path, words: Sequence[str], *, cwd: pathlib.Path, limit: float
    ) -> Ended:
        """Runs a script with these words in the folder `cwd`, for at most `limit` seconds.

        Raises:
          RuntimeError: the process that forks has ended.
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
        began = time.monotonic()
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ended with {self._server.wait()}")
        texts = (path.read_text(errors="replace") for path in (out, err))
        return Ended(json.loads(answer)["code"], *texts, time.monotonic() - began)


def _serve() -> None:
    _import_what_commands_import()
    gc.collect()
    gc.freeze()  # what is shared with a fork stays shared where its collector does not look at it
    while line := sys.stdin.readline():
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(request)
        print(json.dumps({"code": _wait(child, request["limit"])}), flush=True)


def _import_what_commands_import() -> None:
    sys.path.insert(0, str(LAUNCH.parent))
    libtpu = os.environ.pop(
        "TPU_LIBRARY_PATH", None
    )  # jax would warn of one that leads nowhere; launch/compile.py looks at it
    import grain  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sentencepiece  # noqa: F401
    import tensorflow_datasets as tfds
    import tokenizers  # noqa: F401
    from jax._src import xla_bridge

    import diladiff_jax.evaluation.sweep
    import diladiff_jax.training.loop  # noqa: F401

    tfds.builder  # it imports itself when first looked at  # noqa: B018
    if xla_bridge.backends_are_initialized():
        raise SystemExit(
            "error: an import has started a JAX backend; nothing can be forked after that"
        )
    if libtpu is not None:
        os.environ["TPU_LIBRARY_PATH"] = libtpu


def _become(request: dict[str, Any]) -> NoReturn:
    os.setsid()
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(path, mode | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(request["cwd"])
    sys.argv = [request["script"], *request["words"]]
    code = _run(request["script"])
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(
        code
    )  # taking the interpreter apart would copy all that is shared, and takes ten times as long as a command that refuses


def _run(script: str) -> int:
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
