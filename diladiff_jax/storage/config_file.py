"""`config.json` of a workdir or bundle: reading, writing, and which settings may change."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diladiff_jax import files, stages
from diladiff_jax.config import Config, ConfigError, blocks, resolve

Path = str | pathlib.Path

MAY_CHANGE = ("mesh", "memory", "sampling", "evaluation", "logging")
"""Blocks that later commands on a workdir may change. The `steps` of any stage may change too."""

_FILE = "config.json"
_MAX_BYTES = 1 << 20  # the file may be a stranger's
_TRAINING_ONLY = ("dropout", "embedding_std")  # settings that trained parameters do not depend on


def load(workdir: Path) -> Config:
    """Reads and checks `WORKDIR/config.json`.

    Raises:
      ConfigError: the file does not exist, is not JSON, or is not a valid experiment.
    """
    path = pathlib.Path(workdir) / _FILE
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ConfigError(f"{path} is not a file, expected one JSON object of settings.")
        with path.open("rb") as data:
            text = data.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ConfigError(
                f"{path} is larger than {_MAX_BYTES} bytes, expected one JSON object."
            )
        given = json.loads(text)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist. Create a workdir with launch/train.py or launch/prepare.py."
        ) from None
    except ConfigError:  # which is a ValueError
        raise
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}). Give the folder of an experiment."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({error}). Restore it, or use a new workdir."
        ) from None
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: got {type(given).__name__}, expected one JSON object.")
    known = blocks()
    for name, value in given.items():
        if isinstance(value, dict) and name not in known:
            raise ConfigError(
                f"{path}: {name[:100]!r} is not a block of a config. If it is a stage of an "
                f"extension, import the extension first: commands do so with --config=FILE of a "
                f"config that imports it."
            )
    return resolve(given)


def save(config: Config, workdir: Path, *, first: bool = False) -> None:
    """Writes `WORKDIR/config.json` if `require_own` allows it.

    Args:
      config: the experiment.
      workdir: the folder; it is created if necessary.
      first: whether to keep an existing file from which something was made. A command that
        fails later then leaves the workdir's experiment unchanged.

    Raises:
      ConfigError: as `require_own`; or the workdir cannot be written.
    """
    require_own(config, workdir)
    workdir = pathlib.Path(workdir)
    if first and _in_use(workdir):
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files.atomic_write_text(workdir / _FILE, json.dumps(config.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be written ({error.strerror}). Give a writable folder."
        ) from None


def require_same(config: Config, workdir: Path) -> None:
    """Checks that `config` is the experiment of the workdir, except for what may change.

    Raises:
      ConfigError: a setting differs that the workdir's networks were trained with.
    """
    ours = load(workdir).to_dict()
    recorded = json.loads((pathlib.Path(workdir) / _FILE).read_bytes())
    changed = [
        key
        for key in _differences(ours, config.to_dict())
        if key.split(".")[0] not in MAY_CHANGE
        and key.split(".")[0] in recorded  # a stage that was registered since is new there
        and not key.endswith(".steps")
    ]
    if changed:
        raise ConfigError(
            f"config {_differ(changed)} from {pathlib.Path(workdir) / _FILE}, which this workdir "
            f"was made with. Use these settings as they are there, or another --workdir."
        )


def require_inherited(config: Config, source: Path, stage: str) -> None:
    """Checks that the stages before `stage` mean the same in `config` as in their source.

    Equal shapes do not imply that: many settings change the meaning of parameters only.

    Args:
      config: the experiment to train.
      source: the workdir or bundle that the earlier stages are inherited from.
      stage: the first stage that is trained.

    Raises:
      ConfigError: a setting differs that the inherited stages depend on.
    """
    inherited = stages.predecessors(stage)
    names = [name for earlier in inherited for name in stages.STAGES[earlier].meaning]
    changed = [
        key
        for key in _differences(load(source).to_dict(), config.to_dict())
        if any(key == name or key.startswith(f"{name}.") for name in names)
        and not key.endswith(_TRAINING_ONLY)
    ]
    if changed:
        raise ConfigError(
            f"config {_differ(changed)} from {pathlib.Path(source) / _FILE}, from which stage "
            f"{inherited[0]} is inherited. Use these settings as they are there."
        )


def require_own(config: Config, workdir: Path) -> None:
    """Checks that `config` may become or remain the experiment of the workdir.

    Raises:
      ConfigError: something in the workdir was made with other settings, or it is a bundle.
    """
    workdir = pathlib.Path(workdir)
    # Tensors alone are a bundle that lost its manifest.
    if (workdir / "bundle.json").exists() or any(workdir.glob("*.safetensors")):
        raise ConfigError(
            f"--workdir: {workdir} is a bundle, which cannot be trained in. Use another --workdir "
            f"with --init_from={workdir} to start from it."
        )
    if _in_use(workdir):
        require_same(config, workdir)


def _in_use(workdir: pathlib.Path) -> bool:
    """Whether something was made from `WORKDIR/config.json`.

    Raises:
      ConfigError: a stage was trained and the file is gone, or the workdir cannot be read.
    """
    try:
        trained = any(
            path.name.isdecimal()
            for stage in stages.STAGES
            for path in (workdir / stage / "checkpoints").glob("*")
        )
        if (workdir / _FILE).exists():
            return trained or (workdir / "prepared.json").exists()
        if trained:
            raise ConfigError(
                f"workdir {workdir} has trained stages and no config.json, without which their "
                f"parameters have no meaning. Restore that file, or use another --workdir."
            )
        return False
    except OSError as error:
        raise ConfigError(
            f"workdir {workdir} cannot be read ({error.strerror}). Give a readable folder."
        ) from None


def _differ(keys: list[str]) -> str:
    """ "key a.b differs" or "keys a.b, c.d, e.f and 4 more differ"."""
    if len(keys) == 1:
        return f"key {keys[0]} differs"
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return f"keys {', '.join(keys[:3])}{more} differ"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    found: list[str] = []
    for key in a:
        if isinstance(a[key], Mapping):
            found += _differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            found.append(prefix + key)
    return found
