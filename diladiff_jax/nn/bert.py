"""BERT-family encoders (arXiv 1810.04805): frozen extractors of contextual features, from public weights.

Post-norm blocks, learned positions, token types. Texts are rows without padding, so there is no attention mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.nn.layers import Linear, Norm, SelfAttention
from diladiff_jax.nn.stack import as_used, run_layers
from diladiff_jax.nn.weights_import import (
    ACTIVATIONS,
    Source,
    as_it_is,
    assemble,
    require,
    setting,
    transposed,
)

Array = jax.Array


def windows(length: int, capacity: int) -> tuple[np.ndarray, int]:
    """How a text of `length` tokens is cut for an encoder that holds `capacity` at a time.

    n = ceil(length / capacity) windows of w = ceil(length / n) tokens each, one after the other; where n w is above
    `length`, the last one is moved back to end with the text. Returns positions int `[n, w]` and `shared`, how many
    tokens the last window has in common with the one before it; those are read from the one before.
    """
    count = -(-length // capacity)
    size = -(-length // count)
    starts = np.minimum(np.arange(count) * size, length - size)
    return starts[:, None] + np.arange(size), count * size - length


class BertLayer(nn.Module):
    """Post-norm transformer layer, `[B, L, D] -> [B, L, D]`."""

    width: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
        x = SelfAttention(
            self.width, self.heads, qk_norm=False, dtype=self.dtype, use_bias=True, name="attention"
        )(h)
        h = Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="attention_norm")(h + x)
        x = ACTIVATIONS[self.activation](
            Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(h)
        )
        x = Linear(self.width, ("mlp", "embed"), dtype=self.dtype, name="down")(x)
        return Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="mlp_norm")(h + x)


class Bert(nn.Module):
    """Ids to last hidden states. `pieces`, `cls_id` and `sep_id` are the vocabulary's; `vocab_size` counts the table's rows."""

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
    scan: bool = False  # as in `TokenDenoiser`
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """ids int `[B, L]`, L at most `positions`, all of token type 0 -> the last layer's states `[B, L, D]`."""

        def table(name: str, rows: int, axis: str | None) -> Array:
            return self.param(
                name,
                nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed")),
                (rows, self.width),
            )

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
        plain, parameters = (
            layers[0].clone(parent=None, name=None),
            [layer.variables["params"] for layer in layers],
        )
        if self.scan:
            parameters = [as_used(own, self.dtype) for own in parameters]
        return run_layers(
            lambda h, own, _: (plain.apply({"params": own}, h), None),
            h,
            parameters,
            scan=self.scan,
            remat="none",
        )[0]

    def features(self, tokens: Array) -> Array:
        """Contextual features of rows of text, int `[B, L]` with L of any size -> float32 `[B, L, D]`.

        Each of `windows(L, positions - 2)` is encoded for itself as [CLS] tokens [SEP], and the states of those two are
        dropped. Ids that the encoder's vocabulary lacks (specials added to it, an end-of-text among them) are read as [SEP].
        """
        where, shared = windows(tokens.shape[1], self.positions - 2)
        body = jnp.where(tokens < self.pieces, tokens, self.sep_id)[:, where].reshape(
            -1, where.shape[1]
        )
        edge = jnp.ones_like(body[:, :1])
        h = self(jnp.concatenate([edge * self.cls_id, body, edge * self.sep_id], axis=1))[
            :, 1:-1
        ].astype(jnp.float32)
        h = h.reshape(tokens.shape[0], *where.shape, self.width)
        before = h[:, :-1].reshape(tokens.shape[0], -1, self.width)
        return jnp.concatenate([before, h[:, -1, shared:]], axis=1)


def from_config(
    config: Mapping[str, Any], *, pieces: int, cls_id: int, sep_id: int, dtype: Any = jnp.float32
) -> Bert:
    """The network that a BERT's config.json describes.

    Raises:
      ValueError: another architecture, or a setting that is missing or cannot be.
    """
    require(config, "model_type", None, ("bert",))
    require(config, "position_embedding_type", "absolute", ("absolute",))
    network = Bert(
        vocab_size=setting(config, "vocab_size", int),
        positions=setting(config, "max_position_embeddings", int),
        types=setting(config, "type_vocab_size", int, 2),
        width=setting(config, "hidden_size", int),
        num_layers=setting(config, "num_hidden_layers", int),
        heads=setting(config, "num_attention_heads", int),
        hidden=setting(config, "intermediate_size", int),
        pieces=pieces,
        cls_id=cls_id,
        sep_id=sep_id,
        activation=require(config, "hidden_act", "gelu", tuple(ACTIVATIONS)),
        epsilon=setting(config, "layer_norm_eps", float, 1e-12),
        dtype=dtype,
    )
    if network.width % network.heads:
        raise ValueError(
            f"num_attention_heads is {network.heads}; it must be a divisor of hidden_size = {network.width}"
        )
    if network.positions < 3:
        raise ValueError(
            f"max_position_embeddings is {network.positions}; it must be at least 3, a token between [CLS] and [SEP]"
        )
    if pieces > network.vocab_size:
        raise ValueError(
            f"vocab_size is {network.vocab_size}; it must be at least the {pieces} pieces of the vocabulary file"
        )
    return network


def parameters(tensors: Mapping[str, np.ndarray], network: Bert) -> dict[str, Any]:
    """The network's parameters out of a published file's tensors, named with or without `bert.` in front.

    Raises:
      ValueError: a tensor is missing, is not of floating point, or has another shape than the network.
    """
    # Files of before 2020 call a norm's gain and bias gamma and beta.
    renamed = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): t
        for name, t in tensors.items()
    }
    sources: dict[str, Source] = {
        "words": ("embeddings.word_embeddings.weight", as_it_is),
        "positions_table": ("embeddings.position_embeddings.weight", as_it_is),
        "types_table": ("embeddings.token_type_embeddings.weight", as_it_is),
        "norm/scale": ("embeddings.LayerNorm.weight", as_it_is),
        "norm/bias": ("embeddings.LayerNorm.bias", as_it_is),
    }
    linear = {
        "attention/query/linear": "attention.self.query",
        "attention/key/linear": "attention.self.key",
        "attention/value/linear": "attention.self.value",
        "attention/out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }
    for i in range(network.num_layers):
        for ours, theirs in linear.items():
            sources[f"layer_{i}/{ours}/kernel"] = (f"encoder.layer.{i}.{theirs}.weight", transposed)
            sources[f"layer_{i}/{ours}/bias"] = (f"encoder.layer.{i}.{theirs}.bias", as_it_is)
        for ours, theirs in {
            "attention_norm": "attention.output.LayerNorm",
            "mlp_norm": "output.LayerNorm",
        }.items():
            sources[f"layer_{i}/{ours}/scale"] = (f"encoder.layer.{i}.{theirs}.weight", as_it_is)
            sources[f"layer_{i}/{ours}/bias"] = (f"encoder.layer.{i}.{theirs}.bias", as_it_is)
    return assemble(renamed, sources, abstract_parameters(network, boxed=False), "bert.")


def abstract_parameters(network: Bert, *, boxed: bool = True) -> Any:
    """Shapes of the parameters, `boxed` in their logical axis names."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return shapes if boxed else nn.unbox(shapes)
