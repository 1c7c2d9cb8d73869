"""BERT-family encoders (arXiv 1810.04805): frozen sources of contextual features.

Post-norm blocks, learned positions and token types, with published weights. Every row of text is
full, so there is no attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diladiff_jax.jax_settings import random_key
from diladiff_jax.nn.layers import Linear, Norm, SelfAttention, parameter
from diladiff_jax.nn.stack import cast_matrices, run_layers
from diladiff_jax.nn.weights_import import (
    ACTIVATIONS,
    Source,
    assemble_parameters,
    identity,
    read_choice,
    read_number,
    transpose,
)


def windows(length: int, capacity: int) -> tuple[Int[np.ndarray, "n w"], int]:
    """Cuts a text into windows for an encoder of limited length.

    There are n = ceil(length / capacity) consecutive windows of w = ceil(length / n) tokens each.
    If n w exceeds `length`, the last window moves back so that it ends with the text.

    Args:
      length: tokens of the text.
      capacity: tokens that the encoder can read at a time.

    Returns:
      The positions in each window, and how many tokens the last window shares with the one before
      it. The states of shared tokens are taken from the earlier window.
    """
    count = -(-length // capacity)
    size = -(-length // count)
    starts = np.minimum(np.arange(count) * size, length - size)
    return starts[:, None] + np.arange(size), count * size - length


class BertLayer(nn.Module):
    """Post-norm transformer layer."""

    width: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = SelfAttention(
            self.width, self.heads, qk_norm=False, dtype=self.dtype, use_bias=True, name="attention"
        )(h)
        h = Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="attention_norm")(h + x)
        x = Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(h)
        x = ACTIVATIONS[self.activation](x)
        x = Linear(self.width, ("mlp", "embed"), dtype=self.dtype, name="down")(x)
        return Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="mlp_norm")(h + x)


class Bert(nn.Module):
    """Maps token ids to the last layer's hidden states.

    `pieces`, `cls_id` and `sep_id` describe the vocabulary file; `vocab_size` is the number of rows
    of the embedding table, which may be larger than `pieces`.
    """

    vocab_size: int
    positions: int
    types: int
    width: int
    num_layers: int
    heads: int
    hidden: int
    pieces: int
    cls_id: int
    sep_id: int
    activation: str = "gelu"
    epsilon: float = 1e-12
    scan: bool = False  # whether to scan one compiled layer; see `stack.run_layers`
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The last layer's states. All ids have token type 0, and L is at most `positions`."""

        def table(name: str, rows: int, axis: str | None) -> Array:
            init = nn.initializers.normal(0.02)
            return parameter(self, name, init, (axis, "embed"), (rows, self.width))

        h = jnp.take(table("words", self.vocab_size, "vocab"), ids, axis=0)
        h = (
            h
            + table("positions_table", self.positions, None)[None, : ids.shape[1]]
            + table("types_table", self.types, None)[None, :1]
        )
        h = Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="norm")(h)
        layers = [
            BertLayer(
                self.width,
                self.heads,
                self.hidden,
                self.activation,
                self.epsilon,
                self.dtype,
                name=f"layer_{i}",
            )
            for i in range(self.num_layers)
        ]
        if self.is_initializing():
            for layer in layers:
                h = layer(h)
            return h
        layer = layers[0].clone(parent=None, name=None)
        parameters = [layer.variables["params"] for layer in layers]
        if self.scan:
            parameters = [cast_matrices(own, self.dtype) for own in parameters]

        def run(h: Array, own: Any, _: None) -> tuple[Array, None]:
            return cast(Array, layer.apply({"params": own}, h)), None

        return run_layers(run, h, parameters, scan=self.scan, remat="none")[0]

    def features(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """Contextual features of rows of text of any length L, in float32.

        Each of `windows(L, positions - 2)` is encoded separately as [CLS] tokens [SEP], and the
        states of [CLS] and [SEP] are dropped. Ids that the encoder's vocabulary lacks, such as an
        end-of-text token that was added to it, are read as [SEP].
        """
        where, shared = windows(tokens.shape[1], self.positions - 2)
        known = jnp.where(tokens < self.pieces, tokens, self.sep_id)
        body = known[:, where].reshape(-1, where.shape[1])
        edge = jnp.ones_like(body[:, :1])
        h = self(jnp.concatenate([edge * self.cls_id, body, edge * self.sep_id], axis=1))
        h = h[:, 1:-1].astype(jnp.float32).reshape(tokens.shape[0], *where.shape, self.width)
        before = h[:, :-1].reshape(tokens.shape[0], -1, self.width)
        return jnp.concatenate([before, h[:, -1, shared:]], axis=1)


def from_config(
    config: Mapping[str, Any], *, pieces: int, cls_id: int, sep_id: int, dtype: Any = jnp.float32
) -> Bert:
    """The network that a BERT's config.json describes.

    Raises:
      ValueError: it describes another architecture, or a setting is missing or invalid.
    """
    read_choice(config, "model_type", None, ("bert",))
    read_choice(config, "position_embedding_type", "absolute", ("absolute",))
    network = Bert(
        vocab_size=read_number(config, "vocab_size", int),
        positions=read_number(config, "max_position_embeddings", int),
        types=read_number(config, "type_vocab_size", int, 2),
        width=read_number(config, "hidden_size", int),
        num_layers=read_number(config, "num_hidden_layers", int),
        heads=read_number(config, "num_attention_heads", int),
        hidden=read_number(config, "intermediate_size", int),
        pieces=pieces,
        cls_id=cls_id,
        sep_id=sep_id,
        activation=read_choice(config, "hidden_act", "gelu", tuple(ACTIVATIONS)),
        epsilon=read_number(config, "layer_norm_eps", float, 1e-12),
        dtype=dtype,
    )
    if network.width % network.heads:
        raise ValueError(
            f"num_attention_heads: got {network.heads}, "
            f"expected a divisor of hidden_size = {network.width}"
        )
    if network.positions < 3:
        raise ValueError(
            f"max_position_embeddings: got {network.positions}, expected at least 3: "
            "a token between [CLS] and [SEP]"
        )
    if pieces > network.vocab_size:
        raise ValueError(
            f"vocab_size: got {network.vocab_size}, "
            f"expected at least the {pieces} pieces of the vocabulary file"
        )
    return network


def parameters(tensors: Mapping[str, np.ndarray], network: Bert) -> dict[str, Any]:
    """Parameters from the tensors of a published file, whose names may start with `bert.`.

    Raises:
      ValueError: a tensor is missing, does not hold floating-point numbers, or has the wrong shape.
    """
    # Files from before 2020 call the scale and bias of a norm gamma and beta.
    old_names = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, new in old_names.items():
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    sources: dict[str, Source] = {
        "words": ("embeddings.word_embeddings.weight", identity),
        "positions_table": ("embeddings.position_embeddings.weight", identity),
        "types_table": ("embeddings.token_type_embeddings.weight", identity),
        "norm/scale": ("embeddings.LayerNorm.weight", identity),
        "norm/bias": ("embeddings.LayerNorm.bias", identity),
    }
    linear = {
        "attention/query/linear": "attention.self.query",
        "attention/key/linear": "attention.self.key",
        "attention/value/linear": "attention.self.value",
        "attention/out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    norms = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
    for i in range(network.num_layers):
        for ours, theirs in linear.items():
            sources[f"layer_{i}/{ours}/kernel"] = (f"encoder.layer.{i}.{theirs}.weight", transpose)
            sources[f"layer_{i}/{ours}/bias"] = (f"encoder.layer.{i}.{theirs}.bias", identity)
        for ours, theirs in norms.items():
            sources[f"layer_{i}/{ours}/scale"] = (f"encoder.layer.{i}.{theirs}.weight", identity)
            sources[f"layer_{i}/{ours}/bias"] = (f"encoder.layer.{i}.{theirs}.bias", identity)
    return assemble_parameters(tensors, sources, abstract_parameters(network, boxed=False), "bert.")


def abstract_parameters(network: Bert, *, boxed: bool = True) -> Any:
    """Shapes of the parameters, if `boxed` with their logical axis names."""
    shapes = jax.eval_shape(network.init, random_key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return shapes if boxed else nn.unbox(shapes)
