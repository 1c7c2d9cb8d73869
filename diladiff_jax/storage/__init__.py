"""Everything that is kept on disk: checkpoints, bundles, workdirs, and published weights.

Modules:
  checkpoints: Orbax checkpoints of a stage.
  checksums, quarantine: detection of damaged checkpoints, and what happens to them.
  bundles: a trained experiment as one portable folder.
  config_file: `config.json` of a workdir or bundle.
  lineage: which workdir or bundle each stage is read from.
  origins: what each trained stage was made from.
  workdir: the lock on a workdir.
  released: trained models that come with the package.
  pretrained: files of published networks, and published encoders.
  scorers, gguf_file: published scorers.
"""

from diladiff_jax.storage import (
    bundles,
    checksums,
    config_file,
    lineage,
    origins,
    pretrained,
    released,
    scorers,
)
from diladiff_jax.storage.bundles import Bundle, export, is_bundle
from diladiff_jax.storage.checkpoints import Checkpoints
from diladiff_jax.storage.errors import (
    CheckpointError,
    PretrainedError,
    StorageError,
    WorkdirError,
)
from diladiff_jax.storage.quarantine import quarantine_corrupt, require_intact
from diladiff_jax.storage.workdir import workdir_lock

__all__ = [
    "Bundle",
    "CheckpointError",
    "Checkpoints",
    "PretrainedError",
    "StorageError",
    "WorkdirError",
    "bundles",
    "checksums",
    "config_file",
    "export",
    "is_bundle",
    "lineage",
    "origins",
    "pretrained",
    "quarantine_corrupt",
    "released",
    "require_intact",
    "scorers",
    "workdir_lock",
]
