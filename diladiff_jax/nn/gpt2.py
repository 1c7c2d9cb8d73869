"""GPT-2 in its published sizes, as a frozen autoregressive scorer.

Pre-norm blocks, learned positions, causal attention, and a head tied to the embedding table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diladiff_jax.jax_settings import random_key
from diladiff_jax.nn.layers import Linear, Norm, SelfAttention, parameter
from diladiff_jax.nn.next_token import NextTokenModel
from diladiff_jax.nn.weights_import import (
    ACTIVATIONS,
    Source,
    assemble_parameters,
    identity,
    read_choice,
    read_number,
)


class GPT2Block(nn.Module):
    """Causal pre-norm transformer block."""

    width: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="attention_norm")(h)
        h = h + SelfAttention(
            self.width,
            self.heads,
            qk_norm=False,
            causal=True,
            dtype=self.dtype,
            use_bias=True,
            name="attention",
        )(x)
        x = Norm("layernorm", self.epsilon, self.dtype, use_bias=True, name="mlp_norm")(h)
        x = Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        x = ACTIVATIONS[self.activation](x)
        return h + Linear(self.width, ("mlp", "embed"), dtype=self.dtype, name="down")(x)


class GPT2(NextTokenModel):
    """Maps token ids to logits of the next id. Rows hold at most `positions` tokens."""

    vocab_size: int
    positions: int
    width: int
    num_layers: int
    heads: int
    hidden: int
    activation: str = "gelu_new"
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def setup(self) -> None:
        normal = nn.initializers.normal(0.02)
        shape = (self.vocab_size, self.width)
        self.words = parameter(self, "words", normal, ("vocab", "embed"), shape)
        shape = (self.positions, self.width)
        self.positions_table = parameter(self, "positions_table", normal, (None, "embed"), shape)
        block = (self.width, self.heads, self.hidden, self.activation, self.epsilon, self.dtype)
        self.blocks = [GPT2Block(*block, name=f"block_{i}") for i in range(self.num_layers)]
        self.final_norm = Norm("layernorm", self.epsilon, self.dtype, use_bias=True)

    def hidden_states(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The normalized hidden states of the last block."""
        h = jnp.take(self.words, ids, axis=0) + self.positions_table[None, : ids.shape[1]]
        h = h.astype(self.dtype)
        for block in self.blocks:
            h = block(h)
        return self.final_norm(h)

    def project(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Maps hidden states to float32 logits."""
        return jnp.einsum("...d,vd->...v", h, self.words.astype(h.dtype)).astype(jnp.float32)


def from_config(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> GPT2:
    """The network that a GPT-2's config.json describes.

    Raises:
      ValueError: it describes another architecture, or a setting is missing or invalid.
    """
    read_choice(config, "model_type", None, ("gpt2",))
    read_choice(config, "scale_attn_weights", True, (True,))
    read_choice(config, "scale_attn_by_inverse_layer_idx", False, (False,))
    read_choice(config, "tie_word_embeddings", True, (True,))
    width = read_number(config, "n_embd", int)
    network = GPT2(
        vocab_size=read_number(config, "vocab_size", int),
        positions=read_number(config, "n_positions", int),
        width=width,
        num_layers=read_number(config, "n_layer", int),
        heads=read_number(config, "n_head", int),
        hidden=read_number(config, "n_inner", int)
        if config.get("n_inner") is not None
        else 4 * width,
        activation=read_choice(config, "activation_function", "gelu_new", tuple(ACTIVATIONS)),
        epsilon=read_number(config, "layer_norm_epsilon", float, 1e-5),
        dtype=dtype,
    )
    if network.width % network.heads:
        raise ValueError(
            f"n_head: got {network.heads}, expected a divisor of n_embd = {network.width}"
        )
    return network


def parameters(tensors: Mapping[str, np.ndarray], network: GPT2) -> dict[str, Any]:
    """Parameters from the tensors of a published file, whose names may start with `transformer.`.

    Raises:
      ValueError: a tensor is missing, does not hold floating-point numbers, or has the wrong shape.
    """

    def part(i: int) -> Callable[[np.ndarray], np.ndarray]:
        # Queries, keys and values are concatenated in one tensor. The last part takes the rest, so
        # that a tensor of the wrong width is reported.
        start, end = i * network.width, None if i == 2 else (i + 1) * network.width
        return lambda tensor: tensor[..., start:end]

    sources: dict[str, Source] = {
        "words": ("wte.weight", identity),
        "positions_table": ("wpe.weight", identity),
    }
    norms = {"final_norm": "ln_f"}
    for i in range(network.num_layers):
        norms |= {f"block_{i}/attention_norm": f"h.{i}.ln_1", f"block_{i}/mlp_norm": f"h.{i}.ln_2"}
        for ours, theirs, read in (
            ("attention/query/linear", "attn.c_attn", part(0)),
            ("attention/key/linear", "attn.c_attn", part(1)),
            ("attention/value/linear", "attn.c_attn", part(2)),
            ("attention/out", "attn.c_proj", identity),
            ("up", "mlp.c_fc", identity),
            ("down", "mlp.c_proj", identity),
        ):
            # GPT-2's linear maps are stored as [in, out], like ours.
            sources[f"block_{i}/{ours}/kernel"] = (f"h.{i}.{theirs}.weight", read)
            sources[f"block_{i}/{ours}/bias"] = (f"h.{i}.{theirs}.bias", read)
    for ours, theirs in norms.items():
        sources[f"{ours}/scale"] = (f"{theirs}.weight", identity)
        sources[f"{ours}/bias"] = (f"{theirs}.bias", identity)
    return assemble_parameters(
        tensors, sources, abstract_parameters(network, boxed=False), "transformer."
    )


def abstract_parameters(network: GPT2, *, boxed: bool = True) -> Any:
    """Shapes of the parameters, if `boxed` with their logical axis names."""
    shapes = jax.eval_shape(network.init, random_key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return shapes if boxed else nn.unbox(shapes)
