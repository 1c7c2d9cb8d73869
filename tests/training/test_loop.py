"""The loop by its command: killed and resumed runs, passing over what is done, starting from another workdir."""

import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config

from diladiff_jax.config import ConfigError
from diladiff_jax.storage import CheckpointError, WorkdirError
from diladiff_jax.training import loop
from diladiff_jax.training.anomalies import TrainingError
from diladiff_jax.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]


def write_config(folder, **changes):
    """The micro experiment as a config file that the command can load."""
    path = folder / "experiment.py"
    settings = micro_config(**changes).to_dict()
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({settings!r})\n"
    )
    return path


def command(workdir, config, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    words = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        f"--workdir={workdir}",
        f"--config={config}",
        *flags,
    ]
    return subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def final_arrays(workdir, stage):
    """Every array of the stage's last checkpoint, and its data position."""
    import orbax.checkpoint as ocp

    anywhere = jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
    )  # devices of other processes are not here
    directory = (workdir / stage / "checkpoints").absolute()
    step = max(int(p.name) for p in directory.iterdir() if p.name.isdigit())
    found = {}
    for item in ("params", "ema", "training", "statistics"):
        if (directory / str(step) / item).is_dir():
            with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
                tree = reader.restore(
                    directory / str(step) / item,
                    args=ocp.args.StandardRestore(fallback_sharding=anywhere),
                )
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
                found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return (
        step,
        found,
        json.loads(next((directory / str(step) / "data").rglob("metadata")).read_text()),
    )


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(trained, tmp_path):
    """The autoencoder, which has statistics of its own: SIGKILL in the middle, then the same command; everything is equal. (The first
    stage is killed in test_faults.py.)"""
    steps = 200
    config = write_config(
        tmp_path,
        autoencoder=dict(steps=steps),
        logging=dict(checkpoint_every=10, validate_every=1000, samples=0),
    )
    start = f"--init_from={trained}"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(whole, config, "--stage=autoencoder", start))
    process = command(broken, config, "--stage=autoencoder", start)
    checkpoints = broken / "autoencoder" / "checkpoints"
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
    resumed = finish(command(broken, config, "--stage=autoencoder"))
    assert f"/{steps}" in resumed
    (step_a, a, position_a), (step_b, b, position_b) = (
        final_arrays(whole, "autoencoder"),
        final_arrays(broken, "autoencoder"),
    )
    assert step_a == step_b == steps and position_a == position_b and a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert not different
    assert final_arrays(trained, "autoencoder")[0] == 6  # the workdir it started from is as it was
    assert any("optimizer" in name for name in a) and any("statistics" in name for name in a)


def test_finished_stages_are_passed_over_and_longer_ones_continue(tmp_path):
    """The same command twice does nothing; more steps go on from the last one. A trace is written of the updates asked for, and rates are recorded."""
    config = write_config(tmp_path, logging=dict(samples=0, profile_at=2, profile_steps=2))
    workdir = tmp_path / "w"
    finish(
        command(workdir, config, "--stage=all", "--stop_at=2")
    )  # ends there, whatever would follow
    assert "mdlm: goes on from step 2 of 6" in finish(command(workdir, config, "--stage=mdlm"))
    assert "mdlm: trained already (6 steps)" in finish(command(workdir, config, "--stage=mdlm"))
    finish(command(workdir, config, "--stage=mdlm", "--config.mdlm.steps=8"))
    records = [
        json.loads(line)
        for line in (workdir / "mdlm" / "metrics" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [r["step"] for r in records if "train/loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 8
    assert any("validation/loss" in r for r in records)
    assert all(
        r["train/tokens_per_second_per_device"] > 0 for r in records[1:] if "train/loss" in r
    )
    assert list((workdir / "mdlm" / "profile").rglob("*.xplane.pb"))
    assert list((workdir / "mdlm" / "metrics").glob("events.out.tfevents*"))
    assert final_arrays(workdir, "mdlm")[2]["position"] == 8


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stage=ladiff"], "stage autoencoder is not trained"),
        (["--stage=nothing"], "--stage is 'nothing'"),
        (["--stage=mdlm", "--config.mdlm.batch=0"], "mdlm.batch is 0; it must be between 1 and"),
        (["--stage=mdlm", "--config.backbone.heads=5"], "backbone.heads is 5"),
        (["--stage=mdlm", "--config.mdlm.optimiser=x"], "optimizer"),
        (["--stage=mdlm", "--config.mesh.data=3"], "the number of devices, 1"),
        (["--stage=mdlm", "--init_from=/nowhere"], "/nowhere has no tokenizer"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, flags, words):
    """What, where, what would be right: one line, exit code 1, no traceback."""
    process = command(tmp_path / "w", write_config(tmp_path), *flags)
    out, _ = process.communicate(timeout=120)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert (
        process.returncode == 1
        and len(errors) == 1
        and words in errors[0]
        and "Traceback" not in out
    ), out


def test_a_workdir_has_one_trainer(tmp_path):
    """While another holds the lock training is refused in one line and writes nothing; a lock whose holder is gone holds nothing."""
    workdir = tmp_path / "w"
    workdir.mkdir()
    with (workdir / "training.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkdirError, match="another process is training or preparing data"):
            train(micro_config(), workdir, ("mdlm",))
        assert [path.name for path in workdir.iterdir()] == ["training.lock"]
    for _ in range(2):  # no longer that, but what was refused later: and that gives the lock back
        with pytest.raises(CheckpointError, match="stage autoencoder is not trained"):
            train(micro_config(), workdir, ("ladiff",))


def test_a_changed_experiment_is_refused(tmp_path):
    """A workdir keeps the settings that its networks were made with."""
    config = write_config(tmp_path, logging=dict(samples=0))
    finish(command(tmp_path / "w", config, "--stage=mdlm", "--config.mdlm.steps=1"))
    before = (tmp_path / "w" / "config.json").read_text()
    process = command(tmp_path / "w", config, "--stage=mdlm", "--config.mdlm.learning_rate=0.5")
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "mdlm.learning_rate differs" in out
    assert (tmp_path / "w" / "config.json").read_text() == before


def faulty(monkeypatch, *, skipped=(), ruined=(), validation=None):
    """Has updates look skipped, or leave a parameter that is no number, or validations give that loss, in the loop alone."""
    compiled = loop.compile_steps

    def compile_steps(*args, **kwargs):
        step, validate = compiled(*args, **kwargs)

        def faulty_step(state, context, tokens):
            number = int(state.step)
            state, metrics = step(state, context, tokens)
            if number in skipped:
                metrics |= {"skipped": jnp.float32(1), "loss": jnp.float32(jnp.nan)}
            if number in ruined:
                state = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
            return state, metrics

        def faulty_validation(*args):
            return validate(*args) | (
                {} if validation is None else {"loss": jnp.float32(validation)}
            )

        return faulty_step, faulty_validation

    monkeypatch.setattr(loop, "compile_steps", compile_steps)


def test_a_step_waits_for_no_checkpoint(tmp_path, monkeypatch):
    """What there is to go on from is looked up, and a save waited for, only to be said."""
    monkeypatch.setattr(loop.Checkpoints, "wait", lambda self: pytest.fail("it is waited for"))
    train(micro_config(**SCORER), tmp_path, ("scorer",))
    assert checkpointed(tmp_path) == [3, 6, 9]


def checkpointed(workdir):
    return sorted(
        int(path.name)
        for path in (workdir / "scorer" / "checkpoints").glob("*")
        if path.name.isdecimal()
    )


SCORER = dict(
    scorer=dict(steps=9),
    logging=dict(checkpoint_every=3, keep_checkpoints=9, samples=0, max_skips=3),
)


def test_a_checkpoint_due_while_updates_are_skipped_is_saved_after_the_next_one(
    tmp_path, monkeypatch, capsys
):
    """Updates 3 (of which one is due) and 6, 7 are skipped: the states after 4 and 8 are saved, and the skips counted on by the run that resumes."""
    faulty(monkeypatch, skipped=(2, 5, 6))
    train(micro_config(**SCORER), tmp_path, ("scorer",), stop_at=8)
    assert checkpointed(tmp_path) == [4, 8] and "(3 so far)" in capsys.readouterr().out
    faulty(monkeypatch, skipped=(8,))
    train(micro_config(**SCORER), tmp_path, ("scorer",))
    assert checkpointed(tmp_path) == [4, 8, 9] and "(4 so far)" in capsys.readouterr().out


def test_stops_while_updates_are_skipped_push_nothing_out(tmp_path, monkeypatch, capsys):
    """Told to stop in the midst of them, again and again: what was saved before stays the last."""
    train(micro_config(**SCORER), tmp_path, ("scorer",), stop_at=3)
    faulty(monkeypatch, skipped=range(3, 9))
    for stop in (4, 5, 6):
        train(micro_config(**SCORER), tmp_path, ("scorer",), stop_at=stop)
        assert checkpointed(tmp_path) == [3]
        assert (
            f"ends at step {stop}, which was skipped and is not saved (the last checkpoint is step 3)"
            in capsys.readouterr().out
        )
    with pytest.raises(TrainingError, match="4 updates in a row"):
        train(micro_config(**SCORER), tmp_path, ("scorer",))


@pytest.mark.parametrize(
    ("fault", "words", "left"),
    [
        (dict(ruined=(5,)), "parameters of stage scorer are not finite after step 6", [3]),
        (dict(ruined=(8,)), "parameters of stage scorer are not finite after step 9", [3, 6]),
        (dict(validation=np.inf), "validation loss of stage scorer is inf after step 9", [3, 6]),
    ],
)
def test_what_has_diverged_is_not_saved(tmp_path, monkeypatch, fault, words, left):
    """By an update whose own loss and gradient were finite still: never a checkpoint, nor a stage that counts as trained."""
    faulty(monkeypatch, **fault)
    with pytest.raises(TrainingError, match=words) as stopped:
        train(micro_config(**SCORER), tmp_path, ("scorer",))
    assert f"is step {left[-1]}" in str(stopped.value) and checkpointed(tmp_path) == left


def test_stages_without_their_settings_or_checkpoints_are_not_begun_anew(tmp_path):
    """config.json gone: another one would give the same arrays another meaning. Checkpoints gone: a stage that was trained is not trained again unasked."""
    train(micro_config(**SCORER), tmp_path, ("scorer",), stop_at=1)
    before = (tmp_path / "config.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match="has trained stages and no config.json"):
        train(micro_config(**SCORER, diffusion=dict(d=9.0)), tmp_path, ("scorer",))
    before.rename(tmp_path / "config.json")
    shutil.rmtree(tmp_path / "scorer" / "checkpoints")
    with pytest.raises(
        CheckpointError,
        match="got no checkpoint, expected step 1, .* Restore a copy, or remove .*scorer to train this",
    ):
        train(micro_config(**SCORER), tmp_path, ("scorer",))
    shutil.rmtree(tmp_path / "scorer")
    train(micro_config(**SCORER), tmp_path, ("scorer",), stop_at=2)
    assert checkpointed(tmp_path) == [2]


def test_told_to_end_before_training_it_says_so(tmp_path):
    """SIGTERM while text is prepared: the code on which launchers start it again. Ctrl-C while libraries are imported: no traceback."""
    config = write_config(tmp_path, data=dict(documents=200_000))
    process = command(tmp_path / "w", config, "--stage=mdlm")
    while not (tmp_path / "w" / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert (
        process.returncode == 75
        and "stopped by SIGTERM before training" in out
        and "Traceback" not in out
    )
    for seconds in (0.1, 0.4, 0.8):
        process = command(tmp_path / "v", config, "--stage=mdlm")
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=120)
        assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in out, (
            seconds,
            out,
        )
