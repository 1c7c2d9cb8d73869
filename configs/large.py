"""A backbone of about one billion parameters: past one device's memory with its optimizer, so sharded over fsdp and tensor.

    python launch/train.py --config=configs/large.py --workdir=W --stage=all                      # 8 chips: 1 x 4 x 2
    python launch/train.py --config=configs/large.py --workdir=W --stage=all --config.mesh.fsdp=16 # 32 chips

Heads, MLP and vocabulary are cut over `tensor`, the width over `fsdp`; `data` takes the devices that are left.
"""

from ml_collections import ConfigDict

from diladiff_jax.config import default_config


def get_config() -> ConfigDict:
    c = default_config()
    c.compute_dtype = "bfloat16"
    c.data.validation_fraction = 0.0125
    c.tokenizer.update(kind="unigram", vocab_size=32_768)
    c.backbone.update(width=2048, num_layers=20, heads=16)
    c.encoder.update(latent_dim=1024, width=1024, heads=16)
    c.decoder.cross_layers = (0, 19)
    c.latent_denoiser.update(width=1536, num_layers=16, heads=16)
    c.mesh.update(data=-1, fsdp=4, tensor=2)
    for stage in (c.mdlm, c.autoencoder, c.ladiff, c.diladiff):
        stage.accumulate = 4
    return c
