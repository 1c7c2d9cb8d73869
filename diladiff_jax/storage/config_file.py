"""`config.json` of a workdir or bundle: reading, writing, and which settings may change."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diladiff_jax import files, stages
from diladiff_jax.config import Config, ConfigError, blocks, resolve

Path = str | pathlib.Path

PRECISION = ("compute_dtype", "features.compute_dtype")
"""Keys of the types that networks compute in. Parameters do not depend on them."""

MAY_CHANGE = (*PRECISION, "mesh", "memory", "sampling", "evaluation", "logging")
"""Blocks and keys that belong to a run and not to its networks: later commands on a workdir may
change them. The `steps` of any stage may change too."""

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
        if not _is_within(key, MAY_CHANGE)
        and key.split(".")[0] in recorded  # a stage that was registered since is new there
        and not key.endswith(".steps")
    ]
    if changed:
        raise ConfigError(
            f"config {_differ(changed)} from {pathlib.Path(workdir) / _FILE}, which this workdir "
            f"was made with. Use these settings as they are there, or another --workdir."
        )


def changed_keys(config: Config, workdir: Path, names: Sequence[str]) -> list[str]:
    """The settings in `names` (blocks or keys) that differ from `WORKDIR/config.json`.

    Raises:
      ConfigError: as `load`.
    """
    found = _differences(load(workdir).to_dict(), config.to_dict())
    return [key for key in found if _is_within(key, names)]


def continuation_notes(config: Config, workdir: Path) -> list[str]:
    """One line for each setting of precision or memory that differs from the training so far.

    Raises:
      ConfigError: as `require_own`.
    """
    workdir = pathlib.Path(workdir)
    if not _in_use(workdir) or not _is_trained(workdir):
        return []
    before, now = load(workdir).to_dict(), config.to_dict()
    return [
        f"{key}: was {_value(before, key)} in the training so far, is {_value(now, key)} from now "
        f"on"
        for key in changed_keys(config, workdir, (*PRECISION, "memory"))
    ]


def require_inherited(config: Config, source: Path, inherited: Sequence[str]) -> None:
    """Checks that the inherited stages mean the same in `config` as in their source.

    Equal shapes do not imply that: many settings change the meaning of parameters only.

    Args:
      config: the experiment to train.
      source: the workdir or bundle that the stages are inherited from.
      inherited: the stages that are read from it; see `lineage.inherited_stages`.

    Raises:
      ConfigError: a setting differs that an inherited stage depends on.
    """
    for stage in inherited:
        changed = [
            key
            for key in changed_keys(config, source, stages.STAGES[stage].meaning)
            if not key.endswith(_TRAINING_ONLY)
        ]
        if changed:
            raise ConfigError(
                f"config {_differ(changed)} from {pathlib.Path(source) / _FILE}, from which stage "
                f"{stage} is inherited. Use these settings as they are there."
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
        trained = _is_trained(workdir)
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


def _is_trained(workdir: pathlib.Path) -> bool:
    """Whether a stage has a checkpoint in the workdir itself."""
    return any(
        path.name.isdecimal()
        for stage in stages.STAGES
        for path in (workdir / stage / "checkpoints").glob("*")
    )


def _is_within(key: str, names: Sequence[str]) -> bool:
    """Whether a dotted key is one of the names, or in a block of that name."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(settings: Mapping[str, Any], key: str) -> Any:
    return functools.reduce(lambda block, name: block[name], key.split("."), settings)


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
