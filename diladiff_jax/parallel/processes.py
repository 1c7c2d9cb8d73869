"""Several processes as one run: how they find each other, and how they stop together."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost


class DistributedError(RuntimeError):
    """The processes of a run did not find each other: one line that says what was awaited."""


class Preempted(RuntimeError):
    """The run was told to end: everything is saved, and the same command goes on. `by_hand`: by Ctrl-C, not by a scheduler."""

    def __init__(self, message: str, *, by_hand: bool) -> None:
        super().__init__(message)
        self.by_hand = by_hand


def start(
    address: str,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
) -> None:
    """Joins this process to the others of the run, before anything else asks JAX for its devices.

    Args:
      address: "auto" reads what the cluster says (a TPU pod, SLURM, Kubernetes, MPI); else the first process's HOST:PORT.
      num_processes, process_id: with an address, how many there are and which one this is, from 0.
      timeout: seconds to wait for the others.

    Raises:
      DistributedError: no cluster here, or an address that is none.

    When some process has not come in time, this one says so in a line and ends with exit code 1: the runtime, waiting in its
    own code, would abort it with a page of addresses.
    """
    which: dict[str, Any] = {}
    if address != "auto":
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise DistributedError(
                f"--distributed={address} is no address; write the first process's HOST:PORT, or auto"
            )
        if num_processes is None or process_id is None:
            raise DistributedError(
                f"--distributed={address} needs --num_processes (how many there are) and --process_id (which of them, from 0, this is)"
            )
        if not 0 <= process_id < num_processes:
            raise DistributedError(
                f"--process_id={process_id} is none of {num_processes} processes; it must be from 0 to {num_processes - 1}"
            )
        which = dict(
            coordinator_address=address, num_processes=num_processes, process_id=process_id
        )
    here = f"process {process_id} of {num_processes} at {address}" if which else "this process"

    def give_up() -> None:
        print(
            f"error: {here} waited {timeout} s for the others in vain; start all of them, or allow more time",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**which, initialization_timeout=timeout + 60)
    except ValueError as error:
        if address == "auto":
            raise DistributedError(
                "no cluster is announced in this environment (TPU pod, SLURM, Kubernetes, MPI); give the first process's HOST:PORT instead of auto"
            ) from None
        raise DistributedError(
            f"--distributed={address} cannot be joined ({error}); write the first process's HOST:PORT"
        ) from None
    except RuntimeError as error:
        raise DistributedError(
            f"{here} could not join the others ({str(error).strip().splitlines()[0][:200]})"
        ) from None
    finally:
        watch.cancel()


class StopSignal:
    """Whether the run has been told to end (SIGTERM or Ctrl-C), the same answer at the same step in every process.

    A context: within it SIGTERM no longer kills, nor does the first Ctrl-C. Of several processes only SIGTERM is caught, and
    JAX's preemption service chooses the step where they stop.
    """

    def __init__(self) -> None:
        self._told = threading.Event()
        self._before: dict[int, Any] = {}
        self._alone = jax.process_count() == 1
        self._asked = 0
        self._agreed = False
        self.by_hand = False

    def __enter__(self) -> StopSignal:
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._tell)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _tell(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._told.is_set():
                raise KeyboardInterrupt
            self.by_hand = True
            print(
                "saving after this update; Ctrl-C again stops at once", file=sys.stderr, flush=True
            )
        self._told.set()

    def reached(self) -> bool:
        """Whether to stop now; to be asked after every update, by all processes alike. Once true it stays so."""
        # The service answers true at one count alone, a few after the highest it has seen: updates restart with every stage, this does not.
        self._asked += 1
        if self._alone:
            self._agreed = self._told.is_set()
        elif not self._agreed:
            self._agreed = bool(multihost_utils.reached_preemption_sync_point(self._asked))
        return self._agreed

    @property
    def agreed(self) -> bool:
        """Whether `reached` has said so before."""
        return self._agreed or (self._alone and self._told.is_set())

    @property
    def name(self) -> str:
        """What told the run to end."""
        return "Ctrl-C" if self.by_hand else "SIGTERM"


def run_on_process_zero(name: str, work: Callable[[], None], *, hours: float = 72.0) -> None:
    """Has the first process do `work`, while the others wait for it on the coordination service, however long it takes.

    Raises:
      DistributedError: on the others, what the first process raised, in one line.
    """
    if jax.process_count() == 1:
        return work()
    client = multihost.get_jax_distributed_client()

    def heard() -> (
        None
    ):  # the first process holds the service: it must not leave before all have read what it said
        client.wait_at_barrier(f"diladiff/{name}/heard", 60_000)

    if jax.process_index() == 0:
        try:
            work()
        except Exception as error:
            client.key_value_set(f"diladiff/{name}", f"error: {error}")
            heard()
            raise
        client.key_value_set(f"diladiff/{name}", "done")
        return heard()
    said = client.blocking_key_value_get(f"diladiff/{name}", int(hours * 3_600_000))
    heard()
    if said != "done":
        raise DistributedError(f"the first process ended with {' '.join(said.split())}")
