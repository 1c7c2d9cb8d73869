"""`config.json` of a workdir or bundle: read, written, and held to what was made from it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diladiff_jax import files
from diladiff_jax.config import BASELINES, PREDECESSOR, STAGES, ConfigError, resolve

MAY_CHANGE = ("mesh", "memory", "sampling", "evaluation", "logging")
"""Blocks that a later command on the same workdir may give differently (as it may every `steps`)."""

_CONFIG_BYTES = 1 << 20  # of a config.json, which may be a stranger's


def require_same(config: ConfigDict, workdir: str | pathlib.Path) -> None:
    """Checks that `config` is the experiment of `WORKDIR/config.json`, but for what a later command may change.

    Raises:
      ConfigError: a setting that the workdir's networks were trained with has changed.
    """
    changed = [
        key
        for key in _differences(load(workdir).to_dict(), config.to_dict())
        if key.split(".")[0] not in MAY_CHANGE and not key.endswith(".steps")
    ]
    if changed:
        path = pathlib.Path(workdir) / "config.json"
        raise ConfigError(
            f"config {_named(changed)} from {path}, which this workdir was made with; use another --workdir, or these settings as they are there"
        )


_MEANING = {
    "mdlm": ("data.length", "backbone"),
    "autoencoder": ("features.source", "features.with_embeddings", "encoder", "decoder"),
    "ladiff": ("latent_denoiser", "diffusion"),
}
_NO_MEANING = ("dropout", "embedding_std")  # of training alone


def require_taken(config: ConfigDict, source: str | pathlib.Path, stage: str) -> None:
    """Checks that what decides the meaning of the stages before `stage` is in `config` as in the workdir or bundle they are taken from.

    Raises:
      ConfigError: a setting differs; shapes alone would let many of them pass.
    """
    before, earlier = PREDECESSOR[stage], []
    while before is not None:
        earlier, before = [*earlier, before], PREDECESSOR[before]
    names = [name for done in earlier for name in _MEANING[done]]
    changed = [
        key
        for key in _differences(load(source).to_dict(), config.to_dict())
        if any(key == name or key.startswith(f"{name}.") for name in names)
        and not key.endswith(_NO_MEANING)
    ]
    if changed:
        raise ConfigError(
            f"config {_named(changed)} from {pathlib.Path(source) / 'config.json'}, whose {earlier[0]} is taken over; give these settings as they are there"
        )


def require_own(config: ConfigDict, workdir: str | pathlib.Path) -> None:
    """Checks that `config` may be the workdir's: nothing was made there from another one, and it is no bundle.

    Raises:
      ConfigError: as `require_same`; or the workdir is a bundle.
    """
    workdir = pathlib.Path(workdir)
    if (workdir / "bundle.json").exists() or any(
        workdir.glob("*.safetensors")
    ):  # or what is left of one
        raise ConfigError(
            f"{workdir} is a bundle, which stays as it is; train in another --workdir, with --init_from={workdir} to start from it"
        )
    if _made(workdir):
        require_same(config, workdir)


def _made(workdir: pathlib.Path) -> bool:
    """Whether something was made from `WORKDIR/config.json`. Raises ConfigError where something was trained, and that file is gone."""
    try:
        trained = any(
            path.name.isdecimal()
            for stage in STAGES + BASELINES
            for path in (workdir / stage / "checkpoints").glob("*")
        )
        if (workdir / "config.json").exists():
            return trained or (workdir / "prepared.json").exists()
        if trained:
            raise ConfigError(
                f"{workdir} has trained stages and no config.json, which alone says what they are; put it back, or take another --workdir"
            )
        return False
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be read ({error.strerror}); give a folder that can be"
        ) from None


def save(config: ConfigDict, workdir: str | pathlib.Path, *, first: bool = False) -> None:
    """Writes `WORKDIR/config.json`, where `require_own` allows it.

    With `first` that one is left as it is: a command that is refused later leaves the workdir's experiment alone.

    Raises:
      ConfigError: as `require_own`; or the workdir cannot be written.
    """
    require_own(config, workdir)
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if first and _made(workdir):
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.atomic_write_text(path, json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written ({error.strerror}); give a folder that can be"
        ) from None


def load(workdir: str | pathlib.Path) -> ConfigDict:
    """Reads and checks `WORKDIR/config.json`.

    Raises:
      ConfigError: no such file, not JSON, or not a valid experiment.
    """
    path = pathlib.Path(workdir) / "config.json"
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is no file; it must be one JSON object of settings")
        with path.open("rb") as data:
            text = data.read(_CONFIG_BYTES + 1)
        given = json.loads(text) if len(text) <= _CONFIG_BYTES else None
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; a workdir is made by launch/train.py or launch/prepare.py"
        ) from None
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); give the folder of an experiment"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({error}); restore it or start a new workdir"
        ) from None
    if not isinstance(given, dict):
        holds = (
            type(given).__name__
            if len(text) <= _CONFIG_BYTES
            else f"more than {_CONFIG_BYTES} bytes"
        )
        raise ConfigError(f"{path} holds {holds}; it must be one JSON object")
    return resolve(given)


def _named(keys: list[str]) -> str:
    """ "key a.b differs" or "keys a.b, c.d, e.f and 4 more differ": an experiment mistaken for another differs in many."""
    if len(keys) == 1:
        return f"key {keys[0]} differs"
    return (
        f"keys {', '.join(keys[:3])}"
        + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        + " differ"
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in a:
        if isinstance(a[key], Mapping):
            found += _differences(a[key], b[key], prefix + key + ".")
        elif a[key] != b[key]:
            found.append(prefix + key)
    return found
