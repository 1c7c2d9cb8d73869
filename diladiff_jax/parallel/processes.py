"""Runs of several processes: how they join, and how they all stop after the same step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from diladiff_jax.console import say


class DistributedError(RuntimeError):
    """The processes of a run could not join, or process 0 failed; the message is one line."""


class Preempted(RuntimeError):
    """The run was asked to stop and has saved its state; the same command resumes it.

    Attributes:
      interrupted_by_user: True after Ctrl-C, False after another signal.
    """

    def __init__(self, message: str, *, interrupted_by_user: bool) -> None:
        super().__init__(message)
        self.interrupted_by_user = interrupted_by_user


def initialize_distributed(
    address: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Joins this process to the others of the run. Call it before JAX initializes its devices.

    If some process does not join in time, this one prints one line and exits with code 1. It does
    not wait for JAX's own timeout, because that aborts the process with a page of addresses.

    Args:
      address: "auto" to read the cluster's environment (TPU pod, SLURM, Kubernetes, MPI), or the
        HOST:PORT of process 0.
      num_processes: number of processes; required with HOST:PORT.
      process_id: index of this process, from 0; required with HOST:PORT.
      timeout: seconds to wait for the other processes.

    Raises:
      DistributedError: no cluster was detected, the address is invalid, or joining failed.
    """
    options: dict[str, Any] = {}
    here = "this process"
    if address != "auto":
        _validate(address, num_processes, process_id)
        options = dict(
            coordinator_address=address, num_processes=num_processes, process_id=process_id
        )
        here = f"process {process_id} of {num_processes} at {address}"

    def give_up() -> None:
        say(
            f"error: {here} timed out after {timeout} s waiting for the other processes. "
            "Start all of them, or raise --distributed_timeout.",
            error=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**options, initialization_timeout=timeout + 60)
    except ValueError as error:
        if address == "auto":
            raise DistributedError(
                "--distributed=auto: found no cluster in this environment, expected a TPU pod, "
                "SLURM, Kubernetes or MPI. Give the HOST:PORT of process 0 instead."
            ) from None
        raise DistributedError(
            f"--distributed={address}: cannot join ({error}). Give the HOST:PORT of process 0."
        ) from None
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise DistributedError(f"{here} could not join the other processes ({reason})") from None
    finally:
        timer.cancel()


def _validate(address: str, num_processes: int | None, process_id: int | None) -> None:
    """Raises DistributedError unless the flags name a coordinator and one of its processes."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise DistributedError(
            f"--distributed: got {address!r}, expected auto or the HOST:PORT of process 0"
        )
    if num_processes is None or process_id is None:
        raise DistributedError(
            f"--distributed={address} also needs --num_processes (the number of processes) and "
            "--process_id (the index of this one, from 0)"
        )
    if not 0 <= process_id < num_processes:
        raise DistributedError(
            f"--process_id: got {process_id}, expected 0 to {num_processes - 1} with "
            f"--num_processes={num_processes}"
        )


STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGHUP,  # the terminal was closed
    signal.SIGXCPU,  # a limit of CPU time
    signal.SIGUSR1,  # a scheduler's warning before its limit of time
    signal.SIGUSR2,
)
"""Signals that end a process unless it handles them, and that ask a training run to save first."""


def handled_stop_signals() -> tuple[signal.Signals, ...]:
    """`STOP_SIGNALS` but those that this process ignores, as it does SIGHUP under `nohup`."""
    return tuple(s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN)


class StopSignal:
    """Tells the training loop to stop after a signal, at the same step in every process.

    Use it as a context manager. In a run of one process, `STOP_SIGNALS` and the first Ctrl-C no
    longer kill the process inside the context. In a run of several, JAX's preemption service
    handles SIGTERM and chooses the step at which all of them stop; the other `STOP_SIGNALS` are
    passed on to it as SIGTERM.

    Attributes:
      interrupted_by_user: True after Ctrl-C.
    """

    def __init__(self) -> None:
        self._received = threading.Event()
        self._previous_handlers: dict[int, Any] = {}
        self._single_process = jax.process_count() == 1
        self._polls = 0
        self._stopping = False
        self.interrupted_by_user = False
        self._name = signal.SIGTERM.name

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            stops = handled_stop_signals()
            if self._single_process:
                handlers = dict.fromkeys((*stops, signal.SIGINT), self._handle)
            else:
                handlers = dict.fromkeys(set(stops) - {signal.SIGTERM}, self._pass_on)
            self._previous_handlers = {
                number: signal.signal(number, handler) for number, handler in handlers.items()
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._received.is_set():
                raise KeyboardInterrupt
            self.interrupted_by_user = True
            say("saving after this update; press Ctrl-C again to stop immediately", error=True)
        elif not self._received.is_set():
            self._name = signal.Signals(number).name
        self._received.set()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self) -> bool:
        """Whether to stop now. Every process must call this after every update.

        Once it has returned True it always does.
        """
        # The service answers True for one value only, slightly above the highest it has seen. Step
        # numbers restart with every stage, so the number of calls is used instead.
        self._polls += 1
        if self._single_process:
            self._stopping = self._received.is_set()
        elif not self._stopping:
            self._stopping = bool(multihost_utils.reached_preemption_sync_point(self._polls))
        return self._stopping

    @property
    def agreed(self) -> bool:
        """Whether the run is stopping, without asking the other processes again."""
        return self._stopping or (self._single_process and self._received.is_set())

    @property
    def name(self) -> str:
        """What asked the run to stop: "Ctrl-C", or the name of the signal."""
        return "Ctrl-C" if self.interrupted_by_user else self._name


def run_on_process_zero(name: str, work: Callable[[], None], *, hours: float = 72.0) -> None:
    """Runs `work` on process 0 while the other processes wait for it.

    Args:
      name: identifies this call on the coordination service; unique within the run.
      work: the function to run.
      hours: how long the other processes wait at most.

    Raises:
      DistributedError: on the other processes, if `work` raised on process 0. Process 0 raises the
        original exception.
    """
    if jax.process_count() == 1:
        return work()
    client = multihost.get_jax_distributed_client()
    key = f"diladiff/{name}"

    def wait_until_all_have_read() -> None:
        # Process 0 hosts the service, so it must not exit before the others have read the result.
        client.wait_at_barrier(f"{key}/read", 60_000)

    if jax.process_index() == 0:
        try:
            work()
        except Exception as error:
            client.key_value_set(key, f"error: {error}")
            wait_until_all_have_read()
            raise
        client.key_value_set(key, "done")
        return wait_until_all_have_read()
    result = client.blocking_key_value_get(key, int(hours * 3_600_000))
    wait_until_all_have_read()
    if result != "done":
        raise DistributedError(f"process 0 failed with {' '.join(result.split())}")
