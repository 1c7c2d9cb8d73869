"""Experiments without arrays: shapes with shardings in place of parameters.

No workdir, data, tokenizer or published weights are read. Substitutes have the same shapes: a
vocabulary of the config's size, and bert-base if `features.path` is not a local folder.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diladiff_jax import config as config_lib
from diladiff_jax import files, stages
from diladiff_jax.config import Config
from diladiff_jax.experiment import Experiment
from diladiff_jax.jax_settings import random_key
from diladiff_jax.nn import bert
from diladiff_jax.parallel import sharding
from diladiff_jax.storage import pretrained

BERT_BASE: dict[str, Any] = dict(
    model_type="bert",
    hidden_act="gelu",
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    max_position_embeddings=512,
    type_vocab_size=2,
)
"""The architecture of bert-base (arXiv 1810.04805), without the size of its vocabulary."""

_MULTIPLE = 128  # tokenizers pad their vocabularies to a multiple of this
_ADDED_SPECIALS = {"unigram": 0, "bpe": 0, "wordpiece": 0, "byte_bpe": 2, "sentencepiece": 1}
"""Tokenizer kind -> special tokens in addition to `tokenizer.vocab_size`.

A trained vocabulary and BERT's already contain them, GPT-2's lacks padding and mask, and most
SentencePiece models lack the mask.
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """What networks and objectives need of a tokenizer.

    Attributes:
      vocab_size: number of ids, including padding of the vocabulary.
      mask_id: the mask token.
      eot_id: the end-of-text token.
      sampleable: bool `[vocab_size]`, whether a token may be sampled.
    """

    vocab_size: int
    mask_id: int
    eot_id: int
    sampleable: np.ndarray

    @classmethod
    def of(cls, settings: Any) -> Vocabulary:
        """A vocabulary of the size that the tokenizer with these settings has."""
        pieces = settings.vocab_size + _ADDED_SPECIALS[settings.kind]
        size = sharding.round_up(pieces, _MULTIPLE)
        sampleable = np.arange(size) < pieces - 2
        return cls(size, pieces - 1, pieces - 3, sampleable)


class AbstractExperiment(Experiment):
    """An experiment with only a config and a mesh; what it restores are shapes with shardings."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        vocabulary = cast(Any, Vocabulary.of(config.tokenizer))
        super().__init__(config, pathlib.Path("unused"), vocabulary, mesh)

    def restore(self, stage: str) -> Any:
        """Shapes of the parameters that `Experiment.restore` returns."""
        if stage == "bert":
            network: Any = self.networks.bert
            boxed = bert.abstract_parameters(network)
        else:
            boxed = jax.eval_shape(self.objective(stage).init, abstract_key())
        return abstract_arrays(nn.unbox(boxed), sharding.parameter_shardings(boxed, self.mesh))

    def restore_statistics(self) -> dict[str, Any]:
        """Shapes of the frozen statistics."""
        autoencoder: Any = self.objective(stages.ENCODER[0])
        shapes = jax.eval_shape(autoencoder.init_statistics)
        return abstract_arrays(
            shapes, jax.tree.map(lambda _: sharding.replicated(self.mesh), shapes)
        )

    def _published_encoder(self) -> bert.Bert | None:
        features: Any = self.config.features
        if features.source != "bert":
            return None
        folder, dtype = files.expand(features.path), jnp.dtype(features.compute_dtype)
        if (folder / "config.json").is_file():
            found = pretrained.read_config(folder)
        else:
            tokenizer: Any = self.config.tokenizer
            found = BERT_BASE | {"vocab_size": tokenizer.vocab_size}
        # The ids that begin and end a text have no effect on shapes.
        return bert.from_config(found, pieces=found["vocab_size"], cls_id=0, sep_id=1, dtype=dtype)


def device_mesh(config: Config, devices: Sequence[Any]) -> Mesh:
    """The config's mesh over the given devices.

    Raises:
      ConfigError: the mesh has another number of devices.
    """
    sizes: Any = config.mesh
    try:
        return sharding.make_mesh(sizes, devices)
    except ValueError as error:
        raise config_lib.ConfigError(str(error)) from None


def abstract_arrays(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes together with their shardings, to be lowered in place of arrays."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def abstract_key(key_sharding: jax.sharding.Sharding | None = None) -> jax.ShapeDtypeStruct:
    """The shape of a random key."""
    key = jax.eval_shape(functools.partial(random_key, 0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=key_sharding)


def parameter_bytes(tree: Any) -> int:
    """Bytes per device of a tree of `abstract_arrays`."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
