"""Runs of several processes on this machine.

They compute the same losses as one process, their checkpoints move between layouts, and they stop
together.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from training.test_loop import ROOT, final_arrays, write_config
from xla_flags import FAST_COMPILATION

from diladiff_jax.parallel import processes

SETTINGS = dict(logging=dict(metrics_every=1, validate_every=100, checkpoint_every=100, samples=1))


def launch(workdir, config, processes, devices, *flags, stage="mdlm"):
    """Starts `processes` processes of launch/train.py, each with `devices` devices, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_COMPILATION}",
    }
    words = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"--workdir={workdir}",
        f"--config={config}",
        f"--stage={stage}",
        *flags,
    ]
    several = lambda i: (
        [f"--distributed=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={i}"]
        if processes > 1
        else []
    )
    return [
        subprocess.Popen(
            [*words, *several(i)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running, code=0):
    """Waits for all processes, checks their exit code, and returns what each of them printed."""
    outs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), "\n".join(outs)
    return outs


def losses(workdir, stage="mdlm"):
    """Step -> training loss, from the metrics file."""
    records = [
        json.loads(line)
        for line in (workdir / stage / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A run of eight steps by one process with four devices."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, mdlm=dict(steps=8), **SETTINGS)
    finish(launch(folder / "w", config, 1, 4))
    return folder / "w", config


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_and_their_checkpoint_moves(
    one_process, tmp_path, processes
):
    """Training on 2 x 2 and 4 x 1 (processes x devices) with fsdp has the losses of 1 x 4 (rtol
    1e-4). Their checkpoint, including the data position, resumes in one process with two devices on
    another mesh, and from there (in the slow variant) again in several processes."""
    reference, config = one_process
    workdir = tmp_path / "w"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    outs = finish(launch(workdir, config, processes, 4 // processes, *mesh, "--stop_at=4"))
    # Only process 0 reports progress.
    assert "|" in outs[0] and not any("steps/s" in out for out in outs[1:])
    assert final_arrays(workdir, "mdlm")[2]["position"] == 4
    finish(launch(workdir, config, 1, 2, *(["--stop_at=6"] if processes == 4 else [])))
    if processes == 4:
        finish(launch(workdir, config, processes, 4 // processes, *mesh))
    # Metrics are fetched one step late and the last two of a run together, so a record holds the
    # mean of the losses since the previous record.
    expected, found = losses(reference), losses(workdir)
    assert list(expected) == list(range(2, 9)) and list(found) == (
        [2, 3, 4, 6, 8] if processes == 4 else [2, 3, 4, 6, 7, 8]
    )
    joined = {2: expected[2], 3: expected[3], 4: (expected[4] + expected[5]) / 2} | {
        n: expected[n] for n in (6, 7, 8)
    }
    if processes == 4:
        joined = joined | {6: (expected[6] + expected[7]) / 2}
    np.testing.assert_allclose([found[n] for n in found], [joined[n] for n in found], rtol=1e-4)
    (step, ours, position), (_, theirs, _) = (
        final_arrays(workdir, "mdlm"),
        final_arrays(reference, "mdlm"),
    )
    assert step == position["position"] == 8 and ours.keys() == theirs.keys()
    for name in ours:  # Muon's first updates divide by small numbers, which amplifies rounding
        if name.startswith("params"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-3, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (2, signal.SIGTERM),
        *(
            pytest.param(1, number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_stops_all_processes_after_a_checkpoint_of_the_same_step(
    one_process, tmp_path, processes, number
):
    """The exit code is 75 after SIGTERM, 130 after Ctrl-C; the same command finishes the run."""
    _, config = one_process
    steps = [
        "--config.mdlm.steps=400",
        "--config.logging.metrics_every=50",
        "--config.logging.samples=0",
    ]
    running = launch(tmp_path / "w", config, processes, 1, *steps)
    metrics = tmp_path / "w" / "mdlm" / "metrics" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running[-1].send_signal(number)
    outs = finish(running, code=130 if number == signal.SIGINT else 75)
    step = final_arrays(tmp_path / "w", "mdlm")[0]
    assert 50 <= step < 400 and all(
        f"after step {step}, which is saved" in out and "Traceback" not in out for out in outs
    )
    assert final_arrays(tmp_path / "w", "mdlm")[2]["position"] == step
    finish(launch(tmp_path / "w", config, 1, 1, *steps))
    assert final_arrays(tmp_path / "w", "mdlm")[0] == 400


def test_a_process_without_its_peers_times_out_with_one_line(one_process, tmp_path):
    """One of two processes is killed before it joins."""
    _, config = one_process
    waiting, killed = launch(tmp_path / "w", config, 2, 1, "--distributed_timeout=3")
    killed.kill()
    out = waiting.communicate(timeout=120)[0]
    killed.communicate()
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert waiting.returncode == 1 and len(errors) == 1, out
    assert "timed out after 3 s waiting for the other processes" in errors[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--distributed=127.0.0.1:1"], "also needs --num_processes"),
        (
            ["--distributed=127.0.0.1", "--num_processes=1", "--process_id=0"],
            "--distributed: got '127.0.0.1'",
        ),
        (
            ["--distributed=127.0.0.1:1", "--num_processes=2", "--process_id=2"],
            "--process_id: got 2, expected 0 to 1",
        ),
        (["--num_processes=2"], "need --distributed"),
        (["--distributed=auto"], "found no cluster"),
    ],
)
def test_incomplete_flags_are_an_error_of_one_line(flags, message, run_command, tmp_path):
    words = [f"--workdir={tmp_path / 'w'}", f"--config={write_config(tmp_path)}", "--stage=mdlm"]
    done = run_command("train.py", *words, *flags)
    assert done.code == 1 and message in done.err and "Traceback" not in done.err, done.err


@pytest.mark.slow
def test_an_error_on_process_zero_ends_every_process_with_one_line(one_process, tmp_path):
    """Both processes name the error, here a stage whose predecessor is not trained."""
    _, config = one_process
    outs = finish(launch(tmp_path / "w", config, 2, 1, stage="ladiff"), code=1)
    for out in outs:
        errors = [line for line in out.splitlines() if line.startswith("error: ")]
        assert (
            len(errors) == 1
            and "stage autoencoder is not trained" in errors[0]
            and "Traceback" not in out
        ), out


@pytest.mark.parametrize("number", processes.STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_that_would_end_the_process_asks_it_to_stop(number):
    """Closed terminals and schedulers send others than SIGTERM; each is named."""
    with processes.StopSignal() as stop:
        assert not stop.reached()
        os.kill(os.getpid(), number)
        assert stop.reached() and stop.agreed
    assert stop.name == number.name and not stop.interrupted_by_user


def test_a_signal_that_the_process_ignores_stays_ignored():
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.reached()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_signals_reach_the_preemption_service_as_sigterm(monkeypatch):
    """In a run of several processes, where JAX's service handles SIGTERM only."""
    received = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with processes.StopSignal():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM] * 2


def test_stop_signal_counts_its_calls_and_stays_true(monkeypatch):
    """JAX's preemption service answers True for a single count, so counts must not repeat or jump,
    whatever step or stage the run has reached."""
    counts = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils,
        "reached_preemption_sync_point",
        lambda count: counts.append(count) or count == 3,
    )
    with processes.StopSignal() as stop:
        assert [stop.reached() for _ in range(5)] == [False, False, True, True, True]
        assert stop.agreed
    assert counts == [1, 2, 3] and stop.name == "SIGTERM"
