"""One Billion Words: single sentences at L = 128, the usual small benchmark of diffusion language models.

    python launch/prepare.py --config=configs/lm1b.py --workdir=W      # needs the network once: TFDS lm1b
    python launch/train.py   --config=configs/lm1b.py --workdir=W --stage=all

The method's published settings are for OpenWebText; here lengths and steps are scaled down, and the rest is kept.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.update(corpus="lm1b", length=128, validation_fraction=0.003)
    c.tokenizer.update(kind="unigram", vocab_size=30_522)
    c.encoder.num_latents = 64  # compression 2x, as published
    c.mdlm.steps = 500_000
    c.autoencoder.steps = 100_000
    c.ladiff.steps = 100_000
    c.evaluation.update(decode_steps=(2, 4, 8, 16, 32, 64, 128), control_steps=(4, 16, 64))
    return c
