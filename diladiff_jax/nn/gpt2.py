"""GPT-2, small to xl: a frozen autoregressive scorer, from public weights.

Pre-norm blocks, learned positions, causal attention, a head tied to the embedding table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.nn.layers import Linear, Norm, SelfAttention
from diladiff_jax.nn.weights_import import ACTIVATIONS, Source, as_it_is, assemble, require, setting

Array = jax.Array

_CHUNK = 128  # positions whose logits exist at a time: all of 32 x 1,024 over 50,257 ids would take 6.6 GB


class GPT2Block(nn.Module):
    """Pre-norm transformer block, causal, `[B, L, D] -> [B, L, D]`."""

    width: int
    heads: int
    hidden: int
    activation: str
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: Array) -> Array:
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
        x = ACTIVATIONS[self.activation](
            Linear(self.hidden, ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        )
        return h + Linear(self.width, ("mlp", "embed"), dtype=self.dtype, name="down")(x)


class GPT2(nn.Module):
    """Ids to logits of the next id, `[B, L] -> [B, L, V]`, L at most `positions`."""

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
        self.words = self.param(
            "words",
            nn.with_logical_partitioning(normal, ("vocab", "embed")),
            (self.vocab_size, self.width),
        )
        self.positions_table = self.param(
            "positions_table",
            nn.with_logical_partitioning(normal, (None, "embed")),
            (self.positions, self.width),
        )
        block = (self.width, self.heads, self.hidden, self.activation, self.epsilon, self.dtype)
        self.blocks = [GPT2Block(*block, name=f"block_{i}") for i in range(self.num_layers)]
        self.final_norm = Norm("layernorm", self.epsilon, self.dtype, use_bias=True)

    def hidden_states(self, ids: Array) -> Array:
        """int `[B, L]` -> normalized last states `[B, L, D]`."""
        h = (jnp.take(self.words, ids, axis=0) + self.positions_table[None, : ids.shape[1]]).astype(
            self.dtype
        )
        for block in self.blocks:
            h = block(h)
        return self.final_norm(h)

    def project(self, h: Array) -> Array:
        """States `[..., D]` -> float32 logits `[..., V]`."""
        return jnp.einsum("...d,vd->...v", h, self.words.astype(h.dtype)).astype(jnp.float32)

    def __call__(self, ids: Array) -> Array:
        return self.project(self.hidden_states(ids))

    def nll(self, ids: Array, targets: Array) -> Array:
        """-log p(targets_l | ids_1 .. ids_l) in nats, float32 `[B, L]`, the logits of a few positions at a time."""
        h = self.hidden_states(ids)
        size = math.gcd(_CHUNK, ids.shape[1])

        def chunk(item: tuple[Array, Array]) -> Array:
            states, wanted = item
            logits = self.project(states)
            return (
                jax.nn.logsumexp(logits, axis=-1)
                - jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
            )

        def cut(x: Array) -> Array:
            return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)

        return jax.lax.map(chunk, (cut(h), cut(targets))).swapaxes(0, 1).reshape(ids.shape)


def from_config(config: Mapping[str, Any], *, dtype: Any = jnp.float32) -> GPT2:
    """The network that a GPT-2's config.json describes.

    Raises:
      ValueError: another architecture, or a setting that is missing or cannot be.
    """
    require(config, "model_type", None, ("gpt2",))
    require(config, "scale_attn_weights", True, (True,))
    require(config, "scale_attn_by_inverse_layer_idx", False, (False,))
    require(config, "tie_word_embeddings", True, (True,))
    width = setting(config, "n_embd", int)
    network = GPT2(
        vocab_size=setting(config, "vocab_size", int),
        positions=setting(config, "n_positions", int),
        width=width,
        num_layers=setting(config, "n_layer", int),
        heads=setting(config, "n_head", int),
        hidden=setting(config, "n_inner", int) if config.get("n_inner") is not None else 4 * width,
        activation=require(config, "activation_function", "gelu_new", tuple(ACTIVATIONS)),
        epsilon=setting(config, "layer_norm_epsilon", float, 1e-5),
        dtype=dtype,
    )
    if network.width % network.heads:
        raise ValueError(
            f"n_head is {network.heads}; it must be a divisor of n_embd = {network.width}"
        )
    return network


def parameters(tensors: Mapping[str, np.ndarray], network: GPT2) -> dict[str, Any]:
    """The network's parameters out of a published file's tensors, named with or without `transformer.` in front.

    Raises:
      ValueError: a tensor is missing, is not of floating point, or has another shape than the network.
    """

    def part(i: int) -> Any:  # queries, keys and values lie side by side in one tensor
        return lambda tensor: tensor[
            ..., i * network.width : tensor.shape[-1] if i == 2 else (i + 1) * network.width
        ]

    sources: dict[str, Source] = {
        "words": ("wte.weight", as_it_is),
        "positions_table": ("wpe.weight", as_it_is),
    }
    norms = {"final_norm": "ln_f"}
    for i in range(network.num_layers):
        norms |= {f"block_{i}/attention_norm": f"h.{i}.ln_1", f"block_{i}/mlp_norm": f"h.{i}.ln_2"}
        for ours, theirs, read in (
            ("attention/query/linear", "attn.c_attn", part(0)),
            ("attention/key/linear", "attn.c_attn", part(1)),
            ("attention/value/linear", "attn.c_attn", part(2)),
            ("attention/out", "attn.c_proj", as_it_is),
            ("up", "mlp.c_fc", as_it_is),
            ("down", "mlp.c_proj", as_it_is),
        ):  # GPT-2 keeps [in, out], as we do
            sources[f"block_{i}/{ours}/kernel"] = (f"h.{i}.{theirs}.weight", read)
            sources[f"block_{i}/{ours}/bias"] = (f"h.{i}.{theirs}.bias", read)
    for ours, theirs in norms.items():
        sources[f"{ours}/scale"], sources[f"{ours}/bias"] = (
            (f"{theirs}.weight", as_it_is),
            (f"{theirs}.bias", as_it_is),
        )
    return assemble(tensors, sources, abstract_parameters(network, boxed=False), "transformer.")


def abstract_parameters(network: GPT2, *, boxed: bool = True) -> Any:
    """Shapes of the parameters, `boxed` in their logical axis names."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return shapes if boxed else nn.unbox(shapes)
