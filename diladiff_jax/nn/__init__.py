"""The networks, as Flax linen modules: arrays in, arrays out.

No losses, no training loops, no files. `build_networks` makes all modules of an experiment from
`NetworkOptions`; `bert`, `gpt2` and `llama` import published networks.
"""

from diladiff_jax.nn import attention, bert, gpt2, layers, llama, options, placement, stack
from diladiff_jax.nn.attention import attend
from diladiff_jax.nn.autoencoder import CrossAttention, LatentConditionedDecoder, LatentEncoder
from diladiff_jax.nn.bert import Bert
from diladiff_jax.nn.block import Block
from diladiff_jax.nn.gpt2 import GPT2
from diladiff_jax.nn.latent_denoiser import LatentDenoiser
from diladiff_jax.nn.llama import Llama
from diladiff_jax.nn.networks import NetworkOptions, Networks, build_networks
from diladiff_jax.nn.options import (
    BackboneOptions,
    DecoderOptions,
    EncoderOptions,
    FeaturesOptions,
    LatentDenoiserOptions,
    ScorerOptions,
)
from diladiff_jax.nn.transformer import TokenDenoiser

__all__ = [
    "GPT2",
    "BackboneOptions",
    "Bert",
    "Block",
    "CrossAttention",
    "DecoderOptions",
    "EncoderOptions",
    "FeaturesOptions",
    "LatentConditionedDecoder",
    "LatentDenoiser",
    "LatentDenoiserOptions",
    "LatentEncoder",
    "Llama",
    "NetworkOptions",
    "Networks",
    "ScorerOptions",
    "TokenDenoiser",
    "attend",
    "attention",
    "bert",
    "build_networks",
    "gpt2",
    "layers",
    "llama",
    "options",
    "placement",
    "stack",
]
