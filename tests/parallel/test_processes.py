"""Several processes on one machine as one run: the same losses, checkpoints that move between layouts, and a common stop."""

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

from diladiff_jax.parallel import processes

SETTINGS = dict(logging=dict(metrics_every=1, validate_every=100, checkpoint_every=100, samples=1))


def launch(workdir, config, processes, devices, *flags, stage="mdlm"):
    """Starts that many processes of launch/train.py with that many devices each, joined on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
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
    outs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [code] * len(running), "\n".join(outs)
    return outs


def losses(workdir, stage="mdlm"):
    """Step -> training loss, as the metrics have it."""
    records = [
        json.loads(line)
        for line in (workdir / stage / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Eight steps by one process on four devices."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, mdlm=dict(steps=8), **SETTINGS)
    finish(launch(folder / "w", config, 1, 4))
    return folder / "w", config


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_train_as_one_and_their_checkpoint_moves(
    one_process, tmp_path, processes
):
    """Losses of 2 x 2 and 4 x 1 devices, cut over fsdp, equal those of 1 x 4 (rtol 1e-4); what they save goes on under one process of
    half as many devices on another mesh, its data position too, and (the longer form) under several again."""
    whole, config = one_process
    workdir = tmp_path / "w"
    mesh = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]
    outs = finish(launch(workdir, config, processes, 4 // processes, *mesh, "--stop_at=4"))
    assert "|" in outs[0] and not any(
        "steps/s" in out for out in outs[1:]
    )  # the first process alone speaks
    assert final_arrays(workdir, "mdlm")[2]["position"] == 4
    finish(launch(workdir, config, 1, 2, *(["--stop_at=6"] if processes == 4 else [])))
    if processes == 4:
        finish(launch(workdir, config, processes, 4 // processes, *mesh))
    # Metrics are fetched a step late, and the last two of a run together: {step: mean of the losses since the record before}.
    expected, found = losses(whole), losses(workdir)
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
        final_arrays(whole, "mdlm"),
    )
    assert step == position["position"] == 8 and ours.keys() == theirs.keys()
    for name in ours:  # Muon's first updates divide by small numbers: rounding grows
        if name.startswith("params"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-3, err_msg=name)


@pytest.mark.parametrize(
    ("processes", "number"),
    [
        (2, signal.SIGTERM),
        *(
            pytest.param(1, number, marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_a_run_that_is_told_to_stop_saves_first(one_process, tmp_path, processes, number):
    """SIGTERM to one process: all stop after the same step with code 75 and a checkpoint of it; Ctrl-C does so with 130; the same command ends the run."""
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
    outs = finish(running, code=75 if number == signal.SIGTERM else 130)
    step = final_arrays(tmp_path / "w", "mdlm")[0]
    assert 50 <= step < 400 and all(
        f"after step {step}, which is saved" in out and "Traceback" not in out for out in outs
    )
    assert final_arrays(tmp_path / "w", "mdlm")[2]["position"] == step
    finish(launch(tmp_path / "w", config, 1, 1, *steps))
    assert final_arrays(tmp_path / "w", "mdlm")[0] == 400


def test_a_process_that_waits_in_vain_says_so(one_process, tmp_path):
    """Two processes are announced and one comes: one line, exit code 1, after the time allowed; and an address needs its numbers."""
    _, config = one_process
    first = launch(tmp_path / "w", config, 2, 1, "--distributed_timeout=3")[0:]
    first[1].kill()
    out = first[0].communicate(timeout=120)[0]
    first[1].communicate()
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert (
        first[0].returncode == 1
        and len(errors) == 1
        and "waited 3 s for the others in vain" in errors[0]
    ), out
    for flags, words in (
        (["--distributed=127.0.0.1:1"], "needs --num_processes"),
        (["--distributed=127.0.0.1", "--num_processes=1", "--process_id=0"], "is no address"),
        (["--num_processes=2"], "need --distributed"),
        (["--distributed=auto"], "no cluster is announced"),
    ):
        (alone,) = launch(tmp_path / "w", config, 1, 1, *flags)
        out = alone.communicate(timeout=60)[0]
        assert alone.returncode == 1 and words in out and "Traceback" not in out, out


@pytest.mark.slow
def test_what_the_first_process_refuses_ends_all_with_a_line(one_process, tmp_path):
    """A stage before its predecessor, two processes: the first says why, the other that the first did, both with exit code 1 and no traceback."""
    _, config = one_process
    outs = finish(launch(tmp_path / "w", config, 2, 1, stage="ladiff"), code=1)
    for out in outs:
        errors = [line for line in out.splitlines() if line.startswith("error: ")]
        assert (
            len(errors) == 1
            and "stage autoencoder is not trained" in errors[0]
            and "Traceback" not in out
        ), out


def test_the_stop_of_several_processes_is_asked_for_by_a_count_of_its_own(monkeypatch):
    """The service says yes at one count alone, so counts never repeat or jump, whatever stage or step the run is at; and a yes stays one."""
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        processes.multihost_utils,
        "reached_preemption_sync_point",
        lambda count: asked.append(count) or count == 3,
    )
    with processes.StopSignal() as stop:
        assert [stop.reached() for _ in range(5)] == [
            False,
            False,
            True,
            True,
            True,
        ] and stop.agreed
    assert asked == [1, 2, 3] and stop.name == "SIGTERM"
