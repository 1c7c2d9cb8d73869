"""Bundles: a trained experiment as one folder to publish.

A bundle holds safetensors, JSON and a vocabulary; nothing in it is ever executed.

    bundle.json            the manifest: {"format": 1,
                             "stages": {STAGE: {"steps": int, "files": [NAME]}},
                             "files": {NAME: {"bytes": int, "sha256": str}}}
    config.json            the experiment
    tokenizer/             what `Tokenizer.save` writes
    features/              the published encoder's files, if the experiment uses one
    STAGE.safetensors      parameters, averaged if the stage keeps an average; a tensor's name is
                           its path ("encoder/layers_0/..."); stages above 4 GiB are split into
                           STAGE-1-of-N.safetensors and so on
    statistics.safetensors statistics of features and latents, from the autoencoder stage

A bundle may come from a stranger, so the reader trusts nothing. Only the names above are allowed.
Every file must be a regular file with the size and SHA-256 of the manifest, so a link (hub caches
consist of links) can only lead to the same bytes. The name, shape and type of every tensor must be
those of the experiment, and are checked before memory is allocated. (A published encoder's weights
are read in one piece, after their size and SHA-256 are checked.) Settings that would make the
library download anything, or read or write elsewhere, are rejected.
"""

from diladiff_jax.storage.bundles.format import is_bundle
from diladiff_jax.storage.bundles.reader import Bundle
from diladiff_jax.storage.bundles.writer import TrainedExperiment, export

__all__ = ["Bundle", "TrainedExperiment", "export", "is_bundle"]
