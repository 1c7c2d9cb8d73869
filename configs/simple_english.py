"""A model of simple English at about a million parameters per network, for two CPU cores.

    python launch/train.py --config=configs/simple_english.py:/stories.jsonl.gz --workdir=W \\
        --stage=all

The part after the colon is a folder or file of text, such as TinyStories. The recipe is that of
configs/english.py at a size for which hours on two cores, not minutes on a GPU, are enough.
"""

from ml_collections import ConfigDict

from configs import english


def get_config(files: str = "texts") -> ConfigDict:
    """Returns the config for a folder or file of text."""
    c = english.get_config(files)
    c.compute_dtype = c.features.compute_dtype = "float32"
    c.memory.scan = False
    c.data.update(length=64, validation_fraction=0.03, scorer_fraction=0.0)
    c.tokenizer.vocab_size = 2048
    c.backbone.update(width=128, num_layers=4, heads=4)
    # At most 8 x 16 x log2(1 / 0.3) = 222 bits of the 64 tokens.
    c.encoder.update(num_latents=8, latent_dim=16, width=128, heads=4, num_layers=2)
    c.decoder.cross_layers = (0, 2)
    c.latent_denoiser.update(width=192, num_layers=4)
    c.scorer_network.update(width=128, num_layers=4, heads=4)
    for stage in (c.mdlm, c.mdlm_long, c.autoregressive, c.autoencoder, c.ladiff, c.diladiff):
        stage.batch = 64
    c.mdlm.steps, c.autoencoder.steps, c.ladiff.steps, c.diladiff.steps = 4000, 2000, 6000, 600
    c.mdlm_long.steps, c.scorer.steps = c.autoencoder.steps, 0
    c.autoregressive.steps = c.mdlm.steps + c.autoencoder.steps
    c.sampling.batch = 32
    c.evaluation.update(
        samples=256, decode_steps=(1, 2, 4, 8, 16, 32, 64), control_steps=(1, 4, 16)
    )
    c.logging.update(validate_every=500, checkpoint_every=200)
    return c
