"""Reading a bundle, which may be damaged or a stranger's."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax import files
from diladiff_jax.data import tokenizers
from diladiff_jax.storage import config_file, pretrained
from diladiff_jax.storage.bundles.format import (
    MANIFEST,
    STATISTICS,
    bundle_error,
    quoted,
    read_manifest,
    sha256,
    tensor_name,
)
from diladiff_jax.storage.bundles.settings import check_settings
from diladiff_jax.storage.errors import CheckpointError

_DTYPES = {"F32": np.float32, "BF16": jnp.bfloat16}


class Bundle:
    """A bundle's folder. Tensors are verified when they are read.

    Raises:
      CheckpointError: the folder is not a bundle, or its manifest is malformed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = files.expand(folder)
        self._manifest = read_manifest(self.folder)

    def check(self) -> None:
        """Verifies config, tokenizer and published encoder, and that settings stay inside.

        Raises:
          CheckpointError: a file is missing or damaged, or a setting points outside the bundle.
          ConfigError, DataError: the config or the tokenizer's record is malformed.
        """
        for name in ("config.json", "tokenizer/tokenizer.json"):
            self._verify(name)
        settings = config_file.load(self.folder).to_dict()
        # These are read later without another look at the manifest.
        read_later = [
            f"tokenizer/{name}" for name in tokenizers.vocabulary_files(self.folder / "tokenizer")
        ]
        if settings["features"]["source"] == "bert":
            read_later += [f"features/{name}" for name in pretrained.ENCODER_FILES]
        for name in read_later:
            self._verify(name)
        check_settings(self.folder, settings)

    def steps(self, stage: str) -> int:
        """How many updates the stage was trained for; 0 if the bundle does not hold it."""
        entry = self._manifest.stages.get(stage)
        return 0 if entry is None else entry.steps

    def read(self, stage: str, abstract: Any, shardings: Any) -> Any:
        """Reads the parameters of a stage. Each device reads only its own part.

        Args:
          stage: name of the stage.
          abstract: shapes and dtypes of the parameters; bfloat16 files are converted.
          shardings: the sharding of each parameter, in a tree of the same structure.

        Raises:
          CheckpointError: the bundle does not hold the stage, or it is damaged or belongs to
            another experiment.
        """
        if stage not in self._manifest.stages:
            held = ", ".join(self._manifest.stages) or "none"
            raise CheckpointError(f"bundle {self.folder}: got no stage {stage}, only {held}.")
        return self._read_tensors(self._manifest.stages[stage].files, abstract, shardings)

    def read_statistics(self, abstract: Any, shardings: Any) -> Any:
        """Reads the statistics of features and latents. Arguments and errors as for `read`."""
        return self._read_tensors([f"{STATISTICS}.safetensors"], abstract, shardings)

    def _verify(self, name: str) -> None:
        """Raises CheckpointError unless the file is the one that the manifest lists."""
        path = self.folder / name
        if name not in self._manifest.files:
            raise self._error(f"{MANIFEST} does not list {name}")
        entry = self._manifest.files[name]
        try:
            # The size comes first: a device such as /dev/zero would be read without end.
            if not path.is_file():
                raise self._error(f"{name} is missing or not a regular file")
            if (size := path.stat().st_size) != entry.bytes:
                raise self._error(f"{name} has {size} bytes instead of {entry.bytes}")
            if sha256(path) != entry.sha256:
                raise self._error(f"{name} was changed")
        except OSError as error:
            raise self._error(f"{name} cannot be read ({error.strerror})") from None

    def _read_tensors(self, names: list[str], abstract: Any, shardings: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        with contextlib.ExitStack() as stack:
            stored = self._open_tensors(names, stack)
            self._check_tensors(names[0], {tensor_name(p): leaf for p, leaf in leaves}, stored)

            def read_part(key: str, leaf: Any, index: Any) -> np.ndarray:
                name, view = stored[key]
                part = view[index] if leaf.ndim else view[...]  # a scalar has no slices
                values = np.asarray(part, leaf.dtype)
                if not np.isfinite(values).all():
                    raise self._error(f"{name} has non-finite values in {key}")
                return values

            arrays = [
                jax.make_array_from_callback(
                    leaf.shape, sharding, functools.partial(read_part, tensor_name(path), leaf)
                )
                for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
            ]
        return jax.tree.unflatten(tree, arrays)

    def _open_tensors(
        self, names: list[str], stack: contextlib.ExitStack
    ) -> dict[str, tuple[str, Any]]:
        """Opens verified files: `{tensor: (file name, view)}`. No tensor is read yet."""
        import safetensors

        stored: dict[str, tuple[str, Any]] = {}
        for name in names:
            self._verify(name)
            try:
                opened = stack.enter_context(
                    safetensors.safe_open(self.folder / name, framework="numpy")
                )
                keys = opened.keys()  # safe_open is not iterable itself
                found = {key: (name, opened.get_slice(key)) for key in keys}
            except (safetensors.SafetensorError, OSError, ValueError, KeyError) as error:
                raise self._error(
                    f"{name} is not a complete safetensors file ({str(error)[:100]})"
                ) from None
            if twice := stored.keys() & found.keys():
                first = min(twice)
                raise self._error(
                    f"{name} has the tensor {quoted(first)}, which is also in {stored[first][0]}"
                )
            stored |= found
        return stored

    def _check_tensors(
        self, first_file: str, wanted: dict[str, Any], stored: dict[str, tuple[str, Any]]
    ) -> None:
        """Raises CheckpointError unless the stored tensors are those of the experiment.

        Intact files may still belong to another experiment: a stranger's, or this one with other
        settings.
        """

        def error(problem: str) -> CheckpointError:
            return CheckpointError(
                f"bundle {self.folder}: {problem}. Use the settings in "
                f"{self.folder / 'config.json'}; if you do, download the bundle again."
            )

        for key in [*wanted, *stored]:
            if key not in stored:
                raise error(f"{first_file} has no tensor {key}, which the settings require")
            name, view = stored[key]
            if key not in wanted:
                raise error(f"{name} has a tensor {quoted(key)} that the settings do not include")
            shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if shape != wanted[key].shape or dtype not in _DTYPES:
                raise error(
                    f"{name}: tensor {key}: got {dtype} {shape}, "
                    f"expected {' or '.join(_DTYPES)} {wanted[key].shape}"
                )

    def _error(self, problem: str) -> CheckpointError:
        return bundle_error(self.folder, problem)
