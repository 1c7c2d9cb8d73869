"""One Billion Words: single sentences of 128 tokens, a common benchmark of diffusion LMs.

    python launch/prepare.py --config=configs/lm1b.py --workdir=W      # downloads the corpus once
    python launch/train.py   --config=configs/lm1b.py --workdir=W --stage=all

The paper publishes settings for OpenWebText only. Here the lengths and steps are scaled down, and
everything else is kept.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    """Returns the config."""
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.update(corpus="lm1b", length=128, validation_fraction=0.003)
    c.tokenizer.update(kind="unigram", vocab_size=30_522)  # as many pieces as bert-base-uncased
    c.encoder.num_latents = 64  # compression 2x, as published
    c.mdlm.steps = 500_000
    c.autoencoder.steps = 100_000
    c.ladiff.steps = 100_000
    c.evaluation.update(decode_steps=(2, 4, 8, 16, 32, 64, 128), control_steps=(4, 16, 64))
    return c
