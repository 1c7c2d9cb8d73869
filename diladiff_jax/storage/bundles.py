"""A bundle: a trained experiment as one folder to publish. safetensors, JSON and a vocabulary; nothing in it is ever executed.

    bundle.json            {"format": 1, "stages": {STAGE: {"steps": int, "files": [NAME]}}, "files": {NAME: {"bytes", "sha256"}}}
    config.json            the experiment
    tokenizer/             as `Tokenizer.save` writes it
    features/              the published encoder's files, where features are its
    STAGE.safetensors      tensors by path ("encoder/layers_0/..."), the average where one is kept; large ones as STAGE-1-of-N.safetensors
    statistics.safetensors of features and latents, frozen at the end of the autoencoder stage

A bundle may come from a stranger. Names are confined to this list; every file must be a regular one of the size and SHA-256 that the manifest
has (so a link, as hubs' caches have them, leads to nothing else), and every tensor's name, shape and type, as the header has them, those of
the experiment, before memory is taken for it (a published encoder's file, of the size that it must have, is read whole). Settings that would
have something fetched are refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diladiff_jax.config import BASELINES, STAGES
from diladiff_jax.data import tokenizers
from diladiff_jax.storage import config_file, pretrained
from diladiff_jax.storage.checkpoints import CheckpointError

if TYPE_CHECKING:
    from diladiff_jax.experiment import Experiment

MANIFEST = "bundle.json"
_STATISTICS = "statistics"
_NAMES = re.compile(
    rf"config\.json|(tokenizer|features)/\w[\w.-]*|({'|'.join((*STAGES, *BASELINES, _STATISTICS))})(-\d+-of-\d+)?\.safetensors"
)
_MANIFEST_BYTES = 4 << 20
_FILE_BYTES = (
    4 << 30
)  # tensors of one file: what export holds in memory at a time, and what file systems and hubs take
_EMPTY = ("evaluation.scorer", "data.directory")
_PLAIN = ("data.files", "data.validation_files", "tokenizer.file", "features.path")
_CORPUS = re.compile(
    r"\w[\w.+-]*(/\w[\w.+-]*)?(:\d[\d.]*)?"
)  # a name of TFDS's, such as "wiki40b/en:1.3.0", at most
_DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16}


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder says of itself that it is a bundle.

    Raises:
      CheckpointError: it has a bundle's tensors and no manifest, and so is neither that nor a workdir.
    """
    folder = pathlib.Path(folder)
    if (folder / MANIFEST).is_file():
        return True
    if stray := next(
        (path.name for path in folder.glob("*.safetensors") if _NAMES.fullmatch(path.name)), None
    ):
        raise CheckpointError(
            f"{folder} has {stray} of a bundle and no {MANIFEST}; get the bundle again, or make it anew with launch/export.py"
        )
    return False


class Bundle:
    """The reader of a bundle's folder; tensors are looked at when they are read.

    Raises:
      CheckpointError: no bundle, or a manifest that cannot be right.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder)
        self._files, self._stages = self._manifest()

    def check(self) -> None:
        """Holds config, tokenizer and features against the manifest.

        Raises:
          CheckpointError: one is missing or damaged, or the config names something to be fetched.
          ConfigError, DataError: the config, or the tokenizer's record, is none.
        """
        for name in ("config.json", "tokenizer/tokenizer.json"):
            self._check(name)
        experiment = config_file.load(self.folder)
        # What is read without a look at the manifest must be in it.
        read = [
            f"tokenizer/{name}" for name in tokenizers.vocabulary_files(self.folder / "tokenizer")
        ]
        read += (
            [f"features/{name}" for name in pretrained.ENCODER_FILES]
            if experiment.features.source == "bert"
            else []
        )
        for name in read:
            self._check(name)
        self._check_settings(experiment)

    def _check_settings(self, experiment: ConfigDict) -> None:
        """What a stranger's settings would have fetched, read or written beside the experiment itself."""
        for key in _EMPTY:
            if value := _setting(experiment, key):
                raise self._wrong(
                    "config.json",
                    f"names {key} {value[:100]!r}; in a bundle it must be empty, for nothing is fetched, read or written unasked",
                )
        for key in _PLAIN:
            if (
                "/" in (value := _setting(experiment, key))
                or "\\" in value
                or value in (".", "..")
                or value.startswith("~")
            ):
                raise self._wrong(
                    "config.json",
                    f"names {key} {value[:100]!r}; in a bundle it must be a last name alone, without a folder",
                )
        if not _CORPUS.fullmatch(corpus := experiment.data.corpus):
            raise self._wrong(
                "config.json",
                f"names data.corpus {corpus[:100]!r}; in a bundle it must be a name, and no folder",
            )

    def steps(self, stage: str) -> int:
        """Updates that the stage was trained for; 0 where the bundle does not have it."""
        return self._stages[stage][0] if stage in self._stages else 0

    def read(self, stage: str, abstract: Any, shardings: Any) -> Any:
        """Parameters of a stage, each device reading its own part alone; those kept in bfloat16 come as the network's own type.

        Raises:
          CheckpointError: the bundle lacks the stage, or has it damaged or of another experiment.
        """
        if stage not in self._stages:
            raise CheckpointError(
                f"{self.folder} has no stage {stage}; it has {', '.join(self._stages) or 'none'}"
            )
        return self._tensors(self._stages[stage][1], abstract, shardings)

    def read_statistics(self, abstract: Any, shardings: Any) -> Any:
        """The statistics of features and latents. Raises as `read` does."""
        return self._tensors([f"{_STATISTICS}.safetensors"], abstract, shardings)

    def _manifest(self) -> tuple[dict[str, tuple[int, str]], dict[str, tuple[int, list[str]]]]:
        path = self.folder / MANIFEST
        try:
            with path.open("rb") as data:
                text = data.read(_MANIFEST_BYTES + 1)
            if len(text) > _MANIFEST_BYTES:
                raise self._wrong(MANIFEST, f"is larger than {_MANIFEST_BYTES} bytes")
            given = json.loads(text)
            if type(found := given["format"]) is int and found > 1:
                raise CheckpointError(
                    f"bundle {self.folder} is of format {found}, and this library reads format 1; use a newer one"
                )
            if found != 1:
                raise self._wrong(MANIFEST, f"is of format {str(found)[:100]!r}; it must be 1")
            files = {
                name: (about["bytes"], about["sha256"]) for name, about in given["files"].items()
            }
            stages = {
                stage: (about["steps"], [str(name) for name in about["files"]])
                for stage, about in given["stages"].items()
            }
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}); a bundle is made by launch/export.py"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._wrong(
                MANIFEST, f"is no bundle's manifest ({type(error).__name__}: {str(error)[:100]})"
            ) from None
        for name, (size, total) in files.items():
            if not _NAMES.fullmatch(name):
                raise self._wrong(MANIFEST, f"names {name[:100]!r}, which is no file of a bundle")
            if type(size) is not int or size < 0 or not isinstance(total, str):
                raise self._wrong(MANIFEST, f"has no bytes and sha256 of {name}")
        for stage, (steps, names) in stages.items():
            if stage not in STAGES + BASELINES or type(steps) is not int or steps < 1:
                raise self._wrong(MANIFEST, f"names a stage {stage[:100]!r} of {steps!r} steps")
            if (
                not names
                or len(set(names)) < len(names)
                or any(
                    name not in files or not name.startswith((f"{stage}.", f"{stage}-"))
                    for name in names
                )
            ):
                raise self._wrong(MANIFEST, f"names {str(names)[:100]} as the files of {stage}")
        return files, stages

    def _check(self, name: str) -> None:
        path = self.folder / name
        if name not in self._files:
            raise self._wrong(MANIFEST, f"names no {name}")
        size, total = self._files[name]
        try:
            if not path.is_file():
                raise self._wrong(name, "is missing, or no regular file")
            if path.stat().st_size != size:
                raise self._wrong(name, f"has {path.stat().st_size} bytes of {size}")
            with path.open("rb") as data:
                if hashlib.file_digest(data, "sha256").hexdigest() != total:
                    raise self._wrong(name, "was changed")
        except OSError as error:
            raise self._wrong(name, f"cannot be read ({error.strerror})") from None

    def _tensors(self, names: list[str], abstract: Any, shardings: Any) -> Any:
        import safetensors

        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        wanted = {_name(path): leaf for path, leaf in leaves}
        with contextlib.ExitStack() as stack:
            places: dict[str, tuple[str, Any]] = {}
            for name in names:
                self._check(name)
                try:
                    opened = stack.enter_context(
                        safetensors.safe_open(self.folder / name, framework="numpy")
                    )
                    found = {key: (name, opened.get_slice(key)) for key in opened.keys()}
                except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
                    raise self._wrong(
                        name, f"is not a whole safetensors file ({str(error)[:100]})"
                    ) from None
                if twice := places.keys() & found.keys():
                    raise self._wrong(
                        name,
                        f"has the tensor {min(twice)[:100]!r}, which {places[min(twice)][0]} has too",
                    )
                places |= found
            self._require_same(names[0], wanted, places)

            def take(key: str, leaf: Any, index: Any) -> np.ndarray:
                name, part = places[key]
                values = np.asarray(
                    part[index] if leaf.ndim else part[...], leaf.dtype
                )  # a scalar's slice is a number
                if not np.isfinite(values).all():
                    raise self._wrong(name, f"has numbers in {key} that are not finite")
                return values

            arrays = [
                jax.make_array_from_callback(
                    leaf.shape, sharding, functools.partial(take, _name(path), leaf)
                )
                for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
            ]
        return jax.tree.unflatten(tree, arrays)

    def _require_same(
        self, first: str, wanted: dict[str, Any], places: dict[str, tuple[str, Any]]
    ) -> None:
        """Whole files may still be of another experiment: of a stranger's, or of this one where its settings have been changed."""

        def other(name: str, what: str) -> CheckpointError:
            return CheckpointError(
                f"bundle {self.folder}: {name} {what}; give the settings of {self.folder / 'config.json'}, or, where they are these, get the bundle again"
            )

        for key in [*wanted, *places]:
            if key not in places:
                raise other(first, f"has no tensor {key}, which the experiment's settings ask for")
            name, part = places[key]
            if key not in wanted:
                raise other(
                    name,
                    f"has a tensor {key[:100]!r} that the experiment's settings do not ask for",
                )
            shape, dtype = tuple(part.get_shape()), part.get_dtype()
            if shape != wanted[key].shape or dtype not in _DTYPES:
                raise other(
                    name,
                    f"has {key} as {dtype} {shape}; by the experiment's settings it must be {' or '.join(_DTYPES)} {wanted[key].shape}",
                )

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"bundle {self.folder}: {name} {what}; get the bundle again, or make it anew with launch/export.py"
        )


def export(
    experiment: Experiment,
    out: str | os.PathLike[str],
    *,
    stages: tuple[str, ...] | None = None,
    dtype: Any = np.float32,
) -> pathlib.Path:
    """Writes a bundle of an experiment, aside and then renamed.

    Tensors go from the devices' parts to the host, a file's worth at a time, and leave the devices with that; no device ever holds a whole
    one that the experiment's mesh cuts. Of the paths and hub names that the config was made with only last parts are kept.

    Args:
      stages: default all that are trained.
      dtype: of matrices, float32 or bfloat16, which halves the files and rounds; gains, biases and statistics stay in float32.

    Raises:
      CheckpointError: nothing is trained, a stage that is asked for is not, `out` exists, or it cannot be written.
    """
    import safetensors

    out = pathlib.Path(out).absolute()
    if out.exists():
        raise CheckpointError(f"{out} exists already; give a folder that does not")
    trained = {stage: experiment.trained_steps(stage) for stage in (stages or STAGES + BASELINES)}
    if missing := [stage for stage, steps in trained.items() if not steps and stages]:
        raise CheckpointError(
            f"stage {missing[0]} is not trained in {experiment.workdir}; train it first, or export without it"
        )
    trained = {stage: steps for stage, steps in trained.items() if steps}
    if not trained:
        raise CheckpointError(
            f"{experiment.workdir} has no trained stage; run launch/train.py --workdir={experiment.workdir} --stage=all"
        )
    aside = out.with_name(f"{out.name}.tmp-{os.getpid()}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(experiment, aside, trained, dtype)
        os.rename(aside, out)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{out} cannot be written ({getattr(error, 'strerror', None) or error}); give a folder with room that can be"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return out


def _write(
    experiment: Experiment, folder: pathlib.Path, trained: dict[str, int], dtype: Any
) -> None:
    settings = experiment.config.to_dict()
    # Where text and networks lay here is nobody else's, and a reader may not be sent anywhere.
    for block, name in (key.split(".") for key in _EMPTY):
        settings[block][name] = ""
    for block, name in (key.split(".") for key in _PLAIN):
        settings[block][name] = (
            pathlib.PurePath(settings[block][name]).name.replace("\\", "_").lstrip("~")
        )
    if not _CORPUS.fullmatch(
        corpus := settings["data"]["corpus"]
    ):  # the folder of a prepared dataset
        settings["data"]["corpus"] = (
            re.sub(r"[^\w.+-]", "_", pathlib.PurePath(corpus).name).lstrip(".+-") or "folder"
        )
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    experiment.tokenizer.save(folder / "tokenizer")
    if experiment.networks.bert is not None:
        pretrained.adopt(str(experiment.features_directory), folder / "features")
    stages = {}
    for stage, steps in trained.items():
        stages[stage] = {
            "steps": steps,
            "files": _save(folder, stage, experiment.restore(stage), dtype),
        }
    if "autoencoder" in trained:
        _save(folder, _STATISTICS, experiment.restore_statistics(), np.float32)
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {}
    for name in names:
        with (folder / name).open("rb") as data:
            files[name] = {
                "bytes": (folder / name).stat().st_size,
                "sha256": hashlib.file_digest(data, "sha256").hexdigest(),
            }
    (folder / MANIFEST).write_text(
        json.dumps({"format": 1, "stages": stages, "files": files}, indent=2) + "\n"
    )
    Bundle(folder).check()  # what is written can be read


def _save(folder: pathlib.Path, stem: str, tree: Any, dtype: Any) -> list[str]:
    """The names of the files that now hold the tree."""
    from safetensors.numpy import save_file

    parts = list(
        _parts({_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]})
    )
    names = (
        [f"{stem}.safetensors"]
        if len(parts) == 1
        else [f"{stem}-{i}-of-{len(parts)}.safetensors" for i in range(1, len(parts) + 1)]
    )
    for name, part in zip(names, parts, strict=True):
        # The writer reads memory as it lies, and knows of no strides.
        for key, leaf in part.items():
            if not np.isfinite(np.asarray(leaf)).all():
                raise CheckpointError(
                    f"{stem} has numbers in {key} that are not finite; a model that has diverged is not exported"
                )
        save_file(
            {
                key: np.asarray(leaf).astype(dtype if leaf.ndim > 1 else np.float32, order="C")
                for key, leaf in part.items()
            },
            folder / name,
        )
        for leaf in part.values():
            leaf.delete()  # with the copy on the host that it keeps
        (folder / name).chmod(0o644)  # safetensors writes for its owner alone
    return names


def _parts(leaves: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The leaves in order, in parts of at most `_FILE_BYTES` of float32 where one leaf is not larger itself."""
    part: dict[str, Any] = {}
    size = 0
    for key, leaf in leaves.items():
        if part and size + 4 * leaf.size > _FILE_BYTES:
            yield part
            part, size = {}, 0
        part[key] = leaf
        size += 4 * leaf.size
    yield part


def _setting(experiment: ConfigDict, key: str) -> Any:
    block, name = key.split(".")
    return experiment[block][name]


def _name(path: Any) -> str:
    return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)
