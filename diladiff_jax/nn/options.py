"""The settings of every network: the config blocks `backbone`, `encoder`, `decoder`, and so on.

The defaults are the paper's published sizes (docs/method.md, Published settings).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from diladiff_jax.options import (
    Options,
    Rule,
    above,
    at_least,
    between,
    fraction_below,
    one_of,
    setting,
)

# Sanity limits: larger values are almost certainly typos, and would trace or allocate for hours
# before failing.
MAX_WIDTH = 2**17
MAX_LAYERS = 1024

_WIDTH = between(1, MAX_WIDTH)
_LAYERS = between(1, MAX_LAYERS)


def _width_conflicts(width: int, heads: int, rotary: bool = False) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the head width `width / heads`."""
    if width % heads:
        yield "heads", f"a divisor of width = {width}"
    elif rotary and width // heads % 2:
        yield (
            "heads",
            f"a number for which width / heads is even (rotary positions; width = {width})",
        )


def _mlp_conflicts(width: int, mlp_ratio: float) -> Iterator[tuple[str, str]]:
    """Yields what is wrong with the hidden width of the MLPs, `mlp_ratio * width`."""
    if not 1 <= mlp_ratio * width <= 8 * MAX_WIDTH:
        yield "mlp_ratio", f"a number for which mlp_ratio * width is between 1 and {8 * MAX_WIDTH}"


@dataclasses.dataclass(frozen=True)
class BackboneOptions(Options):
    """The masked denoiser (`nn.TokenDenoiser`)."""

    width: int = setting(768, "width of the hidden states", _WIDTH)
    num_layers: int = setting(12, "number of transformer blocks", _LAYERS)
    heads: int = setting(12, "number of attention heads", at_least(1))
    mlp_ratio: float = setting(4.0, "hidden width of the MLPs, as a multiple of width")
    positions: str = setting(
        "learned", "position encoding: learned absolute, or rotary", one_of("learned", "rotary")
    )
    norm: str = setting("rmsnorm", "normalization layer", one_of("rmsnorm", "layernorm"))
    qk_norm: bool = setting(True, "normalize the queries and keys of every head")
    adaln: int = setting(
        0,
        "width of the constant time condition of adaLN, as in public MDLM checkpoints; 0: no adaLN",
        between(0, MAX_WIDTH),
    )
    embedding_std: float = setting(
        0.02, "standard deviation of token embeddings and positions at initialization", above(0)
    )
    tied_head: bool = setting(False, "use the embedding table as the output matrix")
    zero_head: bool = setting(False, "initialize the output matrix to zero")
    dropout: float = setting(0.0, "dropout probability of each residual branch", fraction_below(1))

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _width_conflicts(self.width, self.heads, rotary=self.positions == "rotary")
        yield from _mlp_conflicts(self.width, self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class EncoderOptions(Options):
    """The encoder that compresses features to latents (`nn.LatentEncoder`)."""

    num_latents: int = setting(512, "latents per text: at most data.length", at_least(1))
    latent_dim: int = setting(768, "width of a latent", _WIDTH)
    width: int = setting(768, "width of the hidden states", _WIDTH)
    heads: int = setting(12, "number of attention heads", at_least(1))
    num_layers: int = setting(2, "number of layers", _LAYERS)
    dropout: float = setting(0.1, "dropout probability inside the MLPs", fraction_below(1))

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _width_conflicts(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class DecoderOptions(Options):
    """What the latent-conditioned decoder adds to the backbone (`nn.LatentConditionedDecoder`)."""

    cross_layers: tuple[int, ...] = setting(
        (0, 11),
        "backbone layers, counted from 0, that cross-attention to the latent precedes",
        Rule(
            lambda layers: len(layers) > 0 and min(layers) >= 0,
            "a non-empty sequence of layer indices, counted from 0",
        ),
    )


@dataclasses.dataclass(frozen=True)
class LatentDenoiserOptions(Options):
    """The denoiser of latents: the prior, and the student (`nn.LatentDenoiser`)."""

    width: int = setting(768, "width of the hidden states", _WIDTH)
    num_layers: int = setting(12, "number of transformer blocks", _LAYERS)
    heads: int = setting(12, "number of attention heads", at_least(1))
    mlp_ratio: float = setting(4.0, "hidden width of the MLPs, as a multiple of width")
    max_frequency: float = setting(1.0, "highest frequency of the time embedding, in radians")
    max_period: float = setting(
        10.0, "range of the frequencies of the time embedding: highest over lowest"
    )
    learned_positions: bool = setting(False, "add learned positions to the rotary ones")

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _width_conflicts(self.width, self.heads, rotary=True)
        yield from _mlp_conflicts(self.width, self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class ScorerOptions(Options):
    """The autoregressive scorer: a causal backbone that shares all other settings of `backbone`."""

    width: int = setting(768, "width of the hidden states", _WIDTH)
    num_layers: int = setting(12, "number of transformer blocks", _LAYERS)
    heads: int = setting(12, "number of attention heads", at_least(1))
    dropout: float = setting(0.0, "dropout probability of each residual branch", fraction_below(1))

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from _width_conflicts(self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class FeaturesOptions(Options):
    """Where the contextual features that the encoder compresses come from."""

    source: str = setting(
        "denoiser",
        "the trained MDLM's last hidden states (denoiser) or a published encoder's (bert)",
        one_of("denoiser", "bert"),
    )
    with_embeddings: bool = setting(False, "denoiser: concatenate its token embeddings")
    path: str = setting(
        "", "bert: a folder with config.json, vocab.txt and model.safetensors, or a hub name"
    )
    compute_dtype: str = setting(
        "bfloat16", "bert: type of its computations", one_of("bfloat16", "float32")
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.source == "bert" and not self.path:
            yield "path", "an encoder's folder or hub name when source is bert"
        if self.source == "bert" and self.with_embeddings:
            yield "with_embeddings", "false when source is bert: a BERT's embeddings are not used"
