"""A small training under test: started, ended, looked at on the disk, and held against an undisturbed one to the bit."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import sys
import time

from absl import flags

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "launch"))
import cli

EVERY = 25  # steps from checkpoint to checkpoint
SETTINGS = [
    "--config=" + str(cli.ROOT / "configs" / "tiny.py"), "--config.data.documents=300", "--config.data.validation_documents=40",
    "--config.data.scorer_documents=60", "--config.backbone.width=16", "--config.backbone.num_layers=1", "--config.backbone.heads=2",
    "--config.decoder.cross_layers=(0,)", "--config.mdlm.batch=8", "--config.mdlm.optimizer=adamw",
    "--config.encoder.width=16", "--config.encoder.heads=2", "--config.encoder.num_layers=1", "--config.encoder.num_latents=4", "--config.encoder.latent_dim=8",
    "--config.autoencoder.batch=8", "--config.autoencoder.optimizer=adamw", f"--config.logging.checkpoint_every={EVERY}", "--config.logging.validate_every=100000", "--config.logging.metrics_every=100", "--config.logging.samples=0",
]  # fmt: skip


class Lost(Exception):
    """A fault that was not survived: what was wrong."""


def start(
    workdir: pathlib.Path,
    *words: str,
    stage: str = "mdlm",
    limit: int | None = None,
    **variables: str,
) -> subprocess.Popen[str]:
    """One process of launch/train.py, on one device, with more environment variables; with `limit` no file of its grows past so many KiB."""
    environment = (
        {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        | {"JAX_PLATFORMS": "cpu"}
        | variables
    )
    command = [
        sys.executable,
        str(cli.ROOT / "launch" / "train.py"),
        f"--workdir={workdir}",
        *SETTINGS,
        f"--stage={stage}",
    ]
    command += [
        f"--config.mdlm.steps={flags.FLAGS.steps}",
        f"--config.autoencoder.steps={flags.FLAGS.steps}",
        *words,
    ]
    if limit is not None:
        command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *command]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen[str], *allowed: int, stands: int | None = None) -> str:
    """What a process printed, once it has ended with one of these exit codes and no traceback; and went on from `stands`, the step of the last
    checkpoint when it started, if it came so far (as it has where it ended by itself, but not in an error)."""
    try:
        out = process.communicate(timeout=600)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise Lost(f"it hangs: {process.communicate()[0][-600:]}") from None
    if process.returncode not in allowed or "Traceback" in out:
        raise Lost(f"exit code {process.returncode}: {out[-600:]}")
    if (
        process.returncode == 1
        and len([line for line in out.splitlines() if line.startswith("error: ")]) != 1
    ):
        raise Lost(f"not one line of error: {out[-600:]}")
    if stands is not None:
        went_on, came = (
            re.findall(r": goes on from step (\d+) of", out),
            process.returncode == 0 or "which is saved" in out,
        )
        if went_on not in ([str(stands)], []) or (
            came and not went_on and stands > 0 and "trained already" not in out
        ):
            raise Lost(f"it did not go on from step {stands}: {out[-600:]}")
    return out


def steps_of(workdir: pathlib.Path, stage: str = "mdlm") -> list[int]:
    """Committed checkpoints, in order."""
    from diladiff_jax.storage.quarantine import checkpoint_steps

    return sorted(checkpoint_steps(workdir / stage / "checkpoints"))


@functools.cache
def arrays_of(workdir: pathlib.Path, stage: str = "mdlm") -> dict[str, bytes]:
    """Every array of the last checkpoint, and the data position, as bytes."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = (workdir / stage / "checkpoints").absolute() / str(steps_of(workdir, stage)[-1])
    found = {
        "step": folder.name.encode(),
        "data": next((folder / "data").rglob("metadata")).read_bytes(),
    }
    anywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for item in ("params", "ema", "training", "statistics"):
        if not (folder / item).is_dir():  # which of them a stage has, its reference has too
            continue
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
            tree = reader.restore(
                folder / item, args=ocp.args.StandardRestore(fallback_sharding=anywhere)
            )
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    return found


def same(workdir: pathlib.Path, reference: pathlib.Path, stage: str = "mdlm") -> None:
    """Raises Lost where the last checkpoints differ in a bit."""
    ours, theirs = arrays_of(workdir, stage), arrays_of(reference, stage)
    different = [name for name in theirs if ours.get(name) != theirs[name]]
    if different or ours.keys() != theirs.keys():
        raise Lost(
            f"{len(different)} of {len(theirs)} arrays differ from the undisturbed run's, {different[:1]} first"
        )


def there(workdir: pathlib.Path, before: int, stage: str = "mdlm") -> int:
    """The last committed step, which may not fall, and whose checksums, where it has them already, hold."""
    from diladiff_jax.storage import checksums

    steps = steps_of(workdir, stage)
    if before and (not steps or steps[-1] < before):
        raise Lost(f"checkpoint {before} was there and is not any more; there are {steps}")
    if steps and (why := checksums.find_damage(workdir / stage / "checkpoints" / str(steps[-1]))):
        raise Lost(f"checkpoint {steps[-1]}: {why}")
    return steps[-1] if steps else 0


def being_written(workdir: pathlib.Path, stage: str = "mdlm") -> set[tuple[str, int]]:
    """Temporary folders of checkpoints, by name and inode: those of killed processes stay until their step is saved again."""
    found = set()
    for path in (workdir / stage / "checkpoints").glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino))
    return found


def until_saving(
    process: subprocess.Popen[str],
    workdir: pathlib.Path,
    skip: int,
    before: set[tuple[str, int]],
    stage: str = "mdlm",
) -> bool:
    """Waits until a checkpoint is being written that was not `before`, the `skip`-th such; whether it still was, and the process there."""
    seen: set[tuple[str, int]] = set()
    while process.poll() is None:
        now = being_written(workdir, stage) - before
        if now - seen and len(seen | now) > skip:
            return True
        seen |= now
        time.sleep(0.0005)
    return False
