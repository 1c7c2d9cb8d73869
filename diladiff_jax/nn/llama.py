"""Networks of the Llama family, such as Llama 2 and SmolLM2, as frozen autoregressive scorers.

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention and SwiGLU (arXiv
2302.13971, 2305.13245), without biases. The head is tied to the embedding table or separate.
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
from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.layers import Linear, Norm, parameter, rotary
from diladiff_jax.nn.next_token import NextTokenModel
from diladiff_jax.nn.stack import cast_matrices, run_layers
from diladiff_jax.nn.weights_import import (
    Source,
    assemble_parameters,
    identity,
    read_choice,
    read_number,
    transpose,
)


class GroupedQueryAttention(nn.Module):
    """Causal attention with rotary positions, whose keys and values serve `heads / groups` queries.

    Query head h reads the keys and values of head h // (heads / groups).
    """

    heads: int
    groups: int
    head_width: int
    rope_base: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        def heads(name: str, count: int) -> Array:
            size = count * self.head_width
            y = Linear(size, ("embed", "heads"), use_bias=False, dtype=self.dtype, name=name)(x)
            return y.reshape(*y.shape[:-1], count, self.head_width)

        q = rotary(heads("query", self.heads), base=self.rope_base)
        k = rotary(heads("key", self.groups), base=self.rope_base)
        repeats = self.heads // self.groups
        k, v = (jnp.repeat(y, repeats, axis=2) for y in (k, heads("value", self.groups)))
        h = attend(q, k, v, causal=True)
        return Linear(
            x.shape[-1], ("heads", "embed"), use_bias=False, dtype=self.dtype, name="out"
        )(h)


class LlamaBlock(nn.Module):
    """Attention and a SwiGLU, each after a norm and added to its input."""

    heads: int
    groups: int
    head_width: int
    hidden: int
    rope_base: float
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        x = Norm("rmsnorm", self.epsilon, self.dtype, name="attention_norm")(h)
        h = h + GroupedQueryAttention(
            self.heads,
            self.groups,
            self.head_width,
            self.rope_base,
            self.dtype,
            name="attention",
        )(x)
        x = Norm("rmsnorm", self.epsilon, self.dtype, name="mlp_norm")(h)

        def linear(name: str, features: int, *axes: str) -> Linear:
            axes_in_out = cast(tuple[str, str], axes)
            return Linear(features, axes_in_out, use_bias=False, dtype=self.dtype, name=name)

        x = nn.silu(linear("gate", self.hidden, "embed", "mlp")(x)) * linear(
            "up", self.hidden, "embed", "mlp"
        )(x)
        return h + linear("down", h.shape[-1], "mlp", "embed")(x)


class Llama(NextTokenModel):
    """Maps token ids to logits of the next id. Rows hold at most `positions` tokens."""

    vocab_size: int
    positions: int
    width: int
    num_layers: int
    heads: int
    groups: int
    head_width: int
    hidden: int
    rope_base: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = True  # whether the head is the embedding table
    dtype: Any = jnp.float32

    def setup(self) -> None:
        normal, shape = nn.initializers.normal(0.02), (self.vocab_size, self.width)
        self.words = parameter(self, "words", normal, ("vocab", "embed"), shape)
        if not self.tied:
            self.head = parameter(self, "head", normal, ("vocab", "embed"), shape)
        self.blocks = [
            LlamaBlock(
                self.heads,
                self.groups,
                self.head_width,
                self.hidden,
                self.rope_base,
                self.epsilon,
                self.dtype,
                name=f"block_{i}",
            )
            for i in range(self.num_layers)
        ]
        self.final_norm = Norm("rmsnorm", self.epsilon, self.dtype)

    def hidden_states(self, ids: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The normalized hidden states of the last block."""
        h = jnp.take(self.words, ids, axis=0).astype(self.dtype)
        if self.is_initializing():
            for block in self.blocks:
                h = block(h)
            return self.final_norm(h)
        layer = self.blocks[0].clone(parent=None, name=None)
        parameters = [cast_matrices(block.variables["params"], self.dtype) for block in self.blocks]

        def run(h: Array, own: Any, _: None) -> tuple[Array, None]:
            return cast(Array, layer.apply({"params": own}, h)), None

        return self.final_norm(run_layers(run, h, parameters, scan=True, remat="none")[0])

    def project(self, h: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Maps hidden states to float32 logits."""
        table = (self.words if self.tied else self.head).astype(h.dtype)
        return jnp.einsum("...d,vd->...v", h, table).astype(jnp.float32)


def from_config(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> Llama:
    """The network that a Llama's config.json describes.

    Raises:
      ValueError: it describes another architecture, or a setting is missing or invalid.
    """
    read_choice(config, "model_type", None, ("llama",))
    read_choice(config, "hidden_act", "silu", ("silu",))
    read_choice(config, "attention_bias", False, (False,))
    read_choice(config, "mlp_bias", False, (False,))
    read_choice(config, "rope_scaling", None, (None,))
    rope = config.get("rope_parameters") or config  # newer files have a block for it
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters: got {type(rope).__name__}, expected an object")
    read_choice(rope, "rope_type", "default", ("default",))
    width = read_number(config, "hidden_size", int)
    heads = read_number(config, "num_attention_heads", int)
    groups = heads
    if config.get("num_key_value_heads") is not None:
        groups = read_number(config, "num_key_value_heads", int)
    if heads % groups:
        raise ValueError(
            f"num_key_value_heads: got {groups}, expected a divisor of num_attention_heads = "
            f"{heads}"
        )
    if config.get("head_dim") is None and width % heads:
        raise ValueError(
            f"num_attention_heads: got {heads}, expected a divisor of hidden_size = {width}"
        )
    head_width = width // heads
    if config.get("head_dim") is not None:
        head_width = read_number(config, "head_dim", int)
    if head_width % 2:
        raise ValueError(f"head_dim: got {head_width}, expected an even number")
    return Llama(
        vocab_size=read_number(config, "vocab_size", int),
        positions=read_number(config, "max_position_embeddings", int, 2048),
        width=width,
        num_layers=read_number(config, "num_hidden_layers", int),
        heads=heads,
        groups=groups,
        head_width=head_width,
        hidden=read_number(config, "intermediate_size", int),
        rope_base=read_number(rope, "rope_theta", float, 10_000.0),
        epsilon=read_number(config, "rms_norm_eps", float, 1e-6),
        tied=read_choice(config, "tie_word_embeddings", False, (False, True)),
        dtype=dtype,
    )


def parameters(tensors: Mapping[str, np.ndarray], network: Llama) -> dict[str, Any]:
    """Parameters from the tensors of a published file, whose names may start with `model.`.

    Raises:
      ValueError: a tensor is missing, does not hold floating-point numbers, or has the wrong shape.
    """
    sources: dict[str, Source] = {
        "words": ("embed_tokens.weight", identity),
        "head": ("lm_head.weight", identity),
        "final_norm/scale": ("norm.weight", identity),
    }
    for i in range(network.num_layers):
        for ours, theirs in (
            ("attention/query", "self_attn.q_proj"),
            ("attention/key", "self_attn.k_proj"),
            ("attention/value", "self_attn.v_proj"),
            ("attention/out", "self_attn.o_proj"),
            ("gate", "mlp.gate_proj"),
            ("up", "mlp.up_proj"),
            ("down", "mlp.down_proj"),
        ):
            sources[f"block_{i}/{ours}/kernel"] = (f"layers.{i}.{theirs}.weight", transpose)
        for ours, theirs in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            sources[f"block_{i}/{ours}/scale"] = (f"layers.{i}.{theirs}.weight", identity)
    return assemble_parameters(
        tensors, sources, abstract_parameters(network, boxed=False), "model."
    )


def abstract_parameters(network: Llama, *, boxed: bool = True) -> Any:
    """Shapes of the parameters, if `boxed` with their logical axis names."""
    shapes = jax.eval_shape(network.init, random_key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    return shapes if boxed else nn.unbox(shapes)
