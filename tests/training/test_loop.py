"""Training runs: resumed after an interruption, with skipped updates, and with invalid input."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from micro import micro_config
from xla_flags import FAST_COMPILATION

from diladiff_jax.config import ConfigError, stages_of
from diladiff_jax.storage import CheckpointError, WorkdirError
from diladiff_jax.training import loop
from diladiff_jax.training.anomalies import TrainingError
from diladiff_jax.training.run import train

ROOT = pathlib.Path(__file__).parents[2]


def write_config(folder, **changes):
    """The micro experiment as a config file that the command can load."""
    path = folder / "experiment.py"
    settings = micro_config(**changes).to_dict()
    path.write_text(
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict({settings!r})\n"
    )
    return path


def command(workdir, config, *flags):
    """launch/train.py in a process of its own, on one device."""
    words = [sys.executable, str(ROOT / "launch" / "train.py")]
    return subprocess.Popen(
        [*words, f"--workdir={workdir}", f"--config={config}", *flags],
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    """Waits for a process that must succeed, and returns its output."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def final_arrays(workdir, stage):
    """The stage's last step, every array of that checkpoint, and its position in the data."""
    # The devices that the arrays were saved on are not those of this process.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    directory = (workdir / stage / "checkpoints").absolute()
    step = max(int(p.name) for p in directory.iterdir() if p.name.isdigit())
    found = {}
    for item in ("params", "ema", "training", "statistics"):
        folder = directory / str(step) / item
        if folder.is_dir():
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                restore = ocp.args.StandardRestore(fallback_sharding=here)
                tree = reader.restore(folder, args=restore)
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    position = next((directory / str(step) / "data").rglob("metadata")).read_text()
    return step, found, json.loads(position)


# Interrupted, finished and continued runs, by the command.


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(trained, tmp_path):
    """The autoencoder, which has statistics of its own, killed by SIGKILL in the middle.

    test_faults.py kills the first stage.
    """
    steps = 200
    config = write_config(
        tmp_path,
        autoencoder=dict(steps=steps),
        logging=dict(checkpoint_every=10, validate_every=1000, samples=0),
    )
    source = f"--init_from={trained}"
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    finish(command(uninterrupted, config, "--stage=autoencoder", source))
    process = command(killed, config, "--stage=autoencoder", source)
    checkpoints = killed / "autoencoder" / "checkpoints"
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if checkpoints.is_dir() and any(
            p.name.isdigit() and 10 <= int(p.name) < steps for p in checkpoints.iterdir()
        ):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    resumed = finish(command(killed, config, "--stage=autoencoder"))
    assert f"/{steps}" in resumed
    step_a, a, position_a = final_arrays(uninterrupted, "autoencoder")
    step_b, b, position_b = final_arrays(killed, "autoencoder")
    assert step_a == step_b == steps and position_a == position_b and a.keys() == b.keys()
    assert not [name for name in a if not np.array_equal(a[name], b[name])]
    assert final_arrays(trained, "autoencoder")[0] == 6  # the source is unchanged
    assert any("optimizer" in name for name in a) and any("statistics" in name for name in a)


@pytest.mark.slow
def test_a_finished_stage_is_skipped_and_resumes_if_it_is_given_more_steps(tmp_path):
    """Metrics have every step once, and rates; the trace that the config asks for is written."""
    config = write_config(tmp_path, logging=dict(samples=0, profile_at=2, profile_steps=2))
    workdir = tmp_path / "w"
    finish(command(workdir, config, "--stage=all", "--stop_at=2"))  # trains no later stage
    assert "mdlm: resumes from step 2 of 6" in finish(command(workdir, config, "--stage=mdlm"))
    assert "mdlm: already trained (6 steps)" in finish(command(workdir, config, "--stage=mdlm"))
    finish(command(workdir, config, "--stage=mdlm", "--config.mdlm.steps=8"))
    lines = (workdir / "mdlm" / "metrics" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    steps = [r["step"] for r in records if "train/loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert any("validation/loss" in r for r in records)
    rates = [r["train/tokens_per_second_per_device"] for r in records[1:] if "train/loss" in r]
    assert min(rates) > 0
    assert list((workdir / "mdlm" / "profile").rglob("*.xplane.pb"))
    assert list((workdir / "mdlm" / "metrics").glob("events.out.tfevents*"))
    assert final_arrays(workdir, "mdlm")[2]["position"] == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage=ladiff"], "stage autoencoder is not trained"),
        (["--stage=nothing"], "--stage: got 'nothing', expected one of mdlm, autoencoder"),
        (["--stage=mdlm", "--config.mdlm.batch=0"], "mdlm.batch: got 0, expected between 1 and"),
        (["--stage=mdlm", "--config.backbone.heads=5"], "backbone.heads: got 5"),
        (["--stage=mdlm", "--config.mdlm.optimiser=x"], "optimizer"),
        (["--stage=mdlm", "--config.mesh.data=3"], "the number of devices, 1"),
        (["--stage=mdlm", "--init_from=/nowhere"], "/nowhere has no tokenizer"),
    ],
)
def test_invalid_input_is_an_error_of_one_line(run_command, tmp_path, flags, words):
    """With exit code 1 and no traceback."""
    words_given = [f"--workdir={tmp_path / 'w'}", f"--config={write_config(tmp_path)}", *flags]
    done = run_command("train.py", *words_given)
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code == 1 and "Traceback" not in done.err, done.err
    assert len(errors) == 1 and words in errors[0], done.err


@pytest.mark.slow
def test_a_workdir_keeps_the_settings_that_it_was_trained_with(tmp_path):
    """Other ones are an error, and its config.json stays as it is."""
    config = write_config(tmp_path, logging=dict(samples=0))
    finish(command(tmp_path / "w", config, "--stage=mdlm", "--config.mdlm.steps=1"))
    before = (tmp_path / "w" / "config.json").read_text()
    process = command(tmp_path / "w", config, "--stage=mdlm", "--config.mdlm.learning_rate=0.5")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "mdlm.learning_rate differs" in out
    assert (tmp_path / "w" / "config.json").read_text() == before


def test_sigterm_before_training_has_the_exit_code_that_restarts_a_run(tmp_path):
    """While text is prepared, which may take hours."""
    config = write_config(tmp_path, data=dict(documents=200_000))
    process = command(tmp_path / "w", config, "--stage=mdlm")
    while not (tmp_path / "w" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in out
    assert "stopped by SIGTERM before training. Run the same command to resume." in out


def catches_ctrl_c(process):
    """Whether the process has a handler for SIGINT, as Linux reports it."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)
    return bool(caught >> (signal.SIGINT - 1) & 1)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.4, 0.8])
def test_ctrl_c_while_libraries_are_imported_gives_no_traceback(tmp_path, seconds):
    """From the moment that the command takes Python's own handler away, before these imports."""
    process = command(tmp_path / "w", write_config(tmp_path), "--stage=mdlm")
    for expected in (True, False):  # Python sets its handler when it starts
        while catches_ctrl_c(process) != expected and process.poll() is None:
            time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in out, out


# The loop itself.

SCORER = dict(
    scorer=dict(steps=9),
    logging=dict(checkpoint_every=3, keep_checkpoints=9, samples=0, max_skips=3),
)


def train_scorer(workdir, stop_at=None, **changes):
    train(micro_config(**SCORER, **changes), workdir, ("scorer",), stop_at=stop_at)


def checkpointed(workdir):
    """The steps of the scorer's checkpoints."""
    folders = (workdir / "scorer" / "checkpoints").glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def inject_faults(monkeypatch, *, skipped=(), ruined=(), validation=None):
    """Makes the loop see faults.

    Args:
      skipped: updates that report that they were skipped.
      ruined: updates that leave parameters of NaN.
      validation: the loss of every validation.
    """
    compile_steps = loop.compile_steps

    def compile_faulty_steps(*args, **kwargs):
        step, validate = compile_steps(*args, **kwargs)

        def faulty_step(state, context, tokens):
            number = int(state.step)
            state, metrics = step(state, context, tokens)
            if number in skipped:
                metrics |= {"skipped": jnp.float32(1), "loss": jnp.float32(jnp.nan)}
            if number in ruined:
                state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return state, metrics

        def faulty_validation(*args):
            found = validate(*args)
            return found if validation is None else found | {"loss": jnp.float32(validation)}

        return faulty_step, faulty_validation

    monkeypatch.setattr(loop, "compile_steps", compile_faulty_steps)


def test_a_workdir_has_one_trainer(tmp_path):
    """While another process holds the lock, training is an error that writes nothing.

    A run that fails later gives the lock back.
    """
    workdir = tmp_path / "w"
    workdir.mkdir()
    with (workdir / "training.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkdirError, match="another process is training or preparing data"):
            train(micro_config(), workdir, ("mdlm",))
        assert [path.name for path in workdir.iterdir()] == ["training.lock"]
    for _ in range(2):
        with pytest.raises(CheckpointError, match="stage autoencoder is not trained"):
            train(micro_config(), workdir, ("ladiff",))


def test_a_stage_whose_predecessor_is_left_out_is_found_before_anything_is_trained(tmp_path):
    """`--stage=all` with ladiff.steps=0 would fail at the student, after days of training."""
    config = micro_config(ladiff=dict(steps=0))
    with pytest.raises(CheckpointError, match="stage ladiff is not trained"):
        train(config, tmp_path / "w", stages_of(config))
    assert not (tmp_path / "w" / "data").exists()


@pytest.mark.slow
def test_no_update_waits_for_a_checkpoint(tmp_path, monkeypatch):
    """The loop waits for a save only to report where an interrupted run resumes."""
    monkeypatch.setattr(loop.Checkpoints, "wait", lambda self: pytest.fail("the loop waited"))
    train_scorer(tmp_path)
    assert checkpointed(tmp_path) == [3, 6, 9]


def test_a_checkpoint_due_while_updates_are_skipped_is_saved_after_a_good_one(
    tmp_path, monkeypatch, capsys
):
    """Updates 3, 6 and 7 are skipped, so the states after 4 and 8 are saved.

    The run that resumes continues the count of skipped updates.
    """
    inject_faults(monkeypatch, skipped=(2, 5, 6))
    train_scorer(tmp_path, stop_at=8)
    assert checkpointed(tmp_path) == [4, 8] and "(3 so far)" in capsys.readouterr().out
    inject_faults(monkeypatch, skipped=(8,))
    train_scorer(tmp_path)
    assert checkpointed(tmp_path) == [4, 8, 9] and "(4 so far)" in capsys.readouterr().out


def test_a_run_that_stops_while_updates_are_skipped_saves_nothing(tmp_path, monkeypatch, capsys):
    """However often it does, so the checkpoint from before remains the last."""
    train_scorer(tmp_path, stop_at=3)
    inject_faults(monkeypatch, skipped=range(3, 9))
    for stop in (4, 5, 6):
        train_scorer(tmp_path, stop_at=stop)
        assert checkpointed(tmp_path) == [3]
        words = f"stops at step {stop}, which was skipped and is not saved"
        assert f"{words} (the last checkpoint is step 3)" in capsys.readouterr().out
    with pytest.raises(TrainingError, match="4 consecutive updates were skipped"):
        train_scorer(tmp_path)


@pytest.mark.parametrize(
    ("fault", "words", "left"),
    [
        (dict(ruined=(5,)), "stage scorer: parameters are not finite after step 6", [3]),
        (dict(ruined=(8,)), "stage scorer: parameters are not finite after step 9", [3, 6]),
        (dict(validation=np.inf), "stage scorer: validation loss is inf after step 9", [3, 6]),
    ],
)
def test_a_diverged_state_is_never_saved(tmp_path, monkeypatch, fault, words, left):
    """Even if loss and gradient of the update that diverged were finite."""
    inject_faults(monkeypatch, **fault)
    with pytest.raises(TrainingError, match=words) as stopped:
        train_scorer(tmp_path)
    assert f"is step {left[-1]}" in str(stopped.value) and checkpointed(tmp_path) == left


def test_a_trained_stage_that_lost_its_config_or_checkpoints_is_not_trained_again(tmp_path):
    """Another config.json would give the same arrays another meaning.

    A stage whose checkpoints are gone is trained again only once its folder is removed.
    """
    train_scorer(tmp_path, stop_at=1)
    kept = (tmp_path / "config.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match="has trained stages and no config.json"):
        train_scorer(tmp_path, diffusion=dict(d=9.0))
    kept.rename(tmp_path / "config.json")
    shutil.rmtree(tmp_path / "scorer" / "checkpoints")
    words = (
        "got no checkpoint, expected step 1, .* Restore a copy, or move .*scorer elsewhere to train"
    )
    with pytest.raises(CheckpointError, match=words):
        train_scorer(tmp_path)
    shutil.rmtree(tmp_path / "scorer")
    train_scorer(tmp_path, stop_at=2)
    assert checkpointed(tmp_path) == [2]
